//! Each option on what the guest may do, tested by its effect over the socket.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod limits;
mod remember_inodes;
mod set_id;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use testing::Server;
use vmm::fuse::wire::{SetxattrIn, WriteIn, WriteOut, fopen, init, opcode, request_flag};
use vmm::fuse::{Call, Client, FuseError, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

fn session(server: &Server) -> Client<Session> {
    server.session(Profile::Simple, &Options::default())
}

/// What the server tells the guest about caching.
#[derive(Debug, PartialEq, Eq)]
struct CachePolicy {
    /// Seconds that names and attributes are valid.
    seconds: (u64, u64),
    /// The flags in replies to OPEN and OPENDIR.
    flags: (u32, u32),
    readdirplus: bool,
    symlinks: bool,
}

fn cache_policy(args: &[&str]) -> CachePolicy {
    let server = Server::start(args);
    std::fs::write(server.share().join("file"), "").unwrap();
    let mut fs = session(&server);
    let file = fs.lookup(ROOT, c"file").unwrap();
    assert_eq!(fs.getattr(file.nodeid).unwrap().attr_valid, file.attr_valid);
    let opened = fs.open(file.nodeid, libc::O_RDONLY).unwrap();
    CachePolicy {
        seconds: (file.entry_valid, file.attr_valid),
        // Depends on the file system of the temporary directory.
        flags: (
            opened.open_flags & !fopen::NOFLUSH,
            fs.opendir(ROOT).unwrap().open_flags,
        ),
        readdirplus: fs.has(init::DO_READDIRPLUS),
        symlinks: fs.has(init::CACHE_SYMLINKS),
    }
}

#[test]
fn cache_policy_sets_timeouts_and_flags() {
    let auto = CachePolicy {
        seconds: (1, 1),
        flags: (0, 0),
        readdirplus: true,
        symlinks: true,
    };
    assert_eq!(cache_policy(&[]), auto);
    assert_eq!(cache_policy(&["--cache", "auto"]), auto);
    assert_eq!(
        cache_policy(&["--cache", "never"]),
        CachePolicy {
            seconds: (0, 0),
            flags: (fopen::DIRECT_IO, 0),
            readdirplus: false,
            symlinks: false,
        }
    );
    let listed = fopen::KEEP_CACHE | fopen::CACHE_DIR;
    assert_eq!(
        cache_policy(&["--cache", "metadata"]),
        CachePolicy {
            seconds: (86400, 86400),
            flags: (fopen::DIRECT_IO, listed),
            ..auto
        }
    );
    assert_eq!(
        cache_policy(&["--cache=always"]),
        CachePolicy {
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
fn negative_timeout_caches_missing_name() {
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

/// What the server's process has open that was opened with these flags of `open(2)`, among
/// files named `name`.
fn opened_with(server: &Server, name: &str) -> i32 {
    let proc = Path::new("/proc").join(server.pid().to_string());
    let fds = std::fs::read_dir(proc.join("fd")).unwrap();
    let flags = fds.filter_map(|fd| {
        let fd = fd.ok()?;
        let target = std::fs::read_link(fd.path()).ok()?;
        let info = proc.join("fdinfo").join(fd.file_name());
        let info = std::fs::read_to_string(info).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
        (target.ends_with(name) && flags & libc::O_PATH == 0).then_some(flags)
    });
    flags
        .reduce(|all, one| all | one)
        .expect("the file is open")
}

/// The flags that the host's file is opened with when the guest opens it with `flags`.
fn host_flags(args: &[&str], flags: i32) -> i32 {
    // Not every file system has O_DIRECT; that of the build has.
    let server = Server::start(args);
    std::fs::write(server.share().join("opened"), "").unwrap();
    let mut fs = session(&server);
    let file = fs.lookup(ROOT, c"opened").unwrap();
    fs.open(file.nodeid, flags).unwrap();
    opened_with(&server, "opened")
}

#[test]
fn write_only_open_with_writeback_is_read_write_on_host() {
    let flags = libc::O_WRONLY;
    let plain = host_flags(&[], flags);
    assert_eq!(plain & libc::O_ACCMODE, libc::O_WRONLY);
    let collecting = host_flags(&["--writeback"], flags);
    assert_eq!(collecting & libc::O_ACCMODE, libc::O_RDWR);

    // It goes by what the guest has agreed to, not by the option alone.
    let server = Server::start(&["--writeback"]);
    std::fs::write(server.share().join("opened"), "").unwrap();
    let guest = Profile::Simple.connect(server.connect(), &Options::default());
    let mut fs = Client::new(guest.unwrap());
    fs.init_offering(vmm::fuse::LINUX_OFFERS & !init::WRITEBACK_CACHE)
        .unwrap();
    let file = fs.lookup(ROOT, c"opened").unwrap();
    fs.open(file.nodeid, flags).unwrap();
    let plain = opened_with(&server, "opened");
    assert_eq!(plain & libc::O_ACCMODE, libc::O_WRONLY);
}

#[test]
fn direct_io_reaches_the_host_only_if_allowed() {
    let flags = libc::O_RDONLY | libc::O_DIRECT;
    assert_eq!(host_flags(&[], flags) & libc::O_DIRECT, 0);
    assert_ne!(
        host_flags(&["--allow-direct-io"], flags) & libc::O_DIRECT,
        0
    );
}

#[test]
fn noatime_reaches_the_host_only_if_asked_for() {
    let flags = libc::O_RDONLY | libc::O_NOATIME;
    assert_eq!(host_flags(&[], flags) & libc::O_NOATIME, 0);
    assert_ne!(
        host_flags(&["--preserve-noatime"], flags) & libc::O_NOATIME,
        0
    );
}

/// Of these flags of INIT those that the server agrees on.
fn agreed(args: &[&str], flags: u64) -> u64 {
    let server = Server::start(args);
    let fs = session(&server);
    (0..64)
        .map(|bit| 1 << bit)
        .filter(|flag| flags & flag != 0 && fs.has(*flag))
        .sum()
}

#[test]
fn enabled_features_are_negotiated() {
    for (option, flag) in [
        ("--writeback", init::WRITEBACK_CACHE),
        ("--allow-mmap", init::DIRECT_IO_ALLOW_MMAP),
        ("--posix-locks", init::POSIX_LOCKS),
        ("--flock", init::FLOCK_LOCKS),
    ] {
        assert_eq!(agreed(&[], flag), 0, "without {option}");
        assert_eq!(agreed(&[option], flag), flag, "{option}");
    }
    let plus = init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
    assert_eq!(agreed(&[], plus), plus);
    assert_eq!(agreed(&["--no-readdirplus"], plus), 0);
}

#[test]
fn extended_attributes_are_served_unless_switched_off() {
    for (args, served) in [
        (&[][..], true),
        (&["--xattr"], true),
        (&["--no-xattr"], false),
        (&["--no-xattr", "--xattr"], true),
        (&["--xattr", "--no-xattr"], false),
    ] {
        let server = Server::start(args);
        let mut fs = session(&server);
        let set = fs.setxattr(ROOT, c"user.x", b"1", 0);
        let got = fs.getxattr(ROOT, c"user.x");
        if served {
            set.unwrap();
            assert_eq!(got.unwrap(), b"1");
        } else {
            // Only this errno makes a guest's kernel stop asking.
            let refused = [
                set.unwrap_err(),
                got.unwrap_err(),
                fs.getxattr_size(ROOT, c"security.capability").unwrap_err(),
                fs.listxattr(ROOT).unwrap_err(),
                fs.removexattr(ROOT, c"user.x").unwrap_err(),
            ];
            for error in refused {
                assert_eq!(error.errno(), Some(libc::ENOSYS), "{args:?}");
            }
        }
    }
}

#[test]
fn readonly_share_allows_only_reading() {
    let server = Server::start(&["--readonly", "--writeback"]);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let mut fs = session(&server);
    assert!(!fs.has(init::WRITEBACK_CACHE));
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    let handle = fs.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(fs.read(node, handle, 0, 100).unwrap(), b"content");
    let there = fs.create_with(ROOT, c"file", 0o644, libc::O_RDONLY | libc::O_CREAT);
    assert_eq!(there.unwrap().0.nodeid, node);
    assert_eq!(
        opened_with(&server, "file") & libc::O_ACCMODE,
        libc::O_RDONLY
    );
    assert_ne!(opened_with(&server, "file") & libc::O_NOATIME, 0);

    fn refused<T>(answer: Result<T, FuseError>) {
        let errno = answer.map(drop).unwrap_err().errno();
        assert_eq!(errno, Some(libc::EROFS));
    }
    refused(fs.open(node, libc::O_RDWR));
    refused(fs.open(node, libc::O_WRONLY));
    refused(fs.open(node, libc::O_RDONLY | libc::O_TRUNC));
    refused(fs.create(ROOT, c"new", 0o644));
    refused(fs.create(ROOT, c"file", 0o644));
    refused(fs.mkdir(ROOT, c"new", 0o755));
    refused(fs.mknod(ROOT, c"new", libc::S_IFREG | 0o644, 0));
    refused(fs.symlink(ROOT, c"new", c"file"));
    refused(fs.link(node, ROOT, c"new"));
    refused(fs.rename(ROOT, c"file", ROOT, c"new"));
    refused(fs.unlink(ROOT, c"file"));
    refused(fs.rmdir(ROOT, c"file"));
    refused(fs.chmod(node, 0o600));
    refused(fs.chown(node, 1, 1));
    refused(fs.truncate(node, 0));
    refused(fs.setxattr(node, c"user.x", b"1", 0));
    refused(fs.removexattr(node, c"user.x"));
    refused(fs.access(node, libc::W_OK));
    // Nor do set-ID bits go before a write that is refused.
    let set_id = std::os::unix::fs::PermissionsExt::from_mode(0o6755);
    std::fs::set_permissions(server.share().join("file"), set_id).unwrap();
    let asked = WriteIn {
        fh: handle.fh,
        size: 4,
        write_flags: request_flag::WRITE_KILL_SUIDGID,
        ..WriteIn::default()
    };
    let call = Call::new(opcode::WRITE, node).arg(asked.as_bytes());
    refused(fs.request(call.arg(b"data").reply_of::<WriteOut>()));
    assert_eq!(fs.getattr(node).unwrap().attr.mode & 0o7777, 0o6755);
    // The handle that there is doesn't let anything through either.
    assert!(fs.write(node, handle, 0, b"changed").is_err());
    assert!(fs.fallocate(node, handle, 0, 0..8192).is_err());
    let on_host = std::fs::read(server.share().join("file")).unwrap();
    assert_eq!(on_host, b"content");
    assert_eq!(std::fs::read_dir(server.share()).unwrap().count(), 1);
}

#[test]
fn a_file_system_mounted_inside_is_announced() {
    for (args, submount) in [
        (&[][..], request_flag::ATTR_SUBMOUNT),
        (&["--announce-submounts"], request_flag::ATTR_SUBMOUNT),
        (&["--no-announce-submounts"], 0),
        (
            &["--no-announce-submounts", "--announce-submounts"],
            request_flag::ATTR_SUBMOUNT,
        ),
    ] {
        // Each host has /proc, and the tests a directory elsewhere: no privilege is needed.
        let server = Server::start_sharing(Path::new("/"), args);
        let mut fs = session(&server);
        assert_eq!(fs.has(init::SUBMOUNTS), submount != 0);
        assert_eq!(fs.lookup(ROOT, c"proc").unwrap().attr.flags, submount);
        assert_eq!(fs.lookup(ROOT, c"usr").unwrap().attr.flags, 0);
        let opened = fs.opendir(ROOT).unwrap();
        let listed = fs.readdirplus_all(ROOT, opened).unwrap();
        let proc = listed.iter().find(|one| one.entry.name == "proc").unwrap();
        assert_eq!(proc.node.attr.flags, submount);
    }
}

#[test]
fn preferred_file_handles_replace_descriptors() {
    let inodes_open = |args: &[&str]| {
        let server = Server::start(args);
        let mut fs = session(&server);
        for name in 0..50 {
            let name = format!("file{name}");
            std::fs::write(server.share().join(&name), "").unwrap();
            fs.lookup(ROOT, &std::ffi::CString::new(name).unwrap())
                .unwrap();
        }
        server.descriptors_of("file")
    };
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: file handles need CAP_DAC_READ_SEARCH");
        return;
    }
    assert_eq!(inodes_open(&[]), 50);
    assert_eq!(inodes_open(&["--inode-file-handles", "never"]), 50);
    assert_eq!(inodes_open(&["--inode-file-handles", "prefer"]), 0);
    assert_eq!(inodes_open(&["--inode-file-handles=mandatory"]), 0);
}

#[test]
fn the_limit_of_descriptors_is_set() {
    let limit_of = |args: &[&str]| {
        let server = Server::start(args);
        let limits = format!("/proc/{}/limits", server.pid());
        let limits = std::fs::read_to_string(limits).unwrap();
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max open files"));
        let words: Vec<_> = line
            .unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        (words[3].clone(), words[4].clone())
    };
    let (soft, hard) = limit_of(&[]);
    assert_eq!(soft, hard);
    assert_eq!(
        limit_of(&["--rlimit-nofile", "300"]),
        ("300".to_owned(), hard)
    );
    // 0 leaves what the launcher has set.
    let dir = tempfile::tempdir().unwrap();
    let program = testing::command();
    let mut shell = std::process::Command::new("sh");
    let script = "ulimit -Sn 200; exec \"$0\" --rlimit-nofile 0 --shared-dir / --socket \"$1\"";
    shell.args(["-c", script]).arg(program.get_program());
    shell.arg(dir.path().join("socket"));
    let mut server = Server::spawn(shell, dir);
    server.wait_until_it_listens();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open"));
    assert_eq!(line.unwrap().split_whitespace().nth(3), Some("200"));

    let refused = testing::output(&[
        "--socket=/nowhere/s",
        "--shared-dir=/",
        "--rlimit-nofile=18446744073709551614",
    ]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("CAP_SYS_RESOURCE"), "{said}");
}

#[test]
fn closed_files_are_cached_up_to_limit() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only a server that may open whatever is there keeps closed files");
        return;
    }
    let left_open = |args: &[&str]| {
        let server = Server::start(args);
        std::fs::write(server.share().join("closed"), "content").unwrap();
        let mut fs = session(&server);
        let node = fs.lookup(ROOT, c"closed").unwrap().nodeid;
        let known = server.descriptors_of("closed");
        let handle = fs.open(node, libc::O_RDONLY).unwrap();
        fs.release(node, handle).unwrap();
        let left = server.descriptors_of("closed") - known;
        let again = fs.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(fs.read(node, again, 0, 100).unwrap(), b"content");
        assert_eq!(server.descriptors_of("closed"), known + 1);
        left
    };
    assert_eq!(left_open(&[]), 1);
    assert_eq!(left_open(&["--max-spare-files", "0"]), 0);
}

#[test]
fn a_single_file_is_shared_in_a_directory_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("alone");
    std::fs::write(&path, "content").unwrap();
    std::fs::write(dir.path().join("beside"), "").unwrap();
    for args in [
        &[][..],
        &["--inode-file-handles", "prefer"],
        &["--readonly"],
    ] {
        let server = Server::start_sharing(&path, args);
        let mut fs = session(&server);
        let root = fs.getattr(ROOT).unwrap().attr;
        assert_eq!(root.mode & libc::S_IFMT, libc::S_IFDIR);
        let listing = fs.opendir(ROOT).unwrap();
        let mut names = fs.readdir_all(ROOT, listing).unwrap();
        names.retain(|entry| entry.name != "." && entry.name != "..");
        assert_eq!(names.len(), 1);
        assert_eq!(names[0].name, "alone");

        let file = fs.lookup(ROOT, c"alone").unwrap();
        let on_host = std::fs::metadata(&path).unwrap();
        assert_eq!((file.attr.ino, file.attr.size), (on_host.ino(), 7));
        if args == ["--readonly"] {
            let open = fs.open(file.nodeid, libc::O_RDWR).unwrap_err();
            assert_eq!(open.errno(), Some(libc::EROFS));
            continue;
        }
        let handle = fs.open(file.nodeid, libc::O_RDWR).unwrap();
        assert_eq!(fs.read(file.nodeid, handle, 0, 100).unwrap(), b"content");
        fs.write(file.nodeid, handle, 0, b"C").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"Content");
        fs.write(file.nodeid, handle, 0, b"c").unwrap();
        fs.syncfs(ROOT).unwrap();

        // Files beside it are invisible, and nothing can be created.
        let beside = fs.lookup(ROOT, c"beside").unwrap_err().errno();
        assert_eq!(beside, Some(libc::ENOENT));
        let made = fs.mkdir(ROOT, c"new", 0o755).unwrap_err().errno();
        assert_eq!(made, Some(libc::EROFS));
        let removed = fs.unlink(ROOT, c"alone").unwrap_err().errno();
        assert!(matches!(removed, Some(libc::EROFS | libc::EBUSY)));
    }
}

