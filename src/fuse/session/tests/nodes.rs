//! Tests of names, attributes, directories, opening and closing.

use zerocopy::{FromBytes, IntoBytes};

use super::{FH, ROOM, lookup};
use crate::fuse::SessionOptions;
use crate::fuse::abi::{self, InitFlags, Opcode};
use crate::fuse::testing::{Ending, Guest, attributes, init_of, on_root, request};

fn readdir(plus: bool, offset: u64, size: u32) -> Vec<u8> {
    let opcode = if plus {
        Opcode::Readdirplus
    } else {
        Opcode::Readdir
    };
    let args = abi::ReadIn {
        fh: FH,
        offset,
        size,
        ..Default::default()
    };
    on_root(opcode, &[args.as_bytes()])
}

#[test]
fn lookup_replies_with_entry() {
    let guest = Guest::ready();
    guest.fs().put(c"name");
    let entry: abi::EntryOut = guest.serve(lookup(b"name"), ROOM).structure();
    let expected = abi::EntryOut {
        nodeid: 100,
        generation: 3,
        entry_valid: 0,
        entry_valid_nsec: 250,
        attr_valid: 1,
        attr_valid_nsec: 500_000_000,
        attr: abi::Attr {
            ino: 100,
            size: 2,
            blocks: 3,
            atime: (-4i64).cast_unsigned(),
            mtime: 5,
            ctime: 6,
            atimensec: 999_999_999,
            mtimensec: 999_999_999,
            ctimensec: 999_999_999,
            mode: 0o100_644,
            nlink: 7,
            uid: 8,
            gid: 9,
            rdev: 10,
            blksize: 4096,
            flags: 0,
        },
    };
    assert_eq!(entry, expected);
    assert_eq!(guest.serve(lookup(b"other"), ROOM).errno(), libc::ENOENT);
}

#[test]
fn forget_has_no_reply() {
    let guest = Guest::ready();
    guest.fs().put(c"name");
    for _ in 0..5 {
        guest.serve(lookup(b"name"), ROOM);
    }
    let forget = request(2, 100, &[abi::ForgetIn { nlookup: 2 }.as_bytes()]);
    assert_eq!(guest.serve(forget, 0), Ending::Nothing);
    assert_eq!(guest.fs().lookups(100), 3);
    let one = |nodeid| abi::ForgetOne { nodeid, nlookup: 1 };
    let ones = [one(100), one(0), one(5), one(100)];
    let batch = abi::BatchForgetIn { count: 4, dummy: 0 };
    let batch = on_root(Opcode::BatchForget, &[batch.as_bytes(), ones.as_bytes()]);
    assert_eq!(guest.serve(batch, 0), Ending::Nothing);
    assert_eq!(guest.fs().lookups(100), 1);
    let lying = abi::BatchForgetIn { count: 5, dummy: 0 };
    let lying = on_root(Opcode::BatchForget, &[lying.as_bytes(), ones.as_bytes()]);
    assert_eq!(guest.serve(lying, ROOM), Ending::Nothing);
    assert_eq!(guest.fs().lookups(100), 1);
    assert_eq!(guest.session.counters().malformed(), 1);
}

#[test]
fn getattr_passes_caller_and_handle() {
    let guest = Guest::ready();
    let getattr = |getattr_flags| {
        on_root(
            Opcode::Getattr,
            &[abi::GetattrIn {
                getattr_flags,
                dummy: 0,
                fh: 7,
            }
            .as_bytes()],
        )
    };
    let reply: abi::AttrOut = guest.serve(getattr(0), ROOM).structure();
    assert_eq!((reply.attr_valid, reply.attr_valid_nsec), (1, 5));
    assert_eq!(reply.attr.ino, attributes(1).inode);
    guest.serve(getattr(1), ROOM);
    let who =
        "Caller { uid: Some(1000), gid: Some(100), pid: 42, kill_set_id: false, group: None }";
    let expected = [
        format!("getattr {who} None"),
        format!("getattr {who} Some(Handle(7))"),
    ];
    assert_eq!(guest.fs().calls(), expected);
}

#[test]
fn names_and_flags_reach_the_file_system() {
    let guest = Guest::ready();
    let new = abi::MknodIn {
        mode: 0o010_666,
        rdev: 5,
        umask: 0o22,
        padding: 0,
    };
    let rename = abi::Rename2In {
        newdir: 4,
        flags: 2,
        padding: 0,
    };
    let requests = [
        on_root(Opcode::Mknod, &[new.as_bytes(), b"fifo\0"]),
        on_root(
            Opcode::Mkdir,
            &[
                abi::MkdirIn {
                    mode: 0o777,
                    umask: 0o22,
                }
                .as_bytes(),
                b"dir\0",
            ],
        ),
        on_root(Opcode::Symlink, &[b"link\0", b"tar/get\0"]),
        on_root(
            Opcode::Link,
            &[abi::LinkIn { oldnodeid: 100 }.as_bytes(), b"hard\0"],
        ),
        on_root(Opcode::Rename2, &[rename.as_bytes(), b"a\0", b"b\0"]),
    ];
    for request in requests {
        assert_eq!(guest.serve(request, ROOM).errno(), 0);
    }
    let expected = [
        r#"mknod "fifo" NewNode { mode: 4534, umask: 18, rdev: 5, label: None }"#,
        r#"mkdir "dir" NewNode { mode: 511, umask: 18, rdev: 0, label: None }"#,
        r#"symlink "link" -> "tar/get""#,
        r#"link NodeId(100) NodeId(1) "hard""#,
        r#"rename (NodeId(1), "a") (NodeId(4), "b") 2"#,
    ];
    assert_eq!(guest.fs().calls(), expected);
}

