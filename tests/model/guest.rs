//! The file system behind the socket, used as a guest's kernel uses it.
//!
//! Each name is looked up each time, nothing is cached. The invariant: each lookup that the server
//! counts is counted here too and forgotten, by [`System::forget`] at the latest.

use std::collections::HashMap;
use std::ffi::{CStr, CString};

use vmm::fuse::wire::{Attr, CopyFileRangeIn, EntryOut, SetattrIn, setattr};
use vmm::fuse::{Client, Errno, FuseError, Guest, Handle, ROOT};

use crate::machine::{Attributes, Result, System};

/// A client, and the directory that is the root here.
pub(crate) struct Behind<G> {
    client: Client<G>,
    root: u64,
    lookups: HashMap<u64, u64>,
    /// Inodes of open files, which a guest's kernel doesn't forget: how often each is open.
    opened: HashMap<u64, u64>,
}

/// An open file, which belongs to an inode.
pub(crate) struct Open {
    node: u64,
    handle: Handle,
}

/// The error number. Anything else is no answer of a file system.
fn errno(error: FuseError) -> i32 {
    match error {
        FuseError::Refused {
            errno: Errno(errno),
            ..
        } => errno,
        other => panic!("the server breaks the protocol: {other}"),
    }
}

fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

fn seen(attr: &Attr) -> Attributes {
    let kind = attr.mode & libc::S_IFMT;
    Attributes {
        mode: attr.mode,
        links: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        size: if kind == libc::S_IFDIR { 0 } else { attr.size },
        accessed: (attr.atime.cast_signed(), attr.atimensec),
        modified: (attr.mtime.cast_signed(), attr.mtimensec),
    }
}

impl<G: Guest> Behind<G> {
    /// Takes a new directory of this name as the root.
    pub(crate) fn in_directory(mut client: Client<G>, name: &str) -> Self {
        let root = client.mkdir(ROOT, &c(name), 0o755).unwrap().nodeid;
        Self {
            client,
            root,
            lookups: HashMap::new(),
            opened: HashMap::new(),
        }
    }

    /// Gives the client back, with nothing left that was looked up.
    pub(crate) fn into_client(mut self) -> Client<G> {
        System::forget(&mut self, &[]).unwrap();
        self.client.forget(self.root, 1).unwrap();
        self.client
    }

    fn opened(&mut self, node: u64, handle: Handle) -> Open {
        *self.opened.entry(node).or_default() += 1;
        Open { node, handle }
    }

    /// All names of an open directory.
    fn read_to_end(
        &mut self,
        node: u64,
        handle: Handle,
        bytes: u32,
        plus: bool,
    ) -> Result<Vec<(String, u32)>> {
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let more = if plus {
                let more = self.client.readdirplus(node, handle, offset, bytes);
                let more = more.map_err(errno)?;
                for one in &more {
                    // A guest's kernel doesn't count these two.
                    let dots = one.entry.name == "." || one.entry.name == "..";
                    if one.node.nodeid != 0 && !dots {
                        *self.lookups.entry(one.node.nodeid).or_default() += 1;
                    }
                }
                more.into_iter().map(|one| one.entry).collect()
            } else {
                let more = self.client.readdir(node, handle, offset, bytes);
                more.map_err(errno)?
            };
            let Some(last) = more.last() else { break };
            offset = last.offset;
            let pairs = more.into_iter();
            names.extend(pairs.map(|one| (one.name.into_string().unwrap(), one.kind)));
        }
        Ok(names)
    }

    fn count(&mut self, entry: EntryOut) -> u64 {
        *self.lookups.entry(entry.nodeid).or_default() += 1;
        entry.nodeid
    }

    fn made(&mut self, entry: std::result::Result<EntryOut, FuseError>) -> Result<()> {
        let entry = entry.map_err(errno)?;
        self.count(entry);
        Ok(())
    }
}

