//! RAFS images, served by the library's own service to a client that speaks as a guest does.

mod image;
mod mounted;
mod server;
mod tree;

use std::fs;
use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ringfsd::error_chain;
use ringfsd::fs::passthrough::{self, Passthrough};
use ringfsd::fs::rafs::{Places, Prefetch, Rafs, RafsError, RafsOptions};
use ringfsd::fs::vfs::{MountPoint, Vfs, VfsOptions};
use ringfsd::fs::{Caller, FileSystem, NodeId, Usage};
use ringfsd::io::{Choice, probe};
use ringfsd::service::{Device, Exit, Listener, Service, ServiceOptions, SessionOptions, Stop};
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

use self::image::{Image, LARGE, damage, everything};
use self::tree::{compare, read, try_read};

fn open(image: &Image) -> Result<Rafs, RafsError> {
    open_with(image, Prefetch::None)
}

fn open_with(image: &Image, prefetch: Prefetch) -> Result<Rafs, RafsError> {
    let places = Places {
        bootstrap: image.bootstrap(),
        blobs: image.blobs(),
        cache: image.cache(),
    };
    Rafs::open(&RafsOptions {
        reached: places.clone(),
        named: places,
        prefetch,
    })
}

/// Serves an image to `guest`.
fn serve(rafs: Rafs, runtime: Choice, guest: impl FnOnce(&mut Client<Session>)) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listener = Listener::bind(&socket).unwrap();
    let options = ServiceOptions {
        device: Device {
            tag: None,
            request_queues: NonZeroU16::new(2).unwrap(),
            dax_window: 0,
            dax_fs_map: false,
        },
        workers: NonZeroUsize::new(2).unwrap(),
        runtime,
        poll: Duration::ZERO,
        session: SessionOptions::default(),
        once: true,
    };
    let mut service = Service::new(Arc::new(rafs), options).unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (never, _keep) = std::io::pipe().unwrap();
            let leave = AtomicBool::new(false);
            let stop = Stop {
                asked: never.as_fd(),
                leave: &leave,
            };
            service.run(&listener, stop).unwrap()
        });
        let stream = UnixStream::connect(&socket).unwrap();
        let session = Profile::Qemu.connect(stream, &Options::default()).unwrap();
        let mut client = Client::new(session);
        client.init().unwrap();
        guest(&mut client);
        drop(client);
        assert_eq!(server.join().unwrap(), Exit::Ended);
    });
}

fn engines() -> Vec<Choice> {
    match probe() {
        Ok(()) => vec![Choice::Tokio, Choice::Uring],
        Err(reason) => {
            println!("SKIPPED in part: {reason}");
            vec![Choice::Tokio]
        }
    }
}

/// Compares an image with its source: twice with an empty cache, for what is read from the blob and
/// then from the cache, and once more with the cache that this has left.
fn is_the_same(arguments: &[&str]) {
    let image = Image::of(everything, arguments);
    for engine in engines() {
        for emptied in [true, false] {
            if emptied {
                fs::remove_dir_all(image.cache()).unwrap();
                fs::create_dir(image.cache()).unwrap();
            }
            serve(open(&image).unwrap(), engine, |guest| {
                for _ in 0..2 {
                    let compared = compare(guest, &image.source());
                    assert!(compared.inodes > 2000, "{compared:?}");
                    assert!(compared.bytes > 10 << 20, "{compared:?}");
                }
            });
        }
    }
}

#[test]
fn version_6_image_is_the_directory_it_was_made_of() {
    is_the_same(&["--version", "6", "--compressor", "zstd"]);
}

#[test]
fn version_5_image_is_the_directory_it_was_made_of() {
    is_the_same(&["--version", "5", "--compressor", "lz4_block"]);
}

#[test]
fn uncompressed_image_of_small_chunks_is_the_directory_it_was_made_of() {
    is_the_same(&["--compressor", "none", "--chunk-size", "4096"]);
}

#[test]
fn image_without_digests_in_the_blob_is_the_directory_it_was_made_of() {
    is_the_same(&["--compressor", "gzip", "--no-digests"]);
}

fn one_large(dir: &std::path::Path) {
    fs::write(dir.join("large"), testing::pattern(LARGE, 3)).unwrap();
}

/// Each kind of image that a test of damage looks at.
const KINDS: [&[&str]; 4] = [
    &["--version", "6", "--compressor", "none"],
    &["--version", "6", "--compressor", "zstd"],
    &["--version", "6", "--compressor", "none", "--no-digests"],
    &["--version", "5", "--compressor", "none"],
];

/// Reads the large file of `image`: right, or an error.
fn read_large(image: &Image) -> Result<(), i32> {
    let mut result = Ok(());
    let expected = fs::read(image.source().join("large")).unwrap();
    serve(open(image).unwrap(), Choice::Tokio, |guest| {
        let file = guest.lookup(ROOT, c"large").unwrap();
        for _ in 0..3 {
            let read = try_read(guest, file.nodeid);
            if let Ok(bytes) = &read {
                assert!(*bytes == expected, "wrong bytes");
            }
            result = result.and(read.map(drop));
        }
        // The session goes on, and so does what isn't damaged.
        guest.getattr(ROOT).unwrap();
    });
    result
}

