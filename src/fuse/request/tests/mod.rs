//! Tests of decoding: valid requests are decoded unchanged, and invalid ones are rejected.

mod extensions;
mod open_files;

use proptest::prelude::*;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::*;
use crate::fs::{NewTime, Timestamp};
use crate::fuse::abi::{self, Opcode, setattr_valid};
use crate::fuse::testing::{UNIQUE, claim_len, on_root, request, samples};
use crate::io::SyncKind;

fn fault(bytes: &[u8]) -> Fault {
    decode(bytes).expect_err("a fault").fault
}

fn errno(bytes: &[u8]) -> Errno {
    decode(bytes).expect_err("an errno").errno()
}

fn lookup(name: &[u8]) -> Vec<u8> {
    on_root(Opcode::Lookup, &[name])
}

#[test]
fn header_fields_are_decoded() {
    let bytes = request(Opcode::Lookup.number(), 99, &[b"name\0"]);
    let request = decode(&bytes).unwrap();
    assert_eq!(
        (request.unique, request.opcode, request.node),
        (UNIQUE, 1, NodeId(99))
    );
    assert_eq!(
        request.caller,
        Caller {
            uid: Some(1000),
            gid: Some(100),
            pid: 42,
            kill_set_id: false,
            group: None,
        }
    );
    assert!(matches!(request.operation, Operation::Lookup { name } if name == c"name"));
}

#[test]
fn every_served_opcode_is_decoded() {
    for (opcode, bytes) in samples() {
        let request = decode(&bytes).unwrap();
        assert_eq!(request.opcode, opcode.number());
        assert!(
            !matches!(request.operation, Operation::Unserved),
            "{opcode:?}"
        );
    }
}

#[test]
fn unserved_opcode_needs_no_arguments() {
    let served: Vec<_> = samples()
        .iter()
        .map(|(opcode, _)| opcode.number())
        .collect();
    for opcode in (0..100)
        .chain([4096, u32::MAX])
        .filter(|number| !served.contains(number))
    {
        let bytes = request(opcode, 0, &[]);
        assert!(
            matches!(decode(&bytes).unwrap().operation, Operation::Unserved),
            "{opcode}"
        );
    }
}

#[test]
fn request_truncated_at_any_length_is_refused() {
    for (opcode, bytes) in samples() {
        let needed = if opcode == Opcode::Write {
            bytes.len() - 4
        } else {
            bytes.len()
        };
        let min_len = if opcode == Opcode::Init {
            HEADER_LEN + 16
        } else {
            needed
        };
        for len in 0..needed {
            assert!(
                decode(&bytes[..len]).is_err(),
                "{opcode:?} of {len} bytes, the header full"
            );
        }
        for len in 0..min_len {
            let mut cut = bytes[..len].to_vec();
            if len >= 4 {
                claim_len(&mut cut, len);
            }
            let error = decode(&cut).expect_err("cut short");
            assert_eq!(
                error.unique,
                (len >= 16).then_some(UNIQUE),
                "{opcode:?} of {len} bytes"
            );
            assert_eq!(error.errno(), Errno::INVAL);
        }
    }
}

#[test]
fn bytes_beyond_header_length_are_ignored() {
    let mut bytes = lookup(b"name");
    bytes.push(0);
    assert_eq!(fault(&bytes), Fault::Unterminated);
    let len = bytes.len();
    claim_len(&mut bytes, len);
    assert!(decode(&bytes).is_ok());
}

#[test]
fn header_with_wrong_length_is_refused() {
    for len in [0, 1, 39, 100, 8192, 65_536, u32::MAX as usize] {
        let mut bytes = on_root(Opcode::Getattr, &[abi::GetattrIn::default().as_bytes()]);
        claim_len(&mut bytes, len);
        assert_eq!(errno(&bytes), Errno::INVAL, "{len}");
        assert!(
            bytes_wanted(&bytes[..HEADER_LEN], bytes.len() - HEADER_LEN).is_err(),
            "{len}"
        );
    }
}

