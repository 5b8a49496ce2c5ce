//! The isolation of the server, attacked from the guest's side and inspected from the host's.
//!
//! Each test runs in every sandbox, as root and as an ordinary user. `RINGFSD_RACE_SECONDS` makes
//! the races longer than the gate has time for.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    unsafe_code,
    reason = "a launcher prepares the process before it becomes the server"
)]

mod filter;
mod races;

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};
use rustix::process::Signal;
use testing::{Server, USER, errno, is_root};
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

/// How a server is run.
#[derive(Clone, Copy, Debug)]
struct Setup {
    sandbox: &'static str,
    user: Option<u32>,
}

impl Setup {
    fn start(self, args: &[&str]) -> Server {
        let args = [&["--sandbox", self.sandbox], args].concat();
        println!("{self:?}");
        Server::start_as(self.user, &args)
    }
}

/// All setups that the user of the tests can start.
fn setups() -> Vec<Setup> {
    let setup = |sandbox, user| Setup { sandbox, user };
    if rustix::process::geteuid().is_root() {
        vec![
            setup("namespace", None),
            setup("chroot", None),
            setup("none", None),
            setup("namespace", Some(USER)),
            setup("none", Some(USER)),
        ]
    } else {
        println!("SKIPPED: what root does needs root");
        vec![setup("namespace", None), setup("none", None)]
    }
}

fn session(server: &Server) -> Client<Session> {
    server.session(Profile::Simple, &Options::default())
}

/// A value of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

fn capabilities(pid: u32) -> u64 {
    u64::from_str_radix(&status(pid, "CapEff"), 16).unwrap()
}

/// A directory beside the share, with a secret in it that every user of the host may read.
fn outside(server: &Server) -> PathBuf {
    let outside = server.share().with_file_name("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "outside").unwrap();
    for (path, mode) in [(outside.clone(), 0o777), (outside.join("secret"), 0o666)] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }
    outside
}

/// Whether nothing has been done to it.
fn is_untouched(outside: &Path) -> bool {
    let names: Vec<_> = std::fs::read_dir(outside)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names == ["secret"] && std::fs::read(outside.join("secret")).unwrap() == b"outside"
}

#[test]
fn serving_process_is_in_its_namespaces() {
    let namespace =
        |pid: u32, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    for setup in setups() {
        let server = setup.start(&[]);
        std::fs::write(server.share().join("marker"), "").unwrap();
        let (serving, here) = (server.pid(), std::process::id());
        let own: Vec<_> = ["mnt", "pid", "net", "ipc", "user"]
            .into_iter()
            .filter(|name| namespace(serving, name) != namespace(here, name))
            .collect();
        match (setup.sandbox, setup.user) {
            ("namespace", None) if rustix::process::geteuid().is_root() => {
                assert_eq!(own, ["mnt", "pid", "net", "ipc"]);
            }
            ("namespace", _) => assert_eq!(own, ["mnt", "pid", "net", "ipc", "user"]),
            _ => assert!(own.is_empty(), "{own:?}"),
        }
        // Seen from its root there is the share, mounted so that nothing is run or opened there.
        let root = PathBuf::from(format!("/proc/{serving}/root"));
        assert_eq!(root.join("marker").exists(), setup.sandbox != "none");
        let mounts = std::fs::read_to_string(format!("/proc/{serving}/mountinfo")).unwrap();
        if setup.sandbox == "namespace" {
            assert_eq!(mounts.lines().count(), 1, "{mounts}");
            assert!(mounts.contains("nosuid,nodev,noexec"), "{mounts}");
        }
        assert_eq!(status(serving, "NoNewPrivs"), "1");
        assert_eq!(status(serving, "Seccomp"), "2");
        // What only the host's superuser should do it can't: CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH,
        // CAP_SYS_CHROOT, CAP_SYS_PTRACE, CAP_SETPCAP.
        let dangerous = 1 << 21 | 1 << 2 | 1 << 18 | 1 << 19 | 1 << 8;
        assert_eq!(capabilities(serving) & dangerous, 0);
        let bounding = u64::from_str_radix(&status(serving, "CapBnd"), 16).unwrap();
        if setup.user.is_none() {
            assert_eq!(bounding & dangerous, 0);
        }
    }
}

