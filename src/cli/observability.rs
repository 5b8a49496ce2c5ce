//! Options of the heading Observability: the log, and what the server says of itself.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::persona::Behaviour;
use super::values::LogLevels;
use crate::logging::{self, LevelList};
use crate::metrics::Address;

/// Logging and introspection.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Observability")]
pub struct Observability {
    /// Log level: off, error, warn, info, debug or trace
    ///
    /// Parts of the server can have levels of their own, as in info,fs=debug,vhost_user=off; an
    /// unknown part is an error that lists them. The log goes to standard error. The environment
    /// variable RINGFSD_LOG sets finer filters, such as `info,ringfsd::fs::vfs=debug`; with
    /// --compat virtiofsd, RUST_LOG does. Of messages that repeat, about 50 in 10 seconds are
    /// logged, and the others counted, unless their level is debug.
    #[arg(
        long,
        value_name = "LEVELS",
        value_parser = LogLevels,
        hide_possible_values = true,
        default_value = "info"
    )]
    pub log_level: LevelList,

    /// Same as --log-level debug
    ///
    /// --log-level trace still applies.
    #[arg(short = 'd')]
    pub debug: bool,

    /// Format of log records: text or json
    ///
    /// An object has time, level, target (the part of the server) and message.
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = log_format(), hide_possible_values = true)]
    pub log_format: logging::Format,

    /// Log to syslog
    ///
    /// Records go to /dev/log instead of standard error. If no syslog listens there, the server warns
    /// and uses standard error.
    #[arg(long)]
    pub syslog: bool,

    /// Serve metrics at unix:PATH, 127.0.0.1:PORT or [::1]:PORT
    ///
    /// They are OpenMetrics text under /metrics, for Prometheus and others: requests and their
    /// durations, errors, bytes, descriptors, restarts. Whoever can connect can read them: the
    /// server's user at unix:PATH, all users of this host at a port. Counters survive restarts by
    /// --supervise and upgrades.
    ///
    /// [default: none]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<Address>,
    /// Let the server be controlled by a new socket: unix:PATH
    ///
    /// `ringfsd ctl PATH` shows what the server does, and changes its settings while it runs; see
    /// `ringfsd ctl --help`. Only the server's user and root can connect. With --vfs, directories can
    /// be mounted while the server runs, so Landlock isn't used.
    ///
    /// [default: none]
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path)]
    pub control: Option<PathBuf>,

    /// Print what the server supports as JSON, and exit
    ///
    /// libvirt asks for this before it starts a server.
    #[arg(long, exclusive = true)]
    pub print_capabilities: bool,
}

/// Parses `text` or `json`.
fn log_format() -> impl TypedValueParser<Value = logging::Format> {
    PossibleValuesParser::new(["text", "json"]).map(|name| match &*name {
        "json" => logging::Format::Json,
        _ => logging::Format::Text,
    })
}

/// Parses `unix:PATH`.
fn unix_path(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err("expected unix:PATH".to_owned()),
    }
}

/// The variable that Rust programs take log filters from.
const RUST_LOG: &str = "RUST_LOG";

/// The filters of the log that the environment sets, instead of the level that options set or beside
/// it: none if the log goes to syslog and the behaviour is virtiofsd's.
#[must_use]
pub fn log_filters(
    behaviour: &Behaviour,
    variable: impl Fn(&'static str) -> Option<OsString>,
    has_syslog: bool,
) -> Option<String> {
    let text = variable(behaviour.log_variable)?.into_string().ok()?;
    if behaviour.log_variable != RUST_LOG {
        return Some(text);
    }
    // The modules of this program, which stand for those of virtiofsd.
    let own = |filter: &str| match filter.strip_prefix("virtiofsd") {
        Some(rest) if rest.is_empty() || rest.starts_with(['=', ':']) => format!("ringfsd{rest}"),
        _ => filter.to_owned(),
    };
    let filters: Vec<_> = text.split(',').map(|filter| own(filter.trim())).collect();
    // A variable that sets no level leaves errors.
    (!has_syslog).then(|| format!("error,{}", filters.join(",")))
}

impl Observability {
    /// The most verbose levels that an option asks for.
    #[must_use]
    pub fn levels(&self) -> LevelList {
        let levels = self.log_level.clone();
        if self.debug {
            levels.at_least_debug()
        } else {
            levels
        }
    }
}
