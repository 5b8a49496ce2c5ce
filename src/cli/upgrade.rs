//! The command `ringfsd upgrade` and its options.

use clap::Parser;

/// Replace a running server with this program
///
/// The server must have been started with --supervise. It executes this program in its process,
/// with the arguments that it was started with; VMM and guest notice a pause. If this program can't
/// serve, the server resumes as it was, and this command reports why.
#[derive(Clone, Debug, Parser)]
#[command(name = "ringfsd upgrade", bin_name = "ringfsd upgrade", version)]
pub struct Upgrade {
    /// Process that was started as the server
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn upgrade_needs_a_pid() {
        Upgrade::command().debug_assert();
        assert!(Upgrade::try_parse_from(["upgrade"]).is_err());
        assert_eq!(
            Upgrade::try_parse_from(["upgrade", "--pid=7"]).unwrap().pid,
            7
        );
    }
}
