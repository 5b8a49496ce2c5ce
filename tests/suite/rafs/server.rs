//! Images served by the program, with its sandbox and its filter of system calls.

use std::fs;

use testing::{Server, command};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

use super::image::{Image, LARGE, damage, everything};
use super::one_large;
use super::tree::{compare, try_read};

pub(super) const LISTENING: &str = "Waiting for vhost-user socket connection";

/// Starts a server of an image that ends if it makes a system call which isn't allowed.
fn start(image: &Image, arguments: &[&str]) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let mut command = command();
    command
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--rafs")
        .arg(image.bootstrap())
        .arg("--blobs")
        .arg(image.blobs())
        .args(["--log-level", "info", "--seccomp", "trap"])
        .args(arguments);
    let mut server = Server::spawn(command, dir);
    server.wait_for(LISTENING);
    server
}

fn with_cache(image: &Image, arguments: &[&str]) -> Server {
    let cache = image.cache();
    let cache = ["--cache-dir", cache.to_str().unwrap()];
    start(image, &[&cache, arguments].concat())
}

#[test]
fn image_is_served_from_the_sandbox() {
    for arguments in [
        &["--version", "6"][..],
        &["--version", "5"],
        &["--no-digests"],
    ] {
        let image = Image::of(everything, arguments);
        // The second server finds the cache of the first one.
        for (sandbox, runtime) in [("namespace", "tokio"), ("none", "auto")] {
            let arguments = ["--sandbox", sandbox, "--runtime", runtime];
            let mut server = with_cache(&image, &arguments);
            let mut guest = server.session(Profile::Qemu, &Options::default());
            guest.init().unwrap();
            for _ in 0..2 {
                compare(&mut guest, &image.source());
            }
            drop(guest);
            server.signal(rustix::process::Signal::TERM);
            assert!(server.wait().success());
        }
    }
}

#[test]
fn attributes_are_hidden_if_the_guest_is_not_to_have_them() {
    let image = Image::of(everything, &[]);
    for (arguments, found) in [(&["--no-xattr"][..], Err(libc::ENOSYS)), (&[], Ok(1000))] {
        let server = with_cache(&image, arguments);
        let mut guest = server.session(Profile::Qemu, &Options::default());
        let small = guest.lookup(ROOT, c"small").unwrap().nodeid;
        let value = guest.getxattr(small, c"user.long");
        let len = value.map(|value| value.len());
        assert_eq!(len.map_err(|error| error.errno().unwrap()), found);
    }
}

#[test]
fn two_servers_share_a_cache() {
    let image = Image::of(everything, &["--chunk-size", "65536"]);
    let mut servers = [with_cache(&image, &[]), with_cache(&image, &[])];
    std::thread::scope(|scope| {
        for server in &mut servers {
            let image = &image;
            scope.spawn(move || {
                let mut guest = server.session(Profile::Qemu, &Options::default());
                guest.init().unwrap();
                compare(&mut guest, &image.source());
                compare(&mut guest, &image.source());
            });
        }
    });
}

#[test]
fn prefetch_fills_the_cache_and_says_so() {
    let image = Image::of(everything, &[]);
    let mut server = with_cache(&image, &["--rafs-prefetch", "all"]);
    let done = server.wait_for("prefetch: done");
    assert!(done.contains("10 MiB"), "{done}");
    assert!(
        server
            .said()
            .iter()
            .any(|line| line.contains("prefetch: 20"))
    );
    // What has been read is all there without the blob.
    let blob = fs::OpenOptions::new()
        .write(true)
        .open(image.blob())
        .unwrap();
    blob.set_len(0).unwrap();
    let mut guest = server.session(Profile::Qemu, &Options::default());
    guest.init().unwrap();
    compare(&mut guest, &image.source());
}