#[test]
fn create_replies_with_entry_and_handle() {
    let guest = Guest::ready();
    let args = abi::CreateIn {
        flags: 0o2 | 0o200,
        mode: 0o644,
        umask: 0,
        open_flags: 0,
    };
    let create = on_root(Opcode::Create, &[args.as_bytes(), b"new\0"]);
    let reply = guest.serve(create.clone(), ROOM);
    let (entry, behind) = abi::EntryOut::read_from_prefix(reply.body()).unwrap();
    let opened = abi::OpenOut::read_from_bytes(behind).unwrap();
    assert_eq!(entry.nodeid, 100);
    assert_eq!((opened.fh, opened.open_flags), (FH, 0b10_1010));
    assert_eq!(guest.serve(create, ROOM).errno(), libc::EEXIST);
}

#[test]
fn record_locks_need_flush() {
    for (posix_locks, open_flags) in [(false, 0b10_1010), (true, 0b1010)] {
        let guest = Guest::with_options(SessionOptions {
            posix_locks,
            ..SessionOptions::default()
        });
        let init = init_of(7, 41, InitFlags::POSIX_LOCKS);
        assert_eq!(guest.serve(init, ROOM).errno(), 0);
        let open = on_root(Opcode::Open, &[abi::OpenIn::default().as_bytes()]);
        let opened: abi::OpenOut = guest.serve(open, ROOM).structure();
        assert_eq!(opened.open_flags, open_flags, "{posix_locks}");
    }
}

#[test]
fn files_and_directories_are_opened_and_closed() {
    let guest = Guest::ready();
    for (open, close) in [
        (Opcode::Open, Opcode::Release),
        (Opcode::Opendir, Opcode::Releasedir),
    ] {
        let opened: abi::OpenOut = guest
            .serve(on_root(open, &[abi::OpenIn::default().as_bytes()]), ROOM)
            .structure();
        assert_eq!(opened.fh, FH);
        assert_eq!(guest.fs().opened(), 1);
        let release = abi::ReleaseIn {
            fh: FH,
            ..Default::default()
        };
        assert_eq!(
            guest
                .serve(on_root(close, &[release.as_bytes()]), ROOM)
                .body(),
            b""
        );
        assert_eq!(guest.fs().opened(), 0);
    }
}

#[test]
fn readlink_replies_with_target_if_it_fits() {
    let guest = Guest::ready();
    let readlink = on_root(Opcode::Readlink, &[]);
    assert_eq!(guest.serve(readlink.clone(), 26).body(), b"over/there");
    assert_eq!(guest.serve(readlink, 25).errno(), libc::ENAMETOOLONG);
}

#[test]
fn statfs_and_lseek_reply_with_numbers() {
    let guest = Guest::ready();
    let statfs: abi::StatfsOut = guest.serve(on_root(Opcode::Statfs, &[]), ROOM).structure();
    assert_eq!(
        (statfs.st.blocks, statfs.st.bfree, statfs.st.namelen),
        (1, 2, 255)
    );
    let seek = abi::LseekIn {
        fh: FH,
        offset: 41,
        whence: 4,
        padding: 0,
    };
    let seek: abi::LseekOut = guest
        .serve(on_root(Opcode::Lseek, &[seek.as_bytes()]), ROOM)
        .structure();
    assert_eq!(seek.offset, 42);
}

#[test]
fn access_and_flush_reply_with_errno_alone() {
    let guest = Guest::ready();
    let access = |mask| {
        on_root(
            Opcode::Access,
            &[abi::AccessIn { mask, padding: 0 }.as_bytes()],
        )
    };
    assert_eq!(guest.serve(access(4), ROOM).body(), b"");
    assert_eq!(guest.serve(access(2), ROOM).errno(), libc::EACCES);
    let flush = |fh| {
        on_root(
            Opcode::Flush,
            &[abi::FlushIn {
                fh,
                ..Default::default()
            }
            .as_bytes()],
        )
    };
    assert_eq!(guest.serve(flush(FH), ROOM).body(), b"");
    assert_eq!(guest.serve(flush(8), ROOM).errno(), libc::EBADF);
}