#[test]
fn names_reach_nothing_outside() {
    for setup in setups() {
        let server = setup.start(&[]);
        let outside = outside(&server);
        let share = server.share();
        symlink(&outside, share.join("link")).unwrap();
        symlink("/proc/self/root", share.join("magic")).unwrap();
        symlink("..", share.join("up")).unwrap();
        std::fs::create_dir_all(share.join("dir/below")).unwrap();
        let mut fs = session(&server);

        for name in [c"link", c"magic", c"up"] {
            let link = fs.lookup(ROOT, name).unwrap();
            assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
            let node = link.nodeid;
            assert_eq!(errno(fs.lookup(node, c"secret")), Some(libc::ENOTDIR));
            assert_eq!(errno(fs.lookup(node, c"outside")), Some(libc::ENOTDIR));
            assert_eq!(errno(fs.create(node, c"new", 0o644)), Some(libc::ENOTDIR));
            assert_eq!(errno(fs.open(node, libc::O_RDONLY)), Some(libc::ELOOP));
            assert_eq!(errno(fs.opendir(node)), Some(libc::ENOTDIR));
            assert!(fs.truncate(node, 0).is_err());
            // Created over, a link is not followed either.
            let created = fs.create_with(ROOT, name, 0o644, libc::O_WRONLY | libc::O_CREAT);
            assert_eq!(errno(created), Some(libc::ELOOP));
        }

        let dir = fs.lookup(ROOT, c"dir").unwrap().nodeid;
        let below = fs.lookup(dir, c"below").unwrap().nodeid;
        assert_eq!(fs.lookup(below, c"..").unwrap().nodeid, dir);
        assert_eq!(fs.lookup(dir, c"..").unwrap().nodeid, ROOT);
        assert_eq!(fs.lookup(ROOT, c"..").unwrap().nodeid, ROOT);
        for node in [ROOT, dir, below] {
            for name in [
                c"../outside/secret",
                c"/etc/passwd",
                c"dir/below",
                c"../outside",
            ] {
                assert!(fs.lookup(node, name).is_err());
                assert!(fs.create(node, name, 0o644).is_err());
                assert!(fs.mkdir(node, name, 0o755).is_err());
                assert!(fs.symlink(node, name, c"target").is_err());
                assert!(fs.unlink(node, name).is_err());
                assert!(fs.rename(ROOT, c"link", node, name).is_err());
                assert!(fs.rename(node, name, ROOT, c"stolen").is_err());
                assert!(fs.link(dir, node, name).is_err());
            }
            for name in [c"..", c"."] {
                assert!(fs.create(node, name, 0o644).is_err());
                assert!(fs.mkdir(node, name, 0o755).is_err());
                assert!(fs.unlink(node, name).is_err());
                assert!(fs.rmdir(node, name).is_err());
                assert!(fs.rename(node, name, ROOT, c"stolen").is_err());
                assert!(fs.rename(ROOT, c"dir", node, name).is_err());
            }
        }
        // Listing the root says of what lies above what it says of itself.
        let handle = fs.opendir(ROOT).unwrap();
        let listed = fs.readdir_all(ROOT, handle).unwrap();
        let number = |name: &str| listed.iter().find(|entry| entry.name == name).unwrap().ino;
        assert_eq!(number(".."), number("."));
        assert!(is_untouched(&outside));
    }
}

#[test]
fn directory_moved_outside_leads_nowhere() {
    for setup in setups() {
        let server = setup.start(&[]);
        let outside = outside(&server);
        std::fs::create_dir(server.share().join("dir")).unwrap();
        let mut fs = session(&server);
        let dir = fs.lookup(ROOT, c"dir").unwrap().nodeid;
        let moved = server.share().with_file_name("moved");
        std::fs::rename(server.share().join("dir"), moved).unwrap();
        assert_eq!(errno(fs.lookup(dir, c"..")), Some(libc::ESTALE));
        assert!(fs.lookup(dir, c"../outside").is_err());
        assert!(is_untouched(&outside));
    }
}