#[test]
fn bytes_wanted_are_only_those_needed() {
    let wanted = |bytes: &[u8]| bytes_wanted(&bytes[..HEADER_LEN], bytes.len() - HEADER_LEN);
    let write = abi::WriteIn {
        size: 1 << 20,
        ..Default::default()
    };
    assert_eq!(
        wanted(&on_root(Opcode::Write, &[write.as_bytes(), &[0; 1 << 20]])),
        Ok(40)
    );
    assert_eq!(wanted(&lookup(b"name\0")), Ok(5));
    assert_eq!(wanted(&request(77, 1, &[&[0; 1000]])), Ok(0));
    assert!(wanted(&on_root(Opcode::Getattr, &[&[0; 1 << 20]])).unwrap() <= 128);
    assert!(wanted(&lookup(&[b'a'; 65_536])).unwrap() <= 8192);
    let unique = bytes_wanted(&lookup(b"a\0")[..20], 0).unwrap_err().unique;
    assert_eq!(unique, Some(UNIQUE));
}

#[test]
fn invalid_names_are_refused_by_all_operations() {
    let long = [[b'a'; 256].as_slice(), &[0]].concat();
    let huge = [vec![b'a'; 65_536], vec![0]].concat();
    let names: &[(&[u8], Errno)] = &[
        (b"", Errno::INVAL),
        (b"\0", Errno::INVAL),
        (b".\0", Errno::INVAL),
        (b"..\0", Errno::INVAL),
        (b"/\0", Errno::INVAL),
        (b"a/b\0", Errno::INVAL),
        (b"../x\0", Errno::INVAL),
        (b"/etc/passwd\0", Errno::INVAL),
        (b"a/\0", Errno::INVAL),
        (b"endless", Errno::INVAL),
        (&[b'a'; 8000], Errno::INVAL),
        (&long, Errno::NAMETOOLONG),
        (&huge, Errno::NAMETOOLONG),
    ];
    let mknod = abi::MknodIn::default();
    let mkdir = abi::MkdirIn::default();
    let create = abi::CreateIn::default();
    let rename = abi::RenameIn { newdir: 1 };
    let rename2 = abi::Rename2In {
        newdir: 1,
        flags: 0,
        padding: 0,
    };
    let link = abi::LinkIn { oldnodeid: 1 };
    for &(name, expected) in names {
        // LOOKUP of these serves file handles, and is tested by itself.
        let looked_up = match name {
            b".\0" | b"..\0" => b"./\0",
            name => name,
        };
        let requests = [
            lookup(looked_up),
            on_root(Opcode::Unlink, &[name]),
            on_root(Opcode::Rmdir, &[name]),
            on_root(Opcode::Mknod, &[mknod.as_bytes(), name]),
            on_root(Opcode::Mkdir, &[mkdir.as_bytes(), name]),
            on_root(Opcode::Create, &[create.as_bytes(), name]),
            on_root(Opcode::Link, &[link.as_bytes(), name]),
            on_root(Opcode::Rename, &[rename.as_bytes(), name]),
            on_root(Opcode::Rename, &[rename.as_bytes(), b"from\0", name]),
            on_root(Opcode::Rename2, &[rename2.as_bytes(), name]),
            on_root(Opcode::Rename2, &[rename2.as_bytes(), b"from\0", name]),
            on_root(Opcode::Symlink, &[name]),
        ];
        for bytes in &requests {
            assert_eq!(errno(bytes), expected, "{:?}", bytes.get(..60));
        }
    }
}

#[test]
fn names_of_any_allowed_bytes_are_accepted() {
    let longest = [[b'a'; 255].as_slice(), &[0]].concat();
    for name in [
        b"a\0".as_slice(),
        b"...\0",
        b".a\0",
        b" \0",
        b"\\\0",
        b"\xff\xfe\0",
        &longest,
    ] {
        let bytes = lookup(name);
        let Operation::Lookup { name: decoded } = decode(&bytes).unwrap().operation else {
            panic!("not a LOOKUP");
        };
        assert_eq!(decoded.to_bytes_with_nul(), name);
    }
}

#[test]
fn symlink_target_is_refused_if_empty_or_too_long() {
    let symlink = |target: &[u8]| on_root(Opcode::Symlink, &[b"name\0", target]);
    let path = |len| [vec![b'/'; len], vec![0]].concat();
    assert!(decode(&symlink(b"../../etc/passwd\0")).is_ok());
    assert!(decode(&symlink(&path(4095))).is_ok());
    assert_eq!(errno(&symlink(&path(4096))), Errno::NAMETOOLONG);
    assert_eq!(errno(&symlink(&path(65_536))), Errno::NAMETOOLONG);
    assert_eq!(errno(&symlink(b"\0")), Errno::NOENT);
    assert_eq!(errno(&symlink(b"endless")), Errno::INVAL);
}

