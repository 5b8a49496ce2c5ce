//! One process of the guest that changes files, and looks on the host for each change that was
//! acknowledged.
//!
//! A writer changes only files that no other writer changes. The invariant: each acknowledged
//! change is looked for before the writer makes the next, so that only the host can have undone it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::effect::Effect;
use crate::programs::{Programs, Reliance};
use crate::random::Random;
use crate::report::Report;
use crate::share::{DIRECTORIES, Share};

/// How long a file is kept open.
const OPEN_TIME: Duration = Duration::from_secs(3);

/// How long before a call the directories must have existed for a missing one to be a fault.
const TOLERANCE: Duration = Duration::from_millis(100);

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open for appending, write a line, close.
    Append,
    /// Open and empty, write a line, close.
    Overwrite,
    /// `truncate` by path.
    Truncate,
    /// `chmod` by path.
    ChangeMode,
    /// `setxattr` by path.
    SetAttribute,
    /// Write a new file and rename it over the old one.
    Save,
    /// Create a file with a new name.
    Create,
    /// Create a directory with a new name.
    MakeDirectory,
    /// `unlink`.
    Remove,
    /// Open for appending, and keep it open.
    Hold,
    /// Write a line to the file that is kept open.
    AppendOpen,
    /// Close the file that is kept open.
    CloseOpen,
    /// Read the whole file.
    Read,
    /// `stat`.
    Stat,
    /// List the directory.
    List,
    /// Make the guest's kernel drop its caches.
    DropCaches,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Append,
        Self::Overwrite,
        Self::Truncate,
        Self::ChangeMode,
        Self::SetAttribute,
        Self::Save,
        Self::Create,
        Self::MakeDirectory,
        Self::Remove,
        Self::Hold,
        Self::AppendOpen,
        Self::CloseOpen,
        Self::Read,
        Self::Stat,
        Self::List,
        Self::DropCaches,
    ];
}

/// A kind of file, of which each writer has one in each directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// No program of the guest renames or removes it.
    Log,
    /// The guest renames over it and removes it, too.
    Document,
}

/// A file of a writer.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Index in [`DIRECTORIES`].
    pub directory: usize,
    /// Which file in it.
    pub file: File,
    /// The number of the writer.
    pub writer: usize,
}

impl Target {
    /// One of them at random.
    #[must_use]
    pub fn random(random: &mut Random, writer: usize) -> Self {
        Self {
            directory: *random.pick(&[0, 1, 2]),
            file: *random.pick(&[File::Log, File::Document]),
            writer,
        }
    }

    /// The path in the share.
    #[must_use]
    pub fn path(&self) -> String {
        let kind = match self.file {
            File::Log => "log",
            File::Document => "doc",
        };
        format!("{}/{kind}{}", self.directory(), self.writer)
    }

    fn directory(&self) -> &'static str {
        DIRECTORIES[self.directory]
    }
}

/// What a writer may rely on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// It makes its calls while nothing changes on the host, so that whatever exists must be found.
    pub is_alone: bool,
    /// The server sees no OPEN: it may refuse a read or write of a file that the host has removed,
    /// which the guest's kernel does not repeat, even if a program has the file open.
    pub sees_no_open: bool,
    /// The server keeps few descriptors and reopens an inode by its name, so it may lose what the host
    /// replaces between the guest's LOOKUP and OPEN.
    pub reopens_by_name: bool,
    /// The server knows inodes and not their names: a change may reach an inode that the host has
    /// renamed, and is not lost there.
    pub follows_inodes: bool,
}

/// A file that is kept open.
#[derive(Debug)]
struct OpenFile<F> {
    path: String,
    file: F,
    since: Instant,
    reliance: Reliance,
    /// The guest itself has removed its name, so that the host can't find it.
    is_nameless: bool,
}

/// A call that failed, and whether it creates what doesn't exist.
struct Failed {
    errno: i32,
    creates: bool,
}

/// One process.
#[derive(Debug)]
pub struct Writer<'s, P: Programs> {
    programs: P,
    share: &'s Share,
    number: usize,
    serial: u64,
    open_file: Option<OpenFile<P::File>>,
    rules: Rules,
    report: Report,
}

