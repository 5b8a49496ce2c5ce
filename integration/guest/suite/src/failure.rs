//! The message of a failed check, and the macros and functions that make it. A failure knows its
//! line, also if it is an error passed on by `?`. Invariant: a failure's text is one line.

use std::fmt;
use std::panic::Location;

use rustix::io::Errno;

/// Why a check failed, and where.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
}

/// What a check, or a part of one, comes to.
pub(crate) type Outcome = Result<(), Failure>;

impl Failure {
    #[track_caller]
    pub(crate) fn new(why: impl fmt::Display) -> Self {
        let text = format!("{why} ({})", Location::caller());
        Self {
            text: text.replace('\n', " "),
        }
    }

    /// A failure that has come over from another process, text and place in one.
    pub(crate) fn reported(text: &str) -> Self {
        Self {
            text: text.replace('\n', " "),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    #[track_caller]
    fn from(error: E) -> Self {
        Self::new(error)
    }
}

/// Fails the check unless the condition holds.
macro_rules! ensure {
    ($condition:expr $(,)?) => {
        $crate::failure::ensure!($condition, "not so: {}", stringify!($condition))
    };
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err($crate::failure::Failure::new(format_args!($($why)+)));
        }
    };
}

/// Fails the check unless both are equal.
macro_rules! ensure_eq {
    ($found:expr, $wanted:expr $(,)?) => {
        match (&$found, &$wanted) {
            (found, wanted) => $crate::failure::ensure!(
                *found == *wanted,
                "{} is {found:?}, not {wanted:?}",
                stringify!($found)
            ),
        }
    };
}

pub(crate) use {ensure, ensure_eq};

/// An error that has an errno.
pub(crate) trait Numbered {
    fn errno(&self) -> Option<Errno>;
}

impl Numbered for Errno {
    fn errno(&self) -> Option<Errno> {
        Some(*self)
    }
}

impl Numbered for std::io::Error {
    fn errno(&self) -> Option<Errno> {
        self.raw_os_error().map(Errno::from_raw_os_error)
    }
}

/// Succeeds where the call was refused with this errno.
#[track_caller]
pub(crate) fn refused<T, E: Numbered>(result: Result<T, E>, with: Errno) -> Outcome {
    refused_with_any(result, &[with])
}

/// Succeeds where the call was refused with one of these.
#[track_caller]
pub(crate) fn refused_with_any<T, E: Numbered>(result: Result<T, E>, with: &[Errno]) -> Outcome {
    let found = match result {
        Ok(_) => "not refused".to_owned(),
        Err(error) => match error.errno() {
            Some(errno) if with.contains(&errno) => return Ok(()),
            Some(errno) => format!("refused with {errno}"),
            None => "refused without an errno".to_owned(),
        },
    };
    let due: Vec<String> = with.iter().map(ToString::to_string).collect();
    Err(Failure::new(format_args!(
        "{found}, due was {}",
        due.join(" or ")
    )))
}

/// The value, or `None` where the file system says honestly that it does not do this.
#[track_caller]
pub(crate) fn if_supported<T, E: Numbered>(result: Result<T, E>) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.errno() {
            Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY) => Ok(None),
            Some(errno) => Err(Failure::new(errno)),
            None => Err(Failure::new("refused without an errno")),
        },
    }
}
