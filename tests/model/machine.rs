//! Performs operations on a file system, be it the one behind the socket or the host's own.
//!
//! What a guest's kernel decides itself is decided here, for both alike: that only regular files
//! are opened, and what O_CREAT creates and what it opens. The invariant: if the results differ,
//! the server is the cause.

use crate::operation::{ATTRIBUTES, Directory, Location, NAMES, Operation, SLOTS, Target};
use testing::pattern;

/// An answer, or the error number.
pub(crate) type Result<T> = std::result::Result<T, i32>;

/// What both file systems have to tell alike of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Type and permissions.
    pub(crate) mode: u32,
    /// Names.
    pub(crate) links: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Bytes; of regular files and links only.
    pub(crate) size: u64,
    /// Seconds and nanoseconds.
    pub(crate) accessed: (i64, u32),
    /// Seconds and nanoseconds.
    pub(crate) modified: (i64, u32),
}

/// A file system as a guest's kernel sees one.
pub(crate) trait System {
    /// An inode.
    type Node: Clone;
    /// An open file.
    type File;

    fn root(&self) -> Self::Node;
    fn lookup(&mut self, directory: &Self::Node, name: &str) -> Result<Self::Node>;
    fn attributes(&mut self, node: &Self::Node) -> Result<Attributes>;
    fn create(&mut self, at: (&Self::Node, &str), mode: u32, flags: i32) -> Result<Self::File>;
    fn make_directory(&mut self, at: (&Self::Node, &str), mode: u32) -> Result<()>;
    fn make_pipe(&mut self, at: (&Self::Node, &str), mode: u32) -> Result<()>;
    fn symlink(&mut self, at: (&Self::Node, &str), to: &str) -> Result<()>;
    fn read_link(&mut self, node: &Self::Node) -> Result<Vec<u8>>;
    fn link(&mut self, node: &Self::Node, at: (&Self::Node, &str)) -> Result<()>;
    fn unlink(&mut self, at: (&Self::Node, &str)) -> Result<()>;
    fn remove_directory(&mut self, at: (&Self::Node, &str)) -> Result<()>;
    fn rename(
        &mut self,
        from: (&Self::Node, &str),
        to: (&Self::Node, &str),
        flags: u32,
    ) -> Result<()>;
    fn set_mode(&mut self, node: &Self::Node, mode: u32) -> Result<()>;
    fn set_owner(&mut self, node: &Self::Node, uid: u32, gid: u32) -> Result<()>;
    fn set_times(&mut self, node: &Self::Node, at: (i64, u32)) -> Result<()>;
    fn truncate(&mut self, node: &Self::Node, length: u64) -> Result<()>;
    /// Names and types, as often as they are listed.
    fn list(&mut self, node: &Self::Node, bytes: u32, plus: bool) -> Result<Vec<(String, u32)>>;
    fn set_attribute(
        &mut self,
        node: &Self::Node,
        name: &std::ffi::CStr,
        value: &[u8],
        flags: i32,
    ) -> Result<()>;
    fn attribute(&mut self, node: &Self::Node, name: &std::ffi::CStr) -> Result<Vec<u8>>;
    fn remove_attribute(&mut self, node: &Self::Node, name: &std::ffi::CStr) -> Result<()>;
    fn list_attributes(&mut self, node: &Self::Node) -> Result<Vec<String>>;
    fn open(&mut self, node: &Self::Node, flags: i32) -> Result<Self::File>;
    fn read(&mut self, file: &Self::File, offset: u64, length: u32) -> Result<Vec<u8>>;
    fn write(&mut self, file: &Self::File, offset: u64, bytes: &[u8]) -> Result<usize>;
    fn allocate(&mut self, file: &Self::File, mode: i32, offset: u64, length: u64) -> Result<()>;
    fn set_length(&mut self, file: &Self::File, length: u64) -> Result<()>;
    fn file_attributes(&mut self, file: &Self::File) -> Result<Attributes>;
    fn copy(
        &mut self,
        from: (&Self::File, u64),
        to: (&Self::File, u64),
        length: u32,
    ) -> Result<usize>;
    fn sync(&mut self, file: &Self::File, data_only: bool) -> Result<()>;
    fn close(&mut self, file: Self::File) -> Result<()>;
    /// Lets go of all inodes but these.
    fn forget(&mut self, kept: &[&Self::Node]) -> Result<()>;
}

/// What an operation came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It was done, and there is nothing to tell.
    Done,
    /// Nothing is in the slot that it names.
    EmptySlot,
    /// A guest's kernel doesn't ask this of an inode of this type, or so opened.
    NotAsked(u32),
    /// Times are reported only if they were set.
    Attributes(Attributes),
    Bytes(Vec<u8>),
    Count(usize),
    Names(Vec<(String, u32)>),
    Words(Vec<String>),
}

/// A file system with what a case holds on to.
pub(crate) struct Machine<S: System> {
    pub(crate) system: S,
    nodes: [Option<S::Node>; SLOTS],
    /// With the flags that they were opened with.
    files: [Option<(S::File, i32)>; SLOTS],
}

