//! Errors and warnings name the cause and say what to do.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Output;

use testing::{Server, USER, is_root};
use vmm::connection::message::{MemoryRegion, VringAddress};
use vmm::fuse::{Client, LINUX_OFFERS, ROOT, wire::init};
use vmm::{Options, Profile};

/// Standard error of a command that has ended with `code`.
fn said(output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

/// How many lines that the server has said until `last` have `text` in them.
fn lines(server: &mut Server, last: &str, text: &str) -> usize {
    server.wait_for(last);
    let all = server.said().iter();
    all.filter(|line| line.contains(text)).count()
}

#[test]
fn json_log_is_an_object_a_line() {
    let mut server = Server::start(&["--log-format", "json"]);
    drop(server.session(Profile::Qemu, &Options::default()));
    server.wait_for("the VMM has disconnected");
    let lines = server.said();
    assert!(lines.len() > 1);
    for line in lines {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let level = record["level"].as_str().unwrap();
        assert!(["info", "debug"].contains(&level), "{line}");
        let target = record["target"].as_str().unwrap();
        assert!(target.starts_with("ringfsd::"), "{line}");
        assert!(record["time"].as_str().unwrap().ends_with('Z'), "{line}");
    }
}

#[test]
fn unshared_guest_memory_error_says_what_to_do() {
    let region = MemoryRegion {
        gpa: 0,
        size: 1 << 20,
        user_address: 1 << 32,
        mmap_offset: 0,
    };
    for regions in [&[][..], &[region]] {
        let mut server = Server::start(&[]);
        let session = Profile::Qemu.prepare(server.connect(), &Options::default());
        let mut session = session.unwrap();
        session.connection.set_mem_table_raw(regions, &[]).unwrap();
        let line = server.wait_for("the session is ended");
        assert!(line.contains("has not shared the VM's memory"), "{line}");
        assert!(
            line.contains("share=on") && line.contains("shared=on"),
            "{line}"
        );
    }
}

#[test]
fn empty_ring_after_kick_warns_of_private_memory() {
    for private in [true, false] {
        let mut server = Server::start(&[]);
        let session = Profile::Simple.connect(server.connect(), &Options::default());
        let mut fs = Client::new(session.unwrap());
        let session = fs.guest();
        if private {
            // What the guest writes goes to the VMM's own copy of these.
            let regions = session.memory.regions().iter();
            let regions = regions.map(|region| MemoryRegion {
                gpa: region.gpa(),
                size: region.len(),
                user_address: region.user_address(),
                mmap_offset: region.file_offset(),
            });
            let regions: Vec<_> = regions.collect();
            let file = |region: &MemoryRegion| {
                let flags = rustix::fs::MemfdFlags::CLOEXEC;
                let file = rustix::fs::memfd_create("other", flags).unwrap();
                rustix::fs::ftruncate(&file, region.mmap_offset + region.size).unwrap();
                file
            };
            let files: Vec<_> = regions.iter().map(file).collect();
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            session
                .connection
                .set_mem_table_raw(&regions, &fds)
                .unwrap();
            session.connection.get_features().unwrap();
            let unanswered = vmm::fuse::Call::new(vmm::fuse::wire::opcode::STATFS, ROOT);
            let _unanswered = fs.submit(unanswered.reply(80)).unwrap();
            fs.kick_all().unwrap();
            let line = server.wait_for("has kicked queue 1");
            assert!(line.contains("share=on"), "{line}");
        } else {
            fs.init().unwrap();
            drop(fs);
            assert_eq!(lines(&mut server, "has disconnected", "has kicked"), 0);
        }
    }
}

#[test]
fn ring_in_memory_that_is_not_shared_is_named_as_that() {
    let mut server = Server::start(&[]);
    let mut session = server
        .session(Profile::Simple, &Options::default())
        .into_guest();
    // As QEMU says where the ring is, if only another part of the memory is shared.
    let beyond = 0x7fff_0000_0000;
    let address = VringAddress {
        index: 1,
        flags: 0,
        descriptors: beyond,
        used: beyond + 0x2000,
        available: beyond + 0x1000,
        log: 0,
    };
    let _ended = session.connection.set_vring_addr_raw(address);
    let line = server.wait_for("the session is ended");
    assert!(
        line.contains("outside the memory that the VMM has shared"),
        "{line}"
    );
}

#[test]
fn inaccessible_directory_error_names_directory_in_each_sandbox() {
    if !is_root() {
        return;
    }
    for sandbox in ["namespace", "none"] {
        let dir = tempfile::tempdir().unwrap();
        let (share, own) = (dir.path().join("share"), dir.path().join("own"));
        for made in [&share, &own] {
            std::fs::create_dir(made).unwrap();
        }
        std::os::unix::fs::chown(&own, Some(USER), None).unwrap();
        std::fs::set_permissions(&share, PermissionsExt::from_mode(0o700)).unwrap();
        let mut command = testing::command_as(Some(USER), dir.path());
        command
            .args(["--sandbox", sandbox, "--shared-dir"])
            .arg(&share);
        command.arg("--socket").arg(own.join("socket"));
        let text = said(&command.output().unwrap(), 1);
        assert!(text.contains("can't enter the shared directory"), "{text}");
        assert!(text.contains("65534"), "{text}");
        assert!(!text.contains("does without"), "{text}");
        assert!(!own.join("socket").exists());
    }
}

#[test]
fn security_label_without_the_capability_is_warned_of() {
    if Path::new("/sys/fs/selinux/enforce").exists() || !is_root() {
        return;
    }
    let waiting = "Waiting for";
    let map = ["--security-label", "--xattrmap=:map:security.:user.guest.:"];
    for (args, warnings) in [
        (&["--security-label"][..], 1),
        (&["--security-label", "--modcaps=+sys_admin"], 0),
        (&map, 0),
        (&["--xattr"], 0),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = testing::command();
        std::fs::create_dir(dir.path().join("share")).unwrap();
        command.arg("--socket").arg(dir.path().join("socket"));
        command.arg("--shared-dir").arg(dir.path().join("share"));
        command.args(args);
        let mut server = Server::spawn(command, dir);
        let count = lines(&mut server, waiting, "--modcaps=+sys_admin");
        assert_eq!(count, warnings, "{args:?}");
    }
}

#[test]
fn socket_path_that_is_too_long_is_refused_with_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x".repeat(120));
    let path = path.to_str().unwrap();
    let refused = testing::output(&["--socket", path, "--shared-dir", "/"]);
    let text = said(&refused, 1);
    let (len, most) = (format!("{} bytes", path.len()), "107");
    assert!(text.contains(&len) && text.contains(most), "{text}");
}

