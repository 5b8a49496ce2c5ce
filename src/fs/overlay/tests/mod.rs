//! Tests of the overlay over real directories, and their common setup.
//!
//! What it shares with the kernel's overlayfs is compared with that one by `integration/overlay`.
//! Here is what a comparison can't show: locks, numbers, handles, descriptors, crashes. Each test has
//! its own threads, which the layers may change at will. The invariant: the lower layer is unchanged
//! when a test ends.

mod copies;
mod inspect;
mod names;

use std::ffi::{CStr, CString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use super::{Lower, Options, Overlay, OverlayError, Upper, XattrPrefix};
use crate::fs::passthrough::{self, Passthrough};
use crate::fs::{
    Attributes, Caller, DirEntry, DirSink, Entry, FileSystem, Handle, HandleKind, NewNode, NodeId,
    OpenFile, Opened, Result,
};
use crate::io::File;

const ROOT: NodeId = NodeId::ROOT;
const O_RDWR: u32 = libc::O_RDWR.cast_unsigned();
const O_RDONLY: u32 = libc::O_RDONLY.cast_unsigned();

/// A lower layer, an upper one, and the overlay of both.
struct Rig {
    dir: TempDir,
    fs: Overlay,
}

fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

/// The user that runs the tests, as the guest's caller: may own new files.
fn caller() -> Caller {
    Caller {
        uid: Some(rustix::process::geteuid().as_raw()),
        gid: Some(rustix::process::getegid().as_raw()),
        pid: 1,
        kill_set_id: false,
        group: None,
    }
}

fn new(mode: u32) -> NewNode<'static> {
    NewNode {
        mode,
        umask: 0,
        rdev: 0,
        label: None,
    }
}

fn options() -> Options {
    Options {
        xattr_prefix: XattrPrefix::User,
        redirect_dirs: false,
        sync_copies: true,
        xattr: true,
        max_inodes: 1000,
        entry_ttl: Duration::ZERO,
    }
}

fn passthrough(path: &Path, readonly: bool) -> Arc<Passthrough> {
    let options = passthrough::Options {
        readonly,
        max_inodes: 1000,
        ..passthrough::Options::default()
    };
    Arc::new(Passthrough::new(path, options).unwrap())
}

/// The overlay of the directories in `dir`.
fn overlay(dir: &Path, options: Options) -> std::result::Result<Overlay, OverlayError> {
    let layer = Lower {
        fs: passthrough(&dir.join("lower"), true),
        device: Some(1),
    };
    let upper = Upper {
        fs: passthrough(dir, false),
        device: Some(1),
        directory: "upper".into(),
        work: "work".into(),
    };
    Overlay::new(vec![layer], Some(upper), options)
}

/// Runs `test` on a thread of its own with an overlay whose lower layer `fill` has filled.
fn with_overlay(fill: impl FnOnce(&Path) + Send, test: impl FnOnce(&Rig) + Send) {
    let dir = TempDir::new().unwrap();
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    fill(&dir.path().join("lower"));
    let before = tree(&dir.path().join("lower"));
    let run = move || {
        let fs = overlay(dir.path(), options()).unwrap();
        let rig = Rig { dir, fs };
        test(&rig);
        assert_eq!(tree(&rig.path("lower")), before, "the lower layer");
    };
    std::thread::scope(|scope| scope.spawn(run).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Every path below `dir`, with its size, mode and time of change.
fn tree(dir: &Path) -> Vec<(PathBuf, u64, u32, i64)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        let line = (metadata.len(), metadata.mode(), metadata.ctime_nsec());
        if metadata.is_dir() {
            all.extend(tree(&path));
        }
        all.push((path, line.0, line.1, line.2));
    }
    all.sort();
    all
}

impl Rig {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn find(&self, parent: NodeId, name: &str) -> Result<Entry> {
        self.fs.lookup(&caller(), parent, &c(name))
    }

    fn node(&self, name: &str) -> NodeId {
        self.find(ROOT, name).unwrap().node
    }

    fn attributes(&self, node: NodeId) -> Attributes {
        self.fs.getattr(&caller(), node, None).unwrap().0
    }

    fn open(&self, node: NodeId, flags: u32) -> Opened {
        self.fs.open(&caller(), node, flags).unwrap()
    }

    /// The host's file behind a handle.
    fn file(&self, node: NodeId, handle: Handle) -> File {
        match self.fs.file(node, handle, HandleKind::File).unwrap() {
            OpenFile::Host(file) => file,
            OpenFile::Object(_) => panic!("a host's file is handed through"),
        }
    }

    /// What an open file has from its start on.
    fn content(&self, node: NodeId, handle: Handle) -> Vec<u8> {
        let mut bytes = vec![0; 100];
        let len = rustix::io::pread(self.file(node, handle), &mut bytes, 0).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// The names in a directory, from `offset` on, and the offsets after them.
    fn list(&self, node: NodeId, handle: Handle, offset: u64) -> Vec<(String, u64, u64)> {
        let mut names = Names(Vec::new());
        let listed = self
            .fs
            .readdir(&caller(), node, handle, offset, true, &mut names);
        listed.unwrap();
        names.0
    }

    /// This process's descriptors that lead to the directories of the rig.
    fn descriptors(&self) -> usize {
        let targets = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = targets.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        targets
            .filter(|target| target.starts_with(self.dir.path()))
            .count()
    }

    /// What is in the work directory.
    fn leftovers(&self) -> usize {
        std::fs::read_dir(self.path("work/work")).unwrap().count()
    }
}

/// Takes all entries: name, inode number, and the offset after it.
struct Names(Vec<(String, u64, u64)>);

impl DirSink for Names {
    fn has_room(&self, _: &CStr) -> bool {
        true
    }

    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>) {
        if let Some(entry) = entry {
            assert_eq!(entry.attributes.inode, dir_entry.inode, "{dir_entry:?}");
        }
        let name = dir_entry.name.to_str().unwrap().to_owned();
        self.0.push((name, dir_entry.inode, dir_entry.next_offset));
    }
}
