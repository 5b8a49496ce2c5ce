//! Headers, lengths, opcodes, nodes, handles: every value that a field can have.

use testing::each_runtime;
use vmm::fuse::ROOT;
use vmm::fuse::wire::{AttrOut, EntryOut, FlushIn, OpenIn, ReadIn, ReleaseIn, WriteIn, opcode};
use zerocopy::IntoBytes;

use super::scene::{Back, IN, OUT, Scene, request};

const EINVAL: Back = Back::Errno(libc::EINVAL);

#[each_runtime]
fn malformed_header_or_number_gets_errno(runtime: &str) {
    let mut scene = Scene::new(runtime);
    let good = request(opcode::GETATTR, ROOT, &[0; 16]);
    // Cut short: a request whose number can be read gets a reply.
    for len in 1..IN {
        let back = scene.request(&good[..len]);
        let right = if len < 16 { Back::Empty } else { EINVAL };
        assert_eq!(back, right, "a header of {len} bytes");
    }
    for (name, len) in [
        ("0", 0),
        ("1", 1),
        ("less than the header", 39),
        ("a byte more than there is", 57),
        ("1 GiB", 1 << 30),
        ("4 GiB", u32::MAX),
    ] {
        let mut bytes = good.clone();
        bytes[..4].copy_from_slice(&u32::to_le_bytes(len));
        assert_eq!(scene.request(&bytes), EINVAL, "a length of {name}");
    }
    for len in [40, 41, 55] {
        let mut bytes = good.clone();
        bytes[..4].copy_from_slice(&u32::to_le_bytes(len));
        assert_eq!(scene.request(&bytes), EINVAL, "arguments cut to {len}");
    }
    for units in [3, 0x100, u16::MAX] {
        let mut bytes = good.clone();
        bytes[36..38].copy_from_slice(&units.to_le_bytes());
        assert_eq!(scene.request(&bytes), EINVAL, "extensions of {units} units");
    }
    let mkdir = request(opcode::MKDIR, ROOT, &[&[0; 8][..], b"new\0"].concat());
    for (name, at) in [("user", 24), ("group", 28)] {
        // Linux 6.12 doesn't tell who asks, unless something is created.
        let [mut asked, mut made] = [good.clone(), mkdir.clone()];
        for bytes in [&mut asked, &mut made] {
            bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        }
        let attributes = Back::Reply(size_of::<AttrOut>() as u32);
        assert_eq!(scene.request(&asked), attributes, "no {name}");
        let nobody = Back::Errno(libc::EOVERFLOW);
        assert_eq!(scene.request(&made), nobody, "for no {name}");
    }
    scene.is_well("headers");
    rooms(&mut scene);
    values(&mut scene);
    scene.is_well("numbers");
    // All of these were counted.
    drop(scene.fs);
    scene.server.wait_for("malformed requests");
}

/// Replies that don't fit get an error that does, and nothing takes effect.
fn rooms(scene: &mut Scene) {
    let create = [&2_u32.to_le_bytes()[..], &[0; 12], b"new\0"].concat();
    let entry = size_of::<EntryOut>() as u32;
    for (name, number, args, needed) in [
        ("GETATTR", opcode::GETATTR, vec![0; 16], 104),
        ("LOOKUP", opcode::LOOKUP, b"file\0".to_vec(), entry),
        ("CREATE", opcode::CREATE, create, entry + 16),
        (
            "MKDIR",
            opcode::MKDIR,
            [&[0; 8][..], b"new\0"].concat(),
            entry,
        ),
        ("SYMLINK", opcode::SYMLINK, b"new\0target\0".to_vec(), entry),
        ("OPENDIR", opcode::OPENDIR, vec![0; 8], 16),
        ("STATFS", opcode::STATFS, vec![], 80),
        (
            "GETXATTR",
            opcode::GETXATTR,
            [&[0; 8][..], b"user.x\0"].concat(),
            8,
        ),
    ] {
        let bytes = request(number, ROOT, &args);
        for room in [0, 1, OUT - 1, OUT, OUT + 1, OUT + needed - 1] {
            let back = scene.request_with_room(&bytes, room);
            let right = if room < OUT { Back::Empty } else { EINVAL };
            assert_eq!(back, right, "{name} with room for {room}");
        }
    }
    assert!(!scene.server.share().join("new").exists(), "it was made");
    // Where the guest says how much it has room for, less room is less answer.
    let directory = scene.fs.opendir(ROOT).unwrap();
    let read = ReadIn {
        fh: directory.fh,
        size: u32::MAX,
        ..ReadIn::default()
    };
    for number in [opcode::READDIR, opcode::READDIRPLUS] {
        let bytes = request(number, ROOT, read.as_bytes());
        assert_eq!(scene.request_with_room(&bytes, OUT + 8), EINVAL);
        let back = scene.request_with_room(&bytes, OUT + 500);
        assert!(matches!(back, Back::Reply(1..=500)), "{back:?}");
    }
    scene.is_well("replies that don't fit");
}

