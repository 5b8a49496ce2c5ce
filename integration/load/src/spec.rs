//! The cases, and their notation: `read/4k@32x4` is random reads of 4 KiB, 32 in flight on each of
//! 4 queues.
//!
//! The invariant: a [`Spec`] has a depth from 1 to 128, 1 to 16 queues, and a size that is a
//! multiple of 4 KiB up to 1 MiB.

use std::fmt;
use std::str::FromStr;

/// The page size, of which sizes are multiples.
pub(crate) const PAGE: u32 = 4096;
/// The longest transfer that every server accepts.
pub(crate) const LONGEST: u32 = 1 << 20;
/// The most that can be in flight on a queue.
const DEEPEST: u16 = 128;
const MOST_QUEUES: u16 = 16;

/// How a data case transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) write: bool,
    pub(crate) sequential: bool,
    pub(crate) direct: bool,
}

/// The operation that a case repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Idle,
    Getattr,
    Chmod,
    Lookup,
    Revalidate,
    LookupNew,
    LookupAbsent,
    Data(Transfer),
    Create,
    OpenReadClose,
    OpenRwClose,
    Cold,
    Readdirplus,
    ListLookup,
    Mixed,
    VmLike,
}

/// A case's name, description, and default size and depth.
struct Entry {
    kind: Kind,
    name: &'static str,
    about: &'static str,
    size: u32,
    depth: u16,
}

const fn entry(
    kind: Kind,
    name: &'static str,
    about: &'static str,
    size: u32,
    depth: u16,
) -> Entry {
    Entry {
        kind,
        name,
        about,
        size,
        depth,
    }
}

const fn data(write: bool, sequential: bool, direct: bool) -> Kind {
    Kind::Data(Transfer {
        write,
        sequential,
        direct,
    })
}

const SMALL: u32 = 4096;
const LARGE: u32 = LONGEST;
/// The buffer size of the C library's `getdents64`.
const LISTING: u32 = 32 << 10;

const CASES: &[Entry] = &[
    entry(
        Kind::Getattr,
        "getattr",
        "GETATTR of known files",
        SMALL,
        32,
    ),
    entry(
        Kind::Chmod,
        "chmod",
        "SETATTR of the mode of known files",
        SMALL,
        32,
    ),
    entry(
        Kind::Lookup,
        "lookup",
        "LOOKUP of names whose files are known",
        SMALL,
        32,
    ),
    entry(
        Kind::Revalidate,
        "revalidate",
        "LOOKUP of known names after their time-out, each 8 times, then FORGET",
        SMALL,
        8,
    ),
    entry(
        Kind::LookupNew,
        "lookup-new",
        "LOOKUP of names whose files are not known, FORGET",
        SMALL,
        8,
    ),
    entry(
        Kind::LookupAbsent,
        "lookup-absent",
        "LOOKUP of names that don't exist",
        SMALL,
        8,
    ),
    entry(
        data(false, false, false),
        "read",
        "READ at random offsets of a cached file",
        SMALL,
        32,
    ),
    entry(
        data(true, false, false),
        "write",
        "WRITE at random offsets of a cached file, each after GETXATTR where Linux sends it",
        SMALL,
        32,
    ),
    entry(
        data(false, false, true),
        "read-direct",
        "READ at random offsets, opened O_DIRECT",
        SMALL,
        32,
    ),
    entry(
        data(true, false, true),
        "write-direct",
        "WRITE as for write, opened O_DIRECT",
        SMALL,
        32,
    ),
    entry(
        data(false, true, false),
        "read-seq",
        "READ from the beginning to the end of a cached file",
        LARGE,
        8,
    ),
    entry(
        data(true, true, false),
        "write-seq",
        "WRITE over a cached file from beginning to end",
        LARGE,
        8,
    ),
    entry(
        data(false, true, true),
        "read-seq-direct",
        "READ in order, opened O_DIRECT",
        LARGE,
        8,
    ),
    entry(
        data(true, true, true),
        "write-seq-direct",
        "WRITE in order, opened O_DIRECT",
        LARGE,
        8,
    ),
    entry(
        Kind::Create,
        "create",
        "CREATE, FLUSH, RELEASE, UNLINK, FORGET of a new file",
        SMALL,
        8,
    ),
    entry(
        Kind::OpenReadClose,
        "open-read-close",
        "OPEN, READ 4 KiB, FLUSH, RELEASE of known files",
        SMALL,
        8,
    ),
    entry(
        Kind::OpenRwClose,
        "open-rw-close",
        "OPEN for reading and writing, READ 4 KiB, FLUSH, RELEASE of known files",
        SMALL,
        8,
    ),
    entry(
        Kind::Cold,
        "cold",
        "LOOKUP, OPEN, READ 4 KiB, FLUSH, RELEASE, FORGET of unknown files",
        SMALL,
        8,
    ),
    entry(
        Kind::Readdirplus,
        "readdirplus",
        "OPENDIR, READDIRPLUS of 10,000 unknown entries, RELEASEDIR, FORGET",
        LISTING,
        1,
    ),
    entry(
        Kind::ListLookup,
        "list-lookup",
        "as readdirplus, and LOOKUP of each entry after it",
        LISTING,
        1,
    ),
    entry(
        Kind::Mixed,
        "mixed",
        "of 100: 50 reads, 10 writes, 20 GETATTR, 10 LOOKUP, 8 open-read-close, 2 create",
        SMALL,
        32,
    ),
    entry(
        Kind::VmLike,
        "vm-like",
        "requests in the proportions recorded from programs' work on a mount (vm-like.tsv)",
        SMALL,
        8,
    ),
    entry(
        Kind::Idle,
        "idle",
        "nothing: what an idle server uses",
        SMALL,
        1,
    ),
];

