//! The command `ringfsd top` and its options.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Watch what running servers do
///
/// The servers must have been started with --control unix:SOCKET. Keys: q quits, space pauses, the
/// arrows select a share, s sorts by the next column, r reverses the order, f shows the busiest
/// files instead of the busiest operations.
#[derive(Clone, Debug, Parser)]
#[command(name = "ringfsd top", bin_name = "ringfsd top", version)]
pub struct Top {
    /// Paths of control sockets, or names of shares
    ///
    /// A NAME stands for NAME.ctl in /run/ringfsd, /run/ringfsd-user or $XDG_RUNTIME_DIR/ringfsd.
    /// Without any, all sockets in these directories whose names end with .ctl.
    pub sockets: Vec<PathBuf>,

    /// Seconds between two updates, 0.1 to 60
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,

    /// Print N updates as text and exit
    ///
    /// For logs and scripts; standard output needs to be no terminal.
    #[arg(long, value_name = "N")]
    pub batch: Option<u32>,

    /// Columns of the text that --batch prints
    #[arg(long, value_name = "N", default_value_t = 80, requires = "batch", value_parser = clap::value_parser!(u16).range(40..=500))]
    pub width: u16,
}

fn interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=60.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected a number from 0.1 to 60".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn interval_is_within_its_limits() {
        Top::command().debug_assert();
        let top = Top::try_parse_from(["top", "/a", "/b", "--interval=0.5"]).unwrap();
        assert_eq!(top.sockets.len(), 2);
        assert_eq!(top.interval, Duration::from_millis(500));
        for wrong in ["0", "61", "x", "NaN"] {
            assert!(
                Top::try_parse_from(["top", "--interval", wrong]).is_err(),
                "{wrong}"
            );
        }
        assert!(Top::try_parse_from(["top", "--width=90"]).is_err());
    }
}