/// Numbers that no field may have.
fn values(scene: &mut Scene) {
    let (file, handle) = scene.fs.create(ROOT, c"values", 0o644).unwrap();
    let node = file.nodeid;
    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };
    let fh = handle.fh;
    let far = 1 << 63;
    let write = |offset, size: u32, data: usize| {
        let write = WriteIn {
            fh,
            offset,
            size,
            ..WriteIn::default()
        };
        [write.as_bytes(), &vec![7; data]].concat()
    };
    let setattr = |valid: u64, at: usize, value: u64| {
        let mut bytes = vec![0; 88];
        bytes[..8].copy_from_slice(&valid.to_le_bytes());
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let lock = |start, end, kind| words(&[fh, 9, start, end, kind, 0]);
    let cases: Vec<(&str, u32, Vec<u8>, i32)> = vec![
        (
            "READ beyond where files end",
            opcode::READ,
            words(&[fh, far, 1, 0, 0]),
            libc::EINVAL,
        ),
        (
            "READ over where files end",
            opcode::READ,
            words(&[fh, far - 1, 0xffff, 0, 0]),
            libc::EINVAL,
        ),
        (
            "WRITE beyond where files end",
            opcode::WRITE,
            write(far, 1, 1),
            libc::EINVAL,
        ),
        (
            "WRITE of more than there is",
            opcode::WRITE,
            write(0, 101, 100),
            libc::EINVAL,
        ),
        (
            "WRITE of 4 GiB",
            opcode::WRITE,
            write(0, u32::MAX, 100),
            libc::EINVAL,
        ),
        (
            "FALLOCATE of 2^64",
            opcode::FALLOCATE,
            words(&[fh, 1, u64::MAX, 0]),
            libc::EINVAL,
        ),
        (
            "FALLOCATE beyond",
            opcode::FALLOCATE,
            words(&[fh, far, 1, 0]),
            libc::EINVAL,
        ),
        (
            "FALLOCATE of nothing",
            opcode::FALLOCATE,
            words(&[fh, 0, 0, 0]),
            libc::EINVAL,
        ),
        (
            "FALLOCATE in a mode of all ones",
            opcode::FALLOCATE,
            words(&[fh, 0, 1, 0xffff_ffff]),
            libc::EOPNOTSUPP,
        ),
        (
            "LSEEK whence 0",
            opcode::LSEEK,
            words(&[fh, 0, 0]),
            libc::EINVAL,
        ),
        (
            "LSEEK whence 2^32 - 1",
            opcode::LSEEK,
            words(&[fh, 0, 0xffff_ffff]),
            libc::EINVAL,
        ),
        (
            "LSEEK beyond",
            opcode::LSEEK,
            words(&[fh, far, 3]),
            libc::ENXIO,
        ),
        (
            "SETATTR to 2^63 bytes",
            opcode::SETATTR,
            setattr(8, 16, far),
            libc::EINVAL,
        ),
        (
            "SETATTR to a billion nanoseconds",
            opcode::SETATTR,
            setattr(16, 56, 1_000_000_000),
            libc::EINVAL,
        ),
        (
            "SETATTR to no user",
            opcode::SETATTR,
            setattr(2, 76, 0xffff_ffff),
            libc::EINVAL,
        ),
        (
            "SETATTR to no group",
            opcode::SETATTR,
            setattr(4, 80, 0xffff_ffff),
            libc::EINVAL,
        ),
        (
            "ACCESS with a mask of 8",
            opcode::ACCESS,
            words(&[8]),
            libc::EINVAL,
        ),
        (
            "ACCESS with all ones",
            opcode::ACCESS,
            words(&[u64::MAX]),
            libc::EINVAL,
        ),
        (
            "SETXATTR with flags",
            opcode::SETXATTR,
            [&words(&[1 | 4 << 32])[..], b"user.x\0v"].concat(),
            libc::EINVAL,
        ),
        (
            "SETXATTR of 64 KiB and one",
            opcode::SETXATTR,
            [&words(&[0x10001])[..], b"user.x\0", &[0; 0x10001]].concat(),
            libc::E2BIG,
        ),
        (
            "SETXATTR of 4 GiB",
            opcode::SETXATTR,
            [&words(&[0xffff_ffff])[..], b"user.x\0v"].concat(),
            libc::E2BIG,
        ),
        (
            "SETXATTR of more than there is",
            opcode::SETXATTR,
            [&words(&[2])[..], b"user.x\0v"].concat(),
            libc::EINVAL,
        ),
        (
            "COPY_FILE_RANGE with flags",
            opcode::COPY_FILE_RANGE,
            words(&[fh, 0, node, fh, 0, 1, 1]),
            libc::EINVAL,
        ),
        (
            "COPY_FILE_RANGE from beyond",
            opcode::COPY_FILE_RANGE,
            words(&[fh, far, node, fh, 0, 1, 0]),
            libc::EINVAL,
        ),
        (
            "COPY_FILE_RANGE to node 0",
            opcode::COPY_FILE_RANGE,
            words(&[fh, 0, 0, fh, 0, 1, 0]),
            libc::EINVAL,
        ),
        (
            "RENAME2 with all flags",
            opcode::RENAME2,
            [&words(&[ROOT, 0xffff_ffff])[..], b"a\0b\0"].concat(),
            libc::EINVAL,
        ),
        (
            "RENAME to node 0",
            opcode::RENAME,
            [&words(&[0])[..], b"a\0b\0"].concat(),
            libc::EINVAL,
        ),
        (
            "LINK of node 0",
            opcode::LINK,
            [&words(&[0])[..], b"a\0"].concat(),
            libc::EINVAL,
        ),
        (
            "IOCTL of all ones",
            opcode::IOCTL,
            words(&[fh, 0xffff_ffff << 32, 0, u64::MAX]),
            libc::ENOTTY,
        ),
        (
            "a lock of an unknown kind",
            opcode::SETLK,
            lock(0, 9, 7),
            libc::EINVAL,
        ),
        (
            "a lock that ends before it starts",
            opcode::SETLK,
            lock(9, 0, 0),
            libc::EINVAL,
        ),
        (
            "a lock beyond",
            opcode::SETLK,
            lock(0, u64::MAX, 0),
            libc::EINVAL,
        ),
        (
            "a lock that was not agreed on",
            opcode::SETLK,
            lock(0, 9, 0),
            libc::ENOSYS,
        ),
        (
            "MKNOD of all types at once",
            opcode::MKNOD,
            [&words(&[0xffff_ffff, 0])[..], b"a\0"].concat(),
            libc::EINVAL,
        ),
    ];
    for (name, number, args, errno) in cases {
        assert_eq!(
            scene.request(&request(number, node, &args)),
            Back::Errno(errno),
            "{name}"
        );
    }
    // FORGETs have no answer, however wrong.
    for (name, number, args) in [
        ("a FORGET of 2^64", opcode::FORGET, words(&[u64::MAX])),
        ("a FORGET cut short", opcode::FORGET, vec![0; 3]),
        (
            "a BATCH_FORGET of 4 billion",
            opcode::BATCH_FORGET,
            words(&[0xffff_ffff]),
        ),
        (
            "a BATCH_FORGET of one more than there are",
            opcode::BATCH_FORGET,
            words(&[2, node, 0]),
        ),
        (
            "a BATCH_FORGET of everything",
            opcode::BATCH_FORGET,
            words(&[3, 0, 9, 1, u64::MAX, u64::MAX, 1]),
        ),
        ("an INTERRUPT of nothing", opcode::INTERRUPT, words(&[4711])),
    ] {
        assert_eq!(
            scene.request(&request(number, ROOT, &args)),
            Back::Empty,
            "{name}"
        );
    }
    // INTERRUPT has an answer where it can't be obeyed.
    let back = scene.request(&request(opcode::INTERRUPT, 0, &[]));
    assert_eq!(back, EINVAL, "an INTERRUPT cut short");
    scene.fs.release(node, handle).unwrap();
}

