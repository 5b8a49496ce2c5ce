//! Each spelling of an option: what virtiofsd takes is taken, and has the same meaning.
//! `--syslog` has a test of its own: virtiofsd logs nothing then that shows that it listens.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use ringfsd::internals::cli::Persona;
use ringfsd::internals::config::Config;

use super::Program;

const LISTENING: &str = "Waiting for vhost-user socket connection";

/// What virtiofsd takes: arguments besides the socket and the directory, separated by spaces.
const TAKEN: &[&str] = &[
    "",
    "-f",
    "-d",
    "-fd",
    "-d -d",
    "-d --log-level=error",
    "--xattr",
    "--xattr --xattr",
    "--readonly",
    "--announce-submounts",
    "--no-announce-submounts",
    "--announce-submounts --no-announce-submounts",
    "--allow-mmap",
    "--no-readdirplus",
    "--writeback",
    "--readonly --writeback",
    "--allow-direct-io",
    "--no-killpriv-v2",
    "--killpriv-v2",
    "--no-killpriv-v2 --killpriv-v2",
    "--killpriv-v2 --no-killpriv-v2",
    "--xattrmap=:map::user.virtiofs.: --killpriv-v2",
    "--preserve-noatime",
    "--migration-verify-handles",
    "--migration-confirm-paths",
    "--migration-mode=find-paths",
    "--migration-mode file-handles",
    "--migration-on-error=abort",
    "--migration-on-error=guest-error",
    "--cache=auto",
    "--cache auto",
    "--cache=always",
    "--cache=never",
    "--cache=never --writeback",
    "--cache=never --allow-mmap",
    "--cache=metadata",
    "--cache=AUTO",
    "--cache=Always",
    "--cache=never --cache=always",
    "--sandbox=namespace",
    "--sandbox chroot",
    "--sandbox=none",
    "--sandbox=none --seccomp=none",
    "--sandbox=NAMESPACE",
    "--sandbox=Chroot",
    "--sandbox=NONE",
    "--seccomp=none",
    "--seccomp=kill",
    "--seccomp=log",
    "--seccomp=trap",
    "--inode-file-handles=never",
    "--inode-file-handles=prefer",
    "--inode-file-handles=fallback",
    "--inode-file-handles=mandatory",
    "--posix-acl",
    "--posix-acl=never",
    "--posix-acl=auto",
    "--posix-acl=always",
    "--posix-acl=never --translate-uid=map:0:1:1",
    "--security-label",
    "--security-label=never",
    "--security-label=auto",
    "--security-label=always",
    "--security-label --xattrmap=:map::user.v.:",
    "--security-label --translate-uid=map:0:1:1",
    "--log-level=error",
    "--log-level=warn",
    "--log-level=info",
    "--log-level=debug",
    "--log-level=trace",
    "--log-level=off",
    "--log-level=ERROR",
    "--log-level=Info",
    "--log-level=OFF",
    "--thread-pool-size=0",
    "--thread-pool-size=1",
    "--thread-pool-size 64",
    "--rlimit-nofile=0",
    "--rlimit-nofile=4096",
    "--tag=t",
    "--modcaps=+sys_admin",
    "--modcaps=-mknod",
    "--modcaps=+SYS_ADMIN:-CHOWN",
    "--modcaps=-mknod:-setfcap",
    "--xattrmap=:map::user.virtiofs.:",
    "--xattrmap=:prefix:all::user.virtiofs.::bad:all:::",
    "--translate-uid=map:0:1000:1",
    "--translate-uid=guest:0:1:1",
    "--translate-uid=host:0:1:1",
    "--translate-uid=squash-guest:0:1000:10",
    "--translate-uid=squash-host:0:1000:10",
    "--translate-uid=forbid-guest:0:10",
    "--translate-uid=forbid-guest:0:0",
    "--translate-uid=map:0:0:0",
    "--translate-uid=guest:0:1:0",
    "--translate-uid=host:1:2:0",
    "--translate-uid=squash-guest:0:1:0",
    "--translate-uid=squash-host:0:1:0",
    "--translate-uid=MAP:0:1:1",
    "--translate-uid=map|0|1|1",
    "--translate-uid=map,0,1,1",
    "--translate-uid=map:00:+1:1",
    "--translate-uid=forbid-guest:0:4294967295",
    "--translate-uid=map:0:1000:10 --translate-uid=forbid-guest:5:0",
    "--translate-uid=map:0:1000:10 --translate-uid=squash-host:5:0:0",
    "--translate-gid=map:0:1000:1",
    "--translate-gid=forbid-guest:0:0",
    "-o xattr",
    "-o no_xattr",
    "-o xattr,no_xattr",
    "-o no_xattr,posix_acl",
    "-o readdirplus",
    "-o no_readdirplus",
    "-o writeback",
    "-o no_writeback",
    "-o allow_direct_io",
    "-o no_allow_direct_io",
    "-o announce_submounts",
    "-o killpriv_v2",
    "-o no_killpriv_v2",
    "-o posix_acl",
    "-o no_posix_acl",
    "-o posix_acl,no_posix_acl",
    "-o security_label",
    "-o no_security_label",
    "-o no_posix_lock",
    "-o no_flock",
    "-o xattrmap=:map::user.virtiofs.:",
    "-o cache=auto",
    "-o cache=always",
    "-o cache=none",
    "-o cache=metadata",
    "-o cache=none,no_xattr,writeback",
    "-o loglevel=debug",
    "-o loglevel=info",
    "-o loglevel=warn",
    "-o loglevel=err",
    "-o sandbox=namespace",
    "-o sandbox=chroot",
    "-o modcaps=+sys_admin",
    "-o modcaps=-mknod",
    "-oxattr",
    "-o=xattr",
    "-dfo xattr",
    "-o xattr -o writeback",
    "-o source=/usr",
];

