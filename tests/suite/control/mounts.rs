//! Directories that are mounted and unmounted while a guest works.

use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::Value;
use testing::{Server, USER, errno};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

use super::{Connection, ControlSocket, STATUS};

/// A server of `/one`, and a directory `two` beside it.
fn start(user: Option<u32>, place: &ControlSocket, arguments: &[&str]) -> (Server, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    for name in ["one", "two", "two/inner"] {
        fs::create_dir(path.join(name)).unwrap();
        chown(path.join(name), user, user).unwrap();
    }
    fs::write(path.join("two/inner/file"), "new").unwrap();
    fs::write(path.join("secret"), "").unwrap();
    chown(path.join("two/inner/file"), user, user).unwrap();
    chown(&path, user, user).unwrap();
    let mut command = testing::command_as(user, &path);
    command
        .arg("--socket")
        .arg(path.join("socket"))
        .arg(format!("--vfs=/one={}", path.join("one").display()))
        .arg(place.option())
        .args(arguments);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    (server, path)
}

fn setups() -> Vec<(Option<u32>, &'static str)> {
    match rustix::process::geteuid().is_root() {
        true => vec![
            (None, "namespace"),
            (None, "none"),
            (Some(USER), "namespace"),
            (Some(USER), "none"),
        ],
        false => vec![(None, "namespace"), (None, "none")],
    }
}

#[test]
fn directory_is_mounted_used_and_unmounted_while_a_guest_works() {
    for (user, sandbox) in setups() {
        println!("{sandbox} {user:?}");
        let place = ControlSocket::of(user);
        let (server, path) = start(user, &place, &["--sandbox", sandbox]);
        let mut guest = server.session(Profile::Qemu, &Options::default());
        assert_eq!(errno(guest.lookup(ROOT, c"two")), Some(libc::ENOENT));
        let two = path.join("two");
        let mounted = place.ctl(&["mount", "/two", two.to_str().unwrap()]);
        assert_eq!(mounted["mounts"][1]["point"], "/two");
        let root = guest.lookup(ROOT, c"two").unwrap().nodeid;
        let inner = guest.lookup(root, c"inner").unwrap().nodeid;
        let file = guest.lookup(inner, c"file").unwrap().nodeid;
        let handle = guest.open(file, libc::O_RDWR).unwrap();
        assert_eq!(guest.read(file, handle, 0, 9).unwrap(), b"new");
        guest.write(file, handle, 3, b"er").unwrap();
        assert_eq!(fs::read(path.join("two/inner/file")).unwrap(), b"newer");
        let made = guest.mkdir(root, c"made", 0o755).unwrap();
        guest.rmdir(root, c"made").unwrap();
        guest.forget(made.nodeid, 1).unwrap();
        let open = place.ctl(&["handles"]);
        assert_eq!(open["handles"][0]["node"], file);
        let inodes = place.ctl(&["inodes", "--all"]);
        let inodes = inodes["inodes"].as_array().unwrap();
        let shown = inodes.iter().find(|inode| inode["node"] == file).unwrap();
        assert_eq!(shown["path"], "/two/inner/file");
        place.ctl(&["drop-caches"]);
        assert_eq!(guest.read(file, handle, 0, 9).unwrap(), b"newer");
        // Occupied, and unknown.
        let again = ["mount", "/two", two.to_str().unwrap()];
        assert_eq!(place.refusal(&again), "failed");
        assert_eq!(place.refusal(&["unmount", "/three"]), "failed");
        assert_eq!(place.refusal(&["mount", "three", "/"]), "invalid-argument");
        place.ctl(&["unmount", "/two"]);
        assert_eq!(errno(guest.lookup(ROOT, c"two")), Some(libc::ENOENT));
        assert_eq!(errno(guest.getattr(file)), Some(libc::ESTALE));
        assert!(guest.lookup(ROOT, c"one").is_ok());
        assert_eq!(
            place.ctl(&["status"])["mounts"].as_array().unwrap().len(),
            1
        );
    }
}

