//! The spellings of values: one table for each enum of a room that an option chooses from.
//!
//! The enums belong to the rooms that use them, so there is one type for each choice. The invariant:
//! the first spelling of a value is the one that help and manual show; case doesn't matter.

use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use log::LevelFilter;

use crate::fs::passthrough::{Cache, InodeFileHandles, MigrationMode, OnMigrationError};
use crate::fuse::Wanted;
use crate::io::Choice;
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

/// Parses a log level; `log` has the type.
pub(super) fn log_level() -> impl TypedValueParser<Value = LevelFilter> {
    let names = ["off", "error", "warn", "info", "debug", "trace"];
    let values = names.map(|name| match name {
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
