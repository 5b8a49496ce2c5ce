//! Another program in the place of the one that supervises, while a session goes on.
//!
//! Who asks sends `SIGHUP`; with a number, there is a socket by that name on which it hands over the
//! program and hears what has become of it. The new program is tried before anything is touched
//! ([`check_for_upgrade`]); then the serving process gives all requests back and leaves; then the
//! new program runs in this very process, and makes a serving process of its own. If that doesn't
//! get as far as serving, the old program is run again the same way.
//!
//! The invariant: until the new program serves, the old one's file is open, and whoever runs here
//! goes back to it.

use std::ffi::{CString, OsString};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::exec_handover::{FORM, Leaving, VARIABLE};
use super::parent_process::{DRAIN, LEFT, START_TIMEOUT, Supervising, milliseconds};
use super::{ServerError, chain};
use crate::config::Config;
use crate::sandbox::exec::{self, Queued};
use crate::sandbox::{self, Ending, Event, FdIdentity};
use crate::state::Table;
use crate::vhost_user;

/// Where it stands what a program would have to understand that is only tried.
const CHECK: &str = "RINGFSD_UPGRADE_CHECK";

/// The status of one that does.
const READY: u8 = 97;

/// How long whoever asks, and is asked, may take to say something.
const WORD: Duration = Duration::from_secs(2);

/// How the lines begin by which whoever asks knows how it went.
const DONE: &str = "upgraded ";
const FAILED: &str = "not upgraded: ";

/// What this program writes down for the next.
fn forms() -> String {
    let (session, state) = (vhost_user::VERSION, Table::VERSION);
    format!("hand-over={FORM} session={session} state={state}")
}

/// If this program is only being tried: whether it could go on from what the running one leaves, with
/// the same arguments. `None` if it isn't.
#[must_use]
pub fn check_for_upgrade(config: &Config) -> Option<Result<u8, String>> {
    let asked = std::env::var(CHECK).ok()?;
    let known = forms();
    let unknown: Vec<_> = asked
        .split(' ')
        .filter(|form| !known.split(' ').any(|known| known == *form))
        .collect();
    if !unknown.is_empty() {
        return Some(Err(format!(
            "what the running program leaves, {}, this one can't read: it knows {known}",
            unknown.join(" ")
        )));
    }
    if !config.supervise {
        return Some(Err("without --supervise nothing is taken over".to_owned()));
    }
    let runtime = crate::io::choose(config.runtime);
    Some(runtime.map(|_| READY).map_err(|error| chain(&error)))
}

/// A program that is to take the place of this one, and who hears of it.
#[derive(Debug)]
pub(super) struct UpgradeRequest {
    program: FdIdentity,
    asker: Option<UnixStream>,
}

impl UpgradeRequest {
    /// `queued` is what came with the signal; without, the program at `path` is meant.
    pub(super) fn of(queued: Option<Queued>, path: &PathBuf) -> std::io::Result<Self> {
        let Some(Queued { value, sender }) = queued else {
            let file = std::fs::File::open(path)?;
            return Ok(Self {
                program: FdIdentity::new(file.into())?,
                asker: None,
            });
        };
        let asker = UnixStream::connect_addr(&name(value)?)?;
        // The name is free again once whoever asks has gone, and anybody may take it.
        if exec::peer(&asker)? != sender {
            return Err(std::io::Error::other(
                "another process listens where the one that asks should",
            ));
        }
        asker.set_read_timeout(Some(WORD))?;
        asker.set_write_timeout(Some(WORD))?;
        let file = receive(&asker)?;
        Ok(Self {
            program: FdIdentity::new(file)?,
            asker: Some(asker),
        })
    }
}

/// The name of the socket of who asks. Everybody can see it (`/proc/net/unix`), and connect.
fn name(value: usize) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("ringfsd-upgrade-{value:016x}"))
}