#[test]
fn image_is_the_lowest_layer_of_an_overlay() {
    if !testing::is_root() {
        return;
    }
    for version in ["5", "6"] {
        let image = Image::of(everything, &["--version", version]);
        let layers = image.cache().join("layers");
        let (upper, work) = (layers.join("upper"), layers.join("work"));
        fs::create_dir_all(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let overlay = format!(
            "upper={},work={},xattr=user",
            upper.display(),
            work.display()
        );
        let mut server = with_cache(&image, &["--overlay", &overlay]);
        let mut guest = server.session(Profile::Qemu, &Options::default());
        guest.init().unwrap();
        // A changed file is copied to the upper layer first, with all its bytes.
        let large = guest.lookup(ROOT, c"large").unwrap().nodeid;
        let handle = guest.open(large, libc::O_RDWR).unwrap();
        guest.write(large, handle, 1_500_000, b"changed").unwrap();
        guest.release(large, handle).unwrap();
        let mut expected = fs::read(image.source().join("large")).unwrap();
        expected[1_500_000..1_500_007].copy_from_slice(b"changed");
        assert!(try_read(&mut guest, large).unwrap() == expected);
        assert!(fs::read(upper.join("large")).unwrap() == expected);
        // A name of the image that is removed is gone, and what is below a directory stays.
        guest.unlink(ROOT, c"text").unwrap();
        let gone = guest.lookup(ROOT, c"text").unwrap_err();
        assert_eq!(gone.errno(), Some(libc::ENOENT));
        let many = guest.lookup(ROOT, c"many").unwrap().nodeid;
        let (new, handle) = guest.create(many, c"new", 0o600).unwrap();
        guest.write(new.nodeid, handle, 0, b"new").unwrap();
        guest.release(new.nodeid, handle).unwrap();
        let listing = guest.opendir(many).unwrap();
        let names = guest.readdir_all(many, listing).unwrap().len();
        assert_eq!(names, 2000 + 1 + 2);
        guest.releasedir(many, listing).unwrap();
        assert_eq!(fs::read_dir(upper.join("many")).unwrap().count(), 1);
        // What isn't changed is still the image's.
        let same = guest.lookup(ROOT, c"same").unwrap().nodeid;
        let bytes = fs::read(image.source().join("same")).unwrap();
        assert!(try_read(&mut guest, same).unwrap() == bytes);
        assert!(!upper.join("same").exists());
        drop(guest);
        server.signal(rustix::process::Signal::TERM);
        assert!(server.wait().success());
    }
}

#[test]
fn damaged_blob_is_an_error_in_the_log() {
    let image = Image::of(one_large, &["--compressor", "none"]);
    damage(&image.blob(), 5000..LARGE as u64, 1 << 20);
    let mut server = start(&image, &[]);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    guest.init().unwrap();
    let file = guest.lookup(ROOT, c"large").unwrap();
    assert_eq!(try_read(&mut guest, file.nodeid), Err(libc::EIO));
    let line = server.wait_for("can't be read");
    let id = image
        .blob()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    assert!(line.contains("ERROR") && line.contains(&id), "{line}");
}

#[test]
fn temporary_cache_is_private_and_removed_at_the_end() {
    let image = Image::of(one_large, &[]);
    let temporary = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut command = command();
    command
        .env("TMPDIR", temporary.path())
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--rafs")
        .arg(image.bootstrap())
        .arg("--blobs")
        .arg(image.blobs())
        .args(["--log-level", "info"]);
    let mut server = Server::spawn(command, dir);
    server.wait_for(LISTENING);
    let made: Vec<_> = fs::read_dir(temporary.path()).unwrap().collect();
    assert_eq!(made.len(), 1);
    let made = made[0].as_ref().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&made.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    server.signal(rustix::process::Signal::TERM);
    assert!(server.wait().success());
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
}

#[test]
fn damaged_bootstrap_is_refused_at_the_start() {
    let image = Image::of(one_large, &[]);
    fs::write(image.bootstrap(), "damaged").unwrap();
    let bootstrap = image.bootstrap();
    let socket = image.cache().join("socket");
    let arguments = [
        "--socket",
        socket.to_str().unwrap(),
        "--rafs",
        bootstrap.to_str().unwrap(),
        "--blobs",
        "/",
    ];
    let output = testing::output(&arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("get the image again"), "{said}");
    assert!(said.contains(bootstrap.to_str().unwrap()), "{said}");
}
