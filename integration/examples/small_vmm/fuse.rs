//! The guest's file system: the few requests that this guest makes (`include/uapi/linux/fuse.h`).
//!
//! The invariant: a reply belongs to the last request, and is an error or has what was asked for.

use std::error::Error;
use std::ffi::CStr;

use super::driver::Driver;

const ROOT: u64 = 1;

const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;

/// Length of the header of a reply.
const OUT_HEADER: usize = 16;
/// Length of the reply to LOOKUP, which CREATE's begins with.
const ENTRY: usize = 128;

/// A share that is mounted.
pub(crate) struct Fuse {
    driver: Driver,
    unique: u64,
}

impl Fuse {
    pub(crate) fn mount(driver: Driver) -> Result<Self, Box<dyn Error>> {
        let mut fs = Self { driver, unique: 0 };
        // Version 7.38, read-ahead, no flags.
        let version = [7_u32, 38, 0, 0].map(u32::to_ne_bytes).concat();
        let reply = fs.call(INIT, 0, &[&version, &[0; 48]])?;
        println!("FUSE {}.{}", word(&reply, 0)?, word(&reply, 4)?);
        Ok(fs)
    }

    /// LOOKUP and OPEN of a file in the root: its node and handle.
    pub(crate) fn open(&mut self, name: &CStr) -> Result<(u64, u64), Box<dyn Error>> {
        let entry = self.call(LOOKUP, ROOT, &[name.to_bytes_with_nul()])?;
        let node = long(&entry, 0)?;
        let opened = self.call(OPEN, node, &[&[0; 8]])?;
        Ok((node, long(&opened, 0)?))
    }

    /// CREATE of a file in the root: its node and handle.
    pub(crate) fn create(&mut self, name: &CStr) -> Result<(u64, u64), Box<dyn Error>> {
        let flags = (libc::O_WRONLY | libc::O_TRUNC).to_ne_bytes();
        let mode = (libc::S_IFREG | 0o644).to_ne_bytes();
        let name = name.to_bytes_with_nul();
        let reply = self.call(CREATE, ROOT, &[&flags, &mode, &[0; 8], name])?;
        Ok((long(&reply, 0)?, long(&reply, ENTRY)?))
    }

    pub(crate) fn read(
        &mut self,
        node: u64,
        handle: u64,
        len: u32,
    ) -> Result<Vec<u8>, Box<dyn Error>> {
        let (handle, len) = (handle.to_ne_bytes(), len.to_ne_bytes());
        self.call(READ, node, &[&handle, &[0; 8], &len, &[0; 20]])
    }

    pub(crate) fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Box<dyn Error>> {
        let len = u32::try_from(data.len())?;
        let arguments = [handle.to_ne_bytes(), offset.to_ne_bytes()].concat();
        let reply = self.call(
            WRITE,
            node,
            &[&arguments, &len.to_ne_bytes(), &[0; 20], data],
        )?;
        match word(&reply, 0)? {
            written if written == len => Ok(()),
            written => Err(format!("only {written} of {len} bytes were written").into()),
        }
    }

    pub(crate) fn unmount(mut self) -> Result<(), Box<dyn Error>> {
        self.call(DESTROY, 0, &[]).map(drop)
    }

    /// Sends a request, and returns what follows the header of its reply.
    fn call(
        &mut self,
        opcode: u32,
        node: u64,
        arguments: &[&[u8]],
    ) -> Result<Vec<u8>, Box<dyn Error>> {
        self.unique += 2;
        let arguments = arguments.concat();
        let len = u32::try_from(40 + arguments.len())?;
        let mut request = Vec::new();
        request.extend(len.to_ne_bytes());
        request.extend(opcode.to_ne_bytes());
        request.extend(self.unique.to_ne_bytes());
        request.extend(node.to_ne_bytes());
        // Made by the user and group of this program.
        request.extend(rustix::process::geteuid().as_raw().to_ne_bytes());
        request.extend(rustix::process::getegid().as_raw().to_ne_bytes());
        request.extend([0; 8]);
        request.extend(&arguments);
        let mut reply = self.driver.request(&request)?;
        if long(&reply, 8)? != self.unique {
            return Err("a reply to another request".into());
        }
        match i32::from_ne_bytes(word(&reply, 4)?.to_ne_bytes()) {
            0 => Ok(reply.split_off(OUT_HEADER)),
            error => Err(std::io::Error::from_raw_os_error(-error).into()),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, Box<dyn Error>> {
    let bytes = bytes.get(at..at + 4).ok_or("the reply is too short")?;
    Ok(u32::from_ne_bytes(bytes.try_into()?))
}

fn long(bytes: &[u8], at: usize) -> Result<u64, Box<dyn Error>> {
    let bytes = bytes.get(at..at + 8).ok_or("the reply is too short")?;
    Ok(u64::from_ne_bytes(bytes.try_into()?))
}
