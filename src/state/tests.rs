//! Tests of state tables: written, abandoned and opened again.

use super::blobs::Name;
use super::*;

fn limits() -> Limits {
    Limits {
        inodes: 10_000,
        handles: 1000,
        queues: 2,
    }
}

fn table() -> Arc<Table> {
    Table::in_memory(&limits()).unwrap()
}

/// The same table as another process would open it.
fn opened(table: &Table) -> Result<Arc<Table>, StateError> {
    Table::open(table.file().unwrap().try_clone().unwrap())
}

fn inode(table: &Table, number: u64) -> InodeFields {
    let (node, _) = table.more_nodes();
    InodeFields {
        node,
        number,
        device: 7,
        mount: 3,
        birth: -5,
        sort: libc::S_IFREG,
        lookups: 1,
    }
}

#[test]
fn records_dropped_after_close_stay() {
    let table = table();
    let fields = inode(&table, 10);
    let open = HandleFields {
        handle: table.more_handles().0,
        node: fields.node,
        directory: false,
        flags: 0,
        fd: 17,
    };
    let owner = LockFields {
        owner: 99,
        node: fields.node,
        handle: open.handle,
        fd: 18,
    };
    let records = (
        table.new_inode(&fields, 0).unwrap(),
        table.new_handle(&open, 0).unwrap(),
        table.new_lock(&owner).unwrap(),
    );
    drop(table.new_inode(&inode(&table, 11), 0));
    table.close();
    drop(records);
    let next = opened(&table).unwrap();
    let inodes = next.take_inodes();
    assert_eq!((inodes.len(), inodes[0].number()), (1, 10));
    assert_eq!(next.take_handles()[0].fields(), open);
    assert_eq!(next.take_locks()[0].fields(), owner);
}

#[test]
fn records_are_found_after_reopening() {
    let table = table();
    let fields = inode(&table, 10);
    let record = table.new_inode(&fields, 42).unwrap();
    assert!(record.set_name(1, b"name", 9));
    assert!(record.set_handle(b"a handle"));
    record.set_nameless(true);
    record.set_descriptor(Some(0));
    let open = HandleFields {
        handle: table.more_handles().0,
        node: fields.node,
        directory: true,
        flags: 2,
        fd: 17,
    };
    let handle = table.new_handle(&open, 44).unwrap();
    handle.set_lock(2);
    let owner = LockFields {
        owner: 99,
        node: fields.node,
        handle: open.handle,
        fd: 18,
    };
    let lock = table.new_lock(&owner).unwrap();
    let ranges = [(true, 0, 9), (false, 20, u64::MAX)];
    let ranges = ranges.map(|(exclusive, start, end)| Range {
        exclusive,
        start,
        end,
    });
    assert!(lock.set_ranges(&ranges));
    table.set_agreement(Some([1, 2, 3, 4, 5, 6, 7, 8]));
    table.set_session_snapshot(b"what the VMM has said");

    let reopened = opened(&table).unwrap();
    let inodes = reopened.take_inodes();
    assert_eq!(inodes.len(), 1);
    let found = &inodes[0];
    assert_eq!((found.node(), found.number()), (fields.node, 10));
    assert_eq!((found.device(), found.mount()), (7, 3));
    assert_eq!((found.birth(), found.sort()), (-5, libc::S_IFREG));
    let name = Name {
        parent: 1,
        bytes: b"name".to_vec(),
        print: 9,
    };
    assert_eq!(found.name(), Some(name));
    assert!(found.is_nameless());
    found.set_nameless(false);
    assert!(!found.is_nameless());
    assert_eq!(found.descriptor(), Some(0));
    assert!(found.goes_by(1, b"name") && !found.goes_by(2, b"name") && !found.goes_by(1, b"names"));
    assert_eq!(found.handle(), Some(b"a handle".to_vec()));
    assert_eq!((found.lookups(), found.descriptor()), (1, Some(0)));
    assert!(found.was_counted_by(42, true) && !found.was_counted_by(42, false));
    let handles = reopened.take_handles();
    assert_eq!(handles[0].fields(), open);
    assert_eq!((handles[0].opened_by(), handles[0].lock()), (44, 2));
    let locks = reopened.take_locks();
    assert_eq!(
        (locks[0].fields(), locks[0].ranges()),
        (owner, ranges.to_vec())
    );
    assert_eq!(reopened.agreement(), Some([1, 2, 3, 4, 5, 6, 7, 8]));
    assert_eq!(
        reopened.session_snapshot().unwrap(),
        b"what the VMM has said"
    );
    assert!(reopened.more_nodes().0 > fields.node);
    assert!(reopened.more_handles().0 > open.handle);
    assert_eq!(reopened.bytes_in_use(), table.bytes_in_use());
    // They refer to the same records, which can be freed only once.
    std::mem::forget((record, handle, lock));
}