/// Why an operation has no answer of the file system's own.
enum Stop {
    Errno(i32),
    Early(Answer),
}

impl From<i32> for Stop {
    fn from(errno: i32) -> Self {
        Self::Errno(errno)
    }
}

type Found<T> = std::result::Result<T, Stop>;

impl<S: System> Machine<S> {
    /// A machine that holds nothing.
    pub(crate) fn new(system: S) -> Self {
        Self {
            system,
            nodes: Default::default(),
            files: Default::default(),
        }
    }

    /// Does one operation.
    pub(crate) fn apply(&mut self, operation: &Operation) -> Result<Answer> {
        match self.try_apply(operation) {
            Ok(answer) => Ok(answer),
            Err(Stop::Early(answer)) => Ok(answer),
            Err(Stop::Errno(errno)) => Err(errno),
        }
    }

    /// Closes all files and lets go of all inodes.
    pub(crate) fn end(&mut self) -> Result<()> {
        for slot in 0..SLOTS {
            self.close(slot)?;
        }
        self.nodes = Default::default();
        self.system.forget(&[])
    }

    fn directory(&mut self, directory: &Directory) -> Found<S::Node> {
        match directory {
            Directory::Slot(slot) => self.in_slot(*slot),
            Directory::Path(names) => {
                let mut node = self.system.root();
                for name in *names {
                    node = self.system.lookup(&node, NAMES[*name])?;
                }
                Ok(node)
            }
        }
    }

    fn in_slot(&self, slot: usize) -> Found<S::Node> {
        let node = self.nodes[slot].clone();
        node.ok_or(Stop::Early(Answer::EmptySlot))
    }

    fn location(&mut self, location: &Location) -> Found<(S::Node, &'static str)> {
        Ok((self.directory(&location.0)?, NAMES[location.1]))
    }

    fn target(&mut self, target: &Target) -> Found<S::Node> {
        match target {
            Target::Slot(slot) => self.in_slot(*slot),
            Target::At(location) => {
                let (directory, name) = self.location(location)?;
                Ok(self.system.lookup(&directory, name)?)
            }
        }
    }

    /// The inode, where it is of one of these types.
    fn of_type(&mut self, target: &Target, types: &[u32]) -> Found<S::Node> {
        let node = self.target(target)?;
        let found = self.system.attributes(&node)?.mode & libc::S_IFMT;
        if types.contains(&found) {
            Ok(node)
        } else {
            Err(Stop::Early(Answer::NotAsked(found)))
        }
    }

    fn close(&mut self, slot: usize) -> Result<Answer> {
        match self.files[slot].take() {
            Some((file, _)) => self.system.close(file).map(|()| Answer::Done),
            None => Ok(Answer::EmptySlot),
        }
    }

    fn keep(&mut self, slot: usize, file: S::File, flags: i32) -> Found<Answer> {
        self.close(slot)?;
        self.files[slot] = Some((file, flags));
        Ok(Answer::Done)
    }

    fn create(&mut self, location: &Location, mode: u32, flags: i32, slot: usize) -> Found<Answer> {
        let (directory, name) = self.location(location)?;
        let file = match self.system.lookup(&directory, name) {
            Err(libc::ENOENT) => {
                let flags = flags | libc::O_CREAT;
                self.system.create((&directory, name), mode, flags)?
            }
            Err(errno) => return Err(errno.into()),
            Ok(_) if flags & libc::O_EXCL != 0 => return Err(libc::EEXIST.into()),
            Ok(_) => {
                let node = self.of_type(&Target::At(location.clone()), &[libc::S_IFREG])?;
                self.system.open(&node, flags)?
            }
        };
        self.keep(slot, file, flags)
    }

    fn try_apply(&mut self, operation: &Operation) -> Found<Answer> {
        match operation {
            Operation::Hold(location, slot) => {
                let node = self.target(&Target::At(location.clone()))?;
                self.nodes[*slot] = Some(node);
            }
            Operation::Forget => {
                let kept: Vec<_> = self.nodes.iter().flatten().collect();
                self.system.forget(&kept)?;
            }
            Operation::Drop(slot) => self.nodes[*slot] = None,
            Operation::Create(location, mode, flags, slot) => {
                return self.create(location, *mode, *flags, *slot);
            }
            Operation::MakeDirectory(location, mode) => {
                let (directory, name) = self.location(location)?;
                self.system.make_directory((&directory, name), *mode)?;
            }
            Operation::MakePipe(location, mode) => {
                let (directory, name) = self.location(location)?;
                self.system.make_pipe((&directory, name), *mode)?;
            }
            Operation::Symlink(location, to) => {
                let (directory, name) = self.location(location)?;
                self.system.symlink((&directory, name), NAMES[*to])?;
            }
            Operation::Link(target, location) => {
                let node = self.target(target)?;
                let (directory, name) = self.location(location)?;
                self.system.link(&node, (&directory, name))?;
            }
            Operation::Unlink(location) => {
                let (directory, name) = self.location(location)?;
                self.system.unlink((&directory, name))?;
            }
            Operation::RemoveDirectory(location) => {
                let (directory, name) = self.location(location)?;
                self.system.remove_directory((&directory, name))?;
            }
            Operation::Rename(from, to, flags) => {
                let from = self.location(from)?;
                let to = self.location(to)?;
                self.system
                    .rename((&from.0, from.1), (&to.0, to.1), *flags)?;
            }
            Operation::List(target, bytes, plus) => {
                let node = self.of_type(target, &[libc::S_IFDIR])?;
                let mut names = self.system.list(&node, *bytes, *plus)?;
                names.sort();
                return Ok(Answer::Names(names));
            }
            Operation::ReadLink(target) => {
                let node = self.of_type(target, &[libc::S_IFLNK])?;
                return Ok(Answer::Bytes(self.system.read_link(&node)?));
            }
            other => return self.apply_to_inode(other),
        }
        Ok(Answer::Done)
    }

