//! Finds out whether this process can use the io_uring features that the server needs.
//!
//! Nothing is inferred from version numbers: a small ring is created and tested. The invariant:
//! every result has a reason that fits into one log line.

use std::io;

use io_uring::{IoUring, Probe};

use super::engine::Engine;
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
    check_features(&ring)?;
    setup::close_and_enable(&ring)
        .map_err(|_refused| Unavailable::Lacks(vec!["IORING_REGISTER_RESTRICTIONS"]))
}

/// Chooses the engine.
///
/// # Errors
///
/// Fails if io_uring was requested explicitly and can't be used.
pub fn choose(choice: Choice) -> Result<Chosen, RuntimeError> {
    let chosen = |engine, reason: String| Ok(Chosen { engine, reason });
    match choice {
        Choice::Tokio => chosen(Engine::ThreadPool, "requested".into()),
        Choice::Uring => match probe() {
            Ok(()) => chosen(Engine::Uring, "requested".into()),
            Err(e) => Err(RuntimeError::Unavailable(e)),
        },
        Choice::Auto => match probe() {
            Ok(()) => chosen(Engine::Uring, "the kernel supports it".into()),
            Err(Unavailable::Other(e)) => {
                chosen(Engine::ThreadPool, format!("io_uring can't be set up: {e}"))
            }
            Err(e) => chosen(Engine::ThreadPool, e.to_string()),
        },
    }
}

fn check_features(ring: &IoUring) -> Result<(), Unavailable> {
    let mut probe = Probe::new();
    if ring.submitter().register_probe(&mut probe).is_err() {
        return Err(Unavailable::Lacks(vec!["IORING_REGISTER_PROBE"]));
    }
    let mut missing: Vec<_> = setup::OPERATIONS
        .into_iter()
        .filter(|&(code, _)| !probe.is_supported(code))
        .map(|(_, name)| name)
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
