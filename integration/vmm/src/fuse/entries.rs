//! Requests with names: lookup, create, link, rename and remove.

#![expect(
    clippy::missing_errors_doc,
    reason = "each is FuseError::Refused where the file system says no, else as Client::collect"
)]

use std::ffi::CStr;

use zerocopy::IntoBytes;

use super::requests::Call;
use super::wire::{
    BatchForgetIn, EntryOut, ForgetIn, ForgetOne, LinkIn, MkdirIn, MknodIn, Rename2In, RenameIn,
    init, opcode,
};
use super::{Client, FuseError, Guest};

impl<G: Guest> Client<G> {
    /// LOOKUP.
    pub fn lookup(&mut self, parent: u64, name: &CStr) -> Result<EntryOut, FuseError> {
        self.entry(Call::new(opcode::LOOKUP, parent).name(name))
    }

    /// FORGET. It has no reply; this waits until its chain is back.
    pub fn forget(&mut self, nodeid: u64, lookups: u64) -> Result<(), FuseError> {
        let asked = ForgetIn { nlookup: lookups };
        self.request(Call::new(opcode::FORGET, nodeid).arg(asked.as_bytes()))?;
        Ok(())
    }

    /// BATCH_FORGET, of pairs of a nodeid and its lookups. It has no reply, as FORGET.
    pub fn batch_forget(&mut self, nodes: &[(u64, u64)]) -> Result<(), FuseError> {
        let asked = BatchForgetIn {
            count: u32::try_from(nodes.len()).unwrap_or(u32::MAX),
            dummy: 0,
        };
        let one = |&(nodeid, nlookup)| ForgetOne { nodeid, nlookup };
        let ones: Vec<_> = nodes.iter().map(one).collect();
        let call = Call::new(opcode::BATCH_FORGET, 0).arg(asked.as_bytes());
        self.request(call.arg(ones.as_bytes()))?;
        Ok(())
    }

    /// SYMLINK: `name` leads to `target`.
    pub fn symlink(
        &mut self,
        parent: u64,
        name: &CStr,
        target: &CStr,
    ) -> Result<EntryOut, FuseError> {
        let call = Call::new(opcode::SYMLINK, parent);
        self.entry(call.name(name).name(target))
    }

    /// READLINK.
    pub fn readlink(&mut self, nodeid: u64) -> Result<Vec<u8>, FuseError> {
        let call = Call::new(opcode::READLINK, nodeid).reply(4096);
        Ok(self.request(call)?.bytes)
    }

    /// MKNOD, with a mode that contains the file's type.
    pub fn mknod(
        &mut self,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
    ) -> Result<EntryOut, FuseError> {
        let asked = MknodIn {
            mode: self.masked(mode),
            rdev,
            umask: self.umask,
            padding: 0,
        };
        let call = Call::new(opcode::MKNOD, parent);
        self.entry(call.arg(asked.as_bytes()).name(name))
    }

    /// MKDIR.
    pub fn mkdir(&mut self, parent: u64, name: &CStr, mode: u32) -> Result<EntryOut, FuseError> {
        let asked = MkdirIn {
            mode: self.masked(mode),
            umask: self.umask,
        };
        let call = Call::new(opcode::MKDIR, parent);
        self.entry(call.arg(asked.as_bytes()).name(name))
    }

    /// UNLINK.
    pub fn unlink(&mut self, parent: u64, name: &CStr) -> Result<(), FuseError> {
        self.done(Call::new(opcode::UNLINK, parent).name(name))
    }

    /// RMDIR.
    pub fn rmdir(&mut self, parent: u64, name: &CStr) -> Result<(), FuseError> {
        self.done(Call::new(opcode::RMDIR, parent).name(name))
    }

    /// RENAME.
    pub fn rename(
        &mut self,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
    ) -> Result<(), FuseError> {
        let asked = RenameIn { newdir: new_parent };
        let call = Call::new(opcode::RENAME, parent).arg(asked.as_bytes());
        self.done(call.name(name).name(new_name))
    }

    /// RENAME2, with flags as `renameat2` has them.
    pub fn rename2(
        &mut self,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> Result<(), FuseError> {
        let asked = Rename2In {
            newdir: new_parent,
            flags,
            padding: 0,
        };
        let call = Call::new(opcode::RENAME2, parent).arg(asked.as_bytes());
        self.done(call.name(name).name(new_name))
    }

    /// LINK: another name for `nodeid`.
    pub fn link(
        &mut self,
        nodeid: u64,
        new_parent: u64,
        new_name: &CStr,
    ) -> Result<EntryOut, FuseError> {
        let asked = LinkIn { oldnodeid: nodeid };
        let call = Call::new(opcode::LINK, new_parent).arg(asked.as_bytes());
        self.entry(call.name(new_name))
    }

    /// A request whose reply is an entry.
    fn entry(&mut self, call: Call<'_>) -> Result<EntryOut, FuseError> {
        self.request(call.reply_of::<EntryOut>())?.value()
    }

    /// A request whose reply is empty.
    pub(super) fn done(&mut self, call: Call<'_>) -> Result<(), FuseError> {
        self.request(call.reply(0))?.value::<[u8; 0]>()?;
        Ok(())
    }

    /// The kernel applies the umask itself unless DONT_MASK is agreed on.
    pub(super) fn masked(&self, mode: u32) -> u32 {
        if self.has(init::DONT_MASK) {
            mode
        } else {
            mode & !self.umask
        }
    }
}
