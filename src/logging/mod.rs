//! The process's log: where records go, and which ones, which can be changed while it runs.
//!
//! A filter of this room stands before the logger, which therefore passes on whatever it gets. The
//! invariant: the filter is replaced as a whole, so each record is judged by one set of levels.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use env_filter::Filter;
use log::{LevelFilter, Log, Metadata, Record};

/// The path that the names of rooms are below.
const CRATE: &str = "ringfsd";

/// The rooms whose level can be set on its own.
pub(crate) const ROOMS: &[&str] = &[
    "check",
    "cli",
    "config",
    "control",
    "ctl",
    "dax",
    "device",
    "embed",
    "error_chain",
    "fs",
    "fuse",
    "guest_memory",
    "io",
    "limits",
    "logging",
    "metrics",
    "migration",
    "recovery",
    "sandbox",
    "scheduler",
    "server",
    "state",
    "sys",
    "top",
    "vhost_user",
    "virtqueue",
    "worker",
];

/// Crates that log what the server logs too, and that a guest could make repeat it.
const REPEATING: [&str; 3] = ["nydus_rafs", "nydus_storage", "nydus_utils"];

/// The levels of a process, once it logs. There is one logger in a process.
static LEVELS: OnceLock<Levels> = OnceLock::new();

/// Where records go other than to standard error.
pub struct Output {
    /// Takes each line.
    pub target: Box<dyn Write + Send>,
    /// What a line begins with, for a level.
    pub header: Box<dyn Fn(log::Level) -> String + Send + Sync>,
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

/// Starts to log what `level` and `filters` allow, to `output`, or to standard error. To be called
/// once.
pub fn start(level: LevelFilter, filters: Option<String>, output: Option<Output>, format: Format) {
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
    let levels = LEVELS.get_or_init(|| Levels::new(level, filters));
    // Fails only if it was called before.
    let _ = log::set_boxed_logger(Box::new(Filtered {
        levels,
        logger: builder.build(),
    }));
    levels.apply(&levels.choice());
}

/// The levels of this process, if it logs by this room.
pub(crate) fn levels() -> Option<&'static Levels> {
    LEVELS.get()
}

/// Why a level can't be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no room {0}; the rooms are {rooms}", rooms = ROOMS.join(", "))]
pub(crate) struct NoSuchRoom(pub(crate) String);

/// Which records are logged.
#[derive(Debug)]
pub(crate) struct Levels {
    choice: Mutex<Choice>,
    filter: RwLock<Filter>,
}

/// What has been chosen, from which the filter is made.
#[derive(Clone, Debug)]
struct Choice {
    level: LevelFilter,
    /// Finer filters, as the environment sets them.
    filters: Option<String>,
    /// The levels of single rooms that were set later.
    rooms: BTreeMap<String, LevelFilter>,
}

impl Choice {
    fn filter(&self) -> Filter {
        let mut builder = env_filter::Builder::new();
        builder.filter_level(self.level);
        if self.level < LevelFilter::Debug {
            for name in REPEATING {
                builder.filter_module(name, LevelFilter::Off);
            }
        }
        if let Some(filters) = &self.filters {
            builder.parse(filters);
        }
        for (room, level) in &self.rooms {
            builder.filter_module(&format!("{CRATE}::{room}"), *level);
        }
        builder.build()
    }
}

impl Levels {
    fn new(level: LevelFilter, filters: Option<String>) -> Self {
        let choice = Choice {
            level,
            filters,
            rooms: BTreeMap::new(),
        };
        Self {
            filter: RwLock::new(choice.filter()),
            choice: Mutex::new(choice),
        }
    }

    fn choice(&self) -> Choice {
        self.choice
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sets the level of one room, or that of all, which replaces what was set of single ones.
    ///
    /// # Errors
    ///
    /// There is no such room.
    pub(crate) fn set(&self, level: LevelFilter, room: Option<&str>) -> Result<(), NoSuchRoom> {
        let mut choice = self.choice.lock().unwrap_or_else(PoisonError::into_inner);
        match room {
            Some(room) if ROOMS.contains(&room) => {
                choice.rooms.insert(room.to_owned(), level);
            }
            Some(room) => return Err(NoSuchRoom(room.to_owned())),
            None => {
                *choice = Choice {
                    level,
                    filters: None,
                    rooms: BTreeMap::new(),
                };
            }
        }
        self.apply(&choice);
        Ok(())
    }

    fn apply(&self, choice: &Choice) {
        let filter = choice.filter();
        let most = filter.filter();
        *self.filter.write().unwrap_or_else(PoisonError::into_inner) = filter;
        log::set_max_level(most);
    }

    /// The level of all rooms that have none of their own.
    pub(crate) fn level(&self) -> LevelFilter {
        self.choice().level
    }

    /// The filters that the environment has set, if they still apply.
    pub(crate) fn filters(&self) -> Option<String> {
        self.choice().filters
    }

    /// The levels of single rooms that were set while the process ran.
    pub(crate) fn rooms(&self) -> BTreeMap<String, LevelFilter> {
        self.choice().rooms
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let filter = self.filter.read().unwrap_or_else(PoisonError::into_inner);
        filter.enabled(metadata)
    }
}

/// A logger that logs what the levels allow.
struct Filtered {
    levels: &'static Levels,
    logger: env_logger::Logger,
}

impl Log for Filtered {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.levels.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.levels.enabled(record.metadata()) {
            self.logger.log(record);
        }
    }

    fn flush(&self) {
        self.logger.flush();
        let _ = io::stderr().flush();
    }
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    fn allows(levels: &Levels, level: Level, target: &str) -> bool {
        levels.enabled(&Metadata::builder().level(level).target(target).build())
    }

    #[test]
    fn rooms_are_those_of_the_crate() {
        let modules = include_str!("../lib.rs")
            .lines()
            .filter(|line| !line.starts_with(' '))
            .filter_map(|line| line.strip_suffix(';')?.rsplit_once("mod "))
            .map(|(_, name)| name);
        let mut modules: Vec<_> = modules.collect();
        modules.sort_unstable();
        assert_eq!(modules, ROOMS);
    }

    #[test]
    fn room_has_level_of_its_own_until_all_are_set() {
        let levels = Levels::new(LevelFilter::Info, Some("ringfsd::io=off".to_owned()));
        assert!(!allows(&levels, Level::Error, "ringfsd::io::engine"));
        assert!(!allows(&levels, Level::Debug, "ringfsd::fs::vfs"));
        levels.set(LevelFilter::Debug, Some("fs")).unwrap();
        assert!(allows(&levels, Level::Debug, "ringfsd::fs::vfs"));
        assert!(!allows(&levels, Level::Debug, "ringfsd::fuse"));
        assert!(!allows(&levels, Level::Error, "ringfsd::io::engine"));
        levels.set(LevelFilter::Warn, None).unwrap();
        assert!(!allows(&levels, Level::Info, "ringfsd::fs::vfs"));
        assert!(allows(&levels, Level::Warn, "ringfsd::io::engine"));
        assert!(levels.rooms().is_empty() && levels.filters().is_none());
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

    #[test]
    fn unknown_room_is_refused_and_changes_nothing() {
        let levels = Levels::new(LevelFilter::Info, None);
        let refused = levels.set(LevelFilter::Trace, Some("attic"));
        assert_eq!(refused, Err(NoSuchRoom("attic".to_owned())));
        assert!(!allows(&levels, Level::Debug, "ringfsd::fs"));
    }
}
