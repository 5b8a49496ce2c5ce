//! Tests of the passthrough with real directories, and their common setup.
//!
//! Each test runs three times: with descriptors, with file handles, and with names as soon as an
//! inode is not in use. Each run has its own thread, which the passthrough may change at will. The
//! invariant: a test that can't run on this machine reports that; it never passes silently.

mod attributes;
mod bounded;
mod closed_fds;
mod credentials;
mod directories;
mod forgotten_inodes;
mod lookups;
mod lost_names;
mod names;
mod path_checks;
mod restored;
mod unopened;
mod xattrs;

use std::ffi::{CStr, CString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use tempfile::TempDir;

use super::{InodeFileHandles, Options, Passthrough};
use crate::fs::{
    Attributes, Caller, Changes, DirEntry, DirSink, Entry, FileSystem, Handle, NewNode, NodeId,
    Opened, Result,
};

const ROOT: NodeId = NodeId::ROOT;

/// The user that runs the tests' guest.
const SUPERUSER: Caller = Caller {
    uid: Some(0),
    gid: Some(0),
    pid: 1,
    kill_set_id: false,
    group: None,
};

/// A directory and the file system that shares it.
struct Rig {
    dir: TempDir,
    fs: Passthrough,
}

/// Runs `test` with each kind of inode reference that works on this machine.
fn in_each_mode(test: impl Fn(&Rig) + Sync) {
    by_descriptor_and_by_handle(&test);
    by_name(1, test);
}

/// Runs `test` with at most `most` descriptors, and without the privilege to open file handles.
fn by_name(max: usize, test: impl Fn(&Rig) + Sync) {
    on_a_thread(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective -= rustix::thread::CapabilitySet::DAC_READ_SEARCH;
        rustix::thread::set_capabilities(None, sets).unwrap();
        let options = Options {
            max_open_inodes: Some(max),
            ..Options::default()
        };
        test(&Rig::new(options).unwrap());
    });
}

/// Runs `test` with the kinds of inode references that survive renames and removals by the host.
fn by_descriptor_and_by_handle(test: impl Fn(&Rig) + Sync) {
    for mode in [InodeFileHandles::Never, InodeFileHandles::Mandatory] {
        let options = Options {
            inode_file_handles: mode,
            ..Options::default()
        };
        with(options, &test);
    }
}

fn with(options: Options, test: impl Fn(&Rig) + Sync) {
    let mode = options.inode_file_handles;
    on_a_thread(|| match Rig::new(options) {
        Some(rig) => test(&rig),
        None => println!("SKIPPED with {mode:?}: file handles need CAP_DAC_READ_SEARCH"),
    });
}

/// Runs `act` on a thread of its own.
fn on_a_thread(act: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        if let Err(panic) = scope.spawn(act).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Whether the tests run as root. Reports it if not.
fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("SKIPPED: needs root");
    }
    is_root
}

fn user(uid: u32) -> Caller {
    Caller {
        uid: Some(uid),
        gid: Some(uid),
        ..SUPERUSER
    }
}

fn new(mode: u32) -> NewNode<'static> {
    NewNode {
        mode,
        umask: 0o022,
        rdev: 0,
        label: None,
    }
}

fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

const O_RDWR: u32 = libc::O_RDWR.cast_unsigned();
const O_RDONLY: u32 = libc::O_RDONLY.cast_unsigned();
const O_WRONLY: u32 = libc::O_WRONLY.cast_unsigned();
const O_TRUNC: u32 = libc::O_TRUNC.cast_unsigned();
const O_EXCL: u32 = libc::O_EXCL.cast_unsigned();

impl Rig {
    fn new(options: Options) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        match Passthrough::new(dir.path(), options) {
            Ok(fs) => Some(Self { dir, fs }),
            Err(super::PassthroughError::FileHandles { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Creates a file on the host.
    fn host_file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn host_dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        path
    }

    fn find(&self, parent: NodeId, name: &str) -> Result<Entry> {
        self.fs.lookup(&SUPERUSER, parent, &c(name))
    }

    /// Looks up an existing name in the root.
    fn node(&self, name: &str) -> NodeId {
        self.find(ROOT, name).unwrap().node
    }

    fn create(
        &self,
        caller: &Caller,
        name: &str,
        flags: u32,
        mode: u32,
    ) -> Result<(Entry, Opened)> {
        self.fs.create(caller, ROOT, &c(name), flags, &new(mode))
    }

    fn attributes(&self, node: NodeId) -> Result<Attributes> {
        self.fs.getattr(&SUPERUSER, node, None).map(|(it, _)| it)
    }

    fn change(&self, node: NodeId, handle: Option<Handle>, changes: Changes) -> Result<Attributes> {
        let changed = self.fs.setattr(&SUPERUSER, node, handle, &changes);
        changed.map(|(it, _)| it)
    }

    /// This process's descriptors that lead into the shared directory.
    fn descriptors(&self) -> usize {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .filter(|target| target.starts_with(self.dir.path()))
            .count()
    }
}

/// User and group that own `path`.
fn owner(path: &Path) -> (u32, u32) {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// One entry of a READDIR reply.
#[derive(Clone, Debug)]
struct Listed {
    name: String,
    inode: u64,
    kind: u8,
    next_offset: u64,
    entry: Option<Entry>,
}

/// Takes up to `room` entries.
struct Listing {
    room: usize,
    listed: Vec<Listed>,
}

impl Listing {
    fn new(room: usize) -> Self {
        Self {
            room,
            listed: Vec::new(),
        }
    }
}

impl DirSink for Listing {
    fn has_room(&self, _: &CStr) -> bool {
        self.listed.len() < self.room
    }

    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>) {
        assert!(self.listed.len() < self.room, "asked for room first");
        self.listed.push(Listed {
            name: dir_entry.name.to_str().unwrap().to_owned(),
            inode: dir_entry.inode,
            kind: dir_entry.kind,
            next_offset: dir_entry.next_offset,
            entry: entry.copied(),
        });
    }
}
