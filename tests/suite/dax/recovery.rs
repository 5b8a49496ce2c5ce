//! Mappings that outlive the process that asked for them.

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use testing::{Server, each_runtime, errno, pattern};
use vmm::window::Behaviour;
use vmm::{Profile, Window};

use super::{RANGE, VMMS, Vm, WINDOW, host_file, start};

/// Kills the process that serves, as soon as there is one.
fn kill_process_of(server: &Server) {
    loop {
        let pid = server.child().and_then(|pid| i32::try_from(pid).ok());
        let killed = pid
            .and_then(Pid::from_raw)
            .map(|pid| kill_process(pid, Signal::KILL));
        match killed {
            Some(Ok(())) => return,
            // It has ended by itself, after an upgrade.
            None | Some(Err(Errno::SRCH)) => std::thread::yield_now(),
            Some(Err(error)) => panic!("{error}"),
        }
    }
}

/// Kills the process that serves, and waits until another does.
pub(super) fn crash(server: &mut Server) {
    kill_process_of(server);
    server.wait_for("serving again");
}

pub(super) fn upgrade(server: &mut Server) {
    let mut command = testing::command();
    let pid = server.guardian().to_string();
    let output = command.args(["upgrade", "--pid", &pid]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    server.wait_for("upgraded to");
}

/// Kills the process that serves while an upgrade is under way. Whichever comes first, a process
/// serves afterwards.
pub(super) fn upgrade_and_crash(server: &mut Server) {
    let mut command = testing::command();
    let pid = server.guardian().to_string();
    let upgrade = command.args(["upgrade", "--pid", &pid]).spawn();
    kill_process_of(server);
    // An upgrade whose process was killed may report that.
    let _done_or_failed = upgrade.unwrap().wait().unwrap();
}

#[each_runtime]
fn mappings_survive_kills_and_upgrades(runtime: &str) {
    for (profile, behaviour) in VMMS {
        let mut server = start(runtime, &["--supervise", "--dax-fs-map"]);
        let content = pattern(2 * RANGE as usize, 3);
        host_file(&server, "file", &content);
        let mut vm = Vm::start_as(&server, profile, behaviour);
        let node = vm.node("file");
        for round in 0..4_u64 {
            vm.map(node, 0, 1, false);
            vm.map(node, 1, 2, true);
            let requests = vm.window.requests();
            if round % 2 == 0 {
                crash(&mut server);
            } else {
                upgrade(&mut server);
            }
            vm.guest.getattr(node).unwrap();
            assert_eq!(vm.window.requests(), requests, "nothing had to be done");
            assert_eq!(
                vm.read(RANGE, RANGE as usize).unwrap(),
                content[..RANGE as usize]
            );
            // The next process knows what is mapped, and what overlaps it.
            vm.map(node, 1, 2, true);
            assert_eq!(vm.window.requests(), requests);
            let cut = vm.guest.setup_mapping(node, (0, 4096), RANGE, false);
            assert_eq!(errno(cut), Some(libc::EINVAL));
            vm.map(node, 0, 1, true);
            vm.guest
                .remove_mappings(node, &[(RANGE, RANGE), (2 * RANGE, RANGE)])
                .unwrap();
            assert_eq!(vm.mapped(), []);
        }
    }
}

#[each_runtime]
fn request_that_was_never_answered_is_done_by_the_next_process(runtime: &str) {
    for (profile, behaviour) in VMMS {
        let mut server = start(runtime, &["--supervise", "--dax-fs-map"]);
        host_file(&server, "file", &[7; 4096]);
        let mut vm = Vm::start_as(&server, profile, behaviour);
        let node = vm.node("file");
        for _ in 0..3 {
            // The VMM does what it is asked for, and the process is killed before it learns that.
            let requests = vm.window.requests();
            vm.window.set_silent(true);
            let pending = vm.guest.submit_mapping(node, (0, RANGE), 0, true).unwrap();
            while vm.window.requests() == requests {
                std::thread::yield_now();
            }
            kill_process_of(&server);
            // The answer that the killed process was waiting for comes, too.
            vm.window.set_silent(false);
            server.wait_for("serving again");
            vm.guest.collect(pending).unwrap();
            assert_eq!(vm.mapped(), [(0, true)]);
            assert_eq!(vm.read(0, 3).unwrap(), [7; 3]);
            vm.guest.remove_mappings(node, &[(0, RANGE)]).unwrap();
            assert_eq!(vm.mapped(), []);
        }
    }
}

#[each_runtime]
fn vmm_that_reconnects_finds_its_mappings_again(runtime: &str) {
    for lost in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let state = format!("--state={}", dir.path().join("state").display());
        let mut server = start(runtime, &[&state]);
        let content = pattern(RANGE as usize, 4);
        host_file(&server, "file", &content);
        let mut vm = Vm::start_as(&server, Profile::Simple, Behaviour::default());
        let node = vm.node("file");
        vm.map(node, 0, 0, true);
        vm.map(node, 0, 3, false);
        let before = vm.window.mappings();
        let args = ["--runtime", runtime, "--dax-window=8M", &state];
        server.replace_killed(&args);
        if lost {
            vm.window.lose().unwrap();
        }
        let requests = vm.window.requests();
        vm.guest.guest().reconnect_path(server.socket()).unwrap();
        vm.serve_again();
        // Both are asked for again, in whatever order.
        while vm.window.requests() < requests + 2 {
            std::thread::yield_now();
        }
        server.wait_for("2 mappings made again");
        assert_eq!(vm.window.mappings(), before);
        assert_eq!(vm.read(3 * RANGE, RANGE as usize).unwrap(), content);
        vm.guest.remove_mappings(node, &[(0, WINDOW)]).unwrap();
        assert_eq!(vm.mapped(), []);
    }
}

#[test]
fn session_with_mappings_needs_their_window() {
    let dir = tempfile::tempdir().unwrap();
    let state = format!("--state={}", dir.path().join("state").display());
    let mut server = start("auto", &[&state]);
    host_file(&server, "file", &[1; 4096]);
    let mut vm = Vm::start_as(&server, Profile::Simple, Behaviour::default());
    let node = vm.node("file");
    vm.map(node, 0, 2, true);
    server.signal(Signal::TERM);
    server.wait();
    for args in [&[&*state][..], &[&state, "--dax-window=4M"]] {
        server.launch_again(args);
        server.wait_for("start the server with the size that it had");
        assert!(!server.wait().success());
    }
    server.start_again(&[&state, "--dax-window=6M"]);
}

impl Vm {
    /// Serves the back channel of a connection that was made anew.
    fn serve_again(&mut self) {
        let backend = self.guest.guest().backend.take().unwrap();
        let device = Window::serve(&self.window, backend);
        if let Some(before) = self.device.replace(device) {
            before.join().unwrap();
        }
    }
}
