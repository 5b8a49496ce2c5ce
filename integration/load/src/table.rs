//! Results of several servers and several rounds, as tables of medians and ratios.
//!
//! Servers are recognised by their names: `ringfsd-uring`, to which the others are compared (or the
//! first, if it is missing), `ringfsd-tokio`, `virtiofsd-N` with a pool of N threads,
//! `c-virtiofsd`, `bare`, and `fio`, which replaces `bare` where it has a result. The invariant: a
//! ratio is of medians of the same case in the same files.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::PathBuf;

use crate::report::{Measurement, figures};

/// Errors of the input.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    /// A file could not be read.
    #[error("can't read {path}", path = path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A line is not a result.
    #[error("line {line} of {path} is not a result", path = path.display())]
    Line {
        path: PathBuf,
        line: usize,
        #[source]
        source: serde_json::Error,
    },
}

/// Prints the tables of these files.
pub(crate) fn run(files: &[PathBuf]) -> Result<(), TableError> {
    let mut results = Results::default();
    for path in files {
        let text = fs::read_to_string(path).map_err(|source| TableError::Read {
            path: path.clone(),
            source,
        })?;
        for (line, text) in (1..).zip(text.lines()) {
            if text.trim().is_empty() {
                continue;
            }
            let measured = serde_json::from_str(text).map_err(|source| TableError::Line {
                path: path.clone(),
                line,
                source,
            })?;
            results.add(measured);
        }
    }
    print!("{}", results.markdown());
    Ok(())
}

/// All measurements, the cases and servers in the order in which they first appeared.
#[derive(Debug, Default)]
struct Results {
    cases: Vec<String>,
    servers: Vec<String>,
    all: BTreeMap<(String, String), Vec<Measurement>>,
}

/// The medians of a server's rounds.
#[derive(Clone, Copy, Debug, Default)]
struct Median {
    rate: f64,
    p50: f64,
    p99: f64,
    p999: f64,
    /// The largest rate minus the smallest, as a part of the median.
    spread: f64,
    used: Option<MedianUsed>,
}

#[derive(Clone, Copy, Debug, Default)]
struct MedianUsed {
    cpu: f64,
    switches: f64,
    threads: f64,
    memory: f64,
}

const MAIN: &str = "ringfsd-uring";
const TOKIO: &str = "ringfsd-tokio";
const POOL_OFF: &str = "virtiofsd-0";
const POOLS: &str = "virtiofsd-";
const C: &str = "c-virtiofsd";
const BARE: &str = "bare";
const FIO: &str = "fio";

/// Marks an empty cell.
const NONE: &str = "–";

impl Results {
    fn add(&mut self, measured: Measurement) {
        for (list, name) in [
            (&mut self.cases, &measured.case),
            (&mut self.servers, &measured.server),
        ] {
            if !list.contains(name) {
                list.push(name.clone());
            }
        }
        let key = (measured.case.clone(), measured.server.clone());
        self.all.entry(key).or_default().push(measured);
    }

    fn median(&self, case: &str, server: &str) -> Option<Median> {
        let rounds = self.all.get(&(case.to_owned(), server.to_owned()))?;
        // A note says that the result is not of the case that its name says.
        let rounds: Vec<_> = rounds.iter().filter(|round| round.note.is_none()).collect();
        let of = |get: &dyn Fn(&Measurement) -> f64| {
            median(rounds.iter().map(|round| get(round)).collect())
        };
        let rate = of(&|round| round.operations_per_second)?;
        let rates = rounds.iter().map(|round| round.operations_per_second);
        let most = rates.clone().fold(f64::MIN, f64::max);
        let least = rates.fold(f64::MAX, f64::min);
        let used = rounds.iter().all(|round| round.used.is_some());
        let of_used = |get: &dyn Fn(&crate::report::Used) -> f64| {
            of(&|round| round.used.as_ref().map_or(0.0, get)).unwrap_or(0.0)
        };
        Some(Median {
            rate,
            p50: of(&|round| round.p50)?,
            p99: of(&|round| round.p99)?,
            p999: of(&|round| round.p999)?,
            spread: (most - least) / rate.max(1e-9),
            used: used.then(|| MedianUsed {
                cpu: of_used(&|used| used.cpu),
                switches: of_used(&|used| used.switches),
                threads: of_used(&|used| used.threads as f64),
                memory: of_used(&|used| used.memory as f64),
            }),
        })
    }

    /// The best setting of virtiofsd for a case.
    fn best_peer(&self, case: &str) -> Option<(&str, Median)> {
        let peers = self.servers.iter().filter(|name| name.starts_with(POOLS));
        let medians = peers.filter_map(|name| Some((name.as_str(), self.median(case, name)?)));
        medians.max_by(|(_, a), (_, b)| a.rate.total_cmp(&b.rate))
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.rates(&mut text);
        let _ = self.ratios(&mut text);
        let _ = self.costs(&mut text);
        let _ = self.losses(&mut text);
        let _ = self.notes(&mut text);
        text
    }

