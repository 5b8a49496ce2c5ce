//! Decodes bytes to a [`Request`]. The invariant: only the bytes that the header counts are read.

use zerocopy::FromBytes;

use super::arguments::{Arguments, extent, given, given_handle, id, node, offset, timestamp};
use super::extensions::{EXTENSIONS_MAX, Extensions};
use super::{
    Copying, DecodeError, Fault, Forgets, Ioctl, Locking, Mapping, Operation, Range, Ranges,
    Request,
};
use crate::fs::{Caller, Changes, Handle, Label, LockOwner, NewNode, NewTime, NodeId, XattrFlags};
use crate::fuse::abi::{self, Handler, InHeader, InitFlags, Opcode, Row, UNKNOWN, setattr_valid};
use crate::io::{Lock, LockKind, RecordLock, SyncKind, WriteMode};

/// Length of the header that begins every request, in bytes.
pub const HEADER_LEN: usize = size_of::<InHeader>();

/// Maximum length of an extended attribute's value, bytes (`XATTR_SIZE_MAX`).
const XATTR_SIZE_MAX: usize = 65_536;

/// Maximum length of the arguments of an operation with names: two names, or a name and a symbolic
/// link's target, and the structure before them.
const NAMES_MAX: usize = 8 * 1024;
/// Maximum length of the arguments of SETXATTR.
const SETXATTR_MAX: usize = size_of::<abi::SetxattrExtIn>() + 256 + XATTR_SIZE_MAX;
/// Maximum length of the arguments of BATCH_FORGET: 65,535 nodes.
const BATCH_FORGET_MAX: usize = 1024 * 1024;
/// Maximum length of the arguments of REMOVEMAPPING. Linux sends at most a page.
const RANGES_MAX: usize = 64 * 1024;
/// More than the longest argument that is one structure.
const STRUCTURE_MAX: usize = 128;

/// The flags of `open(2)` that a guest may use. The others are handled by the guest's kernel itself
/// (`O_CREAT`, `O_NOCTTY`, …) or would make OPEN a different operation (`O_PATH`, `O_TMPFILE`,
/// `O_ASYNC`).
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_LARGEFILE
    | libc::O_NOATIME
    | libc::O_NOFOLLOW
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC;

/// Maximum length of an operation's arguments, and the fault if they are longer.
struct Limit {
    bytes: usize,
    beyond: Option<Fault>,
}

/// How many bytes of a request to pass to [`decode()`] after its `header`, the first [`HEADER_LEN`]
/// bytes; `behind` bytes are available.
///
/// # Errors
///
/// Fails if the header is truncated, or counts bytes that are not there.
pub fn bytes_wanted(header: &[u8], behind: usize) -> Result<usize, DecodeError> {
    let (header, _) = in_header(header)?;
    match arguments_len(&header) {
        Ok(counted) if counted <= behind => Ok(counted.min(limit(&header).bytes)),
        _ => Err(DecodeError {
            unique: Some(header.unique),
            opcode: Some(header.opcode),
            fault: Fault::Length(header.len),
        }),
    }
}

/// The error of a request that begins with `header`, the first [`HEADER_LEN`] bytes, and of which
/// part can't be accessed.
pub(in crate::fuse) fn inaccessible(header: &[u8]) -> DecodeError {
    match in_header(header) {
        Ok((header, _)) => DecodeError {
            unique: Some(header.unique),
            opcode: Some(header.opcode),
            fault: Fault::Inaccessible,
        },
        Err(error) => error,
    }
}

/// Decodes a request from its bytes, header first; the data of a WRITE need not be included.
///
/// Bytes after those that the header counts, or after the arguments, are ignored. Flags to OPEN,
/// OPENDIR and CREATE that concern only the guest are removed.
///
/// # Errors
///
/// Any of `Fault`.
pub fn decode(bytes: &[u8]) -> Result<Request<'_>, DecodeError> {
    decode_as(bytes, InitFlags::NONE)
}

