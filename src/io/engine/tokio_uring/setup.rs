//! Creates tokio-uring's runtime.
//!
//! What the kernel may refuse is tried first: the crate panics on some of its errors and leaks
//! descriptors on others. The invariant: a failure says whether it is the ring's or the event
//! loop's.

use std::io;
use std::panic::catch_unwind;

use io_uring::{IoUring, opcode};

use super::super::{SetupError, tokio_builder};

/// Completion ring entries for each entry of the submission ring.
const COMPLETIONS_PER_ENTRY: u32 = 4;

/// The operations in use, and their names in the kernel.
pub(in crate::io) const OPERATIONS: [(u8, &str); 5] = [
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
    (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
];

/// The flags of a ring that save time, where the kernel has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Savings {
    /// SINGLE_ISSUER, from Linux 6.0 on, and those below.
    SingleIssuer,
    /// COOP_TASKRUN and SUBMIT_ALL, from Linux 5.19 on.
    Cooperative,
    None,
}

/// Sets the same flags on the builder of either version of the `io-uring` crate.
macro_rules! set_flags {
    ($builder:expr, $entries:expr, $savings:expr) => {{
        let builder = $builder;
        builder
            .dontfork()
            .setup_clamp()
            .setup_cqsize($entries.saturating_mul(COMPLETIONS_PER_ENTRY));
        if $savings != Savings::None {
            builder.setup_coop_taskrun().setup_submit_all();
        }
        if $savings == Savings::SingleIssuer {
            builder.setup_single_issuer();
        }
    }};
}

/// Creates a ring like that of [`runtime`], and tells its flags.
fn trial(entries: u32) -> io::Result<(IoUring, Savings)> {
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for savings in [Savings::SingleIssuer, Savings::Cooperative, Savings::None] {
        let mut builder = IoUring::builder();
        set_flags!(&mut builder, entries, savings);
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, savings)),
            // This kernel doesn't know one of the flags.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => refused = e,
            Err(e) => return Err(e),
        }
    }
    Err(refused)
}

/// Creates a ring like that of [`runtime`], to be asked what it has.
pub(in crate::io) fn ring(entries: u32) -> io::Result<IoUring> {
    trial(entries).map(|(ring, _)| ring)
}

/// Creates a runtime with a ring of `entries`.
pub(super) fn runtime(entries: u32) -> Result<::tokio_uring::Runtime, SetupError> {
    let tokio = tokio_builder().build().map_err(SetupError::EventLoop)?;
    let (ring, savings) = trial(entries).map_err(SetupError::Ring)?;
    drop(ring);
    drop(tokio);
    let created = catch_unwind(|| {
        let mut ring = ::tokio_uring::uring_builder();
        set_flags!(&mut ring, entries, savings);
        let mut builder = ::tokio_uring::builder();
        builder.entries(entries).uring_builder(&ring);
        ::tokio_uring::Runtime::new(&builder)
    });
    match created {
        Ok(created) => created.map_err(SetupError::Ring),
        Err(_panic) => Err(SetupError::EventLoop(io::Error::other(
            "tokio-uring can't register its ring with epoll",
        ))),
    }
}