#[test]
fn doubled_comma_of_libvirt_is_a_comma_of_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("a,b");
    std::fs::create_dir(&share).unwrap();
    std::fs::write(share.join("file"), "").unwrap();
    let source = format!("source={}/a,,b,cache=auto", dir.path().display());
    let mut command = testing::command();
    command.arg("--socket").arg(dir.path().join("socket"));
    command.args(["-o", &source]);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    let mut fs = server.session(Profile::Qemu, &Options::default());
    fs.lookup(ROOT, c"file").unwrap();
}

#[test]
fn two_directories_are_refused_with_their_names() {
    let refused = testing::output(&["--fd=3", "-o", "source=/usr", "--shared-dir", "/etc"]);
    let text = said(&refused, 2);
    assert!(
        text.contains("source=/usr") && text.contains("/etc"),
        "{text}"
    );
}

#[test]
fn submount_without_announcement_warns_once() {
    if !is_root() {
        return;
    }
    for (flags, warnings) in [(LINUX_OFFERS & !init::SUBMOUNTS, 1), (LINUX_OFFERS, 0)] {
        let share = tempfile::tempdir().unwrap();
        let within = share.path().join("within");
        std::fs::create_dir(&within).unwrap();
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &within, "tmpfs", none, None).unwrap();
        let mut server = Server::start_sharing(share.path(), &[]);
        let session = Profile::Simple.connect(server.connect(), &Options::default());
        let mut fs = Client::new(session.unwrap());
        fs.init_offering(flags).unwrap();
        for _ in 0..3 {
            fs.lookup(ROOT, c"within").unwrap();
        }
        let handle = fs.opendir(ROOT).unwrap();
        fs.readdirplus_all(ROOT, handle).unwrap();
        drop(fs);
        let warned = lines(
            &mut server,
            "has disconnected",
            "other file systems are mounted",
        );
        rustix::mount::unmount(&within, rustix::mount::UnmountFlags::DETACH).unwrap();
        assert_eq!(warned, warnings);
    }
}

