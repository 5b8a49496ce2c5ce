//! The seccomp filter: made of the lists in `calls`, and of what arguments decide.
//!
//! The invariant: a filter holds for the thread that installs it and all that it starts, and is
//! never taken away.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::syscall_allowlist;
use crate::io::Engine;
use crate::sys::process;

/// What becomes of a system call that the server doesn't make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// It ends the process.
    #[default]
    Kill,
    /// It is made, and the kernel's log tells of it.
    Log,
    /// It ends the process, which tells of it before.
    Trap,
    /// It is made: there is no filter.
    None,
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// There is none for this architecture, or the rules contradict each other.
    #[error("making the seccomp filter; --seccomp none does without")]
    Make(#[source] seccompiler::BackendError),
    /// The kernel doesn't take it.
    #[error(
        "installing the seccomp filter (has this kernel CONFIG_SECCOMP_FILTER?); --seccomp none does without"
    )]
    Install(#[source] seccompiler::Error),
    /// Nothing tells of what is trapped.
    #[error("handling SIGSYS")]
    Handler(#[source] rustix::io::Errno),
}

/// System calls that are allowed.
#[derive(Clone, Debug)]
pub struct Filter {
    action: Seccomp,
    programs: Vec<BpfProgram>,
}

/// An argument, and what it must be.
#[derive(Clone, Copy, Debug)]
enum Only {
    /// One of these.
    OneOf(&'static [u64]),
    /// Of the bits of the first, those of the second.
    Bits(u64, u64),
}

/// Flags that make a namespace.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

const fn bits(flags: libc::c_int) -> u64 {
    // The kernel looks at 32 bits.
    flags.cast_unsigned() as u64
}

/// The requests of `ioctl` that are made: flags of inodes; a socket that shall not wait, and how
/// much there is to read from one.
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

/// PR_GET_AUXV (uapi `linux/prctl.h`): where the size of a page stands.
const GET_AUXV: u64 = 0x4155_5856;

/// A thread's name, whether it keeps its capabilities, and the size of a page.
const PROPERTIES: &[u64] = &[
    GET_AUXV,
    bits(libc::PR_SET_NAME),
    bits(libc::PR_GET_SECUREBITS),
    bits(libc::PR_SET_SECUREBITS),
];

/// System calls of which an argument, by its position, has to be something.
const CONDITIONS: &[(libc::c_long, u8, Only)] = &[
    // Threads, and no process.
    (
        libc::SYS_clone,
        0,
        Only::Bits(
            bits(libc::CLONE_THREAD | NAMESPACES),
            bits(libc::CLONE_THREAD),
        ),
    ),
    // Between the front end's socket and the library that reads its messages.
    (libc::SYS_socketpair, 0, Only::OneOf(&[bits(libc::AF_UNIX)])),
    // Each thread has a working directory of its own.
    (libc::SYS_unshare, 0, Only::OneOf(&[bits(libc::CLONE_FS)])),
    // No memory is run that was written.
    (libc::SYS_mmap, 2, Only::Bits(bits(libc::PROT_EXEC), 0)),
    (libc::SYS_mprotect, 2, Only::Bits(bits(libc::PROT_EXEC), 0)),
    (libc::SYS_prctl, 0, Only::OneOf(PROPERTIES)),
    (libc::SYS_ioctl, 1, Only::OneOf(REQUESTS)),
];

impl Filter {
    /// The filter for an `engine`; `file_handles` tells whether files may be opened by handle.
    ///
    /// # Errors
    ///
    /// There is none for this processor's architecture.
    pub fn new(action: Seccomp, engine: Engine, file_handles: bool) -> Result<Self, FilterError> {
        let otherwise = match action {
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
        let uring: &[_] = if engine == Engine::Uring {
            syscall_allowlist::URING
        } else {
            &[]
        };
        let handles: &[_] = if file_handles {
            syscall_allowlist::HANDLES
        } else {
            &[]
        };
        let lists = syscall_allowlist::ALWAYS.iter().chain([&uring, &handles]);
        for call in lists.copied().flatten() {
            rules.insert(*call, Vec::new());
        }
        for (call, argument, only) in CONDITIONS {
            rules.insert(*call, only.rules(*argument).map_err(FilterError::Make)?);
        }
        // Its flags lie in memory, where no filter sees them. The C library takes `clone` then.
        rules.insert(libc::SYS_clone3, Vec::new());
        let lacking = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        let without = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let programs = [
            (without, SeccompAction::Allow, lacking),
            (rules, otherwise, SeccompAction::Allow),
        ]
        .into_iter()
        .map(|(rules, otherwise, then)| {
            let architecture: TargetArch = std::env::consts::ARCH.try_into()?;
            SeccompFilter::new(rules, otherwise, then, architecture)?.try_into()
        })
        .collect::<Result<_, _>>()
        .map_err(FilterError::Make)?;
        Ok(Self { action, programs })
    }

    /// Lets the calling thread, and those it starts, make no other system calls from now on.
    ///
    /// # Errors
    ///
    /// The kernel has no filters, or a filter of the launcher forbids them.
    pub fn install(&self) -> Result<(), FilterError> {
        if self.action == Seccomp::Trap {
            process::tell_of_trapped_calls().map_err(FilterError::Handler)?;
        }
        // The last one forbids to install another.
        for program in &self.programs {
            seccompiler::apply_filter(program).map_err(FilterError::Install)?;
        }
        Ok(())
    }
}

impl Only {
    /// One of the rules has to match.
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
    fn no_call_is_listed_twice_nor_decided_about_in_two_places() {
        let lists = syscall_allowlist::ALWAYS
            .iter()
            .copied()
            .chain([syscall_allowlist::URING, syscall_allowlist::HANDLES]);
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
        let length = |engine, handles| {
            let filter = Filter::new(Seccomp::Kill, engine, handles).unwrap();
            filter.programs[1].len()
        };
        assert!(length(Engine::Uring, false) > length(Engine::ThreadPool, false));
        assert!(length(Engine::ThreadPool, true) > length(Engine::ThreadPool, false));
        let none = Filter::new(Seccomp::None, Engine::ThreadPool, true).unwrap();
        assert!(none.programs.is_empty());
    }
}
