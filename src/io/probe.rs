//! Finds out whether this process can use the io_uring features that the server needs.
//!
//! Nothing is inferred from version numbers: a small ring is created and tested. The invariant:
//! every result has a reason that fits into one log line.

use std::io;

use io_uring::{IoUring, Probe};

use super::engine::Engine;
#[cfg(feature = "tokio-uring")]
use super::engine::tokio_uring;
use super::engine::uring::setup;
use super::runtime::{DEFAULT_RING_ENTRIES, RuntimeError};
use super::unavailable::Unavailable;

/// The requested runtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// io_uring if it is usable, else tokio.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// tokio.
    Tokio,
    /// tokio-uring, or an error.
    TokioUring,
}

/// The chosen engine, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The engine.
    pub engine: Engine,
    /// The reason for the log: part of a sentence, without a full stop.
    pub reason: String,
}

/// Tests io_uring: sets up a ring and checks that it supports every operation in use.
///
/// # Errors
///
/// The reason why it can't be used.
pub fn probe() -> Result<(), Unavailable> {
    let ring = setup::disabled(DEFAULT_RING_ENTRIES).map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => Unavailable::Lacks(vec!["IORING_SETUP_R_DISABLED"]),
        _ => explain(e, sysctl()),
    })?;
    check_features(&ring, &setup::OPERATIONS)?;
    setup::close_and_enable(&ring)
        .map_err(|_refused| Unavailable::Lacks(vec!["IORING_REGISTER_RESTRICTIONS"]))
}

/// Tests io_uring for tokio-uring, whose ring takes less of the kernel.
///
/// # Errors
///
/// The reason why it can't be used.
#[cfg(feature = "tokio-uring")]
fn probe_tokio_uring() -> Result<(), Unavailable> {
    let ring = tokio_uring::setup::ring(DEFAULT_RING_ENTRIES).map_err(|e| explain(e, sysctl()))?;
    check_features(&ring, &tokio_uring::setup::OPERATIONS)
}

impl Engine {
    /// Tests whether this process can use the engine.
    ///
    /// # Errors
    ///
    /// The reason why it can't.
    pub fn probe(self) -> Result<(), Unavailable> {
        match self {
            Self::ThreadPool => Ok(()),
            Self::Uring => probe(),
            #[cfg(feature = "tokio-uring")]
            Self::TokioUring => probe_tokio_uring(),
        }
    }
}

/// Why the log warns of tokio-uring: nothing restricts the ring, whose operations no filter sees.
#[cfg(feature = "tokio-uring")]
const TOKIO_URING: &str = "requested; its ring can't be restricted to the operations in use, \
                           which --seccomp doesn't see";

/// Chooses the engine.
///
/// # Errors
///
/// Fails if a kind of io_uring was requested explicitly and can't be used.
pub fn choose(choice: Choice) -> Result<Chosen, RuntimeError> {
    let chosen = |engine, reason: String| Ok(Chosen { engine, reason });
    match choice {
        Choice::Tokio => chosen(Engine::ThreadPool, "requested".into()),
        Choice::Uring => match probe() {
            Ok(()) => chosen(Engine::Uring, "requested".into()),
            Err(e) => Err(RuntimeError::Unavailable(e)),
        },
        #[cfg(feature = "tokio-uring")]
        Choice::TokioUring => match probe_tokio_uring() {
            Ok(()) => chosen(Engine::TokioUring, TOKIO_URING.into()),
            Err(e) => Err(RuntimeError::Unavailable(e)),
        },
        #[cfg(not(feature = "tokio-uring"))]
        Choice::TokioUring => Err(RuntimeError::NotBuilt),
        Choice::Auto => match probe() {
            Ok(()) => chosen(Engine::Uring, "the kernel supports it".into()),
            Err(Unavailable::Other(e)) => {
                chosen(Engine::ThreadPool, format!("io_uring can't be set up: {e}"))
            }
            Err(e) => chosen(Engine::ThreadPool, e.to_string()),
        },
    }
}

fn check_features(ring: &IoUring, operations: &[(u8, &'static str)]) -> Result<(), Unavailable> {
    let mut probe = Probe::new();
    if ring.submitter().register_probe(&mut probe).is_err() {
        return Err(Unavailable::Lacks(vec!["IORING_REGISTER_PROBE"]));
    }
    let mut missing: Vec<_> = operations
        .iter()
        .filter(|&&(code, _)| !probe.is_supported(code))
        .map(|&(_, name)| name)
        .collect();
    let params = ring.params();
    let features = [
        (params.is_feature_nodrop(), "FEAT_NODROP"),
        (params.is_feature_submit_stable(), "FEAT_SUBMIT_STABLE"),
    ];
    missing.extend(
        features
            .iter()
            .filter(|(has, _)| !has)
            .map(|(_, name)| name),
    );
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Unavailable::Lacks(missing))
    }
}

/// The value of `kernel.io_uring_disabled`, which kernels have since 6.6.
fn sysctl() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
    text.trim().parse().ok()
}

fn explain(error: io::Error, sysctl: Option<u32>) -> Unavailable {
    match (error.raw_os_error(), sysctl) {
        (Some(libc::EPERM), Some(2)) => Unavailable::SwitchedOff {
            level: 2,
            remedy: "set it to 0, or to 1 and kernel.io_uring_group to a group of this process",
        },
        (Some(libc::EPERM), Some(1)) => Unavailable::SwitchedOff {
            level: 1,
            remedy: "run with CAP_SYS_ADMIN or in the group that kernel.io_uring_group names, or set it to 0",
        },
        (Some(libc::EPERM), _) => Unavailable::Filtered { errno: "EPERM" },
        (Some(libc::EACCES), _) => Unavailable::Filtered { errno: "EACCES" },
        // The sysctl exists, so the kernel has io_uring.
        (Some(libc::ENOSYS), Some(_)) => Unavailable::Filtered { errno: "ENOSYS" },
        (Some(libc::ENOSYS), None) => Unavailable::NotInKernel,
        (Some(libc::ENOMEM), _) => Unavailable::Memory,
        _ => Unavailable::Other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(errno: i32, sysctl: Option<u32>) -> String {
        explain(io::Error::from_raw_os_error(errno), sysctl).to_string()
    }

    #[test]
    fn each_cause_has_its_own_message() {
        assert!(message(libc::ENOSYS, None).contains("has no io_uring"));
        assert!(message(libc::ENOSYS, Some(0)).contains("seccomp"));
        assert!(message(libc::EPERM, None).contains("seccomp"));
        assert!(message(libc::EPERM, Some(0)).contains("seccomp"));
        assert!(message(libc::EPERM, Some(1)).contains("kernel.io_uring_group"));
        assert!(message(libc::EPERM, Some(2)).contains("kernel.io_uring_disabled is 2"));
        assert!(message(libc::ENOMEM, Some(0)).contains("LimitMEMLOCK"));
        assert_eq!(message(libc::EMFILE, None), "io_uring can't be set up");
    }
}
