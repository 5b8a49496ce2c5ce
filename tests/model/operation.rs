//! The parts of a case: operations on names, on inodes that stay in use, and on open files.
//!
//! Nothing is performed here. The invariant: an operation names things by small numbers only, so
//! that any sequence, and any part of one, can be performed on an empty directory.

use proptest::prelude::*;
use proptest::sample::select;

/// Places to hold an inode, and places to hold an open file.
pub(crate) const SLOTS: usize = 4;

/// Names that operations use: few, so that they meet, and of all kinds.
pub(crate) const NAMES: [&str; 6] = ["a", "b", "c", "x", "y", "ä long name with a space in it"];

/// Directories that operations use: none of them need exist.
const PATHS: [&[usize]; 5] = [&[], &[0], &[1], &[0, 2], &[1, 2]];

/// The longest offset of a read or write.
const MOST_OFFSET: u64 = 200_000;

/// A directory, or what has replaced it.
#[derive(Clone, Debug)]
pub(crate) enum Directory {
    /// By the names that lead there.
    Path(&'static [usize]),
    /// The inode in this slot.
    Slot(usize),
}

/// A name in a directory.
pub(crate) type Location = (Directory, usize);

/// An inode.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// By its name.
    At(Location),
    /// The inode in this slot.
    Slot(usize),
}

/// One step of a case.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    /// Look a name up and hold on to the inode, whatever happens to the name.
    Hold(Location, usize),
    /// Let go of all inodes that are in no slot.
    Forget,
    /// Let go of one in a slot.
    Drop(usize),
    /// Attributes.
    Attributes(Target),
    /// Open with these flags; the file is made where the flags say so.
    Create(Location, u32, i32, usize),
    /// Open an inode.
    Open(Target, i32, usize),
    /// Make a directory.
    MakeDirectory(Location, u32),
    /// Make a named pipe.
    MakePipe(Location, u32),
    /// Make a symbolic link, whose target is a name.
    Symlink(Location, usize),
    /// Read a symbolic link.
    ReadLink(Target),
    /// Another name for an inode.
    Link(Target, Location),
    /// Remove a name that is no directory.
    Unlink(Location),
    /// Remove a directory.
    RemoveDirectory(Location),
    /// Rename with these flags.
    Rename(Location, Location, u32),
    /// Set the permissions.
    Mode(Target, u32),
    /// Set user and group.
    Owner(Target, u32, u32),
    /// Set both times, seconds and nanoseconds.
    Times(Target, i64, u32),
    /// Set the length by name.
    Truncate(Target, u64),
    /// List a directory by replies of this many bytes, with attributes or without.
    List(Target, u32, bool),
    /// Set an extended attribute, with flags as `setxattr` has them.
    SetAttribute(Target, usize, Vec<u8>, i32),
    /// Its value.
    GetAttribute(Target, usize),
    /// Take it away.
    RemoveAttribute(Target, usize),
    /// The names of all that users set.
    ListAttributes(Target),
    /// Read from an open file.
    Read(usize, u64, u32),
    /// Write bytes that follow from the last number.
    Write(usize, u64, u32, u64),
    /// Allocate, punch, zero: a mode as `fallocate` has it.
    Allocate(usize, i32, u64, u64),
    /// Set the length of an open file.
    Length(usize, u64),
    /// Attributes of an open file.
    FileAttributes(usize),
    /// Copy between two open files.
    Copy(usize, u64, usize, u64, u32),
    /// Write back.
    Sync(usize, bool),
    /// Close.
    Close(usize),
}

/// The names of extended attributes.
pub(crate) const ATTRIBUTES: [&std::ffi::CStr; 3] = [c"user.one", c"user.two", c"user.three"];

fn directory() -> impl Strategy<Value = Directory> {
    prop_oneof![
        // Most often in the same one, so that names meet.
        4 => Just(Directory::Path(PATHS[0])),
        4 => select(&PATHS[..]).prop_map(Directory::Path),
        2 => (0..SLOTS).prop_map(Directory::Slot),
    ]
}

fn location() -> impl Strategy<Value = Location> {
    (directory(), 0..NAMES.len())
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        5 => location().prop_map(Target::At),
        3 => (0..SLOTS).prop_map(Target::Slot),
    ]
}

fn mode() -> impl Strategy<Value = u32> {
    // What a server without privileges could not get past would be no fault of it.
    (0..0o1000_u32).prop_map(|mode| mode | 0o700)
}

fn access() -> impl Strategy<Value = i32> {
    select(vec![
        libc::O_RDWR,
        libc::O_RDWR,
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR | libc::O_TRUNC,
        libc::O_WRONLY | libc::O_TRUNC,
    ])
}

