//! Patterns of the names of files that are marked for DAX.
//!
//! Has no state. The invariant: a pattern is about one name, not about a path.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::str::FromStr;

use globset::{Glob, GlobMatcher};

/// A pattern: `*`, `?`, `[...]`, `{...,...}`.
#[derive(Clone, Debug)]
pub struct NamePattern(GlobMatcher);

/// Why a string is not a pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamePatternError {
    /// It can't match any name.
    #[error("a pattern is for the name of a file, and can't be empty or contain a slash")]
    Path,
    /// Its syntax is wrong.
    #[error("{0}")]
    Syntax(String),
}

impl FromStr for NamePattern {
    type Err = NamePatternError;

    fn from_str(text: &str) -> Result<Self, NamePatternError> {
        if text.is_empty() || text.contains('/') {
            return Err(NamePatternError::Path);
        }
        let glob = Glob::new(text).map_err(|error| NamePatternError::Syntax(error.to_string()))?;
        Ok(Self(glob.compile_matcher()))
    }
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.glob() == other.0.glob()
    }
}

impl Eq for NamePattern {}

/// Which names are marked: by default all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamePatterns {
    /// A name must match one of these, unless there are none.
    pub include: Vec<NamePattern>,
    /// A name must match none of these.
    pub exclude: Vec<NamePattern>,
}

impl NamePatterns {
    /// Whether they leave no name out.
    #[must_use]
    pub fn are_all(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// Whether `name` is marked.
    #[must_use]
    pub fn matches(&self, name: &CStr) -> bool {
        let name = OsStr::from_bytes(name.to_bytes());
        let is_any = |patterns: &[NamePattern]| patterns.iter().any(|it| it.0.is_match(name));
        (self.include.is_empty() || is_any(&self.include)) && !is_any(&self.exclude)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(include: &[&str], exclude: &[&str]) -> NamePatterns {
        let parse = |all: &[&str]| all.iter().map(|it| it.parse().unwrap()).collect();
        NamePatterns {
            include: parse(include),
            exclude: parse(exclude),
        }
    }

    #[test]
    fn names_are_included_and_not_excluded() {
        type Case = (&'static [&'static str], &'static [&'static str], [bool; 5]);
        let names = [
            c"model.gguf",
            c"model.gguf.part",
            c"a.img",
            c"A.IMG",
            c"\xff\xfe",
        ];
        let cases: &[Case] = &[
            (&[], &[], [true; 5]),
            (&["*.gguf"], &[], [true, false, false, false, false]),
            (&["*.{gguf,img}"], &[], [true, false, true, false, false]),
            (
                &["*.gguf", "?.[iI]*"],
                &[],
                [true, false, true, true, false],
            ),
            (&[], &["*.part"], [true, false, true, true, true]),
            (&["model*"], &["*.part"], [true, false, false, false, false]),
            (&["*"], &["*"], [false; 5]),
            (&["*"], &[], [true; 5]),
        ];
        for (include, exclude, expected) in cases {
            let patterns = patterns(include, exclude);
            let matches = names.map(|name| patterns.matches(name));
            assert_eq!(matches, *expected, "{include:?} {exclude:?}");
            assert_eq!(patterns.are_all(), include.len() + exclude.len() == 0);
        }
    }

    #[test]
    fn what_cannot_match_a_name_is_refused() {
        for bad in ["", "dir/*", "/x"] {
            assert_eq!(bad.parse::<NamePattern>(), Err(NamePatternError::Path));
        }
        for bad in ["[", "a{b", "[z-a]"] {
            let error = bad.parse::<NamePattern>().unwrap_err();
            assert!(matches!(error, NamePatternError::Syntax(_)), "{bad}");
        }
    }
}
