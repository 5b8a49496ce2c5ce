//! Each option of what the guest may do, by its effect over the socket.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use support::Server;
use vmm::fuse::wire::{fopen, init};
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

fn session(server: &Server) -> Client<Session> {
    server.session(Profile::Simple, &Options::default())
}

/// What the guest is told that it may keep.
#[derive(Debug, PartialEq, Eq)]
struct Kept {
    /// Seconds that names and attributes hold.
    seconds: (u64, u64),
    /// What OPEN and OPENDIR say.
    flags: (u32, u32),
    readdirplus: bool,
    symlinks: bool,
}

fn kept(args: &[&str]) -> Kept {
    let server = Server::start(args);
    std::fs::write(server.share().join("file"), "").unwrap();
    let mut fs = session(&server);
    let file = fs.lookup(ROOT, c"file").unwrap();
    assert_eq!(fs.getattr(file.nodeid).unwrap().attr_valid, file.attr_valid);
    let opened = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
    Kept {
        seconds: (file.entry_valid, file.attr_valid),
        flags: (opened.open_flags, fs.opendir(ROOT).unwrap().open_flags),
        readdirplus: fs.has(init::DO_READDIRPLUS),
        symlinks: fs.has(init::CACHE_SYMLINKS),
    }
}

#[test]
fn the_cache_policy_decides_what_the_guest_keeps() {
    let auto = Kept {
        seconds: (1, 1),
        flags: (0, 0),
        readdirplus: true,
        symlinks: true,
    };
    assert_eq!(kept(&[]), auto);
    assert_eq!(kept(&["--cache", "auto"]), auto);
    assert_eq!(
        kept(&["--cache", "never"]),
        Kept {
            seconds: (0, 0),
            flags: (fopen::DIRECT_IO, 0),
            readdirplus: false,
            symlinks: false,
        }
    );
    let listed = fopen::KEEP_CACHE | fopen::CACHE_DIR;
    assert_eq!(
        kept(&["--cache", "metadata"]),
        Kept {
            seconds: (86400, 86400),
            flags: (fopen::DIRECT_IO, listed),
            ..auto
        }
    );
    assert_eq!(
        kept(&["--cache=always"]),
        Kept {
            seconds: (86400, 86400),
            flags: (fopen::KEEP_CACHE, listed),
            ..auto
        }
    );
}

#[test]
fn names_and_attributes_have_times_of_their_own() {
    let server = Server::start(&["--entry-timeout", "7.5", "--attr-timeout", "0"]);
    std::fs::write(server.share().join("file"), "").unwrap();
    let mut fs = session(&server);
    let file = fs.lookup(ROOT, c"file").unwrap();
    assert_eq!((file.entry_valid, file.entry_valid_nsec), (7, 500_000_000));
    assert_eq!((file.attr_valid, file.attr_valid_nsec), (0, 0));
    assert!(!fs.has(init::CACHE_SYMLINKS));
}

#[test]
fn a_name_that_is_not_there_can_be_kept() {
    let server = Server::start(&[]);
    let missing = session(&server).lookup(ROOT, c"missing").unwrap_err();
    assert_eq!(missing.errno(), Some(libc::ENOENT));

    let server = Server::start(&["--negative-timeout", "2.5"]);
    let mut fs = session(&server);
    let missing = fs.lookup(ROOT, c"missing").unwrap();
    assert_eq!(missing.nodeid, 0);
    assert_eq!(
        (missing.entry_valid, missing.entry_valid_nsec),
        (2, 500_000_000)
    );
    // Other errors stay errors.
    let long = std::ffi::CString::new([b'a'; 256]).unwrap();
    let refused = fs.lookup(ROOT, &long).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ENAMETOOLONG));
}