    fn apply_to_inode(&mut self, operation: &Operation) -> Found<Answer> {
        let files_and_directories = &[libc::S_IFREG, libc::S_IFDIR];
        match operation {
            Operation::Attributes(target) => {
                let node = self.target(target)?;
                let told = self.system.attributes(&node)?;
                return Ok(without_times(told));
            }
            Operation::Mode(target, mode) => {
                let node = self.of_type(target, files_and_directories)?;
                self.system.set_mode(&node, *mode)?;
            }
            Operation::Owner(target, uid, gid) => {
                let node = self.target(target)?;
                self.system.set_owner(&node, *uid, *gid)?;
            }
            Operation::Times(target, seconds, nanoseconds) => {
                let node = self.target(target)?;
                self.system.set_times(&node, (*seconds, *nanoseconds))?;
                return Ok(Answer::Attributes(self.system.attributes(&node)?));
            }
            Operation::Truncate(target, length) => {
                let node = self.of_type(target, &[libc::S_IFREG])?;
                self.system.truncate(&node, *length)?;
            }
            Operation::SetAttribute(target, name, value, flags) => {
                let node = self.of_type(target, files_and_directories)?;
                let name = ATTRIBUTES[*name];
                self.system.set_attribute(&node, name, value, *flags)?;
            }
            Operation::GetAttribute(target, name) => {
                let node = self.of_type(target, files_and_directories)?;
                let value = self.system.attribute(&node, ATTRIBUTES[*name])?;
                return Ok(Answer::Bytes(value));
            }
            Operation::RemoveAttribute(target, name) => {
                let node = self.of_type(target, files_and_directories)?;
                self.system.remove_attribute(&node, ATTRIBUTES[*name])?;
            }
            Operation::ListAttributes(target) => {
                let node = self.of_type(target, files_and_directories)?;
                let mut names = self.system.list_attributes(&node)?;
                names.sort();
                return Ok(Answer::Words(names));
            }
            Operation::Open(target, flags, slot) => {
                let node = self.of_type(target, &[libc::S_IFREG])?;
                let file = self.system.open(&node, *flags)?;
                return self.keep(*slot, file, *flags);
            }
            other => return self.apply_to_file(other),
        }
        Ok(Answer::Done)
    }

    fn apply_to_file(&mut self, operation: &Operation) -> Found<Answer> {
        let Self { system, files, .. } = self;
        let open = |slot: usize| files[slot].as_ref().ok_or(Stop::Early(Answer::EmptySlot));
        let file = |slot| open(slot).map(|(file, _)| file);
        match operation {
            Operation::Read(slot, offset, length) => {
                let bytes = system.read(file(*slot)?, *offset, *length)?;
                return Ok(Answer::Bytes(bytes));
            }
            Operation::Write(slot, offset, length, seed) => {
                let bytes = pattern(*length as usize, *seed);
                let written = system.write(file(*slot)?, *offset, &bytes)?;
                return Ok(Answer::Count(written));
            }
            Operation::Allocate(slot, mode, offset, length) => {
                system.allocate(file(*slot)?, *mode, *offset, *length)?;
            }
            Operation::Length(slot, length) => {
                let (file, flags) = open(*slot)?;
                if flags & libc::O_ACCMODE == libc::O_RDONLY {
                    return Ok(Answer::NotAsked(libc::S_IFREG));
                }
                system.set_length(file, *length)?;
            }
            Operation::FileAttributes(slot) => {
                let told = system.file_attributes(file(*slot)?)?;
                return Ok(without_times(told));
            }
            Operation::Copy(from, at, to, there, length) => {
                let copied = system.copy((file(*from)?, *at), (file(*to)?, *there), *length)?;
                return Ok(Answer::Count(copied));
            }
            Operation::Sync(slot, data_only) => system.sync(file(*slot)?, *data_only)?,
            Operation::Close(slot) => return Ok(self.close(*slot)?),
            other => unreachable!("{other:?} is done elsewhere"),
        }
        Ok(Answer::Done)
    }
}

fn without_times(told: Attributes) -> Answer {
    Answer::Attributes(Attributes {
        accessed: (0, 0),
        modified: (0, 0),
        ..told
    })
}
