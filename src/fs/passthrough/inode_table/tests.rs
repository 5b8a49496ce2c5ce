//! The table alone: counts, names and identities, without a file system.

use rustix::fs::FileType;

use super::identity::now;
use super::reopen_method::Mount;
use super::*;
use crate::state::Limits;
use crate::sys::file_handle::FileHandle;

/// Long enough ago to be settled.
const LONG_AGO: i64 = 1_000_000_000_000_000_000;

fn identity(number: u64, birth: Option<i64>) -> Identity {
    let key = Key {
        number,
        device: 7,
        mount: 3,
    };
    Identity {
        key,
        birth,
        kind: FileType::RegularFile,
    }
}

fn handle() -> NewInode {
    NewInode {
        fd: None,
        method: ReopenMethod::Handle {
            mount: Mount::nowhere(),
            handle: FileHandle::invented(b"handle"),
        },
    }
}

fn store() -> InodeTable {
    store_keeping(0)
}

fn store_keeping(max: usize) -> InodeTable {
    let fd = std::fs::File::open("/dev/null").unwrap().into();
    let limits = Limits {
        inodes: 100,
        handles: 0,
        queues: 1,
    };
    let table = Table::in_memory(&limits).unwrap();
    InodeTable::new(&identity(2, Some(LONG_AGO)), fd, &table, max).unwrap()
}

/// Subtracts lookups. Returns whether the table keeps the inode as a forgotten one.
fn forget(store: &InodeTable, node: NodeId, count: u64) -> bool {
    let inode = store.get(node);
    inode.is_some_and(|inode| store.forget(&inode, count))
}

fn admit(store: &InodeTable, identity: &Identity) -> Arc<Inode> {
    store
        .find_or_insert(identity, handle(), |_, _| false)
        .unwrap()
}

#[test]
fn inode_fits_expected_size() {
    // With the two counters of its `Arc`, two entries of the sets (nine bytes each, half of them
    // empty at worst), its record and its file handle this stays below 200.
    assert!(size_of::<Inode>() <= 56, "{}", size_of::<Inode>());
}

#[test]
fn inode_is_found_by_key_and_node_until_last_forget() {
    let store = store();
    let who = identity(10, Some(LONG_AGO));
    let inode = admit(&store, &who);
    assert_eq!(store.find(&who).unwrap().node(), inode.node());
    assert_eq!(admit(&store, &who).node(), inode.node());
    assert!(!forget(&store, inode.node(), 2));
    assert!(store.get(inode.node()).is_some());
    assert!(!forget(&store, inode.node(), 1));
    assert!(store.get(inode.node()).is_none());
    assert!(store.find(&who).is_none());
    assert!(!store.count_lookup(&inode));
}

#[test]
fn node_id_is_never_reused() {
    let store = store();
    let who = identity(10, Some(LONG_AGO));
    let first = admit(&store, &who).node();
    assert!(!forget(&store, first, 1));
    assert_ne!(admit(&store, &who).node(), first);
}

#[test]
fn surplus_forgets_remove_inode_once() {
    let store = store();
    let node = admit(&store, &identity(10, Some(LONG_AGO))).node();
    assert!(!forget(&store, node, 100));
    assert!(!forget(&store, node, 100));
    assert_eq!(store.len(), 1);
}

#[test]
fn root_is_never_forgotten() {
    let store = store();
    let root = store.find(&identity(2, Some(LONG_AGO))).unwrap();
    assert_eq!(root.node(), NodeId::ROOT);
    assert!(!forget(&store, NodeId::ROOT, u64::MAX));
    store.clear();
    assert!(store.get(NodeId::ROOT).is_some());
    assert!(store.find(&identity(2, Some(LONG_AGO))).is_some());
}

#[test]
fn reused_number_with_another_birth_time_is_another_inode() {
    let store = store();
    let old = admit(&store, &identity(10, Some(LONG_AGO)));
    let later = identity(10, Some(LONG_AGO + 1));
    assert!(store.find(&later).is_none());
    let new = admit(&store, &later);
    assert_ne!(new.node(), old.node());
    // The guest still knows the old one, and removing it doesn't affect the new one.
    assert!(store.get(old.node()).is_some());
    assert!(!forget(&store, old.node(), 1));
    assert_eq!(store.find(&later).unwrap().node(), new.node());
}

#[test]
fn young_inode_is_not_identified_by_birth_time_alone() {
    let store = store();
    let who = identity(10, now());
    let inode = admit(&store, &who);
    assert!(store.find(&who).is_none());
    let found = store.find_or_insert(&who, handle(), |_, _| true).unwrap();
    assert_eq!(found.node(), inode.node());
}