impl Kind {
    fn entry(self) -> Option<&'static Entry> {
        CASES.iter().find(|case| case.kind == self)
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        self.entry().map_or("?", |case| case.name)
    }

    /// Whether the size of its transfers can be chosen.
    pub(crate) fn has_size(self) -> bool {
        matches!(
            self,
            Self::Data(_) | Self::Readdirplus | Self::ListLookup | Self::Mixed
        )
    }
}

/// Each case's name, description, and full notation.
pub(crate) fn list() -> impl Iterator<Item = (&'static str, &'static str, Spec)> {
    let spec = |case: &Entry| Spec {
        kind: case.kind,
        size: case.size,
        depth: case.depth,
        queues: 1,
    };
    CASES
        .iter()
        .map(move |case| (case.name, case.about, spec(case)))
}

/// A case with its size, depth and queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) kind: Kind,
    /// Bytes of one transfer.
    pub(crate) size: u32,
    /// Requests in flight on each queue.
    pub(crate) depth: u16,
    /// Request queues.
    pub(crate) queues: u16,
}

/// A case as typed: what is missing is the case's default, or an option's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Typed {
    kind: Kind,
    size: Option<u32>,
    depth: Option<u16>,
    queues: Option<u16>,
}

impl Typed {
    /// Every case except `idle`.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let cases = CASES.iter().filter(|case| case.kind != Kind::Idle);
        cases.map(|case| Self {
            kind: case.kind,
            size: None,
            depth: None,
            queues: None,
        })
    }

    /// Fills in the defaults.
    pub(crate) fn resolve(
        self,
        size: Option<u32>,
        depth: Option<u16>,
        queues: Option<u16>,
    ) -> Spec {
        let (usual_size, usual_depth) = self
            .kind
            .entry()
            .map_or((SMALL, 1), |case| (case.size, case.depth));
        Spec {
            kind: self.kind,
            size: self.size.or(size).unwrap_or(usual_size),
            depth: self.depth.or(depth).unwrap_or(usual_depth),
            queues: self.queues.or(queues).unwrap_or(1),
        }
    }
}

