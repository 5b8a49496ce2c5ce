//! How much memory an inode that the guest knows costs, and that all of it is freed.
//!
//! A process of its own: its allocator counts all bytes of the process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::CString;

use ringfsd::fs::passthrough::{Options, Passthrough};
use ringfsd::fs::{Caller, FileSystem, NodeId};
use ringfsd::internals::passthrough;
use rustix::thread::CapabilitySet;
use testing::allocations::{Counting, bytes_in_use};

#[global_allocator]
static COUNTING: Counting = Counting;

/// The most that an inode may cost beyond its name.
const MOST: usize = 200;

/// Bytes on the heap, and in the table that outlives the process.
fn held(fs: &Passthrough) -> usize {
    bytes_in_use() + passthrough::table(fs).bytes_in_use()
}

#[test]
fn known_inode_costs_at_most_200_bytes_until_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<CString> = (0..9000)
        .map(|n| CString::new(format!("file{n}")).unwrap())
        .collect();
    for name in &names {
        std::fs::write(dir.path().join(name.to_str().unwrap()), "").unwrap();
    }
    for by_handle in [true, false] {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        if !by_handle {
            // On this thread alone, which ends with the test.
            sets.effective -= CapabilitySet::DAC_READ_SEARCH;
            rustix::thread::set_capabilities(None, sets).unwrap();
        } else if !sets.effective.contains(CapabilitySet::DAC_READ_SEARCH) {
            println!("SKIPPED in part: file handles need CAP_DAC_READ_SEARCH");
            continue;
        }
        let options = Options {
            max_open_inodes: Some(100),
            ..Options::default()
        };
        let fs = Passthrough::new(dir.path(), options).unwrap();
        let mut nodes = Vec::with_capacity(names.len());
        let before = held(&fs);
        let mut name_bytes = 0;
        let mut worst = 0;
        for (n, name) in (1..).zip(&names) {
            let entry = fs.lookup(&Caller::default(), NodeId::ROOT, name).unwrap();
            nodes.push(entry.node);
            name_bytes += name.as_bytes_with_nul().len();
            // Sets that have just doubled are at their emptiest.
            if n >= 1000 && n % 50 == 0 {
                let bytes = held(&fs) - before;
                worst = worst.max(bytes.saturating_sub(name_bytes) / n);
            }
        }
        println!("by handle {by_handle}: {worst} bytes an inode beyond its name at worst");
        assert!(worst <= MOST, "{worst}");
        assert!(fs.inode_descriptors() <= 100);
        for node in nodes {
            fs.forget(node, 1);
        }
        let left = held(&fs).saturating_sub(before);
        println!("{left} bytes left");
        // What sets and queues of a few keep, whatever they once held.
        assert!(left < 32 * 1024, "{left}");
        assert_eq!((fs.known_inodes(), fs.inode_descriptors()), (1, 1));
    }
}