#[test]
fn xattrs_are_set_read_listed_and_removed() {
    let guest = Guest::ready();
    let set = |flags| {
        let args = abi::SetxattrIn { size: 5, flags };
        on_root(Opcode::Setxattr, &[args.as_bytes(), b"user.a\0", b"value"])
    };
    let get = |size| {
        on_root(
            Opcode::Getxattr,
            &[abi::GetxattrIn { size, padding: 0 }.as_bytes(), b"user.a\0"],
        )
    };
    let list = |size| {
        on_root(
            Opcode::Listxattr,
            &[abi::GetxattrIn { size, padding: 0 }.as_bytes()],
        )
    };
    assert_eq!(guest.serve(get(0), ROOM).errno(), libc::ENODATA);
    assert_eq!(guest.serve(set(0), ROOM).body(), b"");
    assert_eq!(guest.serve(set(1), ROOM).errno(), libc::EEXIST);
    assert_eq!(
        guest
            .serve(get(0), ROOM)
            .structure::<abi::GetxattrOut>()
            .size,
        5
    );
    assert_eq!(guest.serve(get(5), ROOM).body(), b"value");
    assert_eq!(guest.serve(get(4), ROOM).errno(), libc::ERANGE);
    assert_eq!(guest.serve(get(100), 16 + 4).errno(), libc::ERANGE);
    assert_eq!(guest.serve(get(u32::MAX), ROOM).body(), b"value");
    assert_eq!(
        guest
            .serve(list(0), ROOM)
            .structure::<abi::GetxattrOut>()
            .size,
        7
    );
    assert_eq!(guest.serve(list(7), ROOM).body(), b"user.a\0");
    assert_eq!(guest.serve(list(6), ROOM).errno(), libc::ERANGE);
    let remove = on_root(Opcode::Removexattr, &[b"user.a\0"]);
    assert_eq!(guest.serve(remove.clone(), ROOM).body(), b"");
    assert_eq!(guest.serve(remove, ROOM).errno(), libc::ENODATA);
}

#[test]
fn readdir_replies_with_records_that_fit() {
    let guest = Guest::ready();
    for name in [c"a", c"eight888", c"z"] {
        guest.fs().put(name);
    }
    let reply = guest.serve(readdir(false, 0, 4096), ROOM);
    assert_eq!(reply.body().len(), 32 + 32 + 32);
    let (first, behind) = abi::Dirent::read_from_prefix(reply.body()).unwrap();
    assert_eq!(
        first,
        abi::Dirent {
            ino: 55,
            off: 1,
            namelen: 1,
            kind: 8
        }
    );
    assert_eq!(behind[..8], *b"a\0\0\0\0\0\0\0");
    assert_eq!(guest.serve(readdir(false, 1, 95), ROOM).body().len(), 64);
    assert_eq!(guest.serve(readdir(false, 1, 63), ROOM).body().len(), 32);
    assert_eq!(
        guest.serve(readdir(false, 0, 4096), 16 + 40).body().len(),
        32
    );
    assert_eq!(guest.serve(readdir(false, 3, 4096), ROOM).body(), b"");
    assert_eq!(
        guest.serve(readdir(false, 0, 31), ROOM).errno(),
        libc::EINVAL
    );
    assert_eq!(guest.fs().lookups(100), 0);
}

#[test]
fn readdirplus_counts_lookup_for_each_entry_returned() {
    let guest = Guest::ready();
    for name in [c"a", c"b", c"c"] {
        guest.fs().put(name);
    }
    let record = 128 + 24 + 8;
    let size = u32::try_from(2 * record + 100).unwrap();
    let reply = guest.serve(readdir(true, 0, size), ROOM);
    assert_eq!(reply.body().len(), 2 * record);
    let (entry, behind) = abi::EntryOut::read_from_prefix(reply.body()).unwrap();
    let (dirent, _) = abi::Dirent::read_from_prefix(behind).unwrap();
    assert_eq!((entry.nodeid, dirent.off), (100, 1));
    let lookups = [100, 101, 102].map(|node| guest.fs().lookups(node));
    assert_eq!(lookups, [1, 1, 0]);
}

#[test]
fn readdir_error_after_first_entry_returns_entry() {
    let guest = Guest::ready();
    guest.fs().put(c"a");
    guest.fs().put(c"bad");
    let reply = guest.serve(readdir(true, 0, 4096), ROOM);
    assert_eq!(reply.body().len(), 160);
    assert_eq!(guest.fs().lookups(100), 1);
    assert_eq!(guest.serve(readdir(true, 1, 4096), ROOM).errno(), libc::EIO);
}

#[test]
fn readdir_reply_takes_no_more_memory_than_room() {
    let guest = Guest::ready();
    guest.fs().put(c"a");
    assert_eq!(
        guest.serve(readdir(false, 0, u32::MAX), 200).body().len(),
        32
    );
    assert_eq!(
        guest
            .serve(readdir(false, 0, u32::MAX), 64 << 20)
            .body()
            .len(),
        32
    );
}