#[test]
fn inode_without_birth_time_is_not_identified_by_number_alone() {
    let store = store();
    let who = identity(10, None);
    admit(&store, &who);
    assert!(store.find(&who).is_none());
}

#[test]
fn inode_without_key_is_replaced_by_next_lookup() {
    let store = store();
    let who = identity(10, Some(LONG_AGO));
    let stale = admit(&store, &who);
    store.remove_key_of(&stale);
    assert_ne!(admit(&store, &who).node(), stale.node());
}

fn open() -> NewInode {
    NewInode::open(std::fs::File::open("/dev/null").unwrap().into())
}

fn name_of(inode: &Inode) -> Option<String> {
    match inode.reopen_method() {
        ReopenMethod::Name(link) => Some(link.name.to_str().unwrap().to_owned()),
        _ => None,
    }
}

#[test]
fn name_seen_before_change_is_not_recorded() {
    let store = store();
    let parent = store
        .find_or_insert(&identity(9, Some(LONG_AGO)), open(), |_, _| false)
        .unwrap();
    let inode = store
        .find_or_insert(&identity(10, Some(LONG_AGO)), open(), |_, _| false)
        .unwrap();
    let early = store.dir_seq(&parent);
    store.record_name(&inode, &parent, c"old", early);
    assert_eq!(name_of(&inode).unwrap(), "old");
    let changing = store.begin_name_change([&parent, &parent]);
    let within = store.dir_seq(&parent);
    store.record_rename(&inode, &parent, c"new", &changing);
    store.record_name(&inode, &parent, c"old", within);
    drop(changing);
    store.record_name(&inode, &parent, c"old", early);
    assert_eq!(name_of(&inode).unwrap(), "new");
    store.record_name(&inode, &parent, c"old", store.dir_seq(&parent));
    assert_eq!(name_of(&inode).unwrap(), "old");
}

#[test]
fn directory_stays_while_children_need_it() {
    let store = store();
    let parent = store
        .find_or_insert(&identity(9, Some(LONG_AGO)), open(), |_, _| false)
        .unwrap();
    let inode = store
        .find_or_insert(&identity(10, Some(LONG_AGO)), open(), |_, _| false)
        .unwrap();
    store.record_name(&inode, &parent, c"name", store.dir_seq(&parent));
    assert!(!forget(&store, parent.node(), 1));
    assert!(store.get(parent.node()).is_none(), "it is not the guest's");
    assert!(store.any(parent.node()).is_some());
    assert!(!forget(&store, parent.node(), u64::MAX));
    assert!(store.any(parent.node()).is_some());
    assert!(!forget(&store, inode.node(), 1));
    assert!(store.any(parent.node()).is_none());
    assert_eq!((store.len(), store.descriptors()), (1, 1));
}

#[test]
fn clear_removes_all_but_root() {
    let store = store();
    for number in 10..1000 {
        admit(&store, &identity(number, Some(LONG_AGO)));
    }
    assert_eq!(store.len(), 991);
    store.clear();
    assert_eq!(store.len(), 1);
    let capacity: usize = store
        .by_node
        .iter()
        .map(|s| s.read().unwrap().capacity())
        .sum();
    assert!(capacity < 64 * SHARDS);
}

#[test]
fn racing_lookups_and_forgets_never_return_removed_node() {
    let store = store();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for turn in 0..20_000 {
                    let who = identity(10 + turn % 3, Some(LONG_AGO));
                    let inode = store.find(&who).unwrap_or_else(|| admit(&store, &who));
                    // A lookup keeps the node id until it is forgotten.
                    assert!(store.get(inode.node()).is_some());
                    assert!(!forget(&store, inode.node(), 1));
                }
            });
        }
    });
    assert_eq!(store.len(), 1);
    assert_eq!(
        store
            .by_key
            .iter()
            .map(|s| s.lock().unwrap().len())
            .sum::<usize>(),
        1
    );
}

/// Adds an inode with this number and forgets it.
fn forget_lookups(store: &InodeTable, number: u64) -> NodeId {
    let node = admit(store, &identity(number, Some(LONG_AGO))).node();
    forget(store, node, 1);
    store.drop_surplus_forgotten();
    node
}

