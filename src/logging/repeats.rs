//! Which records are left out because too many of their kind were logged.
//!
//! A kind is what one place of the code logs at one level. The invariant: whatever is left out is
//! announced at once, and counted later.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, Record};

/// How many records of a kind are logged within [`INTERVAL`].
pub(super) const BURST: u32 = 50;

/// For how long records of a kind are counted together.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);

/// How many kinds are told apart. More than the program has, so that only a crate that makes up
/// places could have more; the others count as one.
const MAX_KINDS: usize = 2048;

/// How much of a record's text stands for its kind, bytes.
const MAX_TEXT: usize = 160;

/// What to do with a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Log it.
    Log,
    /// Announce that records like this one are left out from now on.
    Announce,
    /// Leave it out.
    Suppress,
}

/// How many records of a kind were left out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Suppressed {
    pub(super) level: Level,
    pub(super) target: String,
    /// What the first of them says.
    pub(super) text: String,
    pub(super) count: u64,
}

/// The records of each kind.
#[derive(Debug, Default)]
pub(super) struct Repeats(Mutex<Kinds>);

#[derive(Debug, Default)]
struct Kinds {
    all: HashMap<u64, Kind>,
    /// When the first of the intervals ends in which something was left out.
    first_end: Option<Duration>,
}

#[derive(Debug)]
struct Kind {
    /// When the interval began.
    since: Duration,
    logged: u32,
    suppressed: Option<Suppressed>,
}

impl Repeats {
    fn kinds(&self) -> MutexGuard<'_, Kinds> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a record at the time `now`, which starts anywhere.
    pub(super) fn judge(&self, record: &Record<'_>, now: Duration) -> Verdict {
        let mut kinds = self.kinds();
        let Kinds { all, first_end } = &mut *kinds;
        let mut key = key(record);
        if !all.contains_key(&key) && all.len() >= MAX_KINDS {
            key = 0;
        }
        let kind = all.entry(key).or_insert(Kind {
            since: now,
            logged: 0,
            suppressed: None,
        });
        if let Some(suppressed) = &mut kind.suppressed {
            // Its interval ends only when it was counted.
            suppressed.count += 1;
            return Verdict::Suppress;
        }
        if now.saturating_sub(kind.since) >= INTERVAL {
            kind.since = now;
            kind.logged = 0;
        }
        if kind.logged < BURST {
            kind.logged += 1;
            return Verdict::Log;
        }
        kind.suppressed = Some(Suppressed {
            level: record.level(),
            target: record.target().to_owned(),
            text: beginning(record.args().to_string()),
            count: 1,
        });
        let end = kind.since + INTERVAL;
        *first_end = Some(first_end.map_or(end, |first| first.min(end)));
        Verdict::Announce
    }

    /// What was left out in intervals that have ended by `now`. Allocates nothing if none has.
    pub(super) fn ended(&self, now: Duration) -> Vec<Suppressed> {
        let mut kinds = self.kinds();
        let Kinds { all, first_end } = &mut *kinds;
        if first_end.is_none_or(|end| end > now) {
            return Vec::new();
        }
        *first_end = None;
        let mut ended = Vec::new();
        for kind in all.values_mut() {
            let end = kind.since + INTERVAL;
            if end > now {
                if kind.suppressed.is_some() {
                    *first_end = Some(first_end.map_or(end, |first| first.min(end)));
                }
            } else if let Some(suppressed) = kind.suppressed.take() {
                ended.push(suppressed);
            }
        }
        ended
    }
}

/// What all records of a kind have in common, and no others.
fn key(record: &Record<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    (record.level(), record.target()).hash(&mut hasher);
    (record.file(), record.line()).hash(&mut hasher);
    hasher.finish().max(1)
}

/// The beginning of a text.
fn beginning(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(repeats: &Repeats, line: u32, text: &str, now: Duration) -> Verdict {
        let args = format_args!("{text}");
        let record = Record::builder()
            .level(Level::Warn)
            .target("ringfsd::fs")
            .file_static(Some("src/fs/mod.rs"))
            .line(Some(line))
            .args(args)
            .build();
        repeats.judge(&record, now)
    }

    const START: Duration = Duration::from_secs(1000);

    #[test]
    fn burst_is_logged_and_the_rest_announced_once_and_counted() {
        let repeats = Repeats::default();
        for number in 0..BURST {
            let text = format!("no. {number}");
            assert_eq!(judge(&repeats, 1, &text, START), Verdict::Log);
        }
        assert_eq!(judge(&repeats, 1, "the last", START), Verdict::Announce);
        for _ in 0..6 {
            assert_eq!(judge(&repeats, 1, "one more", START), Verdict::Suppress);
        }
        // Other places aren't affected.
        assert_eq!(judge(&repeats, 2, "another", START), Verdict::Log);
        let moment = Duration::from_millis(1);
        assert_eq!(repeats.ended(START + INTERVAL - moment), []);
        let end = START + INTERVAL;
        let counted = Suppressed {
            level: Level::Warn,
            target: "ringfsd::fs".to_owned(),
            text: "the last".to_owned(),
            count: 7,
        };
        assert_eq!(repeats.ended(end), [counted]);
        assert_eq!(repeats.ended(end), []);
        assert_eq!(judge(&repeats, 1, "again", end), Verdict::Log);
    }

    #[test]
    fn kinds_end_each_at_its_time() {
        let repeats = Repeats::default();
        let second = Duration::from_secs(1);
        for (line, since) in [(1, START), (2, START + second)] {
            while judge(&repeats, line, "x", since) != Verdict::Announce {}
        }
        assert_eq!(repeats.ended(START + INTERVAL).len(), 1);
        assert_eq!(repeats.ended(START + INTERVAL).len(), 0);
        assert_eq!(repeats.ended(START + INTERVAL + second).len(), 1);
    }

    #[test]
    fn slow_records_are_all_logged() {
        let repeats = Repeats::default();
        let pause = INTERVAL / BURST;
        for number in 0..BURST * 5 {
            let now = START + pause * number;
            assert_eq!(judge(&repeats, 1, "x", now), Verdict::Log, "{number}");
        }
    }

    #[test]
    fn places_without_end_count_as_one() {
        let repeats = Repeats::default();
        let limit = u32::try_from(MAX_KINDS).unwrap();
        for line in 0..limit {
            assert_eq!(judge(&repeats, line, "x", START), Verdict::Log);
        }
        let more = (0..=BURST).map(|line| judge(&repeats, limit + line, "x", START));
        assert_eq!(more.last(), Some(Verdict::Announce));
        assert!(repeats.kinds().all.len() <= MAX_KINDS + 1);
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        let long = "ä".repeat(MAX_TEXT);
        let cut = beginning(format!("x{long}"));
        assert!(cut.len() <= MAX_TEXT + "…".len() && cut.ends_with("ä…"));
        assert_eq!(beginning("short".to_owned()), "short");
    }
}
