//! Invalid names, in every operation that takes a name.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use testing::each_runtime;
use vmm::fuse::ROOT;
use vmm::fuse::wire::opcode;

use super::scene::{Back, IN, Scene, readable, request, then, writable};

/// What is no name of an entry, and its answer.
fn no_names() -> Vec<(&'static str, Vec<u8>, i32)> {
    let long = |len| [vec![b'x'; len], vec![0]].concat();
    vec![
        ("without NUL", b"name".to_vec(), libc::EINVAL),
        ("empty", b"\0".to_vec(), libc::EINVAL),
        ("nothing at all", Vec::new(), libc::EINVAL),
        (".", b".\0".to_vec(), libc::EINVAL),
        ("..", b"..\0".to_vec(), libc::EINVAL),
        ("with a slash", b"dir/file\0".to_vec(), libc::EINVAL),
        ("a slash", b"/\0".to_vec(), libc::EINVAL),
        ("absolute", b"/etc\0".to_vec(), libc::EINVAL),
        ("up and away", b"../outside\0".to_vec(), libc::EINVAL),
        ("a slash at the end", b"dir/\0".to_vec(), libc::EINVAL),
        ("256 bytes", long(256), libc::ENAMETOOLONG),
        ("64 KiB", long(64 << 10), libc::ENAMETOOLONG),
        (
            "64 KiB without NUL",
            vec![b'x'; 64 << 10],
            libc::ENAMETOOLONG,
        ),
    ]
}

/// The operations with names: the arguments before the name, and those behind it.
fn operations() -> Vec<(&'static str, u32, Vec<u8>, &'static [u8])> {
    let zeros = |len| vec![0; len];
    let root = || ROOT.to_le_bytes().to_vec();
    let before = |name: &'static [u8]| [root(), name.to_vec()].concat();
    let before_wide = |name: &'static [u8]| [root(), zeros(8), name.to_vec()].concat();
    vec![
        ("LOOKUP", opcode::LOOKUP, zeros(0), b""),
        ("MKDIR", opcode::MKDIR, zeros(8), b""),
        (
            "MKNOD",
            opcode::MKNOD,
            [&0o100_644_u32.to_le_bytes()[..], &[0; 12]].concat(),
            b"",
        ),
        ("UNLINK", opcode::UNLINK, zeros(0), b""),
        ("RMDIR", opcode::RMDIR, zeros(0), b""),
        ("SYMLINK", opcode::SYMLINK, zeros(0), b"target\0"),
        ("CREATE", opcode::CREATE, zeros(16), b""),
        ("LINK", opcode::LINK, root(), b""),
        ("RENAME from", opcode::RENAME, root(), b"new\0"),
        ("RENAME to", opcode::RENAME, before(b"file\0"), b""),
        ("RENAME2 from", opcode::RENAME2, before_wide(b""), b"new\0"),
        ("RENAME2 to", opcode::RENAME2, before_wide(b"file\0"), b""),
    ]
}

#[each_runtime]
fn malformed_name_reaches_nothing_outside(runtime: &str) {
    let mut scene = Scene::new(runtime);
    let outside = scene.server.share().join("../outside");
    std::fs::write(&outside, "outside").unwrap();
    let mut kinds = 0;
    for (operation, number, before, behind) in operations() {
        for (name, bytes, errno) in no_names() {
            // What follows the name is taken for its end where that is missing.
            let unended = !bytes.contains(&0);
            if unended && !behind.is_empty() {
                continue;
            }
            // LOOKUP of these two is how a guest's file handles are opened.
            let handle = number == opcode::LOOKUP && matches!(name, "." | "..");
            let case = format!("{operation}, {name}");
            let args = [&before[..], &bytes, behind].concat();
            let back = scene.request(&request(number, ROOT, &args));
            if handle {
                assert!(matches!(back, Back::Reply(_)), "{case}: {back:?}");
            } else {
                // What has no end is too long, or none: more than names may follow some of them.
                let endless = unended && back == Back::Errno(libc::EINVAL);
                assert!(endless || back == Back::Errno(errno), "{case}: {back:?}");
            }
            kinds += 1;
        }
    }
    // Targets of symbolic links may say anything but nothing, within what a path may be.
    for (name, target, errno) in [
        ("empty", b"\0".to_vec(), libc::ENOENT),
        ("without NUL", b"x".to_vec(), libc::EINVAL),
        (
            "4,096 bytes",
            [vec![b'x'; 4096], vec![0]].concat(),
            libc::ENAMETOOLONG,
        ),
        (
            "64 KiB",
            [vec![b'x'; 64 << 10], vec![0]].concat(),
            libc::ENAMETOOLONG,
        ),
    ] {
        let args = [&b"link\0"[..], &target].concat();
        let back = scene.request(&request(opcode::SYMLINK, ROOT, &args));
        assert_eq!(back, Back::Errno(errno), "a target, {name}");
        kinds += 1;
    }
    for (name, number, args, errno) in [
        (
            "of 256 bytes",
            opcode::GETXATTR,
            [&[0; 8][..], &[b'x'; 256], &[0]].concat(),
            libc::ERANGE,
        ),
        ("empty", opcode::GETXATTR, vec![0; 9], libc::ERANGE),
        (
            "without NUL",
            opcode::GETXATTR,
            [&[0; 8][..], b"user.x"].concat(),
            libc::EINVAL,
        ),
        (
            "of 64 KiB",
            opcode::REMOVEXATTR,
            vec![b'x'; 64 << 10],
            libc::ERANGE,
        ),
        ("empty", opcode::REMOVEXATTR, vec![0], libc::ERANGE),
        ("empty", opcode::SETXATTR, vec![0; 17], libc::ERANGE),
    ] {
        let back = scene.request(&request(number, ROOT, &args));
        assert_eq!(
            back,
            Back::Errno(errno),
            "an attribute's name, {name}, {number}"
        );
        kinds += 1;
    }
    assert!(kinds > 150, "{kinds}");
    a_link_out_of_the_share_is_not_followed(&mut scene);
    scene.is_well("names");
    assert_eq!(std::fs::read(&outside).unwrap(), b"outside");
    let mut left: Vec<_> = std::fs::read_dir(scene.server.share())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(
        left,
        ["dir", "file", "link"],
        "nothing was made, nothing is gone"
    );
}