    fn rates(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "Operations a second, medians:\n")?;
        let servers = self.servers.join(" | ");
        writeln!(text, "| case | {servers} | widest spread |")?;
        writeln!(text, "| --- |{} --: |", " --: |".repeat(self.servers.len()))?;
        for case in &self.cases {
            let medians = self.servers.iter().map(|server| self.median(case, server));
            let medians: Vec<_> = medians.collect();
            write!(text, "| {case} |")?;
            for median in &medians {
                write!(text, " {} |", shown(median.map(|median| median.rate)))?;
            }
            let spreads = medians.iter().flatten().map(|median| median.spread);
            let spread = spreads.fold(0.0, f64::max) * 100.0;
            writeln!(text, " {spread:.0} % |")?;
        }
        writeln!(text)
    }

    /// The server that the others are compared with.
    fn main(&self) -> &str {
        let main = self.servers.iter().find(|name| *name == MAIN);
        main.or(self.servers.first()).map_or(MAIN, String::as_str)
    }

    /// Other servers, which are compared one by one.
    fn strangers(&self) -> impl Iterator<Item = &str> {
        let known = |name: &str| {
            name.starts_with(POOLS) || [self.main(), TOKIO, C, BARE, FIO].contains(&name)
        };
        let names = self.servers.iter().map(String::as_str);
        names.filter(move |name| !known(name))
    }

    fn ratios(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "{} as a ratio to the others:\n", self.main())?;
        let mut columns = Vec::new();
        let has = |server: &str| self.servers.iter().any(|name| name == server);
        if self.servers.iter().any(|name| name.starts_with(POOLS)) {
            columns.push("ops/s ÷ best virtiofsd".to_owned());
        }
        if has(C) {
            columns.push("ops/s ÷ C virtiofsd".to_owned());
        }
        if has(BARE) || has(FIO) {
            columns.push("ops/s ÷ bare calls, or fio".to_owned());
        }
        if has(POOL_OFF) {
            columns.push("CPU/op ÷ virtiofsd, pool off".to_owned());
        }
        if has(TOKIO) {
            columns.push("tokio's ops/s ÷ this".to_owned());
        }
        for name in self.strangers() {
            columns.push(format!("ops/s ÷ {name}"));
            columns.push(format!("CPU/op ÷ {name}"));
        }
        columns.extend(["p50 µs", "p99 µs", "p99.9 µs"].map(str::to_owned));
        writeln!(text, "| case | {} |", columns.join(" | "))?;
        writeln!(text, "| --- |{}", " --: |".repeat(columns.len()))?;
        for case in &self.cases {
            let Some(main) = self.median(case, self.main()) else {
                continue;
            };
            let rate = |server: &str| self.median(case, server).map(|other| other.rate);
            let cpu = |server: &str| Some(self.median(case, server)?.used?.cpu);
            let over = |a: Option<f64>, b: Option<f64>| {
                a.zip(b).map_or(NONE.to_owned(), |(a, b)| ratio(a, b))
            };
            let mut cells = Vec::new();
            if self.servers.iter().any(|name| name.starts_with(POOLS)) {
                cells.push(
                    self.best_peer(case)
                        .map_or(NONE.to_owned(), |(name, best)| {
                            let pool = name.strip_prefix(POOLS).unwrap_or(name);
                            format!("{} (pool {pool})", ratio(main.rate, best.rate))
                        }),
                );
            }
            if has(C) {
                cells.push(over(Some(main.rate), rate(C)));
            }
            if has(BARE) || has(FIO) {
                cells.push(match rate(FIO) {
                    Some(fio) => format!("{} (fio)", ratio(main.rate, fio)),
                    None => over(Some(main.rate), rate(BARE)),
                });
            }
            if has(POOL_OFF) {
                cells.push(over(cpu(self.main()), cpu(POOL_OFF)));
            }
            if has(TOKIO) {
                cells.push(over(rate(TOKIO), Some(main.rate)));
            }
            for name in self.strangers() {
                cells.push(over(Some(main.rate), rate(name)));
                cells.push(over(cpu(self.main()), cpu(name)));
            }
            cells.extend([main.p50, main.p99, main.p999].map(figures));
            writeln!(text, "| {case} | {} |", cells.join(" | "))?;
        }
        writeln!(text)
    }

    fn costs(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "The server's CPU µs, context switches for an operation, threads, and MiB of memory \
             without the guest's:\n"
        )?;
        let servers = self.servers.join(" | ");
        writeln!(text, "| case | {servers} |")?;
        writeln!(text, "| --- |{}", " --: |".repeat(self.servers.len()))?;
        for case in &self.cases {
            write!(text, "| {case} |")?;
            for server in &self.servers {
                let used = self.median(case, server).and_then(|median| median.used);
                match used {
                    Some(used) => write!(
                        text,
                        " {}, {}, {:.0}, {} |",
                        figures(used.cpu),
                        figures(used.switches),
                        used.threads,
                        figures(used.memory / 1024.0)
                    )?,
                    None => write!(text, " {NONE} |")?,
                }
            }
            writeln!(text)?;
        }
        writeln!(text)
    }

    fn losses(&self, text: &mut String) -> std::fmt::Result {
        let mut lost = Vec::new();
        for case in &self.cases {
            let Some(main) = self.median(case, self.main()) else {
                continue;
            };
            let best = self.best_peer(case);
            // Another ringfsd is not a peer.
            let peers = self
                .strangers()
                .filter(|name| !name.starts_with("ringfsd-"));
            let others = std::iter::once(C).chain(peers);
            let others = others.filter_map(|name| Some((name, self.median(case, name)?)));
            for (name, other) in best.into_iter().chain(others) {
                if main.rate < other.rate {
                    let by = ratio(main.rate, other.rate);
                    lost.push(format!("{case}: {by} of {name}"));
                }
            }
        }
        writeln!(text, "Cases in which {} is slower:\n", self.main())?;
        if lost.is_empty() {
            writeln!(text, "- none of these")?;
        }
        for line in lost {
            writeln!(text, "- {line}")?;
        }
        Ok(())
    }

    /// The measurements that were left out, and why.
    fn notes(&self, text: &mut String) -> std::fmt::Result {
        let mut notes: Vec<String> = Vec::new();
        for ((case, server), rounds) in &self.all {
            for note in rounds.iter().filter_map(|round| round.note.as_ref()) {
                let line = format!("{case}, {server}: {note}");
                if !notes.contains(&line) {
                    notes.push(line);
                }
            }
        }
        if !notes.is_empty() {
            writeln!(text, "\nLeft out:\n")?;
        }
        for note in notes {
            writeln!(text, "- {note}")?;
        }
        Ok(())
    }
}