/// What neither takes, and the status that both exit with.
const REFUSED: &[(&str, i32)] = &[
    ("--bogus", 2),
    ("extra", 2),
    ("-- extra", 2),
    ("--cache=bogus", 2),
    ("--cache=", 2),
    ("--sandbox=x", 2),
    ("--seccomp=x", 2),
    ("--inode-file-handles=x", 2),
    ("--posix-acl=x", 2),
    ("--security-label=x", 2),
    ("--log-level=x", 2),
    ("--thread-pool-size=x", 2),
    ("--rlimit-nofile=x", 2),
    ("--xattrmap=x", 2),
    ("--uid-map=0:0:1", 2),
    ("--translate-uid=x:0:1:1", 2),
    ("--translate-uid=map:0:1", 2),
    ("--translate-uid=map:0:1:1:", 2),
    ("-o bogus", 2),
    ("-o bogus=1", 2),
    ("-o cache", 2),
    ("-o sandbox=x", 2),
    ("-o", 2),
    ("--fd=3", 2),
    ("--shared-dir", 2),
    ("--shared-dir=", 1),
    ("--socket-path=", 1),
    ("--uid-map=:0:0:0:", 1),
    ("--tag=a-tag-that-is-longer-than-the-36-bytes", 2),
    ("--socket-group=no-such-group", 1),
    ("--rlimit-nofile=10", 1),
    ("--shared-dir=/nowhere", 1),
    ("--socket-path=/nowhere/socket", 1),
    (
        "--translate-uid=map:0:1000:10 --translate-uid=map:5:2000:10",
        1,
    ),
    ("--modcaps -mknod", 2),
    ("--sandbox=chroot --uid-map=:0:0:1:", 1),
    ("--modcaps=x", 1),
    ("--modcaps=+nothing", 1),
    ("--modcaps=+sys_admin:", 1),
];