fn receive(asker: &UnixStream) -> std::io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // A signal ends a call that has a time limit, whatever its handler says.
    rustix::io::retry_on_intr(|| {
        let mut bytes = [IoSliceMut::new(&mut byte)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(asker, &mut bytes, &mut control, flags)
    })?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.ok_or_else(|| std::io::Error::other("whoever asks has handed over no program"))
}

/// An upgrade under way.
#[derive(Debug)]
pub(super) struct UpgradeAttempt {
    /// Since when nobody serves.
    pub(super) since: Duration,
    /// The program to go back to.
    pub(super) old: Option<FdIdentity>,
    pub(super) asker: Option<UnixStream>,
    /// Why this program runs again.
    pub(super) failed: Option<String>,
}

impl UpgradeAttempt {
    pub(super) fn since(&self) -> Duration {
        self.since
    }

    /// What the guardian needs for it.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        let old = self.old.as_ref().map(|old| old.fd.as_raw_fd());
        let asker = self.asker.as_ref().map(AsRawFd::as_raw_fd);
        old.into_iter().chain(asker).collect()
    }

    /// Says how it went: this program serves.
    pub(super) fn tell(self, pause: Duration) {
        let pause = milliseconds(pause);
        let version = env!("CARGO_PKG_VERSION");
        match &self.failed {
            None => {
                log::warn!("upgraded to {version}; serving again, after {pause:.1} ms");
                let word = format!("{DONE}to {version}; the guest waited for {pause:.1} ms");
                say(self.asker.as_ref(), &word);
            }
            Some(reason) => {
                log::error!("not upgraded: {reason}; serving again, after {pause:.1} ms");
                let word = format!(
                    "{FAILED}{reason}; the program from before goes on, the guest waited for \
                     {pause:.1} ms"
                );
                say(self.asker.as_ref(), &word);
            }
        }
    }
}

/// Whoever asks may have gone meanwhile.
fn say(mut asker: Option<&UnixStream>, word: &str) {
    if let Some(asker) = &mut asker {
        let _ = writeln!(asker, "{word}");
    }
}

impl Supervising {
    /// Does what somebody wishes. Comes back if it can't be done, perhaps with the serving process
    /// having left; with an ending, if that is the server's.
    pub(super) fn upgrade(&mut self, wish: UpgradeRequest) -> Result<Option<Ending>, ServerError> {
        if let Err(reason) = self.try_out(&wish) {
            log::error!("{FAILED}{reason}");
            say(wish.asker.as_ref(), &format!("{FAILED}{reason}"));
            return Ok(None);
        }
        let since = sandbox::now();
        let ending = self.empty_the_place().map_err(ServerError::Watch)?;
        if !matches!(ending, Ending::Status(LEFT) | Ending::Signal(_)) {
            return Ok(Some(ending));
        }
        if self.supervisor.is_to_stop().map_err(ServerError::Watch)? {
            return Ok(Some(Ending::Status(0)));
        }
        self.is_down(since);
        let mut attempt = UpgradeAttempt {
            since,
            old: exec::own_program().ok(),
            asker: wish.asker,
            failed: None,
        };
        let reason = match wish.program.take() {
            Ok(program) => self.become_program(&program, &attempt),
            Err(error) => chain(&error),
        };
        attempt.old = None;
        attempt.failed = Some(reason);
        self.attempt = Some(attempt);
        Ok(None)
    }

    /// Whether the program could take over, found out without anything being touched.
    fn try_out(&self, wish: &UpgradeRequest) -> Result<(), String> {
        if self.supervisor.sandbox_refs().is_none() {
            return Err("this server doesn't serve yet".to_owned());
        }
        let (arguments, environment) = (arguments(), environment(CHECK, &forms()));
        let call = exec::Call {
            file: wish.program.fd.as_fd(),
            arguments: &arguments,
            environment: &environment,
        };
        let complaints = wish.asker.as_ref().map(AsFd::as_fd);
        match exec::try_out(call, complaints, START_TIMEOUT) {
            Ok(Ending::Status(READY)) => Ok(()),
            Ok(Ending::Status(code)) => Err(format!(
                "the new program refuses, or is none of ringfsd (it ended with {code})"
            )),
            Ok(Ending::Signal(signal)) => Err(format!(
                "the new program can't even be tried (signal {signal})"
            )),
            Err(error) => Err(format!("the new program can't be tried: {error}")),
        }
    }

