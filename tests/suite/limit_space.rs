//! `--limit-space`: a project quota on an ext4 and an XFS that the tests make. Where the kernel has
//! no such quotas, `integration/guest/quota.sh` runs these tests in a guest.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::process::{Command, Output};

use testing::{Server, errno, in_mounted_image, is_root, make_image, program};
use vmm::fuse::wire::{IoctlIn, opcode};
use vmm::fuse::{Call, Client, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

const MIB: u64 = 1 << 20;

/// The size of the file system: about the smallest that mkfs.xfs makes.
const SIZE: u64 = 320 * MIB;

/// `FS_PROJINHERIT_FL`.
const INHERIT: u32 = 0x2000_0000;

/// `FS_IOC_GETFLAGS`, `FS_IOC_SETFLAGS`, `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR`.
const GET: u32 = 0x8008_6601;
const SET: u32 = 0x4008_6602;
const GET_EXTENDED: u32 = 0x801c_581f;
const SET_EXTENDED: u32 = 0x401c_5820;

/// A file system with quotas: how it is made in a file, and how a directory and all in it is put
/// into a project.
struct Kind {
    name: &'static str,
    mkfs: &'static [&'static str],
    into_project: &'static str,
}

const EXT4: Kind = Kind {
    name: "ext4",
    mkfs: &["mkfs.ext4", "-q", "-F", "-O", "quota,project"],
    into_project: "chattr -R +P -p 4711 \"$0/mnt/share\" && ",
};

const XFS: Kind = Kind {
    name: "xfs",
    mkfs: &["mkfs.xfs", "-q", "-f"],
    into_project: "xfs_io -r -c 'chproj -R 4711' -c 'chattr -R +P' \"$0/mnt/share\" && ",
};

/// Makes a file system in a file. Returns whether this machine can mount it with project quotas.
fn image(dir: &Path, kind: &Kind) -> bool {
    if !is_root() {
        return false;
    }
    let made = make_image(dir, kind.mkfs, SIZE);
    let mounted = made.map(|()| in_mount(dir, kind, "prjquota", "true").output().unwrap());
    let can = mounted.as_ref().is_ok_and(|it| it.status.success());
    if !can {
        let name = kind.name;
        println!("SKIPPED: {name} with project quotas can't be made or mounted: {mounted:?}");
    }
    can
}

/// A shell that runs `script` where the image is mounted, with the directory `share` in it.
fn in_mount(dir: &Path, kind: &Kind, options: &str, script: &str) -> Command {
    let script = format!("mkdir -p \"$0/mnt/share\" && {script}");
    in_mounted_image(dir, kind.name, options, &script)
}

/// A shell that runs a server of the share with a limit of 8 MiB and 10 inodes, after `before`.
fn limited(dir: &Path, kind: &Kind, options: &str, before: &str) -> Command {
    let script = format!(
        "{before} exec \"$1\" --socket \"$0/socket\" --shared-dir \"$0/mnt/share\" \
         --limit-space 8M,inodes=10 --sandbox \"$2\" --once"
    );
    let mut command = in_mount(dir, kind, options, &script);
    command.arg(program());
    command
}

/// A guest of such a server.
fn serve(
    dir: tempfile::TempDir,
    kind: &Kind,
    sandbox: &str,
    before: &str,
) -> (Server, Client<Session>) {
    let mut command = limited(dir.path(), kind, "prjquota", before);
    command.arg(sandbox);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    let fs = server.session(Profile::Qemu, &Options::default());
    (server, fs)
}

