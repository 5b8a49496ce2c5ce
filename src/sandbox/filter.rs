//! The seccomp filter: the lists of `syscall_allowlist`, and the calls that are allowed only with
//! certain arguments.
//!
//! The invariant: a filter applies to all threads of the process, and is never removed.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::syscall_allowlist;
use crate::io::Engine;
use crate::sys::process;

/// What happens on a system call that the server doesn't make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// The kernel kills the process.
    #[default]
    Kill,
    /// The call is allowed, and the kernel logs it.
    Log,
    /// The process prints the call's number and exits.
    Trap,
    /// The call is allowed: there is no filter.
    None,
}

/// Why the filter can't be installed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// `seccompiler` doesn't support this architecture, or the rules contradict each other.
    #[error("making the seccomp filter; --seccomp none does without")]
    Make(#[source] seccompiler::BackendError),
    /// The kernel refuses the filter.
    #[error(
        "installing the seccomp filter (has this kernel CONFIG_SECCOMP_FILTER?); --seccomp none does \
         without"
    )]
    Install(#[source] seccompiler::Error),
    /// The handler that prints trapped calls can't be installed.
    #[error("handling SIGSYS")]
    Handler(#[source] rustix::io::Errno),
}

/// The compiled filter.
#[derive(Clone, Debug)]
pub struct Filter {
    action: Seccomp,
    programs: Vec<BpfProgram>,
}

/// A condition on an argument.
#[derive(Clone, Copy, Debug)]
enum Condition {
    /// It is one of these values.
    OneOf(&'static [u64]),
    /// Its bits under the mask (first) have this value (second).
    Bits(u64, u64),
}

/// Flags of `clone` that make a namespace.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

const fn bits(flags: libc::c_int) -> u64 {
    // The kernel reads 32 bits.
    flags.cast_unsigned() as u64
}

/// The `ioctl` requests that the server makes: inode flags; non-blocking sockets, and how much
/// there is to read from one.
const REQUESTS: &[u64] = &[
    // FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
    0x8008_6601,
    0x4008_6602,
    // FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
    0x801c_581f,
    0x401c_5820,
    libc::FIONBIO,
    libc::FIONREAD,
];

/// The flag of `open_tree` that makes a copy of a mount (uapi `linux/mount.h`).
const OPEN_TREE_CLONE: u64 = 1;

/// PR_GET_AUXV (uapi `linux/prctl.h`): the vector that contains the page size.
const GET_AUXV: u64 = 0x4155_5856;

/// The operations of `prctl`: a thread's name, its security bits, and the page size.
const PROPERTIES: &[u64] = &[
    GET_AUXV,
    bits(libc::PR_SET_NAME),
    bits(libc::PR_GET_SECUREBITS),
    bits(libc::PR_SET_SECUREBITS),
];

/// System calls that are allowed only if an argument, by its position, meets a condition.
const CONDITIONS: &[(libc::c_long, u8, Condition)] = &[
    // Make threads, but no processes.
    (
        libc::SYS_clone,
        0,
        Condition::Bits(
            bits(libc::CLONE_THREAD | NAMESPACES),
            bits(libc::CLONE_THREAD),
        ),
    ),
    // Give a thread its own working directory.
    (
        libc::SYS_unshare,
        0,
        Condition::OneOf(&[bits(libc::CLONE_FS)]),
    ),
    // Map no executable memory.
    (libc::SYS_mmap, 2, Condition::Bits(bits(libc::PROT_EXEC), 0)),
    (
        libc::SYS_mprotect,
        2,
        Condition::Bits(bits(libc::PROT_EXEC), 0),
    ),
    // Open a file without its content, and make no copy of a mount.
    (libc::SYS_open_tree, 2, Condition::Bits(OPEN_TREE_CLONE, 0)),
    (libc::SYS_prctl, 0, Condition::OneOf(PROPERTIES)),
    (libc::SYS_ioctl, 1, Condition::OneOf(REQUESTS)),
];

impl Filter {
    /// Compiles the filter for an `engine`; `file_handles` says whether files may be opened by
    /// handle, and `images` whether an image may be served.
    ///
    /// # Errors
    ///
    /// The processor's architecture isn't supported.
    pub fn new(
        action: Seccomp,
        engine: Engine,
        file_handles: bool,
        images: bool,
    ) -> Result<Self, FilterError> {
        let default = match action {
            Seccomp::Kill => SeccompAction::KillProcess,
            Seccomp::Log => SeccompAction::Log,
            Seccomp::Trap => SeccompAction::Trap,
            Seccomp::None => {
                return Ok(Self {
                    action,
                    programs: Vec::new(),
                });
            }
        };
        let mut rules = BTreeMap::new();
        let uring: &[_] = match engine {
            Engine::ThreadPool => &[],
            _ => syscall_allowlist::URING,
        };
        let handles: &[_] = if file_handles {
            syscall_allowlist::HANDLES
        } else {
            &[]
        };
        let images: &[_] = if images {
            syscall_allowlist::IMAGES
        } else {
            &[]
        };
        let lists = syscall_allowlist::ALWAYS
            .iter()
            .chain([&uring, &handles, &images]);
        for call in lists.copied().flatten() {
            rules.insert(*call, Vec::new());
        }
        for (call, argument, condition) in CONDITIONS {
            rules.insert(
                *call,
                condition.rules(*argument).map_err(FilterError::Make)?,
            );
        }
        // Its flags are in memory, which a filter can't read. On ENOSYS the C library uses `clone`.
        rules.insert(libc::SYS_clone3, Vec::new());
        let not_implemented = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let programs = [
            (clone3, SeccompAction::Allow, not_implemented),
            (rules, default, SeccompAction::Allow),
        ]
        .into_iter()
        .map(|(rules, default, on_match)| {
            let architecture: TargetArch = std::env::consts::ARCH.try_into()?;
            SeccompFilter::new(rules, default, on_match, architecture)?.try_into()
        })
        .collect::<Result<_, _>>()
        .map_err(FilterError::Make)?;
        Ok(Self { action, programs })
    }

    /// Installs the filter for all threads of the process: a file system may have some already.
    ///
    /// # Errors
    ///
    /// The kernel has no seccomp filters, or a filter of the launcher forbids to install one.
    pub fn install(&self) -> Result<(), FilterError> {
        if self.action == Seccomp::Trap {
            process::print_trapped_calls().map_err(FilterError::Handler)?;
        }
        // Once the last one is installed, no other can be.
        for program in &self.programs {
            seccompiler::apply_filter_all_threads(program).map_err(FilterError::Install)?;
        }
        Ok(())
    }
}

impl Condition {
    /// The rules; a call is allowed if one of them matches.
    fn rules(self, argument: u8) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let rule = |operator, value| {
            let length = SeccompCmpArgLen::Dword;
            let condition = SeccompCondition::new(argument, length, operator, value)?;
            SeccompRule::new(vec![condition])
        };
        match self {
            Self::OneOf(values) => values
                .iter()
                .map(|value| rule(SeccompCmpOp::Eq, *value))
                .collect(),
            Self::Bits(mask, value) => Ok(vec![rule(SeccompCmpOp::MaskedEq(mask), value)?]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_is_listed_once() {
        let lists = syscall_allowlist::ALWAYS.iter().copied().chain([
            syscall_allowlist::URING,
            syscall_allowlist::HANDLES,
            syscall_allowlist::IMAGES,
        ]);
        let mut all: Vec<_> = lists.flatten().copied().collect();
        all.extend(CONDITIONS.iter().map(|(call, ..)| *call));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(!all.contains(&libc::SYS_clone3));
    }

    #[test]
    fn each_engine_has_its_filter() {
        let length = |engine, handles, images| {
            let filter = Filter::new(Seccomp::Kill, engine, handles, images).unwrap();
            filter.programs[1].len()
        };
        let least = length(Engine::ThreadPool, false, false);
        assert!(length(Engine::Uring, false, false) > least);
        assert!(length(Engine::ThreadPool, true, false) > least);
        assert!(length(Engine::ThreadPool, false, true) > least);
        let none = Filter::new(Seccomp::None, Engine::ThreadPool, true, true).unwrap();
        assert!(none.programs.is_empty());
    }
}