    /// Has the serving process give all requests back and leave.
    fn empty_the_place(&mut self) -> std::io::Result<Ending> {
        self.supervisor.drain()?;
        loop {
            match self.supervisor.next_within(DRAIN)? {
                Some(Event::Ended(ending)) => return Ok(ending),
                Some(_) => {}
                None => {
                    log::warn!("requests are not answered; they will be anew");
                    self.supervisor.kill()?;
                }
            }
        }
    }

    /// The new program doesn't serve: goes back to the old one. Comes back if there is none.
    pub(super) fn fall_back(&mut self, reason: &str) -> std::io::Result<()> {
        if self.supervisor.has_child() {
            self.supervisor.kill()?;
            while self.supervisor.has_child() {
                self.supervisor.next_within(START_TIMEOUT)?;
            }
        }
        let Some(attempt) = &mut self.attempt else {
            return Ok(());
        };
        let Some(old) = attempt.old.take() else {
            return Ok(());
        };
        attempt.failed = Some(reason.to_owned());
        log::error!("{reason}: going back to the program from before");
        let attempt = self.attempt.take();
        if let Some(attempt) = attempt {
            let error = match old.take() {
                Ok(program) => self.become_program(&program, &attempt),
                Err(error) => chain(&error),
            };
            log::error!("which can't be run: {error}");
        }
        Ok(())
    }

    /// Answers why it can't be.
    fn become_program(&self, program: &OwnedFd, attempt: &UpgradeAttempt) -> String {
        let Some(state) = self.resources.state.file() else {
            return "there is no table of what the session holds".to_owned();
        };
        let leaving = Leaving {
            supervisor: &self.supervisor,
            listener: &self.resources.listener,
            state,
            attempt,
        };
        let list = match leaving.write() {
            Ok(list) => list,
            Err(error) => return format!("writing down what there is: {error}"),
        };
        let number = list.as_raw_fd().to_string();
        let (arguments, environment) = (arguments(), environment(VARIABLE, &number));
        let error = exec::run_instead(exec::Call {
            file: program.as_fd(),
            arguments: &arguments,
            environment: &environment,
        });
        format!("the program can't be run: {error}")
    }
}

fn arguments() -> Vec<CString> {
    let text = |argument: OsString| CString::new(argument.into_vec()).unwrap_or_default();
    std::env::args_os().map(text).collect()
}

/// The environment, with one variable of ours.
fn environment(name: &str, value: &str) -> Vec<CString> {
    let others = std::env::vars_os().filter(|(name, _)| name != VARIABLE && name != CHECK);
    let ours = (OsString::from(name), OsString::from(value));
    others
        .chain([ours])
        .filter_map(|(name, value)| {
            let text = [&name.into_vec()[..], b"=", &value.into_vec()].concat();
            CString::new(text).ok()
        })
        .collect()
}

/// Why a server isn't upgraded.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody is there.
    #[error("there is no process {pid} to be seen")]
    NoProcess {
        /// Its number.
        pid: i32,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// Somebody who wouldn't understand.
    #[error(
        "process {0} can't be upgraded: it is no ringfsd that was started with --supervise (or it is \
         the process that serves: its parent is the one to ask). Start the server with --supervise \
         to be able to upgrade it"
    )]
    NotSupervised(i32),
    /// It can't be asked.
    #[error("asking process {pid}")]
    Ask {
        /// Its number.
        pid: i32,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// It says nothing.
    #[error("process {0} doesn't answer: is it in other namespaces than this program?")]
    NoAnswer(i32),
    /// It says no.
    #[error("{0}")]
    Refused(String),
}

