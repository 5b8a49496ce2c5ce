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
    /// It is empty or exceeds the last id.
    #[error(
        "{count} ids from {base} on: there must be at least one, and the last id is 4294967294"
    )]
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
    fn new(base: u32, count: u32, becomes: Becomes) -> std::result::Result<Self, IdRuleError> {
        check(base, count)?;
        match becomes {
            Becomes::From(first) => check(first, count)?,
            Becomes::One(id) => check(id, 1)?,
            Becomes::Nothing => {}
        }
        Ok(Self {
            base,
            count,
            becomes,
        })
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
        Some(_) if count > 0 => Ok(()),
        _ => Err(IdRuleError::Range { base, count }),
    }
}

impl FromStr for IdRule {
    type Err = IdRuleError;

    fn from_str(text: &str) -> std::result::Result<Self, IdRuleError> {
        let (kind, numbers) = text.split_once(':').ok_or(IdRuleError::Form)?;
        let numbers: Vec<u32> = numbers
            .split(':')
            .map(|number| {
                number
                    .parse()
                    .map_err(|_other| IdRuleError::Number(number.to_owned()))
            })
            .collect::<std::result::Result<_, _>>()?;
        let (mut guest, mut host) = (None, None);
        match (kind, numbers.as_slice()) {
            ("guest", &[base, to, count]) => {
                guest = Some(Range::new(base, count, Becomes::From(to))?);
            }
            ("host", &[base, to, count]) => {
                host = Some(Range::new(base, count, Becomes::From(to))?);
            }
            ("map", &[base, to, count]) => {
                guest = Some(Range::new(base, count, Becomes::From(to))?);
                host = Some(Range::new(to, count, Becomes::From(base))?);
            }
            ("squash-guest", &[base, to, count]) => {
                guest = Some(Range::new(base, count, Becomes::One(to))?);
            }
            ("squash-host", &[base, to, count]) => {
                host = Some(Range::new(base, count, Becomes::One(to))?);
            }
            ("forbid-guest", &[base, count]) => {
                guest = Some(Range::new(base, count, Becomes::Nothing)?);
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
    fn invalid_rule_is_refused() {
        for (text, error) in [
            ("", IdRuleError::Form),
            ("map", IdRuleError::Form),
            ("map:0:1", IdRuleError::Form),
            ("forbid-guest:0:1:2", IdRuleError::Form),
            ("mop:0:1:2", IdRuleError::Form),
            ("map:0:x:2", IdRuleError::Number("x".to_owned())),
            ("map:0:-1:2", IdRuleError::Number("-1".to_owned())),
            ("map:0:1:0", IdRuleError::Range { base: 0, count: 0 }),
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
