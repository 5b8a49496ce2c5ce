//! `--remember-inodes`: which forgotten inodes the guest finds again.

use testing::Server;
use vmm::Session;
use vmm::fuse::{Client, ROOT};

use super::session;

/// Drops all lookups of a node, and waits until the server has done it.
fn forget_all(fs: &mut Client<Session>, node: u64) {
    fs.forget(node, 1_000_000).unwrap();
    // A FORGET has no reply; a queue that was stopped has served all that was on it.
    let bases = fs.guest().stop().unwrap();
    fs.guest().restart(&bases).unwrap();
}

#[test]
fn forgotten_inode_is_found_again_with_option() {
    let estale = Some(libc::ESTALE);
    for (args, as_root) in [
        (&[][..], false),
        (&["--remember-inodes=2"], false),
        (&["--remember-inodes=2", "--no-open", "--no-opendir"], false),
        (&["--remember-inodes=2", "--modcaps=+dac_read_search"], true),
        (
            &["--remember-inodes=2", "--inode-file-handles=prefer"],
            true,
        ),
    ] {
        if as_root && !rustix::process::geteuid().is_root() {
            println!("SKIPPED: file handles need CAP_DAC_READ_SEARCH");
            continue;
        }
        let server = Server::start(args);
        let path = |name: &str| server.share().join(name);
        let mut fs = session(&server);
        let mut entries = Vec::new();
        for name in [c"a", c"b", c"c"] {
            std::fs::write(path(name.to_str().unwrap()), "content").unwrap();
            let entry = fs.lookup(ROOT, name).unwrap();
            forget_all(&mut fs, entry.nodeid);
            entries.push(entry);
        }
        assert_eq!(server.descriptors_of("a") + server.descriptors_of("c"), 0);
        if args.is_empty() {
            for entry in entries {
                let found = fs.lookup(entry.nodeid, c".");
                assert_eq!(found.unwrap_err().errno(), estale);
            }
            continue;
        }
        let [oldest, removed, kept] = entries[..] else {
            unreachable!()
        };
        let found = fs.lookup(oldest.nodeid, c".");
        assert_eq!(found.unwrap_err().errno(), estale, "{args:?}");
        std::fs::remove_file(path("b")).unwrap();
        std::fs::write(path("b"), "another").unwrap();
        let found = fs.lookup(removed.nodeid, c".");
        assert_eq!(found.unwrap_err().errno(), estale, "{args:?}");
        let used = fs.getattr(kept.nodeid);
        assert_eq!(used.unwrap_err().errno(), estale, "{args:?}");
        let same = |fs: &mut Client<Session>| {
            let found = fs.lookup(kept.nodeid, c".").unwrap();
            assert_eq!(
                (found.nodeid, found.generation, found.attr.ino),
                (kept.nodeid, kept.generation, kept.attr.ino)
            );
        };
        same(&mut fs);
        assert_eq!(fs.getattr(kept.nodeid).unwrap().attr.size, 7);
        assert_eq!(fs.lookup(ROOT, c"c").unwrap().nodeid, kept.nodeid);
        forget_all(&mut fs, kept.nodeid);
        same(&mut fs);
        // The guest unmounts what it still knows, and mounts again.
        fs.destroy().unwrap();
        fs.init().unwrap();
        let used = fs.getattr(kept.nodeid);
        assert_eq!(used.unwrap_err().errno(), estale, "{args:?}");
        same(&mut fs);
        // Another virtual machine inherits nothing.
        drop(fs);
        let mut fs = session(&server);
        let found = fs.lookup(kept.nodeid, c".");
        assert_eq!(found.unwrap_err().errno(), estale, "{args:?}");
        assert_ne!(fs.lookup(ROOT, c"c").unwrap().nodeid, kept.nodeid);
    }
}
