//! Requests for open files and their data.

#![expect(
    clippy::missing_errors_doc,
    reason = "each is FuseError::Refused where the file system says no, else as Client::collect"
)]

use std::ffi::CStr;

use zerocopy::IntoBytes;

use super::requests::{Call, Pending};
use super::wire::{
    CopyFileRangeIn, CopyFileRangeOut, CreateIn, EntryOut, FallocateIn, FileLock, FlushIn, FsyncIn,
    InterruptIn, LkIn, LkOut, LseekIn, LseekOut, OpenIn, OpenOut, ReadIn, ReleaseIn,
    SETUPMAPPING_READ, SETUPMAPPING_WRITE, SetupmappingIn, WriteIn, WriteOut, opcode, request_flag,
};
use super::{Client, FuseError, Guest};

/// An open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    /// The server's number for it.
    pub fh: u64,
    /// Bits of [`super::wire::fopen`].
    pub open_flags: u32,
}

impl Handle {
    /// Any number as a handle, for servers that need no OPEN.
    #[must_use]
    pub fn raw(fh: u64) -> Self {
        Self { fh, open_flags: 0 }
    }
}

impl From<OpenOut> for Handle {
    fn from(out: OpenOut) -> Self {
        Self {
            fh: out.fh,
            open_flags: out.open_flags,
        }
    }
}

impl<G: Guest> Client<G> {
    /// OPEN, with flags as `open` has them.
    pub fn open(&mut self, nodeid: u64, flags: i32) -> Result<Handle, FuseError> {
        self.open_as(opcode::OPEN, nodeid, flags)
    }

    /// CREATE for reading and writing.
    pub fn create(
        &mut self,
        parent: u64,
        name: &CStr,
        mode: u32,
    ) -> Result<(EntryOut, Handle), FuseError> {
        self.create_with(parent, name, mode, libc::O_RDWR | libc::O_CREAT)
    }

    /// CREATE, with flags as `open` has them.
    pub fn create_with(
        &mut self,
        parent: u64,
        name: &CStr,
        mode: u32,
        flags: i32,
    ) -> Result<(EntryOut, Handle), FuseError> {
        self.create_as(opcode::CREATE, parent, name, mode, flags)
    }

    /// TMPFILE for reading and writing. Linux sends the name `/` for show.
    pub fn tmpfile(&mut self, parent: u64, mode: u32) -> Result<(EntryOut, Handle), FuseError> {
        self.create_as(opcode::TMPFILE, parent, c"/", mode, libc::O_RDWR)
    }

    /// READ.
    pub fn read(
        &mut self,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        size: u32,
    ) -> Result<Vec<u8>, FuseError> {
        let pending = self.submit_read(nodeid, handle, offset, size)?;
        Ok(self.collect(pending)?.bytes)
    }

    /// READ without waiting; collect it with [`Client::collect`].
    pub fn submit_read(
        &mut self,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        size: u32,
    ) -> Result<Pending, FuseError> {
        let asked = ReadIn {
            fh: handle.fh,
            offset,
            size,
            ..ReadIn::default()
        };
        let call = Call::new(opcode::READ, nodeid).arg(asked.as_bytes());
        self.submit(call.reply(size))
    }

    /// WRITE, with its payload after its header. Returns how much was written.
    pub fn write(
        &mut self,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        bytes: &[u8],
    ) -> Result<u32, FuseError> {
        let pending = self.submit_write(nodeid, handle, offset, bytes)?;
        Ok(self.collect(pending)?.value::<WriteOut>()?.size)
    }

    /// WRITE without waiting; collect it with [`Client::collect`], a [`WriteOut`].
    pub fn submit_write(
        &mut self,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        bytes: &[u8],
    ) -> Result<Pending, FuseError> {
        let asked = WriteIn {
            fh: handle.fh,
            offset,
            size: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            ..WriteIn::default()
        };
        let call = Call::new(opcode::WRITE, nodeid).arg(asked.as_bytes());
        self.submit(call.arg(bytes).reply_of::<WriteOut>())
    }

    /// FLUSH, as at each `close`.
    pub fn flush(&mut self, nodeid: u64, handle: Handle) -> Result<(), FuseError> {
        let asked = FlushIn {
            fh: handle.fh,
            ..FlushIn::default()
        };
        self.done(Call::new(opcode::FLUSH, nodeid).arg(asked.as_bytes()))
    }

