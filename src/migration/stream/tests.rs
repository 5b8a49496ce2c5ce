//! Tests of the stream format, intact and damaged.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof, proptest};

use super::*;

fn bytes() -> BoxedStrategy<Vec<u8>> {
    vec(any::<u8>(), 0..40).boxed()
}

fn nameless() -> impl Strategy<Value = Nameless> {
    let numbers = any::<(u32, u32, u32, u64, [i64; 2])>();
    (numbers, vec((any::<u64>(), bytes()), 0..4)).prop_map(|(numbers, pieces)| {
        let (mode, uid, gid, size, times) = numbers;
        Nameless {
            mode,
            uid,
            gid,
            size,
            times,
            pieces,
        }
    })
}

fn find() -> impl Strategy<Value = Find> {
    prop_oneof![
        Just(Find::Handle),
        Just(Find::Lost),
        Just(Find::Gone),
        nameless().prop_map(Find::Nameless),
        (any::<u64>(), bytes(), any::<bool>()).prop_map(|(from, path, verify)| Find::Path {
            from,
            path,
            verify
        }),
    ]
}

fn inode() -> impl Strategy<Value = Inode> {
    let numbers = any::<(u64, u64, u32, u64, Option<i64>)>();
    (numbers, bytes(), find()).prop_map(|(numbers, handle, find)| {
        let (node, lookups, kind, number, birth) = numbers;
        Inode {
            node,
            lookups,
            kind,
            number,
            birth,
            handle,
            find,
        }
    })
}

fn open() -> impl Strategy<Value = Open> {
    let flock = prop_oneof![
        Just(Flock::None),
        Just(Flock::Shared),
        Just(Flock::Exclusive)
    ];
    (any::<(u64, u64, u32, bool)>(), flock).prop_map(|(numbers, flock)| {
        let (handle, node, flags, directory) = numbers;
        Open {
            handle,
            node,
            flags,
            directory,
            flock,
        }
    })
}

fn locks() -> impl Strategy<Value = Locks> {
    let range = any::<(u64, u64, bool)>().prop_map(|(start, end, exclusive)| Range {
        start,
        end,
        exclusive,
    });
    (any::<(u64, u64, u64)>(), vec(range, 0..4)).prop_map(|((node, owner, handle), ranges)| Locks {
        node,
        owner,
        handle,
        ranges,
    })
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    let agreement = option::of(any::<(u32, u64, u32, u32, u16, u16)>());
    let head = (
        any::<(u64, u64, u64, u64, Option<i64>)>(),
        bytes(),
        agreement,
    );
    let lists = (vec(inode(), 0..6), vec(open(), 0..4), vec(locks(), 0..4));
    (head, lists).prop_map(|((numbers, handle, agreement), (inodes, opens, locks))| {
        let (generation, next_node, next_handle, number, birth) = numbers;
        let agreement = agreement.map(|agreed| Agreement {
            minor: agreed.0,
            flags: agreed.1,
            max_readahead: agreed.2,
            max_write: agreed.3,
            max_pages: agreed.4,
            max_background: agreed.5,
        });
        Snapshot {
            agreement,
            generation,
            next_node,
            next_handle,
            root: Root {
                handle,
                number,
                birth,
            },
            inodes,
            opens,
            locks,
        }
    })
}

fn sample() -> Snapshot {
    Snapshot {
        generation: 7,
        inodes: vec![Inode {
            node: 2,
            lookups: 3,
            kind: libc::S_IFREG,
            number: 12,
            birth: Some(-1),
            handle: vec![1, 2, 3],
            find: Find::Path {
                from: 1,
                path: b"\xff/name".to_vec(),
                verify: true,
            },
        }],
        ..Snapshot::default()
    }
}

/// `bytes` with a valid checksum.
fn resealed(bytes: &[u8]) -> Vec<u8> {
    sealed(&bytes[..bytes.len().saturating_sub(CHECKSUM)])
}

proptest! {
    #[test]
    fn decode_returns_what_was_encoded(snapshot in snapshot()) {
        let bytes = encode(&snapshot).unwrap();
        assert_eq!(decode(&bytes).as_ref(), Ok(&snapshot));
    }

    #[test]
    fn change_of_any_byte_is_detected(snapshot in snapshot(), at in any::<u16>(), bit in 0_u8..8) {
        let mut bytes = encode(&snapshot).unwrap();
        let at = usize::from(at) % bytes.len();
        bytes[at] ^= 1_u8 << bit;
        assert!(decode(&bytes).is_err());
    }

    #[test]
    fn no_input_makes_decode_panic(bytes in vec(any::<u8>(), 0..400), known in any::<bool>()) {
        let mut bytes = bytes;
        if known && bytes.len() > 40 {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            bytes[16] = tag::SESSION;
            bytes[18..25].fill(0);
        }
        let _ = decode(&bytes);
        let _ = decode(&resealed(&bytes));
    }

    #[test]
    fn change_with_valid_checksum_does_not_panic(
        snapshot in snapshot(),
        at in any::<u16>(),
        byte in any::<u8>(),
    ) {
        let mut bytes = encode(&snapshot).unwrap();
        let at = usize::from(at) % bytes.len();
        bytes[at] = byte;
        let _ = decode(&resealed(&bytes));
    }
}

#[test]
fn truncated_stream_is_reported() {
    let bytes = encode(&sample()).unwrap();
    for found in 0..bytes.len() {
        assert_eq!(
            decode(&bytes[..found]),
            Err(StreamError::Truncated { found }),
            "{found}"
        );
    }
}

#[test]
fn other_version_and_other_program_have_own_errors() {
    let mut bytes = encode(&sample()).unwrap();
    bytes[8] = 2;
    assert_eq!(decode(&bytes), Err(StreamError::Version { found: 2 }));
    bytes[0] = 0;
    assert_eq!(decode(&bytes), Err(StreamError::Foreign));
}

#[test]
fn unknown_data_at_end_of_record_are_skipped() {
    let mut out = encode(&sample()).unwrap();
    out.truncate(out.len() - CHECKSUM - 9);
    record(&mut out, tag::OPEN, |out| {
        word(out, 5);
        word(out, 2);
        out.extend([0; 6]);
        out.extend(b"more");
    });
    record(&mut out, tag::END, |_| {});
    word(&mut out, 0);
    let found = decode(&resealed(&out)).unwrap();
    assert_eq!(found.opens[0].handle, 5);
}

#[test]
fn list_with_too_large_count_takes_no_memory() {
    let mut out = encode(&Snapshot::default()).unwrap();
    out.truncate(out.len() - CHECKSUM - 9);
    record(&mut out, tag::LOCKS, |out| {
        for claimed in [1, 2, 3, u64::MAX] {
            word(out, claimed);
        }
    });
    record(&mut out, tag::END, |_| {});
    word(&mut out, 0);
    assert!(matches!(
        decode(&resealed(&out)),
        Err(StreamError::Invalid { .. })
    ));
}