impl<'s, P: Programs> Writer<'s, P> {
    /// A writer with this number.
    pub fn new(programs: P, share: &'s Share, number: usize, rules: Rules) -> Self {
        Self {
            programs,
            share,
            number,
            serial: 0,
            open_file: None,
            rules,
            report: Report::default(),
        }
    }

    /// Ends the writer, closes its file, and returns what it found.
    ///
    /// # Errors
    /// The error number, if the file can't be closed.
    pub fn end(mut self) -> Result<(P, Report), i32> {
        self.close_open_file()?;
        Ok((self.programs, self.report))
    }

    /// What it has found.
    pub fn report(&mut self) -> &mut Report {
        &mut self.report
    }

    /// The programs that it runs.
    pub fn programs(&mut self) -> &mut P {
        &mut self.programs
    }

    fn line(&mut self) -> String {
        self.serial += 1;
        format!("writer {} record {:08}\n", self.number, self.serial)
    }

    fn close_open_file(&mut self) -> Result<(), i32> {
        match self.open_file.take() {
            Some(open_file) => self.programs.close(open_file.file),
            None => Ok(()),
        }
    }

    /// The guest has removed what was at `path`.
    fn lose_held(&mut self, path: &str) {
        if let Some(open_file) = &mut self.open_file
            && open_file.path == path
        {
            open_file.is_nameless = true;
        }
    }

    /// Performs `action` on `target`, and looks for its effect.
    pub fn act(&mut self, action: Action, target: &Target) {
        let began = Instant::now();
        let path = target.path();
        // No program of the guest renames or removes a log.
        let action = match action {
            Action::Save | Action::Remove if target.file == File::Log => Action::Read,
            action => action,
        };
        if let Err(failed) = self.try_act(action, target, &path, began) {
            self.fail(action, &path, &failed, began);
        }
    }

    fn try_act(
        &mut self,
        action: Action,
        target: &Target,
        path: &str,
        began: Instant,
    ) -> Result<(), Failed> {
        let existing = |errno| Failed {
            errno,
            creates: false,
        };
        let creating = |errno| Failed {
            errno,
            creates: true,
        };
        match action {
            Action::Append | Action::Overwrite => {
                let how = if action == Action::Append {
                    libc::O_APPEND
                } else {
                    libc::O_TRUNC
                };
                let line = self.line();
                if self.write(path, how, &line).map_err(creating)? {
                    self.judge(action, path, &Effect::Line(line), began);
                }
            }
            Action::Truncate => {
                self.serial += 1;
                let length = 10_000 + self.serial % 50_000;
                self.programs.truncate(path, length).map_err(existing)?;
                self.judge(action, path, &Effect::Length(length), began);
            }
            Action::ChangeMode => {
                self.serial += 1;
                let low = u32::try_from(self.serial % 64).unwrap_or(0);
                let mode = 0o600 + low;
                let since = clock_of_inodes();
                self.programs.chmod(path, mode).map_err(existing)?;
                self.judge(action, path, &Effect::Mode(mode, since), began);
            }
            Action::SetAttribute => {
                let value = self.line();
                let set = self.programs.set_attribute(path, &value);
                set.map_err(existing)?;
                self.judge(action, path, &Effect::Attribute(value), began);
            }
            Action::Save => {
                let (line, new) = (self.line(), new_name(path));
                if !self.write(&new, libc::O_TRUNC, &line).map_err(creating)? {
                    return Ok(());
                }
                let began = Instant::now();
                self.programs.rename(&new, path).map_err(existing)?;
                self.lose_held(path);
                self.judge(action, path, &Effect::Line(line), began);
            }
            Action::Create => {
                let line = self.line();
                let path = format!("{}/n{}-{}", target.directory(), self.number, self.serial);
                if self.write(&path, libc::O_EXCL, &line).map_err(creating)? {
                    self.judge(action, &path, &Effect::Line(line), began);
                }
            }
            Action::MakeDirectory => {
                self.serial += 1;
                let path = format!("{}/m{}-{}", target.directory(), self.number, self.serial);
                self.programs.mkdir(&path).map_err(creating)?;
                self.judge(action, &path, &Effect::Directory, began);
            }
            Action::Remove => {
                self.programs.unlink(path).map_err(existing)?;
                self.lose_held(path);
                // A directory that the host has moved is still the one that the guest knows.
                let was_in_moved = self.rules.follows_inodes && self.share.has_moved_above(path);
                if self.rules.is_alone && !was_in_moved && self.share.at(path).exists() {
                    let what = format!("{path} is there after an unlink that was acknowledged");
                    self.report.lose(what);
                }
            }
            Action::Hold => {
                self.close_open_file().map_err(creating)?;
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND;
                let file = self.programs.open(path, flags, 0o640).map_err(creating)?;
                self.open_file = Some(OpenFile {
                    path: path.to_owned(),
                    file,
                    since: began,
                    reliance: self.programs.reliance(began),
                    is_nameless: false,
                });
            }
            Action::AppendOpen => {
                let line = self.line();
                let Some(open_file) = &mut self.open_file else {
                    return Ok(());
                };
                let (path, reliance) = (open_file.path.clone(), open_file.reliance);
                if open_file.is_nameless
                    || open_file.since.elapsed() > OPEN_TIME && !self.rules.is_alone
                {
                    return self.close_open_file().map_err(existing);
                }
                let written = self.programs.write(&mut open_file.file, line.as_bytes());
                if written == Err(libc::ESTALE) && self.rules.sees_no_open {
                    self.report.refused += 1;
                    return Ok(());
                }
                written.map_err(existing)?;
                self.judge_by(action, &path, &Effect::Line(line), began, reliance);
            }
            Action::CloseOpen => self.close_open_file().map_err(existing)?,
            Action::DropCaches => self.programs.drop_caches().map_err(existing)?,
            other => self.look(other, target, path).map_err(existing)?,
        }
        Ok(())
    }

