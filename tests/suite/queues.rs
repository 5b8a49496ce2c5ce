//! Queues: how many, how large, with which features, and what may change while they run.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};

use testing::{Server, each_runtime, pattern};
use vmm::connection::message::{MemoryRegion, feature};
use vmm::fuse::{Layout, ROOT};
use vmm::{Memory, Options, Profile, Region};

#[each_runtime]
fn every_request_queue_is_served(runtime: &str) {
    for workers in ["1", "2", "3"] {
        let server = Server::start(&[
            "--runtime",
            runtime,
            "--request-queues",
            "4",
            "--workers",
            workers,
        ]);
        let options = Options::default().request_queues(4);
        let mut fs = server.session(Profile::Simple, &options);
        for queue in 1..=4 {
            fs.use_queue(queue);
            assert_eq!(
                fs.getattr(ROOT).unwrap().attr.ino,
                fs.getattr(ROOT).unwrap().attr.ino
            );
        }
        let bases = fs.guest().stop().unwrap();
        assert_eq!(bases[2..], [2, 2, 2], "{workers} workers");
    }
}

#[each_runtime]
fn any_features_and_sizes_work(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    std::fs::write(server.share().join("file"), pattern(200_000, 1)).unwrap();
    for without in [
        0,
        feature::EVENT_IDX,
        feature::INDIRECT_DESC,
        feature::EVENT_IDX | feature::INDIRECT_DESC,
        feature::PROTOCOL_FEATURES,
    ] {
        for size in [8, 128, 1024, 4096] {
            let options = Options::default()
                .queue_size(size)
                .without_features(without);
            let mut fs = server.session(Profile::Simple, &options);
            fs.set_layout(if size > 128 {
                Layout::linux()
            } else {
                Layout::default()
            });
            let file = fs.lookup(ROOT, c"file").unwrap();
            let handle = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
            for _ in 0..10 {
                let got = fs.read(file.nodeid, handle, 0, 200_000).unwrap();
                assert!(
                    got == pattern(200_000, 1),
                    "without {without:#x}, size {size}"
                );
            }
        }
    }
}

#[each_runtime]
fn full_ring_is_served_completely(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--workers", "3"]);
    std::fs::write(server.share().join("file"), pattern(1 << 20, 2)).unwrap();
    let options = Options::default().queue_size(1024);
    let mut fs = server.session(Profile::Simple, &options);
    let file = fs.lookup(ROOT, c"file").unwrap();
    let handle = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
    for _ in 0..5 {
        let pending: Vec<_> = (0..1000u64)
            .map(|i| fs.submit_read(file.nodeid, handle, i * 1000, 1000).unwrap())
            .collect();
        let content = pattern(1 << 20, 2);
        for (i, pending) in pending.into_iter().enumerate() {
            let got = fs.collect(pending).unwrap().bytes;
            assert!(got == content[i * 1000..i * 1000 + 1000], "read {i}");
        }
    }
}