fn shown(value: Option<f64>) -> String {
    value.map_or(NONE.to_owned(), figures)
}

fn ratio(a: f64, b: f64) -> String {
    if b > 0.0 {
        format!("{:.2}", a / b)
    } else {
        NONE.to_owned()
    }
}

/// The median: the middle value, or the mean of the two middle values.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get(values.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Used;

    fn measured(server: &str, rate: f64, cpu: f64) -> Measurement {
        Measurement {
            server: server.to_owned(),
            case: "getattr@32".to_owned(),
            operations_per_second: rate,
            used: Some(Used {
                cpu,
                ..Used::default()
            }),
            ..Measurement::default()
        }
    }

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn the_best_setting_of_a_peer_is_what_counts() {
        let mut results = Results::default();
        for (server, rate, cpu) in [
            (MAIN, 300.0, 2.0),
            (MAIN, 320.0, 2.0),
            (MAIN, 900.0, 2.0),
            ("virtiofsd-0", 160.0, 4.0),
            ("virtiofsd-16", 80.0, 9.0),
            (C, 640.0, 1.0),
        ] {
            results.add(measured(server, rate, cpu));
        }
        let text = results.markdown();
        assert!(
            text.contains("| getattr@32 | 2.00 (pool 0) | 0.50 | 0.50 |"),
            "{text}"
        );
        assert!(text.contains("- getattr@32: 0.50 of c-virtiofsd"), "{text}");
    }

    #[test]
    fn servers_of_other_names_are_compared_with_the_first() {
        let mut results = Results::default();
        results.add(measured("new", 300.0, 2.0));
        results.add(measured("old", 400.0, 4.0));
        let text = results.markdown();
        assert!(text.contains("| getattr@32 | 0.75 | 0.50 |"), "{text}");
        assert!(text.contains("- getattr@32: 0.75 of old"), "{text}");
    }

    #[test]
    fn a_measurement_with_a_note_does_not_count() {
        let mut results = Results::default();
        let note = Some("cached".to_owned());
        results.add(Measurement {
            note,
            ..measured(MAIN, 1.0, 1.0)
        });
        results.add(measured("virtiofsd-0", 2.0, 1.0));
        let text = results.markdown();
        assert!(
            text.contains("- getattr@32, ringfsd-uring: cached"),
            "{text}"
        );
        assert!(text.contains("| getattr@32 | – | 2.00 |"), "{text}");
    }
}
