//! Everything that a session took is released, however the session ends.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use testing::{Server, each_runtime, pattern};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

/// Sessions that end in the middle of requests.
const SESSIONS: usize = 1000;

/// Requests in flight at each end.
const IN_FLIGHT: u64 = 32;

/// The front end vanishes with 32 requests in flight, again and again: cached reads, reads
/// that wait for the disk, writes, metadata.
#[each_runtime]
fn session_end_with_32_requests_in_flight_leaks_nothing(runtime: &str) {
    let mut server = Server::start(&["--runtime", runtime, "--workers", "2"]);
    std::fs::write(server.share().join("file"), pattern(4 << 20, 3)).unwrap();
    let options = Options::default()
        .request_queues(2)
        .memory(&[vmm::Region::new(0, 32 << 20)]);
    let mut baseline = None;
    for round in 0..SESSIONS {
        let mut fs = server.session(Profile::Simple, &options);
        let file = fs.lookup(ROOT, c"file").unwrap();
        let handle = fs.open(file.nodeid, libc::O_RDWR).unwrap();
        if round % 4 == 0 {
            // Now reads have to wait for the disk.
            let host = std::fs::File::open(server.share().join("file")).unwrap();
            host.sync_data().unwrap();
            rustix::fs::fadvise(&host, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        for i in 0..IN_FLIGHT {
            fs.use_queue(1 + usize::try_from(i % 2).unwrap());
            let offset = (i * 131_072) % (4 << 20);
            if i % 8 == 7 {
                let _ = fs
                    .submit_write(file.nodeid, handle, offset, &[7; 4096])
                    .unwrap();
            } else {
                let _ = fs.submit_read(file.nodeid, handle, offset, 65_536).unwrap();
            }
        }
        fs.kick_all().unwrap();
        drop(fs);
        server.wait_until_it_listens();
        // The first sessions fill caches of the allocator and the like.
        if round == 9 {
            baseline = Some(server.holdings());
        }
    }
    let (before, after) = (baseline.unwrap(), server.holdings());
    assert_eq!(after.descriptors, before.descriptors);
    assert_eq!(after.threads, 1, "the main thread alone is left");
    assert_eq!(after.guest_mappings, 0);
    assert!(
        after.mappings <= before.mappings + 4,
        "{} mappings, {} before",
        after.mappings,
        before.mappings
    );
}