#[each_runtime]
fn unknown_opcode_or_node_gets_errno(runtime: &str) {
    let mut scene = Scene::new(runtime);
    for number in [
        0,
        7,
        19,
        37,
        40,
        41,
        48,
        49,
        54,
        55,
        63,
        64,
        127,
        128,
        255,
        256,
        4096,
        0xffff,
        1 << 16,
        1 << 31,
        u32::MAX,
    ] {
        for args in [&[][..], &[0xff; 100]] {
            let back = scene.request(&request(number, ROOT, args));
            // NOTIFY_REPLY is an answer to what was never asked.
            let right = [Back::Errno(libc::ENOSYS), Back::Empty];
            assert!(right.contains(&back), "opcode {number}: {back:?}");
        }
    }
    nodes(&mut scene);
    handles(&mut scene);
    scene.is_well("unknown things");
}

/// Every operation on a node, on nodes that there are not.
fn nodes(scene: &mut Scene) {
    let operations: [(u32, &[u8]); 20] = [
        (opcode::LOOKUP, b"file\0"),
        (opcode::GETATTR, &[0; 16]),
        (opcode::SETATTR, &[0; 88]),
        (opcode::READLINK, &[]),
        (opcode::SYMLINK, b"a\0b\0"),
        (opcode::MKNOD, b"\xa4\x81\0\0\0\0\0\0\0\0\0\0\0\0\0\0a\0"),
        (opcode::MKDIR, b"\0\0\0\0\0\0\0\0a\0"),
        (opcode::UNLINK, b"a\0"),
        (opcode::RMDIR, b"a\0"),
        (opcode::RENAME, b"\x01\0\0\0\0\0\0\0a\0b\0"),
        (opcode::LINK, b"\x01\0\0\0\0\0\0\0a\0"),
        (opcode::OPEN, &[0; 8]),
        (opcode::OPENDIR, &[0; 8]),
        (opcode::CREATE, b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0a\0"),
        (opcode::STATFS, &[]),
        (opcode::ACCESS, &[0; 8]),
        (opcode::GETXATTR, b"\0\0\0\0\0\0\0\0user.x\0"),
        (opcode::LISTXATTR, &[0; 8]),
        (opcode::REMOVEXATTR, b"user.x\0"),
        (opcode::SYNCFS, &[0; 8]),
    ];
    for (number, args) in operations {
        for (node, errno) in [
            (0, libc::EINVAL),
            (2, libc::ESTALE),
            (4711, libc::ESTALE),
            (1 << 63, libc::ESTALE),
            (u64::MAX, libc::ESTALE),
        ] {
            let back = scene.request(&request(number, node, args));
            assert_eq!(
                back,
                Back::Errno(errno),
                "opcode {number} on node {node:#x}"
            );
        }
    }
}

/// Every operation on a handle: on one that there is not, of another inode, of the other kind.
fn handles(scene: &mut Scene) {
    let (one, of_one) = scene.fs.create(ROOT, c"one", 0o644).unwrap();
    let (two, of_two) = scene.fs.create(ROOT, c"two", 0o644).unwrap();
    let directory = scene.fs.opendir(ROOT).unwrap();
    let unknown = vmm::fuse::Handle::raw(u64::MAX);
    let on_files = [
        opcode::READ,
        opcode::WRITE,
        opcode::RELEASE,
        opcode::FSYNC,
        opcode::FLUSH,
        opcode::FALLOCATE,
        opcode::LSEEK,
        opcode::IOCTL,
        opcode::COPY_FILE_RANGE,
    ];
    let on_directories = [
        opcode::READDIR,
        opcode::READDIRPLUS,
        opcode::RELEASEDIR,
        opcode::FSYNCDIR,
    ];
    let args = |number, handle: vmm::fuse::Handle| {
        let fh = handle.fh;
        let mut bytes = match number {
            opcode::RELEASE | opcode::RELEASEDIR => ReleaseIn {
                fh,
                ..ReleaseIn::default()
            }
            .as_bytes()
            .to_vec(),
            opcode::FLUSH => FlushIn {
                fh,
                ..FlushIn::default()
            }
            .as_bytes()
            .to_vec(),
            _ => [&fh.to_le_bytes()[..], &[0; 48]].concat(),
        };
        match number {
            opcode::LSEEK => bytes[16] = 3,
            // Reading flags is what an IOCTL needs a handle for.
            opcode::IOCTL => {
                bytes[12..16].copy_from_slice(&0x8008_6601_u32.to_le_bytes());
                bytes[28] = 8;
            }
            opcode::COPY_FILE_RANGE => bytes[16..24].copy_from_slice(&two.nodeid.to_le_bytes()),
            _ => {}
        }
        bytes
    };
    for number in on_files {
        for handle in [unknown, of_two, directory, vmm::fuse::Handle::raw(0)] {
            let back = scene.request(&request(number, one.nodeid, &args(number, handle)));
            assert_eq!(
                back,
                Back::Errno(libc::EBADF),
                "opcode {number} on {handle:?}"
            );
        }
    }
    for number in on_directories {
        for handle in [unknown, of_one, vmm::fuse::Handle::raw(0)] {
            let back = scene.request(&request(number, ROOT, &args(number, handle)));
            assert_eq!(
                back,
                Back::Errno(libc::EBADF),
                "opcode {number} on {handle:?}"
            );
        }
        let back = scene.request(&request(number, one.nodeid, &args(number, directory)));
        assert_eq!(back, Back::Errno(libc::EBADF), "opcode {number} of another");
    }
    // What is closed is closed.
    scene.fs.release(one.nodeid, of_one).unwrap();
    let again = scene.request(&request(
        opcode::RELEASE,
        one.nodeid,
        &args(opcode::RELEASE, of_one),
    ));
    assert_eq!(again, Back::Errno(libc::EBADF));
    // Opening asks for more than it may; what is left of it is harmless.
    let open = OpenIn {
        flags: !3,
        open_flags: u32::MAX,
    };
    let back = scene.request(&request(opcode::OPEN, one.nodeid, open.as_bytes()));
    assert!(!matches!(back, Back::Empty), "{back:?}");
}