/// What ringfsd takes and virtiofsd refuses, each for a reason.
const ONLY_OURS: &[(&str, &str)] = &[
    ("--no-xattr", "an option for each value"),
    ("--cache=none", "one spelling wherever it is given"),
    ("--log-level=err", "one spelling wherever it is given"),
    ("-o cache=never", "one spelling wherever it is given"),
    ("-o sandbox=none", "one spelling wherever it is given"),
    (
        "-o ro,",
        "QEMU's first virtiofsd took it; an empty item asks for nothing",
    ),
    ("-o posix_lock,flock", "locks are taken on the host"),
    ("--seccomp=KILL", "no value depends on case"),
    ("--posix-acl=ALWAYS", "no value depends on case"),
    ("--inode-file-handles never", "a value needs no equals sign"),
    ("--socket-group=1", "a group may be a number"),
    (
        "--uid-map=:0:100000:65536:",
        "ids are mapped in a container, too",
    ),
    (
        "--modcaps=-dac_read_search",
        "file handles are preferred, not needed",
    ),
    (
        "--posix-acl --translate-uid=map:0:1000:1",
        "ids in ACLs are translated",
    ),
    ("--thread-pool-size=100000", "there is no pool"),
    (
        "--migration-mode=file-handles --migration-verify-handles",
        "it is done in any case",
    ),
];

/// Whether the program serves, or the status that it exits with.
fn outcome(program: &Program, spelling: &str) -> Result<(), i32> {
    let (mut command, _dir) = program.command_in_place();
    command
        .args(spelling.split(' ').filter(|argument| !argument.is_empty()))
        .env("RUST_LOG", "info")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut lines = lines.map_while(Result::ok);
    let listens = lines.any(|line| line.contains(LISTENING));
    if listens {
        child.kill().unwrap();
        child.wait().unwrap();
        return Ok(());
    }
    Err(child.wait().unwrap().code().unwrap_or(-1))
}

/// Compares the outcome of each spelling with what is expected, a few at a time.
fn compare(spellings: &[(&str, Result<(), i32>)], program: &Program) {
    let part = spellings.len().div_ceil(4);
    std::thread::scope(|scope| {
        for part in spellings.chunks(part) {
            scope.spawn(move || {
                for (spelling, expected) in part {
                    let outcome = outcome(program, spelling);
                    assert_eq!(outcome, *expected, "{program:?} {spelling}");
                }
            });
        }
    });
}

fn expectations(ours: bool) -> Vec<(&'static str, Result<(), i32>)> {
    let taken = TAKEN.iter().map(|spelling| (*spelling, Ok(())));
    let refused = REFUSED
        .iter()
        .map(|(spelling, code)| (*spelling, Err(*code)));
    let only_ours = ONLY_OURS.iter().map(|(spelling, _)| (*spelling, Ok(())));
    let only_ours = only_ours.filter(|_| ours);
    taken.chain(refused).chain(only_ours).collect()
}

#[test]
fn persona_takes_and_refuses_what_virtiofsd_does() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root, for all sandboxes");
        return;
    }
    compare(&expectations(true), &Program::persona());
}

#[test]
fn spellings_are_as_virtiofsd_has_them() {
    let Some(virtiofsd) = Program::virtiofsd() else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root, for all sandboxes");
        return;
    }
    compare(&expectations(false), &virtiofsd);
    for (spelling, why) in ONLY_OURS {
        let refused = outcome(&virtiofsd, spelling);
        // A host may have more privileges than others.
        let may_be_taken = spelling.starts_with("--uid-map");
        assert!(refused.is_err() || may_be_taken, "{spelling}: {why}");
    }
}

