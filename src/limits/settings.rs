//! What is limited, and how much.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// How many operations or bytes a second there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The average.
    pub per_second: NonZeroU64,
    /// How many there may be at once after a pause; as many as in 50 ms if `None`.
    pub burst: Option<NonZeroU64>,
}

impl Rate {
    /// So many a second.
    #[must_use]
    pub fn of(per_second: NonZeroU64) -> Self {
        Self {
            per_second,
            burst: None,
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.per_second)?;
        match self.burst {
            Some(burst) => write!(f, ",burst={burst}"),
            None => Ok(()),
        }
    }
}

/// A text is no rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected N or N,burst=M with whole numbers above 0")]
pub struct NoRate;

impl FromStr for Rate {
    type Err = NoRate;

    /// Parses what [`Display`](fmt::Display) shows: `N[,burst=M]`.
    fn from_str(text: &str) -> Result<Self, NoRate> {
        let number = |text: &str| text.parse().map_err(|_no_number| NoRate);
        let (per_second, burst) = match text.split_once(',') {
            Some((per_second, rest)) => (per_second, rest.strip_prefix("burst=").map(number)),
            None => (text, None),
        };
        if burst.is_none() && text.contains(',') {
            return Err(NoRate);
        }
        Ok(Self {
            per_second: number(per_second)?,
            burst: burst.transpose()?,
        })
    }
}

/// The limits of a share. What is `None` isn't limited. A request has to meet all limits that
/// concern it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Operations of all kinds.
    pub operations: Option<Rate>,
    /// Operations that read a file.
    pub reads: Option<Rate>,
    /// Operations that write to a file, copy to it, or allocate space for it.
    pub writes: Option<Rate>,
    /// All other operations.
    pub metadata: Option<Rate>,
    /// Bytes that are read or written.
    pub bytes: Option<Rate>,
    /// Bytes that are read.
    pub bytes_read: Option<Rate>,
    /// Bytes that are written.
    pub bytes_written: Option<Rate>,
}

/// One of the limits.
struct Limit {
    /// What the control socket calls it.
    name: &'static str,
    /// What is counted.
    unit: &'static str,
    field: fn(&mut Settings) -> &mut Option<Rate>,
}

/// How many limits there are.
const COUNT: usize = 7;

/// All limits.
const ALL: [Limit; COUNT] = {
    const fn limit(
        name: &'static str,
        unit: &'static str,
        field: fn(&mut Settings) -> &mut Option<Rate>,
    ) -> Limit {
        Limit { name, unit, field }
    }
    [
        limit("operations", "operations", |it| &mut it.operations),
        limit("reads", "reads", |it| &mut it.reads),
        limit("writes", "writes", |it| &mut it.writes),
        limit("metadata", "metadata operations", |it| &mut it.metadata),
        limit("bytes", "bytes", |it| &mut it.bytes),
        limit("bytes-read", "bytes read", |it| &mut it.bytes_read),
        limit("bytes-written", "bytes written", |it| &mut it.bytes_written),
    ]
};

/// What is limited, in the order of [`Settings::rates`], as the control socket names it.
pub(crate) const LIMITED: [&str; COUNT] = {
    let mut names = [""; COUNT];
    let mut at = 0;
    while at < COUNT {
        names[at] = ALL[at].name;
        at += 1;
    }
    names
};

/// Settings as words of shared memory: rate and burst of each limit, 0 for none.
pub(crate) type SettingsWords = [u64; 2 * COUNT];

impl Settings {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The settings with these limits, in the order of the fields.
    #[must_use]
    pub fn from_rates(rates: [Option<Rate>; COUNT]) -> Self {
        let mut settings = Self::default();
        for (limit, rate) in ALL.iter().zip(rates) {
            *(limit.field)(&mut settings) = rate;
        }
        settings
    }

    /// The limits, in the order of the fields.
    #[must_use]
    pub fn rates(&self) -> [Option<Rate>; COUNT] {
        let mut settings = *self;
        ALL.map(|limit| *(limit.field)(&mut settings))
    }

    /// The settings as words.
    pub(crate) fn words(&self) -> SettingsWords {
        let mut words = [0; 2 * COUNT];
        for (pair, rate) in words.chunks_exact_mut(2).zip(self.rates()) {
            let Some(rate) = rate else {
                continue;
            };
            pair[0] = rate.per_second.get();
            pair[1] = rate.burst.map_or(0, NonZeroU64::get);
        }
        words
    }

    /// The settings that the words say.
    pub(crate) fn from_words(words: &SettingsWords) -> Self {
        let rate = |at: usize| {
            Some(Rate {
                per_second: NonZeroU64::new(words[2 * at])?,
                burst: NonZeroU64::new(words[2 * at + 1]),
            })
        };
        Self::from_rates(std::array::from_fn(rate))
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (rate, Limit { unit, .. }) in self.rates().into_iter().zip(&ALL) {
            let Some(rate) = rate else {
                continue;
            };
            write!(f, "{separator}{} {unit} a second", rate.per_second)?;
            if let Some(burst) = rate.burst {
                write!(f, " (burst {burst})")?;
            }
            separator = ", ";
        }
        if self.is_empty() {
            f.write_str("none")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_parsed_as_it_is_shown() {
        for text in ["1", "1000", "4096,burst=8192"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        for wrong in [
            "",
            "0",
            "-1",
            "1k",
            "1,",
            "1,2",
            "1,burst=",
            "1,burst=0",
            ",burst=1",
        ] {
            assert_eq!(wrong.parse::<Rate>(), Err(NoRate), "{wrong}");
        }
    }

    #[test]
    fn settings_survive_as_words() {
        let rate = |per_second, burst| {
            Some(Rate {
                per_second: NonZeroU64::new(per_second).unwrap(),
                burst: NonZeroU64::new(burst),
            })
        };
        let all = Settings {
            operations: rate(1, 0),
            reads: rate(2, 20),
            writes: rate(3, 0),
            metadata: rate(4, 40),
            bytes: rate(5, 0),
            bytes_read: rate(u64::MAX, u64::MAX),
            bytes_written: rate(7, 0),
        };
        assert_eq!(Settings::from_words(&all.words()), all);
        assert_eq!(Settings::default().words(), [0; 14]);
        assert_eq!(Settings::default().to_string(), "none");
        let text = Settings {
            operations: rate(1000, 0),
            bytes_read: rate(4096, 8192),
            ..Settings::default()
        };
        assert_eq!(
            text.to_string(),
            "1000 operations a second, 4096 bytes read a second (burst 8192)"
        );
    }
}
