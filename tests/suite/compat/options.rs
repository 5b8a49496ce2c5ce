//! Option by option: a guest sees the same of ringfsd in virtiofsd's place as of virtiofsd 1.14. The
//! invariant: what differs stands in [`DIFFERENCES`], and all that stands there is found.

use std::path::Path;
use std::sync::Mutex;

use testing::Server;
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

use super::Program;
use super::observations::{Observation, Observer, populate};

/// A difference, and why it is one. In the first three fields, `*` stands for any text.
struct Difference {
    request: &'static str,
    ringfsd: &'static str,
    virtiofsd: &'static str,
    why: &'static str,
}

macro_rules! differences {
    ($($request:literal: $ringfsd:literal, $virtiofsd:literal; $why:literal;)+) => {
        /// What a guest sees of ringfsd that it doesn't see of virtiofsd.
        const DIFFERENCES: &[Difference] = &[$(Difference {
            request: $request,
            ringfsd: $ringfsd,
            virtiofsd: $virtiofsd,
            why: $why,
        }),+];
    };
}

differences! {
    "*INIT minor": "45", "38"; "it knows later requests";
    "*INIT max_background": "128", "65535"; "more wait in the guest than a queue has room for";
    "*INIT congestion_threshold": "96", "49149"; "three quarters of max_background";
    "old guest: INIT max_pages": "0", "256"; "a guest without MAX_PAGES doesn't read it";
    "*INIT ATOMIC_O_TRUNC": "off", "on"; "the guest's SETATTR carries what O_TRUNC can't";
    "*INIT EXPORT_SUPPORT": "on", "off"; "a guest can export the directory by NFS";
    "*INIT DONT_MASK": "on", "off"; "the server masks where there is no default ACL";
    "*INIT HAS_IOCTL_DIR": "off", "on"; "virtiofsd has no ioctl either";
    "*INIT CACHE_SYMLINKS": "on", "off"; "a target never changes";
    "*INIT SUBMOUNTS": "off", "on"; "none is announced";
    "*: time-outs": "*attributes (0, 0)", "*attributes (*, 0)";
        "set-ID bits go when the file is written, unknown to the guest";
    "LOOKUP of a path*": "*", "*"; "no kernel asks for it; it would leave the directory";
    "GETATTR of no inode": "ESTALE", "EBADF"; "as the host's kernel says of a stale handle";
    "READLINK of a file": "EINVAL", "ENOENT"; "as readlink(2) says";
    "OPEN of a directory": "EISDIR", "flags *"; "no kernel asks for it";
    "OPEN of a link": "ELOOP", "EBADF"; "as open(2) says";
    "WRITE *": "EBADF", "EROFS"; "as write(2) says";
    "LSEEK SEEK_*": "EINVAL", "*"; "no kernel asks for it";
    "COPY_FILE_RANGE_64*": "4096", "ENOSYS"; "it copies more than 4 GiB at once";
    "IOCTL": "done", "ENOSYS"; "attributes of chattr(1)";
    "GETATTR of the * program": "100755 *", "106755 *"; "the request asks to clear set-ID bits";
    "SETATTR of the size with KILL_SUIDGID": "100755 *", "106755 *";
        "the request asks to clear set-ID bits";
    "LINK": "100755 *", "106755 *"; "of the file before";
    "MKNOD of a device*": "*", "EPERM";
        "the guest's kernel has checked the user; virtiofsd loses its own capability";
    "MKNOD of a device*: time-outs": "name *", "none"; "as above";
    "READDIR": "*device*", "*"; "as above";
    "READDIRPLUS": "*device*", "*"; "as above";
    "TMPFILE*": "*", "ENOSYS"; "O_TMPFILE works";
    "TMPFILE*: time-outs": "name *", "none"; "as above";
    "CREATE in \"setgid\"": "106755 *", "104755 *"; "with mapped ids the guest's kernel decides";
    "STATX": "*", "ENOSYS"; "it has the time of birth";
    "RENAME2 of another kind": "EINVAL", "*"; "as renameat2(2) says";
    "*": "EPERM", "errno 5"; "an id is forbidden, which is no input/output error";
    "LISTXATTR of the size": "7", "28"; "the size of what the guest gets";
    "*": "EPERM", "EINVAL"; "an id that the server's user namespace doesn't have";
    "* in \"*\"": "*65534:*", "E*"; "a server of an ordinary user creates files as that user";
    "* in \"*\"": "* 0:*", "EINVAL"; "as above, where that user is root in the guest";
    "* in \"*\": time-outs": "name *", "none"; "as above";
    "CREATE: flags in *": "Some(*", "None"; "as above";
}