/// Parses `123`, `4k` or `1m`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.to_ascii_lowercase() {
        text if text.ends_with('k') => (text.trim_end_matches('k').to_owned(), 10),
        text if text.ends_with('m') => (text.trim_end_matches('m').to_owned(), 20),
        text if text.ends_with('g') => (text.trim_end_matches('g').to_owned(), 30),
        text => (text, 0),
    };
    let number = digits.parse::<u64>().ok();
    let bytes = number.and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("{text:?} is not a number of bytes, as 4k or 1m"))
}

/// Parses the size of a transfer.
pub(crate) fn parse_size(text: &str) -> Result<u32, String> {
    let size = u32::try_from(parse_bytes(text)?).unwrap_or(u32::MAX);
    if size > 0 && size.is_multiple_of(PAGE) && size <= LONGEST {
        Ok(size)
    } else {
        Err("a size is a multiple of 4k, up to 1m".to_owned())
    }
}

/// Parses a depth.
pub(crate) fn parse_depth(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(depth) if (1..=DEEPEST).contains(&depth) => Ok(depth),
        _ => Err(format!("a depth is from 1 to {DEEPEST}")),
    }
}

/// Parses a number of request queues.
pub(crate) fn parse_queues(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(queues) if (1..=MOST_QUEUES).contains(&queues) => Ok(queues),
        _ => Err(format!("there are 1 to {MOST_QUEUES} queues")),
    }
}

impl FromStr for Typed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, depth, queues) = match text.split_once('@') {
            None => (text, None, None),
            Some((rest, numbers)) => match numbers.split_once('x') {
                None => (rest, Some(parse_depth(numbers)?), None),
                Some((depth, queues)) => {
                    let depth = parse_depth(depth)?;
                    (rest, Some(depth), Some(parse_queues(queues)?))
                }
            },
        };
        let (name, size) = match rest.split_once('/') {
            None => (rest, None),
            Some((name, size)) => (name, Some(parse_size(size)?)),
        };
        let Some(case) = CASES.iter().find(|case| case.name == name) else {
            return Err(format!("there is no case {name:?}; --list shows them"));
        };
        if size.is_some() && !case.kind.has_size() {
            return Err(format!("{name} has no size to choose"));
        }
        Ok(Self {
            kind: case.kind,
            size,
            depth,
            queues,
        })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if self.kind == Kind::Idle {
            return Ok(());
        }
        if self.kind.has_size() {
            match self.size {
                size if size.is_multiple_of(1 << 20) => write!(f, "/{}m", size >> 20)?,
                size => write!(f, "/{}k", size >> 10)?,
            }
        }
        write!(f, "@{}", self.depth)?;
        if self.queues > 1 {
            write!(f, "x{}", self.queues)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<String, String> {
        let typed = text.parse::<Typed>()?;
        Ok(typed.resolve(None, None, None).to_string())
    }

    #[test]
    fn what_is_not_said_is_the_default() {
        assert_eq!(spec("read").unwrap(), "read/4k@32");
        assert_eq!(spec("read-seq/64k").unwrap(), "read-seq/64k@8");
        assert_eq!(spec("read/8k@1x4").unwrap(), "read/8k@1x4");
        assert_eq!(spec("getattr@1").unwrap(), "getattr@1");
        let typed: Typed = "read@7".parse().unwrap();
        let resolved = typed.resolve(Some(8192), Some(9), Some(2));
        assert_eq!(resolved.to_string(), "read/8k@7x2");
    }

    #[test]
    fn a_case_that_can_not_be_is_refused() {
        for bad in [
            "",
            "reed",
            "read/5k",
            "read/2m",
            "read@0",
            "read@129",
            "read@8x0",
            "read@8x17",
            "getattr/4k",
            "read/@1",
        ] {
            assert!(spec(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_case_reads_back_as_it_is_written() {
        for (name, _, full) in list().filter(|(_, _, full)| full.kind != Kind::Idle) {
            assert_eq!(spec(name).unwrap(), full.to_string());
            assert_eq!(spec(&full.to_string()).unwrap(), full.to_string());
        }
    }
}