#[test]
fn readonly_mount_refuses_changes() {
    let place = ControlSocket::new();
    let (server, path) = start(None, &place, &[]);
    let two = path.join("two");
    place.ctl(&["mount", "/two", two.to_str().unwrap(), "--readonly"]);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    let root = guest.lookup(ROOT, c"two").unwrap().nodeid;
    assert_eq!(errno(guest.mkdir(root, c"made", 0o755)), Some(libc::EROFS));
}

#[test]
fn number_of_added_directories_is_limited() {
    let place = ControlSocket::new();
    let (_server, path) = start(None, &place, &[]);
    let two = path.join("two");
    let two = two.to_str().unwrap();
    for number in 0..4 {
        place.ctl(&["mount", &format!("/m{number}"), two]);
    }
    assert_eq!(place.refusal(&["mount", "/more", two]), "not-possible");
    place.ctl(&["unmount", "/m0"]);
    place.ctl(&["mount", "/more", two]);
}

/// Sends bytes with these descriptors.
fn send(client: &Connection, bytes: &[u8], files: &[&fs::File]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let bytes = [IoSlice::new(bytes)];
    let flags = SendFlags::empty();
    rustix::net::sendmsg(client.0.get_ref(), &bytes, &mut control, flags).unwrap();
}

/// Asks for a mount with this descriptor.
fn mount_raw(client: &mut Connection, point: &str, fd: Option<&fs::File>) -> Value {
    let request = format!(
        "{{\"version\":1,\"command\":\"mount\",\"arguments\":{{\"point\":\"{point}\",\"source\":\"it\"}}}}\n"
    );
    send(client, request.as_bytes(), fd.as_slice());
    client.receive().unwrap()
}

#[test]
fn descriptor_that_leads_out_of_the_sandbox_is_refused() {
    let place = ControlSocket::new();
    let (_server, path) = start(None, &place, &[]);
    let mut client = place.connect();
    let open = |path: &Path| fs::File::open(path).unwrap();
    let attached = open(&path.join("two"));
    let reply = mount_raw(&mut client, "/two", Some(&attached));
    assert_eq!(reply["error"]["code"], "not-possible", "{reply}");
    assert!(reply["error"]["hint"].is_string());
    let file = open(&path.join("two/inner/file"));
    let reply = mount_raw(&mut client, "/two", Some(&file));
    assert_eq!(reply["error"]["code"], "not-possible", "{reply}");
    let reply = mount_raw(&mut client, "/two", None);
    assert_eq!(reply["error"]["code"], "invalid-argument", "{reply}");
    // Without a sandbox there is nothing to be led out of.
    let place = ControlSocket::new();
    let (_server, path) = start(None, &place, &["--sandbox=none"]);
    let mut client = place.connect();
    let attached = open(&path.join("two"));
    let reply = mount_raw(&mut client, "/two", Some(&attached));
    assert!(reply["result"].is_object(), "{reply}");
}