#[test]
fn damaged_blob_is_an_error_and_never_wrong_bytes() {
    for kind in KINDS {
        let image = Image::of(one_large, kind);
        // The data come first in a blob.
        damage(&image.blob(), 5000..LARGE as u64, 1 << 20);
        assert_eq!(read_large(&image), Err(libc::EIO), "{kind:?}");
    }
}

#[test]
fn truncated_blob_is_an_error_and_never_wrong_bytes() {
    for kind in KINDS {
        let image = Image::of(one_large, kind);
        let blob = fs::OpenOptions::new()
            .write(true)
            .open(image.blob())
            .unwrap();
        let cut = LARGE as u64 / 2;
        blob.set_len(cut).unwrap();
        // Version 6 has tables at the end of the blob.
        let result = match open(&image) {
            Ok(_) => read_large(&image),
            Err(RafsError::Blobs { .. }) => Err(libc::EIO),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(result, Err(libc::EIO), "{kind:?}");
    }
}

#[test]
fn damaged_cache_is_read_again_from_the_blob() {
    for kind in KINDS {
        let image = Image::of(one_large, kind);
        assert_eq!(read_large(&image), Ok(()));
        damage(&image.cached(), 5000..LARGE as u64, 1 << 20);
        let result = read_large(&image);
        if kind.contains(&"--no-digests") {
            // The storage crate can't tell, and doesn't read again.
            assert_eq!(result, Err(libc::EIO), "{kind:?}");
        } else {
            assert_eq!(result, Ok(()), "{kind:?}");
        }
    }
}

#[test]
fn cache_that_is_truncated_while_it_is_used_is_an_error() {
    let image = Image::of(one_large, &[]);
    serve(open(&image).unwrap(), Choice::Tokio, |guest| {
        let file = guest.lookup(ROOT, c"large").unwrap();
        let expected = fs::read(image.source().join("large")).unwrap();
        // Until every part is read from the cache file.
        for _ in 0..3 {
            assert!(read(guest, file.nodeid) == expected);
        }
        let cached = fs::OpenOptions::new()
            .write(true)
            .open(image.cached())
            .unwrap();
        cached.set_len(1 << 20).unwrap();
        match try_read(guest, file.nodeid) {
            Ok(bytes) => assert!(bytes == expected, "wrong bytes"),
            Err(errno) => assert_eq!(errno, libc::EIO),
        }
    });
}

#[test]
fn missing_blob_is_refused_with_its_directory() {
    for kind in KINDS {
        let image = Image::of(one_large, kind);
        fs::remove_file(image.blob()).unwrap();
        let error = open(&image).unwrap_err();
        let text = error_chain::one_line(&error);
        assert!(matches!(error, RafsError::Blobs { .. }), "{text}");
        assert!(text.contains(image.blobs().to_str().unwrap()), "{text}");
    }
}

#[test]
fn what_is_no_bootstrap_is_refused_with_its_name() {
    let image = Image::of(one_large, &[]);
    let whole = fs::read(image.bootstrap()).unwrap();
    let zeros = vec![0; whole.len()];
    for bytes in [
        &[][..],
        b"text",
        &whole[..whole.len() / 2],
        &whole[..5000],
        &zeros,
    ] {
        fs::write(image.bootstrap(), bytes).unwrap();
        let error = open(&image).unwrap_err();
        let text = error_chain::one_line(&error);
        assert!(matches!(error, RafsError::Bootstrap { .. }), "{text}");
        assert!(text.contains(image.bootstrap().to_str().unwrap()), "{text}");
    }
    fs::remove_file(image.bootstrap()).unwrap();
    assert!(matches!(open(&image), Err(RafsError::Copy { .. })));
    assert_eq!(fs::read_dir(image.cache()).unwrap().count(), 0);
}

fn small_tree(dir: &std::path::Path) {
    fs::create_dir_all(dir.join("a/b")).unwrap();
    fs::write(dir.join("a/b/file"), "text").unwrap();
    fs::write(dir.join("a/other"), testing::pattern(9000, 1)).unwrap();
    std::os::unix::fs::symlink("a", dir.join("link")).unwrap();
}

#[test]
fn any_damaged_byte_of_a_bootstrap_is_refused_or_served_without_harm() {
    for version in ["5", "6"] {
        let image = Image::of(small_tree, &["--version", version]);
        let whole = fs::read(image.bootstrap()).unwrap();
        let mut refused = 0;
        // What isn't zero means something.
        let meaningful: Vec<_> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
        let step = (meaningful.len() / 200).max(1);
        for at in meaningful.iter().copied().step_by(step) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            fs::write(image.bootstrap(), bytes).unwrap();
            match open(&image) {
                Ok(rafs) => serve(rafs, Choice::Tokio, |guest| {
                    walk(guest, ROOT, 0);
                }),
                Err(_) => refused += 1,
            }
            fs::remove_dir_all(image.cache()).unwrap();
            fs::create_dir(image.cache()).unwrap();
        }
        assert!(refused > 10, "version {version}: {refused} refused");
    }
}