/// As [`decode()`], for a guest with which the flags in `agreed` were negotiated: some make
/// arguments longer (`SETXATTR_EXT`) or add to them (`SECURITY_CTX`, `CREATE_SUPP_GROUP`).
///
/// # Errors
///
/// As [`decode()`].
pub fn decode_as(bytes: &[u8], agreed: InitFlags) -> Result<Request<'_>, DecodeError> {
    let (header, behind) = in_header(bytes)?;
    let failed = |fault| DecodeError {
        unique: Some(header.unique),
        opcode: Some(header.opcode),
        fault,
    };
    let row = row(&header);
    let decoded = match Opcode::from_number(header.opcode) {
        Some(opcode) => operation(opcode, Body::of(&header, behind, agreed).map_err(failed)?),
        None => Ok(Operation::Unserved.into()),
    };
    let Decoded {
        operation,
        kill_set_id,
        group,
    } = decoded.map_err(failed)?;
    // Other requests come from the guest's kernel itself, without a user and a node. FORGET of node
    // 0 does no harm, so it is among them.
    if matches!(
        row.handler,
        Handler::Metadata | Handler::Data | Handler::Lock | Handler::Mapping
    ) {
        node(header.nodeid).map_err(failed)?;
    }
    Ok(Request {
        unique: header.unique,
        opcode: header.opcode,
        row,
        node: NodeId(header.nodeid),
        caller: Caller {
            uid: known_id(header.uid),
            gid: known_id(header.gid),
            pid: header.pid,
            kill_set_id,
            group,
        },
        operation,
    })
}

/// A caller's id; `None` for the value that means "none" (`FUSE_INVALID_UIDGID`).
fn known_id(id: u32) -> Option<u32> {
    (id != u32::MAX).then_some(id)
}

fn row(header: &InHeader) -> &'static Row {
    Opcode::from_number(header.opcode).map_or(&UNKNOWN, Opcode::row)
}

fn in_header(bytes: &[u8]) -> Result<(InHeader, &[u8]), DecodeError> {
    InHeader::read_from_prefix(bytes).map_err(|_short| {
        let unique = bytes
            .get(8..16)
            .and_then(|unique| u64::read_from_bytes(unique).ok());
        DecodeError {
            unique,
            opcode: None,
            fault: Fault::Header(bytes.len()),
        }
    })
}

/// Length of the arguments according to the header, including the data of a WRITE and extensions.
fn arguments_len(header: &InHeader) -> Result<usize, Fault> {
    usize::try_from(header.len)
        .ok()
        .and_then(|len| len.checked_sub(HEADER_LEN))
        .ok_or(Fault::Length(header.len))
}

fn limit(header: &InHeader) -> Limit {
    let (bytes, beyond) = match row(header).arguments {
        abi::Arguments::Ignored => (0, None),
        abi::Arguments::Structure => (STRUCTURE_MAX, None),
        abi::Arguments::Names => (NAMES_MAX, Some(Fault::NameLength)),
        abi::Arguments::NamesAndExtensions => (NAMES_MAX + EXTENSIONS_MAX, Some(Fault::NameLength)),
        abi::Arguments::XattrName => (NAMES_MAX, Some(Fault::XattrName)),
        abi::Arguments::XattrValue => (SETXATTR_MAX, Some(Fault::XattrValue)),
        abi::Arguments::Forgets => (BATCH_FORGET_MAX, Some(Fault::Length(header.len))),
        abi::Arguments::Ranges => (RANGES_MAX, Some(Fault::Length(header.len))),
        abi::Arguments::Write => (size_of::<abi::WriteIn>(), None),
    };
    Limit { bytes, beyond }
}

/// The bytes after the header of a request.
struct Body<'a> {
    /// The arguments that are decoded.
    arguments: Arguments<'a>,
    /// The extensions, if the header counts them.
    extensions: &'a [u8],
    /// Number of data bytes after the arguments.
    data: usize,
    /// The negotiated flags.
    agreed: InitFlags,
}

impl<'a> Body<'a> {
    fn of(header: &InHeader, behind: &'a [u8], agreed: InitFlags) -> Result<Self, Fault> {
        let counted = arguments_len(header)?;
        let limit = limit(header);
        if counted > limit.bytes
            && let Some(fault) = limit.beyond
        {
            return Err(fault);
        }
        let extensions_len = usize::from(header.total_extlen).saturating_mul(abi::EXT_UNIT);
        let without = counted
            .checked_sub(extensions_len)
            .ok_or(Fault::Extensions)?;
        let bytes = behind
            .get(..counted.min(limit.bytes))
            .ok_or(Fault::Truncated)?;
        let (arguments, extensions) = bytes.split_at_checked(without).unwrap_or((bytes, &[]));
        Ok(Self {
            arguments: Arguments(arguments),
            extensions,
            data: without.saturating_sub(arguments.len()),
            agreed,
        })
    }