    /// Performs an action that changes nothing.
    fn look(&mut self, action: Action, target: &Target, path: &str) -> Result<(), i32> {
        self.report.reads += 1;
        match action {
            Action::List => {
                let (programs, directory) = (&mut self.programs, target.directory());
                let list = || programs.list(directory).map(drop);
                self.share.while_reading(directory, list)
            }
            Action::Stat => self.programs.stat(path),
            _ => {
                let programs = &mut self.programs;
                let read = || programs.read(path).map(drop);
                self.share.while_reading(path, read)
            }
        }
    }

    /// Opens a file, writes a line to it, and closes it. False if the write is refused, where that is
    /// allowed.
    fn write(&mut self, path: &str, how: i32, line: &str) -> Result<bool, i32> {
        let flags = libc::O_WRONLY | libc::O_CREAT | how;
        let mut file = self.programs.open(path, flags, 0o640)?;
        let written = self.programs.write(&mut file, line.as_bytes());
        let synced = match written {
            Ok(()) if self.serial.is_multiple_of(32) => self.programs.sync(&mut file),
            other => other,
        };
        let closed = self.programs.close(file);
        if synced == Err(libc::ESTALE) && self.rules.sees_no_open {
            self.report.refused += 1;
            return closed.map(|()| false);
        }
        synced.and(closed).map(|()| true)
    }

    /// Looks for an acknowledged effect.
    fn judge(&mut self, action: Action, path: &str, effect: &Effect, began: Instant) {
        let reliance = self.programs.reliance(began);
        self.judge_by(action, path, effect, began, reliance);
    }