#[test]
fn dropped_records_free_their_space() {
    let table = table();
    let keep = table.new_inode(&inode(&table, 1), 0).unwrap();
    let before = table.bytes_in_use();
    for _ in 0..3 {
        let records: Vec<_> = (0..5000)
            .map(|number| {
                let record = table.new_inode(&inode(&table, number), 0).unwrap();
                let name = format!("name {number}");
                assert!(record.set_name(1, name.as_bytes(), 0));
                record
            })
            .collect();
        assert!(table.bytes_in_use() > before + 5000 * 64);
        drop(records);
        assert_eq!(table.bytes_in_use(), before);
    }
    assert_eq!(opened(&table).unwrap().take_inodes().len(), 1);
    let stat = rustix::fs::fstat(table.file().unwrap()).unwrap();
    assert!(stat.st_blocks * 512 < 1 << 20, "{}", stat.st_blocks);
    drop(keep);
}

#[test]
fn full_table_refuses_records() {
    let small = Limits {
        inodes: 0,
        handles: 0,
        queues: 1,
    };
    let table = Table::in_memory(&small).unwrap();
    let mut records = Vec::new();
    while let Some(record) = table.new_inode(&inode(&table, 1), 0) {
        records.push(record);
    }
    assert_eq!(records.len(), 64 * 1024);
    assert!(!records[0].set_name(1, b"name", 0));
    records.truncate(32 * 1024);
    assert!(records[0].set_name(1, b"name", 0));
    assert_eq!(records[0].name().unwrap().bytes, b"name");
}

#[test]
fn replaced_name_frees_the_old_one() {
    let table = table();
    let record = table.new_inode(&inode(&table, 1), 0).unwrap();
    let before = table.bytes_in_use();
    for name in ["short", &"long".repeat(60), "x"] {
        assert!(record.set_name(1, name.as_bytes(), 0));
        assert_eq!(record.name().unwrap().bytes, name.as_bytes());
    }
    record.end_name();
    assert_eq!((record.name(), table.bytes_in_use()), (None, before));
}

#[test]
fn file_without_table_is_refused() {
    let memfd = |bytes: &[u8]| {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create(c"test", flags).unwrap();
        rustix::io::write(&file, bytes).unwrap();
        file
    };
    assert!(matches!(Table::open(memfd(b"")), Err(StateError::Foreign)));
    let text = b"once upon a time there was a file that was quite long enough";
    assert!(matches!(Table::open(memfd(text)), Err(StateError::Foreign)));

    let table = table();
    table.store(1, 77);
    let error = opened(&table).unwrap_err();
    assert!(
        matches!(error, StateError::Version { found: 77, .. }),
        "{error}"
    );
    table.store(1, 1);
    let bytes = table.layout.bytes();
    rustix::fs::ftruncate(table.file().unwrap(), bytes - 1).unwrap();
    assert!(matches!(opened(&table), Err(StateError::Truncated { .. })));
    rustix::fs::ftruncate(table.file().unwrap(), bytes).unwrap();
    assert!(opened(&table).is_ok());
    table.store(2, 1);
    assert!(matches!(opened(&table), Err(StateError::Damaged { .. })));
}

#[test]
fn damaged_records_are_refused() {
    let table = table();
    let record = table.new_inode(&inode(&table, 1), 0).unwrap();
    assert!(record.set_name(1, b"name", 0));
    let first = slabs::word_of({
        let mut at = 0;
        table.slabs.for_each(RecordKind::Inode, |slot| at = slot);
        at
    });
    // Node id, blobs, state; and the kind of the chunk.
    for (at, bad) in [
        (first, 0),
        (first, 1 << 40),
        (first + 6, 1),
        (first + 6, u64::from(u32::MAX)),
        (first + 7, 9),
        (table.layout.kinds, 5),
    ] {
        let good = table.load(at);
        table.store(at, bad);
        let error = opened(&table).unwrap_err();
        assert!(matches!(error, StateError::Damaged { .. }), "{at}: {error}");
        table.store(at, good);
        assert!(opened(&table).is_ok());
    }
}

#[test]
fn session_snapshot_is_whole_or_absent() {
    let table = table();
    assert_eq!(table.session_snapshot(), None);
    for len in [1, 7, 8, 9, 1000, Table::MAX_SNAPSHOT_LEN] {
        let bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
        table.set_session_snapshot(&bytes);
        assert_eq!(table.session_snapshot().unwrap(), bytes);
    }
    table.set_session_snapshot(&[]);
    assert_eq!(table.session_snapshot(), None);
}
