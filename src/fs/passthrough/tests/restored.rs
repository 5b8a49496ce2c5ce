//! A file system that resumes from the table of another, which ended without notice.

use std::mem::ManuallyDrop;

use rustix::fs::AtFlags;

use super::*;
use crate::fs::passthrough::{PreviousProcess, Restored, Shared};
use crate::fs::{HandleKind, OpenFile, Replay};
use crate::io::{Lock, LockKind, RecordLock};
use crate::state::Table;

/// A file system whose process was killed, so none of it is dropped.
pub(super) struct Killed {
    dir: TempDir,
    fs: ManuallyDrop<Passthrough>,
}

pub(super) fn killed(rig: Rig) -> Killed {
    let Rig { dir, fs } = rig;
    Killed {
        dir,
        fs: ManuallyDrop::new(fs),
    }
}

impl Killed {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The next server process, with or without the descriptors of this one.
    pub(super) fn next(self, inherited_fds: bool, in_flight: &[u64]) -> (Rig, Restored) {
        let table = Table::open(self.fs.table().file().unwrap().try_clone().unwrap()).unwrap();
        let open = |path: &Path| std::fs::File::open(path).unwrap().into();
        let shared = Shared {
            root: open(self.dir.path()),
            proc_fds: open(Path::new("/proc/self/fd")),
            path: self.dir.path().to_owned(),
        };
        let past = PreviousProcess {
            inherited_fds,
            in_flight: in_flight.to_vec(),
        };
        let options = self.fs.ops.options().clone();
        let (fs, restored) = Passthrough::with_table(shared, options, &table, Some(&past)).unwrap();
        (Rig { dir: self.dir, fs }, restored)
    }
}

/// Runs `test` with and without inherited descriptors.
pub(super) fn with_and_without_inherited_fds(options: &Options, test: impl Fn(Rig, bool) + Sync) {
    for inherited_fds in [true, false] {
        on_a_thread(|| match Rig::new(options.clone()) {
            Some(rig) => test(rig, inherited_fds),
            None => println!("SKIPPED: file handles need CAP_DAC_READ_SEARCH"),
        });
    }
}

fn read(rig: &Rig, node: NodeId, handle: Handle) -> Vec<u8> {
    let file = rig
        .fs
        .file(node, handle, HandleKind::File)
        .and_then(OpenFile::host)
        .unwrap();
    let mut bytes = [0; 64];
    let len = rustix::io::pread(&file, &mut bytes, 0).unwrap();
    bytes[..len].to_vec()
}

#[test]
fn resumed_inodes_and_open_files_are_the_same() {
    let modes = [InodeFileHandles::Never, InodeFileHandles::Mandatory];
    for inode_file_handles in modes {
        let options = Options {
            inode_file_handles,
            ..Options::default()
        };
        with_and_without_inherited_fds(&options, |rig, inherited_fds| {
            rig.host_dir("dir");
            rig.host_file("dir/file", "content");
            let dir = rig.node("dir");
            let file = rig.find(dir, "file").unwrap();
            let again = rig.find(dir, "file").unwrap();
            assert_eq!(file.node, again.node);
            let opened = rig.fs.open(&SUPERUSER, file.node, O_RDWR).unwrap();
            let listing = rig.fs.opendir(&SUPERUSER, dir, 0).unwrap();
            // Renamed by the guest, the directory too.
            let to = |name: &str| c(name);
            rig.fs
                .rename(&SUPERUSER, (dir, &to("file")), (ROOT, &to("moved")), 0)
                .unwrap();
            rig.fs
                .rename(&SUPERUSER, (ROOT, &to("dir")), (ROOT, &to("other")), 0)
                .unwrap();

            let (rig, restored) = killed(rig).next(inherited_fds, &[]);
            let expected = Restored {
                inodes: 3,
                files: 2,
                locks: 0,
                lost: 0,
            };
            assert_eq!(restored, expected, "{inode_file_handles:?} {inherited_fds}");
            assert_eq!(read(&rig, file.node, opened.handle), b"content");
            let attributes = rig.attributes(file.node).unwrap();
            assert_eq!(attributes.inode, file.attributes.inode);
            // Its name leads to the same inode, and a new file is another inode.
            let found = rig.find(ROOT, "moved").unwrap();
            assert_eq!((found.node, found.generation), (file.node, file.generation));
            assert_eq!(rig.node("other"), dir);
            let (new, _) = rig.create(&SUPERUSER, "new", O_RDWR, 0o600).unwrap();
            assert!(new.node > file.node && new.node > dir);
            let mut names = Listing::new(100);
            rig.fs
                .readdir(&SUPERUSER, dir, listing.handle, 0, false, &mut names)
                .unwrap();
            assert_eq!(names.listed.len(), 2, "what was moved is gone from there");
            // Two lookups before the restart, and one after it.
            rig.fs.forget(file.node, 2);
            assert!(rig.attributes(file.node).is_ok());
            rig.fs.release(file.node, opened.handle).unwrap();
            rig.fs.forget(file.node, 1);
            assert_eq!(rig.attributes(file.node), Err(Errno::STALE));
        });
    }
}