    /// The extensions that were negotiated. Linux before 6.3 doesn't count a label in the header.
    fn extensions(&self) -> Result<Extensions<'a>, Fault> {
        let labels = self.agreed.contains(InitFlags::SECURITY_CTX);
        let groups = self.agreed.contains(InitFlags::CREATE_SUPP_GROUP);
        let all = if !self.extensions.is_empty() && (labels || groups) {
            Extensions::parse(self.extensions)?
        } else if self.extensions.is_empty() && labels {
            Extensions::parse(self.arguments.0)?
        } else {
            Extensions::default()
        };
        Ok(Extensions {
            label: all.label.filter(|_| labels),
            group: all.group.filter(|_| groups),
        })
    }
}

/// An operation, and the request's statements about its caller.
struct Decoded<'a> {
    operation: Operation<'a>,
    /// The caller may not keep set-ID bits. Kernels send this only if it was negotiated.
    kill_set_id: bool,
    /// The directory's group, if the caller is in it besides its own.
    group: Option<u32>,
}

impl<'a> From<Operation<'a>> for Decoded<'a> {
    fn from(operation: Operation<'a>) -> Self {
        Self {
            operation,
            kill_set_id: false,
            group: None,
        }
    }
}

/// Decodes the operation.
fn operation(opcode: Opcode, mut body: Body<'_>) -> Result<Decoded<'_>, Fault> {
    let mut kill_set_id = false;
    let mut group = None;
    let arguments = &mut body.arguments;
    let operation = match opcode {
        Opcode::Init => Operation::Init(arguments.init()?),
        Opcode::Destroy => Operation::Destroy,
        Opcode::Interrupt => Operation::Interrupt {
            unique: arguments.take::<abi::InterruptIn>()?.unique,
        },
        Opcode::Statfs => Operation::Statfs,
        Opcode::Syncfs => {
            arguments.take::<abi::SyncfsIn>()?;
            Operation::Syncfs
        }
        Opcode::Lookup => match arguments.0 {
            [b'.', 0, ..] => Operation::LookupSelf,
            [b'.', b'.', 0, ..] => Operation::LookupParent,
            _ => Operation::Lookup {
                name: arguments.name()?,
            },
        },
        Opcode::Forget => Operation::Forget {
            count: arguments.take::<abi::ForgetIn>()?.nlookup,
        },
        Opcode::BatchForget => {
            let count = arguments.take::<abi::BatchForgetIn>()?.count;
            let len = usize::try_from(count)
                .ok()
                .and_then(|count| count.checked_mul(size_of::<abi::ForgetOne>()))
                .ok_or(Fault::Truncated)?;
            Operation::BatchForget(Forgets(arguments.bytes(len)?))
        }
        Opcode::Getattr => {
            let args: abi::GetattrIn = arguments.take()?;
            let handle = given_handle(args.getattr_flags, abi::getattr_flags::FH, args.fh);
            Operation::Getattr { handle }
        }
        Opcode::Statx => {
            let args: abi::StatxIn = arguments.take()?;
            let handle = given_handle(args.getattr_flags, abi::getattr_flags::FH, args.fh);
            Operation::Statx { handle }
        }
        Opcode::Setattr => {
            let args: abi::SetattrIn = arguments.take()?;
            let handle = given_handle(args.valid, setattr_valid::FH, args.fh);
            kill_set_id = args.valid & setattr_valid::KILL_SUIDGID != 0;
            Operation::Setattr {
                handle,
                changes: changes(&args)?,
            }
        }
        Opcode::Readlink => Operation::Readlink,
        Opcode::Symlink => {
            let (name, target) = (arguments.name()?, arguments.target()?);
            let extensions = body.extensions()?;
            group = extensions.group;
            Operation::Symlink {
                name,
                target,
                label: extensions.label,
            }
        }
        Opcode::Mknod => {
            let abi::MknodIn {
                mode, rdev, umask, ..
            } = arguments.take()?;
            let name = arguments.name()?;
            let extensions = body.extensions()?;
            group = extensions.group;
            Operation::Mknod {
                name,
                new: NewNode {
                    mode,
                    umask,
                    rdev,
                    label: extensions.label,
                },
            }
        }
        Opcode::Mkdir => {
            let abi::MkdirIn { mode, umask } = arguments.take()?;
            let name = arguments.name()?;
            let extensions = body.extensions()?;
            group = extensions.group;
            Operation::Mkdir {
                name,
                new: NewNode {
                    mode,
                    umask,
                    rdev: 0,
                    label: extensions.label,
                },
            }
        }
        Opcode::Unlink => Operation::Unlink {
            name: arguments.name()?,
        },
        Opcode::Rmdir => Operation::Rmdir {
            name: arguments.name()?,
        },
        Opcode::Rename => {
            let args: abi::RenameIn = arguments.take()?;
            rename(arguments, args.newdir, 0)?
        }
        Opcode::Rename2 => {
            let args: abi::Rename2In = arguments.take()?;
            rename(arguments, args.newdir, args.flags)?
        }
        Opcode::Link => {
            let args: abi::LinkIn = arguments.take()?;
            Operation::Link {
                node: node(args.oldnodeid)?,
                name: arguments.name()?,
            }
        }
        Opcode::Access => {
            let mask = arguments.take::<abi::AccessIn>()?.mask;
            if mask > 7 {
                return Err(Fault::Value("mask"));
            }
            Operation::Access { mask }
        }
        Opcode::Setxattr => {
            let args = if body.agreed.contains(InitFlags::SETXATTR_EXT) {
                let args: abi::SetxattrExtIn = arguments.take()?;
                kill_set_id = args.setxattr_flags & abi::setxattr_flags::ACL_KILL_SGID != 0;
                abi::SetxattrIn {
                    size: args.size,
                    flags: args.flags,
                }
            } else {
                arguments.take()?
            };
            let flags = xattr_flags(args.flags)?;
            let name = arguments.xattr_name()?;
            let size = usize::try_from(args.size).map_err(|_huge| Fault::XattrValue)?;
            if size > XATTR_SIZE_MAX {
                return Err(Fault::XattrValue);
            }
            Operation::Setxattr {
                name,
                value: arguments.bytes(size)?,
                flags,
            }
        }
        Opcode::Getxattr => {
            let size = arguments.take::<abi::GetxattrIn>()?.size;
            Operation::Getxattr {
                name: arguments.xattr_name()?,
                size,
            }
        }
        Opcode::Listxattr => Operation::Listxattr {
            size: arguments.take::<abi::GetxattrIn>()?.size,
        },
        Opcode::Removexattr => Operation::Removexattr {
            name: arguments.xattr_name()?,
        },
        Opcode::Open => {
            let args: abi::OpenIn = arguments.take()?;
            kill_set_id = args.open_flags & abi::open_flags::KILL_SUIDGID != 0;
            Operation::Open {
                flags: open_flags(args),
            }
        }
        Opcode::Opendir => Operation::Opendir {
            flags: open_flags(arguments.take()?),
        },
        Opcode::Create => {
            let args: abi::CreateIn = arguments.take()?;
            let name = arguments.name()?;
            let extensions = body.extensions()?;
            group = extensions.group;
            kill_set_id = args.open_flags & abi::open_flags::KILL_SUIDGID != 0;
            Operation::Create {
                name,
                flags: created_flags(&args),
                new: created(&args, extensions.label),
            }
        }
        Opcode::Tmpfile => {
            let args: abi::CreateIn = arguments.take()?;
            // The name is a placeholder; Linux sends "/", which is no valid name.
            arguments.string()?;
            let extensions = body.extensions()?;
            group = extensions.group;
            kill_set_id = args.open_flags & abi::open_flags::KILL_SUIDGID != 0;
            Operation::Tmpfile {
                flags: created_flags(&args),
                new: created(&args, extensions.label),
            }
        }
        Opcode::Ioctl => {
            let args: abi::IoctlIn = arguments.take()?;
            Operation::Ioctl {
                handle: Handle(args.fh),
                ioctl: ioctl(&args, body.arguments)?,
            }
        }
        Opcode::Read => {
            let args: abi::ReadIn = arguments.take()?;
            extent(args.offset, u64::from(args.size))?;
            Operation::Read(range(args.fh, args.offset, args.size))
        }
        Opcode::Write => {
            let args: abi::WriteIn = arguments.take()?;
            extent(args.offset, u64::from(args.size))?;
            if usize::try_from(args.size).map_or(true, |size| size > body.data) {
                return Err(Fault::Truncated);
            }
            kill_set_id = args.write_flags & abi::write_flags::KILL_SUIDGID != 0;
            Operation::Write {
                range: range(args.fh, args.offset, args.size),
                mode: write_mode(args.flags.cast_signed()),
            }
        }
        Opcode::Readdir | Opcode::Readdirplus => {
            let args: abi::ReadIn = arguments.take()?;
            let range = range(args.fh, args.offset, args.size);
            Operation::Readdir {
                range,
                plus: opcode == Opcode::Readdirplus,
            }
        }
        Opcode::Release => Operation::Release {
            handle: released(arguments)?,
        },
        Opcode::Releasedir => Operation::Releasedir {
            handle: released(arguments)?,
        },
        Opcode::Flush => {
            let args: abi::FlushIn = arguments.take()?;
            Operation::Flush {
                handle: Handle(args.fh),
                owner: LockOwner(args.lock_owner),
            }
        }
        Opcode::Getlk | Opcode::Setlk | Opcode::Setlkw => locking(opcode, arguments.take()?)?,
        Opcode::Fsync | Opcode::Fsyncdir => {
            let args: abi::FsyncIn = arguments.take()?;
            Operation::Fsync {
                handle: Handle(args.fh),
                data_only: args.fsync_flags & abi::fsync_flags::FDATASYNC != 0,
                directory: opcode == Opcode::Fsyncdir,
            }
        }
        Opcode::Fallocate => {
            let args: abi::FallocateIn = arguments.take()?;
            extent(args.offset, args.length)?;
            Operation::Fallocate {
                handle: Handle(args.fh),
                offset: args.offset,
                len: args.length,
                mode: args.mode,
            }
        }
        Opcode::Lseek => {
            let abi::LseekIn {
                fh, offset, whence, ..
            } = arguments.take()?;
            match whence.cast_signed() {
                libc::SEEK_DATA | libc::SEEK_HOLE => {}
                _ => return Err(Fault::Value("whence")),
            }
            Operation::Lseek {
                handle: Handle(fh),
                // A program may request a negative offset; the host decides on it.
                offset,
                whence,
            }
        }
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => {
            let args: abi::CopyFileRangeIn = arguments.take()?;
            offset(args.off_in)?;
            offset(args.off_out)?;
            if args.flags != 0 {
                return Err(Fault::Value("flags"));
            }
            Operation::CopyFileRange(Copying {
                from: Handle(args.fh_in),
                from_offset: args.off_in,
                to_node: node(args.nodeid_out)?,
                to: Handle(args.fh_out),
                to_offset: args.off_out,
                len: args.len,
                wide: opcode == Opcode::CopyFileRange64,
            })
        }
        Opcode::Setupmapping => {
            let args: abi::SetupmappingIn = arguments.take()?;
            extent(args.foffset, args.len)?;
            let known = abi::setupmapping_flags::READ | abi::setupmapping_flags::WRITE;
            if args.flags & !known != 0 {
                return Err(Fault::Value("flags"));
            }
            // Linux names no open file.
            Operation::Setupmapping(Mapping {
                file_offset: args.foffset,
                offset: args.moffset,
                len: args.len,
                writable: args.flags & abi::setupmapping_flags::WRITE != 0,
            })
        }
        Opcode::Removemapping => {
            let count = arguments.take::<abi::RemovemappingIn>()?.count;
            let len = usize::try_from(count)
                .ok()
                .and_then(|count| count.checked_mul(size_of::<abi::RemovemappingOne>()))
                .ok_or(Fault::Truncated)?;
            Operation::Removemapping(Ranges(arguments.bytes(len)?))
        }
        Opcode::Bmap | Opcode::Poll | Opcode::NotifyReply => Operation::Unserved,
    };
    Ok(Decoded {
        operation,
        kill_set_id,
        group,
    })
}

fn created_flags(args: &abi::CreateIn) -> u32 {
    args.flags & (OPEN_FLAGS | libc::O_EXCL).cast_unsigned()
}

fn created<'a>(args: &abi::CreateIn, label: Option<Label<'a>>) -> NewNode<'a> {
    NewNode {
        mode: args.mode,
        umask: args.umask,
        rdev: 0,
        label,
    }
}

