//! Operations that few programs use, over the socket, with their effect on the host.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use testing::{Server, each_runtime, errno};
use vmm::fuse::wire::{IoctlIn, IoctlOut, init, opcode, request_flag};
use vmm::fuse::{Call, Client, FuseError, Handle, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::{FromBytes, IntoBytes};

type Guest = Client<Session>;

const GET: u32 = 0x8008_6601;
const SET: u32 = 0x4008_6602;
const GET_EXTENDED: u32 = 0x801c_581f;
const SET_EXTENDED: u32 = 0x401c_5820;

fn start(runtime: &str) -> (Server, Guest) {
    start_with(&["--runtime", runtime])
}

fn start_with(args: &[&str]) -> (Server, Guest) {
    let server = Server::start(args);
    let fs = server.session(Profile::Simple, &Options::default());
    (server, fs)
}

#[each_runtime]
fn tmpfile_is_written_and_linked(runtime: &str) {
    let (server, mut fs) = start(runtime);
    fs.act_as(1000, 100);
    let (file, handle) = fs.tmpfile(ROOT, 0o640).unwrap();
    assert_eq!((file.attr.nlink, file.attr.mode & 0o777), (0, 0o640));
    assert_eq!((file.attr.uid, file.attr.gid), (1000, 100));
    assert_eq!(std::fs::read_dir(server.share()).unwrap().count(), 0);
    fs.write(file.nodeid, handle, 0, b"nameless").unwrap();
    assert_eq!(fs.link(file.nodeid, ROOT, c"named").unwrap().attr.nlink, 1);
    fs.release(file.nodeid, handle).unwrap();
    let named = server.share().join("named");
    assert_eq!(std::fs::read(named).unwrap(), b"nameless");
    let (file, _) = fs.create(ROOT, c"file", 0o600).unwrap();
    assert_eq!(errno(fs.tmpfile(file.nodeid, 0o600)), Some(libc::ENOTDIR));
}

#[each_runtime]
fn trusted_attributes_are_read_set_and_listed(runtime: &str) {
    let (server, mut fs) = start_with(&["--runtime", runtime, "--modcaps=+sys_admin"]);
    let (file, _) = fs.create(ROOT, c"file", 0o600).unwrap();
    let path = server.share().join("file");
    if !testing::set_on_host(&path, "trusted.host", b"one") {
        eprintln!("skipped: trusted attributes take CAP_SYS_ADMIN and a file system that has them");
        return;
    }
    assert_eq!(fs.getxattr(file.nodeid, c"trusted.host").unwrap(), b"one");
    fs.setxattr(file.nodeid, c"trusted.guest", b"two", 0)
        .unwrap();
    let mut names = fs.listxattr(file.nodeid).unwrap();
    names.sort();
    assert_eq!(names, [c"trusted.guest", c"trusted.host"]);
    let mut value = [0; 8];
    let length = rustix::fs::getxattr(&path, "trusted.guest", &mut value[..]).unwrap();
    assert_eq!(value[..length], *b"two");
    fs.removexattr(file.nodeid, c"trusted.host").unwrap();
    assert_eq!(fs.listxattr(file.nodeid).unwrap(), [c"trusted.guest"]);
}

#[each_runtime]
fn statx_returns_birth_time(runtime: &str) {
    let (server, mut fs) = start(runtime);
    let (file, handle) = fs.create(ROOT, c"file", 0o600).unwrap();
    fs.write(file.nodeid, handle, 0, b"four").unwrap();
    let told = fs.statx(file.nodeid, 0xfff).unwrap().stat;
    let host = std::fs::metadata(server.share().join("file")).unwrap();
    assert_eq!((told.size, told.ino, told.nlink), (4, file.attr.ino, 1));
    assert_eq!(u32::from(told.mode), libc::S_IFREG | 0o600);
    match host.created() {
        Ok(born) => {
            let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
            assert_eq!(told.btime.tv_sec.cast_unsigned(), born.as_secs());
            assert_eq!(told.mask & libc::STATX_BTIME, libc::STATX_BTIME);
        }
        Err(_) => assert_eq!(told.mask & libc::STATX_BTIME, 0),
    }
}

#[each_runtime]
fn the_whole_file_system_is_synced(runtime: &str) {
    let (_server, mut fs) = start(runtime);
    let (file, handle) = fs.create(ROOT, c"file", 0o600).unwrap();
    fs.write(file.nodeid, handle, 0, b"data").unwrap();
    fs.syncfs(ROOT).unwrap();
    assert_eq!(errno(fs.syncfs(4711)), Some(libc::ESTALE));
}

fn ioctl(fs: &mut Guest, node: u64, fh: Handle, cmd: u32, data: &[u8], out: u32) -> Answer {
    let asked = IoctlIn {
        fh: fh.fh,
        flags: 0,
        cmd,
        arg: 0,
        in_size: u32::try_from(data.len()).unwrap(),
        out_size: out,
    };
    let call = Call::new(opcode::IOCTL, node).arg(asked.as_bytes());
    let call = if data.is_empty() {
        call
    } else {
        call.arg(data)
    };
    let reply = fs.request(call.reply(16 + out));
    reply.map(|reply| {
        let (head, data) = IoctlOut::read_from_prefix(&reply.bytes).unwrap();
        assert_eq!((head.result, head.flags), (0, 0));
        data.to_vec()
    })
}

type Answer = Result<Vec<u8>, FuseError>;

#[each_runtime]
fn ioctl_supports_only_inode_flags(runtime: &str) {
    const NO_DUMP: u32 = 0x40;

    let (_server, mut fs) = start(runtime);
    let (file, handle) = fs.create(ROOT, c"file", 0o600).unwrap();
    let node = file.nodeid;
    for (cmd, data, out) in [
        (0x5401, &b""[..], 64),
        (0x8004_6601, b"", 4),
        (GET, b"", 5),
        (SET, b"x", 0),
        (GET_EXTENDED, b"", 27),
        (0xc020_660b, &[0; 32], 32),
    ] {
        let refused = ioctl(&mut fs, node, handle, cmd, data, out);
        assert_eq!(errno(refused), Some(libc::ENOTTY), "{cmd:#x}");
    }
    let unknown = ioctl(&mut fs, node, Handle::raw(4711), GET, b"", 4);
    assert_eq!(errno(unknown), Some(libc::EBADF));

    let flags = match ioctl(&mut fs, node, handle, GET, b"", 4) {
        Ok(flags) => u32::read_from_bytes(&flags).unwrap(),
        // The host's file system has none.
        Err(error) => {
            let none = [Some(libc::ENOTTY), Some(libc::EOPNOTSUPP)];
            assert!(none.contains(&error.errno()), "{error}");
            return;
        }
    };
    let set = (flags | NO_DUMP).to_ne_bytes();
    if ioctl(&mut fs, node, handle, SET, &set, 0).is_ok() {
        let now = ioctl(&mut fs, node, handle, GET, b"", 8).unwrap();
        assert_eq!(now[..4], set);
    }
    if let Ok(mut extended) = ioctl(&mut fs, node, handle, GET_EXTENDED, b"", 28) {
        ioctl(&mut fs, node, handle, SET_EXTENDED, &extended, 0).unwrap();
        extended[12] ^= 1;
        let project = ioctl(&mut fs, node, handle, SET_EXTENDED, &extended, 0);
        assert_eq!(errno(project), Some(libc::EPERM));
    }
}

#[each_runtime]
fn lookup_of_dots_with_export_support_succeeds(runtime: &str) {
    let (server, mut fs) = start(runtime);
    assert!(fs.has(init::EXPORT_SUPPORT));
    let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    let (file, _) = fs.create(dir.nodeid, c"file", 0o600).unwrap();

    let itself = fs.lookup(file.nodeid, c".").unwrap();
    assert_eq!(
        (itself.nodeid, itself.attr.ino),
        (file.nodeid, file.attr.ino)
    );
    assert_eq!(fs.lookup(dir.nodeid, c"..").unwrap().nodeid, ROOT);
    assert_eq!(fs.lookup(ROOT, c"..").unwrap().nodeid, ROOT);
    assert_eq!(errno(fs.lookup(file.nodeid, c"..")), Some(libc::ENOTDIR));

    // Counted as any lookup; after all are forgotten, the node doesn't exist any more.
    fs.forget(file.nodeid, 1).unwrap();
    fs.lookup(file.nodeid, c".").unwrap();
    fs.forget(file.nodeid, 2).unwrap();
    let stale = (0..1000).find_map(|_| fs.lookup(file.nodeid, c".").err());
    assert_eq!(stale.unwrap().errno(), Some(libc::ESTALE));

    // What leaves the shared directory on the host has no parent that the guest may see.
    let outside = server.share().with_file_name("outside");
    std::fs::rename(server.share().join("dir"), outside).unwrap();
    assert_eq!(errno(fs.lookup(dir.nodeid, c"..")), Some(libc::ESTALE));
    fs.lookup(dir.nodeid, c".").unwrap();
}

#[each_runtime]
fn poll_is_enosys(runtime: &str) {
    let (_server, mut fs) = start(runtime);
    let asked = [0; 24];
    let call = Call::new(opcode::POLL, ROOT).arg(&asked).reply(8);
    // After this a guest asks no more: regular files are always ready.
    assert_eq!(errno(fs.request(call)), Some(libc::ENOSYS));
}

#[each_runtime]
fn readonly_share_refuses_tmpfile_and_flags(runtime: &str) {
    let (server, mut fs) = start_with(&["--runtime", runtime, "--readonly"]);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    let handle = fs.open(node, libc::O_RDONLY).unwrap();
    let erofs = Some(libc::EROFS);
    assert_eq!(errno(fs.tmpfile(ROOT, 0o600)), erofs);
    // Not even those that are set already, which would change the time.
    let flags = ioctl(&mut fs, node, handle, GET, b"", 4).unwrap_or(vec![0; 4]);
    let extended = ioctl(&mut fs, node, handle, GET_EXTENDED, b"", 28).unwrap_or(vec![0; 28]);
    for (cmd, data) in [(SET, flags), (SET_EXTENDED, extended)] {
        let refused = ioctl(&mut fs, node, handle, cmd, &data, 0);
        assert_eq!(errno(refused), erofs, "{cmd:#x}");
    }
    assert_eq!(fs.statx(node, 0xfff).unwrap().stat.size, 7);
    fs.syncfs(ROOT).unwrap();
    assert_eq!(fs.lookup(ROOT, c"..").unwrap().nodeid, ROOT);
}

#[each_runtime]
fn owners_are_translated(runtime: &str) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root, to create for others");
        return;
    }
    let (server, mut fs) = start_with(&[
        "--runtime",
        runtime,
        "--translate-uid=map:0:70000:1000",
        "--translate-uid=forbid-guest:5000:1",
        "--translate-gid=squash-guest:100:80000:10",
        "--translate-gid=squash-host:80000:7:1",
    ]);
    // Later kernels decide by themselves who may keep a set-group-ID bit.
    fs.init_offering(vmm::fuse::LINUX_OFFERS & !init::ALLOW_IDMAP)
        .unwrap();
    fs.act_as(5, 105);
    let (file, _) = fs.tmpfile(ROOT, 0o640).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (5, 7));
    fs.link(file.nodeid, ROOT, c"named").unwrap();
    let named = std::fs::metadata(server.share().join("named")).unwrap();
    assert_eq!((named.uid(), named.gid()), (70005, 80000));
    let told = fs.statx(file.nodeid, 0xfff).unwrap().stat;
    assert_eq!((told.uid, told.gid), (5, 7));

    let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    let below = fs.mkdir(dir.nodeid, c"below", 0o755).unwrap();
    for (node, name) in [(below.nodeid, c".."), (dir.nodeid, c".")] {
        let found = fs.lookup(node, name).unwrap();
        assert_eq!(found.nodeid, dir.nodeid);
        assert_eq!((found.attr.uid, found.attr.gid), (5, 7));
    }

    // Who is in the group of a set-group-ID directory is told by the host's ids.
    let host = server.share().join("dir");
    chown(&host, None, Some(80000)).unwrap();
    std::fs::set_permissions(&host, PermissionsExt::from_mode(0o2777)).unwrap();
    for (gid, mode) in [(105, 0o2750), (7, 0o750)] {
        fs.act_as(5, gid);
        let (file, _) = fs.tmpfile(dir.nodeid, 0o2750).unwrap();
        assert_eq!((file.attr.mode & 0o7777, file.attr.gid), (mode, 7));
    }

    fs.act_as(5000, 0);
    assert_eq!(errno(fs.tmpfile(ROOT, 0o600)), Some(libc::EPERM));
}

