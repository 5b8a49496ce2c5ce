//! What a guest does, and the request for it.
//!
//! The invariant: an act says everything that is to be done; the model only says by which numbers the
//! server knows what an act names.

use std::ffi::CString;

use vmm::Session;
use vmm::fuse::wire::{
    AttrOut, BatchForgetIn, CreateIn, EntryOut, FileLock, ForgetIn, ForgetOne, GetattrIn, LinkIn,
    LkIn, LkOut, MkdirIn, MknodIn, OpenIn, OpenOut, ReadIn, ReleaseIn, Rename2In, SetattrIn,
    WriteIn, WriteOut, opcode, setattr,
};
use vmm::fuse::{Call, Client, FuseError, Pending};
use zerocopy::IntoBytes;

use crate::model::{Key, Model, Name, Open};

/// Something that the guest does.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// The flag: open for appending.
    Create(Name, u32, bool),
    Mkdir(Name, u32),
    /// A named pipe.
    Mknod(Name, u32),
    /// A file without a name, in this directory.
    Tmpfile(usize, u32),
    Symlink(Name, Vec<u8>),
    Link(Key, Name),
    Unlink(Name),
    Rmdir(Name),
    /// With RENAME2's flags.
    Rename(Name, Name, u32),
    Lookup(Name),
    Getattr(Key),
    Chmod(Key, u32),
    Truncate(Key, usize),
    Readlink(Key),
    List(usize),
    /// The same with entries (READDIRPLUS).
    ListPlus(usize),
    /// The flags: open for appending; truncate.
    Opened(Key, bool, bool),
    Read(Open, usize, u32),
    Write(Open, usize, Vec<u8>),
    Release(Open),
    Lock(Open, bool),
    TestLock(Open),
    /// The flag: by BATCH_FORGET.
    Forget(Key, bool),
    /// Requests a node that was forgotten.
    Gone(u64),
}