    fn judge_by(
        &mut self,
        action: Action,
        path: &str,
        effect: &Effect,
        began: Instant,
        reliance: Reliance,
    ) {
        let may_be_of_descriptor = matches!(
            action,
            Action::Truncate | Action::ChangeMode | Action::SetAttribute
        );
        let is_open = self
            .open_file
            .as_ref()
            .is_some_and(|open_file| open_file.path == path);
        let was_open = reliance.was_open.unwrap_or_else(|| {
            let lately = began.checked_sub(TOLERANCE).unwrap_or(began);
            is_open || self.share.was_read(path, lately)
        });
        let report = &mut self.report;
        report.records += 1;
        let Some(found) = self.share.find(path, effect) else {
            if self.share.was_changed(path, began) {
                report.overtaken += 1;
            } else {
                let place = self.share.search(effect);
                report.lose(format!(
                    "{action:?} of {path}: {effect:?} is not there, but {place}"
                ));
            }
            return;
        };
        let Some(at) = found.displaced else {
            report.arrived += 1;
            return;
        };
        let since = if found.with_directory {
            reliance.directories_since
        } else {
            reliance.since
        };
        if at >= since {
            report.displaced_later += 1;
        } else if may_be_of_descriptor && was_open {
            report.was_open += 1;
        } else if found.is_named
            && (self.rules.follows_inodes
                || !found.with_directory && self.share.was_listed(path, at))
        {
            // A name by which the guest has seen it.
            report.elsewhere += 1;
        } else if reliance.may_pass {
            report.passed += u64::from(!self.rules.is_alone);
        } else {
            let (before, what) = (began.saturating_duration_since(at), found.what);
            let relied = since.saturating_duration_since(at);
            let with = if found.with_directory {
                " with its directory"
            } else {
                ""
            };
            report.lose(format!(
                "{action:?} of {path}: {effect:?} is in {what}, which was taken away{with} {before:?} \
                 before the call, and {relied:?} before what it relied on"
            ));
        }
    }

    fn fail(&mut self, action: Action, path: &str, failed: &Failed, began: Instant) {
        let is_reading = matches!(action, Action::Read | Action::Stat | Action::List);
        match failed.errno {
            libc::ESTALE if action == Action::Read && self.rules.sees_no_open => {
                self.report.refused += 1;
            }
            libc::ESTALE if is_reading && self.rules.reopens_by_name && !self.rules.is_alone => {
                self.report.refused += 1;
            }
            libc::ESTALE if is_reading => {
                self.report.stale_reads += 1;
                if self.rules.is_alone {
                    self.report.error(format!("{action:?} of {path}: ESTALE"));
                }
            }
            libc::ESTALE if self.rules.sees_no_open && !self.rules.is_alone => {
                self.report.refused += 1;
            }
            libc::ESTALE => {
                self.report.stale_writes += 1;
                if self.rules.is_alone || !self.may_be_stale(action, path, began) {
                    self.report.error(format!("{action:?} of {path}: ESTALE"));
                }
            }
            libc::ENOENT if !self.should_be_there(failed, path, began) => {
                self.report.missing += 1;
                if self.rules.is_alone && self.share.at(path).exists() {
                    self.report.outdated += 1;
                }
            }
            errno => {
                let error = std::io::Error::from_raw_os_error(errno);
                self.report.error(format!("{action:?} of {path}: {error}"));
            }
        }
    }

    /// Whether a second attempt may have failed: what it had looked up was removed before it could
    /// be changed.
    fn may_be_stale(&self, action: Action, path: &str, began: Instant) -> bool {
        let since = self.programs.reliance(began).since;
        let new = (action == Action::Save).then(|| new_name(path));
        self.share.was_displaced(path, since)
            || new.is_some_and(|new| self.share.was_displaced(&new, since))
    }

    /// Whether a call must have found its directory.
    fn should_be_there(&self, failed: &Failed, path: &str, began: Instant) -> bool {
        let since = if self.rules.is_alone {
            Instant::now()
        } else {
            began.checked_sub(TOLERANCE).unwrap_or(began)
        };
        // A directory that is only traversed is used as the guest knows it.
        let is_nested = path.matches('/').count() > 1;
        let may_pass = self.programs.reliance(began).may_pass;
        failed.creates
            && !is_nested
            && !(self.rules.is_alone && may_pass)
            && self.share.directories_stay(path, since)
    }
}

/// The name of a file that is about to replace the one at `path`.
fn new_name(path: &str) -> String {
    format!("{path}.new")
}

/// The time, less the lag of the clock that stamps inodes.
fn clock_of_inodes() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
        .saturating_sub(Duration::from_millis(20))
}
