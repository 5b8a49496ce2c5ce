//! Command lines of the programs that start the server, and the manual's text on each option.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;

use clap::CommandFactory;
use testing::Server;
use vmm::fuse::ROOT;
use vmm::fuse::wire::init;
use vmm::{Options, Profile};

#[test]
fn arguments_of_kata_start_server() {
    let server = Server::start(&[
        "--cache",
        "never",
        "--thread-pool-size=1",
        "-o",
        "announce_submounts",
        "--xattr",
    ]);
    let fs = server.session(Profile::Dragonball, &Options::default());
    assert!(fs.has(init::SUBMOUNTS));
    assert!(!fs.has(init::DO_READDIRPLUS));
}

#[test]
fn option_list_equals_single_options() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("share")).unwrap();
    let mut command = testing::command();
    let source = format!(
        "source={},cache=always,no_xattr,posix_lock,no_flock,ro",
        dir.path().join("share").display()
    );
    command
        .arg("--socket-path")
        .arg(dir.path().join("socket"))
        .args(["-o", &source, "-f", "-d"]);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    let mut fs = server.session(Profile::Qemu, &Options::default());
    assert!(fs.has(init::POSIX_LOCKS) && !fs.has(init::FLOCK_LOCKS));
    assert_eq!(fs.getattr(ROOT).unwrap().attr_valid, 86400);
    let refused = fs.mkdir(ROOT, c"dir", 0o755).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EROFS));
    let refused = fs.listxattr(ROOT).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ENOSYS));

    let unknown = testing::output(&["--fd=3", "-o", "source=/,unheard_of"]);
    assert_eq!(unknown.status.code(), Some(2));
}

#[test]
fn print_capabilities_says_type_fs() {
    let told = testing::output(&["--print-capabilities"]);
    assert!(told.status.success());
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(text.contains("\"type\": \"fs\""), "{text}");
}

#[test]
fn socket_group_owns_socket() {
    let mode = |server: &Server| {
        let metadata = std::fs::metadata(server.socket()).unwrap();
        (metadata.permissions().mode() & 0o777, metadata.gid())
    };
    if rustix::process::geteuid().is_root() {
        let server = Server::start(&["--socket-group", "12345"]);
        assert_eq!(mode(&server), (0o770, 12345));
        let server = Server::start(&["--socket-group", "daemon"]);
        assert_eq!(mode(&server), (0o770, 1));
    } else {
        println!("SKIPPED: needs root");
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let socket = socket.to_str().unwrap();
    let none = testing::output(&[
        "--socket",
        socket,
        "--shared-dir=/",
        "--socket-group=no such group",
    ]);
    assert_eq!(none.status.code(), Some(1));
    let said = String::from_utf8_lossy(&none.stderr).into_owned();
    assert!(said.contains("there is no group no such group"), "{said}");
}

#[test]
fn syslog_gets_priority_and_process_id() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root, for a /dev/log that nobody else sees");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (dev, share) = (dir.path().join("dev"), dir.path().join("share"));
    std::fs::create_dir(&dev).unwrap();
    std::fs::create_dir(&share).unwrap();
    let syslog = UnixDatagram::bind(dev.join("log")).unwrap();
    syslog.set_read_timeout(Some(testing::TIMEOUT)).unwrap();
    let mut command = std::process::Command::new("unshare");
    let script = "mount --bind \"$1\" /dev; \
                  exec \"$0\" --syslog --socket \"$2\" --shared-dir \"$3\"";
    command.args(["--mount", "bash", "-ec", script]);
    command.arg(testing::command().get_program());
    command.args([&dev, &dir.path().join("socket"), &share]);
    let mut server = Server::spawn(command, dir);
    let mut message = [0; 4096];
    loop {
        let len = syslog.recv(&mut message).unwrap();
        let said = String::from_utf8_lossy(&message[..len]);
        if said.contains("Waiting for vhost-user socket connection") {
            // What a daemon informs of.
            assert!(said.starts_with("<30>"), "{said}");
            assert!(said.contains(&format!("ringfsd[{}]: ", server.guardian())));
            break;
        }
    }
    server.signal(rustix::process::Signal::TERM);
    assert!(server.wait().success());
    assert!(server.said().is_empty(), "{:?}", server.said());
}

/// The section of the manual that has a heading with this option.
fn manual_section<'a>(manual: &'a str, name: &str) -> Option<&'a str> {
    let mut section = "";
    for line in manual.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title;
        }
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if line.starts_with("### ") && line.split(|c| !is_word(c)).any(|word| word == name) {
            return Some(section);
        }
    }
    None
}

#[test]
fn manual_describes_each_option_under_its_heading() {
    let manual = include_str!("../../docs/manual.md");
    let command = ringfsd::internals::cli::Options::command();
    let mut sections = Vec::new();
    for argument in command.get_arguments() {
        let name = match (argument.get_long(), argument.get_short()) {
            (Some("help" | "version"), _) => continue,
            (Some(long), _) => format!("--{long}"),
            (None, Some(short)) => format!("-{short}"),
            (None, None) => continue,
        };
        let section = argument.get_help_heading().unwrap();
        let found = manual_section(manual, &name);
        assert_eq!(found, Some(section), "{name}");
        if sections.last() != Some(&section) {
            sections.push(section);
        }
    }
    let titles = manual.lines().filter_map(|line| line.strip_prefix("## "));
    let titles: Vec<_> = titles.filter(|title| sections.contains(title)).collect();
    assert_eq!(titles, sections);
}
