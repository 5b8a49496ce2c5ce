//! Space that a guest frees is available when it uses it next: on a small tmpfs, most of which the
//! guest fills again and again.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::process::{Command, Stdio};

use testing::{Server, each_runtime};
use vmm::fuse::wire::{CopyFileRangeIn, ReleaseIn, opcode};
use vmm::fuse::{Call, Client, Handle, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

const MIB: u64 = 1 << 20;

/// How much the share holds, and how many inodes, of which one is the root's.
const SPACE: u64 = 40 * MIB;
const INODES: u64 = 8;

/// What a file takes, so that there is no room for two.
const LARGE: u64 = 36 * MIB;

const ROUNDS: u32 = 40;

/// A server in a mount namespace of its own, where its share is a tmpfs.
fn on_small_tmpfs(runtime: &str, args: &[&str]) -> Option<Server> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: to mount a tmpfs needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let mount = format!(
        "mount -t tmpfs -o size={SPACE},nr_inodes={INODES} tmpfs \"$1\" && shift && exec \"$@\""
    );
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &mount, "sh"])
        .arg(&share)
        .arg(testing::program())
        .env_remove("RINGFSD_LOG")
        .stdin(Stdio::null())
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--shared-dir")
        .arg(&share)
        .args(["--log-level", "info", "--runtime", runtime])
        .args(["--request-queues", "2", "--workers", "2"])
        .args(args);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    Some(server)
}

/// Writes until the file has so many bytes.
fn fill(fs: &mut Client<Session>, node: u64, handle: Handle, size: u64) {
    let piece = vec![1; usize::try_from(MIB).unwrap()];
    for at in (0..size).step_by(piece.len()) {
        let written = fs.write(node, handle, at, &piece);
        assert_eq!(u64::from(written.unwrap()), MIB, "at {at}");
    }
}

/// What a guest's kernel does when a program removes a file that is not open: it doesn't wait for
/// the FORGET.
fn remove(fs: &mut Client<Session>, name: &std::ffi::CStr, node: u64, lookups: u64) {
    fs.unlink(ROOT, name).unwrap();
    let forget = Call::new(opcode::FORGET, node);
    let _unanswered = fs.submit(forget.arg(&lookups.to_le_bytes())).unwrap();
}

/// RELEASE, which a guest's kernel doesn't wait for either, on another queue than the rest.
fn close(fs: &mut Client<Session>, node: u64, handle: Handle) {
    let asked = ReleaseIn {
        fh: handle.fh,
        ..ReleaseIn::default()
    };
    let release = Call::new(opcode::RELEASE, node).arg(asked.as_bytes());
    let _uncollected = fs.submit(release.reply(0).on_queue(2)).unwrap();
}

fn free(fs: &mut Client<Session>) -> u64 {
    let told = fs.statfs(ROOT).unwrap();
    told.bfree * u64::from(told.frsize)
}

