//! Maps user and group ids between guest and host.
//!
//! There is a table of ranges for each direction. An id in no range stays the same. The invariant:
//! the ranges of a direction don't overlap, so their order doesn't matter.

use std::str::FromStr;

use rustix::io::Errno;

use crate::fs::Result;

/// Why a rule is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdRuleError {
    /// It doesn't have the form of a rule.
    #[error(
        "not a rule: expected guest:GUEST:HOST:COUNT, host:HOST:GUEST:COUNT, \
         map:GUEST:HOST:COUNT, squash-guest:GUEST:HOST:COUNT, squash-host:HOST:GUEST:COUNT or \
         forbid-guest:GUEST:COUNT"
    )]
    Form,
    /// A number was expected.
    #[error("`{0}` is not an id or count from 0 to 4294967294")]
    Number(String),
    /// It exceeds the last id.
    #[error("{count} ids from {base} on: the last id is 4294967294")]
    Range {
        /// The first id.
        base: u32,
        /// How many.
        count: u32,
    },
}

/// Two rules map the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two rules for {from} id {id}")]
pub struct IdOverlap {
    from: &'static str,
    id: u32,
}

/// One `--translate-uid` or `--translate-gid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRule {
    /// For ids from the guest.
    guest: Option<Range>,
    /// For ids from the host.
    host: Option<Range>,
}

/// What the ids of a range are mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Becomes {
    /// A range of the same length, starting with this id.
    From(u32),
    /// This one id.
    One(u32),
    /// `EPERM`.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    base: u32,
    count: u32,
    becomes: Becomes,
}

impl Range {
    /// `None` if it has no ids.
    fn new(
        base: u32,
        count: u32,
        becomes: Becomes,
    ) -> std::result::Result<Option<Self>, IdRuleError> {
        if count == 0 {
            return Ok(None);
        }
        match becomes {
            Becomes::From(first) => {
                check(base, count)?;
                check(first, count)?;
            }
            Becomes::One(id) => {
                check(base, count)?;
                check(id, 1)?;
            }
            // The guest may not use the number that is no id either.
            Becomes::Nothing => check(base, count - 1)?,
        }
        Ok(Some(Self {
            base,
            count,
            becomes,
        }))
    }

    fn find(&self, id: u32) -> Option<Result<u32>> {
        let offset = id.checked_sub(self.base)?;
        (offset < self.count).then(|| match self.becomes {
            Becomes::From(first) => first.checked_add(offset).ok_or(Errno::OVERFLOW),
            Becomes::One(id) => Ok(id),
            Becomes::Nothing => Err(Errno::PERM),
        })
    }
}

/// Checks that the ids exist: system calls use the last number for "none".
fn check(base: u32, count: u32) -> std::result::Result<(), IdRuleError> {
    match base.checked_add(count) {
        Some(_) => Ok(()),
        None => Err(IdRuleError::Range { base, count }),
    }
}

impl FromStr for IdRule {
    type Err = IdRuleError;

    fn from_str(text: &str) -> std::result::Result<Self, IdRuleError> {
        // The first character that can't be part of the kind separates all numbers.
        let is_separator = |c: char| !(c.is_alphanumeric() || matches!(c, '-' | '_'));
        let at = text.find(is_separator).ok_or(IdRuleError::Form)?;
        let (kind, rest) = text.split_at(at);
        let separator = rest.chars().next().ok_or(IdRuleError::Form)?;
        let numbers: Vec<u32> = rest
            .split(separator)
            .skip(1)
            .map(|number| {
                number
                    .parse()
                    .map_err(|_other| IdRuleError::Number(number.to_owned()))
            })
            .collect::<std::result::Result<_, _>>()?;
        let (mut guest, mut host) = (None, None);
        match (kind.to_lowercase().as_str(), numbers.as_slice()) {
            ("guest", &[base, to, count]) => {
                guest = Range::new(base, count, Becomes::From(to))?;
            }
            ("host", &[base, to, count]) => {
                host = Range::new(base, count, Becomes::From(to))?;
            }
            ("map", &[base, to, count]) => {
                guest = Range::new(base, count, Becomes::From(to))?;
                host = Range::new(to, count, Becomes::From(base))?;
            }
            ("squash-guest", &[base, to, count]) => {
                guest = Range::new(base, count, Becomes::One(to))?;
            }
            ("squash-host", &[base, to, count]) => {
                host = Range::new(base, count, Becomes::One(to))?;
            }
            ("forbid-guest", &[base, count]) => {
                guest = Range::new(base, count, Becomes::Nothing)?;
            }
            _ => return Err(IdRuleError::Form),
        }
        Ok(Self { guest, host })
    }
}

/// How ids are mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    /// Sorted by id.
    guest: Vec<Range>,
    host: Vec<Range>,
}

impl IdMap {
    /// Combines rules.
    ///
    /// # Errors
    ///
    /// Two of them map the same id.
    pub fn new(rules: &[IdRule]) -> std::result::Result<Self, IdOverlap> {
        let mut guest: Vec<_> = rules.iter().filter_map(|rule| rule.guest).collect();
        let mut host: Vec<_> = rules.iter().filter_map(|rule| rule.host).collect();
        for (ranges, from) in [(&mut guest, "guest"), (&mut host, "host")] {
            ranges.sort_by_key(|range| range.base);
            let overlap = ranges
                .windows(2)
                .find(|pair| matches!(pair, [one, next] if one.find(next.base).is_some()));
            if let Some([_, next]) = overlap {
                return Err(IdOverlap {
                    from,
                    id: next.base,
                });
            }
        }
        Ok(Self { guest, host })
    }

