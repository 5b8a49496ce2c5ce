//! Requests for attributes, extended attributes, permissions and the file system.

#![expect(
    clippy::missing_errors_doc,
    reason = "each is FuseError::Refused where the file system says no, else as Client::collect"
)]

use std::ffi::{CStr, CString};

use zerocopy::IntoBytes;

use super::requests::Call;
use super::wire::{
    AccessIn, AttrOut, GetattrIn, GetxattrIn, GetxattrOut, Kstatfs, SetattrIn, SetxattrIn,
    SetxattrInCompat, StatxIn, StatxOut, SyncfsIn, init, opcode, request_flag, setattr,
};
use super::{Client, FuseError, Guest, Handle};

/// Room for an extended attribute's value, or for a list of names: the kernel's limit for both.
const XATTR_MAX: u32 = 64 << 10;

impl<G: Guest> Client<G> {
    /// GETATTR.
    pub fn getattr(&mut self, nodeid: u64) -> Result<AttrOut, FuseError> {
        self.getattr_with(nodeid, GetattrIn::default())
    }

    /// GETATTR of an open file.
    pub fn fgetattr(&mut self, nodeid: u64, handle: Handle) -> Result<AttrOut, FuseError> {
        let asked = GetattrIn {
            getattr_flags: request_flag::GETATTR_FH,
            dummy: 0,
            fh: handle.fh,
        };
        self.getattr_with(nodeid, asked)
    }

    /// SETATTR of what `asked.valid` says, bits of [`setattr`].
    pub fn setattr(&mut self, nodeid: u64, asked: &SetattrIn) -> Result<AttrOut, FuseError> {
        let call = Call::new(opcode::SETATTR, nodeid).arg(asked.as_bytes());
        self.request(call.reply_of::<AttrOut>())?.value()
    }

    /// SETATTR of the mode.
    pub fn chmod(&mut self, nodeid: u64, mode: u32) -> Result<AttrOut, FuseError> {
        let asked = SetattrIn {
            valid: setattr::MODE,
            mode,
            ..SetattrIn::default()
        };
        self.setattr(nodeid, &asked)
    }

    /// SETATTR of the owners.
    pub fn chown(&mut self, nodeid: u64, uid: u32, gid: u32) -> Result<AttrOut, FuseError> {
        let asked = SetattrIn {
            valid: setattr::UID | setattr::GID,
            uid,
            gid,
            ..SetattrIn::default()
        };
        self.setattr(nodeid, &asked)
    }

    /// SETATTR of the size.
    pub fn truncate(&mut self, nodeid: u64, size: u64) -> Result<AttrOut, FuseError> {
        let asked = SetattrIn {
            valid: setattr::SIZE,
            size,
            ..SetattrIn::default()
        };
        self.setattr(nodeid, &asked)
    }

    /// STATX of what `mask` says, bits as `statx` has them.
    pub fn statx(&mut self, nodeid: u64, mask: u32) -> Result<StatxOut, FuseError> {
        let asked = StatxIn {
            sx_mask: mask,
            ..StatxIn::default()
        };
        let call = Call::new(opcode::STATX, nodeid).arg(asked.as_bytes());
        self.request(call.reply_of::<StatxOut>())?.value()
    }

    /// ACCESS, with a mask as `access` has it. Says who asks in any case, as Linux doesn't ask where
    /// it wouldn't tell.
    pub fn access(&mut self, nodeid: u64, mask: i32) -> Result<(), FuseError> {
        let asked = AccessIn {
            mask: mask.cast_unsigned(),
            padding: 0,
        };
        let call = Call::new(opcode::ACCESS, nodeid).by(self.credentials);
        self.done(call.arg(asked.as_bytes()))
    }

    /// STATFS.
    pub fn statfs(&mut self, nodeid: u64) -> Result<Kstatfs, FuseError> {
        let call = Call::new(opcode::STATFS, nodeid).reply_of::<Kstatfs>();
        self.request(call)?.value()
    }