impl<G: Guest> System for Behind<G> {
    type Node = u64;
    type File = Open;

    fn root(&self) -> u64 {
        self.root
    }

    fn lookup(&mut self, directory: &u64, name: &str) -> Result<u64> {
        let entry = self.client.lookup(*directory, &c(name)).map_err(errno)?;
        // With no inode it says how long the guest may remember that there is none.
        if entry.nodeid == 0 {
            return Err(libc::ENOENT);
        }
        Ok(self.count(entry))
    }

    fn attributes(&mut self, node: &u64) -> Result<Attributes> {
        Ok(seen(&self.client.getattr(*node).map_err(errno)?.attr))
    }

    fn create(&mut self, at: (&u64, &str), mode: u32, flags: i32) -> Result<Open> {
        let made = self.client.create_with(*at.0, &c(at.1), mode, flags);
        let (entry, handle) = made.map_err(errno)?;
        let node = self.count(entry);
        Ok(self.opened(node, handle))
    }

    fn make_directory(&mut self, at: (&u64, &str), mode: u32) -> Result<()> {
        let made = self.client.mkdir(*at.0, &c(at.1), mode);
        self.made(made)
    }

    fn make_pipe(&mut self, at: (&u64, &str), mode: u32) -> Result<()> {
        let mode = libc::S_IFIFO | mode;
        let made = self.client.mknod(*at.0, &c(at.1), mode, 0);
        self.made(made)
    }

    fn symlink(&mut self, at: (&u64, &str), to: &str) -> Result<()> {
        let made = self.client.symlink(*at.0, &c(at.1), &c(to));
        self.made(made)
    }

    fn read_link(&mut self, node: &u64) -> Result<Vec<u8>> {
        self.client.readlink(*node).map_err(errno)
    }

    fn link(&mut self, node: &u64, at: (&u64, &str)) -> Result<()> {
        let made = self.client.link(*node, *at.0, &c(at.1));
        self.made(made)
    }

    fn unlink(&mut self, at: (&u64, &str)) -> Result<()> {
        self.client.unlink(*at.0, &c(at.1)).map_err(errno)
    }

    fn remove_directory(&mut self, at: (&u64, &str)) -> Result<()> {
        self.client.rmdir(*at.0, &c(at.1)).map_err(errno)
    }

    fn rename(&mut self, from: (&u64, &str), to: (&u64, &str), flags: u32) -> Result<()> {
        let (name, new) = (c(from.1), c(to.1));
        let renamed = match flags {
            0 => self.client.rename(*from.0, &name, *to.0, &new),
            flags => self.client.rename2(*from.0, &name, *to.0, &new, flags),
        };
        renamed.map_err(errno)
    }

    fn set_mode(&mut self, node: &u64, mode: u32) -> Result<()> {
        self.client.chmod(*node, mode).map(drop).map_err(errno)
    }

    fn set_owner(&mut self, node: &u64, uid: u32, gid: u32) -> Result<()> {
        self.client.chown(*node, uid, gid).map(drop).map_err(errno)
    }

    fn set_times(&mut self, node: &u64, at: (i64, u32)) -> Result<()> {
        let times = SetattrIn {
            valid: setattr::ATIME | setattr::MTIME,
            atime: at.0.cast_unsigned(),
            mtime: at.0.cast_unsigned(),
            atimensec: at.1,
            mtimensec: at.1,
            ..SetattrIn::default()
        };
        self.client.setattr(*node, &times).map(drop).map_err(errno)
    }

    fn truncate(&mut self, node: &u64, length: u64) -> Result<()> {
        self.client.truncate(*node, length).map(drop).map_err(errno)
    }

    fn list(&mut self, node: &u64, bytes: u32, plus: bool) -> Result<Vec<(String, u32)>> {
        let handle = self.client.opendir(*node).map_err(errno)?;
        let names = self.read_to_end(*node, handle, bytes, plus);
        // Whatever became of it: a removed directory can be opened, and not be read.
        self.client.releasedir(*node, handle).map_err(errno)?;
        names
    }