#[each_runtime]
fn write_after_remove_finds_freed_space(runtime: &str) {
    for args in [&[][..], &["--no-open"], &["--inode-file-handles=prefer"]] {
        let Some(server) = on_small_tmpfs(runtime, args) else {
            return;
        };
        let queues = Options::default().request_queues(2);
        let mut fs = server.session(Profile::Simple, &queues);
        for _ in 0..ROUNDS {
            let (made, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
            fill(&mut fs, made.nodeid, handle, LARGE);
            close(&mut fs, made.nodeid, handle);
            // One that was put by for who opens it again.
            let handle = fs.open(made.nodeid, libc::O_RDONLY);
            if let Ok(handle) = handle {
                fs.read(made.nodeid, handle, 0, 10).unwrap();
                close(&mut fs, made.nodeid, handle);
            }
            remove(&mut fs, c"file", made.nodeid, 1);
        }
    }
}

#[each_runtime]
fn statfs_after_remove_counts_freed_space(runtime: &str) {
    let Some(server) = on_small_tmpfs(runtime, &[]) else {
        return;
    };
    let mut fs = server.session(Profile::Simple, &Options::default().request_queues(2));
    let before = free(&mut fs);
    for _ in 0..ROUNDS {
        let (made, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        fill(&mut fs, made.nodeid, handle, LARGE);
        close(&mut fs, made.nodeid, handle);
        remove(&mut fs, c"file", made.nodeid, 1);
        assert_eq!(free(&mut fs), before);
    }
}

/// Whatever takes space or an inode finds what the guest has just freed.
#[each_runtime]
fn allocating_operations_find_freed_space(runtime: &str) {
    let Some(server) = on_small_tmpfs(runtime, &[]) else {
        return;
    };
    let mut fs = server.session(Profile::Simple, &Options::default());
    let (other, from) = fs.create(ROOT, c"other", 0o644).unwrap();
    fill(&mut fs, other.nodeid, from, MIB);
    let (to, into) = fs.create(ROOT, c"to", 0o644).unwrap();
    for round in 0..ROUNDS {
        let (made, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        fill(&mut fs, made.nodeid, handle, LARGE);
        let (rest, filling) = fs.create(ROOT, c"rest", 0o644).unwrap();
        let left = free(&mut fs);
        fs.fallocate(rest.nodeid, filling, 0, 0..left).unwrap();
        fs.release(rest.nodeid, filling).unwrap();
        fs.release(made.nodeid, handle).unwrap();
        remove(&mut fs, c"file", made.nodeid, 1);
        match round % 2 {
            0 => fs.fallocate(to.nodeid, into, 0, 0..LARGE / 2).unwrap(),
            _ => {
                let asked = CopyFileRangeIn {
                    fh_in: from.fh,
                    off_in: 0,
                    nodeid_out: to.nodeid,
                    fh_out: into.fh,
                    off_out: 0,
                    len: MIB,
                    flags: 0,
                };
                let copied = fs.copy_file_range(other.nodeid, &asked).unwrap();
                assert_eq!(u64::from(copied), MIB);
            }
        }
        fs.truncate(to.nodeid, 0).unwrap();
        remove(&mut fs, c"rest", rest.nodeid, 1);
    }

    // Inodes: all but one are taken, and that one is freed before it is taken again.
    let mut made = 0;
    while fs.mknod(ROOT, &name(made), 0o10_0644, 0).is_ok() {
        made += 1;
    }
    assert!(made > 1);
    for round in 0..ROUNDS {
        let free = fs.lookup(ROOT, &name(0)).unwrap().nodeid;
        remove(&mut fs, &name(0), free, 100);
        match round % 4 {
            0 => drop(fs.mkdir(ROOT, c"new", 0o755).unwrap()),
            1 => drop(fs.symlink(ROOT, c"new", c"to").unwrap()),
            2 => drop(fs.mknod(ROOT, c"new", 0o10_0644, 0).unwrap()),
            _ => {
                let (made, handle) = fs.create(ROOT, c"new", 0o644).unwrap();
                fs.release(made.nodeid, handle).unwrap();
            }
        }
        let new = fs.lookup(ROOT, c"new").unwrap().nodeid;
        if round % 4 == 0 {
            fs.rmdir(ROOT, c"new").unwrap();
        } else {
            fs.unlink(ROOT, c"new").unwrap();
        }
        fs.forget(new, 100).unwrap();
        fs.mknod(ROOT, &name(0), 0o10_0644, 0).unwrap();
    }
}

fn name(number: usize) -> std::ffi::CString {
    std::ffi::CString::new(format!("inode{number}")).unwrap()
}

/// What doesn't fit is refused all the same, and what does fit is written.
#[each_runtime]
fn write_beyond_free_space_is_enospc(runtime: &str) {
    let Some(server) = on_small_tmpfs(runtime, &[]) else {
        return;
    };
    let mut fs = server.session(Profile::Simple, &Options::default());
    let (made, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    let room = free(&mut fs);
    let whole = (room - MIB) / MIB * MIB;
    fill(&mut fs, made.nodeid, handle, whole);
    fs.fallocate(made.nodeid, handle, 0, whole..room - 4096)
        .unwrap();
    let refused = fs
        .fallocate(made.nodeid, handle, 0, 0..SPACE + MIB)
        .unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ENOSPC));
    let piece = vec![1; 8192];
    let written = fs.write(made.nodeid, handle, room - 4096, &piece).unwrap();
    assert_eq!(written, 4096, "as far as there is room");
    let refused = fs.write(made.nodeid, handle, room, &piece).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ENOSPC));
}