#[test]
fn mounts_of_all_kinds_are_listed_and_what_they_use() {
    let place = ControlSocket::new();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for name in ["plain", "lower", "top/upper", "top/work"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    fs::write(at("lower/file"), "below").unwrap();
    let metrics = format!(
        "--metrics=unix:{}",
        place.dir.path().join("metrics").display()
    );
    let layers = format!(
        "--vfs=/layers=overlay:lower={},upper={},work={},xattr=user",
        at("lower"),
        at("top/upper"),
        at("top/work")
    );
    let socket = tempfile::tempdir().unwrap();
    let mut command = testing::command_as(None, socket.path());
    command
        .arg("--socket")
        .arg(socket.path().join("socket"))
        .arg(format!("--vfs=/plain={}", at("plain")))
        .args([layers, place.option(), metrics]);
    let mut server = Server::spawn(command, socket);
    server.wait_until_it_listens();
    let mut guest = server.session(Profile::Qemu, &Options::default());
    let [plain, overlay] = [c"plain", c"layers"].map(|name| guest.lookup(ROOT, name).unwrap());
    let file = guest.lookup(overlay.nodeid, c"file").unwrap().nodeid;
    let of_layers = guest.open(file, libc::O_RDWR).unwrap();
    let (made, _) = guest.create(plain.nodeid, c"made", 0o644).unwrap();
    let (_, _) = guest.create(plain.nodeid, c"more", 0o644).unwrap();

    let inodes = place.ctl(&["inodes", "--all"]);
    let known = |node: u64| {
        let mut inodes = inodes["inodes"].as_array().unwrap().iter();
        let inode = inodes.find(|inode| inode["node"] == node).unwrap();
        (inode["path"].clone(), inode["kind"].clone())
    };
    assert_eq!(known(file), ("/layers/file".into(), "file".into()));
    assert_eq!(known(made.nodeid), ("/plain/made".into(), "file".into()));
    assert_eq!(inodes["unlisted"], Value::Null);
    let handles = place.ctl(&["handles", "--all"]);
    let mut handles = handles["handles"].as_array().unwrap().iter();
    let open = handles.find(|open| open["node"] == file).unwrap();
    assert_eq!(
        (&open["path"], &open["access"]),
        (&"/layers/file".into(), &"read-write".into())
    );
    assert_eq!(open["handle"], of_layers.fh);

    let statistics = place.ctl(&["statistics"]);
    let mounts = statistics["mounts"].as_array().unwrap();
    let points: Vec<_> = mounts
        .iter()
        .map(|it| it["mount"].as_str().unwrap())
        .collect();
    assert_eq!(points, ["/plain", "/layers"]);
    let used = |usage: &Value, what: &str| usage[what].as_u64();
    for (what, of_plain, of_layers) in [("inodes", 3, 1), ("handles", 2, 1)] {
        assert_eq!(
            used(&mounts[0]["usage"], what),
            Some(of_plain),
            "{what}: {mounts:?}"
        );
        assert_eq!(
            used(&mounts[1]["usage"], what),
            Some(of_layers),
            "{what}: {mounts:?}"
        );
        let sum = of_plain + of_layers;
        assert_eq!(
            used(&statistics["usage"], what),
            Some(sum),
            "{what}: {statistics}"
        );
        assert_eq!(
            used(&place.ctl(&["status"])["usage"], what),
            Some(sum),
            "{what}"
        );
    }
    // An overlay limits no handles, so nothing does that for all mounts.
    assert_eq!(statistics["usage"]["max_handles"], Value::Null);
    assert!(
        used(&statistics["usage"], "descriptors") < used(&statistics["usage"], "max_descriptors")
    );
    let text = crate::metrics::text(&place.dir.path().join("metrics"));
    let served = crate::metrics::types(&text).into_iter();
    let of_mounts = served.filter(|(name, _)| name.starts_with("ringfsd_mount_"));
    assert!(of_mounts.eq(crate::metrics::documented(true)), "{text}");
    for sample in [
        "ringfsd_inodes{share=\"vfs\"} 4",
        "ringfsd_mount_handles{share=\"vfs\",mount=\"/plain\"} 2",
        "ringfsd_mount_handles{share=\"vfs\",mount=\"/layers\"} 1",
    ] {
        let (name, value) = sample.split_once("share=\"vfs\"").unwrap();
        let found = text
            .lines()
            .any(|line| line.starts_with(name) && line.ends_with(value));
        assert!(found, "{sample}: {text}");
    }
    assert!(!text.contains("ringfsd_mount_handles_limit{share=\"vfs\",mount=\"/layers\"}"));
}

#[test]
fn descriptors_without_a_request_are_not_kept() {
    let place = ControlSocket::new();
    let (server, _) = start(None, &place, &[]);
    let open = || {
        let fds = format!("/proc/{}/fd", server.pid());
        fs::read_dir(fds).unwrap().count()
    };
    let (mut client, mut other) = (place.connect(), place.connect());
    client.ask(STATUS);
    other.ask(STATUS);
    let before = open();
    let null = fs::File::open("/dev/null").unwrap();
    for _ in 0..10 {
        send(&client, b" ", &[&null; 100]);
        // The server has received that before this reply, or does before the next one.
        other.ask(STATUS);
    }
    other.ask(STATUS);
    // The first one may belong to a request that isn't complete yet.
    let kept = open() - before;
    assert!(kept <= 1, "{kept} descriptors are kept");
    client.ask(STATUS);
    assert_eq!(open(), before);
}