/// A symbolic link is an inode of its own: nothing opens what it points to.
fn a_link_out_of_the_share_is_not_followed(scene: &mut Scene) {
    let link = scene.fs.symlink(ROOT, c"link", c"../outside").unwrap();
    let opened = scene.fs.open(link.nodeid, libc::O_RDONLY);
    assert_eq!(opened.unwrap_err().errno(), Some(libc::ELOOP));
    let below = scene.fs.lookup(link.nodeid, c"file");
    assert_eq!(below.unwrap_err().errno(), Some(libc::ENOTDIR));
    let made = scene.fs.create(ROOT, c"link", 0o644);
    assert_eq!(made.unwrap_err().errno(), Some(libc::ELOOP));
}

/// The guest changes a name while it is read. What was checked is what is used: each byte is read
/// once. Every answer is that of one of the two names, or of a mixture that is a name.
#[each_runtime]
fn name_changed_while_read_reaches_nothing_outside(runtime: &str) {
    let mut scene = Scene::new(runtime);
    let outside = scene.server.share().join("../outside");
    std::fs::write(&outside, "outside").unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&outside).unwrap());
    let (good, bad) = (b"aaaoutside\0", b"../outside\0");
    let stop = Arc::new(AtomicBool::new(false));
    let memory = scene.memory();
    let at = scene.request.offset(IN as u64);
    let flip = {
        let (stop, memory) = (Arc::clone(&stop), memory.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                memory.write(at, good).unwrap();
                memory.write(at, bad).unwrap();
            }
        })
    };
    let bytes = request(opcode::LOOKUP, ROOT, good);
    memory.write(scene.request, &bytes).unwrap();
    let (r, w) = (
        readable(scene.request, bytes.len() as u32),
        writable(scene.reply, 0x1000),
    );
    scene.write(&[then(r, 1), w]);
    let mut seen = [0; 2];
    for _ in 0..3000 {
        let head = scene.own[0];
        match scene.push(head) {
            Back::Errno(libc::ENOENT) => seen[0] += 1,
            Back::Errno(libc::EINVAL) => seen[1] += 1,
            back => {
                let reply = memory.read_vec(scene.reply, 256).unwrap();
                let found = reply.windows(8).any(|eight| eight == inode.to_ne_bytes());
                panic!("{back:?}, found outside: {found}");
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    flip.join().unwrap();
    assert!(seen[0] + seen[1] == 3000, "{seen:?}");
    // The length too: either there is no such name, or the header lies.
    let stop = Arc::new(AtomicBool::new(false));
    let (right, wrong) = ((bytes.len() as u32).to_le_bytes(), u32::MAX.to_le_bytes());
    let start = scene.request;
    let flip = {
        let (stop, memory) = (Arc::clone(&stop), memory.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                memory.write(start, &right).unwrap();
                memory.write(start, &wrong).unwrap();
            }
        })
    };
    for _ in 0..3000 {
        let head = scene.own[0];
        let back = scene.push(head);
        assert!(
            matches!(back, Back::Errno(libc::ENOENT | libc::EINVAL)),
            "{back:?}"
        );
    }
    stop.store(true, Ordering::Relaxed);
    flip.join().unwrap();
    scene.is_well("names that change");
}
