//! How numbers and rows are shown: columns, their order, and numbers in a few characters.
//!
//! The invariant: no number takes more than six characters, so the columns fit into 80.

use std::cmp::Ordering;

use super::rates::Rates;
use super::share::{Share, State};

/// A column of the shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Share,
    Operations,
    P50,
    P99,
    Read,
    Written,
    Errors,
    InFlight,
}

impl Column {
    pub(super) const ALL: [Self; 8] = [
        Self::Share,
        Self::Operations,
        Self::P50,
        Self::P99,
        Self::Read,
        Self::Written,
        Self::Errors,
        Self::InFlight,
    ];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Share => "SHARE",
            Self::Operations => "OPS/s",
            Self::P50 => "P50",
            Self::P99 => "P99",
            Self::Read => "READ/s",
            Self::Written => "WRITE/s",
            Self::Errors => "ERR/s",
            Self::InFlight => "BUSY",
        }
    }

    /// What a share has in this column.
    pub(super) fn cell(self, rates: &Rates) -> String {
        match self {
            Self::Share => String::new(),
            Self::Operations => number(rates.operations),
            Self::P50 => duration(rates.p50),
            Self::P99 => duration(rates.p99),
            Self::Read => bytes(rates.bytes_read),
            Self::Written => bytes(rates.bytes_written),
            Self::Errors => number(rates.errors),
            Self::InFlight => rates.in_flight.to_string(),
        }
    }

    /// The order of two shares by this column: the larger one first, and names from A to Z. What isn't
    /// known comes last.
    pub(super) fn compare(self, one: &Share, other: &Share) -> Ordering {
        let value = |share: &Share| match &share.state {
            State::Serving { rates, .. } => self.value(rates),
            State::Starting | State::Gone { .. } => -1.0,
        };
        let order = value(other).total_cmp(&value(one));
        order.then_with(|| one.name.cmp(&other.name))
    }

    fn value(self, rates: &Rates) -> f64 {
        match self {
            Self::Share => 0.0,
            Self::Operations => rates.operations,
            Self::P50 => rates.p50.unwrap_or(-1.0),
            Self::P99 => rates.p99.unwrap_or(-1.0),
            Self::Read => rates.bytes_read,
            Self::Written => rates.bytes_written,
            Self::Errors => rates.errors,
            Self::InFlight => super::rates::count(rates.in_flight),
        }
    }
}

/// A number with three digits and a unit of thousands.
pub(super) fn number(number: f64) -> String {
    scaled(number, 1000.0, &["", "k", "M", "G", "T"])
}

/// A number of bytes.
pub(super) fn bytes(number: f64) -> String {
    scaled(number, 1024.0, &["B", "K", "M", "G", "T"])
}

/// A duration in nanoseconds; a dash for none.
pub(super) fn duration(nanoseconds: Option<f64>) -> String {
    nanoseconds.map_or_else(
        || "-".to_owned(),
        |time| scaled(time, 1000.0, &["ns", "µs", "ms", "s", "ks"]),
    )
}

fn scaled(number: f64, step: f64, units: &[&str]) -> String {
    let mut rest = number.max(0.0);
    let mut units = units.iter();
    let mut unit = units.next().copied().unwrap_or_default();
    // What would be rounded to the next unit belongs to it.
    while rest >= step - 0.5 {
        let Some(next) = units.next() else { break };
        rest /= step;
        unit = next;
    }
    if rest == 0.0 {
        return "0".to_owned();
    }
    match rest {
        _ if unit.is_empty() && rest >= 10.0 => format!("{rest:.0}"),
        rest if rest < 9.95 => format!("{rest:.1}{unit}"),
        rest => format!("{rest:.0}{unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_few_characters() {
        for (value, shown) in [
            (0.0, "0"),
            (0.5, "0.5"),
            (12.3, "12"),
            (999.0, "999"),
            (999.7, "1.0k"),
            (1234.0, "1.2k"),
            (45_678.0, "46k"),
            (1e6, "1.0M"),
            (-5.0, "0"),
        ] {
            assert_eq!(number(value), shown, "{value}");
        }
        assert_eq!(bytes(1536.0), "1.5K");
        assert_eq!(bytes(3.0 * 1024.0 * 1024.0 * 1024.0), "3.0G");
        assert_eq!(duration(Some(1500.0)), "1.5µs");
        assert_eq!(duration(Some(23e6)), "23ms");
        assert_eq!(duration(None), "-");
        let mut value = 1.0;
        while value < 1e14 {
            for shown in [number(value), bytes(value), duration(Some(value))] {
                assert!(shown.chars().count() <= 6, "{value}: {shown}");
            }
            value *= 1.37;
        }
    }
}
