//! Who may open the server's socket and its state file, whatever the launcher's umask.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::mem::MaybeUninit;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use rustix::fs::{XattrFlags, inotify};
use rustix::process::{Gid, Uid};
use testing::{Server, USER, is_root};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

const GROUP: u32 = 12345;

/// Umasks that launchers have.
const UMASKS: &[&str] = &["000", "002", "022", "077", "777"];

/// A directory that everybody may enter, with a share in it.
fn open_directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(dir.path(), open).unwrap();
    std::fs::create_dir(dir.path().join("share")).unwrap();
    dir
}

/// The server, with its socket and its share in `dir`, started with `umask`.
fn command(umask: &str, dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("bash");
    let script = format!("umask {umask}; exec \"$0\" \"$@\"");
    command
        .args(["-c", &script])
        .arg(testing::command().get_program())
        .env_remove("RINGFSD_LOG")
        .arg("--socket")
        .arg(dir.join("socket"))
        .arg("--shared-dir")
        .arg(dir.join("share"))
        .args(args);
    command
}

fn start(umask: &str, args: &[&str]) -> Server {
    let dir = open_directory();
    let command = command(umask, dir.path(), args);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    server
}

fn mode_and_group(path: &Path) -> (u32, u32) {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    (metadata.mode() & 0o7777, metadata.gid())
}

/// Connects as another user who is in this group alone.
fn connect_as(user: u32, group: u32, socket: &Path) -> std::io::Result<UnixStream> {
    let socket = socket.to_owned();
    let connect = move || {
        // These change the calling thread alone.
        rustix::thread::set_thread_groups(&[]).unwrap();
        let group = Gid::from_raw(group);
        rustix::thread::set_thread_res_gid(group, group, group).unwrap();
        let user = Uid::from_raw(user);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        UnixStream::connect(socket)
    };
    std::thread::spawn(connect).join().unwrap()
}

#[test]
fn another_user_cannot_connect_whatever_the_umask() {
    if !is_root() {
        return;
    }
    for umask in UMASKS {
        let server = start(umask, &[]);
        assert_eq!(mode_and_group(&server.socket()).0, 0o700, "umask {umask}");
        for (user, group) in [(USER, USER), (USER, 0)] {
            let error = connect_as(user, group, &server.socket()).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        }
        // The server's own user can, and what the guest makes has the mode and umask (022) of the guest.
        let mut fs = server.session(Profile::Qemu, &Options::default());
        fs.create(ROOT, c"file", 0o666).unwrap();
        let made = std::fs::metadata(server.share().join("file")).unwrap();
        assert_eq!(made.mode() & 0o777, 0o644, "umask {umask}");
    }
}

#[test]
fn only_members_of_the_socket_group_can_connect_besides() {
    if !is_root() {
        return;
    }
    for umask in UMASKS {
        let server = start(umask, &["--socket-group", &GROUP.to_string()]);
        let socket = server.socket();
        assert_eq!(mode_and_group(&socket), (0o770, GROUP), "umask {umask}");
        let error = connect_as(USER, USER, &socket).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        connect_as(USER, GROUP, &socket).unwrap();
    }
}

#[test]
fn socket_is_closed_to_others_from_its_first_moment() {
    for supervise in [&[][..], &["--supervise"]] {
        let dir = open_directory();
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let events = inotify::init(flags).unwrap();
        let wanted = inotify::WatchFlags::CREATE | inotify::WatchFlags::ATTRIB;
        inotify::add_watch(&events, dir.path(), wanted).unwrap();
        let command = command("000", dir.path(), supervise);
        let mut server = Server::spawn(command, dir);
        server.wait_until_it_listens();
        assert_eq!(mode_and_group(&server.socket()).0, 0o700);
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&events, &mut buffer);
        let mut seen = Vec::new();
        while let Ok(event) = reader.next() {
            if event.file_name() == Some(c"socket") {
                seen.push(event.events());
            }
        }
        // Made so, and never changed.
        assert_eq!(seen, [inotify::ReadFlags::CREATE]);
    }
}

