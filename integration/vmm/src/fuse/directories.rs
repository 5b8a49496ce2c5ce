//! Requests for directories, and the entries that they return.

#![expect(
    clippy::missing_errors_doc,
    reason = "each is FuseError::Refused where the file system says no, else as Client::collect"
)]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use zerocopy::{FromBytes, IntoBytes};

use super::requests::{Call, bad_reply};
use super::wire::{Dirent, EntryOut, ReadIn, opcode};
use super::{Client, FuseError, Guest, Handle};

/// An entry of READDIR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode number.
    pub ino: u64,
    /// The offset of a READDIR that continues after this entry.
    pub offset: u64,
    /// The file's type as `readdir` has it: `DT_DIR` and so on.
    pub kind: u32,
    /// The name.
    pub name: OsString,
}

/// An entry of READDIRPLUS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntryPlus {
    /// What LOOKUP would return; nodeid 0 if the server did not look it up.
    pub node: EntryOut,
    /// The entry itself.
    pub entry: DirEntry,
}

impl<G: Guest> Client<G> {
    /// OPENDIR.
    pub fn opendir(&mut self, nodeid: u64) -> Result<Handle, FuseError> {
        self.open_as(opcode::OPENDIR, nodeid, libc::O_RDONLY | libc::O_DIRECTORY)
    }

    /// RELEASEDIR.
    pub fn releasedir(&mut self, nodeid: u64, handle: Handle) -> Result<(), FuseError> {
        self.release_as(opcode::RELEASEDIR, nodeid, handle)
    }

    /// FSYNCDIR; only the data if `data_only`.
    pub fn fsyncdir(
        &mut self,
        nodeid: u64,
        handle: Handle,
        data_only: bool,
    ) -> Result<(), FuseError> {
        self.fsync_as(opcode::FSYNCDIR, nodeid, handle, data_only)
    }

    /// READDIR from `offset`, once: what fits in `size` bytes, nothing at the end.
    pub fn readdir(
        &mut self,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        size: u32,
    ) -> Result<Vec<DirEntry>, FuseError> {
        let bytes = self.read_as(opcode::READDIR, nodeid, handle, offset, size)?;
        let mut entries = Vec::new();
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let (entry, rest) = entry(opcode::READDIR, left, 0)?;
            entries.push(entry);
            left = rest;
        }
        Ok(entries)
    }

    /// READDIRPLUS from `offset`, once: what fits in `size` bytes, nothing at the end.
    pub fn readdirplus(
        &mut self,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        size: u32,
    ) -> Result<Vec<DirEntryPlus>, FuseError> {
        let bytes = self.read_as(opcode::READDIRPLUS, nodeid, handle, offset, size)?;
        let mut entries = Vec::new();
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let Ok((node, _)) = EntryOut::read_from_prefix(left) else {
                return Err(truncated(opcode::READDIRPLUS, left));
            };
            let (entry, rest) = entry(opcode::READDIRPLUS, left, size_of::<EntryOut>())?;
            entries.push(DirEntryPlus { node, entry });
            left = rest;
        }
        Ok(entries)
    }

    /// READDIR again and again, in 4 KiB, until there is nothing more.
    pub fn readdir_all(&mut self, nodeid: u64, handle: Handle) -> Result<Vec<DirEntry>, FuseError> {
        let mut all: Vec<DirEntry> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |entry| entry.offset);
            let more = self.readdir(nodeid, handle, offset, 4096)?;
            if more.is_empty() {
                return Ok(all);
            }
            all.extend(more);
        }
    }

    /// READDIRPLUS again and again, in 4 KiB, until there is nothing more.
    pub fn readdirplus_all(
        &mut self,
        nodeid: u64,
        handle: Handle,
    ) -> Result<Vec<DirEntryPlus>, FuseError> {
        let mut all: Vec<DirEntryPlus> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |plus| plus.entry.offset);
            let more = self.readdirplus(nodeid, handle, offset, 4096)?;
            if more.is_empty() {
                return Ok(all);
            }
            all.extend(more);
        }
    }

    fn read_as(
        &mut self,
        opcode: u32,
        nodeid: u64,
        handle: Handle,
        offset: u64,
        size: u32,
    ) -> Result<Vec<u8>, FuseError> {
        let asked = ReadIn {
            fh: handle.fh,
            offset,
            size,
            ..ReadIn::default()
        };
        let call = Call::new(opcode, nodeid).arg(asked.as_bytes());
        Ok(self.request(call.reply(size))?.bytes)
    }
}

/// Takes one entry whose `Dirent` begins `skip` bytes into `bytes`. Returns it and what is left.
fn entry(opcode: u32, bytes: &[u8], skip: usize) -> Result<(DirEntry, &[u8]), FuseError> {
    let whole = || truncated(opcode, bytes);
    let inner = bytes.get(skip..).ok_or_else(whole)?;
    let (dirent, rest) = Dirent::read_from_prefix(inner).map_err(|_size| whole())?;
    let len = dirent.namelen as usize;
    let name = rest.get(..len).ok_or_else(whole)?;
    // READDIR's last entry is padded too.
    let end = (skip + size_of::<Dirent>() + len).next_multiple_of(8);
    let left = bytes.get(end..).ok_or_else(whole)?;
    let entry = DirEntry {
        ino: dirent.ino,
        offset: dirent.off,
        kind: dirent.r#type,
        name: OsString::from_vec(name.to_vec()),
    };
    Ok((entry, left))
}

fn truncated(opcode: u32, left: &[u8]) -> FuseError {
    let what = format!("an entry does not fit in the last {} bytes", left.len());
    bad_reply(opcode, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirent(namelen: u32) -> Vec<u8> {
        let dirent = Dirent {
            ino: 5,
            off: 9,
            namelen,
            r#type: 4,
        };
        dirent.as_bytes().to_vec()
    }

    #[test]
    fn entries_are_padded_to_eight_bytes() {
        let bytes = [&dirent(3), b"abc\0\0\0\0\0".as_slice(), b"rest"].concat();
        let (entry, left) = entry(28, &bytes, 0).unwrap();
        assert_eq!((entry.ino, entry.offset, entry.kind), (5, 9, 4));
        assert_eq!(entry.name, "abc");
        assert_eq!(left, b"rest");
    }

    #[test]
    fn a_name_that_is_cut_off_is_an_error() {
        for bytes in [
            dirent(3),
            [&dirent(9), b"abc\0\0\0\0\0".as_slice()].concat(),
        ] {
            assert!(entry(28, &bytes, 0).is_err());
            assert!(entry(28, &bytes[..20], 0).is_err());
            assert!(entry(44, &bytes, 128).is_err());
        }
    }
}