/// Uses everything below a directory; whatever fails, fails with an errno.
fn walk(guest: &mut Client<Session>, node: u64, depth: usize) {
    assert!(depth < 10, "the tree has no end");
    let Ok(handle) = guest.opendir(node) else {
        return;
    };
    for listed in guest.readdirplus_all(node, handle).unwrap_or_default() {
        if listed.node.nodeid == 0 {
            continue;
        }
        let child = listed.node.nodeid;
        let _ = guest.getattr(child);
        let _ = guest.listxattr(child);
        let _ = guest.readlink(child);
        match listed.entry.kind {
            4 => walk(guest, child, depth + 1),
            8 if listed.node.attr.size < 1 << 20 => drop(try_read(guest, child)),
            _ => {}
        }
    }
}

#[test]
fn nothing_can_be_changed_and_numbers_that_no_inode_has_are_stale() {
    let image = Image::of(small_tree, &[]);
    serve(open(&image).unwrap(), Choice::Tokio, |guest| {
        let errno = |result: Result<_, vmm::fuse::FuseError>| result.unwrap_err().errno();
        let dir = guest.lookup(ROOT, c"a").unwrap().nodeid;
        let file = guest.lookup(dir, c"other").unwrap().nodeid;
        assert_eq!(errno(guest.unlink(dir, c"other")), Some(libc::EROFS));
        assert_eq!(errno(guest.rmdir(dir, c"b")), Some(libc::EROFS));
        let created = guest.create(dir, c"new", 0o600).map(drop);
        assert_eq!(errno(created), Some(libc::EROFS));
        assert_eq!(errno(guest.chmod(file, 0).map(drop)), Some(libc::EROFS));
        let opened = guest.open(file, libc::O_RDWR).map(drop);
        assert_eq!(errno(opened), Some(libc::EROFS));
        let missing = guest.lookup(dir, c"missing").map(drop);
        assert_eq!(errno(missing), Some(libc::ENOENT));
        for node in [2, 3, file + 1, 127, u64::MAX, 1 << 40] {
            let stale = guest.getattr(node).map(drop);
            assert_eq!(errno(stale), Some(libc::ESTALE), "{node}");
        }
        // A guest that has forgotten an inode finds it by its number.
        guest.forget(file, 1).unwrap();
        assert_eq!(guest.lookup(file, c".").unwrap().nodeid, file);
        assert_eq!(guest.lookup(dir, c"..").unwrap().nodeid, ROOT);
        assert_eq!(guest.lookup(ROOT, c"..").unwrap().nodeid, ROOT);
    });
}

#[test]
fn what_is_not_recorded_of_an_image_is_reported_as_unlisted() {
    let image = Image::of(one_large, &[]);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let vfs = Vfs::new(VfsOptions::default());
    let point = |path: &str| MountPoint::parse(path.as_ref()).unwrap();
    let plain = Passthrough::new(dir.path(), passthrough::Options::default()).unwrap();
    vfs.mount(&point("/plain"), Arc::new(plain)).unwrap();
    vfs.mount(&point("/image"), Arc::new(open(&image).unwrap()))
        .unwrap();
    vfs.prepare_thread().unwrap();
    let caller = Caller::default();
    let find = |parent, name| vfs.lookup(&caller, parent, name).unwrap().node;
    let plain = find(NodeId::ROOT, c"plain");
    find(plain, c"file");
    let of_image = find(find(NodeId::ROOT, c"image"), c"large");

    let inspect = vfs.inspect().unwrap();
    assert_eq!(inspect.unlisted(), [b"/image".to_vec()]);
    let inodes = inspect.inodes(0, 100).entries;
    let paths: Vec<_> = inodes.into_iter().filter_map(|inode| inode.path).collect();
    assert_eq!(paths, [b"/plain".to_vec(), b"/plain/file".to_vec()]);
    let known = inspect.inode(of_image).unwrap();
    assert_eq!((known.node, known.kind), (of_image, libc::S_IFREG));
    assert_eq!(inspect.path(of_image), None);
    // The sum is that of the directory, which alone counts.
    let by_mount = vfs.usage_by_mount();
    assert_eq!(by_mount[1].mount, "/image");
    assert_eq!(by_mount[1].usage, Usage::default());
    assert_eq!(vfs.usage(), by_mount[0].usage);
    assert!(vfs.usage().inodes.unwrap() >= 1);
    // Files that have been read stay open until they are dropped.
    let opened = vfs.open(&caller, of_image, 0).unwrap();
    vfs.release(of_image, opened.handle).unwrap();
    assert_eq!(inspect.drop_caches().closed_files, 1);
    assert!(vfs.open(&caller, of_image, 0).is_ok());
}