#[test]
fn socket_of_a_group_is_never_open_to_anybody_else() {
    if !is_root() {
        return;
    }
    for _ in 0..10 {
        let dir = open_directory();
        let command = command("000", dir.path(), &["--socket-group", &GROUP.to_string()]);
        let socket = dir.path().join("socket");
        let mut server = Server::spawn(command, dir);
        let mut last = (0, 0);
        while last.0 & 0o070 == 0 {
            let Ok(metadata) = std::fs::symlink_metadata(&socket) else {
                assert!(!server.has_ended());
                continue;
            };
            last = (metadata.mode() & 0o7777, metadata.gid());
            assert_eq!(last.0 & 0o007, 0, "{last:?}");
            assert!(last.0 & 0o070 == 0 || last.1 == GROUP, "{last:?}");
        }
        server.wait_until_it_listens();
    }
}

/// A default ACL that lets `USER` in: version 2, then tag, permissions and id of each entry.
fn default_acl() -> Vec<u8> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 7, u32::MAX),
        (0x02, 7, USER),
        (0x04, 7, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 7, u32::MAX),
    ];
    for (tag, permissions, id) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

#[test]
fn default_acl_opens_socket_to_no_other_user() {
    if !is_root() {
        return;
    }
    for group in [None, Some(GROUP.to_string())] {
        let dir = open_directory();
        let acl = c"system.posix_acl_default";
        let set = rustix::fs::setxattr(dir.path(), acl, &default_acl(), XattrFlags::empty());
        if set.is_err() {
            println!("SKIPPED: the temporary directory's file system has no ACLs");
            return;
        }
        let mut args = Vec::new();
        if let Some(group) = &group {
            args.extend(["--socket-group", group]);
        }
        let state = dir.path().join("state");
        args.extend(["--state", state.to_str().unwrap()]);
        let command = command("000", dir.path(), &args);
        let mut server = Server::spawn(command, dir);
        server.wait_until_it_listens();
        let error = connect_as(USER, USER, &server.socket()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        if group.is_some() {
            connect_as(USER, GROUP, &server.socket()).unwrap();
        }
        let opened = as_user(USER, move || std::fs::File::open(state));
        assert_eq!(
            opened.unwrap_err().kind(),
            std::io::ErrorKind::PermissionDenied
        );
    }
}

fn as_user<T: Send + 'static>(user: u32, act: impl FnOnce() -> T + Send + 'static) -> T {
    let act = move || {
        let user = Uid::from_raw(user);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        act()
    };
    std::thread::spawn(act).join().unwrap()
}

#[test]
fn state_file_is_private_to_server_user() {
    for umask in UMASKS {
        let dir = open_directory();
        let state = dir.path().join("state");
        let args = ["--state", state.to_str().unwrap()];
        let command = command(umask, dir.path(), &args);
        let mut server = Server::spawn(command, dir);
        server.wait_until_it_listens();
        assert_eq!(mode_and_group(&state).0, 0o600, "umask {umask}");
    }
}

#[test]
fn existing_state_file_is_closed_to_others() {
    let dir = open_directory();
    let state = dir.path().join("state");
    std::fs::write(&state, "").unwrap();
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o666)).unwrap();
    let args = ["--state", state.to_str().unwrap()];
    let command = command("000", dir.path(), &args);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    assert_eq!(mode_and_group(&state).0, 0o600);
}

#[test]
fn state_file_of_another_user_is_refused() {
    if !is_root() {
        return;
    }
    let dir = open_directory();
    let state = dir.path().join("state");
    std::fs::write(&state, "").unwrap();
    std::os::unix::fs::chown(&state, Some(USER), Some(USER)).unwrap();
    let args = ["--state", state.to_str().unwrap()];
    let command = command("022", dir.path(), &args);
    let mut server = Server::spawn(command, dir);
    server.wait_for("belongs to user 65534");
    assert_eq!(server.wait().code(), Some(1));
}