#[test]
fn unlinked_file_survives_with_its_descriptor() {
    with_and_without_inherited_fds(&Options::default(), |rig, inherited_fds| {
        let (entry, opened) = rig.create(&SUPERUSER, "file", O_RDWR, 0o600).unwrap();
        let file = rig
            .fs
            .file(entry.node, opened.handle, HandleKind::File)
            .and_then(OpenFile::host)
            .unwrap();
        rustix::io::pwrite(&file, b"precious", 0).unwrap();
        drop(file);
        rig.fs.unlink(&SUPERUSER, ROOT, &c("file")).unwrap();
        let other = rig.host_file("file", "another file of its name");
        let (rig, restored) = killed(rig).next(inherited_fds, &[]);
        if inherited_fds {
            assert_eq!((restored.files, restored.lost), (1, 0));
            assert_eq!(read(&rig, entry.node, opened.handle), b"precious");
            assert_eq!(rig.attributes(entry.node).unwrap().links, 0);
        } else {
            // This process can't reach it on the host.
            assert_eq!((restored.files, restored.lost), (0, 1));
            assert_eq!(rig.attributes(entry.node), Err(Errno::STALE));
        }
        assert_eq!(std::fs::read(other).unwrap(), b"another file of its name");
    });
}

#[test]
fn locks_are_kept_or_acquired_again() {
    with_and_without_inherited_fds(&Options::default(), |rig, inherited_fds| {
        let path = rig.host_file("file", "content");
        let node = rig.node("file");
        let opened = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        let owner = crate::fs::LockOwner(77);
        let lock = |kind, start, end| RecordLock { kind, start, end };
        let file = rig.fs.lock_file(node, opened.handle, owner).unwrap();
        for one in [
            lock(LockKind::Exclusive, 0, 9),
            lock(LockKind::Shared, 20, 29),
            lock(LockKind::Unlock, 5, 9),
        ] {
            file.try_lock(Lock::Record(one)).unwrap();
            rig.fs
                .record_lock(node, opened.handle, owner, Lock::Record(one));
        }
        drop(file);
        let whole = Lock::Whole(LockKind::Exclusive);
        let open = rig
            .fs
            .file(node, opened.handle, HandleKind::File)
            .and_then(OpenFile::host)
            .unwrap();
        open.try_lock(whole).unwrap();
        rig.fs.record_lock(node, opened.handle, owner, whole);
        drop(open);
        let rig = killed(rig);
        if !inherited_fds {
            // The descriptors of a killed process are closed.
            let old = rig
                .fs
                .file(node, opened.handle, HandleKind::File)
                .and_then(OpenFile::host)
                .unwrap();
            old.try_lock(Lock::Whole(LockKind::Unlock)).unwrap();
            let old = rig.fs.lock_file(node, opened.handle, owner).unwrap();
            let all = lock(LockKind::Unlock, 0, i64::MAX.cast_unsigned());
            old.try_lock(Lock::Record(all)).unwrap();
        }
        let (_rig, restored) = rig.next(inherited_fds, &[]);
        assert_eq!((restored.files, restored.locks, restored.lost), (1, 1, 0));
        let somebody = crate::io::File::from(std::fs::File::open(path).unwrap());
        let in_the_way = |start, end| {
            let wanted = lock(LockKind::Exclusive, start, end);
            somebody.conflicting_lock(wanted).unwrap()
        };
        assert_eq!(in_the_way(0, 19), Some(lock(LockKind::Exclusive, 0, 4)));
        assert_eq!(in_the_way(5, 19), None);
        assert_eq!(in_the_way(5, 99), Some(lock(LockKind::Shared, 20, 29)));
        assert!(somebody.try_lock(Lock::Whole(LockKind::Shared)).is_err());
    });
}

