//! The process's log: where records go, which ones, and what happens to those that repeat.
//!
//! What an operator chooses can be changed while the process runs ([`levels`]), and of records that
//! repeat only the first are logged ([`repeats`]). The invariant: whatever a guest or a VMM does,
//! one place of the code logs a bounded number of lines in a time, unless it is being debugged.

mod levels;
mod repeats;

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use self::levels::Levels;
#[cfg(test)]
pub(crate) use self::levels::ROOMS;
pub use self::levels::{LevelError, LevelList};
use self::repeats::{INTERVAL, Repeats, Suppressed, Verdict};

/// The target of what is logged because somebody has asked for it. It is never left out.
pub(crate) const REPORT: &str = "ringfsd::server::report";

/// The levels of a process, once it logs. There is one logger in a process.
static LEVELS: OnceLock<Levels> = OnceLock::new();

/// Where records go other than to standard error.
pub struct Output {
    /// Takes each line.
    pub target: Box<dyn Write + Send>,
    /// What a line begins with, for a level.
    pub header: Box<dyn Fn(Level) -> String + Send + Sync>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

/// How a record is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// A line of text.
    #[default]
    Text,
    /// A line with one JSON object.
    Json,
}

/// A record as a JSON object: when, how important, from where, what.
fn json(time: &str, record: &Record<'_>) -> serde_json::Value {
    serde_json::json!({
        "time": time,
        "level": record.level().as_str().to_ascii_lowercase(),
        "target": record.target(),
        "message": record.args().to_string(),
    })
}

/// Starts to log what `levels` and `filters` allow, to `output`, or to standard error. To be called
/// once.
pub fn start(levels: LevelList, filters: Option<String>, output: Option<Output>, format: Format) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Trace);
    let header = match output {
        Some(Output { target, header }) => {
            builder.target(env_logger::Target::Pipe(target));
            Some(header)
        }
        None => None,
    };
    match (header, format) {
        (None, Format::Text) => {}
        (Some(header), Format::Text) => {
            builder.format(move |line, record| {
                writeln!(line, "{}{}", header(record.level()), record.args())
            });
        }
        (header, Format::Json) => {
            builder.format(move |line, record| {
                let time = line.timestamp_millis().to_string();
                let header = header.as_ref().map(|header| header(record.level()));
                writeln!(
                    line,
                    "{}{}",
                    header.unwrap_or_default(),
                    json(&time, record)
                )
            });
        }
    }
    let levels = LEVELS.get_or_init(|| Levels::new(levels, filters));
    // Fails only if it was called before.
    let _ = log::set_boxed_logger(Box::new(Filtered {
        levels,
        repeats: Repeats::default(),
        since: Instant::now(),
        logger: Box::new(builder.build()),
    }));
    levels.start();
}

/// The levels of this process, if it logs by this room.
pub(crate) fn levels() -> Option<&'static Levels> {
    LEVELS.get()
}

/// A logger that logs what the levels allow, and of what repeats only the first.
struct Filtered {
    levels: &'static Levels,
    repeats: Repeats,
    /// From when on times are counted.
    since: Instant,
    logger: Box<dyn Log>,
}

impl Filtered {
    /// Logs a record at a time.
    fn log_at(&self, record: &Record<'_>, now: Duration) {
        if !self.levels.enabled(record.metadata()) {
            return;
        }
        let (level, target) = (record.level(), record.target());
        if level > LevelFilter::Info || target == REPORT || self.levels.debugs(target) {
            self.logger.log(record);
            return;
        }
        self.count_suppressed(now);
        match self.repeats.judge(record, now) {
            Verdict::Log => self.logger.log(record),
            Verdict::Announce => self.note(
                level,
                target,
                format_args!(
                    "suppressing more messages like this one for up to {} s: {}",
                    INTERVAL.as_secs(),
                    record.args()
                ),
            ),
            Verdict::Suppress => {}
        }
    }