#[test]
fn xattr_beyond_limits_is_refused() {
    let set = |size, flags, name: &[u8], value: &[u8]| {
        on_root(
            Opcode::Setxattr,
            &[abi::SetxattrIn { size, flags }.as_bytes(), name, value],
        )
    };
    let bytes = set(65_536, 1, b"user.a\0", &[7; 65_536]);
    let Operation::Setxattr { name, value, flags } = decode(&bytes).unwrap().operation else {
        panic!("not a SETXATTR");
    };
    assert_eq!(
        (name, value.len(), flags),
        (c"user.a", 65_536, XattrFlags::CREATE)
    );
    assert!(decode(&set(0, 0, b"user.a\0", b"")).is_ok());
    assert_eq!(
        errno(&set(65_537, 0, b"user.a\0", &[7; 65_537])),
        Errno::TOOBIG
    );
    assert_eq!(
        errno(&set(u32::MAX, 0, b"user.a\0", b"short")),
        Errno::TOOBIG
    );
    assert_eq!(errno(&set(6, 0, b"user.a\0", b"short")), Errno::INVAL);
    assert_eq!(errno(&set(5, 4, b"user.a\0", b"value")), Errno::INVAL);
    assert_eq!(errno(&set(5, 0, b"\0", b"value")), Errno::RANGE);
    assert_eq!(errno(&set(0, 0, b"user.a", b"")), Errno::INVAL);
    let long = [[b'a'; 256].as_slice(), &[0]].concat();
    assert_eq!(errno(&on_root(Opcode::Removexattr, &[&long])), Errno::RANGE);
    assert!(decode(&on_root(Opcode::Removexattr, &[b"user.with/slash\0"])).is_ok());
}

#[test]
fn error_names_request_and_fault() {
    let error = decode(&lookup(b"a/b\0")).unwrap_err();
    assert_eq!(error.to_string(), "request 24301 with opcode 1");
    assert_eq!(
        error.fault.to_string(),
        "a name is empty, `.` or `..`, or contains a slash"
    );
    let error = decode(&[0; 3]).unwrap_err();
    assert_eq!(error.to_string(), "request unknown with opcode unknown");
    assert_eq!(error.fault.to_string(), "the header has only 3 bytes");
}

