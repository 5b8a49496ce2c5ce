//! Options of what the guest may do with the shared directory, and of what it may cache.
//!
//! Only words become settings here; whether the host can do it is found out at the start.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::config::Share;
use crate::fs::passthrough;
use crate::fuse::{Readdirplus, SessionOptions};

/// What may be done with the shared directory.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "What the guest may do and keep")]
pub struct Sharing {
    /// What the guest may keep of the files it has seen. never: nothing; every look is a look
    /// at the host. metadata: names and attributes for a day, data not. auto: names and
    /// attributes for a second, data until the file has changed. always: all for a day, data
    /// also across close and open: for directories that nobody else changes.
    #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
    pub cache: Cache,

    /// Seconds, such as 0.5, for which the guest may rely on the attributes of a file. Set by
    /// --cache unless given.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub attr_timeout: Option<Duration>,

    /// Seconds for which the guest may rely on a name that it has looked up. Set by --cache
    /// unless given.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub entry_timeout: Option<Duration>,

    /// Seconds for which the guest may rely on a name not being there. Programs that search
    /// along a path ask less often; a file made on the host is seen as much later.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "0")]
    pub negative_timeout: Duration,
}

/// `--cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Nothing.
    Never,
    /// Names and attributes.
    Metadata,
    /// A little of everything.
    #[default]
    Auto,
    /// Everything.
    Always,
}

impl From<Cache> for passthrough::Cache {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::Never => Self::Never,
            Cache::Metadata => Self::Metadata,
            Cache::Auto => Self::Auto,
            Cache::Always => Self::Always,
        }
    }
}

/// A time in seconds, with a fraction if need be.
fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "a number of seconds, such as 1 or 0.5".to_owned())
}

impl From<Sharing> for Share {
    fn from(sharing: Sharing) -> Self {
        let cache = passthrough::Cache::from(sharing.cache);
        let attribute_ttl = sharing.attr_timeout.unwrap_or(cache.ttl());
        let entry_ttl = sharing.entry_timeout.unwrap_or(cache.ttl());
        let readdirplus = if sharing.cache == Cache::Never {
            Readdirplus::Never
        } else {
            Readdirplus::Auto
        };
        Self {
            file_system: passthrough::Options {
                cache,
                attribute_ttl,
                entry_ttl,
                ..passthrough::Options::default()
            },
            session: SessionOptions {
                readdirplus,
                negative_ttl: sharing.negative_timeout,
                cache_symlinks: !attribute_ttl.is_zero() && !entry_ttl.is_zero(),
                ..SessionOptions::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_with_fractions() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("86400"), Ok(Duration::from_secs(86400)));
        for bad in ["", "-1", "1s", "nan", "inf", "1e300"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_single_timeout_overrides_the_policy() {
        let share = Share::from(Sharing {
            cache: Cache::Always,
            entry_timeout: Some(Duration::ZERO),
            ..Sharing::default()
        });
        assert_eq!(share.file_system.attribute_ttl, Duration::from_secs(86400));
        assert_eq!(share.file_system.entry_ttl, Duration::ZERO);
        assert!(!share.session.cache_symlinks);
    }
}