/// What is compared: options besides the socket and the directory, separated by spaces.
const SPELLINGS: &[&str] = &[
    "",
    "-f",
    "-d",
    "--xattr",
    "--readonly",
    "--announce-submounts",
    "--no-announce-submounts",
    "--allow-mmap",
    "--no-readdirplus",
    "--writeback",
    "--allow-direct-io",
    "--killpriv-v2",
    "--no-killpriv-v2",
    "--killpriv-v2 --xattr",
    "--preserve-noatime",
    "--migration-verify-handles",
    "--migration-confirm-paths",
    "--migration-mode=file-handles",
    "--migration-on-error=guest-error",
    "--cache=auto",
    "--cache=always",
    "--cache=never",
    "--cache=metadata",
    "--cache=never --writeback",
    "--cache=never --allow-mmap",
    "--cache=metadata --allow-mmap",
    "--cache=always --no-readdirplus",
    "--sandbox=chroot",
    "--sandbox=none",
    "--seccomp=none",
    "--seccomp=log",
    "--seccomp=trap",
    "--inode-file-handles=never",
    "--inode-file-handles=prefer",
    "--inode-file-handles=fallback",
    "--inode-file-handles=mandatory",
    "--posix-acl",
    "--posix-acl=auto",
    "--posix-acl=never",
    "--security-label",
    "--security-label=auto",
    "--security-label=never",
    "--thread-pool-size=0",
    "--thread-pool-size=4",
    "--rlimit-nofile=4096",
    "--tag=t",
    "--modcaps=-mknod",
    "--modcaps=+sys_admin",
    "--xattrmap=:map::user.virtiofs.:",
    "--xattrmap=:prefix:all::user.virtiofs.::bad:all:::",
    "--translate-uid=map:0:1000:1 --translate-gid=map:0:1000:1",
    "--translate-uid=guest:0:5000:2000",
    "--translate-uid=host:0:5000:2000",
    "--translate-uid=squash-guest:0:1000:10",
    "--translate-uid=squash-host:0:1000:10",
    "--translate-uid=forbid-guest:1000:1",
    "--translate-gid=forbid-guest:0:0",
    "-o xattr",
    "-o no_xattr",
    "--no-readdirplus -o readdirplus",
    "-o no_readdirplus",
    "-o writeback",
    "--writeback -o no_writeback",
    "-o allow_direct_io",
    "--allow-direct-io -o no_allow_direct_io",
    "-o announce_submounts",
    "-o killpriv_v2",
    "--killpriv-v2 -o no_killpriv_v2",
    "-o posix_acl",
    "--posix-acl -o no_posix_acl",
    "-o security_label",
    "--security-label -o no_security_label",
    "-o no_posix_lock,no_flock",
    "-o xattrmap=:map::user.virtiofs.:",
    "-o cache=auto",
    "-o cache=always",
    "-o cache=none",
    "-o cache=metadata",
    "-o sandbox=namespace",
    "-o sandbox=chroot",
    "-o modcaps=-mknod",
    "-o loglevel=debug",
];

/// What is compared of a server that an ordinary user starts.
const SPELLINGS_OF_USERS: &[&str] = &[
    "",
    "--xattr",
    "--sandbox=none",
    "--uid-map=:0:65534:1: --gid-map=:0:65534:1:",
];

/// Whether a text is what a pattern says.
fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// The numbers of the rows of [`DIFFERENCES`] that explain how two guests' views differ.
///
/// # Panics
///
/// If something is unexplained.
pub(super) fn explain(what: &str, ours: &[Observation], theirs: &[Observation]) -> Vec<usize> {
    let mut rows = Vec::new();
    let mut unexplained = Vec::new();
    for ((request, ours), (same, theirs)) in ours.iter().zip(theirs) {
        assert_eq!(request, same, "{what}: not the same requests");
        if ours == theirs {
            continue;
        }
        let row = DIFFERENCES.iter().position(|row| {
            fits(row.request, request) && fits(row.ringfsd, ours) && fits(row.virtiofsd, theirs)
        });
        match row {
            Some(row) => rows.push(row),
            None => unexplained.push(format!("{request}: {ours}, virtiofsd: {theirs}")),
        }
    }
    let longer = ours.iter().zip(theirs).count();
    unexplained.extend(ours.iter().skip(longer).map(|(request, _)| request.clone()));
    unexplained.extend(
        theirs
            .iter()
            .skip(longer)
            .map(|(request, _)| request.clone()),
    );
    assert!(unexplained.is_empty(), "{what}: {unexplained:#?}");
    rows
}