fn refused(dir: &Path, kind: &Kind, options: &str, before: &str) -> String {
    let mut command = limited(dir, kind, options, before);
    let Output { status, stderr, .. } = command.arg("namespace").output().unwrap();
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

/// Writes until it fails, and returns how much was written and the error.
fn fill(fs: &mut Client<Session>, name: &std::ffi::CStr) -> (u64, Option<i32>) {
    let (file, handle) = fs.create(ROOT, name, 0o644).unwrap();
    let piece = vec![1; 1 << 17];
    let mut size = 0;
    let failed = loop {
        match fs.write(file.nodeid, handle, size, &piece) {
            Ok(written) => size += u64::from(written),
            failed => break errno(failed),
        }
        assert!(size < 16 * MIB, "not limited");
    };
    fs.release(file.nodeid, handle).unwrap();
    (size, failed)
}

fn remove(fs: &mut Client<Session>, name: &std::ffi::CStr) {
    let node = fs.lookup(ROOT, name).unwrap().nodeid;
    fs.unlink(ROOT, name).unwrap();
    fs.forget(node, 2).unwrap();
}

#[test]
fn guest_gets_no_more_than_its_space_and_sees_it() {
    for (kind, sandbox) in [
        (EXT4, "namespace"),
        (EXT4, "chroot"),
        (EXT4, "none"),
        (XFS, "namespace"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        if !image(dir.path(), &kind) {
            continue;
        }
        let (_server, mut fs) = serve(dir, &kind, sandbox, "");
        let space = fs.statfs(ROOT).unwrap();
        assert_eq!(space.blocks * u64::from(space.frsize), 8 * MIB);
        assert_eq!(space.files, 10);
        let (size, failed) = fill(&mut fs, c"large");
        assert!((7 * MIB..=8 * MIB).contains(&size), "{size}");
        let full = matches!(failed, Some(libc::EDQUOT | libc::ENOSPC));
        assert!(full, "{failed:?}");
        assert!(fs.statfs(ROOT).unwrap().bavail < space.bavail / 8);
        // What is freed can be used again.
        remove(&mut fs, c"large");
        let (size, _) = fill(&mut fs, c"again");
        assert!(size > 6 * MIB, "{size}");
        remove(&mut fs, c"again");
        // The directory itself is an inode.
        let made = (0..20).map(|n| {
            let name = std::ffi::CString::new(format!("node{n}")).unwrap();
            errno(fs.mknod(ROOT, &name, libc::S_IFREG | 0o644, 0))
        });
        assert_eq!(made.take_while(Option::is_none).count(), 9);
    }
}

#[test]
fn guest_can_not_leave_its_project() {
    for kind in [EXT4, XFS] {
        let dir = tempfile::tempdir().unwrap();
        if !image(dir.path(), &kind) {
            continue;
        }
        let (_server, mut fs) = serve(dir, &kind, "namespace", "");
        let made = fs.mkdir(ROOT, c"dir", 0o755).unwrap().nodeid;
        let opened = fs.opendir(made).unwrap();
        let mut ioctl = |cmd: u32, data: &[u8], out_size: u32| {
            let asked = IoctlIn {
                fh: opened.fh,
                flags: 0,
                cmd,
                arg: 0,
                in_size: u32::try_from(data.len()).unwrap(),
                out_size,
            };
            let call = Call::new(opcode::IOCTL, made).arg(asked.as_bytes());
            let call = if data.is_empty() {
                call
            } else {
                call.arg(data)
            };
            fs.request(call.reply(16 + out_size))
        };
        let reply = ioctl(GET, &[], 4).unwrap().bytes;
        let flags = u32::from_le_bytes(reply[16..20].try_into().unwrap());
        assert_eq!(flags & INHERIT, INHERIT, "{flags:#x}");
        let without = (flags & !INHERIT).to_le_bytes();
        assert_eq!(errno(ioctl(SET, &without, 0)), Some(libc::EPERM));
        let mut extended = ioctl(GET_EXTENDED, &[], 28).unwrap().bytes[16..].to_vec();
        assert_eq!(extended[1] & 2, 2, "FS_XFLAG_PROJINHERIT");
        assert_ne!(extended[12..16], [0; 4], "the project");
        extended[1] &= !2;
        assert_eq!(errno(ioctl(SET_EXTENDED, &extended, 0)), Some(libc::EPERM));
        // `FS_XFLAG_NOATIME`.
        extended[0] |= 0x40;
        extended[1] |= 2;
        ioctl(SET_EXTENDED, &extended, 0).unwrap();
    }
}

#[test]
fn directory_keeps_its_project() {
    for kind in [EXT4, XFS] {
        let dir = tempfile::tempdir().unwrap();
        if !image(dir.path(), &kind) {
            continue;
        }
        // As an earlier server, or the administrator, has left it.
        let before = format!("mkdir \"$0/mnt/share/sub\" && {}", kind.into_project);
        let (mut server, mut fs) = serve(dir, &kind, "namespace", &before);
        fs.lookup(ROOT, c"sub").unwrap();
        let (_, failed) = fill(&mut fs, c"large");
        assert!(failed.is_some());
        drop(fs);
        server.wait_for("the VMM has disconnected");
        let said = server.said().join("\n");
        assert!(said.contains("project 4711 (that it had)"), "{said}");
    }
}

#[test]
fn what_is_missing_for_a_quota_is_named() {
    let mut other = testing::command();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    other.arg("--socket").arg(dir.join("other"));
    let other = other.args(["--shared-dir=/dev/shm", "--limit-space=1G"]);
    let unknown = other.output().unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    let unknown = String::from_utf8(unknown.stderr).unwrap();
    let missing = unknown.contains("project quotas") || unknown.contains("CAP_SYS_ADMIN");
    assert!(missing, "{unknown}");
    for kind in [EXT4, XFS] {
        if !image(dir, &kind) {
            continue;
        }
        let contents = refused(dir, &kind, "prjquota", "touch \"$0/mnt/share/file\" && ");
        assert!(contents.contains("-R +P"), "{contents}");
        let off = refused(dir, &kind, "defaults", "");
        assert!(off.contains("-o prjquota"), "{off}");
        println!("{contents}{off}");
    }
    let without = ["mkfs.ext4", "-q", "-F", "-O", "^quota,^project"];
    if is_root() && make_image(dir, &without, SIZE).is_ok() {
        let without = refused(dir, &EXT4, "defaults", "");
        assert!(without.contains("mkfs.ext4 -O quota,project"), "{without}");
        println!("{without}");
    }
}