#[test]
fn forged_node_ids_and_handles_are_refused() {
    for setup in setups() {
        let server = setup.start(&["--inode-file-handles", "never"]);
        let outside = outside(&server);
        let number = std::fs::metadata(outside.join("secret")).unwrap().ino();
        let mut fs = session(&server);
        let (known, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        let forged = (0..500_u64).map(|n| known.nodeid + 1 + n);
        let forged = forged.chain([0, number, u64::MAX, 1 << 63, number << 32]);
        for node in forged {
            assert!(fs.getattr(node).is_err(), "{node}");
            assert!(fs.lookup(node, c".").is_err(), "{node}");
            assert!(fs.lookup(node, c"..").is_err(), "{node}");
            assert!(fs.open(node, libc::O_RDONLY).is_err(), "{node}");
            assert!(fs.read(node, handle, 0, 10).is_err(), "{node}");
        }
        for fh in [handle.fh + 1, 0, 3, 4, u64::MAX] {
            let forged = vmm::fuse::Handle::raw(fh);
            if fh != handle.fh {
                assert!(fs.read(known.nodeid, forged, 0, 10).is_err(), "{fh}");
            }
        }
    }
}

#[test]
fn hard_links_reach_nothing_outside() {
    for setup in setups() {
        let server = setup.start(&[]);
        let outside = outside(&server);
        let secret = outside.join("secret");
        symlink(&secret, server.share().join("link")).unwrap();
        let mut fs = session(&server);
        let link = fs.lookup(ROOT, c"link").unwrap().nodeid;
        // A link to a link is one to itself, if anything.
        if fs.link(link, ROOT, c"second").is_ok() {
            let second = std::fs::symlink_metadata(server.share().join("second")).unwrap();
            assert!(second.is_symlink());
        }
        let (file, _) = fs.create(ROOT, c"file", 0o644).unwrap();
        for name in [
            c"../outside/secret",
            c"../outside/second",
            c"..",
            c"/second",
        ] {
            assert!(fs.link(file.nodeid, ROOT, name).is_err());
        }
        for node in [0, 4711, u64::MAX] {
            assert!(fs.link(node, ROOT, c"third").is_err());
        }
        assert_eq!(std::fs::metadata(&secret).unwrap().nlink(), 1, "{setup:?}");
        assert!(is_untouched(&outside));
    }
}

#[test]
fn device_nodes_and_set_user_id_files_give_the_guest_nothing_of_the_host() {
    for setup in setups() {
        let server = setup.start(&[]);
        let mut fs = session(&server);
        let null = 1 << 8 | 3;
        let device = fs.mknod(ROOT, c"device", libc::S_IFCHR | 0o666, null);
        if setup.user.is_none() && rustix::process::geteuid().is_root() {
            // It is there for the guest's own kernel; the server never opens it.
            let node = device.unwrap().nodeid;
            for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
                assert_eq!(errno(fs.open(node, flags)), Some(libc::ENXIO));
            }
        } else {
            assert_eq!(errno(device), Some(libc::EPERM));
        }
        let fifo = fs.mknod(ROOT, c"fifo", libc::S_IFIFO | 0o666, 0).unwrap();
        assert_eq!(
            errno(fs.open(fifo.nodeid, libc::O_RDONLY)),
            Some(libc::ENXIO)
        );

        let (program, _) = fs.create(ROOT, c"program", 0o755).unwrap();
        fs.chmod(program.nodeid, 0o4755).unwrap();
        let made = std::fs::metadata(server.share().join("program")).unwrap();
        assert_eq!(made.mode() & 0o7777, 0o4755);
        if let Some(user) = setup.user {
            // It can become no user of the host but the one that the server runs as.
            assert_eq!(made.uid(), user);
            assert_eq!(errno(fs.chown(program.nodeid, 0, 0)), Some(libc::EPERM));
        }
    }
}