/// What a guest sees of a server with these arguments, which this user starts, or root.
fn observe(program: &Program, arguments: &str, user: Option<u32>) -> Vec<Observation> {
    let (mut command, dir) = match user {
        None => program.command_in_place(),
        Some(user) => program.command_in_place_as(user),
    };
    populate(&dir.path().join("share"));
    command.args(arguments.split(' ').filter(|argument| !argument.is_empty()));
    command.env("RUST_LOG", "info");
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    let session = Profile::Qemu.connect(server.connect(), &Options::default());
    Observer::new(session.unwrap()).observe(Path::new("/"))
}

/// As [`observe`], for virtiofsd, whose lookups fail with `EAGAIN` while anything is mounted or renamed
/// on the host (`openat2(2)`, `RESOLVE_IN_ROOT`), as other tests do.
fn observe_undisturbed(program: &Program, arguments: &str, user: Option<u32>) -> Vec<Observation> {
    const TRIES: usize = 10;
    let mut seen = observe(program, arguments, user);
    for _ in 1..TRIES {
        if !seen.iter().any(|(_, reply)| reply.contains("errno 11")) {
            break;
        }
        seen = observe(program, arguments, user);
    }
    seen
}

#[test]
fn guest_sees_with_each_option_what_virtiofsd_shows_it() {
    let Some(virtiofsd) = Program::virtiofsd() else {
        return;
    };
    if !testing::is_root() {
        return;
    }
    let found = &Mutex::new(vec![false; DIFFERENCES.len()]);
    let virtiofsd = &virtiofsd;
    let of_root = SPELLINGS.iter().map(|spelling| (*spelling, None));
    let of_users = SPELLINGS_OF_USERS.iter();
    let of_users = of_users.map(|spelling| (*spelling, Some(testing::USER)));
    let all: Vec<_> = of_root.chain(of_users).collect();
    std::thread::scope(|scope| {
        for part in all.chunks(all.len().div_ceil(4)) {
            scope.spawn(move || {
                for (spelling, user) in part {
                    let ours = observe(&Program::persona(), spelling, *user);
                    let theirs = observe_undisturbed(virtiofsd, spelling, *user);
                    for row in explain(spelling, &ours, &theirs) {
                        found.lock().unwrap()[row] = true;
                    }
                }
            });
        }
    });
    for (row, found) in DIFFERENCES.iter().zip(&*found.lock().unwrap()) {
        let (request, why) = (row.request, row.why);
        assert!(found, "{request} no longer differs: {why}");
    }
}

#[test]
fn acls_are_hidden_as_in_virtiofsd_unless_the_guest_enforces_them() {
    // An access ACL: owner, user 1000, group, mask and others.
    let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\
        \x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let name = c"system.posix_acl_access";
    let persona = Program::persona();
    for (program, arguments, seen) in [
        (&persona, "--xattr", false),
        (&persona, "--posix-acl=auto", true),
        (&Program::own(), "--xattr", true),
    ] {
        let server = program.serve(&[arguments]);
        let file = server.share().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(testing::set_on_host(&file, "user.x", b"1"));
        if !testing::set_on_host(&file, name.to_str().unwrap(), acl) {
            println!("SKIPPED: the file system has no ACLs");
            return;
        }
        let mut fs = server.session(Profile::Qemu, &Options::default());
        let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
        let hidden = (!seen).then_some(libc::EOPNOTSUPP);
        assert_eq!(testing::errno(fs.getxattr(node, name)), hidden);
        assert_eq!(testing::errno(fs.setxattr(node, name, acl, 0)), hidden);
        let names = fs.listxattr(node).unwrap();
        assert_eq!(
            names.iter().any(|listed| **listed == *name),
            seen,
            "{names:?}"
        );
        assert!(
            names.iter().any(|listed| **listed == *c"user.x"),
            "{names:?}"
        );
        let lengths = names.iter().map(|name| name.to_bytes_with_nul().len());
        assert_eq!(
            fs.listxattr_size(node).unwrap() as usize,
            lengths.sum::<usize>()
        );
        assert_eq!(testing::errno(fs.removexattr(node, name)), hidden);
    }
}

#[test]
fn pattern_stands_for_any_text() {
    for (pattern, text) in [
        ("", ""),
        ("*", ""),
        ("*", "x"),
        ("a*", "abc"),
        ("a*c", "abc"),
        ("*b*", "abc"),
        ("a*b*c", "a b c"),
    ] {
        assert!(fits(pattern, text), "{pattern} {text}");
    }
    for (pattern, text) in [
        ("", "x"),
        ("a", "ab"),
        ("a*", "za"),
        ("a*c", "ab"),
        ("a*a", "a"),
    ] {
        assert!(!fits(pattern, text), "{pattern} {text}");
    }
}
