//! Options of what keeps the server in.

use clap::{Args, ValueEnum};

use crate::sandbox::{self, CapabilityChanges, IdRange};

/// What keeps the server in the shared directory, should a guest get the better of it.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Sandbox")]
pub struct Confinement {
    /// How the server is kept to the shared directory. namespace: user (unless root), mount, PID,
    /// network and IPC namespaces of its own, with nothing in them but the directory. chroot: a
    /// root of its own, for containers without CAP_SYS_ADMIN. none: neither, for launchers that
    /// have a sandbox of theirs. Landlock comes on top where the kernel has it.
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub sandbox: Sandbox,

    /// As --sandbox none, the way that crosvm spells it.
    #[arg(long, conflicts_with = "sandbox")]
    pub disable_sandbox: bool,

    /// What becomes of a system call that the server never makes. kill: the server ends. trap: it
    /// ends, and says which call it was. log: the call is made, and the kernel's log tells of it.
    /// none: the call is made.
    #[arg(long, value_name = "ACTION", value_enum, default_value_t)]
    pub seccomp: Seccomp,

    /// Capabilities to keep beyond those that the other options need, and to drop of these, such
    /// as +sys_admin:-mknod.
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true, value_parser = capabilities)]
    pub modcaps: CapabilityChanges,

    /// Give the namespace COUNT user ids from NAMESPACE on, which are those from HOST on of the
    /// host: :NAMESPACE:HOST:COUNT:, such as :0:100000:65536:. May be given several times. A server
    /// that isn't root needs newuidmap, and ids that /etc/subuid gives its user. [default: root has
    /// all ids, another user its own]
    #[arg(long, value_name = "RANGE")]
    pub uid_map: Vec<IdRange>,

    /// Give the namespace group ids, as --uid-map does user ids.
    #[arg(long, value_name = "RANGE")]
    pub gid_map: Vec<IdRange>,
}

/// `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// Namespaces.
    #[default]
    Namespace,
    /// Another root.
    Chroot,
    /// Neither.
    None,
}

/// `--seccomp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Seccomp {
    /// End.
    #[default]
    Kill,
    /// Make it and log it.
    Log,
    /// End and tell.
    Trap,
    /// No filter.
    None,
}

/// A list that may be empty.
fn capabilities(text: &str) -> Result<CapabilityChanges, sandbox::UnknownCapability> {
    match text {
        "" => Ok(CapabilityChanges::default()),
        list => list.parse(),
    }
}

impl From<Confinement> for sandbox::Options {
    fn from(options: Confinement) -> Self {
        Self {
            kind: match options.sandbox {
                _ if options.disable_sandbox => sandbox::Kind::None,
                Sandbox::Namespace => sandbox::Kind::Namespace,
                Sandbox::Chroot => sandbox::Kind::Chroot,
                Sandbox::None => sandbox::Kind::None,
            },
            seccomp: match options.seccomp {
                Seccomp::Kill => sandbox::Seccomp::Kill,
                Seccomp::Log => sandbox::Seccomp::Log,
                Seccomp::Trap => sandbox::Seccomp::Trap,
                Seccomp::None => sandbox::Seccomp::None,
            },
            users: options.uid_map,
            groups: options.gid_map,
            capabilities: options.modcaps,
        }
    }
}
