//! A guest's session moves from one server to another, over a pipe as a VMM provides it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeSet;
use std::ffi::{CStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use testing::{Server, TIMEOUT, errno};
use vmm::fuse::wire::{FileLock, LkIn, opcode, request_flag};
use vmm::fuse::{Call, Client, FuseError, Handle, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

type Guest = Client<Session>;

/// Two servers with these arguments, on one directory.
fn two(args: &[&str]) -> (tempfile::TempDir, Server, Server) {
    let share = tempfile::tempdir().unwrap();
    let from = Server::start_sharing(share.path(), args);
    let to = Server::start_sharing(share.path(), args);
    (share, from, to)
}

fn begin(server: &Server) -> Guest {
    server.session(Profile::Qemu, &Options::default())
}

/// Stops the guest and takes the state out of its server.
fn save(guest: &mut Guest) -> (Vec<u16>, Vec<u8>) {
    let bases = guest.guest().stop().unwrap();
    let state = guest.guest().save_state(TIMEOUT).unwrap();
    (bases, state)
}

/// Puts a state into a server, and starts a guest there.
fn load(server: &Server, state: &[u8]) -> Result<Guest, vmm::session::SessionError> {
    let options = Options::default();
    let mut session = Profile::Qemu.prepare(server.connect(), &options).unwrap();
    session.load_state(state)?;
    session.restart(&[]).unwrap();
    Ok(Client::new(session))
}

/// The guest moves.
fn move_to(server: &Server, guest: &mut Guest) -> Guest {
    let (_, state) = save(guest);
    load(server, &state).unwrap()
}

/// Makes a file and leaves it open.
fn file(guest: &mut Guest, parent: u64, name: &CStr, content: &[u8]) -> (u64, Handle) {
    let (entry, handle) = guest.create(parent, name, 0o644).unwrap();
    guest.write(entry.nodeid, handle, 0, content).unwrap();
    (entry.nodeid, handle)
}

#[test]
fn open_files_survive_migration() {
    let (share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"before");
    let generation = guest.lookup(ROOT, c"file").unwrap().generation;
    let mut moved = move_to(&to, &mut guest);
    drop(guest);
    assert_eq!(moved.read(node, handle, 0, 100).unwrap(), b"before");
    moved.write(node, handle, 6, b" and after").unwrap();
    let content = std::fs::read(share.path().join("file")).unwrap();
    assert_eq!(content, b"before and after");
    // The same inode, and the same to the guest's kernel.
    let again = moved.lookup(ROOT, c"file").unwrap();
    assert_eq!((again.nodeid, again.generation), (node, generation));
    // What is new has no number that was given out.
    let (other, other_handle) = moved.create(ROOT, c"other", 0o600).unwrap();
    assert!(other.nodeid > node && other_handle.fh > handle.fh);
    moved.release(node, handle).unwrap();
    assert_eq!(errno(moved.read(node, handle, 0, 1)), Some(libc::EBADF));
    moved.forget(node, 3).unwrap();
    assert_eq!(errno(moved.getattr(node)), Some(libc::ESTALE));
}

#[test]
fn lookup_counts_survive_migration() {
    let (_share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"");
    guest.release(node, handle).unwrap();
    guest.lookup(ROOT, c"file").unwrap();
    let mut moved = move_to(&to, &mut guest);
    moved.lookup(ROOT, c"file").unwrap();
    moved.forget(node, 2).unwrap();
    moved.getattr(node).unwrap();
    moved.forget(node, 1).unwrap();
    assert_eq!(errno(moved.getattr(node)), Some(libc::ESTALE));
}

fn a_file_without_a_name_goes_along(args: &[&str], same: bool) {
    let (share, from, to) = two(args);
    let mut guest = begin(&from);
    let content = testing::pattern(300_000, 1);
    let (node, handle) = file(&mut guest, ROOT, c"file", &content[..100_000]);
    // With a hole.
    let behind = &content[100_000..];
    guest.write(node, handle, 5_000_000, behind).unwrap();
    guest.chmod(node, 0o604).unwrap();
    guest.unlink(ROOT, c"file").unwrap();
    let before = guest.getattr(node).unwrap().attr;
    let mut moved = move_to(&to, &mut guest);
    drop(guest);
    let after = moved.getattr(node).unwrap().attr;
    assert_eq!((after.size, after.nlink), (5_200_000, 0));
    assert_eq!(
        (after.mode, after.mtime, after.mtimensec),
        (before.mode, before.mtime, before.mtimensec)
    );
    assert_eq!(after.ino == before.ino, same);
    let read = moved.read(node, handle, 0, 200_000).unwrap();
    assert_eq!(read[..100_000], content[..100_000]);
    assert!(read[100_000..].iter().all(|byte| *byte == 0));
    let read = moved.read(node, handle, 5_000_000, 300_000).unwrap();
    assert_eq!(read, behind);
    moved.write(node, handle, 0, b"and is written").unwrap();
    assert_eq!(moved.read(node, handle, 0, 14).unwrap(), b"and is written");
    assert_eq!(std::fs::read_dir(share.path()).unwrap().count(), 0);
}

#[test]
fn nameless_file_migrates_as_content() {
    a_file_without_a_name_goes_along(&[], false);
}

#[test]
fn nameless_file_migrates_by_file_handle() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: file handles take root");
        return;
    }
    let args = ["--migration-mode", "file-handles"];
    a_file_without_a_name_goes_along(&args, true);
    // What comes in names no file handle unless that was asked for.
    let args = ["--inode-file-handles", "prefer"];
    a_file_without_a_name_goes_along(&args, false);
}