#[test]
fn ids_can_be_mapped_to_others_of_the_host() {
    if !is_root() {
        return;
    }
    let maps = [
        "--uid-map",
        ":0:100000:1000:",
        "--gid-map",
        ":0:100000:1000:",
    ];
    let server = Server::start_as(Some(0), &maps);
    std::os::unix::fs::chown(server.share(), Some(100_000), Some(100_000)).unwrap();
    let roots = server.share().join("roots");
    std::fs::write(&roots, "").unwrap();
    // Other tests of this process may have changed its umask.
    std::fs::set_permissions(&roots, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut fs = session(&server);
    let owner = |name: &str| std::fs::metadata(server.share().join(name)).unwrap().uid();

    fs.create(ROOT, c"by root", 0o644).unwrap();
    assert_eq!(owner("by root"), 100_000);
    let by = |fs: &mut Client<Session>, name: &CStr, uid| {
        fs.act_as(uid, uid);
        let made = fs.mkdir(ROOT, name, 0o755);
        fs.act_as(0, 0);
        made
    };
    by(&mut fs, c"by a user", 7).unwrap();
    assert_eq!(owner("by a user"), 100_007);
    assert_eq!(
        errno(by(&mut fs, c"by a stranger", 1000)),
        Some(libc::EPERM)
    );
    // The host's superuser doesn't exist there, and keeps her files.
    let roots = fs.lookup(ROOT, c"roots").unwrap();
    assert_eq!(roots.attr.uid, 65534);
    assert_eq!(errno(fs.chmod(roots.nodeid, 0o777)), Some(libc::EPERM));
    assert_eq!(
        errno(fs.open(roots.nodeid, libc::O_WRONLY)),
        Some(libc::EACCES)
    );
    // Nor is the process hers.
    assert_eq!(
        status(server.pid(), "Uid"),
        "100000\t100000\t100000\t100000"
    );

    let needless = testing::output(&[
        "--socket=/nowhere/s",
        "--shared-dir=/",
        "--sandbox=none",
        "--uid-map=:0:0:1:",
    ]);
    let said = String::from_utf8_lossy(&needless.stderr).into_owned();
    assert_eq!(needless.status.code(), Some(1), "{said}");
}

#[test]
fn user_without_subids_cannot_map_ids() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = testing::command_as(Some(USER), dir.path());
    let socket = dir.path().join("socket");
    std::os::unix::fs::chown(dir.path(), Some(USER), Some(USER)).unwrap();
    command
        .arg("--socket")
        .arg(&socket)
        .arg("--shared-dir")
        .arg(dir.path());
    let refused = command.args(["--uid-map", ":0:0:1000:"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("/etc/subuid"), "{said}");
    assert!(!socket.exists());
}

#[test]
fn a_user_maps_the_ids_that_the_host_gives() {
    let there = |program: &str| Path::new("/usr/bin").join(program).exists();
    if !is_root() || !there("newuidmap") || !Path::new("/etc/subgid").exists() {
        println!("SKIPPED: needs newuidmap (package uidmap)");
        return;
    }
    // daemon, who has a name on each host; told of in files that only this mount namespace has.
    let dir = tempfile::tempdir().unwrap();
    let (share, socket) = (dir.path().join("share"), dir.path().join("socket"));
    std::fs::create_dir(&share).unwrap();
    let program = dir.path().join("ringfsd");
    testing::copy_program(testing::program(), &program);
    let ids = dir.path().join("ids");
    std::fs::write(&ids, "daemon:200000:1000\n").unwrap();
    for path in [dir.path(), &share] {
        std::os::unix::fs::chown(path, Some(1), Some(1)).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let script = format!(
        "mount --bind {ids} /etc/subuid; mount --bind {ids} /etc/subgid; \
         exec setpriv --reuid 1 --regid 1 --clear-groups {program} --socket {socket} \
         --shared-dir {share} --uid-map :0:1:1: --uid-map :1:200000:999: \
         --gid-map :0:1:1: --gid-map /1/200000/999/",
        ids = ids.display(),
        program = program.display(),
        socket = socket.display(),
        share = share.display(),
    );
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "bash", "-ec", &script]);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    let mut fs = session(&server);
    fs.mkdir(ROOT, c"roots", 0o755).unwrap();
    fs.act_as(5, 5);
    fs.mkdir(ROOT, c"a user's", 0o755).unwrap();
    let owner = |name: &str| std::fs::metadata(share.join(name)).unwrap();
    assert_eq!((owner("roots").uid(), owner("roots").gid()), (1, 1));
    let users = owner("a user's");
    assert_eq!((users.uid(), users.gid()), (200_004, 200_004));
}