    /// Whether all ids stay the same.
    pub(super) fn is_empty(&self) -> bool {
        self.guest.is_empty() && self.host.is_empty()
    }

    /// Maps an id of the guest to the host's.
    ///
    /// # Errors
    ///
    /// `EPERM` if the guest may not use it.
    pub(super) fn to_host(&self, id: u32) -> Result<u32> {
        find(&self.guest, id).unwrap_or(Ok(id))
    }

    /// Maps an id of the host to the guest's.
    pub(super) fn to_guest(&self, id: u32) -> u32 {
        match find(&self.host, id) {
            Some(Ok(id)) => id,
            Some(Err(_)) | None => id,
        }
    }
}

fn find(ranges: &[Range], id: u32) -> Option<Result<u32>> {
    let behind = ranges.partition_point(|range| range.base <= id);
    ranges.get(behind.checked_sub(1)?)?.find(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(rules: &[&str]) -> IdMap {
        let rules: Vec<_> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        IdMap::new(&rules).unwrap()
    }

    #[test]
    fn ids_without_rules_stay_the_same() {
        let map = IdMap::default();
        assert_eq!((map.to_host(7), map.to_guest(8)), (Ok(7), 8));
    }

    #[test]
    fn each_kind_of_rule_maps_its_ids() {
        let map = map(&[
            "map:0:100000:1000",
            "guest:2000:50:10",
            "host:60:3000:5",
            "squash-guest:4000:65534:100",
            "squash-host:1000:0:1",
            "forbid-guest:5000:2",
        ]);
        for (guest, host) in [
            (0, 100_000),
            (999, 100_999),
            (1000, 1000),
            (2009, 59),
            (2010, 2010),
            (4000, 65534),
            (4099, 65534),
            (5002, 5002),
        ] {
            assert_eq!(map.to_host(guest), Ok(host), "{guest}");
        }
        assert_eq!(map.to_host(5000), Err(Errno::PERM));
        assert_eq!(map.to_host(5001), Err(Errno::PERM));
        for (host, guest) in [
            (100_000, 0),
            (100_999, 999),
            (101_000, 101_000),
            (64, 3004),
            (65, 65),
            (1000, 0),
            (50, 50),
        ] {
            assert_eq!(map.to_guest(host), guest, "{host}");
        }
    }

    #[test]
    fn rules_without_ids_map_none() {
        let empty = map(&[
            "map:0:0:0",
            "guest:0:1:0",
            "host:0:1:0",
            "squash-guest:0:1:0",
            "squash-host:0:1:0",
            "forbid-guest:0:0",
        ]);
        assert!(empty.is_empty());
        assert!(!map(&["forbid-guest:0:1"]).is_empty());
        // They overlap with none.
        let one = map(&["map:0:1000:10", "map:5:0:0", "forbid-guest:7:0"]);
        assert_eq!(one, map(&["map:0:1000:10"]));
    }

    #[test]
    fn kind_and_separator_have_several_spellings() {
        for other in ["MAP:0:1:1", "Map|0|1|1", "map,0,1,1", "map 0 1 1"] {
            assert_eq!(map(&[other]), map(&["map:0:1:1"]), "{other}");
        }
        let all = map(&["forbid-guest:0:4294967295"]);
        assert_eq!(all.to_host(u32::MAX - 1), Err(Errno::PERM));
        assert_eq!(map(&["forbid-guest:4294967295:1"]).to_host(7), Ok(7));
    }

    #[test]
    fn invalid_rule_is_refused() {
        for (text, error) in [
            ("", IdRuleError::Form),
            ("map", IdRuleError::Form),
            ("map:0:1", IdRuleError::Form),
            ("forbid-guest:0:1:2", IdRuleError::Form),
            ("mop:0:1:2", IdRuleError::Form),
            ("map:0:x:2", IdRuleError::Number("x".to_owned())),
            ("map:0:-1:2", IdRuleError::Number("-1".to_owned())),
            ("map", IdRuleError::Form),
            ("map:0,1,1", IdRuleError::Number("0,1,1".to_owned())),
            (
                "map:0:4294967290:6",
                IdRuleError::Range {
                    base: 4_294_967_290,
                    count: 6,
                },
            ),
        ] {
            assert_eq!(text.parse::<IdRule>(), Err(error), "{text}");
        }
        assert!("map:0:4294967290:5".parse::<IdRule>().is_ok());
    }

    #[test]
    fn overlapping_rules_are_refused() {
        let both = |one: &str, other: &str| {
            IdMap::new(&[one.parse().unwrap(), other.parse().unwrap()]).map(drop)
        };
        let error = both("map:0:1000:10", "guest:9:5:1").unwrap_err();
        assert_eq!(error.to_string(), "two rules for guest id 9");
        let error = both("host:5:0:10", "map:50:14:1").unwrap_err();
        assert_eq!(error.to_string(), "two rules for host id 14");
        assert_eq!(both("guest:0:5:10", "guest:10:5:10"), Ok(()));
        assert_eq!(both("guest:0:5:10", "host:0:5:10"), Ok(()));
    }
}