#[test]
fn lookups_of_unanswered_requests_are_undone() {
    with_and_without_inherited_fds(&Options::default(), |rig, inherited_fds| {
        rig.host_file("file", "content");
        rig.host_file("new", "");
        rig.fs.begin_request(2);
        let node = rig.node("file");
        rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        // Each on a thread that got no further.
        let stop = std::sync::Barrier::new(4);
        let (unheard, new) = std::thread::scope(|scope| {
            scope.spawn(|| {
                rig.fs.begin_request(4);
                rig.find(ROOT, "file").unwrap();
                stop.wait();
            });
            let opening = scope.spawn(|| {
                rig.fs.begin_request(6);
                let opened = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
                stop.wait();
                opened
            });
            let finding = scope.spawn(|| {
                rig.fs.begin_request(8);
                let node = rig.node("new");
                stop.wait();
                node
            });
            stop.wait();
            (opening.join().unwrap(), finding.join().unwrap())
        });
        rig.fs.begin_request(0);
        // The guest has had replies only to the first two.
        let (rig, restored) = killed(rig).next(inherited_fds, &[4, 6, 8]);
        assert_eq!((restored.inodes, restored.files), (2, 1));
        assert!(rig.fs.file(node, unheard.handle, HandleKind::File).is_err());
        assert_eq!(rig.attributes(new), Err(Errno::STALE));
        rig.fs.forget(node, 1);
        assert_eq!(rig.attributes(node), Err(Errno::STALE));
    });
}

#[test]
fn replayed_forget_counts_once() {
    with_and_without_inherited_fds(&Options::default(), |rig, inherited_fds| {
        rig.host_file("file", "content");
        let node = rig.node("file");
        rig.find(ROOT, "file").unwrap();
        rig.fs.begin_request(10);
        rig.fs.forget(node, 1);
        let (rig, _) = killed(rig).next(inherited_fds, &[10]);
        assert!(rig.fs.was_forgotten(node, 10));
        assert!(!rig.fs.was_forgotten(node, 12));
        assert!(rig.fs.was_forgotten(NodeId(4711), 12), "long forgotten");
        assert!(rig.attributes(node).is_ok());
    });
}

#[test]
fn completed_rename_is_recognised() {
    with_and_without_inherited_fds(&Options::default(), |rig, inherited_fds| {
        for name in ["a", "b", "c"] {
            rig.host_file(name, name);
        }
        let [a, b, _] = ["a", "b", "c"].map(|name| rig.node(name));
        let path = |name: &str| rig.path(name);
        let number = |name: &str| std::fs::metadata(path(name)).unwrap().ino();
        let [number_of_a, number_of_b] = ["a", "b"].map(number);
        // The process was killed between the system call and the record of it.
        std::fs::rename(path("a"), path("moved")).unwrap();
        let (rig, _) = killed(rig).next(inherited_fds, &[]);
        let (old, new) = (c("a"), c("moved"));
        let renamed =
            |from: &CStr, to: &CStr, number| rig.fs.was_renamed((ROOT, from), (ROOT, to), number);
        assert!(!renamed(&old, &new, number_of_b), "another is there");
        assert!(renamed(&old, &new, number_of_a));
        assert_eq!(rig.node("moved"), a);
        assert!(rig.attributes(a).is_ok());
        // Not executed: the old name exists, whatever the new one is.
        assert!(!renamed(c"b", c"c", number_of_b));
        assert!(!renamed(c"b", c"nothing", number_of_b));
        // Exchanged.
        rustix::fs::renameat_with(
            rustix::fs::CWD,
            rig.path("b"),
            rustix::fs::CWD,
            rig.path("c"),
            rustix::fs::RenameFlags::EXCHANGE,
        )
        .unwrap();
        assert!(renamed(c"b", c"c", number_of_b));
        assert_eq!(rig.node("c"), b);
    });
}

#[test]
fn inode_seen_before_removal_is_recorded() {
    with_and_without_inherited_fds(&Options::default(), |rig, inherited_fds| {
        let number = std::fs::metadata(rig.host_file("file", "")).unwrap().ino();
        let node = rig.node("file");
        rig.fs.begin_request(20);
        assert_eq!(
            rig.fs.unlink(&SUPERUSER, ROOT, c"absent"),
            Err(Errno::NOENT)
        );
        let of_another_thread = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                rig.fs.begin_request(22);
                rig.fs.unlink(&SUPERUSER, ROOT, c"file").unwrap();
            });
            thread.join()
        });
        of_another_thread.unwrap();
        let (rig, _) = killed(rig).next(inherited_fds, &[20, 22]);
        assert_eq!(rig.fs.recorded_inode(20), None, "it was not there");
        assert_eq!(rig.fs.recorded_inode(22), Some(number));
        assert!(rig.fs.was_removed(ROOT, c"file", number));
        rig.host_file("other", "");
        let other = rig.fs.inode_at(ROOT, c"other").unwrap();
        assert!(!rig.fs.was_removed(ROOT, c"other", other), "it is there");
        assert_eq!(rig.attributes(node).is_ok(), inherited_fds);
    });
}

