//! Processes: `fork`, namespaces, signals, mount attributes, and exit.
//!
//! The invariant: a process is forked only while it has one thread, so the child may do everything
//! that its parent could.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

use super::last_errno;

/// Which of the two processes this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fork {
    /// The parent, with the child's number.
    Parent(Pid),
    /// The child.
    Child,
}

/// Forks the process (`fork(2)`).
///
/// # Errors
///
/// `EBUSY` if the process has other threads than the calling one; `EAGAIN` and `ENOMEM` of the
/// system call.
pub(crate) fn fork() -> Result<Fork, Errno> {
    if !has_one_thread()? {
        return Err(Errno::BUSY);
    }
    // SAFETY: the process has one thread, so no lock is held by a thread that doesn't exist in the
    // child, and the child may run any code that its parent may.
    match unsafe { libc::fork() } {
        -1 => Err(last_errno()),
        0 => Ok(Fork::Child),
        child => Pid::from_raw(child).map(Fork::Parent).ok_or(Errno::SRCH),
    }
}

/// Whether the calling thread is the only one.
///
/// # Errors
///
/// `ENOENT` if `/proc` isn't mounted.
pub(super) fn has_one_thread() -> Result<bool, Errno> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(|_no_proc| Errno::NOENT)?;
    Ok(threads.count() == 1)
}

/// Ends the process at once. Runs neither destructors nor exit handlers: those are the parent's.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: takes a number, and never returns.
    unsafe { libc::_exit(code) }
}

/// Moves the process into new namespaces (`unshare(2)`).
///
/// # Errors
///
/// Those of the system call; `EINVAL` if `flags` contains anything but namespaces.
pub(crate) fn unshare_namespaces(flags: UnshareFlags) -> Result<(), Errno> {
    let namespaces = UnshareFlags::NEWUSER
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC;
    if !namespaces.contains(flags) {
        return Err(Errno::INVAL);
    }
    // SAFETY: none of these flags is `CLONE_FILES`, so descriptors keep their meaning.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// The signals that ask every server to end.
pub(crate) const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];

/// The signals that a supervisor waits for: the same, the one that reports a child's end, the one
/// that asks for an upgrade, the one that announces a report of the serving process, and the one that
/// asks that process to log one.
pub(crate) const SUPERVISED: [libc::c_int; 7] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGCHLD,
    libc::SIGHUP,
    libc::SIGIO,
    libc::SIGUSR1,
];

/// A set of signals.
pub(super) fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: all zeroes is a valid set of signals.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is exclusively borrowed during the call.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: as before; the signal's number is valid.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

fn mask(how: libc::c_int, signals: &[libc::c_int]) -> Result<(), Errno> {
    let set = signal_set(signals);
    // SAFETY: the kernel reads `set`, and the earlier set is not requested.
    match unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// The signals that ask an unsupervised server to end: [`ENDING`], and `SIGHUP` unless the launcher
/// has it ignored (`nohup`).
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn ending_signals() -> Result<Vec<libc::c_int>, Errno> {
    let mut signals = ENDING.to_vec();
    if !is_ignored(libc::SIGHUP)? {
        signals.push(libc::SIGHUP);
    }
    Ok(signals)
}

/// The same, the signal that reports a child's end, and the one that asks for a report.
fn guarded() -> Result<Vec<libc::c_int>, Errno> {
    let mut signals = ending_signals()?;
    signals.extend([libc::SIGCHLD, libc::SIGUSR1]);
    Ok(signals)
}

/// Blocks the signals that ask the server to end, `SIGCHLD`, and `SIGUSR1`. Also resets the action of
/// `SIGCHLD`: if a launcher has it ignored, children can't be waited for.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn block_signals() -> Result<(), Errno> {
    set_default(libc::SIGCHLD)?;
    mask(libc::SIG_BLOCK, &guarded()?)
}

/// Blocks `SIGIO`, which announces a report of the serving process.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn block_reports() -> Result<(), Errno> {
    mask(libc::SIG_BLOCK, &[libc::SIGIO])
}

/// Blocks the supervisor's signals too ([`SUPERVISED`]). Installs a handler for `SIGHUP`, which
/// never runs: it shows in `/proc/PID/status` that the signal doesn't end this process.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn block_supervisors_signals() -> Result<(), Errno> {
    extern "C" fn nothing(_: libc::c_int) {}
    mask(libc::SIG_BLOCK, &SUPERVISED)?;
    let nothing: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: the handler does nothing.
    match unsafe { libc::signal(libc::SIGHUP, nothing as libc::sighandler_t) } {
        libc::SIG_ERR => Err(last_errno()),
        _ => Ok(()),
    }
}

/// Unblocks what [`block_signals`] has blocked.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn unblock_signals() -> Result<(), Errno> {
    mask(libc::SIG_UNBLOCK, &guarded()?)
}

/// Unblocks `SIGHUP`.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn unblock_hangup() -> Result<(), Errno> {
    mask(libc::SIG_UNBLOCK, &[libc::SIGHUP])
}

/// Signals that have a meaning here, and that a launcher may have set to be ignored: a child's end,
/// requests to end, faults.
const NOT_IGNORED: [libc::c_int; 10] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGCHLD,
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGSYS,
];

/// Signals that have no meaning here, and would end a process that doesn't know them; real-time
/// signals are others.
const MEANINGLESS: [libc::c_int; 8] = [
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGIO,
];