#[test]
fn incomplete_lines_exit_with_the_status_of_virtiofsd() {
    let mut programs = vec![Program::persona()];
    programs.extend(Program::virtiofsd());
    for program in programs {
        for (line, status) in [
            ("", 2),
            ("--socket-path=/tmp", 2),
            ("--shared-dir=/usr", 2),
            ("--fd=3 -o xattr", 1),
            ("--fd=3 -oxattr", 1),
            ("-o xattr", 2),
            ("--fd=3 --shared-dir=/usr --socket-group=root", 2),
            ("--fd=3 --socket-path=/tmp --shared-dir=/usr", 2),
            ("--fd=3 --shared-dir", 2),
            ("--fd=3 --shared-dir=", 1),
            ("--socket-path= --shared-dir=/usr", 1),
            ("--socket= --shared-dir=/usr", 1),
        ] {
            let arguments = line.split(' ').filter(|argument| !argument.is_empty());
            let output = program.command().args(arguments).output().unwrap();
            assert_eq!(output.status.code(), Some(status), "{program:?} {line}");
        }
    }
}

/// The configuration that these arguments lead to.
fn config(arguments: &str) -> String {
    let required = ["virtiofsd", "--socket=/s", "--shared-dir=/d"];
    let more = arguments.split(' ').filter(|argument| !argument.is_empty());
    let all: Vec<_> = required.into_iter().chain(more).map(Into::into).collect();
    let options = ringfsd::internals::cli::parse(&all, Persona::Virtiofsd).unwrap();
    let levels = options.observability.levels();
    format!("{levels} {:#?}", Config::try_from(options).unwrap())
}

#[test]
fn spellings_mean_what_virtiofsd_says() {
    for (spelling, meaning) in [
        ("-o no_xattr", ""),
        ("-o xattr", "--xattr"),
        ("--xattr -o no_xattr", ""),
        ("-o no_xattr --xattr", ""),
        ("-o no_xattr,posix_acl", "--posix-acl=always"),
        ("-o posix_acl,no_posix_acl", ""),
        ("--posix-acl=auto -o no_posix_acl", ""),
        ("-o security_label", "--security-label=always"),
        ("--security-label", "--security-label=always"),
        ("--security-label -o no_security_label", ""),
        ("--writeback -o no_writeback", ""),
        ("--no-readdirplus -o readdirplus", ""),
        ("--allow-direct-io -o no_allow_direct_io", ""),
        ("-o killpriv_v2 --no-killpriv-v2", "--killpriv-v2"),
        ("--killpriv-v2 -o no_killpriv_v2", ""),
        ("--no-killpriv-v2 --killpriv-v2", "--killpriv-v2"),
        ("-o cache=none", "--cache=never"),
        ("-o cache=none --cache=always", "--cache=never"),
        ("--cache=NEVER", "--cache=never"),
        ("-o loglevel=err", "--log-level=error"),
        ("-o loglevel=warn --log-level=debug", "--log-level=warn"),
        ("-o source=/other", "--shared-dir=/other"),
        ("-o modcaps=-mknod", "--modcaps=-mknod"),
        ("-o no_posix_lock,no_flock", ""),
        ("-d", "--log-level=debug"),
        ("-d --log-level=trace", "--log-level=debug"),
        ("--socket-path=/p --socket=/s", "--socket-path=/p"),
        ("--socket-path /p --socket /s", "--socket-path=/p"),
        (
            "--no-announce-submounts -o announce_submounts",
            "--no-announce-submounts",
        ),
        ("--no-announce-submounts --announce-submounts", ""),
        ("-f", ""),
        (
            "--inode-file-handles=fallback",
            "--inode-file-handles=prefer",
        ),
        ("", "--inode-file-handles=prefer"),
        ("", "--once"),
        ("", "--pid-file=/s.pid"),
        ("--translate-uid=forbid-guest:0:0", ""),
        ("--translate-uid=MAP|0|1|1", "--translate-uid=map:0:1:1"),
        (
            "--xattrmap=:map::user.v.: -o no_xattr",
            "--xattrmap=:map::user.v.:",
        ),
    ] {
        assert_eq!(config(spelling), config(meaning), "{spelling}: {meaning}");
    }
    assert_ne!(config(""), config("--xattr"));
}