#[test]
fn replayed_lookup_counts_once() {
    with_and_without_inherited_fds(&Options::default(), |rig, inherited_fds| {
        rig.host_file("file", "");
        let look_up = |unique| {
            rig.fs.begin_request(unique);
            rig.find(ROOT, "file").unwrap().node
        };
        rig.fs.begin_request(0);
        let node = rig.node("file");
        // Not answered, and counted after one that was.
        look_up(30);
        std::thread::scope(|scope| {
            let answered = scope.spawn(|| look_up(32)).join();
            assert_eq!(answered.unwrap(), node);
        });
        let (rig, _) = killed(rig).next(inherited_fds, &[30]);
        rig.fs.forget(node, 1);
        assert!(rig.attributes(node).is_ok(), "two were answered");
        rig.fs.forget(node, 1);
        assert_eq!(rig.attributes(node), Err(Errno::STALE));
    });
}

#[test]
fn resume_with_another_directory_is_refused_and_changes_nothing() {
    on_a_thread(|| {
        let rig = Rig::new(Options::default()).unwrap();
        rig.host_file("file", "");
        let node = rig.node("file");
        rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        let rig = killed(rig);
        let other = tempfile::tempdir().unwrap();
        let table = Table::open(rig.fs.table().file().unwrap().try_clone().unwrap()).unwrap();
        let open = |path: &Path| std::fs::File::open(path).unwrap().into();
        let shared = Shared {
            root: open(other.path()),
            proc_fds: open(Path::new("/proc/self/fd")),
            path: other.path().to_owned(),
        };
        let options = Options::default();
        let refused =
            Passthrough::with_table(shared, options, &table, Some(&PreviousProcess::default()));
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("another directory"), "{error}");
        let (rig, restored) = rig.next(false, &[]);
        assert_eq!((restored.inodes, restored.files), (2, 1));
        assert!(rig.attributes(node).is_ok());
    });
}

#[test]
fn tree_known_by_name_only_is_resumed() {
    on_a_thread(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective -= rustix::thread::CapabilitySet::DAC_READ_SEARCH;
        rustix::thread::set_capabilities(None, sets).unwrap();
        let options = Options {
            max_open_inodes: Some(20),
            ..Options::default()
        };
        let rig = Rig::new(options).unwrap();
        let mut nodes = Vec::new();
        for dir in 0..20 {
            let name = format!("dir{dir}");
            rig.host_dir(&name);
            let parent = rig.node(&name);
            for file in 0..20 {
                rig.host_file(&format!("{name}/file{file}"), &format!("{dir} {file}"));
                let entry = rig.find(parent, &format!("file{file}")).unwrap();
                nodes.push((entry.node, format!("{dir} {file}")));
            }
        }
        let (rig, restored) = killed(rig).next(false, &[]);
        assert_eq!(restored.inodes, 1 + 20 + 400);
        assert!(rig.fs.unlink(&SUPERUSER, ROOT, &c("absent")).is_err());
        for (node, content) in nodes {
            let opened = rig.fs.open(&SUPERUSER, node, O_RDONLY).unwrap();
            assert_eq!(read(&rig, node, opened.handle), content.as_bytes());
            rig.fs.release(node, opened.handle).unwrap();
        }
        let stat = rustix::fs::statat(rustix::fs::CWD, rig.path("dir0"), AtFlags::empty());
        assert!(stat.is_ok());
    });
}

#[test]
fn inode_unlinked_by_guest_is_served_by_next_process() {
    let options = Options::default();
    with_and_without_inherited_fds(&options, |rig, inherited_fds| {
        rig.host_file("unlinked", "old");
        rig.host_file("replaced", "old");
        rig.host_file("removed", "old");
        let [unlinked, replaced, removed] =
            ["unlinked", "replaced", "removed"].map(|name| rig.node(name));
        rig.host_file("new", "new");
        rig.fs.unlink(&SUPERUSER, ROOT, c"unlinked").unwrap();
        let (from, to) = ((ROOT, c"new"), (ROOT, c"replaced"));
        rig.fs.rename(&SUPERUSER, from, to, 0).unwrap();
        std::fs::remove_file(rig.path("removed")).unwrap();
        let (rig, _) = killed(rig).next(inherited_fds, &[]);
        let open = |node| rig.fs.open(&SUPERUSER, node, O_RDWR).map(drop);
        // A nameless inode can't be kept without its descriptor.
        let expected = if inherited_fds {
            Ok(())
        } else {
            Err(Errno::STALE)
        };
        assert_eq!([open(unlinked), open(replaced)], [expected; 2]);
        assert_eq!(open(removed), Err(Errno::STALE));
    });
}
