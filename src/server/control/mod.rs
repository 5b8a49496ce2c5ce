//! What the server does for clients of its control socket: one function for each command.
//!
//! The invariant: whatever a client asks for, guests are served meanwhile.

mod lists;
mod options;
mod status;

use std::ffi::OsStr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use log::LevelFilter;
use serde_json::{Value, json};

use super::live::Live;
use super::log_levels::{LogLevels, SetError};
use super::mounts::{AddError, Mounts};
use crate::control::{Call, Code, Failure, Handler};
use crate::error_chain;
use crate::fs::vfs::MountPoint;
use crate::fs::{FileSystem, Inspect};
use crate::fuse::FileWatch;
use crate::limits::{LIMITED, Limits, Rate, Settings};
use crate::logging::REPORT;
use crate::metrics::Registry;

pub(super) use self::options::options;
pub(super) use self::status::Facts;

/// For how long durations are measured after a client has asked for them.
const MEASURE: Duration = Duration::from_secs(10);

/// The handlers, and what they look at.
#[derive(Debug)]
pub(super) struct Handlers {
    pub(super) facts: Facts,
    pub(super) live: Arc<Live>,
    /// It is dropped with the server, whatever this thread does.
    pub(super) fs: Weak<dyn FileSystem>,
    pub(super) metrics: Weak<Registry>,
    /// Until when durations are measured because a client has asked for them.
    pub(super) measured_until: Option<Instant>,
    pub(super) file_watch: Arc<FileWatch>,
    /// Until when requests are counted by file.
    pub(super) watched_until: Option<Instant>,
    pub(super) limits: Arc<Limits>,
    /// With `--vfs`.
    pub(super) mounts: Option<Mounts>,
    pub(super) log_levels: LogLevels,
}

impl Handler for Handlers {
    fn call(&mut self, call: Call) -> Result<Value, Failure> {
        match call.command {
            "status" => Ok(self.status()),
            "statistics" => self.measure(&call),
            "watch-files" => self.watch_files(&call),
            "set-log-level" => self.set_log_level(&call),
            "set-limits" => self.set_limits(&call),
            "inodes" => self.inspect(|fs| lists::inodes(fs, &call)),
            "handles" => self.inspect(|fs| lists::handles(fs, &call)),
            "drop-caches" => self.inspect(|fs| Ok(lists::dropped(fs.drop_caches()))),
            "mount" => self.mount(call),
            "unmount" => self.unmount(&call),
            "upgrade" => self.upgrade(),
            "dump" => Ok(self.dump()),
            other => Err(Failure::new(
                Code::UnknownCommand,
                format!("this server doesn't implement {other}"),
            )),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.measured_until
            .into_iter()
            .chain(self.watched_until)
            .min()
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let is_over = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        if is_over(self.measured_until) {
            self.measured_until = None;
            if let Some(metrics) = self.metrics.upgrade() {
                metrics.set_timed(false);
            }
        }
        if is_over(self.watched_until) {
            self.watched_until = None;
            self.file_watch.switch(false);
        }
    }

    fn report(&mut self) {
        for line in self.summary() {
            log::info!(target: REPORT, "report: {line}");
        }
    }
}

impl Handlers {
    /// What the file system lets an operator see.
    fn inspect(
        &self,
        look: impl FnOnce(&dyn Inspect) -> Result<Value, Failure>,
    ) -> Result<Value, Failure> {
        let fs = self.fs.upgrade();
        let fs = fs.ok_or_else(|| Failure::new(Code::Failed, "the server is ending"))?;
        let inspect = fs.inspect().ok_or_else(|| {
            let option = self.facts.source_option;
            Failure::new(
                Code::NotPossible,
                format!("{option} serves a file system that can't be looked into"),
            )
            .hint("directories, overlays and images can, alone or together (--vfs)")
        })?;
        look(inspect)
    }

    /// The counters. Durations are measured for a while if the client wants them.
    fn measure(&mut self, call: &Call) -> Result<Value, Failure> {
        let ending = || Failure::new(Code::Failed, "the server is ending");
        let metrics = self.metrics.upgrade().ok_or_else(ending)?;
        // Where they are measured anyway, that goes on.
        if call.flag("durations")? && (!metrics.is_timed() || self.measured_until.is_some()) {
            metrics.set_timed(true);
            self.measured_until = Some(Instant::now() + MEASURE);
        }
        let statistics = serde_json::to_value(metrics.snapshot());
        statistics.map_err(|error| Failure::new(Code::Failed, error.to_string()))
    }

