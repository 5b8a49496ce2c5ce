//! Options of the heading Recovery: what survives when the server is killed, stopped or upgraded.

use std::path::PathBuf;

use clap::Args;

/// What survives the server's end.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Recovery")]
pub struct Recovery {
    /// Restart the serving process if it is killed
    ///
    /// A new process resumes the session; VMM and guest notice a pause. The program can then be
    /// replaced while it serves: see `ringfsd upgrade --help`.
    #[arg(long)]
    pub supervise: bool,

    /// Keep the session in FILE for the next server
    ///
    /// FILE records what the guest knows, has open and has locked. If this server is killed or
    /// stopped and the VMM reconnects by itself (Cloud Hypervisor does), the next server with the
    /// same FILE resumes the session. A file on /run costs memory only, and is lost when the host
    /// restarts, as the guest is.
    ///
    /// [default: none]
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
}