/// The numbers are from uapi `linux/fs.h`. The plain flags are a long according to their numbers
/// but an int in practice; kernels send either.
fn ioctl(args: &abi::IoctlIn, mut data: Arguments<'_>) -> Result<Ioctl, Fault> {
    const GET_FLAGS: u32 = 0x8008_6601;
    const SET_FLAGS: u32 = 0x4008_6602;
    const GET_EXTENDED: u32 = 0x801c_581f;
    const SET_EXTENDED: u32 = 0x401c_5820;

    if args.flags & abi::ioctl_flags::UNRESTRICTED != 0 {
        return Ok(Ioctl::Other);
    }
    Ok(match (args.cmd, args.in_size, args.out_size) {
        (GET_FLAGS, _, 4) => Ioctl::GetFlags { size: 4 },
        (GET_FLAGS, _, 8) => Ioctl::GetFlags { size: 8 },
        (SET_FLAGS, 4 | 8, _) => Ioctl::SetFlags(data.take()?),
        (GET_EXTENDED, _, 28) => Ioctl::GetExtended,
        (SET_EXTENDED, 28, _) => Ioctl::SetExtended(data.take()?),
        _ => Ioctl::Other,
    })
}

fn locking(opcode: Opcode, args: abi::LkIn) -> Result<Operation<'static>, Fault> {
    let kind = match args.lk.kind.cast_signed() {
        libc::F_RDLCK => LockKind::Shared,
        libc::F_WRLCK => LockKind::Exclusive,
        libc::F_UNLCK => LockKind::Unlock,
        _ => return Err(Fault::Value("type")),
    };
    let (handle, owner) = (Handle(args.fh), LockOwner(args.owner));
    let whole = args.lk_flags & abi::lk_flags::FLOCK != 0;
    let (start, end) = (args.lk.start, args.lk.end);
    if !whole && (start > end || offset(end).is_err()) {
        return Err(Fault::Value("range"));
    }
    let lock = RecordLock { kind, start, end };
    if opcode != Opcode::Getlk {
        return Ok(Operation::Setlk(Locking {
            handle,
            owner,
            lock: if whole {
                Lock::Whole(kind)
            } else {
                Lock::Record(lock)
            },
            wait: opcode == Opcode::Setlkw,
        }));
    }
    // GETLK exists neither for locks on the whole file nor for an unlock.
    if whole || kind == LockKind::Unlock {
        return Err(Fault::Value("type"));
    }
    Ok(Operation::Getlk {
        handle,
        owner,
        lock,
    })
}