    /// Logs how many records were left out in intervals that have ended.
    fn count_suppressed(&self, now: Duration) {
        for Suppressed {
            level,
            target,
            text,
            count,
        } in self.repeats.ended(now)
        {
            self.note(
                level,
                &target,
                format_args!("{count} more messages like this one were suppressed: {text}"),
            );
        }
    }

    fn note(&self, level: Level, target: &str, text: Arguments<'_>) {
        self.logger.log(
            &Record::builder()
                .level(level)
                .target(target)
                .args(text)
                .build(),
        );
    }
}

impl Log for Filtered {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.levels.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.log_at(record, self.since.elapsed());
    }

    /// Ends the intervals, too.
    fn flush(&self) {
        self.count_suppressed(Duration::MAX);
        self.logger.flush();
        let _ = io::stderr().flush();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A logger that keeps the lines that it gets.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);

    impl Log for Lines {
        fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            self.0.lock().unwrap().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    fn filtered(levels: &str) -> (Filtered, Lines) {
        let kept = Lines::default();
        let levels = Box::leak(Box::new(Levels::new(levels.parse().unwrap(), None)));
        let filtered = Filtered {
            levels,
            repeats: Repeats::default(),
            since: Instant::now(),
            logger: Box::new(kept.clone()),
        };
        (filtered, kept)
    }

    fn log(to: &Filtered, level: Level, target: &str, text: &str, now: Duration) {
        let args = format_args!("{text}");
        let record = Record::builder()
            .level(level)
            .target(target)
            .file_static(Some("a.rs"))
            .args(args)
            .build();
        to.log_at(&record, now);
    }

    const BURST: usize = repeats::BURST as usize;

    #[test]
    fn flood_is_announced_and_counted_by_the_next_line_after_it() {
        let (filtered, kept) = filtered("info");
        for number in 0..1000 {
            let text = format!("fault {number}");
            log(&filtered, Level::Warn, "ringfsd::fs", &text, Duration::ZERO);
        }
        let said = std::mem::take(&mut *kept.0.lock().unwrap());
        assert_eq!(said.len(), BURST + 1);
        assert!(
            said[0] == "fault 0" && said[BURST].ends_with(": fault 50"),
            "{said:?}"
        );
        // A line of any place shows the count.
        log(&filtered, Level::Info, "ringfsd::io", "other", INTERVAL);
        let said = std::mem::take(&mut *kept.0.lock().unwrap());
        let counted = "950 more messages like this one were suppressed: fault 50";
        assert_eq!(said, [counted, "other"]);
    }

    #[test]
    fn end_of_the_process_shows_the_count() {
        let (filtered, kept) = filtered("info");
        for _ in 0..BURST + 3 {
            log(&filtered, Level::Error, "ringfsd::fs", "x", Duration::ZERO);
        }
        filtered.flush();
        let said = kept.0.lock().unwrap();
        assert_eq!(
            said[BURST + 1..],
            ["3 more messages like this one were suppressed: x"]
        );
    }

    #[test]
    fn nothing_is_left_out_of_what_is_debugged_or_asked_for() {
        let (filtered, kept) = filtered("info,fs=debug");
        let all = [
            (Level::Warn, "ringfsd::fs"),
            (Level::Debug, "ringfsd::fs"),
            (Level::Info, REPORT),
        ];
        for (level, target) in all {
            for _ in 0..2 * BURST {
                log(&filtered, level, target, "x", Duration::ZERO);
            }
        }
        assert_eq!(kept.0.lock().unwrap().len(), all.len() * 2 * BURST);
    }

    #[test]
    fn record_is_one_line_of_json_whatever_it_says() {
        let args = format_args!("a \"name\"\nwith a line break");
        let record = Record::builder()
            .level(Level::Warn)
            .target("ringfsd::fs")
            .args(args)
            .build();
        let line = json("2026-01-02T03:04:05.678Z", &record).to_string();
        assert_eq!(line.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "warn");
        assert_eq!(value["target"], "ringfsd::fs");
        assert_eq!(value["message"], "a \"name\"\nwith a line break");
        assert_eq!(value["time"], "2026-01-02T03:04:05.678Z");
    }
}
