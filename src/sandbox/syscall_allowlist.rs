//! The system calls that the server makes while it serves, by purpose.
//!
//! The lists come from reading the code, and are checked against the calls of the tests. Calls that
//! are allowed only with certain arguments are in `filter`. Frequent calls must not be there: the
//! kernel caches that a call is allowed only if that doesn't depend on its arguments. The
//! invariant: each listed call is made in this crate, in its dependencies, or in the C library.

/// File operations (`fs`, `io`).
const FILES: &[libc::c_long] = &[
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_statx,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_copy_file_range,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_fcntl,
    libc::SYS_flock,
    // Identifies an inode. Opening by handle is another call, see HANDLES.
    libc::SYS_name_to_handle_at,
    // Migrates the content of unlinked files.
    libc::SYS_pread64,
    libc::SYS_fchown,
];

/// The credentials of one thread, which decide who owns what it creates
/// (`fs::passthrough::ids`): ids, umask and capabilities.
const CREDENTIALS: &[libc::c_long] = &[
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_getgroups,
    libc::SYS_setgroups,
    libc::SYS_umask,
    libc::SYS_fchdir,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_geteuid,
    libc::SYS_getegid,
];

/// The sockets of the VMM (`vhost_user`) and of syslog, and waiting for them.
const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_ppoll,
    // The kind of socket that a front end sends.
    libc::SYS_getsockopt,
];

/// How the runtimes wait (`io`).
const EVENTS: &[libc::c_long] = &[
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_epoll_pwait,
];

/// Threads, memory, signals and time, used by the C library and Rust's standard library.
const PROCESS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // The in-flight region that is shared with the front end.
    libc::SYS_memfd_create,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The backtrace of a panic, which a worker survives: it looks for the program and its debug files.
const PANIC: &[libc::c_long] = &[
    libc::SYS_getcwd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Allowed with all options.
pub(super) const ALWAYS: &[&[libc::c_long]] =
    &[FILES, CREDENTIALS, SOCKETS, EVENTS, PROCESS, PANIC];

/// io_uring. No filter sees the operations of a ring. The ring of the engine `uring` is restricted
/// itself; that of tokio-uring can't be.
pub(super) const URING: &[libc::c_long] = &[
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// Opens files by handle.
pub(super) const HANDLES: &[libc::c_long] = &[libc::SYS_open_by_handle_at];