#[test]
fn node_0_and_unknown_id_are_refused() {
    assert_eq!(
        fault(&request(Opcode::Lookup.number(), 0, &[b"name\0"])),
        Fault::Node
    );
    let rename = abi::RenameIn { newdir: 0 };
    let rename = on_root(Opcode::Rename, &[rename.as_bytes(), b"from\0", b"to\0"]);
    assert_eq!(fault(&rename), Fault::Node);
    let link = on_root(
        Opcode::Link,
        &[abi::LinkIn { oldnodeid: 0 }.as_bytes(), b"name\0"],
    );
    assert_eq!(fault(&link), Fault::Node);
    for id in [24, 28] {
        let mut bytes = lookup(b"name\0");
        bytes[id..id + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(decode(&bytes).unwrap().caller.lacks_ids());
    }
}

#[test]
fn offset_beyond_maximum_file_size_is_refused() {
    let beyond = i64::MAX as u64 + 1;
    let read = |offset, size| {
        on_root(
            Opcode::Read,
            &[abi::ReadIn {
                offset,
                size,
                ..Default::default()
            }
            .as_bytes()],
        )
    };
    assert!(decode(&read(beyond - 2, 1)).is_ok());
    for offset in [beyond - 1, beyond, u64::MAX] {
        assert_eq!(errno(&read(offset, 1)), Errno::INVAL, "{offset}");
        let write = abi::WriteIn {
            offset,
            size: 1,
            ..Default::default()
        };
        assert_eq!(
            errno(&on_root(Opcode::Write, &[write.as_bytes(), b"1"])),
            Errno::INVAL
        );
        let allocate = abi::FallocateIn {
            offset,
            length: 1,
            ..Default::default()
        };
        assert_eq!(
            errno(&on_root(Opcode::Fallocate, &[allocate.as_bytes()])),
            Errno::INVAL
        );
    }
    // The kernel passes this on unchecked; the host decides whether it is valid.
    let seek = abi::LseekIn {
        offset: beyond,
        whence: 3,
        ..Default::default()
    };
    assert!(decode(&on_root(Opcode::Lseek, &[seek.as_bytes()])).is_ok());
    let copy = abi::CopyFileRangeIn {
        nodeid_out: 1,
        off_out: beyond,
        ..Default::default()
    };
    assert_eq!(
        errno(&on_root(Opcode::CopyFileRange, &[copy.as_bytes()])),
        Errno::INVAL
    );
}

#[test]
fn write_with_less_data_than_counted_is_refused() {
    let write = |size, data: &[u8]| {
        on_root(
            Opcode::Write,
            &[
                abi::WriteIn {
                    size,
                    ..Default::default()
                }
                .as_bytes(),
                data,
            ],
        )
    };
    assert!(decode(&write(4, b"data")).is_ok());
    assert!(decode(&write(0, b"")).is_ok());
    assert!(decode(&write(2, b"data")).is_ok());
    assert_eq!(errno(&write(5, b"data")), Errno::INVAL);
    assert_eq!(errno(&write(u32::MAX, b"data")), Errno::INVAL);
    let without_data = &write(4, b"data")[..80];
    assert!(decode(without_data).is_ok(), "the data need not be at hand");
}

#[test]
fn write_mode_follows_flags_of_open_file() {
    let mode = |flags: i32| {
        let args = abi::WriteIn {
            flags: flags.cast_unsigned(),
            ..Default::default()
        };
        match decode(&on_root(Opcode::Write, &[args.as_bytes()]))
            .unwrap()
            .operation
        {
            Operation::Write { mode, .. } => (mode.append, mode.durable),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(mode(libc::O_WRONLY), (false, None));
    assert_eq!(mode(libc::O_RDWR | libc::O_APPEND), (true, None));
    assert_eq!(mode(libc::O_DSYNC), (false, Some(SyncKind::Data)));
    assert_eq!(mode(libc::O_SYNC), (false, Some(SyncKind::All)));
}

#[test]
fn batch_forget_has_all_entries_or_is_refused() {
    let batch = |count, ones: &[ForgetOne]| {
        let argument = abi::BatchForgetIn { count, dummy: 0 };
        on_root(Opcode::BatchForget, &[argument.as_bytes(), ones.as_bytes()])
    };
    let ones: Vec<_> = (1..=3)
        .map(|nodeid| ForgetOne {
            nodeid,
            nlookup: nodeid * 2,
        })
        .collect();
    let bytes = batch(3, &ones);
    let Operation::BatchForget(forgets) = decode(&bytes).unwrap().operation else {
        panic!("not a BATCH_FORGET");
    };
    let decoded: Vec<_> = forgets.iter().collect();
    assert_eq!(decoded, [(NodeId(1), 2), (NodeId(2), 4), (NodeId(3), 6)]);
    for count in [4, 1000, u32::MAX] {
        let bytes = batch(count, &ones);
        let error = decode(&bytes).unwrap_err();
        assert_eq!(
            (error.fault, error.has_no_reply()),
            (Fault::Truncated, true)
        );
    }
    let longest = vec![ForgetOne::default(); 65_535];
    assert!(decode(&batch(65_535, &longest)).is_ok());
    let too_long = vec![ForgetOne::default(); 65_536];
    assert!(decode(&batch(65_536, &too_long)).is_err());
}

#[test]
fn open_and_create_keep_only_known_flags() {
    let all = u32::MAX;
    let open = on_root(
        Opcode::Open,
        &[abi::OpenIn {
            flags: all,
            open_flags: 0,
        }
        .as_bytes()],
    );
    let Operation::Open { flags } = decode(&open).unwrap().operation else {
        panic!("not an OPEN")
    };
    let create = abi::CreateIn {
        flags: all,
        ..Default::default()
    };
    let create = on_root(Opcode::Create, &[create.as_bytes(), b"name\0"]);
    let Operation::Create {
        flags: of_create, ..
    } = decode(&create).unwrap().operation
    else {
        panic!("not a CREATE");
    };
    let has = |flags: u32, flag: i32| flags & flag.cast_unsigned() == flag.cast_unsigned();
    for taken in [
        libc::O_CREAT,
        libc::O_EXCL,
        libc::O_PATH,
        libc::O_TMPFILE,
        libc::O_ASYNC,
    ] {
        assert!(!has(flags, taken), "{taken:#o}");
    }
    for kept in [
        libc::O_RDWR,
        libc::O_TRUNC,
        libc::O_APPEND,
        libc::O_DIRECT,
        libc::O_SYNC,
    ] {
        assert!(has(flags, kept), "{kept:#o}");
    }
    assert!(has(of_create, libc::O_EXCL));
    assert!(!has(of_create, libc::O_CREAT));
}

#[test]
fn setattr_changes_only_valid_fields() {
    let args = abi::SetattrIn {
        valid: 0,
        fh: 9,
        size: 10,
        atime: (-5i64).cast_unsigned(),
        mtime: 6,
        atimensec: 7,
        mtimensec: 8,
        mode: 0o107_755,
        uid: 1,
        gid: 2,
        ..Default::default()
    };
    let decoded = |valid| {
        let bytes = on_root(
            Opcode::Setattr,
            &[abi::SetattrIn { valid, ..args }.as_bytes()],
        );
        match decode(&bytes).unwrap().operation {
            Operation::Setattr { handle, changes } => (handle, changes),
            other => panic!("{other:?}"),
        }
    };
    let (handle, nothing) = decoded(setattr_valid::CTIME | setattr_valid::KILL_SUIDGID);
    assert_eq!(handle, None);
    assert_eq!(
        (nothing.mode, nothing.uid, nothing.gid, nothing.size),
        (None, None, None, None)
    );
    assert_eq!((nothing.accessed, nothing.modified), (None, None));
    let (handle, all) = decoded(0x7f | setattr_valid::MTIME_NOW);
    assert_eq!(handle, Some(Handle(9)));
    assert_eq!(
        (all.mode, all.uid, all.gid),
        (Some(0o7755), Some(1), Some(2))
    );
    assert_eq!(all.size, Some(10));
    assert_eq!(
        all.accessed,
        Some(NewTime::At(Timestamp {
            seconds: -5,
            nanoseconds: 7
        }))
    );
    assert_eq!(all.modified, Some(NewTime::Now));
}

#[test]
fn setattr_of_values_special_to_host_is_refused() {
    use setattr_valid::{ATIME, ATIME_NOW, GID, MTIME, SIZE, UID};

    let bad = abi::SetattrIn {
        size: u64::MAX,
        uid: u32::MAX,
        gid: u32::MAX,
        // UTIME_NOW and UTIME_OMIT of utimensat(2).
        atimensec: 0x3fff_ffff,
        mtimensec: 0x3fff_fffe,
        ..Default::default()
    };
    let setattr = |valid| {
        on_root(
            Opcode::Setattr,
            &[abi::SetattrIn { valid, ..bad }.as_bytes()],
        )
    };
    for valid in [SIZE, UID, GID, ATIME, MTIME] {
        assert_eq!(errno(&setattr(valid)), Errno::INVAL, "{valid:#x}");
    }
    assert!(decode(&setattr(ATIME | ATIME_NOW)).is_ok());
}

#[test]
fn values_that_kernel_never_sends_are_refused() {
    for whence in [0, 1, 2, 5, u32::MAX] {
        let seek = abi::LseekIn {
            whence,
            ..Default::default()
        };
        assert_eq!(
            errno(&on_root(Opcode::Lseek, &[seek.as_bytes()])),
            Errno::INVAL
        );
    }
    let access = abi::AccessIn {
        mask: 8,
        padding: 0,
    };
    assert_eq!(
        errno(&on_root(Opcode::Access, &[access.as_bytes()])),
        Errno::INVAL
    );
    let copy = abi::CopyFileRangeIn {
        nodeid_out: 1,
        flags: 1,
        ..Default::default()
    };
    assert_eq!(
        errno(&on_root(Opcode::CopyFileRange, &[copy.as_bytes()])),
        Errno::INVAL
    );
}

#[test]
fn extensions_are_not_part_of_preceding_name() {
    let with = |units: u16, name: &[u8]| {
        let mkdir = abi::MkdirIn::default();
        let extension = abi::ExtHeader {
            size: 8,
            kind: abi::EXT_GROUPS,
        };
        let mut bytes = on_root(
            Opcode::Mkdir,
            &[mkdir.as_bytes(), name, extension.as_bytes()],
        );
        bytes[36..38].copy_from_slice(&units.to_ne_bytes());
        bytes
    };
    let bytes = with(1, b"name\0");
    let Operation::Mkdir { name, .. } = decode(&bytes).unwrap().operation else {
        panic!("not a MKDIR");
    };
    assert_eq!(name, c"name");
    assert_eq!(fault(&with(1, b"endless")), Fault::Unterminated);
    assert_eq!(fault(&with(1000, b"name\0")), Fault::Extensions);
    assert_eq!(fault(&with(u16::MAX, b"name\0")), Fault::Extensions);
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
        let header = bytes.get(..HEADER_LEN).unwrap_or(&bytes);
        let _ = bytes_wanted(header, bytes.len().saturating_sub(HEADER_LEN));
    }

    #[test]
    fn any_arguments_of_any_opcode_are_decoded_or_refused(
        opcode in 0u32..64,
        node in prop_oneof![Just(0), any::<u64>()],
        arguments in prop::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..600),
        extensions in prop_oneof![Just(0), any::<u16>()],
        claimed in prop_oneof![Just(None), any::<u32>().prop_map(Some), (0u32..700).prop_map(Some)],
    ) {
        let mut bytes = request(opcode, node, &[&arguments]);
        bytes[36..38].copy_from_slice(&extensions.to_ne_bytes());
        if let Some(claimed) = claimed {
            claim_len(&mut bytes, claimed as usize);
        }
        match decode(&bytes) {
            Ok(request) => check(&request),
            Err(error) => prop_assert_eq!(error.unique, Some(UNIQUE)),
        }
    }

    #[test]
    fn any_change_of_a_good_request_is_decoded_or_refused(
        which in 0..samples().len(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let (_, mut bytes) = samples().swap_remove(which);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Ok(request) = decode(&bytes) {
            check(&request);
        }
    }

    #[test]
    fn names_survive_decoding(
        from in "[^/\0]{1,60}",
        to in "[^/\0]{1,60}",
        newdir in 1..u64::MAX,
        flags in any::<u32>(),
    ) {
        prop_assume!(![".", ".."].contains(&&*from) && ![".", ".."].contains(&&*to));
        let argument = abi::Rename2In { newdir, flags, padding: 0 };
        let bytes = on_root(
            Opcode::Rename2,
            &[argument.as_bytes(), from.as_bytes(), &[0], to.as_bytes(), &[0]],
        );
        let request = decode(&bytes).unwrap();
        let Operation::Rename { from: old, to: (directory, new), flags: decoded } =
            request.operation
        else {
            panic!("not a RENAME2");
        };
        prop_assert_eq!(old.to_bytes(), from.as_bytes());
        prop_assert_eq!(new.to_bytes(), to.as_bytes());
        prop_assert_eq!((directory, decoded), (NodeId(newdir), flags));
    }

    #[test]
    fn read_arguments_survive_decoding(fh: u64, offset in 0..1u64 << 62, size: u32) {
        let argument = abi::ReadIn { fh, offset, size, ..Default::default() };
        let bytes = on_root(Opcode::Read, &[argument.as_bytes()]);
        let Operation::Read(range) = decode(&bytes).unwrap().operation else {
            panic!("not a READ");
        };
        prop_assert_eq!(range, Range { handle: Handle(fh), offset, size });
    }
}

/// The properties of every request that [`decode`] returns.
fn check(request: &Request<'_>) {
    let name_is_good = |name: &CStr| {
        let bytes = name.to_bytes();
        assert!(!bytes.is_empty() && bytes.len() <= 255 && !bytes.contains(&b'/'));
        assert!(bytes != b"." && bytes != b"..");
    };
    match request.operation {
        Operation::Lookup { name }
        | Operation::Symlink { name, .. }
        | Operation::Mknod { name, .. }
        | Operation::Mkdir { name, .. }
        | Operation::Unlink { name }
        | Operation::Rmdir { name }
        | Operation::Link { name, .. }
        | Operation::Create { name, .. } => name_is_good(name),
        Operation::Rename {
            from,
            to: (directory, to),
            ..
        } => {
            assert_ne!(directory, NodeId(0));
            name_is_good(from);
            name_is_good(to);
        }
        Operation::Read(range) | Operation::Write { range, .. } => {
            assert!(range.offset + u64::from(range.size) <= i64::MAX as u64);
        }
        Operation::Unserved
        | Operation::Init(_)
        | Operation::Destroy
        | Operation::Interrupt { .. }
        | Operation::Forget { .. }
        | Operation::BatchForget(_) => return,
        _ => {}
    }
    assert_ne!(request.node, NodeId(0));
    assert_ne!(request.caller.uid, Some(u32::MAX));
}