/// Has the supervisor `pid` run this very program instead, and waits until it does or doesn't.
/// Answers what it says.
///
/// # Errors
///
/// It doesn't.
pub fn ask(pid: i32) -> Result<String, AskError> {
    let gone = |source| AskError::NoProcess { pid, source };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(gone)?;
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).map_err(gone)?;
    if !supervises(&status, &arguments) {
        return Err(AskError::NotSupervised(pid));
    }
    let failed = |source| AskError::Ask { pid, source };
    // What is hashed makes no difference: the hasher has a random key.
    let value = RandomState::new().build_hasher().finish();
    let value = usize::try_from(value).unwrap_or(usize::MAX);
    let listener = name(value).and_then(|name| UnixListener::bind_addr(&name));
    let listener = listener.map_err(failed)?;
    let program = exec::own_program().map_err(failed)?;
    exec::ask_for_upgrade(pid, value).map_err(failed)?;
    if !comes(&listener, START_TIMEOUT).map_err(failed)? {
        return Err(AskError::NoAnswer(pid));
    }
    let stream = loop {
        let (stream, _) = listener.accept().map_err(failed)?;
        // Anybody can connect.
        if exec::peer(&stream).map_err(failed)?.pid == pid {
            break stream;
        }
        if !comes(&listener, START_TIMEOUT).map_err(failed)? {
            return Err(AskError::NoAnswer(pid));
        }
    };
    let fds = [program.fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        &stream,
        &[IoSlice::new(&[1])],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .map_err(|error| failed(error.into()))?;
    // Each step there takes so long at most.
    stream
        .set_read_timeout(Some(4 * START_TIMEOUT))
        .map_err(failed)?;
    let mut said = Vec::new();
    for line in std::io::BufReader::new(stream)
        .lines()
        .map_while(Result::ok)
    {
        if line.starts_with(DONE) {
            return Ok(line);
        }
        let last = line.starts_with(FAILED);
        said.push(line);
        if last {
            return Err(AskError::Refused(said.join("; ")));
        }
    }
    Err(AskError::NoAnswer(pid))
}

/// Whether the process is a supervisor, by `/proc/PID/status` and `/proc/PID/cmdline`: others would end
/// by the signal. The process that serves handles `SIGTERM` too.
fn supervises(status: &str, arguments: &[u8]) -> bool {
    let mut lines = status.lines();
    let handled = lines.find_map(|line| line.strip_prefix("SigCgt:"));
    let handled = handled.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let handles = |signal: i32| handled.is_some_and(|mask| mask & 1 << (signal - 1) != 0);
    // An older spelling has no dashes, and others beside it.
    let option = b"supervise";
    let asked = arguments.windows(option.len()).any(|part| part == option);
    asked && handles(libc::SIGHUP) && !handles(libc::SIGTERM)
}

fn comes(listener: &UnixListener, patience: Duration) -> std::io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let seconds = i64::try_from(patience.as_secs()).unwrap_or(i64::MAX);
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    Ok(rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout)))? != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_supervisor_is_sent_a_signal() {
        let status = |handled: &str| format!("Name:\tringfsd\nSigCgt:\t{handled}\n");
        let arguments = b"ringfsd\0--supervise\0--fd=3\0";
        assert!(supervises(&status("0000000100000001"), arguments));
        assert!(!supervises(&status("0000000100004003"), arguments));
        assert!(!supervises(&status("0000000100000000"), arguments));
        assert!(!supervises(
            &status("0000000100000001"),
            b"ringfsd\0--fd=3\0"
        ));
        assert!(!supervises("", arguments));
    }

    #[test]
    fn the_environment_names_one_list() {
        let texts = environment(VARIABLE, "7");
        let ours = texts.iter().filter(|text| {
            let text = text.to_string_lossy();
            text.starts_with(VARIABLE) || text.starts_with(CHECK)
        });
        assert_eq!(ours.count(), 1);
    }
}
