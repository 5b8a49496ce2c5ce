//! Options of the heading Observability: the log, and what the server says of itself.

use clap::{Args, ValueEnum};

/// Logging and introspection.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Observability")]
pub struct Observability {
    /// Log level: off, error, warn, info, debug or trace
    ///
    /// The log goes to standard error. The environment variable RINGFSD_LOG sets finer filters, such
    /// as `info,ringfsd::vhost_user=debug`.
    #[arg(
        long,
        value_name = "LEVEL",
        value_enum,
        default_value_t = LogLevel::Info,
        hide_possible_values = true
    )]
    pub log_level: LogLevel,

    /// Same as --log-level debug
    ///
    /// --log-level trace still applies.
    #[arg(short = 'd')]
    pub debug: bool,

    /// Log to syslog
    ///
    /// Records go to /dev/log instead of standard error.
    #[arg(long)]
    pub syslog: bool,

    /// Print what the server supports as JSON, and exit
    ///
    /// libvirt asks for this before it starts a server.
    #[arg(long, exclusive = true)]
    pub print_capabilities: bool,
}

impl Observability {
    /// The most verbose level that an option asks for.
    #[must_use]
    pub fn level(&self) -> LogLevel {
        if self.debug {
            self.log_level.max(LogLevel::Debug)
        } else {
            self.log_level
        }
    }
}

/// `--log-level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// An action that was asked for has failed.
    Error,
    /// Unexpected, but survived.
    Warn,
    /// Rare changes of state: sessions, negotiated features.
    Info,
    /// For developers.
    Debug,
    /// For developers, everything.
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}