/// Resets the signals that a launcher has blocked or ignored. Ignores signals that mean nothing
/// here, and `SIGXFSZ`, so that a write beyond `RLIMIT_FSIZE` fails with `EFBIG` and doesn't end the
/// process. With `supervises`, [`SUPERVISED`] stay blocked and aren't ignored: some may be pending.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn reset_signals(supervises: bool) -> Result<(), Errno> {
    for signal in NOT_IGNORED {
        if is_ignored(signal)? {
            set_default(signal)?;
        }
    }
    let real_time = libc::SIGRTMIN()..=libc::SIGRTMAX();
    for signal in MEANINGLESS
        .into_iter()
        .chain(real_time)
        .chain([libc::SIGXFSZ])
    {
        if !(supervises && SUPERVISED.contains(&signal)) {
            ignore(signal)?;
        }
    }
    mask(
        libc::SIG_SETMASK,
        if supervises { &SUPERVISED } else { &[] },
    )
}

fn is_ignored(signal: libc::c_int) -> Result<bool, Errno> {
    // SAFETY: all zeroes is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes `action`, and no new action is passed.
    match unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) } {
        0 => Ok(action.sa_sigaction == libc::SIG_IGN),
        _ => Err(last_errno()),
    }
}

fn ignore(signal: libc::c_int) -> Result<(), Errno> {
    // SAFETY: an ignored signal runs no code of this process.
    match unsafe { libc::signal(signal, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(last_errno()),
        _ => Ok(()),
    }
}

fn set_default(signal: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the default action runs no code of this process.
    match unsafe { libc::signal(signal, libc::SIG_DFL) } {
        libc::SIG_ERR => Err(last_errno()),
        _ => Ok(()),
    }
}

/// Ends the process by `signal`, as another process has ended. Returns only if the signal can't end
/// it.
pub(crate) fn end_by(signal: libc::c_int) {
    // SIGKILL's action can't be set, and needn't be.
    let _ = set_default(signal);
    // A core dump would show this process instead of the one that was killed.
    let no_core = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, no_core);
    let _ = unblock_signals();
    // SAFETY: takes a number; the signal's action is the default one.
    unsafe { libc::raise(signal) };
}

/// Sets `attributes` (`MOUNT_ATTR_*`) of the mount of `tree` and all mounts below it, and clears
/// none (`mount_setattr(2)`).
///
/// # Errors
///
/// Those of the system call; `ENOSYS` before Linux 5.12.
pub(crate) fn add_mount_attributes(tree: impl AsFd, attributes: u64) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: all zeroes is a valid `mount_attr`.
    let mut wanted: libc::mount_attr = unsafe { std::mem::zeroed() };
    wanted.attr_set = attributes;
    let path: &CStr = c"";
    // SAFETY: `path` ends with a NUL, the kernel reads as many bytes of `wanted` as its size says,
    // and `tree` is open as long as it is borrowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// Set when the handler of `SIGSYS` begins, so that it prints one system call. Orders nothing.
static TRAPPED: AtomicBool = AtomicBool::new(false);

/// Installs a handler for system calls that a seccomp filter traps: it writes the call's number to
/// standard error and exits with 1.
///
/// # Errors
///
/// The error of a seccomp filter.
pub(crate) fn print_trapped_calls() -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction =
        trapped as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    // SAFETY: the handler makes only system calls, which are safe at any moment; the kernel reads
    // `action`, and the earlier one is not requested.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// What the kernel passes with a `SIGSYS` of seccomp: `_sigsys` of `siginfo_t`, which `libc` lacks.
#[repr(C)]
struct SigsysInfo {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    number: libc::c_int,
    architecture: libc::c_uint,
}

const _: () = assert!(size_of::<SigsysInfo>() <= size_of::<libc::siginfo_t>());

extern "C" fn trapped(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a `siginfo_t` of SIGSYS, which begins with these fields.
    let number = unsafe { (*info.cast::<SigsysInfo>()).number };
    if !TRAPPED.swap(true, Ordering::Relaxed) {
        let mut line = Line::default();
        line.text(b"ringfsd: system call ");
        line.number(number.unsigned_abs());
        line.text(b" is not on the list of allowed calls (--seccomp trap): exiting\n");
        // SAFETY: the bytes are borrowed during the call, which may be made in a handler.
        unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
    }
    exit_now(1)
}

/// A line that is formatted without allocating, for a signal handler.
struct Line {
    bytes: [u8; 128],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 128],
            len: 0,
        }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn number(&mut self, number: u32) {
        let digits = [1_000_000_000, 100_000_000, 10_000_000, 1_000_000, 100_000];
        let digits = digits.into_iter().chain([10_000, 1_000, 100, 10, 1]);
        for digit in digits.filter(|digit| number >= *digit || *digit == 1) {
            let value = u8::try_from(number / digit % 10).unwrap_or(0);
            self.text(&[b'0' + value]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_with_several_threads_is_not_forked() {
        // Each test has a thread, and another one waits for them.
        assert_eq!(fork(), Err(Errno::BUSY));
    }

    #[test]
    fn only_namespaces_are_unshared() {
        let files = unshare_namespaces(UnshareFlags::FILES);
        assert_eq!(files, Err(Errno::INVAL));
    }

    #[test]
    fn numbers_are_formatted_without_allocating() {
        let mut line = Line::default();
        for number in [0, 7, 101, 4_294_967_295] {
            line.number(number);
            line.text(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"0 7 101 4294967295 ");
        line.text(&[b'x'; 200]);
        assert_eq!(line.len, 128);
    }
}
