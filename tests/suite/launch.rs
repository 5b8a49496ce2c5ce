//! What a launcher passes on beside the command line: blocked or ignored signals, limits, an
//! environment, standard descriptors, a working directory.
//!
//! In each case the server serves, also in the process that follows a killed one and in the program
//! that follows an upgrade; or it refuses to start and names the limit.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use testing::{Server, USER, each_runtime};
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Region, Session};

/// The server, started by a shell after `set_up`; `exec` in it is how it begins.
fn launch(set_up: &str, user: Option<u32>, args: &[&str]) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    if let Some(user) = user {
        for path in [dir.path(), &share] {
            std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
        }
    }
    let program = testing::command_as(user, dir.path());
    let mut command = Command::new("bash");
    command
        .args(["-c", &format!("{set_up} \"$0\" \"$@\"")])
        .arg(program.get_program())
        .args(program.get_args())
        .env_remove("RINGFSD_LOG")
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--shared-dir")
        .arg(&share)
        .args(args);
    Server::spawn(command, dir)
}

fn session(server: &Server) -> Client<Session> {
    server.session(Profile::Qemu, &Options::default())
}

fn uses(fs: &mut Client<Session>, server: &Server, name: &str) {
    let name = std::ffi::CString::new(name).unwrap();
    let (file, handle) = fs.create(ROOT, &name, 0o644).unwrap();
    fs.write(file.nodeid, handle, 0, b"written").unwrap();
    let path = server.share().join(name.to_str().unwrap());
    assert_eq!(std::fs::read(path).unwrap(), b"written");
    let read = fs.read(file.nodeid, handle, 0, 100).unwrap();
    assert_eq!(read, b"written");
    fs.release(file.nodeid, handle).unwrap();
}

fn ends(mut server: Server) {
    server.signal(Signal::TERM);
    let status = server.wait();
    assert!(status.success(), "{status}: {:#?}", server.said());
    assert!(!server.socket().exists());
}