    /// RELEASE, as at the last `close`.
    pub fn release(&mut self, nodeid: u64, handle: Handle) -> Result<(), FuseError> {
        self.release_as(opcode::RELEASE, nodeid, handle)
    }

    /// FSYNC; only the data if `data_only`.
    pub fn fsync(&mut self, nodeid: u64, handle: Handle, data_only: bool) -> Result<(), FuseError> {
        self.fsync_as(opcode::FSYNC, nodeid, handle, data_only)
    }

    /// FALLOCATE, with a mode as `fallocate` has it.
    pub fn fallocate(
        &mut self,
        nodeid: u64,
        handle: Handle,
        mode: i32,
        range: std::ops::Range<u64>,
    ) -> Result<(), FuseError> {
        let asked = FallocateIn {
            fh: handle.fh,
            offset: range.start,
            length: range.end.saturating_sub(range.start),
            mode: mode.cast_unsigned(),
            padding: 0,
        };
        self.done(Call::new(opcode::FALLOCATE, nodeid).arg(asked.as_bytes()))
    }

    /// SETUPMAPPING of `len` bytes from `file_offset` on at `window_offset`, as Linux asks: for
    /// reading, and for writing too if `writable`.
    pub fn setup_mapping(
        &mut self,
        nodeid: u64,
        (file_offset, len): (u64, u64),
        window_offset: u64,
        writable: bool,
    ) -> Result<(), FuseError> {
        let pending = self.submit_mapping(nodeid, (file_offset, len), window_offset, writable)?;
        self.collect(pending)?;
        Ok(())
    }

    /// As [`setup_mapping`](Self::setup_mapping), without waiting for the reply.
    pub fn submit_mapping(
        &mut self,
        nodeid: u64,
        (file_offset, len): (u64, u64),
        window_offset: u64,
        writable: bool,
    ) -> Result<Pending, FuseError> {
        let write = if writable { SETUPMAPPING_WRITE } else { 0 };
        let asked = SetupmappingIn {
            fh: u64::MAX,
            foffset: file_offset,
            len,
            flags: SETUPMAPPING_READ | write,
            moffset: window_offset,
        };
        let call = Call::new(opcode::SETUPMAPPING, nodeid).arg(asked.as_bytes());
        self.submit(call.reply(0))
    }

    /// REMOVEMAPPING of ranges of the window.
    pub fn remove_mappings(&mut self, nodeid: u64, ranges: &[(u64, u64)]) -> Result<(), FuseError> {
        let count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
        let ones = ranges.iter().flat_map(|(moffset, len)| [*moffset, *len]);
        let ones: Vec<u64> = ones.collect();
        let call = Call::new(opcode::REMOVEMAPPING, nodeid)
            .arg(count.as_bytes())
            .arg(ones.as_bytes());
        self.request(call.reply(0))?;
        Ok(())
    }

    /// LSEEK, with `whence` as `lseek` has it. Returns the offset found.
    pub fn lseek(
        &mut self,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        whence: i32,
    ) -> Result<u64, FuseError> {
        let asked = LseekIn {
            fh: handle.fh,
            offset,
            whence: whence.cast_unsigned(),
            padding: 0,
        };
        let call = Call::new(opcode::LSEEK, nodeid).arg(asked.as_bytes());
        let found = self.request(call.reply_of::<LseekOut>())?;
        Ok(found.value::<LseekOut>()?.offset)
    }

    /// COPY_FILE_RANGE from `nodeid`. Returns how much was copied.
    pub fn copy_file_range(
        &mut self,
        nodeid: u64,
        asked: &CopyFileRangeIn,
    ) -> Result<u32, FuseError> {
        let call = Call::new(opcode::COPY_FILE_RANGE, nodeid).arg(asked.as_bytes());
        let copied = self.request(call.reply_of::<WriteOut>())?;
        Ok(copied.value::<WriteOut>()?.size)
    }