#[test]
fn forged_stream_damages_nothing() {
    use ringfsd::internals::migration::stream::{self, Find};
    let (share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"there");
    guest.unlink(ROOT, c"file").unwrap();
    file(&mut guest, ROOT, c"kept", b"kept");
    let (_, state) = save(&mut guest);
    let mut odd = stream::decode(&state).unwrap();
    for inode in &mut odd.inodes {
        if let Find::Nameless(nameless) = &mut inode.find {
            (nameless.uid, nameless.gid) = (u32::MAX, u32::MAX);
            (nameless.mode, nameless.times) = (u32::MAX, [i64::MIN; 2]);
        }
    }
    let truncate = libc::O_TRUNC | libc::O_CREAT | libc::O_RDWR;
    for open in &mut odd.opens {
        open.flags = truncate.cast_unsigned();
    }
    // Whether it is taken or not: nothing is lost, and the server lives.
    drop(load(&to, &stream::encode(&odd).unwrap()));
    assert_eq!(std::fs::read(share.path().join("kept")).unwrap(), b"kept");
    let mut upwards = stream::decode(&state).unwrap();
    for inode in &mut upwards.inodes {
        if let Find::Path { path, .. } = &mut inode.find {
            *path = b"../../etc/passwd".to_vec();
        }
    }
    assert!(load(&to, &stream::encode(&upwards).unwrap()).is_err());
    let mut moved = load(&to, &state).unwrap();
    assert_eq!(moved.read(node, handle, 0, 9).unwrap(), b"there");
}