impl Act {
    /// Sends the request.
    pub(crate) fn send(
        &self,
        model: &Model,
        fs: &mut Client<Session>,
    ) -> Result<Pending, FuseError> {
        let flags = |append: bool| {
            let append = if append { libc::O_APPEND } else { 0 };
            (libc::O_RDWR | append).cast_unsigned()
        };
        match self {
            Self::Create(name, mode, append) => {
                let create = CreateIn {
                    flags: flags(*append) | (libc::O_CREAT | libc::O_EXCL).cast_unsigned(),
                    mode: libc::S_IFREG | mode,
                    umask: 0,
                    open_flags: 0,
                };
                let call = Call::new(opcode::CREATE, model.dir(*name)).arg(create.as_bytes());
                fs.submit(call.name(&name.c()).reply_of::<(EntryOut, OpenOut)>())
            }
            Self::Mknod(name, mode) => {
                let mknod = MknodIn {
                    mode: libc::S_IFIFO | mode,
                    ..MknodIn::default()
                };
                let call = Call::new(opcode::MKNOD, model.dir(*name)).arg(mknod.as_bytes());
                fs.submit(call.name(&name.c()).reply_of::<EntryOut>())
            }
            Self::Tmpfile(dir, mode) => {
                let create = CreateIn {
                    flags: flags(false),
                    mode: libc::S_IFREG | mode,
                    ..CreateIn::default()
                };
                let dir = model.dirs.get(*dir).copied().unwrap_or(0);
                let call = Call::new(opcode::TMPFILE, dir).arg(create.as_bytes());
                fs.submit(call.name(c"/").reply_of::<(EntryOut, OpenOut)>())
            }
            Self::Mkdir(name, mode) => {
                let mkdir = MkdirIn {
                    mode: *mode,
                    umask: 0,
                };
                let call = Call::new(opcode::MKDIR, model.dir(*name)).arg(mkdir.as_bytes());
                fs.submit(call.name(&name.c()).reply_of::<EntryOut>())
            }
            Self::Symlink(name, target) => {
                let target = CString::new(target.as_slice()).unwrap_or_default();
                let link = name.c();
                let call = Call::new(opcode::SYMLINK, model.dir(*name)).name(&link);
                fs.submit(call.name(&target).reply_of::<EntryOut>())
            }
            Self::Link(key, name) => {
                let link = LinkIn {
                    oldnodeid: model.nodeid(*key),
                };
                let call = Call::new(opcode::LINK, model.dir(*name)).arg(link.as_bytes());
                fs.submit(call.name(&name.c()).reply_of::<EntryOut>())
            }
            Self::Unlink(name) => fs.submit(
                Call::new(opcode::UNLINK, model.dir(*name))
                    .name(&name.c())
                    .reply(0),
            ),
            Self::Rmdir(name) => fs.submit(
                Call::new(opcode::RMDIR, model.dir(*name))
                    .name(&name.c())
                    .reply(0),
            ),
            Self::Rename(from, to, flags) => {
                let rename = Rename2In {
                    newdir: model.dir(*to),
                    flags: *flags,
                    padding: 0,
                };
                let call = Call::new(opcode::RENAME2, model.dir(*from)).arg(rename.as_bytes());
                fs.submit(call.name(&from.c()).name(&to.c()).reply(0))
            }
            Self::Lookup(name) => {
                let call = Call::new(opcode::LOOKUP, model.dir(*name));
                fs.submit(call.name(&name.c()).reply_of::<EntryOut>())
            }
            Self::Getattr(key) => getattr(fs, model.nodeid(*key)),
            Self::Gone(nodeid) => getattr(fs, *nodeid),
            Self::Chmod(key, mode) => {
                let setattr = SetattrIn {
                    valid: setattr::MODE,
                    mode: *mode,
                    ..SetattrIn::default()
                };
                let call = Call::new(opcode::SETATTR, model.nodeid(*key));
                fs.submit(call.arg(setattr.as_bytes()).reply_of::<AttrOut>())
            }
            Self::Truncate(key, size) => {
                let setattr = SetattrIn {
                    valid: setattr::SIZE,
                    size: *size as u64,
                    ..SetattrIn::default()
                };
                let call = Call::new(opcode::SETATTR, model.nodeid(*key));
                fs.submit(call.arg(setattr.as_bytes()).reply_of::<AttrOut>())
            }
            Self::Readlink(key) => {
                fs.submit(Call::new(opcode::READLINK, model.nodeid(*key)).reply(4096))
            }
            Self::List(dir) | Self::ListPlus(dir) => {
                let nodeid = model.dirs.get(*dir).copied().unwrap_or(0);
                let read = ReadIn {
                    fh: model.listings.get(*dir).copied().unwrap_or(0),
                    size: 16 << 10,
                    ..ReadIn::default()
                };
                let opcode = match self {
                    Self::List(_) => opcode::READDIR,
                    _ => opcode::READDIRPLUS,
                };
                fs.submit(
                    Call::new(opcode, nodeid)
                        .arg(read.as_bytes())
                        .reply(16 << 10),
                )
            }
            Self::Opened(key, append, truncate) => {
                let truncate = if *truncate { libc::O_TRUNC } else { 0 };
                let open = OpenIn {
                    flags: flags(*append) | truncate.cast_unsigned(),
                    open_flags: 0,
                };
                let call = Call::new(opcode::OPEN, model.nodeid(*key)).arg(open.as_bytes());
                fs.submit(call.reply_of::<OpenOut>())
            }
            Self::Read(open, offset, size) => {
                let read = ReadIn {
                    fh: open.fh,
                    offset: *offset as u64,
                    size: *size,
                    ..ReadIn::default()
                };
                let call = Call::new(opcode::READ, model.nodeid(open.key));
                fs.submit(call.arg(read.as_bytes()).reply(*size))
            }
            Self::Write(open, offset, bytes) => {
                let write = WriteIn {
                    fh: open.fh,
                    offset: *offset as u64,
                    size: u32::try_from(bytes.len()).unwrap_or(0),
                    flags: flags(open.append),
                    ..WriteIn::default()
                };
                let call = Call::new(opcode::WRITE, model.nodeid(open.key)).arg(write.as_bytes());
                fs.submit(call.arg(bytes).reply_of::<WriteOut>())
            }
            Self::Release(open) => {
                let release = ReleaseIn {
                    fh: open.fh,
                    flags: flags(open.append),
                    release_flags: 0,
                    lock_owner: 0,
                };
                let call = Call::new(opcode::RELEASE, model.nodeid(open.key));
                fs.submit(call.arg(release.as_bytes()).reply(0))
            }
            Self::Lock(open, locks) => {
                let lock = lock(model, open, *locks, model.owner());
                let call = Call::new(opcode::SETLK, model.nodeid(open.key)).arg(lock.as_bytes());
                fs.submit(call.reply(0))
            }
            Self::TestLock(open) => {
                let lock = lock(model, open, true, 0x77);
                let call = Call::new(opcode::GETLK, model.nodeid(open.key)).arg(lock.as_bytes());
                fs.submit(call.reply_of::<LkOut>())
            }
            Self::Forget(key, batch) => {
                let nlookup = model.nodes.get(key).map_or(0, |node| node.lookups);
                let nodeid = model.nodeid(*key);
                if *batch {
                    let count = BatchForgetIn { count: 1, dummy: 0 };
                    let one = ForgetOne { nodeid, nlookup };
                    let call = Call::new(opcode::BATCH_FORGET, 0).arg(count.as_bytes());
                    fs.submit(call.arg(one.as_bytes()))
                } else {
                    let forget = ForgetIn { nlookup };
                    fs.submit(Call::new(opcode::FORGET, nodeid).arg(forget.as_bytes()))
                }
            }
        }
    }

    /// A short description for messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Write(open, offset, bytes) => {
                let how = if open.append { "append" } else { "write" };
                format!("{how} of {} bytes at {offset} to {open:?}", bytes.len())
            }
            other => format!("{other:?}"),
        }
    }
}

fn getattr(fs: &mut Client<Session>, nodeid: u64) -> Result<Pending, FuseError> {
    let asked = GetattrIn::default();
    let call = Call::new(opcode::GETATTR, nodeid).arg(asked.as_bytes());
    fs.submit(call.reply_of::<AttrOut>())
}

/// A lock of the whole file, or its release.
fn lock(model: &Model, open: &Open, locks: bool, owner: u64) -> LkIn {
    let kind = if locks { libc::F_WRLCK } else { libc::F_UNLCK };
    LkIn {
        fh: open.fh,
        owner,
        lk: FileLock {
            start: 0,
            end: i64::MAX.cast_unsigned(),
            r#type: kind.cast_unsigned(),
            pid: model.guest + 1,
        },
        lk_flags: 0,
        padding: 0,
    }
}