#[test]
fn line_that_launchers_wait_for_is_said_once() {
    let waiting = "Waiting for vhost-user socket connection";
    for args in [&[][..], &["--supervise"]] {
        let mut server = Server::start(args);
        for _ in 0..2 {
            drop(server.session(Profile::Simple, &Options::default()));
            server.wait_for("ready for the next VMM");
        }
        if !args.is_empty() {
            let serving = i32::try_from(server.pid()).unwrap();
            let serving = rustix::process::Pid::from_raw(serving).unwrap();
            rustix::process::kill_process(serving, rustix::process::Signal::KILL).unwrap();
            server.wait_for("ready for the next VMM");
        }
        let said = server.said().iter();
        assert_eq!(said.filter(|line| line.contains(waiting)).count(), 1);
    }
}

#[test]
fn tag_that_a_vmm_takes_and_is_missing_is_warned_of() {
    let ready = "ready for the next VMM";
    for (args, profile, warnings) in [
        (&[][..], Profile::Crosvm, 1),
        (&[], Profile::Libkrun, 1),
        (&["--tag", "t"], Profile::Crosvm, 0),
        (&[], Profile::Qemu, 0),
        (&[], Profile::CloudHypervisor, 0),
    ] {
        let mut server = Server::start(args);
        drop(server.session(profile, &Options::default()));
        let warned = lines(&mut server, ready, "set --tag");
        assert_eq!(warned, warnings, "{profile:?}");
    }
}

#[test]
fn spellings_of_crosvm_are_taken_or_refused_with_the_reason() {
    let server = Server::start(&["--disable-sandbox", "--tag", "t"]);
    drop(server.session(Profile::Crosvm, &Options::default()));
    let root = std::fs::read_link(format!("/proc/{}/root", server.pid())).unwrap();
    assert_eq!(root, Path::new("/"));

    let common = ["--fd=3", "--shared-dir=/usr"];
    for (option, reason) in [
        ("--cfg=timeout=5", "--entry-timeout"),
        ("--skip-pivot-root=true", "--sandbox none"),
        ("--uid=0", "omit --uid"),
        ("--gid=0", "omit --gid"),
        ("--uid-map=0 1000 1", ":0:100000:65536:"),
    ] {
        let refused = testing::output(&[&common[..], &[option]].concat());
        let text = said(&refused, 2);
        assert!(text.contains(reason), "{text}");
    }

    let (ours, theirs) = UnixStream::pair().unwrap();
    // Its standard input: what is made inheritable here would go to the children of other tests too.
    let mut command = testing::command();
    command.stdin(std::os::fd::OwnedFd::from(theirs));
    command.args(["--fd=0", "--shared-dir=/usr"]);
    let text = said(&command.output().unwrap(), 1);
    assert!(text.contains("is a connected socket"), "{text}");
    drop(ours);
}

#[test]
fn repeated_lines_are_suppressed_and_counted_unless_they_are_debugged() {
    const TIMES: usize = 80;
    const LINE: &str = "a VMM has connected";
    for (level, suppresses) in [("info", true), ("info,server=debug", false)] {
        let mut server = Server::start(&["--log-level", level]);
        for _ in 0..TIMES {
            drop(server.connect());
        }
        // Served after all of them.
        drop(server.session(Profile::Qemu, &Options::default()));
        server.signal(rustix::process::Signal::TERM);
        let last = if suppresses {
            "were suppressed: a VMM"
        } else {
            "asked to stop"
        };
        server.wait_for(last);
        let said = server.said();
        let logged = said
            .iter()
            .filter(|line| line.ends_with(&format!("] {LINE}")));
        let counted = said.iter().filter_map(|line| {
            let (start, text) =
                line.split_once(" more messages like this one were suppressed: ")?;
            (text == LINE).then(|| start.rsplit(' ').next()?.parse::<usize>().ok())?
        });
        let (logged, counted) = (logged.count(), counted.sum::<usize>());
        assert_eq!(logged + counted, TIMES + 1, "{said:#?}");
        assert_eq!(counted > 0, suppresses, "{said:#?}");
        let announced = format!("suppressing more messages like this one for up to 10 s: {LINE}");
        let announced = said.iter().any(|line| line.ends_with(&announced));
        assert_eq!(announced, suppresses, "{said:#?}");
    }
}

#[test]
fn wrong_log_level_is_an_error_that_lists_the_choices() {
    let refused = |level: &str| {
        let output = testing::output(&["--fd=3", "--shared-dir=/", "--log-level", level]);
        said(&output, 2)
    };
    let text = refused("info,attic=debug");
    assert!(
        text.contains("no room attic") && text.contains("fs, fuse, "),
        "{text}"
    );
    let text = refused("fs=loud");
    assert!(
        text.contains("\"loud\"") && text.contains("info, debug"),
        "{text}"
    );
}
