//! The spellings of values: one table for each enum of a room that an option chooses from.
//!
//! The enums belong to the rooms that use them, so there is one type for each choice. The invariant:
//! the first spelling of a value is the one that help and manual show; case doesn't matter.

use std::ffi::OsStr;

use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, StringValueParser, TypedValueParser};
use log::LevelFilter;

use crate::config::Prefetch;
use crate::fs::passthrough::{Cache, InodeFileHandles, MigrationMode, OnMigrationError};
use crate::fuse::Wanted;
use crate::io::Choice;
use crate::logging::LevelList;
use crate::sandbox::{Kind, Seccomp};

macro_rules! spellings {
    ($($enum:ident { $($variant:ident = $name:literal $(| $alias:literal)*,)+ })+) => {$(
        impl ValueEnum for $enum {
            fn value_variants<'a>() -> &'a [Self] {
                &[$(Self::$variant),+]
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                Some(match self {
                    $(Self::$variant => PossibleValue::new($name)$(.alias($alias))*,)+
                })
            }
        }
    )+};
}

spellings! {
    Prefetch {
        None = "none",
        Named = "named",
        All = "all",
    }
    Cache {
        Never = "never" | "none",
        Metadata = "metadata",
        Auto = "auto",
        Always = "always",
    }
    InodeFileHandles {
        Never = "never",
        Prefer = "prefer" | "fallback",
        Mandatory = "mandatory",
    }
    Wanted {
        No = "never",
        IfOffered = "auto",
        Needed = "always",
    }
    Choice {
        Auto = "auto",
        Uring = "uring",
        Tokio = "tokio",
        TokioUring = "tokio-uring",
    }
    Kind {
        Namespace = "namespace",
        Chroot = "chroot",
        None = "none",
    }
    Seccomp {
        Kill = "kill",
        Trap = "trap",
        Log = "log",
        None = "none",
    }
    MigrationMode {
        FindPaths = "find-paths",
        FileHandles = "file-handles",
    }
    OnMigrationError {
        Abort = "abort",
        GuestError = "guest-error",
    }
}

/// The log levels.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Parses log levels of all rooms and of single ones. The completions are those of all rooms.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogLevels;

impl TypedValueParser for LogLevels {
    type Value = LevelList;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<LevelList, clap::Error> {
        let text = StringValueParser::new().try_map(|text| text.parse::<LevelList>());
        text.parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(LEVELS.into_iter().map(PossibleValue::new)))
    }
}

/// Parses a log level; `log` has the type.
pub(super) fn log_level() -> impl TypedValueParser<Value = LevelFilter> {
    let values = LEVELS.map(|name| match name {
        "error" => PossibleValue::new(name).alias("err"),
        name => PossibleValue::new(name),
    });
    PossibleValuesParser::new(values).try_map(|name| match name.as_str() {
        "err" => Ok(LevelFilter::Error),
        name => name.parse(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_found_by_each_spelling_in_any_case() {
        assert_eq!(Cache::from_str("none", true), Ok(Cache::Never));
        assert_eq!(Cache::from_str("NEVER", true), Ok(Cache::Never));
        assert_eq!(
            InodeFileHandles::from_str("Fallback", true),
            Ok(InodeFileHandles::Prefer)
        );
        assert!(Wanted::from_str("no", true).is_err());
    }
}
