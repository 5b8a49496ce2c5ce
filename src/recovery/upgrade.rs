//! The request to replace the running program by another one, and both ends of its socket.
//!
//! A client asks by `SIGHUP`. If the signal carries a number, the client listens on a socket that
//! is named by it; there it hands over the program and reads the outcome. The new program is tried
//! before anything is changed ([`check_for_upgrade`]). The switch itself is
//! `supervision/program_switch.rs`.
//!
//! The invariant: a program that is only tried changes nothing, and both ends of the socket check
//! which process the other one is.

use std::ffi::{CString, OsString};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::exec::{self, Queued};
use super::exec_handover::{FORMAT, VARIABLE};
use super::upgrade_attempt::{NOT_UPGRADED, START_TIMEOUT, UPGRADED};
use crate::sandbox::{Ending, FdIdentity};
use crate::state::Table;
use crate::sys::rights;
use crate::vhost_user;

/// The environment variable that lists the formats which a program that is tried has to read.
const CHECK: &str = "RINGFSD_UPGRADE_CHECK";

/// The exit status of a program that reads all of them.
const READY: u8 = 97;

/// How long either end of the socket may take to send something.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(2);

/// The formats that this program writes for the next one.
fn formats() -> String {
    let (session, state) = (vhost_user::VERSION, Table::VERSION);
    format!("hand-over={FORMAT} session={session} state={state}")
}

/// The formats that this program reads.
fn known_formats() -> String {
    let older = vhost_user::OLDEST_VERSION..vhost_user::VERSION;
    let older = older.map(|version| format!(" session={version}"));
    formats() + &older.collect::<String>()
}

/// Whether this program can take over from the running one with the same arguments: those it has
/// say `supervise`, and with them it `can_serve`, or not for that reason. `None` if the program
/// isn't being tried for an upgrade; else the status to exit with.
pub(crate) fn check_for_upgrade(
    supervise: bool,
    can_serve: impl FnOnce() -> Result<(), String>,
) -> Option<Result<u8, String>> {
    let wanted = std::env::var(CHECK).ok()?;
    let known = known_formats();
    let unknown: Vec<_> = wanted
        .split(' ')
        .filter(|format| !known.split(' ').any(|known| known == *format))
        .collect();
    if !unknown.is_empty() {
        return Some(Err(format!(
            "this program can't read {} of the running program: it reads {known}",
            unknown.join(" ")
        )));
    }
    if !supervise {
        return Some(Err(
            "without --supervise a program can't take over".to_owned()
        ));
    }
    Some(can_serve().map(|()| READY))
}

/// A request to replace this program by another one.
#[derive(Debug)]
pub(super) struct UpgradeRequest {
    pub(super) program: FdIdentity,
    /// The connection that the outcome is reported on.
    pub(super) client: Option<UnixStream>,
}

impl UpgradeRequest {
    /// `queued` is what came with the signal; without it, the program at `path` is the new one.
    pub(super) fn of(queued: Option<Queued>, path: &PathBuf) -> std::io::Result<Self> {
        let Some(Queued { value, sender }) = queued else {
            let file = std::fs::File::open(path)?;
            return Ok(Self {
                program: FdIdentity::new(file.into())?,
                client: None,
            });
        };
        let client = UnixStream::connect_addr(&socket_name(value)?)?;
        // The name is free again once the client has ended, and any process may take it.
        if exec::peer(&client)? != sender {
            return Err(std::io::Error::other(
                "another process listens on the socket of the one that sent the signal",
            ));
        }
        client.set_read_timeout(Some(SOCKET_TIMEOUT))?;
        client.set_write_timeout(Some(SOCKET_TIMEOUT))?;
        let file = receive_fd(&client)?;
        Ok(Self {
            program: FdIdentity::new(file)?,
            client: Some(client),
        })
    }

    /// Runs the new program once, to find out whether it can take over. Changes nothing.
    pub(super) fn try_program(&self) -> Result<(), String> {
        let (arguments, environment) = (arguments(), environment(CHECK, &formats()));
        let call = exec::Call {
            file: self.program.fd.as_fd(),
            arguments: &arguments,
            environment: &environment,
        };
        let stderr = self.client.as_ref().map(AsFd::as_fd);
        match exec::try_out(call, stderr, START_TIMEOUT) {
            Ok(Ending::Status(READY)) => Ok(()),
            Ok(Ending::Status(code)) => Err(format!(
                "the new program refuses to take over, or isn't ringfsd (it exited with {code})"
            )),
            Ok(Ending::Signal(signal)) => Err(format!(
                "the new program was killed by signal {signal} as it was tried"
            )),
            Err(error) => Err(format!("the new program can't be tried: {error}")),
        }
    }
}

/// The name of the client's socket. Every process can see it (`/proc/net/unix`) and connect to it.
fn socket_name(value: usize) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("ringfsd-upgrade-{value:016x}"))
}