#[test]
fn forgotten_inodes_are_kept_and_longest_is_dropped_first() {
    let store = store_keeping(3);
    let nodes: Vec<NodeId> = (10..14)
        .map(|number| forget_lookups(&store, number))
        .collect();
    let there = |node: &NodeId| store.get_or_forgotten(*node).is_some();
    assert!(nodes.iter().all(|node| store.get(*node).is_none()));
    assert_eq!(nodes.iter().filter(|node| there(node)).count(), 3);
    assert!(!there(&nodes[0]));
    // It is the same node, and goes to the end of the queue when it is forgotten.
    assert_eq!(forget_lookups(&store, 11), nodes[1]);
    let other = forget_lookups(&store, 20);
    assert!(there(&nodes[1]) && !there(&nodes[2]) && there(&nodes[3]) && there(&other));
    assert_eq!((store.forgotten(), store.len()), (3, 4));
    store.clear();
    assert_eq!((store.forgotten(), store.len()), (0, 1));
}

#[test]
fn inode_known_again_leaves_queue() {
    let store = store_keeping(2);
    let who = identity(10, Some(LONG_AGO));
    for _ in 0..1000 {
        let node = forget_lookups(&store, 10);
        // A `statx` is not sufficient: the inode has no descriptor yet.
        assert!(store.find(&who).is_none());
        assert!(store.count_lookup(&store.get_or_forgotten(node).unwrap()));
        assert_eq!(store.forgotten(), 0);
        assert_eq!(store.find(&who).unwrap().node(), node);
        assert!(!store.drop_oldest_forgotten());
        forget(&store, node, 2);
        assert_eq!(store.forgotten(), 1);
    }
    store.drop_forgotten(&store.get_or_forgotten(NodeId(2)).unwrap());
    assert_eq!((store.forgotten(), store.len()), (0, 1));
}

#[test]
fn forgotten_inode_is_dropped_when_number_is_reused() {
    let store = store_keeping(2);
    let old = forget_lookups(&store, 10);
    let new = admit(&store, &identity(10, Some(LONG_AGO + 1)));
    assert!(store.get_or_forgotten(old).is_none());
    assert_eq!((store.forgotten(), store.len()), (0, 2));
    // An inode that lost its number while the guest knew it is not kept.
    admit(&store, &identity(10, Some(LONG_AGO + 2)));
    assert!(!forget(&store, new.node(), 1));
    assert!(store.get_or_forgotten(new.node()).is_none());
}

#[test]
fn forgotten_inode_known_by_name_keeps_its_directory() {
    let store = store_keeping(1);
    let root = store.get(NodeId::ROOT).unwrap();
    let admit_open = |number| {
        let who = identity(number, Some(LONG_AGO));
        store.find_or_insert(&who, open(), |_, _| false).unwrap()
    };
    let dir = admit_open(10);
    store.record_name(&dir, &root, c"dir", store.dir_seq(&root));
    let file = admit_open(11);
    store.record_name(&file, &dir, c"file", store.dir_seq(&dir));
    for inode in [&dir, &file] {
        forget(&store, inode.node(), 1);
        store.drop_surplus_forgotten();
    }
    // The directory is in the table only for the file.
    assert_eq!((store.forgotten(), store.len()), (1, 3));
    assert!(store.get_or_forgotten(dir.node()).is_none());
    assert!(store.all().is_empty());
    assert!(store.drop_oldest_forgotten());
    assert_eq!((store.forgotten(), store.len()), (0, 1));
}

#[test]
fn forgotten_inodes_make_room_in_full_table() {
    let store = store_keeping(usize::MAX);
    let mut number = 10;
    while store.table.has_room_for_inode() {
        let inode = admit(&store, &identity(number, Some(LONG_AGO)));
        forget(&store, inode.node(), 1);
        number += 1;
    }
    let before = store.forgotten();
    assert!(before > 100);
    store.make_room_in_table();
    assert_eq!(store.forgotten(), before - 1);
    assert!(store.table.has_room_for_inode());
}

#[test]
fn racing_threads_keep_queue_consistent() {
    let store = store_keeping(2);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for turn in 0..5000 {
                    let inode = admit(&store, &identity(10 + turn % 4, Some(LONG_AGO)));
                    let node = inode.node();
                    forget(&store, node, 1);
                    store.drop_surplus_forgotten();
                    if let Some(again) = store.get_or_forgotten(node)
                        && store.count_lookup(&again)
                    {
                        forget(&store, node, 1);
                        store.drop_surplus_forgotten();
                    }
                }
            });
        }
    });
    assert!(store.forgotten() <= 2);
    assert_eq!(store.len(), store.forgotten() + 1);
    while store.drop_oldest_forgotten() {}
    assert_eq!((store.forgotten(), store.len()), (0, 1));
}