fn kill_serving(server: &Server) {
    let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn upgrade(server: &mut Server) {
    let mut command = Command::new(testing::program());
    let command = command.args(["upgrade", "--pid", &server.guardian().to_string()]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    server.wait_for("upgraded to");
}

/// A server that was launched so serves, and ends when it is told to; with `--supervise`, so do the
/// processes and the program after it.
fn serves(set_up: &str, user: Option<u32>, args: &[&str]) {
    let mut server = launch(set_up, user, args);
    server.wait_until_it_listens();
    let mut fs = session(&server);
    uses(&mut fs, &server, "file");
    drop(fs);
    ends(server);

    let args = [&["--supervise"], args].concat();
    let mut server = launch(set_up, user, &args);
    server.wait_until_it_listens();
    let mut fs = session(&server);
    uses(&mut fs, &server, "file");
    kill_serving(&server);
    server.wait_for("serving again");
    uses(&mut fs, &server, "after a kill");
    upgrade(&mut server);
    uses(&mut fs, &server, "after an upgrade");
    kill_serving(&server);
    server.wait_for("serving again");
    uses(&mut fs, &server, "after both");
    drop(fs);
    ends(server);
}

/// A server that was launched so refuses, and says why.
fn refuses(set_up: &str, user: Option<u32>, args: &[&str], why: &str) {
    let mut server = launch(set_up, user, args);
    server.wait_for(why);
    assert_eq!(server.wait().code(), Some(1));
    assert!(!server.socket().exists());
}

macro_rules! served_after {
    ($($name:ident: $set_up:expr;)*) => {
        $(#[test] fn $name() { serves($set_up, None, &[]); })*
    };
}

mod signals {
    use std::os::fd::AsFd;

    use vmm::connection::message::{Log, feature};

    use super::*;

    served_after! {
        none_blocked: "exec";
        all_blocked: "exec env --block-signal";
        all_ignored: "exec env --ignore-signal";
        all_ignored_and_blocked: "exec env --ignore-signal --block-signal";
        few_may_be_pending: "ulimit -S -i 0; exec";
    }

    /// A process that serves survives a fault in memory that the front end has taken away, whatever the
    /// launcher has done about SIGBUS.
    fn survives_a_fault(set_up: &str) {
        let mut server = launch(set_up, None, &[]);
        server.wait_until_it_listens();
        let mut fs = server.session(Profile::Simple, &Options::default());
        let size = (5_u64 << 30) / 4096 / 8;
        let log = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&log, size).unwrap();
        let features = fs.guest().features | feature::LOG_ALL;
        let connection = &mut fs.guest().connection;
        let place = Log { size, offset: 0 };
        connection.set_log_base(place, log.as_fd()).unwrap();
        connection.set_features(features).unwrap();
        fs.getattr(ROOT).unwrap();
        rustix::fs::ftruncate(&log, 0).unwrap();
        let statfs = vmm::fuse::Call::new(vmm::fuse::wire::opcode::STATFS, ROOT);
        let _answered_or_not = fs.submit(statfs.reply(80));
        let line = server.wait_for("the session is ended: ");
        assert!(line.contains("the dirty log is gone"), "{line}");
        server.wait_until_it_listens();
        uses(&mut session(&server), &server, "file");
    }

    #[test]
    fn fault_is_survived_with_all_blocked() {
        survives_a_fault("exec env --block-signal");
    }

    #[test]
    fn fault_is_survived_with_all_ignored() {
        survives_a_fault("exec env --ignore-signal --block-signal=BUS");
    }

    #[test]
    fn interrupt_ends_server_whatever_launcher_ignored() {
        let mut server = launch("exec env --ignore-signal --block-signal", None, &[]);
        server.wait_until_it_listens();
        server.signal(Signal::INT);
        assert!(server.wait().success());
        assert!(!server.socket().exists());
    }
}

mod scheduling {
    use super::serves;

    served_after! {
        niceness_19: "exec nice -n 19";
        idle_policy: "exec chrt -i 0";
        one_processor: "exec taskset -c 0";
    }

    #[test]
    fn real_time_policy() {
        if rustix::process::geteuid().is_root() {
            serves("exec chrt -f 1", None, &[]);
        } else {
            println!("SKIPPED: needs root");
        }
    }
}

mod surroundings {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Stdio;

    use super::*;

    served_after! {
        no_environment: "exec env -i";
        no_path: "exec env -u PATH";
        no_working_directory: "gone=$(mktemp -d); cd $gone; rmdir $gone; exec";
        no_standard_input: "exec <&-; exec";
        no_standard_input_and_output: "exec <&- >&-; exec";
    }

    /// Connects as soon as that can be done.
    fn connect(server: &mut Server) -> UnixStream {
        loop {
            match UnixStream::connect(server.socket()) {
                Ok(stream) => return stream,
                Err(error) => assert!(!server.has_ended(), "{error}"),
            }
        }
    }

    #[test]
    fn no_standard_descriptor_at_all() {
        for args in [&[][..], &["--supervise"]] {
            let mut server = launch("exec <&- >&- 2>&-; exec", None, args);
            let stream = connect(&mut server);
            let session = Profile::Qemu.connect(stream, &Options::default()).unwrap();
            let mut fs = Client::new(session);
            fs.init().unwrap();
            uses(&mut fs, &server, "file");
            if !args.is_empty() {
                let before = server.pid();
                kill_serving(&server);
                // A request that no process has taken is served by the next one.
                uses(&mut fs, &server, "after a kill");
                assert_ne!(server.pid(), before);
            }
            drop(fs);
            ends(server);
        }
    }

    #[test]
    fn socket_as_standard_input() {
        for args in [&[][..], &["--supervise"]] {
            let dir = tempfile::tempdir().unwrap();
            let share = dir.path().join("share");
            std::fs::create_dir(&share).unwrap();
            let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
            let mut command = testing::command();
            command.args(["--fd", "0", "--shared-dir"]).arg(&share);
            command
                .args(args)
                .stdin(Stdio::from(OwnedFd::from(listener)));
            let mut server = Server::spawn(command, dir);
            server.wait_until_it_listens();
            let mut fs = session(&server);
            uses(&mut fs, &server, "file");
            if !args.is_empty() {
                kill_serving(&server);
                server.wait_for("serving again");
                uses(&mut fs, &server, "after a kill");
                upgrade(&mut server);
                uses(&mut fs, &server, "after an upgrade");
            }
            drop(fs);
            server.signal(Signal::TERM);
            assert!(server.wait().success());
        }
    }
}

mod limits {
    use super::*;

    served_after! {
        soft_file_size: "ulimit -S -f 0; exec";
        soft_addresses: "ulimit -S -v 1000000; exec";
        soft_data: "ulimit -S -d 100000; exec";
        soft_locked_memory: "ulimit -S -l 0; exec";
        soft_processor_time: "ulimit -S -t 1; exec";
        soft_stack: "ulimit -S -s 1024; exec";
        soft_descriptors: "ulimit -S -n 20; exec";
        unlimited_stack: "ulimit -s unlimited; exec";
        unlimited_cores: "ulimit -c unlimited; exec";
        no_cores: "ulimit -c 0; exec";
        // Rings count as locked memory on some kernels.
        no_locked_memory: "ulimit -l 0; exec";
    }

    #[test]
    fn core_has_nothing_of_the_guests_memory() {
        let mut server = launch("ulimit -c unlimited; exec", None, &[]);
        server.wait_until_it_listens();
        let mut fs = session(&server);
        uses(&mut fs, &server, "file");
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", server.pid())).unwrap();
        let (mut guest, mut checked) = (false, 0);
        for line in maps.lines() {
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                assert!(
                    !guest || flags.split(' ').any(|flag| flag == "dd"),
                    "{flags}"
                );
                checked += u32::from(guest);
            } else if line.starts_with(|c: char| c.is_ascii_digit() || c.is_ascii_lowercase()) {
                let is_own = ["ringfsd-state", "ringfsd-back-channel"]
                    .iter()
                    .any(|name| line.contains(&format!("memfd:{name}")));
                guest = line.contains("memfd:") && !is_own;
            }
        }
        assert!(checked > 0, "{maps}");
    }

    #[test]
    fn stack_too_small_is_refused() {
        refuses("ulimit -s 256; exec", None, &[], "RLIMIT_STACK");
    }

    #[test]
    fn few_descriptors_are_enough_or_are_refused() {
        let args = ["--workers", "4", "--request-queues", "4"];
        serves("ulimit -n 63; exec", None, &args);
        refuses("ulimit -n 62; exec", None, &args, "RLIMIT_NOFILE");
        refuses("ulimit -n 12; exec", None, &args, "RLIMIT_NOFILE");
        refuses("ulimit -n 6; exec", None, &args, "RLIMIT_NOFILE");
    }

    #[test]
    fn addresses_that_the_server_may_run_out_of_are_refused() {
        let some = "ulimit -v 4000000; exec";
        refuses(some, None, &[], "RLIMIT_AS");
        serves(some, None, &["--max-inodes", "1000"]);
    }

    #[test]
    fn data_that_the_server_may_run_out_of_are_refused() {
        let some = "ulimit -d 400000; exec";
        refuses(some, None, &[], "RLIMIT_DATA");
        serves(some, None, &["--max-inodes", "1000"]);
    }

    #[test]
    fn memory_of_the_guest_that_has_no_addresses_is_named() {
        let args = ["--max-inodes", "1000"];
        let mut server = launch("ulimit -v 1400000; exec", None, &args);
        server.wait_until_it_listens();
        let regions = [(0, 16 << 20), (4 << 30, 4 << 30)];
        let regions = regions.map(|(gpa, len)| Region::new(gpa, len));
        let large = Options::default().memory(&regions);
        assert!(Profile::Qemu.connect(server.connect(), &large).is_err());
        let line = server.wait_for("the session is ended");
        assert!(line.contains("RLIMIT_AS"), "{line}");
        server.wait_until_it_listens();
        let mut fs = session(&server);
        uses(&mut fs, &server, "file");
    }

    #[test]
    fn processor_time_limit_is_refused_without_supervision() {
        let little = "ulimit -t 1; exec";
        refuses(little, None, &[], "RLIMIT_CPU");
        let mut server = launch(little, None, &["--supervise"]);
        server.wait_until_it_listens();
        let mut fs = session(&server);
        let first = server.pid();
        while server.child().is_none_or(|pid| pid == first) {
            fs.getattr(ROOT).unwrap();
        }
        server.wait_for("serving again");
        uses(&mut fs, &server, "file");
    }
}

mod file_size {
    use super::*;

    /// What a guest meets that writes, truncates and allocates beyond the limit.
    fn meets_the_limit(fs: &mut Client<Session>, name: &std::ffi::CStr, limit: u64) {
        let (file, handle) = fs.create(ROOT, name, 0o644).unwrap();
        let errno = |refused: vmm::fuse::FuseError| refused.errno();
        fs.write(file.nodeid, handle, limit - 4, b"last").unwrap();
        // Up to the limit, as on the host.
        let written = fs.write(file.nodeid, handle, limit - 2, b"four").unwrap();
        assert_eq!(written, 2);
        let refused = fs.write(file.nodeid, handle, limit, b"x").unwrap_err();
        assert_eq!(errno(refused), Some(libc::EFBIG));
        let refused = fs.fallocate(file.nodeid, handle, 0, limit..limit + 1);
        assert_eq!(errno(refused.unwrap_err()), Some(libc::EFBIG));
        let refused = fs.truncate(file.nodeid, limit + 1).unwrap_err();
        assert_eq!(errno(refused), Some(libc::EFBIG));
        fs.release(file.nodeid, handle).unwrap();
        fs.getattr(file.nodeid).unwrap();
    }

    /// In KiB: far less than the table of what a session holds.
    const LIMIT: &str = "ulimit -f 100; exec";

    #[each_runtime]
    fn ends_nobody(runtime: &str) {
        let args = ["--runtime", runtime];
        let mut server = launch(LIMIT, None, &args);
        let line = server.wait_for("102400");
        assert!(line.contains("RLIMIT_FSIZE"), "{line}");
        server.wait_until_it_listens();
        let mut fs = session(&server);
        meets_the_limit(&mut fs, c"file", 100 << 10);
        drop(fs);
        ends(server);
    }

    #[test]
    fn ends_nobody_who_comes_later() {
        // A table that just fits.
        let small = ["--max-inodes", "1000", "--max-handles", "1000"];
        let args = [&["--supervise", "--request-queues", "1"][..], &small].concat();
        let mut server = launch("ulimit -f 65536; exec", None, &args);
        server.wait_until_it_listens();
        let mut fs = session(&server);
        let limit = 64 << 20;
        meets_the_limit(&mut fs, c"first", limit);
        kill_serving(&server);
        server.wait_for("serving again");
        meets_the_limit(&mut fs, c"second", limit);
        upgrade(&mut server);
        meets_the_limit(&mut fs, c"third", limit);
        let said = server.said().iter();
        assert_eq!(said.filter(|line| line.contains("RLIMIT_FSIZE")).count(), 1);
        drop(fs);
        ends(server);
    }

    #[test]
    fn is_lifted_for_the_table_by_who_may() {
        let capabilities = rustix::thread::capabilities(None).unwrap();
        let needed = rustix::thread::CapabilitySet::SYS_RESOURCE;
        if !capabilities.effective.contains(needed) {
            println!("SKIPPED: needs CAP_SYS_RESOURCE");
            return;
        }
        let mut server = launch(LIMIT, None, &["--supervise"]);
        server.wait_until_it_listens();
        let mut fs = session(&server);
        meets_the_limit(&mut fs, c"file", 100 << 10);
    }

    #[test]
    fn state_file_that_would_be_too_large_is_refused() {
        let user = rustix::process::geteuid().is_root().then_some(USER);
        refuses(LIMIT, user, &["--supervise"], "RLIMIT_FSIZE");
        let state = format!("/tmp/ringfsd-launch-{}", std::process::id());
        refuses(LIMIT, user, &["--state", &state], "RLIMIT_FSIZE");
        let _ = std::fs::remove_file(&state);
        // Without either the table needs no file.
        let mut server = launch(LIMIT, user, &[]);
        server.wait_until_it_listens();
        uses(&mut session(&server), &server, "file");
        ends(server);
    }
}

mod threads {
    use super::*;

    /// Otherwise unused users, as all processes of a user count.
    const ALONE: [u32; 3] = [64_901, 64_902, 64_903];

    fn is_root() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            println!("SKIPPED: needs root, for a user who has no other processes");
        }
        root
    }

    #[test]
    fn no_thread_for_serving_process_is_refused() {
        if is_root() {
            let none = "ulimit -u 1; exec";
            refuses(none, Some(ALONE[0]), &[], "RLIMIT_NPROC");
            refuses(none, Some(ALONE[0]), &["--supervise"], "RLIMIT_NPROC");
        }
    }

    #[test]
    fn no_threads_for_workers_is_refused_at_start() {
        if is_root() {
            let args = ["--workers", "4"];
            refuses("ulimit -u 4; exec", Some(ALONE[1]), &args, "RLIMIT_NPROC");
            let args = ["--workers", "4", "--supervise"];
            refuses("ulimit -u 4; exec", Some(ALONE[1]), &args, "RLIMIT_NPROC");
        }
    }

    #[test]
    fn no_threads_for_blocking_calls_is_survived() {
        if !is_root() {
            return;
        }
        // Two processes, two workers' threads.
        let args = ["--workers", "1", "--runtime", "tokio"];
        let mut server = launch("ulimit -u 4; exec", Some(ALONE[2]), &args);
        server.wait_until_it_listens();
        let mut fs = session(&server);
        let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
        fs.write(file.nodeid, handle, 0, b"written").unwrap();
        for _ in 0..3 {
            fs.fsync(file.nodeid, handle, false).unwrap();
            fs.fallocate(file.nodeid, handle, 0, 0..4096).unwrap();
        }
        drop(fs);
        ends(server);
    }
}