#[test]
fn readonly_share_keeps_access_times() {
    for setup in setups() {
        let server = setup.start(&["--readonly"]);
        let share = server.share();
        std::fs::write(share.join("file"), "content").unwrap();
        std::fs::create_dir(share.join("dir")).unwrap();
        symlink("file", share.join("link")).unwrap();
        // So old that any access counts.
        let old = Timestamps {
            last_access: Timespec {
                tv_sec: 1_000_000,
                tv_nsec: 0,
            },
            last_modification: Timespec {
                tv_sec: 2_000_000,
                tv_nsec: 0,
            },
        };
        // Reading a link needs a mount that is read-only, which takes a privilege.
        let mounted = setup.sandbox == "namespace" || setup.user.is_none();
        let names = ["file", "dir", "link"];
        let names = if mounted { &names[..] } else { &names[..2] };
        for name in names {
            let path = share.join(name);
            std::os::unix::fs::lchown(&path, setup.user, setup.user).unwrap();
            rustix::fs::utimensat(CWD, &path, &old, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        }
        let mut fs = session(&server);
        let file = fs.lookup(ROOT, c"file").unwrap().nodeid;
        let handle = fs.open(file, libc::O_RDONLY).unwrap();
        assert_eq!(fs.read(file, handle, 0, 100).unwrap(), b"content");
        assert!(fs.write(file, handle, 0, b"changed").is_err());
        assert!(fs.fallocate(file, handle, 0, 0..8192).is_err());
        let dir = fs.lookup(ROOT, c"dir").unwrap().nodeid;
        let listing = fs.opendir(dir).unwrap();
        fs.readdir_all(dir, listing).unwrap();
        let link = fs.lookup(ROOT, c"link").unwrap().nodeid;
        assert_eq!(fs.readlink(link).unwrap(), b"file");
        for name in names {
            let accessed = std::fs::symlink_metadata(share.join(name)).unwrap().atime();
            assert_eq!(accessed, 1_000_000, "{setup:?}: {name}");
        }
    }
}

#[test]
fn modcaps_adds_and_drops_capabilities() {
    if !is_root() {
        return;
    }
    let needed = capabilities(Server::start(&[]).pid());
    let (mknod, sys_admin, dac_read_search) = (1 << 27, 1 << 21, 1 << 2);
    assert_eq!(needed & (mknod | sys_admin | dac_read_search), mknod);
    let server = Server::start(&["--modcaps=+sys_admin:-CAP_MKNOD"]);
    assert_eq!(capabilities(server.pid()), (needed | sys_admin) & !mknod);
    let mut fs = session(&server);
    let device = fs.mknod(ROOT, c"device", libc::S_IFCHR | 0o666, 1 << 8 | 3);
    assert_eq!(errno(device), Some(libc::EPERM));
    fs.setxattr(ROOT, c"trusted.x", b"1", 0).unwrap();

    let server = Server::start(&["-o", "modcaps=-mknod:-setfcap,sandbox=chroot"]);
    let setfcap = 1 << 31;
    assert_eq!(capabilities(server.pid()), needed & !mknod & !setfcap);
    assert_eq!(
        errno(session(&server).setxattr(ROOT, c"trusted.x", b"1", 0)),
        Some(libc::EPERM)
    );

    // CAP_DAC_OVERRIDE and CAP_FOWNER.
    let server = Server::start(&["--readonly"]);
    assert_eq!(capabilities(server.pid()), 1 << 1 | 1 << 3);
    let server = Server::start(&["--inode-file-handles=prefer"]);
    assert_eq!(capabilities(server.pid()), needed | dac_read_search);

    let unknown = testing::output(&["--socket=/s", "--shared-dir=/", "--modcaps=+fly"]);
    assert_eq!(unknown.status.code(), Some(2));
}

#[test]
fn unavailable_sandbox_error_says_what_to_do() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let without = |capability: &str, sandbox: &str| {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--bounding-set", capability, "--inh-caps=-all"]);
        command.arg(testing::program());
        command.arg("--socket").arg(dir.path().join("socket"));
        command.arg("--shared-dir").arg(dir.path());
        command.args(["--sandbox", sandbox]);
        command
    };
    for (capability, sandbox, hint) in [
        ("-sys_admin", "namespace", "--sandbox chroot"),
        ("-sys_chroot", "chroot", "--sandbox none"),
    ] {
        let refused = without(capability, sandbox).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(said.contains(hint), "{said}");
        assert!(!dir.path().join("socket").exists());
    }
    // What it says helps.
    let mut server = Server::spawn(
        without("-sys_admin", "chroot"),
        tempfile::tempdir().unwrap(),
    );
    server.wait_until_it_listens();
    drop(server);
    let mut server = Server::spawn(without("-all", "none"), tempfile::tempdir().unwrap());
    server.wait_until_it_listens();
}