    fn set_attribute(&mut self, node: &u64, name: &CStr, value: &[u8], flags: i32) -> Result<()> {
        let set = self.client.setxattr(*node, name, value, flags);
        set.map_err(errno)
    }

    fn attribute(&mut self, node: &u64, name: &CStr) -> Result<Vec<u8>> {
        self.client.getxattr(*node, name).map_err(errno)
    }

    fn remove_attribute(&mut self, node: &u64, name: &CStr) -> Result<()> {
        self.client.removexattr(*node, name).map_err(errno)
    }

    fn list_attributes(&mut self, node: &u64) -> Result<Vec<String>> {
        let names = self.client.listxattr(*node).map_err(errno)?;
        Ok(names
            .into_iter()
            .map(|it| it.into_string().unwrap())
            .collect())
    }

    fn open(&mut self, node: &u64, flags: i32) -> Result<Open> {
        let handle = self.client.open(*node, flags).map_err(errno)?;
        Ok(self.opened(*node, handle))
    }

    fn read(&mut self, file: &Open, offset: u64, length: u32) -> Result<Vec<u8>> {
        let read = self.client.read(file.node, file.handle, offset, length);
        read.map_err(errno)
    }

    fn write(&mut self, file: &Open, offset: u64, bytes: &[u8]) -> Result<usize> {
        let written = self.client.write(file.node, file.handle, offset, bytes);
        Ok(written.map_err(errno)? as usize)
    }

    fn allocate(&mut self, file: &Open, mode: i32, offset: u64, length: u64) -> Result<()> {
        let range = offset..offset + length;
        let allocated = self.client.fallocate(file.node, file.handle, mode, range);
        allocated.map_err(errno)
    }

    fn set_length(&mut self, file: &Open, length: u64) -> Result<()> {
        let asked = SetattrIn {
            valid: setattr::SIZE | setattr::FH,
            fh: file.handle.fh,
            size: length,
            ..SetattrIn::default()
        };
        let set = self.client.setattr(file.node, &asked);
        set.map(drop).map_err(errno)
    }

    fn file_attributes(&mut self, file: &Open) -> Result<Attributes> {
        let told = self.client.fgetattr(file.node, file.handle);
        Ok(seen(&told.map_err(errno)?.attr))
    }

    fn copy(&mut self, from: (&Open, u64), to: (&Open, u64), length: u32) -> Result<usize> {
        let asked = CopyFileRangeIn {
            fh_in: from.0.handle.fh,
            off_in: from.1,
            nodeid_out: to.0.node,
            fh_out: to.0.handle.fh,
            off_out: to.1,
            len: length.into(),
            flags: 0,
        };
        let copied = self.client.copy_file_range(from.0.node, &asked);
        Ok(copied.map_err(errno)? as usize)
    }

    fn sync(&mut self, file: &Open, data_only: bool) -> Result<()> {
        let synced = self.client.fsync(file.node, file.handle, data_only);
        synced.map_err(errno)
    }

    fn close(&mut self, file: Open) -> Result<()> {
        *self.opened.entry(file.node).or_default() -= 1;
        self.opened.retain(|_, times| *times > 0);
        self.client.flush(file.node, file.handle).map_err(errno)?;
        self.client.release(file.node, file.handle).map_err(errno)
    }

    fn forget(&mut self, kept: &[&u64]) -> Result<()> {
        let gone: Vec<(u64, u64)> = self
            .lookups
            .extract_if(|node, _| !kept.contains(&node) && !self.opened.contains_key(node))
            .collect();
        if let [(node, lookups)] = gone[..] {
            self.client.forget(node, lookups).map_err(errno)?;
        } else {
            for some in gone.chunks(16) {
                self.client.batch_forget(some).map_err(errno)?;
            }
        }
        Ok(())
    }
}
