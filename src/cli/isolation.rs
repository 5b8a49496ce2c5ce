//! Options of the heading Isolation: what the server can still reach if a guest takes it over.

use clap::Args;

use crate::sandbox::{self, CapabilityChanges, IdRange, Kind, Seccomp};

/// The sandbox.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Isolation")]
pub struct Isolation {
    /// Sandbox: namespace, chroot or none
    ///
    /// - namespace: mount, PID, network and IPC namespaces that contain
    ///   only the directory; a user namespace too, unless root
    /// - chroot: a root directory of its own, for containers without
    ///   CAP_SYS_ADMIN
    /// - none: neither, for launchers that have their own sandbox
    ///
    /// Landlock is added where the kernel has it.
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        ignore_case = true,
        default_value_t,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub sandbox: Kind,

    /// Same as --sandbox none
    ///
    /// This is crosvm's spelling.
    #[arg(long, conflicts_with = "sandbox")]
    pub disable_sandbox: bool,

    /// Seccomp: kill, trap, log or none
    ///
    /// The action for a system call that the server never makes:
    ///
    /// - kill: end the server
    /// - trap: end the server and report the call
    /// - log: permit the call and report it in the kernel's log
    /// - none: no filter
    #[arg(
        long,
        value_name = "ACTION",
        value_enum,
        ignore_case = true,
        default_value_t,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub seccomp: Seccomp,

    /// Capabilities to keep or drop: +sys_admin:-mknod
    ///
    /// LIST changes the set that the other options need; all other capabilities are dropped.
    ///
    /// [default: no changes]
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true, value_parser = capabilities)]
    pub modcaps: CapabilityChanges,

    /// Map user ids of the server's user namespace
    ///
    /// RANGE is :NAMESPACE:HOST:COUNT:, such as :0:100000:65536:. COUNT ids from NAMESPACE on are
    /// those of the host from HOST on. May be given several times. A server that isn't root needs
    /// newuidmap, and ids that /etc/subuid grants its user.
    ///
    /// [default: all ids for root, the own id for another user]
    #[arg(long, value_name = "RANGE")]
    pub uid_map: Vec<IdRange>,

    /// Map group ids of the server's user namespace
    ///
    /// The syntax is that of --uid-map.
    ///
    /// [default: all ids for root, the own id for another user]
    #[arg(long, value_name = "RANGE")]
    pub gid_map: Vec<IdRange>,
}

/// Parses a list that may be empty.
fn capabilities(text: &str) -> Result<CapabilityChanges, sandbox::UnknownCapability> {
    match text {
        "" => Ok(CapabilityChanges::default()),
        list => list.parse(),
    }
}

impl From<Isolation> for sandbox::Options {
    fn from(options: Isolation) -> Self {
        Self {
            kind: if options.disable_sandbox {
                Kind::None
            } else {
                options.sandbox
            },
            seccomp: options.seccomp,
            users: options.uid_map,
            groups: options.gid_map,
            capabilities: options.modcaps,
            reports: false,
        }
    }
}