    /// COPY_FILE_RANGE_64 from `nodeid`. Returns how much was copied.
    pub fn copy_file_range_64(
        &mut self,
        nodeid: u64,
        asked: &CopyFileRangeIn,
    ) -> Result<u64, FuseError> {
        let call = Call::new(opcode::COPY_FILE_RANGE_64, nodeid).arg(asked.as_bytes());
        let copied = self.request(call.reply_of::<CopyFileRangeOut>())?;
        Ok(copied.value::<CopyFileRangeOut>()?.bytes_copied)
    }

    /// GETLK: the lock that conflicts with this one.
    pub fn getlk(
        &mut self,
        nodeid: u64,
        handle: Handle,
        owner: u64,
        lock: FileLock,
    ) -> Result<FileLock, FuseError> {
        let asked = lock_in(handle, owner, lock);
        let call = Call::new(opcode::GETLK, nodeid).arg(asked.as_bytes());
        Ok(self.request(call.reply_of::<LkOut>())?.value::<LkOut>()?.lk)
    }

    /// SETLK.
    pub fn setlk(
        &mut self,
        nodeid: u64,
        handle: Handle,
        owner: u64,
        lock: FileLock,
    ) -> Result<(), FuseError> {
        let asked = lock_in(handle, owner, lock);
        self.done(Call::new(opcode::SETLK, nodeid).arg(asked.as_bytes()))
    }

    /// SETLKW without waiting; collect it with [`Client::collect`].
    pub fn submit_setlkw(
        &mut self,
        nodeid: u64,
        handle: Handle,
        owner: u64,
        lock: FileLock,
    ) -> Result<Pending, FuseError> {
        let asked = lock_in(handle, owner, lock);
        let call = Call::new(opcode::SETLKW, nodeid).arg(asked.as_bytes());
        self.submit(call.reply(0))
    }

    /// INTERRUPT of a request in flight, over the high-priority queue. It has no reply unless it
    /// comes too early, which is an error (EAGAIN) then.
    pub fn interrupt(&mut self, pending: Pending) -> Result<(), FuseError> {
        let asked = InterruptIn {
            unique: pending.unique(),
        };
        let call = Call::new(opcode::INTERRUPT, 0).unique(pending.unique() | 1);
        match self.request(call.arg(asked.as_bytes()).reply(0)) {
            Ok(_) | Err(FuseError::Empty { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn open_as(
        &mut self,
        opcode: u32,
        nodeid: u64,
        flags: i32,
    ) -> Result<Handle, FuseError> {
        let asked = OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let call = Call::new(opcode, nodeid).arg(asked.as_bytes());
        let opened = self.request(call.reply_of::<OpenOut>())?;
        Ok(opened.value::<OpenOut>()?.into())
    }

    pub(super) fn release_as(
        &mut self,
        opcode: u32,
        nodeid: u64,
        handle: Handle,
    ) -> Result<(), FuseError> {
        let asked = ReleaseIn {
            fh: handle.fh,
            ..ReleaseIn::default()
        };
        self.done(Call::new(opcode, nodeid).arg(asked.as_bytes()))
    }

    pub(super) fn fsync_as(
        &mut self,
        opcode: u32,
        nodeid: u64,
        handle: Handle,
        data_only: bool,
    ) -> Result<(), FuseError> {
        let asked = FsyncIn {
            fh: handle.fh,
            fsync_flags: u32::from(data_only) * request_flag::FSYNC_FDATASYNC,
            padding: 0,
        };
        self.done(Call::new(opcode, nodeid).arg(asked.as_bytes()))
    }

    fn create_as(
        &mut self,
        opcode: u32,
        parent: u64,
        name: &CStr,
        mode: u32,
        flags: i32,
    ) -> Result<(EntryOut, Handle), FuseError> {
        let asked = CreateIn {
            flags: flags.cast_unsigned(),
            mode: libc::S_IFREG | self.masked(mode),
            umask: self.umask,
            open_flags: 0,
        };
        let call = Call::new(opcode, parent).arg(asked.as_bytes()).name(name);
        let made = self.request(call.reply_of::<(EntryOut, OpenOut)>())?;
        let (entry, opened) = made.values::<EntryOut, OpenOut>()?;
        Ok((entry, opened.into()))
    }
}

fn lock_in(handle: Handle, owner: u64, lock: FileLock) -> LkIn {
    LkIn {
        fh: handle.fh,
        owner,
        lk: lock,
        ..LkIn::default()
    }
}
