//! Layouts of arguments and replies.
//!
//! Named after the kernel's structures, without `fuse_`. Fields have the meaning given in
//! `uapi/linux/fuse.h`.

#![allow(
    unreachable_pub,
    reason = "one macro makes all structures, of which the tests use some"
)]
#![allow(
    missing_docs,
    reason = "the fields are the kernel's, name by name; linux/fuse.h is their documentation"
)]
#![allow(
    missing_debug_implementations,
    reason = "the derives of zerocopy make a type of their own for each field"
)]

use std::mem::{align_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Declares structures of the ABI, each with its size in the kernel.
macro_rules! layouts {
    ($($(#[$doc:meta])* $name:ident[$size:literal] { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(
                Clone, Copy, Debug, Default, PartialEq, Eq,
                FromBytes, IntoBytes, KnownLayout, Immutable,
            )]
            #[repr(C)]
            pub struct $name { $(pub $field: $type,)* }

            const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() <= 8);
        )*
    };
}

// Headers, and parts of many replies.
layouts! {
    /// Begins every request.
    InHeader[40] {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Begins every reply; `error` is 0 or a negative errno.
    OutHeader[16] { len: u32, error: i32, unique: u64, }
    /// Begins an extension behind a request's arguments; `size` includes it.
    ExtHeader[8] { size: u32, kind: u32, }
    /// After an [`ExtHeader`]: this many group ids follow.
    SuppGroups[4] { nr_groups: u32, }
    /// After an [`ExtHeader`] whose kind is the number of labels: one label; its name and `size`
    /// bytes follow.
    Secctx[8] { size: u32, padding: u32, }
    /// Attributes.
    Attr[88] {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        blksize: u32, flags: u32,
    }
    /// Reply to LOOKUP and to requests that create a name.
    EntryOut[128] {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: Attr,
    }
    /// Reply to GETATTR and SETATTR.
    AttrOut[104] { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
}

// The session.
layouts! {
    /// Argument of INIT since 7.36; before that, its first 16 bytes.
    InitIn[64] {
        major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11],
    }
    /// Reply to INIT since 7.23.
    InitOut[64] {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, request_timeout: u16,
        unused: [u16; 11],
    }
    /// Argument of INTERRUPT: the request to interrupt.
    InterruptIn[8] { unique: u64, }
    /// Argument of SYNCFS.
    SyncfsIn[8] { padding: u64, }
    /// Body of the reply to STATFS.
    Kstatfs[80] {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32,
        frsize: u32, padding: u32, spare: [u32; 6],
    }
    /// Reply to STATFS.
    StatfsOut[80] { st: Kstatfs, }
}

// Nodes and names.
layouts! {
    /// Argument of FORGET.
    ForgetIn[8] { nlookup: u64, }
    /// Argument of BATCH_FORGET: this many [`ForgetOne`] follow.
    BatchForgetIn[8] { count: u32, dummy: u32, }
    /// One of a BATCH_FORGET.
    ForgetOne[16] { nodeid: u64, nlookup: u64, }
    /// Argument of GETATTR.
    GetattrIn[16] { getattr_flags: u32, dummy: u32, fh: u64, }
    /// Argument of SETATTR.
    SetattrIn[88] {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64,
        ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32,
        uid: u32, gid: u32, unused5: u32,
    }
    /// Argument of STATX.
    StatxIn[24] { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// A time in [`Statx`].
    StatxTime[16] { tv_sec: i64, tv_nsec: u32, reserved: i32, }
    /// Body of the reply to STATX.
    Statx[256] {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16,
        spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64, atime: StatxTime,
        btime: StatxTime, ctime: StatxTime, mtime: StatxTime, rdev_major: u32, rdev_minor: u32,
        dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    /// Reply to STATX.
    StatxOut[288] {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx,
    }
    /// Argument of MKNOD; the name follows.
    MknodIn[16] { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// Argument of MKDIR; the name follows.
    MkdirIn[8] { mode: u32, umask: u32, }
    /// Argument of RENAME; the two names follow.
    RenameIn[8] { newdir: u64, }
    /// Argument of RENAME2; the two names follow.
    Rename2In[16] { newdir: u64, flags: u32, padding: u32, }
    /// Argument of LINK; the name follows.
    LinkIn[8] { oldnodeid: u64, }
    /// Argument of ACCESS.
    AccessIn[8] { mask: u32, padding: u32, }
    /// Argument of SETXATTR; name and value follow.
    SetxattrIn[8] { size: u32, flags: u32, }
    /// Argument of SETXATTR if `SETXATTR_EXT` was negotiated.
    SetxattrExtIn[16] { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    /// Argument of GETXATTR (the name follows) and of LISTXATTR.
    GetxattrIn[8] { size: u32, padding: u32, }
    /// Reply to GETXATTR and LISTXATTR with size 0.
    GetxattrOut[8] { size: u32, padding: u32, }
}

// Open files.
layouts! {
    /// Argument of OPEN and OPENDIR.
    OpenIn[8] { flags: u32, open_flags: u32, }
    /// Argument of CREATE and TMPFILE; the name follows.
    CreateIn[16] { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// Reply to OPEN and OPENDIR, and the end of the reply to CREATE.
    OpenOut[16] { fh: u64, open_flags: u32, backing_id: i32, }
    /// Argument of RELEASE and RELEASEDIR.
    ReleaseIn[24] { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// Argument of FLUSH.
    FlushIn[24] { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// Argument of READ, READDIR and READDIRPLUS.
    ReadIn[40] {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    /// Argument of WRITE; the data follow.
    WriteIn[40] {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    /// Reply to WRITE and COPY_FILE_RANGE.
    WriteOut[8] { size: u32, padding: u32, }
    /// Argument of FSYNC and FSYNCDIR.
    FsyncIn[16] { fh: u64, fsync_flags: u32, padding: u32, }
    /// Argument of FALLOCATE.
    FallocateIn[32] { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// Argument of LSEEK.
    LseekIn[24] { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// Reply to LSEEK.
    LseekOut[8] { offset: u64, }
    /// Argument of COPY_FILE_RANGE and COPY_FILE_RANGE_64.
    CopyFileRangeIn[56] {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64,
        flags: u64,
    }
    /// Reply to COPY_FILE_RANGE_64.
    CopyFileRangeOut[8] { bytes_copied: u64, }
    /// Begins a directory entry; the name follows, padded to a multiple of 8 bytes.
    Dirent[24] { ino: u64, off: u64, namelen: u32, kind: u32, }
    /// A lock.
    FileLock[24] { start: u64, end: u64, kind: u32, pid: u32, }
    /// Argument of GETLK, SETLK and SETLKW.
    LkIn[48] { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, }
    /// Reply to GETLK.
    LkOut[24] { lk: FileLock, }
    /// Argument of BMAP.
    BmapIn[16] { block: u64, blocksize: u32, padding: u32, }
    /// Reply to BMAP.
    BmapOut[8] { block: u64, }
    /// Argument of IOCTL.
    IoctlIn[32] { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    /// A segment of the caller's memory, for IOCTL.
    IoctlIovec[16] { base: u64, len: u64, }
    /// Reply to IOCTL.
    IoctlOut[16] { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    /// Argument of POLL.
    PollIn[24] { fh: u64, kh: u64, flags: u32, events: u32, }
    /// Reply to POLL.
    PollOut[8] { revents: u32, padding: u32, }
    /// Argument of SETUPMAPPING.
    SetupmappingIn[40] { fh: u64, foffset: u64, len: u64, flags: u64, moffset: u64, }
    /// Argument of REMOVEMAPPING: this many [`RemovemappingOne`] follow.
    RemovemappingIn[4] { count: u32, }
    /// One of a REMOVEMAPPING.
    RemovemappingOne[16] { moffset: u64, len: u64, }
}
