//! Which records are logged: what was chosen at the start, and what was changed since.
//!
//! The invariant: the filter is replaced as a whole, so each record is judged by one set of levels.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use env_filter::Filter;
use log::{Level, LevelFilter, Metadata};

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

/// Why a level can't be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// The room doesn't exist.
    #[error("there is no room {0}; the rooms are {rooms}", rooms = ROOMS.join(", "))]
    NoSuchRoom(String),
    /// The level doesn't exist.
    #[error("there is no level {0:?}; the levels are off, error, warn, info, debug and trace")]
    NoSuchLevel(String),
}

/// Log levels: of all rooms, and of single ones. As a text, `info,fs=debug`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LevelList {
    /// The level of the rooms that have none of their own.
    pub level: Option<LevelFilter>,
    rooms: BTreeMap<&'static str, LevelFilter>,
}

impl LevelList {
    /// The levels that a debugging option asks for: these, and `debug` for all other rooms.
    #[must_use]
    pub fn at_least_debug(mut self) -> Self {
        self.level = self.level.max(Some(LevelFilter::Debug));
        self
    }

    fn add_rooms(&self, builder: &mut env_filter::Builder) {
        for (room, level) in &self.rooms {
            builder.filter_module(&format!("{CRATE}::{room}"), *level);
        }
    }
}

impl From<LevelFilter> for LevelList {
    fn from(level: LevelFilter) -> Self {
        Self {
            level: Some(level),
            rooms: BTreeMap::new(),
        }
    }
}

/// The room of this name, as the list of them has it.
fn room(name: &str) -> Result<&'static str, LevelError> {
    let known = ROOMS.iter().copied().find(|room| *room == name);
    known.ok_or_else(|| LevelError::NoSuchRoom(name.to_owned()))
}

fn level(name: &str) -> Result<LevelFilter, LevelError> {
    match name.eq_ignore_ascii_case("err") {
        true => Ok(LevelFilter::Error),
        false => name
            .parse()
            .map_err(|_unknown| LevelError::NoSuchLevel(name.to_owned())),
    }
}

impl FromStr for LevelList {
    type Err = LevelError;

    /// Parses a level, `ROOM=LEVEL`, or several of them, of which the last one of a kind applies.
    fn from_str(text: &str) -> Result<Self, LevelError> {
        let mut list = Self::default();
        for part in text.split(',') {
            match part.split_once('=') {
                Some((name, value)) => {
                    list.rooms.insert(room(name.trim())?, level(value.trim())?);
                }
                None => list.level = Some(level(part.trim())?),
            }
        }
        Ok(list)
    }
}

impl fmt::Display for LevelList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.level.iter().map(|level| (None, *level));
        let rooms = self.rooms.iter().map(|(room, level)| (Some(*room), *level));
        for (number, (room, level)) in all.chain(rooms).enumerate() {
            let comma = if number == 0 { "" } else { "," };
            write!(f, "{comma}")?;
            if let Some(room) = room {
                write!(f, "{room}=")?;
            }
            write!(f, "{}", level.as_str().to_ascii_lowercase())?;
        }
        Ok(())
    }
}

/// Which records are logged.
#[derive(Debug)]
pub(crate) struct Levels {
    choice: Mutex<Choice>,
    filter: RwLock<Filter>,
}

/// What has been chosen, from which the filter is made.
#[derive(Clone, Debug, Default)]
struct Choice {
    /// The levels at the start.
    first: LevelList,
    /// Finer filters, as the environment sets them.
    filters: Option<String>,
    /// What was set since. A level of all rooms replaces what is above.
    later: LevelList,
}

impl Choice {
    fn level(&self) -> LevelFilter {
        self.later
            .level
            .or(self.first.level)
            .unwrap_or(LevelFilter::Info)
    }

    fn filter(&self) -> Filter {
        let mut builder = env_filter::Builder::new();
        builder.filter_level(self.level());
        if self.level() < LevelFilter::Debug {
            for name in REPEATING {
                builder.filter_module(name, LevelFilter::Off);
            }
        }
        self.first.add_rooms(&mut builder);
        if let Some(filters) = &self.filters {
            builder.parse(filters);
        }
        self.later.add_rooms(&mut builder);
        builder.build()
    }
}

impl Levels {
    pub(super) fn new(first: LevelList, filters: Option<String>) -> Self {
        let choice = Choice {
            first,
            filters,
            later: LevelList::default(),
        };
        Self {
            filter: RwLock::new(choice.filter()),
            choice: Mutex::new(choice),
        }
    }

    fn choice(&self) -> MutexGuard<'_, Choice> {
        self.choice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the level of one room, or that of all, which replaces what was set of single ones.
    ///
    /// # Errors
    ///
    /// There is no such room.
    pub(crate) fn set(&self, level: LevelFilter, name: Option<&str>) -> Result<(), LevelError> {
        let name = name.map(room).transpose()?;
        let mut choice = self.choice();
        match name {
            Some(name) => {
                choice.later.rooms.insert(name, level);
            }
            None => {
                choice.first = LevelList::default();
                choice.filters = None;
                choice.later = level.into();
            }
        }
        self.apply(&choice);
        Ok(())
    }

    /// Sets what another process had [set](Self::set), as its [`changes`](Self::changes) say.
    pub(crate) fn restore(&self, changes: LevelList) {
        let mut choice = self.choice();
        if changes.level.is_some() {
            choice.first = LevelList::default();
            choice.filters = None;
        }
        choice.later = changes;
        self.apply(&choice);
    }