#[each_runtime]
fn tmpfile_mode_equals_mode_of_named_file(runtime: &str) {
    // A user's and a group's rights, a mask, and none for others.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, rights) in [(1u16, 7u16), (4, 5), (16, 6), (32, 0)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(rights.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    let (server, mut fs) = start_with(&["--runtime", runtime, "--posix-acl", "--killpriv-v2"]);
    fs.act_as(1000, 100);
    fs.set_umask(0o027);
    for with_acl in [false, true] {
        let set = |acl| testing::set_on_host(&server.share(), "system.posix_acl_default", acl);
        if with_acl && !set(&acl) {
            println!("SKIPPED: the file system of the tests has no ACLs");
            return;
        }
        for mode in [0o666, 0o777, 0o4755, 0o2775] {
            let (file, _) = fs.create(ROOT, c"file", mode).unwrap();
            let (nameless, _) = fs.tmpfile(ROOT, mode).unwrap();
            let expected = if with_acl {
                mode & 0o7760
            } else {
                mode & !0o027
            };
            assert_eq!(file.attr.mode & 0o7777, expected, "{mode:o}");
            assert_eq!(nameless.attr.mode, file.attr.mode, "{mode:o}");
            fs.unlink(ROOT, c"file").unwrap();
        }
    }
}

#[test]
fn lookup_of_dots_never_enters_submount() {
    // A guest asks from within the mount that it shows there; a mark would make it another.
    let server = Server::start_sharing(std::path::Path::new("/"), &[]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    let proc = fs.lookup(ROOT, c"proc").unwrap();
    assert_eq!(proc.attr.flags, request_flag::ATTR_SUBMOUNT);
    let below = fs.lookup(proc.nodeid, c"sys").unwrap();
    for (from, name, to) in [
        (proc.nodeid, c".", proc.nodeid),
        (below.nodeid, c"..", proc.nodeid),
        (proc.nodeid, c"..", ROOT),
    ] {
        let found = fs.lookup(from, name).unwrap();
        assert_eq!((found.nodeid, found.attr.flags), (to, 0));
    }
}
