//! Options of `ringfsd upgrade`.

use clap::Parser;

/// Have a running server replaced by this program, while its guest goes on.
///
/// The server must have been started with --supervise. It runs this program in its place, with the
/// arguments that it was started with; VMM and guest notice a pause. If this program doesn't get as
/// far as serving, the server goes on as it was, and this command tells why.
#[derive(Clone, Debug, Parser)]
#[command(name = "ringfsd upgrade", version)]
pub struct Upgrade {
    /// The process that was started as the server.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Upgrade::command().debug_assert();
        assert!(Upgrade::try_parse_from(["upgrade"]).is_err());
        assert_eq!(
            Upgrade::try_parse_from(["upgrade", "--pid=7"]).unwrap().pid,
            7
        );
    }
}