#[test]
fn nameless_directory_migrates() {
    let (share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let node = guest.mkdir(ROOT, c"directory", 0o755).unwrap().nodeid;
    let handle = guest.opendir(node).unwrap();
    guest.rmdir(ROOT, c"directory").unwrap();
    let mut moved = move_to(&to, &mut guest);
    assert_eq!(moved.getattr(node).unwrap().attr.mode & 0o7777, 0o755);
    // As on any Linux.
    assert_eq!(errno(moved.readdir_all(node, handle)), Some(libc::ENOENT));
    assert_eq!(errno(moved.create(node, c"new", 0o600)), Some(libc::ENOENT));
    assert_eq!(std::fs::read_dir(share.path()).unwrap().count(), 0);
}

#[test]
fn non_utf8_names_in_renamed_directories_migrate() {
    let (share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let names = [c"\xff\xfe", c"a (deleted)", c"\n\\\"'", c"\xc3\x28"];
    let mut nodes = Vec::new();
    let mut parent = ROOT;
    for name in names {
        let directory = guest.mkdir(parent, name, 0o755).unwrap().nodeid;
        nodes.push((
            directory,
            file(&mut guest, directory, name, name.to_bytes()),
        ));
        parent = directory;
    }
    guest.rename(ROOT, names[0], ROOT, c"renamed").unwrap();
    guest
        .rename(nodes[0].0, names[1], ROOT, c"moved away")
        .unwrap();
    // Somebody else's rename, too.
    std::fs::rename(share.path().join("renamed"), share.path().join("by others")).unwrap();
    let mut moved = move_to(&to, &mut guest);
    drop(guest);
    for ((directory, (node, handle)), name) in nodes.iter().zip(names) {
        let read = moved.read(*node, *handle, 0, 100).unwrap();
        assert_eq!(read, name.to_bytes());
        assert_eq!(moved.lookup(*directory, name).unwrap().nodeid, *node);
    }
    let found = moved.lookup(ROOT, c"by others").unwrap();
    assert_eq!(found.nodeid, nodes[0].0);
}

#[test]
fn tree_deeper_than_path_max_migrates() {
    let (_share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let name = std::ffi::CString::new("n".repeat(200)).unwrap();
    let mut parent = ROOT;
    for _ in 0..60 {
        parent = guest.mkdir(parent, &name, 0o755).unwrap().nodeid;
    }
    let (node, handle) = file(&mut guest, parent, c"file", b"deep");
    let mut moved = move_to(&to, &mut guest);
    assert_eq!(moved.read(node, handle, 0, 10).unwrap(), b"deep");
    assert_eq!(moved.lookup(parent, c"file").unwrap().nodeid, node);
}

#[test]
fn hard_link_without_first_name_migrates() {
    let (share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"first", b"linked");
    guest.link(node, ROOT, c"second").unwrap();
    // On the host, so that the server doesn't learn of it.
    std::fs::remove_file(share.path().join("first")).unwrap();
    std::fs::rename(share.path().join("second"), share.path().join("third")).unwrap();
    let mut moved = move_to(&to, &mut guest);
    assert_eq!(moved.read(node, handle, 0, 10).unwrap(), b"linked");
    assert_eq!(moved.lookup(ROOT, c"third").unwrap().nodeid, node);
}

#[test]
fn half_read_directory_continues_after_migration() {
    let (share, from, to) = two(&[]);
    let names: BTreeSet<OsString> = (0..500).map(|n| format!("name-{n}").into()).collect();
    for name in &names {
        std::fs::write(share.path().join(name), b"").unwrap();
    }
    let mut guest = begin(&from);
    let handle = guest.opendir(ROOT).unwrap();
    let mut seen = Vec::new();
    let mut offset = 0;
    for _ in 0..3 {
        let some = guest.readdir(ROOT, handle, offset, 1024).unwrap();
        offset = some.last().unwrap().offset;
        seen.extend(some);
    }
    let mut moved = move_to(&to, &mut guest);
    drop(guest);
    loop {
        let some = moved.readdir(ROOT, handle, offset, 4096).unwrap();
        let Some(last) = some.last() else { break };
        offset = last.offset;
        seen.extend(some);
    }
    let listed: Vec<OsString> = seen
        .into_iter()
        .map(|entry| entry.name)
        .filter(|name| name != "." && name != "..")
        .collect();
    assert_eq!(listed.len(), names.len());
    assert_eq!(listed.into_iter().collect::<BTreeSet<_>>(), names);
}

#[test]
fn guest_migrates_back() {
    let (_share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"");
    guest.unlink(ROOT, c"file").unwrap();
    let mut servers = [from, to];
    for round in 0_u64..6 {
        let text = format!("round {round} ");
        guest
            .write(node, handle, round * 8, text.as_bytes())
            .unwrap();
        let (name, target) = (format!("new-{round}\0"), &mut servers[1]);
        let name = CStr::from_bytes_with_nul(name.as_bytes()).unwrap();
        let made = file(&mut guest, ROOT, name, b"new");
        let moved = move_to(target, &mut guest);
        drop(std::mem::replace(&mut guest, moved));
        let read = guest.read(node, handle, 0, 1000).unwrap();
        assert_eq!(read.len(), usize::try_from(round).unwrap() * 8 + 8);
        assert_eq!(guest.read(made.0, made.1, 0, 10).unwrap(), b"new");
        servers[0].wait_until_it_listens();
        servers.swap(0, 1);
    }
}

#[test]
fn source_resumes_after_failed_migration() {
    let (share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"here");
    for _ in 0..2 {
        let (bases, state) = save(&mut guest);
        let mut damaged = state.clone();
        damaged[40] ^= 1;
        for bad in [
            &damaged[..],
            &state[..state.len() - 1],
            b"",
            b"something else",
        ] {
            assert!(load(&to, bad).is_err());
        }
        guest.guest().restart(&bases).unwrap();
        assert_eq!(guest.read(node, handle, 0, 10).unwrap(), b"here");
    }
    // The destination still serves the next guest.
    let mut other = begin(&to);
    other.lookup(ROOT, c"file").unwrap();
    let mut moved = {
        drop(other);
        move_to(&to, &mut guest)
    };
    assert_eq!(moved.read(node, handle, 0, 10).unwrap(), b"here");
    drop(share);
}

#[test]
fn missing_file_on_destination_follows_on_error_option() {
    let share = tempfile::tempdir().unwrap();
    let (empty, other_empty) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = Server::start_sharing(share.path(), &[]);
    let mut strict = Server::start_sharing(empty.path(), &[]);
    let args = ["--migration-on-error", "guest-error"];
    let lenient = Server::start_sharing(other_empty.path(), &args);
    std::fs::write(other_empty.path().join("there"), b"there").unwrap();
    let mut guest = begin(&from);
    let (missing, handle) = file(&mut guest, ROOT, c"missing", b"");
    let (there, there_handle) = file(&mut guest, ROOT, c"there", b"here");
    let (_, state) = save(&mut guest);
    assert!(load(&strict, &state).is_err());
    strict.wait_for("can't be found as ");
    strict.wait_until_it_listens();
    let mut moved = load(&lenient, &state).unwrap();
    assert_eq!(moved.read(there, there_handle, 0, 9).unwrap(), b"there");
    assert_eq!(errno(moved.getattr(missing)), Some(libc::ESTALE));
    assert_eq!(errno(moved.read(missing, handle, 0, 1)), Some(libc::EBADF));
    assert_eq!(errno(moved.lookup(missing, c"x")), Some(libc::ESTALE));
    moved.release(missing, handle).unwrap_err();
    moved.forget(missing, 1).unwrap();
}

#[test]
fn copied_directory_is_accepted_as_destination() {
    let (share, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = Server::start_sharing(share.path(), &[]);
    let to = Server::start_sharing(copy.path(), &[]);
    for path in [share.path(), copy.path()] {
        std::fs::create_dir(path.join("d")).unwrap();
        std::fs::write(path.join("d/file"), b"the same").unwrap();
    }
    let mut guest = begin(&from);
    let directory = guest.lookup(ROOT, c"d").unwrap().nodeid;
    let node = guest.lookup(directory, c"file").unwrap().nodeid;
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let mut moved = move_to(&to, &mut guest);
    moved.write(node, handle, 8, b" and more").unwrap();
    let read = |path: &Path| std::fs::read(path.join("d/file")).unwrap();
    assert_eq!(read(share.path()), b"the same");
    assert_eq!(read(copy.path()), b"the same and more");
}

#[test]
fn replaced_file_is_not_taken_for_original() {
    let (share, from, to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"old");
    let (closed, closed_handle) = file(&mut guest, ROOT, c"closed", b"old");
    guest.release(closed, closed_handle).unwrap();
    for name in ["file", "closed"] {
        let (new, old) = (share.path().join("new"), share.path().join(name));
        std::fs::write(&new, b"new").unwrap();
        std::fs::rename(new, old).unwrap();
    }
    let mut moved = move_to(&to, &mut guest);
    // Open files stay what they were.
    assert_eq!(moved.read(node, handle, 0, 10).unwrap(), b"old");
    assert_ne!(moved.lookup(ROOT, c"file").unwrap().nodeid, node);
    // What was not is looked up again by the guest's kernel.
    assert_eq!(errno(moved.getattr(closed)), Some(libc::ESTALE));
    assert_ne!(moved.lookup(ROOT, c"closed").unwrap().nodeid, closed);
}

#[test]
fn file_handles_distinguish_copy_from_original() {
    let (share, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let args = ["--migration-verify-handles"];
    let from = Server::start_sharing(share.path(), &args);
    let same = Server::start_sharing(share.path(), &[]);
    let other = Server::start_sharing(copy.path(), &[]);
    std::fs::write(copy.path().join("file"), b"copy").unwrap();
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"here");
    let (_, state) = save(&mut guest);
    assert!(load(&other, &state).is_err());
    let mut moved = load(&same, &state).unwrap();
    assert_eq!(moved.read(node, handle, 0, 10).unwrap(), b"here");
}

#[test]
fn renamed_file_migrates_with_confirmed_paths() {
    for (args, found) in [(&[][..], false), (&["--migration-confirm-paths"], true)] {
        let share = tempfile::tempdir().unwrap();
        let from = Server::start_sharing(share.path(), args);
        let to = Server::start_sharing(share.path(), &[]);
        let path = |name: &str| share.path().join(name);
        std::fs::write(path("file"), b"content").unwrap();
        let mut guest = begin(&from);
        let node = guest.lookup(ROOT, c"file").unwrap().nodeid;
        std::fs::rename(path("file"), path("renamed")).unwrap();
        let mut moved = move_to(&to, &mut guest);
        if found {
            let handle = moved.open(node, libc::O_RDONLY).unwrap();
            assert_eq!(moved.read(node, handle, 0, 10).unwrap(), b"content");
            assert_eq!(moved.lookup(ROOT, c"renamed").unwrap().nodeid, node);
        } else {
            assert_eq!(errno(moved.getattr(node)), Some(libc::ESTALE));
        }
    }
}

#[test]
fn negotiated_features_survive_migration() {
    let share = tempfile::tempdir().unwrap();
    let args = ["--writeback", "--posix-locks"];
    let from = Server::start_sharing(share.path(), &args);
    let mut without = Server::start_sharing(share.path(), &["--writeback"]);
    let mut guest = begin(&from);
    let (_, state) = save(&mut guest);
    assert!(load(&without, &state).is_err());
    without.wait_for("POSIX_LOCKS, which this server has not enabled");
}

#[test]
fn state_before_init_migrates() {
    let (_share, from, to) = two(&[]);
    let session = Profile::Qemu
        .connect(from.connect(), &Options::default())
        .unwrap();
    let mut moved = move_to(&to, &mut Client::new(session));
    assert_eq!(errno(moved.getattr(ROOT)), Some(libc::EIO));
    moved.init().unwrap();
    moved.getattr(ROOT).unwrap();
}

#[test]
fn state_transfer_with_running_queues_is_refused() {
    let (_share, from, _to) = two(&[]);
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"here");
    assert!(guest.guest().save_state(TIMEOUT).is_err());
    assert_eq!(guest.read(node, handle, 0, 10).unwrap(), b"here");
}

fn lock(kind: i32, start: u64, end: u64) -> FileLock {
    FileLock {
        start,
        end,
        r#type: kind.cast_unsigned(),
        pid: 42,
    }
}

fn flock(guest: &mut Guest, node: u64, handle: Handle, kind: i32) -> Result<(), FuseError> {
    let asked = LkIn {
        fh: handle.fh,
        owner: 1,
        lk: lock(kind, 0, i64::MAX.cast_unsigned()),
        lk_flags: request_flag::LK_FLOCK,
        padding: 0,
    };
    let call = Call::new(opcode::SETLK, node)
        .arg(asked.as_bytes())
        .reply(0);
    guest.request(call).map(|_| ())
}

/// Whether a process of the host may have a file by `flock`, and all of its bytes by `fcntl`.
fn host_may_lock(path: &Path) -> [bool; 2] {
    let open = || {
        let mut options = std::fs::File::options();
        options.read(true).write(true).open(path).unwrap()
    };
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    [
        rustix::fs::flock(open(), exclusive).is_ok(),
        rustix::fs::fcntl_lock(open(), exclusive).is_ok(),
    ]
}

#[test]
fn locks_survive_failed_and_completed_migration() {
    let (share, from, to) = two(&["--posix-locks", "--flock"]);
    let path = share.path().join("file");
    let mut guest = begin(&from);
    let (node, handle) = file(&mut guest, ROOT, c"file", b"");
    flock(&mut guest, node, handle, libc::F_WRLCK).unwrap();
    let record = lock(libc::F_WRLCK, 10, 19);
    guest.setlk(node, handle, 7, record).unwrap();
    assert_eq!(host_may_lock(&path), [false; 2]);
    // Nothing comes of it.
    let (bases, _) = save(&mut guest);
    guest.guest().restart(&bases).unwrap();
    guest.getattr(node).unwrap();
    assert_eq!(host_may_lock(&path), [false; 2]);
    // Something does, while the source is still there.
    let mut moved = move_to(&to, &mut guest);
    assert_eq!(host_may_lock(&path), [false; 2]);
    drop(guest);
    // They are the same owners'.
    let another = lock(libc::F_RDLCK, 10, 19);
    assert_eq!(
        errno(moved.setlk(node, handle, 8, another)),
        Some(libc::EAGAIN)
    );
    moved
        .setlk(node, handle, 7, lock(libc::F_UNLCK, 10, 19))
        .unwrap();
    flock(&mut moved, node, handle, libc::F_UNLCK).unwrap();
    assert_eq!(host_may_lock(&path), [true; 2]);
    assert_eq!(std::fs::metadata(&path).unwrap().nlink(), 1);
}