#[test]
fn a_single_file_needs_the_sandbox_that_makes_a_directory_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("alone");
    std::fs::write(&path, "content").unwrap();
    let (socket, shared) = (dir.path().join("socket"), path.to_str().unwrap());
    for sandbox in ["chroot", "none"] {
        let socket = socket.to_str().unwrap();
        let all = [
            "--socket",
            socket,
            "--shared-dir",
            shared,
            "--sandbox",
            sandbox,
        ];
        let refused = testing::output(&all);
        assert_eq!(refused.status.code(), Some(1));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("only --sandbox namespace can make"), "{said}");
    }
}

#[test]
fn neither_a_device_nor_a_socket_can_be_the_share() {
    let device = testing::output(&["--socket=/nowhere/s", "--shared-dir=/dev/null"]);
    assert_eq!(device.status.code(), Some(1));
    let said = String::from_utf8_lossy(&device.stderr).into_owned();
    assert!(said.contains("neither a directory nor"), "{said}");
}

/// An ACL that gives user 1000 all rights to a file of mode 0640.
fn acl() -> Vec<u8> {
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 7, 1000),
        (4, 4, u32::MAX),
        (16, 7, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(rights.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

#[test]
fn posix_acl_option_stores_guest_acls() {
    let both = init::POSIX_ACL | init::SETXATTR_EXT;
    assert_eq!(agreed(&[], both), 0);
    assert_eq!(agreed(&["--posix-acl=never"], both), 0);
    assert_eq!(agreed(&["--posix-acl=auto"], both), both);
    let server = Server::start(&["--posix-acl"]);
    let mut fs = session(&server);
    assert!(fs.has(both));
    let (file, _) = fs.create(ROOT, c"file", 0o2750).unwrap();
    let node = file.nodeid;
    match fs.setxattr(node, c"system.posix_acl_access", &acl(), 0) {
        Ok(()) => {}
        Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {
            println!("SKIPPED: the file system of the tests has no ACLs");
            return;
        }
        Err(error) => panic!("{error}"),
    }
    let got = fs.getxattr(node, c"system.posix_acl_access").unwrap();
    assert_eq!(got, acl());
    let mode = fs.getattr(node).unwrap().attr.mode;
    assert_eq!(mode & 0o7777, 0o2670, "the group's bits are the mask's");

    // One who isn't in the group can't keep its bit by an ACL.
    let value = acl();
    let asked = SetxattrIn {
        size: u32::try_from(value.len()).unwrap(),
        setxattr_flags: request_flag::SETXATTR_ACL_KILL_SGID,
        ..SetxattrIn::default()
    };
    let call = Call::new(opcode::SETXATTR, node).arg(asked.as_bytes());
    let call = call.name(c"system.posix_acl_access").arg(&value);
    fs.request(call.reply(0)).unwrap();
    let mode = fs.getattr(node).unwrap().attr.mode;
    assert_eq!(mode & 0o7777, 0o670);
}

#[test]
fn a_guest_without_acls_is_refused_where_they_are_needed() {
    let without = vmm::fuse::LINUX_OFFERS & !init::POSIX_ACL;
    for (option, served) in [("--posix-acl=auto", true), ("--posix-acl=always", false)] {
        let server = Server::start(&[option]);
        let stream = server.connect();
        let session = Profile::Simple
            .connect(stream, &Options::default())
            .unwrap();
        let mut fs = Client::new(session);
        assert_eq!(fs.init_offering(without).is_ok(), served, "{option}");
    }
}

#[test]
fn a_guest_without_labels_is_refused_where_they_are_needed() {
    for (option, with, without) in [
        ("--security-label=never", false, true),
        ("--security-label=auto", true, true),
        ("--security-label", true, false),
    ] {
        for (offers, served) in [
            (vmm::fuse::LINUX_OFFERS | init::SECURITY_CTX, true),
            (vmm::fuse::LINUX_OFFERS & !init::SECURITY_CTX, without),
        ] {
            let server = Server::start(&[option]);
            let stream = server.connect();
            let session = Profile::Simple.connect(stream, &Options::default());
            let mut fs = Client::new(session.unwrap());
            assert_eq!(fs.init_offering(offers).is_ok(), served, "{option}");
            let offered = offers & init::SECURITY_CTX != 0;
            let agreed = served && fs.has(init::SECURITY_CTX);
            assert_eq!(agreed, with && offered, "{option}");
        }
    }
}

#[test]
fn ids_in_acls_are_translated_both_ways() {
    let server = Server::start(&[
        "--posix-acl",
        "--translate-uid=map:1000:5000:100",
        "--translate-gid=map:2000:6000:100",
        "--translate-gid=forbid-guest:70:1",
    ]);
    let acl = |user: u32, group: u32| {
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, rights, id) in [
            (1_u16, 7_u16, u32::MAX),
            (2, 6, user),
            (4, 5, u32::MAX),
            (8, 4, group),
            (16, 7, u32::MAX),
            (32, 0, u32::MAX),
        ] {
            acl.extend(tag.to_le_bytes());
            acl.extend(rights.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        acl
    };
    let path = server.share().join("dir");
    std::fs::create_dir(&path).unwrap();
    let (guest, host) = (acl(1007, 2008), acl(5007, 6008));
    if !testing::set_on_host(&path, "system.posix_acl_default", &host) {
        println!("SKIPPED: the file system of the tests has no ACLs");
        return;
    }
    let mut fs = session(&server);
    let dir = fs.lookup(ROOT, c"dir").unwrap().nodeid;
    assert_eq!(
        fs.getxattr(dir, c"system.posix_acl_default").unwrap(),
        guest
    );
    // What a file inherits is what the guest would have set.
    let (file, _) = fs.create(dir, c"file", 0o777).unwrap();
    assert_eq!(
        fs.getxattr(file.nodeid, c"system.posix_acl_access")
            .unwrap(),
        guest
    );

    let on_host = |name: &str| {
        let mut value = [0; 100];
        let len = rustix::fs::getxattr(&path, name, &mut value).unwrap();
        value[..len].to_vec()
    };
    fs.setxattr(dir, c"system.posix_acl_access", &guest, 0)
        .unwrap();
    assert_eq!(on_host("system.posix_acl_access"), host);
    // Ids without a rule stay.
    fs.setxattr(dir, c"system.posix_acl_access", &acl(7, 8), 0)
        .unwrap();
    assert_eq!(on_host("system.posix_acl_access"), acl(7, 8));
    let refused = fs.setxattr(dir, c"system.posix_acl_access", &acl(7, 70), 0);
    assert_eq!(refused.unwrap_err().errno(), Some(libc::EPERM));
    assert_eq!(on_host("system.posix_acl_access"), acl(7, 8));
}

#[test]
fn attributes_have_other_names_on_the_host() {
    let server = Server::start(&["--xattrmap", ":map:trusted.:user.guest.:"]);
    let path = server.share().join("file");
    std::fs::write(&path, "").unwrap();
    assert!(testing::set_on_host(&path, "user.plain", b"1"));
    testing::set_on_host(&path, "trusted.hidden", b"1");
    let mut fs = session(&server);
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    fs.setxattr(node, c"trusted.x", b"value", 0).unwrap();
    let mut value = [0; 10];
    let len = rustix::fs::getxattr(&path, "user.guest.trusted.x", &mut value).unwrap();
    assert_eq!(&value[..len], b"value");
    assert_eq!(fs.getxattr(node, c"trusted.x").unwrap(), b"value");
    assert_eq!(fs.getxattr_size(node, c"trusted.x").unwrap(), 5);
    let mut names = fs.listxattr(node).unwrap();
    names.sort();
    assert_eq!(names, [c"trusted.x", c"user.plain"]);
    assert_eq!(fs.listxattr_size(node).unwrap(), 21);
    let refused = fs.setxattr(node, c"user.guest.trusted.x", b"", 0);
    assert_eq!(refused.unwrap_err().errno(), Some(libc::EPERM));
    fs.removexattr(node, c"trusted.x").unwrap();
    assert!(rustix::fs::getxattr(&path, "user.guest.trusted.x", &mut value).is_err());
}

#[test]
fn invalid_rule_error_shows_position() {
    let refused = testing::output(&[
        "--socket=/nowhere/s",
        "--shared-dir=/",
        "--xattrmap=:ok:all:::nope:",
    ]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("rule 2, at character 11"), "{said}");
}

#[test]
fn owners_are_translated() {
    use std::os::unix::fs::{MetadataExt, chown};
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root, to create for others");
        return;
    }
    let server = Server::start(&[
        "--translate-uid=map:0:70000:1000",
        "--translate-uid=forbid-guest:5000:1",
        "--translate-gid=squash-guest:100:80000:10",
        "--translate-gid=squash-host:80000:7:1",
    ]);
    let owner = |name: &str| {
        let metadata = std::fs::symlink_metadata(server.share().join(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    let mut fs = session(&server);
    fs.act_as(5, 105);
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (5, 7));
    assert_eq!(owner("file"), (70005, 80000));
    fs.symlink(ROOT, c"link", c"file").unwrap();
    assert_eq!(owner("link"), (70005, 80000));
    fs.act_as(0, 0);
    let changed = fs.chown(file.nodeid, 6, 200).unwrap().attr;
    assert_eq!((changed.uid, changed.gid), (6, 200));
    assert_eq!(owner("file"), (70006, 200));
    let seen = fs.fgetattr(file.nodeid, handle).unwrap().attr;
    assert_eq!((seen.uid, seen.gid), (6, 200));

    let host = server.share().join("host");
    std::fs::write(&host, "").unwrap();
    chown(&host, Some(70010), Some(80000)).unwrap();
    let seen = fs.lookup(ROOT, c"host").unwrap().attr;
    assert_eq!((seen.uid, seen.gid), (10, 7));

    let eperm = Some(libc::EPERM);
    assert_eq!(fs.chown(file.nodeid, 5000, 0).unwrap_err().errno(), eperm);
    fs.act_as(5000, 0);
    assert_eq!(fs.mkdir(ROOT, c"new", 0o755).unwrap_err().errno(), eperm);
}

#[test]
fn rules_for_the_same_ids_are_refused() {
    let refused = testing::output(&[
        "--socket=/nowhere/s",
        "--shared-dir=/",
        "--translate-uid=map:0:1000:10",
        "--translate-uid=forbid-guest:3:1",
    ]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        said.contains("--translate-uid: two rules for guest id 3"),
        "{said}"
    );
}

/// How often the threads of a process have gone to sleep of their own accord.
fn naps(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_task = |task: std::fs::DirEntry| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        count.trim().parse::<u64>().ok()
    };
    tasks.flatten().filter_map(of_task).sum()
}

/// Naps during as many requests, one at a time: the median of some rounds, as on a busy machine
/// one thread may have to wait so long for the other that neither sleeps, or both do.
fn usual_naps(poll: &str, requests: u64) -> u64 {
    let server = Server::start(&["--poll-us", poll, "--workers", "1"]);
    let mut fs = session(&server);
    let mut rounds: Vec<u64> = Vec::new();
    for _ in 0..15 {
        let before = naps(server.pid());
        for _ in 0..requests {
            fs.getattr(ROOT).unwrap();
        }
        rounds.push(naps(server.pid()) - before);
    }
    rounds.sort_unstable();
    rounds[rounds.len() / 2]
}

#[test]
fn a_worker_that_polls_sleeps_less_between_requests() {
    // The machine's other work may spoil a comparison.
    let mut seen = Vec::new();
    let less = (0..5).any(|_| {
        let (without, with) = (usual_naps("0", 200), usual_naps("1000", 200));
        seen.push((without, with));
        without > 4 * with
    });
    assert!(less, "naps without and with: {seen:?}");
}