    fn set_log_level(&self, call: &Call) -> Result<Value, Failure> {
        let level: LevelFilter = call.text("level")?.parse().map_err(|_unknown| {
            Failure::argument("level", "one of off, error, warn, info, debug, trace")
        })?;
        let room = call.optional_text("room")?;
        self.log_levels.set(level, room).map_err(|error| {
            let code = match error {
                SetError::Fixed => Code::NotPossible,
                SetError::Level(_) => Code::InvalidArgument,
            };
            Failure::new(code, error.to_string())
        })?;
        // What is logged at the old level may be the reason why nobody sees this.
        log::info!("log level {level} of {}", room.unwrap_or("all rooms"));
        Ok(status::log())
    }

    /// Replaces all limits; what isn't named isn't limited.
    fn set_limits(&mut self, call: &Call) -> Result<Value, Failure> {
        let mut rates = [None; LIMITED.len()];
        for (rate, name) in rates.iter_mut().zip(LIMITED) {
            let Some(text) = call.optional_text(name)? else {
                continue;
            };
            let parsed = text.parse::<Rate>();
            *rate = Some(parsed.map_err(|error| {
                Failure::new(Code::InvalidArgument, format!("{name}: {error}"))
            })?);
        }
        let settings = Settings::from_rates(rates);
        self.limits.set(settings);
        log::info!("limits: {settings}");
        Ok(json!({ "limits": lists::limits(&settings) }))
    }

    /// The files with the most requests, which are counted for a while from now on.
    fn watch_files(&mut self, call: &Call) -> Result<Value, Failure> {
        let limit = lists::limit(call, 100)?;
        self.file_watch.switch(true);
        self.watched_until = Some(Instant::now() + MEASURE);
        let fs = self.fs.upgrade();
        let inspect = fs.as_ref().and_then(|fs| fs.inspect());
        Ok(lists::busiest(inspect, self.file_watch.busiest(limit)))
    }

    fn mounts(&mut self) -> Result<&mut Mounts, Failure> {
        let option = self.facts.source_option;
        self.mounts.as_mut().ok_or_else(|| {
            Failure::new(
                Code::NotPossible,
                format!("the server was started with {option}, which has no mount points"),
            )
            .hint("start it with --vfs /=DIR")
        })
    }

    fn mount(&mut self, mut call: Call) -> Result<Value, Failure> {
        let mounts = self.mounts()?;
        let point = mount_point(&call)?;
        let source = call.text("source")?.to_owned();
        let readonly = call.flag("readonly")?;
        let fd = call.descriptor.take().ok_or_else(|| {
            Failure::new(
                Code::InvalidArgument,
                "no descriptor of the directory has come with the request",
            )
            .hint("`ringfsd ctl` opens the directory and sends its descriptor (SCM_RIGHTS)")
        })?;
        mounts
            .add(point, fd, source, readonly)
            .map_err(|error| failure(&error))?;
        Ok(self.mounted())
    }

    fn unmount(&mut self, call: &Call) -> Result<Value, Failure> {
        let mounts = self.mounts()?;
        mounts
            .remove(&mount_point(call)?)
            .map_err(|error| failure(&error))?;
        Ok(self.mounted())
    }

    fn mounted(&self) -> Value {
        json!({ "mounts": self.mounts.as_ref().map(lists::mounts) })
    }

    /// The serving process could be compromised, so it has no means to run another program.
    fn upgrade(&self) -> Result<Value, Failure> {
        if !self.facts.supervised {
            return Err(Failure::new(
                Code::NotPossible,
                "only a server that was started with --supervise can be upgraded",
            )
            .hint("restart it; with --state, the guest's session survives that"));
        }
        let pid = self.facts.pid;
        Ok(json!({ "process": pid, "command": format!("ringfsd upgrade --pid {pid}") }))
    }
}

fn mount_point(call: &Call) -> Result<MountPoint, Failure> {
    let point = MountPoint::parse(OsStr::new(call.text("point")?));
    point.map_err(|error| Failure::new(Code::InvalidArgument, error.to_string()))
}

fn failure(error: &AddError) -> Failure {
    let text = error_chain::one_line(error);
    match error {
        AddError::Attached => Failure::new(Code::NotPossible, text).hint(
            "`ringfsd ctl` makes one, as root or where it may make a user namespace; a server \
             with --sandbox none takes any",
        ),
        AddError::TooMany(_) => Failure::new(Code::NotPossible, text)
            .hint("unmount one, or restart the server with all of them"),
        AddError::NotADirectory => Failure::new(Code::NotPossible, text)
            .hint("restart the server to mount layers or an image"),
        AddError::Mount(_) | AddError::Share(_) | AddError::Stat(_) | AddError::Ending => {
            Failure::new(Code::Failed, text)
        }
    }
}
