//! The seccomp filter: the lists of `syscall_allowlist`, and the calls that are allowed only with
//! certain arguments.
//!
//! The invariant: a filter applies to all threads of the process, and is never removed.

use std::collections::BTreeMap;

use seccompiler::{BackendError, BpfProgram};

use super::bpf::{self, Condition, Rule, Verdict};
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
    /// This architecture isn't supported.
    #[error("making the seccomp filter; --seccomp none does without")]
    Make(#[source] BackendError),
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
    program: Option<BpfProgram>,
}

/// Flags of `clone` that make a namespace.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

const fn bits(flags: libc::c_int) -> u32 {
    flags.cast_unsigned()
}

/// The `ioctl` requests that the server makes: inode flags; non-blocking sockets, and how much
/// there is to read from one.
const REQUESTS: &[u32] = &[
    // FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
    0x8008_6601,
    0x4008_6602,
    // FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
    0x801c_581f,
    0x401c_5820,
    request(libc::FIONBIO),
    request(libc::FIONREAD),
];

#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of requests have 32 bits"
)]
const fn request(number: libc::c_ulong) -> u32 {
    number as u32
}

/// The flag of `open_tree` that makes a copy of a mount (uapi `linux/mount.h`).
const OPEN_TREE_CLONE: u32 = 1;

/// PR_GET_AUXV (uapi `linux/prctl.h`): the vector that contains the page size.
const GET_AUXV: u32 = 0x4155_5856;

/// The operations of `prctl`: a thread's name, its security bits, and the page size.
const PROPERTIES: &[u32] = &[
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
        let program = match action {
            Seccomp::Kill => Some(libc::SECCOMP_RET_KILL_PROCESS),
            Seccomp::Log => Some(libc::SECCOMP_RET_LOG),
            Seccomp::Trap => Some(libc::SECCOMP_RET_TRAP),
            Seccomp::None => None,
        }
        .map(|default| {
            let rules = rules(default, engine, file_handles, images);
            // Calls by the numbers of another architecture are never the server's.
            bpf::compile(&rules, default, libc::SECCOMP_RET_KILL_PROCESS).ok_or_else(|| {
                let architecture = std::env::consts::ARCH.to_owned();
                FilterError::Make(BackendError::InvalidTargetArch(architecture))
            })
        })
        .transpose()?;
        Ok(Self { action, program })
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
        match &self.program {
            Some(program) => {
                seccompiler::apply_filter_all_threads(program).map_err(FilterError::Install)
            }
            None => Ok(()),
        }
    }
}

/// What is done with each call by its number; all others get `default`.
fn rules(
    default: Verdict,
    engine: Engine,
    file_handles: bool,
    images: bool,
) -> BTreeMap<u32, Rule> {
    const ALLOW: Verdict = libc::SECCOMP_RET_ALLOW;
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
    let always = lists
        .copied()
        .flatten()
        .map(|call| (*call, Rule::Always(ALLOW)));
    let conditional = CONDITIONS.iter().map(|(call, argument, condition)| {
        let rule = Rule::If(*argument, *condition, ALLOW, default);
        (*call, rule)
    });
    // Its flags are in memory, which a filter can't read. On ENOSYS the C library uses `clone`.
    let not_implemented = libc::SECCOMP_RET_ERRNO | bits(libc::ENOSYS);
    let clone3 = (libc::SYS_clone3, Rule::Always(not_implemented));
    always
        .chain(conditional)
        .chain([clone3])
        .filter_map(|(call, rule)| Some((u32::try_from(call).ok()?, rule)))
        .collect()
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

    /// What the filter of `rules` does with a call.
    fn verdict(filter: &Filter, call: libc::c_long, arguments: [u64; 6]) -> Verdict {
        let program = filter.program.as_ref().unwrap();
        // The filter compares it with its own: the second instruction.
        let architecture = program[1].k;
        let number = u32::try_from(call).unwrap();
        bpf::tests::run(program, architecture, number, arguments).0
    }

    #[test]
    fn filter_allows_what_is_listed_and_nothing_else() {
        for action in [Seccomp::Kill, Seccomp::Log, Seccomp::Trap] {
            let filter = Filter::new(action, Engine::Uring, false, false).unwrap();
            let default = match action {
                Seccomp::Kill => libc::SECCOMP_RET_KILL_PROCESS,
                Seccomp::Log => libc::SECCOMP_RET_LOG,
                _ => libc::SECCOMP_RET_TRAP,
            };
            let listed: Vec<_> = (syscall_allowlist::ALWAYS.iter().copied())
                .chain([syscall_allowlist::URING])
                .flatten()
                .collect();
            let conditional: Vec<_> = CONDITIONS.iter().map(|(call, ..)| call).collect();
            for call in 0..1024 {
                let expected = match call {
                    libc::SYS_clone3 => libc::SECCOMP_RET_ERRNO | bits(libc::ENOSYS),
                    _ if conditional.contains(&&call) => continue,
                    _ if listed.contains(&&call) => libc::SECCOMP_RET_ALLOW,
                    _ => default,
                };
                assert_eq!(verdict(&filter, call, [u64::MAX; 6]), expected, "{call}");
            }
        }
    }

    #[test]
    fn conditions_look_at_the_right_argument() {
        let filter = Filter::new(Seccomp::Kill, Engine::Uring, false, false).unwrap();
        let allows = |call, at: usize, value: u64| {
            // The other arguments are neither a thread's flags nor a request.
            let mut arguments = [1 << 31; 6];
            arguments[at] = value;
            verdict(&filter, call, arguments) == libc::SECCOMP_RET_ALLOW
        };
        let flags = |flags: libc::c_int| u64::from(bits(flags));
        let thread = flags(libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND);
        assert!(allows(libc::SYS_clone, 0, thread));
        assert!(!allows(libc::SYS_clone, 0, flags(libc::SIGCHLD)));
        assert!(!allows(
            libc::SYS_clone,
            0,
            thread | flags(libc::CLONE_NEWUSER)
        ));
        assert!(allows(libc::SYS_unshare, 0, flags(libc::CLONE_FS)));
        assert!(!allows(libc::SYS_unshare, 0, flags(libc::CLONE_NEWNS)));
        let (read, exec) = (flags(libc::PROT_READ), flags(libc::PROT_EXEC));
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            assert!(allows(call, 2, read));
            assert!(!allows(call, 2, read | exec));
        }
        for request in REQUESTS {
            assert!(allows(libc::SYS_ioctl, 1, u64::from(*request)));
        }
        assert!(!allows(libc::SYS_ioctl, 1, libc::TIOCSTI));
        assert!(allows(libc::SYS_prctl, 0, u64::from(GET_AUXV)));
        assert!(!allows(libc::SYS_prctl, 0, flags(libc::PR_SET_MM)));
    }

    #[test]
    fn each_engine_has_its_filter() {
        let allows = |engine, handles, images, call| {
            let filter = Filter::new(Seccomp::Kill, engine, handles, images).unwrap();
            verdict(&filter, call, [0; 6]) == libc::SECCOMP_RET_ALLOW
        };
        let pool = Engine::ThreadPool;
        for (engine, handles, images, call) in [
            (Engine::Uring, false, false, libc::SYS_io_uring_enter),
            (pool, true, false, libc::SYS_open_by_handle_at),
            (pool, false, true, libc::SYS_preadv),
        ] {
            assert!(allows(engine, handles, images, call));
            assert!(!allows(pool, false, false, call));
        }
        let none = Filter::new(Seccomp::None, pool, true, true).unwrap();
        assert!(none.program.is_none());
    }
}
