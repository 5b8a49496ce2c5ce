//! A request that waits for the disk holds up no other one of its queue: the share is on an ext4 that
//! is frozen meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use testing::{Server, each_runtime, in_mounted_image, is_root, make_image, pattern, program};
use vmm::fuse::wire::{FallocateIn, opcode};
use vmm::fuse::{Call, Client, Handle, Pending, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

/// Starts a server that shares a new ext4, if this machine can make and mount one.
fn start(runtime: &str, workers: &str) -> Option<Server> {
    if !is_root() {
        println!("SKIPPED: only root can mount an ext4");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let made = make_image(dir.path(), &["mkfs.ext4", "-q", "-F"], 32 << 20);
    let in_mount = |script: &str| in_mounted_image(dir.path(), "ext4", "defaults", script);
    let mounted = in_mount("true").output().unwrap();
    if !mounted.status.success() {
        println!("SKIPPED: an ext4 can't be made or mounted: {made:?} {mounted:?}");
        return None;
    }
    let mut command = in_mount(
        "exec \"$1\" --socket \"$0/socket\" --shared-dir \"$0/mnt\" --sandbox none --once \
         --request-queues 2 --workers \"$3\" --runtime \"$2\"",
    );
    command.arg(program()).args([runtime, workers]);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    Some(server)
}

/// The share's file system, which can be frozen. It is thawed when this is dropped, or the server
/// could not end.
struct Disk<'a> {
    server: &'a Server,
    mount: &'a Path,
}

impl Disk<'_> {
    fn set(&self, option: &str) {
        let done = Command::new("nsenter")
            .args(["--mount", "--target", &self.server.pid().to_string()])
            .args(["fsfreeze", option])
            .arg(self.mount)
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        self.set("--unfreeze");
    }
}

/// Waits until a worker of the server is in the system call `number`.
fn wait_for_worker_in(server: &Server, number: i64) {
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        seen.clear();
        for task in std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap() {
            let task = task.unwrap().path();
            let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            let call = std::fs::read_to_string(task.join("syscall")).unwrap_or_default();
            let call = call.split(' ').next();
            if name.starts_with("ringfsd-work-") && call == Some(&number.to_string()) {
                return;
            }
            seen.push((name, call.map(str::to_owned)));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no worker waits in the system call {number} itself: {seen:?}");
}

/// FALLOCATE of 200,000 bytes, without waiting for the reply.
fn allocate(fs: &mut Client<Session>, nodeid: u64, handle: Handle) -> Pending {
    let asked = FallocateIn {
        fh: handle.fh,
        length: 200_000,
        ..FallocateIn::default()
    };
    let call = Call::new(opcode::FALLOCATE, nodeid);
    fs.submit(call.arg(asked.as_bytes()).reply(0)).unwrap()
}

#[each_runtime]
fn queue_is_served_while_its_worker_waits_for_the_disk(runtime: &str) {
    let Some(server) = start(runtime, "2") else {
        return;
    };
    let mount = server.socket().with_file_name("mnt");
    let bytes = pattern(100_000, 3);
    std::fs::create_dir_all(&mount).unwrap();
    let mut fs = server.session(Profile::Qemu, &Options::default());
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    assert_eq!(fs.write(file.nodeid, handle, 0, &bytes).unwrap(), 100_000);
    // Clean pages, as a frozen file system's are.
    fs.fsync(file.nodeid, handle, false).unwrap();
    // It waits itself only as long as requests have stayed alone.
    for waits_itself in [true, false] {
        let pending = {
            let disk = Disk {
                server: &server,
                mount: &mount,
            };
            disk.set("--freeze");
            let pending = allocate(&mut fs, file.nodeid, handle);
            if waits_itself {
                wait_for_worker_in(&server, libc::SYS_fallocate);
            }
            // Another worker serves what comes meanwhile.
            for _ in 0..100 {
                let read = fs.read(file.nodeid, handle, 0, 100_000).unwrap();
                assert!(read == bytes);
            }
            assert!(fs.returned().unwrap().is_empty());
            pending
        };
        fs.collect(pending).unwrap();
        // The first worker has its queue back.
        assert_eq!(fs.getattr(file.nodeid).unwrap().attr.size, 200_000);
    }
    fs.release(file.nodeid, handle).unwrap();
}

#[each_runtime]
fn queues_are_served_while_both_their_workers_wait_for_the_disk(runtime: &str) {
    // The third one is idle.
    let Some(server) = start(runtime, "3") else {
        return;
    };
    let mount = server.socket().with_file_name("mnt");
    std::fs::create_dir_all(&mount).unwrap();
    let options = Options::default().request_queues(2);
    let mut fs = server.session(Profile::Qemu, &options);
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    fs.fsync(file.nodeid, handle, false).unwrap();
    let mut pending = Vec::new();
    {
        let disk = Disk {
            server: &server,
            mount: &mount,
        };
        disk.set("--freeze");
        for queue in [1, 2] {
            fs.use_queue(queue);
            pending.push(allocate(&mut fs, file.nodeid, handle));
            if queue == 1 {
                wait_for_worker_in(&server, libc::SYS_fallocate);
            }
        }
        for queue in [1, 2, 1, 2] {
            fs.use_queue(queue);
            assert_eq!(fs.getattr(file.nodeid).unwrap().attr.size, 0);
        }
        assert!(fs.returned().unwrap().is_empty());
    }
    for pending in pending {
        fs.collect(pending).unwrap();
    }
    fs.release(file.nodeid, handle).unwrap();
}
