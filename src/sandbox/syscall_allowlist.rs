//! The system calls that the server makes once it serves, and what for.
//!
//! Read off the code, and checked against what its tests make. Those that some of their arguments
//! decide about stand in `filter`; hot ones must not, as the kernel remembers of a system call
//! that it is allowed only if that hangs on nothing else. The invariant: what stands here is made
//! somewhere in this crate, in the libraries it is made of, or in the C library below them.

/// What file operations come to (`fs`, `io`).
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
    // Asked for to know an inode again; to open by it takes another call, see HANDLES.
    libc::SYS_name_to_handle_at,
    // Files without a name that are moved with their guest.
    libc::SYS_pread64,
    libc::SYS_fchown,
];

/// Whose files they are to be (`fs::passthrough::credentials`): ids, umask and capabilities of
/// one thread.
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

/// The VMM's socket (`front`), syslog's, and waiting for them.
const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_shutdown,
    libc::SYS_ppoll,
    // `vhost` looks at sockets that a front end hands over, wanted or not.
    libc::SYS_getsockopt,
];

/// The runtimes' way of waiting (`io`).
const EVENTS: &[libc::c_long] = &[
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_epoll_pwait,
];

/// Threads, memory, signals and time: the C library and Rust's.
const PROCESS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Where a front end keeps what is in flight.
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

/// A panic that tells where it was, which a worker survives: the program and its files are looked
/// for, mostly in vain.
const PANIC: &[libc::c_long] = &[
    libc::SYS_getcwd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Allowed whatever the server was asked for.
pub(super) const ALWAYS: &[&[libc::c_long]] =
    &[FILES, CREDENTIALS, SOCKETS, EVENTS, PROCESS, PANIC];

/// The runtime on `io_uring`. What is done by way of a ring is seen by no filter: the ring itself
/// is restricted.
pub(super) const URING: &[libc::c_long] = &[
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// Opening by file handle.
pub(super) const HANDLES: &[libc::c_long] = &[libc::SYS_open_by_handle_at];