    /// SYNCFS.
    pub fn syncfs(&mut self, nodeid: u64) -> Result<(), FuseError> {
        let asked = SyncfsIn::default();
        self.done(Call::new(opcode::SYNCFS, nodeid).arg(asked.as_bytes()))
    }

    /// SETXATTR, with flags as `setxattr` has them, in the form that INIT has agreed on.
    pub fn setxattr(
        &mut self,
        nodeid: u64,
        name: &CStr,
        value: &[u8],
        flags: i32,
    ) -> Result<(), FuseError> {
        let size = u32::try_from(value.len()).unwrap_or(u32::MAX);
        let flags = flags.cast_unsigned();
        let compat = SetxattrInCompat { size, flags };
        let extended = SetxattrIn {
            size,
            flags,
            ..SetxattrIn::default()
        };
        let asked = if self.has(init::SETXATTR_EXT) {
            extended.as_bytes()
        } else {
            compat.as_bytes()
        };
        let call = Call::new(opcode::SETXATTR, nodeid).arg(asked);
        self.done(call.name(name).arg(value))
    }

    /// GETXATTR: the value, whatever its size.
    pub fn getxattr(&mut self, nodeid: u64, name: &CStr) -> Result<Vec<u8>, FuseError> {
        self.getxattr_into(nodeid, name, XATTR_MAX)
    }

    /// GETXATTR with room for `size` bytes, not 0.
    pub fn getxattr_into(
        &mut self,
        nodeid: u64,
        name: &CStr,
        size: u32,
    ) -> Result<Vec<u8>, FuseError> {
        let asked = GetxattrIn { size, padding: 0 };
        let call = Call::new(opcode::GETXATTR, nodeid).arg(asked.as_bytes());
        Ok(self.request(call.name(name).reply(size))?.bytes)
    }

    /// GETXATTR of the value's size only.
    pub fn getxattr_size(&mut self, nodeid: u64, name: &CStr) -> Result<u32, FuseError> {
        let asked = GetxattrIn::default();
        let call = Call::new(opcode::GETXATTR, nodeid).arg(asked.as_bytes());
        let reply = self.request(call.name(name).reply_of::<GetxattrOut>())?;
        Ok(reply.value::<GetxattrOut>()?.size)
    }

    /// LISTXATTR: the names.
    pub fn listxattr(&mut self, nodeid: u64) -> Result<Vec<CString>, FuseError> {
        let asked = GetxattrIn {
            size: XATTR_MAX,
            padding: 0,
        };
        let call = Call::new(opcode::LISTXATTR, nodeid).arg(asked.as_bytes());
        let list = self.request(call.reply(XATTR_MAX))?.bytes;
        let names = list.split_inclusive(|&byte| byte == 0);
        let name = |bytes: &[u8]| CStr::from_bytes_with_nul(bytes).map(CStr::to_owned);
        names
            .map(name)
            .collect::<Result<_, _>>()
            .map_err(|_no_nul| {
                let what = "a name does not end".to_owned();
                super::requests::bad_reply(opcode::LISTXATTR, what)
            })
    }

    /// LISTXATTR of the list's size only.
    pub fn listxattr_size(&mut self, nodeid: u64) -> Result<u32, FuseError> {
        let asked = GetxattrIn::default();
        let call = Call::new(opcode::LISTXATTR, nodeid).arg(asked.as_bytes());
        let reply = self.request(call.reply_of::<GetxattrOut>())?;
        Ok(reply.value::<GetxattrOut>()?.size)
    }

    /// REMOVEXATTR.
    pub fn removexattr(&mut self, nodeid: u64, name: &CStr) -> Result<(), FuseError> {
        self.done(Call::new(opcode::REMOVEXATTR, nodeid).name(name))
    }

    fn getattr_with(&mut self, nodeid: u64, asked: GetattrIn) -> Result<AttrOut, FuseError> {
        let call = Call::new(opcode::GETATTR, nodeid).arg(asked.as_bytes());
        self.request(call.reply_of::<AttrOut>())?.value()
    }
}