#[test]
fn seccomp_filter_is_active_by_default() {
    for (action, mode) in [("kill", "2"), ("log", "2"), ("trap", "2"), ("none", "0")] {
        let server = Server::start(&["--seccomp", action]);
        assert_eq!(status(server.pid(), "Seccomp"), mode, "{action}");
        session(&server).getattr(ROOT).unwrap();
    }
}

#[test]
fn vhost_user_messages_make_no_forbidden_call() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut server = Server::start(&[]);
    let (sent, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    // With a descriptor and without, whether it belongs to the message or not.
    for request in 0..48_u32 {
        for (size, with_fd) in [(0_u32, true), (8, true), (8, false), (40, true)] {
            let stream = server.connect();
            // The version of the protocol, and that a reply is wanted.
            let head = [
                request.to_ne_bytes(),
                9_u32.to_ne_bytes(),
                size.to_ne_bytes(),
            ];
            let message = [head.concat(), vec![0; size as usize]].concat();
            let fds = [std::os::fd::AsFd::as_fd(&sent)];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if with_fd {
                ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let bytes = [std::io::IoSlice::new(&message)];
            sendmsg(&stream, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
            drop(stream);
        }
    }
    // Those that still wait in line are served before this one.
    session(&server).getattr(ROOT).unwrap();
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}

#[test]
fn neither_process_outlives_the_other() {
    for setup in setups() {
        // Its own end: the socket goes, and the launcher is told how it was.
        let mut server = setup.start(&[]);
        let serving = i32::try_from(server.pid()).unwrap();
        let serving = rustix::process::Pid::from_raw(serving).unwrap();
        rustix::process::kill_process(serving, Signal::KILL).unwrap();
        assert_eq!(server.wait().signal(), Some(libc::SIGKILL));
        assert!(!server.socket().exists());
        assert!(server.said().iter().any(|line| line.contains("signal 9")));

        // The end of the one that the launcher knows, in the middle of a session.
        let mut server = setup.start(&[]);
        let mut fs = session(&server);
        fs.create(ROOT, c"made", 0o644).unwrap();
        server.signal(Signal::KILL);
        // The end of standard error is the end of both.
        assert_eq!(server.wait().signal(), Some(libc::SIGKILL));
    }
}

#[test]
fn descriptors_that_a_launcher_forgot_stay_outside() {
    let forgotten = std::fs::File::open("/etc").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let mut command = testing::command();
    command.arg("--socket").arg(dir.path().join("socket"));
    command.arg("--shared-dir").arg(&share);
    let number = forgotten.as_raw_fd();
    // Numbers that the server's own would have, and one that they would not.
    let leave_open = move || {
        for to in [3, 5, 90] {
            // SAFETY: takes numbers; the child owns nothing yet that could be replaced.
            if unsafe { libc::dup2(number, to) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only dup2 is called, which is safe there.
    unsafe { command.pre_exec(leave_open) };
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    let targets = |pid: u32| -> BTreeSet<PathBuf> {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .collect()
    };
    // A launcher may wait for them to be closed, so the guardian keeps them.
    assert!(targets(server.guardian()).contains(Path::new("/etc")));
    assert!(!targets(server.pid()).contains(Path::new("/etc")));
}