#[each_runtime]
fn get_vring_base_waits_for_taken_chains(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    let path = server.share().join("file");
    std::fs::write(&path, pattern(8 << 20, 2)).unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    let file = fs.lookup(ROOT, c"file").unwrap();
    let handle = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
    for _ in 0..20 {
        let host = std::fs::File::open(&path).unwrap();
        host.sync_data().unwrap();
        rustix::fs::fadvise(&host, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let pending: Vec<_> = (0..64u64)
            .map(|i| fs.submit_read(file.nodeid, handle, i << 17, 4096).unwrap())
            .collect();
        let bases = fs.guest().stop().unwrap();
        let queue = &fs.guest().queues[1];
        assert_eq!(queue.used_idx(), bases[1], "taken, and not returned");
        fs.guest().restart(&bases).unwrap();
        for pending in pending {
            fs.collect(pending).unwrap();
        }
    }
}

#[each_runtime]
fn restarted_queue_resumes_at_its_base(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    let mut fs = server.session(Profile::Qemu, &Options::default());
    for _ in 0..50 {
        fs.mkdir(ROOT, c"d", 0o755).unwrap();
        let bases = fs.guest().stop().unwrap();
        fs.guest().restart(&bases).unwrap();
        fs.rmdir(ROOT, c"d").unwrap();
    }
}

#[each_runtime]
fn enabled_queue_serves_what_waited_while_disabled(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    for _ in 0..20 {
        fs.guest().pause().unwrap();
        let pending = fs
            .submit(vmm::fuse::Call::new(vmm::fuse::wire::opcode::STATFS, ROOT).reply(80))
            .unwrap();
        // An answer to a later message shows that the one before has been dealt with.
        fs.guest().connection.get_features().unwrap();
        assert!(fs.returned().unwrap().is_empty(), "served while disabled");
        fs.guest().resume().unwrap();
        fs.collect(pending).unwrap();
    }
}

#[each_runtime]
fn memory_regions_change_while_queues_run(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    std::fs::write(server.share().join("file"), pattern(300_000, 4)).unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    let file = fs.lookup(ROOT, c"file").unwrap();
    let handle = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
    let before = server.holdings().guest_mappings;
    let more = Memory::new(&[Region::new(1 << 40, 4 << 20)]).unwrap();
    let region = &more.regions()[0];
    let again = MemoryRegion {
        gpa: region.gpa(),
        size: region.len(),
        user_address: region.user_address(),
        mmap_offset: region.file_offset(),
    };
    for round in 0..20 {
        let reads: Vec<_> = (0..16)
            .map(|_| fs.submit_read(file.nodeid, handle, 0, 300_000).unwrap())
            .collect();
        if round % 2 == 0 {
            fs.guest().connection.add_mem_reg(region).unwrap();
            fs.guest().connection.get_features().unwrap();
            assert_eq!(server.holdings().guest_mappings, before + 1);
        } else {
            fs.guest().connection.rem_mem_reg(again).unwrap();
            fs.guest().connection.get_features().unwrap();
            assert_eq!(server.holdings().guest_mappings, before);
        }
        for read in reads {
            assert!(fs.collect(read).unwrap().bytes == pattern(300_000, 4));
        }
    }
    let session = fs.guest();
    session.connection.set_mem_table(&session.memory).unwrap();
    assert!(fs.read(file.nodeid, handle, 0, 300_000).unwrap() == pattern(300_000, 4));
}

#[each_runtime]
fn high_priority_queue_serves_forgets(runtime: &str) {
    let mut server = Server::start(&["--runtime", runtime]);
    for i in 0..100 {
        // Of what is looked up, directories are always opened.
        std::fs::create_dir(server.share().join(format!("f{i}"))).unwrap();
    }
    let mut fs = server.session(Profile::Qemu, &Options::default());
    let before = server.holdings().descriptors;
    let mut nodes = Vec::new();
    for i in 0..100 {
        let name = std::ffi::CString::new(format!("f{i}")).unwrap();
        nodes.push((fs.lookup(ROOT, &name).unwrap().nodeid, 1));
    }
    assert!(server.holdings().descriptors >= before + 100);
    let (first, rest) = nodes.split_first().unwrap();
    fs.forget(first.0, 1).unwrap();
    fs.batch_forget(rest).unwrap();
    // Forgets have no reply; a stopped queue has dealt with all of them.
    fs.guest().stop().unwrap();
    server.wait_for("queue 0: ");
    assert!(server.holdings().descriptors <= before);
}

#[each_runtime]
fn guest_reset_releases_inodes_and_files(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    std::fs::write(server.share().join("file"), "x").unwrap();
    let mut fs = server.session(Profile::Qemu, &Options::default());
    let idle = server.holdings().descriptors;
    let file = fs.lookup(ROOT, c"file").unwrap();
    fs.open(file.nodeid, libc::O_RDONLY).unwrap();
    assert!(server.holdings().descriptors > idle);
    // A new kernel says INIT without a word of the old one's end.
    fs.init().unwrap();
    assert_eq!(server.holdings().descriptors, idle);
    assert!(fs.lookup(ROOT, c"file").is_ok());
}

#[test]
fn idle_costs_nothing() {
    let server = Server::start(&["--workers", "3"]);
    let mut fs = server.session(Profile::Qemu, &Options::default());
    fs.getattr(ROOT).unwrap();
    let status = |path: &Path| std::fs::read_to_string(path.join("status")).unwrap();
    let process = |pid: u32| Path::new("/proc").join(pid.to_string());
    let serving = process(server.pid());
    let parent = status(&serving);
    let parent = parent.lines().find_map(|line| line.strip_prefix("PPid:"));
    let guardian = process(parent.unwrap().trim().parse().unwrap());
    let tasks = |process: &Path| -> Vec<PathBuf> {
        let tasks = std::fs::read_dir(process.join("task")).unwrap();
        tasks.map(|task| task.unwrap().path()).collect()
    };
    // Beside the workers one that accepts and one for the high-priority queue.
    assert_eq!((tasks(&serving).len(), tasks(&guardian).len()), (3 + 2, 1));
    let switches = || -> u64 {
        [&serving, &guardian]
            .into_iter()
            .flat_map(|process| tasks(process))
            .map(|task| {
                status(&task)
                    .lines()
                    .filter_map(|line| line.split_once("ctxt_switches:"))
                    .map(|(_, count)| count.trim().parse::<u64>().unwrap())
                    .sum::<u64>()
            })
            .sum()
    };
    // What the request left to be done is done when a later message is answered.
    fs.guest().connection.get_features().unwrap();
    let mut before = switches();
    // Idleness has no event to wait for: three quiet seconds in a row show it. A first second
    // may still see the threads on their way to sleep.
    let mut quiet = 0;
    for _ in 0..10 {
        std::thread::sleep(std::time::Duration::from_secs(1));
        let now = switches();
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
        if quiet == 3 {
            return;
        }
    }
    panic!("the server does not come to rest");
}