fn rename<'a>(
    arguments: &mut Arguments<'a>,
    directory: u64,
    flags: u32,
) -> Result<Operation<'a>, Fault> {
    let directory = node(directory)?;
    let from = arguments.name()?;
    Ok(Operation::Rename {
        from,
        to: (directory, arguments.name()?),
        flags,
    })
}

fn xattr_flags(bits: u32) -> Result<XattrFlags, Fault> {
    // The type has every bit; the operation has two.
    let flags = XattrFlags::from_bits_retain(bits);
    if (XattrFlags::CREATE | XattrFlags::REPLACE).contains(flags) {
        Ok(flags)
    } else {
        Err(Fault::Value("flags"))
    }
}

/// The flags of `open(2)` that affect a write. `O_SYNC` includes the bit of `O_DSYNC`.
fn write_mode(flags: i32) -> WriteMode {
    WriteMode {
        append: flags & libc::O_APPEND != 0,
        durable: match flags & libc::O_SYNC {
            libc::O_SYNC => Some(SyncKind::All),
            libc::O_DSYNC => Some(SyncKind::Data),
            _ => None,
        },
    }
}

fn range(fh: u64, offset: u64, size: u32) -> Range {
    Range {
        handle: Handle(fh),
        offset,
        size,
    }
}

fn released(arguments: &mut Arguments<'_>) -> Result<Handle, Fault> {
    Ok(Handle(arguments.take::<abi::ReleaseIn>()?.fh))
}

fn open_flags(args: abi::OpenIn) -> u32 {
    args.flags & OPEN_FLAGS.cast_unsigned()
}

fn changes(args: &abi::SetattrIn) -> Result<Changes, Fault> {
    use setattr_valid::{ATIME, ATIME_NOW, GID, MODE, MTIME, MTIME_NOW, SIZE, UID};

    let time = |set, now, seconds, nanoseconds| match args.valid {
        valid if valid & set == 0 => Ok(None),
        valid if valid & now != 0 => Ok(Some(NewTime::Now)),
        _ => timestamp(seconds, nanoseconds).map(|time| Some(NewTime::At(time))),
    };
    Ok(Changes {
        mode: given(args.valid, MODE, args.mode & 0o7777),
        uid: given(args.valid, UID, args.uid).map(id).transpose()?,
        gid: given(args.valid, GID, args.gid).map(id).transpose()?,
        size: given(args.valid, SIZE, args.size).map(offset).transpose()?,
        accessed: time(ATIME, ATIME_NOW, args.atime, args.atimensec)?,
        modified: time(MTIME, MTIME_NOW, args.mtime, args.mtimensec)?,
    })
}