    /// What was set since the start.
    pub(crate) fn changes(&self) -> LevelList {
        self.choice().later.clone()
    }

    pub(super) fn start(&self) {
        self.apply(&self.choice());
    }

    fn apply(&self, choice: &Choice) {
        let filter = choice.filter();
        let most = filter.filter();
        *self.filter.write().unwrap_or_else(PoisonError::into_inner) = filter;
        log::set_max_level(most);
    }

    /// The level of all rooms that have none of their own.
    pub(crate) fn level(&self) -> LevelFilter {
        self.choice().level()
    }

    /// The filters that the environment has set, if they still apply.
    pub(crate) fn filters(&self) -> Option<String> {
        self.choice().filters.clone()
    }

    /// The levels of single rooms that were set by option, or later.
    pub(crate) fn rooms(&self) -> BTreeMap<&'static str, LevelFilter> {
        let choice = self.choice();
        let mut rooms = choice.first.rooms.clone();
        rooms.extend(&choice.later.rooms);
        rooms
    }

    pub(super) fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let filter = self.filter.read().unwrap_or_else(PoisonError::into_inner);
        filter.enabled(metadata)
    }

    /// Whether a target is being debugged.
    pub(super) fn debugs(&self, target: &str) -> bool {
        self.enabled(
            &Metadata::builder()
                .level(Level::Debug)
                .target(target)
                .build(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(levels: &Levels, level: Level, target: &str) -> bool {
        levels.enabled(&Metadata::builder().level(level).target(target).build())
    }

    fn list(text: &str) -> LevelList {
        text.parse().unwrap()
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
    fn list_of_levels_is_parsed_and_shown() {
        for (text, shown) in [
            ("info", "info"),
            ("ERR", "error"),
            ("fs=debug", "fs=debug"),
            ("io=trace, Warn ,fs=Off", "warn,fs=off,io=trace"),
            ("info,fs=debug,debug,fs=warn", "debug,fs=warn"),
        ] {
            assert_eq!(list(text).to_string(), shown);
            assert_eq!(list(shown), list(text));
        }
        let error = |text: &str| text.parse::<LevelList>().unwrap_err().to_string();
        assert!(error("info,attic=debug").contains("no room attic; the rooms are check, cli, "));
        for wrong in ["", "loud", "fs", "fs=", "fs=loud", "info,", "=debug"] {
            let error = error(wrong);
            let names_choices = error.contains("off, error") || error.contains("fs, fuse");
            assert!(names_choices, "{wrong}: {error}");
        }
    }

    #[test]
    fn room_has_level_of_its_own_until_all_are_set() {
        let levels = Levels::new(
            list("info,dax=warn,sys=off"),
            Some("ringfsd::io=off,ringfsd::sys=info".to_owned()),
        );
        assert!(!allows(&levels, Level::Error, "ringfsd::io::engine"));
        assert!(!allows(&levels, Level::Debug, "ringfsd::fs::vfs"));
        assert!(!allows(&levels, Level::Info, "ringfsd::dax::window"));
        // The environment is the finer filter.
        assert!(allows(&levels, Level::Info, "ringfsd::sys::shared"));
        levels.set(LevelFilter::Debug, Some("fs")).unwrap();
        assert!(allows(&levels, Level::Debug, "ringfsd::fs::vfs"));
        assert!(levels.debugs("ringfsd::fs::vfs") && !levels.debugs("ringfsd::io"));
        assert!(!allows(&levels, Level::Debug, "ringfsd::fuse"));
        assert!(!allows(&levels, Level::Error, "ringfsd::io::engine"));
        levels.set(LevelFilter::Warn, None).unwrap();
        assert!(!allows(&levels, Level::Info, "ringfsd::fs::vfs"));
        assert!(allows(&levels, Level::Warn, "ringfsd::io::engine"));
        assert!(levels.rooms().is_empty() && levels.filters().is_none());
    }

    #[test]
    fn changes_are_restored_by_another_process() {
        let first = || Levels::new(list("info,io=warn"), Some("ringfsd::dax=off".to_owned()));
        let levels = first();
        assert_eq!(levels.changes(), LevelList::default());
        levels.set(LevelFilter::Debug, Some("fs")).unwrap();
        let next = first();
        next.restore(list(&levels.changes().to_string()));
        assert!(allows(&next, Level::Debug, "ringfsd::fs"));
        assert!(!allows(&next, Level::Info, "ringfsd::io"));
        assert!(!allows(&next, Level::Error, "ringfsd::dax"));
        levels.set(LevelFilter::Error, None).unwrap();
        levels.set(LevelFilter::Trace, Some("io")).unwrap();
        let next = first();
        next.restore(list(&levels.changes().to_string()));
        assert!(!allows(&next, Level::Warn, "ringfsd::fs"));
        assert!(allows(&next, Level::Error, "ringfsd::dax"));
        assert!(allows(&next, Level::Trace, "ringfsd::io"));
    }

    #[test]
    fn unknown_room_is_refused_and_changes_nothing() {
        let levels = Levels::new(list("info"), None);
        let refused = levels.set(LevelFilter::Trace, Some("attic"));
        assert_eq!(refused, Err(LevelError::NoSuchRoom("attic".to_owned())));
        assert!(!allows(&levels, Level::Debug, "ringfsd::fs"));
    }
}