fn receive_fd(client: &UnixStream) -> std::io::Result<OwnedFd> {
    // With a timeout on the socket, a signal ends the call even if its handler has SA_RESTART.
    let received = rights::receive(client, &mut [0], RecvFlags::empty())?;
    let fd = received.fds.into_iter().next();
    fd.ok_or_else(|| std::io::Error::other("the client has sent no program"))
}

/// The arguments of this program, for the next one.
pub(super) fn arguments() -> Vec<CString> {
    let text = |argument: OsString| CString::new(argument.into_vec()).unwrap_or_default();
    std::env::args_os().map(text).collect()
}

/// The environment of this program, with one variable added.
pub(super) fn environment(name: &str, value: &str) -> Vec<CString> {
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
    /// There is no such process.
    #[error("reading /proc/{pid}: is there a process {pid}?")]
    NoProcess {
        /// Its number.
        pid: i32,
        /// The error of reading `/proc`.
        #[source]
        source: std::io::Error,
    },
    /// The process doesn't handle the signal.
    #[error(
        "process {0} can't be upgraded: it isn't a ringfsd that was started with --supervise, or it \
         is the serving process (name its parent instead)"
    )]
    NotSupervised(i32),
    /// The process can't be asked.
    #[error("asking process {pid} for an upgrade")]
    Ask {
        /// Its number.
        pid: i32,
        /// The error of the step that failed.
        #[source]
        source: std::io::Error,
    },
    /// The process doesn't connect, or disconnects too early.
    #[error("process {0} doesn't reply: is it in other namespaces than this program?")]
    NoAnswer(i32),
    /// The process reports failure.
    #[error("{0}")]
    Refused(String),
}

/// Asks the supervisor `pid` to run this very program instead of its own, and waits for the
/// outcome. Returns the line that reports it.
///
/// # Errors
///
/// The server isn't upgraded.
pub fn ask(pid: i32) -> Result<String, AskError> {
    let unreadable = |source| AskError::NoProcess { pid, source };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(unreadable)?;
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).map_err(unreadable)?;
    if !supervises(&status, &arguments) {
        return Err(AskError::NotSupervised(pid));
    }
    let failed = |source| AskError::Ask { pid, source };
    // The hasher's key is random, so the hash of nothing is a random number.
    let value = RandomState::new().build_hasher().finish();
    let value = usize::try_from(value).unwrap_or(usize::MAX);
    let listener = socket_name(value).and_then(|name| UnixListener::bind_addr(&name));
    let listener = listener.map_err(failed)?;
    let program = exec::own_program().map_err(failed)?;
    exec::ask_for_upgrade(pid, value).map_err(failed)?;
    if !has_connection(&listener, START_TIMEOUT).map_err(failed)? {
        return Err(AskError::NoAnswer(pid));
    }
    let stream = loop {
        let (stream, _) = listener.accept().map_err(failed)?;
        // Every process can connect.
        if exec::peer(&stream).map_err(failed)?.pid == pid {
            break stream;
        }
        if !has_connection(&listener, START_TIMEOUT).map_err(failed)? {
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
    // The supervisor takes up to four steps, each of which has this timeout.
    stream
        .set_read_timeout(Some(4 * START_TIMEOUT))
        .map_err(failed)?;
    let mut lines = Vec::new();
    for line in std::io::BufReader::new(stream)
        .lines()
        .map_while(Result::ok)
    {
        if line.starts_with(UPGRADED) {
            return Ok(line);
        }
        let last = line.starts_with(NOT_UPGRADED);
        lines.push(line);
        if last {
            return Err(AskError::Refused(lines.join("; ")));
        }
    }
    Err(AskError::NoAnswer(pid))
}

/// Whether a process is a supervisor, by its `/proc/PID/status` and `/proc/PID/cmdline`: the signal
/// would end other processes. The serving process handles `SIGTERM` too.
fn supervises(status: &str, arguments: &[u8]) -> bool {
    let mut lines = status.lines();
    let handled = lines.find_map(|line| line.strip_prefix("SigCgt:"));
    let handled = handled.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let handles = |signal: i32| handled.is_some_and(|mask| mask & 1 << (signal - 1) != 0);
    // The option can be part of `-o LIST`, without dashes.
    let option = b"supervise";
    let has_option = arguments.windows(option.len()).any(|part| part == option);
    has_option && handles(libc::SIGHUP) && !handles(libc::SIGTERM)
}

/// Whether a connection arrives within `timeout`.
fn has_connection(listener: &UnixListener, timeout: Duration) -> std::io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
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
    fn only_supervisor_is_recognized() {
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
    fn environment_has_one_handover_variable() {
        let texts = environment(VARIABLE, "7");
        let ours = texts.iter().filter(|text| {
            let text = text.to_string_lossy();
            text.starts_with(VARIABLE) || text.starts_with(CHECK)
        });
        assert_eq!(ours.count(), 1);
    }
}
