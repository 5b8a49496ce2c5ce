//! A guest at work while the host changes its surroundings: whenever the guest sends a request,
//! nothing that it gets may be from outside of the share.

use std::ffi::CString;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags};
use testing::Server;
use vmm::fuse::ROOT;

use super::{is_untouched, outside, session, setups};

/// How long a race runs in each setup.
fn race_time() -> Duration {
    let seconds = std::env::var("RINGFSD_RACE_SECONDS").map_or(1.5, |text| text.parse().unwrap());
    Duration::from_secs_f64(seconds)
}

#[test]
fn directories_swapped_for_links_lead_nowhere() {
    for setup in setups() {
        // Few descriptors, so that names are gone by again and again.
        let server = setup.start(&["--max-open-inodes", "16", "--cache", "never"]);
        let outside = outside(&server);
        let share = server.share();
        for n in 0..24 {
            let dir = share.join(format!("dir{n}"));
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("secret"), "inside").unwrap();
            for path in [&dir, &dir.join("secret")] {
                std::os::unix::fs::chown(path, setup.user, setup.user).unwrap();
            }
            symlink(&outside, share.join(format!("swap{n}"))).unwrap();
        }
        let over = AtomicBool::new(false);
        let swaps = std::thread::scope(|scope| {
            let swapper = scope.spawn(|| {
                let mut swaps = 0_u64;
                while !over.load(Ordering::Relaxed) {
                    let n = swaps % 24;
                    let (dir, swap) = (
                        share.join(format!("dir{n}")),
                        share.join(format!("swap{n}")),
                    );
                    let flags = RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(CWD, &dir, CWD, &swap, flags).unwrap();
                    swaps += 1;
                }
                swaps
            });
            let tried = walk_while_swapped(&server, race_time());
            over.store(true, Ordering::Relaxed);
            assert!(tried > 100, "{tried}");
            swapper.join().unwrap()
        });
        println!("swapped {swaps} times");
        assert!(swaps > 100, "{swaps}");
        assert!(is_untouched(&outside), "{setup:?}");
    }
}

/// Does in directories that are being swapped what a guest can do; nothing of it may meet what is
/// outside. Answers how often a file inside was read.
fn walk_while_swapped(server: &Server, time: Duration) -> u64 {
    let mut fs = session(server);
    let end = Instant::now() + time;
    let (mut read, mut round) = (0, 0_u64);
    while Instant::now() < end || read <= 100 {
        assert!(Instant::now() < end + testing::TIMEOUT, "{read}");
        round += 1;
        let name = |kind: &str| CString::new(format!("{kind}{}", round % 24)).unwrap();
        for dir in [name("dir"), name("swap")] {
            let Ok(dir) = fs.lookup(ROOT, &dir) else {
                continue;
            };
            let node = dir.nodeid;
            if let Ok(secret) = fs.lookup(node, c"secret") {
                if let Ok(handle) = fs.open(secret.nodeid, libc::O_RDWR) {
                    let content = fs.read(secret.nodeid, handle, 0, 100).unwrap();
                    assert_eq!(content, b"inside");
                    read += 1;
                    let _ = fs.write(secret.nodeid, handle, 0, b"inside");
                    let _ = fs.release(secret.nodeid, handle);
                }
                let _ = fs.chmod(secret.nodeid, 0o666);
                let _ = fs.forget(secret.nodeid, 1);
            }
            if let Ok((made, handle)) = fs.create(node, c"made", 0o644) {
                let _ = fs.release(made.nodeid, handle);
                let _ = fs.forget(made.nodeid, 1);
            }
            let _ = fs.mkdir(node, c"new", 0o755);
            let _ = fs.rename(node, c"made", node, c"moved");
            let _ = fs.unlink(node, c"moved");
            let _ = fs.rmdir(node, c"new");
            if let Ok(handle) = fs.opendir(node) {
                let _ = fs.readdirplus_all(node, handle);
                let _ = fs.releasedir(node, handle);
            }
            let _ = fs.forget(node, 1);
        }
    }
    read
}

#[test]
fn directories_moved_out_and_back_lead_nowhere() {
    const DIRS: u64 = 8;
    for setup in setups() {
        // Few descriptors, so that directories are opened again while they are elsewhere.
        let server = setup.start(&["--max-open-inodes", "6", "--cache", "never"]);
        let outside = outside(&server);
        let share = server.share();
        let inside = |n: u64| share.join(format!("dir{}", n % DIRS));
        let moved = |n: u64| outside.join(format!("dir{}", n % DIRS));
        for n in 0..DIRS {
            std::fs::create_dir_all(inside(n).join("below")).unwrap();
        }
        let over = AtomicBool::new(false);
        let moves = std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                let mut moves = 0_u64;
                while !over.load(Ordering::Relaxed) {
                    std::fs::rename(inside(moves), moved(moves)).unwrap();
                    // The one that was moved before this one stays away a little longer.
                    if let Some(before) = moves.checked_sub(1) {
                        std::fs::rename(moved(before), inside(before)).unwrap();
                    }
                    moves += 1;
                }
                std::fs::rename(moved(moves - 1), inside(moves - 1)).unwrap();
                moves
            });
            let climbed = climb_while_moved(&server, DIRS, race_time());
            over.store(true, Ordering::Relaxed);
            assert!(climbed > 100, "{climbed}");
            mover.join().unwrap()
        });
        println!("moved {moves} times");
        assert!(moves > 100, "{moves}");
        assert!(is_untouched(&outside), "{setup:?}");
    }
}

/// Walks up from directories that are being moved out of the share; never comes out above it.
/// Answers how often there was a directory above.
fn climb_while_moved(server: &Server, dirs: u64, time: Duration) -> u64 {
    let mut fs = session(server);
    let end = Instant::now() + time;
    let (mut climbed, mut round) = (0, 0_u64);
    while Instant::now() < end || climbed <= 100 {
        assert!(Instant::now() < end + testing::TIMEOUT, "{climbed}");
        round += 1;
        let name = CString::new(format!("dir{}", round % dirs)).unwrap();
        let Ok(dir) = fs.lookup(ROOT, &name) else {
            continue;
        };
        let dir = dir.nodeid;
        if let Ok(below) = fs.lookup(dir, c"below") {
            let below = below.nodeid;
            for (node, above) in [(below, dir), (dir, ROOT)].repeat(8) {
                if let Ok(up) = fs.lookup(node, c"..") {
                    assert_eq!(up.nodeid, above, "of {node}");
                    assert!(fs.lookup(above, c"secret").is_err());
                    let _ = fs.forget(above, 1);
                    climbed += 1;
                }
                assert!(fs.lookup(node, c"../secret").is_err());
                assert!(fs.rename(node, c"..", ROOT, c"stolen").is_err());
            }
            let _ = fs.forget(below, 1);
        }
        let _ = fs.forget(dir, 1);
    }
    climbed
}