fn rename_flags() -> impl Strategy<Value = u32> {
    select(vec![
        0,
        0,
        0,
        libc::RENAME_NOREPLACE,
        libc::RENAME_EXCHANGE,
        libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE,
    ])
}

fn allocation() -> impl Strategy<Value = i32> {
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    select(vec![
        0,
        keep,
        keep | libc::FALLOC_FL_PUNCH_HOLE,
        libc::FALLOC_FL_ZERO_RANGE,
        keep | libc::FALLOC_FL_ZERO_RANGE,
        libc::FALLOC_FL_PUNCH_HOLE,
    ])
}

fn names() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let exclusive = select(vec![0, 0, libc::O_EXCL]);
    prop_oneof![
        4 => (location(), mode(), access(), exclusive, 0..SLOTS).prop_map(
            |(location, mode, access, exclusive, slot)| O::Create(location, mode, access | exclusive, slot)
        ),
        5 => (location(), mode()).prop_map(|(location, mode)| O::MakeDirectory(location, mode)),
        1 => (location(), mode()).prop_map(|(location, mode)| O::MakePipe(location, mode)),
        1 => (location(), 0..NAMES.len()).prop_map(|(location, to)| O::Symlink(location, to)),
        2 => (target(), location()).prop_map(|(target, location)| O::Link(target, location)),
        2 => location().prop_map(O::Unlink),
        1 => location().prop_map(O::RemoveDirectory),
        6 => (location(), location(), rename_flags()).prop_map(|(from, to, how)| O::Rename(from, to, how)),
        3 => (location(), 0..SLOTS).prop_map(|(location, slot)| O::Hold(location, slot)),
        1 => Just(O::Forget),
        1 => (0..SLOTS).prop_map(O::Drop),
        1 => target().prop_map(O::ReadLink),
        2 => (target(), select(vec![192, 4096]), any::<bool>())
            .prop_map(|(target, bytes, plus)| O::List(target, bytes, plus)),
    ]
}

fn attributes() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let value = prop::collection::vec(any::<u8>(), 0..40);
    let how = select(vec![0, libc::XATTR_CREATE, libc::XATTR_REPLACE]);
    let name = || 0..ATTRIBUTES.len();
    prop_oneof![
        3 => target().prop_map(O::Attributes),
        1 => (target(), mode()).prop_map(|(target, mode)| O::Mode(target, mode)),
        1 => (target(), 0..3_u32, 0..3_u32).prop_map(|(target, uid, gid)| O::Owner(target, uid, gid)),
        1 => (target(), -1_000_000_000..10_000_000_000_i64, 0..1_000_000_000_u32)
            .prop_map(|(target, at, nanoseconds)| O::Times(target, at, nanoseconds)),
        2 => (target(), 0..MOST_OFFSET).prop_map(|(target, length)| O::Truncate(target, length)),
        2 => (target(), name(), value, how)
            .prop_map(|(target, name, value, how)| O::SetAttribute(target, name, value, how)),
        1 => (target(), name()).prop_map(|(target, name)| O::GetAttribute(target, name)),
        1 => (target(), name()).prop_map(|(target, name)| O::RemoveAttribute(target, name)),
        1 => target().prop_map(O::ListAttributes),
    ]
}

fn files() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let slot = || 0..SLOTS;
    let offset = || 0..MOST_OFFSET;
    prop_oneof![
        3 => (target(), access(), slot()).prop_map(|(target, how, slot)| O::Open(target, how, slot)),
        4 => (slot(), offset(), 0..70_000_u32).prop_map(|(slot, at, len)| O::Read(slot, at, len)),
        5 => (slot(), offset(), 0..70_000_u32, any::<u64>())
            .prop_map(|(slot, at, len, seed)| O::Write(slot, at, len, seed)),
        2 => (slot(), allocation(), offset(), 0..70_000_u64)
            .prop_map(|(slot, how, at, len)| O::Allocate(slot, how, at, len)),
        1 => (slot(), offset()).prop_map(|(slot, length)| O::Length(slot, length)),
        2 => slot().prop_map(O::FileAttributes),
        1 => (slot(), offset(), slot(), offset(), 0..70_000_u32)
            .prop_map(|(from, at, to, there, len)| O::Copy(from, at, to, there, len)),
        1 => (slot(), any::<bool>()).prop_map(|(slot, data)| O::Sync(slot, data)),
        2 => slot().prop_map(O::Close),
    ]
}

/// Cases of up to `most` operations.
pub(crate) fn case(most: usize) -> impl Strategy<Value = Vec<Operation>> {
    let one = prop_oneof![5 => names(), 3 => attributes(), 4 => files()];
    prop::collection::vec(one, 1..most)
}
