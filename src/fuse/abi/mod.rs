//! The FUSE ABI up to 7.45: numbers and layouts of Linux's `uapi/linux/fuse.h`.
//!
//! This module has no logic. Structures are plain integers in host byte order, so any bytes of the
//! right length are a valid value. The invariant: every structure has exactly the kernel's size and
//! no padding inserted by the compiler; both are checked at compile time.

mod flags;
mod opcode;
mod structures;

pub use flags::InitFlags;
pub(crate) use flags::{
    attr_flags, fsync_flags, getattr_flags, ioctl_flags, lk_flags, open_flags, open_reply_flags,
    setattr_valid, setupmapping_flags, setxattr_flags, write_flags,
};
pub use opcode::Opcode;
pub(crate) use opcode::{Arguments, Guard, Handler, ReplayClass, Row, UNKNOWN};
#[allow(
    unreachable_pub,
    unused_imports,
    reason = "the structures are the protocol's, also those that nothing uses yet"
)]
pub use structures::{
    AccessIn, Attr, AttrOut, BatchForgetIn, BmapIn, BmapOut, CopyFileRangeIn, CopyFileRangeOut,
    CreateIn, Dirent, EntryOut, ExtHeader, FallocateIn, FileLock, FlushIn, ForgetIn, ForgetOne,
    FsyncIn, GetattrIn, GetxattrIn, GetxattrOut, InHeader, InitIn, InitOut, InterruptIn, IoctlIn,
    IoctlIovec, IoctlOut, Kstatfs, LinkIn, LkIn, LkOut, LseekIn, LseekOut, MkdirIn, MknodIn,
    OpenIn, OpenOut, OutHeader, PollIn, PollOut, ReadIn, ReleaseIn, RemovemappingIn,
    RemovemappingOne, Rename2In, RenameIn, Secctx, SetattrIn, SetupmappingIn, SetxattrExtIn,
    SetxattrIn, StatfsOut, Statx, StatxIn, StatxOut, StatxTime, SuppGroups, SyncfsIn, WriteIn,
    WriteOut,
};

/// The supported major version.
pub(crate) const MAJOR: u32 = 7;

/// The newest supported minor version.
pub(crate) const MINOR: u32 = 45;

/// Length of the INIT argument before 7.36, and of the part that every kernel sends.
pub(crate) const INIT_IN_SHORT_LEN: usize = 16;

/// Extension of a request that holds supplementary groups (`FUSE_EXT_GROUPS`).
pub(crate) const EXT_GROUPS: u32 = 32;

/// Maximum number of labels in an extension (`FUSE_MAX_NR_SECCTX`). The number is in the field that
/// holds the type of other extensions.
pub(crate) const MAX_SECURITY_CONTEXTS: u32 = 31;

/// `total_extlen` in [`InHeader`] counts in units of this many bytes.
pub(crate) const EXT_UNIT: usize = 8;

/// Directory entries begin at multiples of this many bytes.
pub(crate) const DIRENT_ALIGN: usize = 8;
