//! Why io_uring can't be used by this process.
//!
//! The invariant: each reason says what an administrator can do about it, if anything.

use std::io;

use thiserror::Error;

/// Why io_uring can't be used.
#[derive(Debug, Error)]
pub enum Unavailable {
    /// `io_uring_setup(2)` doesn't exist.
    #[error("this kernel has no io_uring (it takes Linux 5.10 or later with CONFIG_IO_URING)")]
    NotInKernel,
    /// It exists, but a filter hides or refuses it.
    #[error(
        "io_uring is refused to this process ({errno}), most likely by a seccomp filter, as \
         container engines set by default; allow io_uring_setup, io_uring_enter and io_uring_register there"
    )]
    Filtered {
        /// The call's error.
        errno: &'static str,
    },
    /// The administrator disabled it.
    #[error("io_uring is switched off: sysctl kernel.io_uring_disabled is {level}; {remedy}")]
    SwitchedOff {
        /// The sysctl's value.
        level: u32,
        /// How to allow it for this process.
        remedy: &'static str,
    },
    /// The ring exceeds the limit for locked memory, which all processes of a user share (kernels
    /// before 5.12 and from 6.14 on), or there is no memory left.
    #[error(
        "no memory for a ring: it counts as locked memory on some kernels, and all rings of a user \
         together; raise the limit (ulimit -l, LimitMEMLOCK=)"
    )]
    Memory,
    /// The kernel is too old for an operation.
    #[error("this kernel's io_uring lacks {}", .0.join(", "))]
    Lacks(Vec<&'static str>),
    /// Another error.
    #[error("io_uring can't be set up")]
    Other(#[source] io::Error),
}