mod control_groups {
    use std::path::PathBuf;

    use super::*;

    /// A control group of this test's own, of version 1.
    struct Group(PathBuf);

    impl Group {
        fn new(controller: &str, file: &str, limit: &str) -> Option<Self> {
            let name = format!("ringfsd-{}-{limit}", std::process::id());
            let path = PathBuf::from("/sys/fs/cgroup").join(controller).join(name);
            let made =
                std::fs::create_dir(&path).and_then(|()| std::fs::write(path.join(file), limit));
            if let Err(error) = made {
                println!("SKIPPED: needs root and control groups of version 1: {error}");
                let _ = std::fs::remove_dir(&path);
                return None;
            }
            Some(Self(path))
        }

        /// What a launcher does to start something in it.
        fn enter(&self) -> String {
            format!("echo $$ > {}/cgroup.procs; exec", self.0.display())
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            // Processes that have ended leave a moment later.
            while std::fs::remove_dir(&self.0)
                .is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
            {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn too_few_processes_are_refused() {
        let Some(group) = Group::new("pids", "pids.max", "4") else {
            return;
        };
        let args = ["--workers", "4"];
        refuses(&group.enter(), None, &args, "pids.max");
        let args = ["--workers", "4", "--supervise"];
        refuses(&group.enter(), None, &args, "pids.max");
    }

    #[test]
    fn session_without_threads_ends_and_the_next_is_served() {
        let Some(group) = Group::new("pids", "pids.max", "99") else {
            return;
        };
        let allow = |most: &str| std::fs::write(group.0.join("pids.max"), most).unwrap();
        for args in [&[][..], &["--supervise"]] {
            let mut server = launch(&group.enter(), None, args);
            server.wait_until_it_listens();
            // The first session's workers exist before it does.
            uses(&mut session(&server), &server, "first");
            server.wait_until_it_listens();
            allow("2");
            let refused = Profile::Qemu.connect(server.connect(), &Options::default());
            assert!(refused.is_err());
            let line = server.wait_for("starting to serve the VMM");
            assert!(line.contains("pids.max"), "{line}");
            server.wait_until_it_listens();
            allow("99");
            uses(&mut session(&server), &server, "file");
            ends(server);
        }
    }

    #[test]
    fn guest_cannot_use_the_memory_up() {
        // So small that the kernel can't be relied on to evict inodes: it may kill a plain program
        // that makes files.
        let limit = (24_u64 << 20).to_string();
        let Some(group) = Group::new("memory", "memory.limit_in_bytes", &limit) else {
            return;
        };
        let mut server = launch(&group.enter(), None, &[]);
        server.wait_for("--max-inodes");
        server.wait_until_it_listens();
        // Short of memory, the kernel takes its time.
        let patient = Options::default().timeout(4 * testing::TIMEOUT);
        let mut fs = server.session(Profile::Qemu, &patient);
        let end = (0..100_000).find_map(|number| {
            let name = std::ffi::CString::new(number.to_string()).unwrap();
            let made = fs.mknod(ROOT, &name, libc::S_IFREG | 0o644, 0);
            made.err().map(|error| (number, error.errno()))
        });
        let (number, errno) = end.unwrap();
        assert_eq!(errno, Some(libc::ENFILE), "after {number}");
        fs.getattr(ROOT).unwrap();
        drop(fs);
        ends(server);
    }
}
