//! `--seccomp`: what happens on a system call that the server never makes.
//!
//! As it never makes one, these tests inspect the filter. `tests/confinement.rs` tests the effect
//! of each result of a filter.

use std::mem::MaybeUninit;

use rustix::process::{Pid, WaitOptions};
use testing::Server;

use super::is_root;

/// `PTRACE_SECCOMP_GET_FILTER` (uapi `linux/ptrace.h`).
const GET_FILTER: libc::c_uint = 0x420c;

/// What the newest filter of a process answers to a call that it doesn't know; `None` where this
/// host doesn't tell.
fn answer_to_others(pid: u32) -> Option<u32> {
    let pid = i32::try_from(pid).unwrap();
    // SAFETY: takes numbers.
    if unsafe { libc::ptrace(libc::PTRACE_ATTACH, pid, 0, 0) } < 0 {
        return None;
    }
    // It is asked about when it has stopped.
    rustix::process::waitpid(Pid::from_raw(pid), WaitOptions::UNTRACED).unwrap();
    let mut newest = None;
    for index in 0_usize.. {
        // SAFETY: without a place to write to, the number of instructions is answered.
        let count = unsafe { libc::ptrace(GET_FILTER, pid, index, 0) };
        let Ok(count) = usize::try_from(count) else {
            break;
        };
        let mut program: Vec<MaybeUninit<libc::sock_filter>> = Vec::new();
        program.resize(count, MaybeUninit::zeroed());
        // SAFETY: there is room for all instructions, and the filter of a process that has stopped
        // doesn't change.
        let written = unsafe { libc::ptrace(GET_FILTER, pid, index, program.as_mut_ptr()) };
        assert_eq!(usize::try_from(written), Ok(count));
        // SAFETY: zeroed at first, and plain numbers.
        newest = program.last().map(|last| unsafe { last.assume_init() }.k);
    }
    // SAFETY: takes numbers.
    unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, 0, 0) };
    newest
}

#[test]
fn seccomp_option_sets_action_of_filter() {
    if !is_root() {
        return;
    }
    for (args, answer) in [
        (&[][..], libc::SECCOMP_RET_KILL_PROCESS),
        (&["--seccomp=kill"], libc::SECCOMP_RET_KILL_PROCESS),
        (&["--seccomp=trap"], libc::SECCOMP_RET_TRAP),
        (&["--seccomp=log"], libc::SECCOMP_RET_LOG),
    ] {
        let server = Server::start(args);
        match answer_to_others(server.pid()) {
            None => println!("SKIPPED: this host tells of no filters"),
            Some(answered) => assert_eq!(answered, answer, "{args:?}"),
        }
        // It continues as if nothing had happened.
        super::session(&server).getattr(vmm::fuse::ROOT).unwrap();
    }
}
