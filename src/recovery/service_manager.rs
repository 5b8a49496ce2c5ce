//! The service manager that started the server: systemd, or another one with its protocols.
//!
//! The guardian sends it states as datagrams (`sd_notify(3)`): ready, stopping, and, while the
//! serving process lives, keep-alives for its watchdog. It also looks for a listening socket among
//! the descriptors that the manager has passed (`sd_listen_fds(3)`).
//!
//! The invariant: only the guardian sends. The serving process can't reach the manager, which would
//! act on what a compromised one sends, with the rights of the manager.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Pid;

use crate::vhost_user::{ListenError, Listener};

/// The first descriptor that a service manager passes (`SD_LISTEN_FDS_START`).
const FIRST_PASSED: RawFd = 3;

/// The serving process reports this many times in the watchdog's time.
const REPORTS: u32 = 6;

/// The connection to a service manager, if there is one.
#[derive(Debug, Default)]
pub(crate) struct ServiceManager {
    /// Where states are sent to.
    socket: Option<OsString>,
    /// The time after which the manager ends a server that has sent no keep-alive.
    watchdog: Option<Duration>,
    /// Whether the server has reported to the manager that it is ready.
    is_ready: bool,
    /// When the serving process has reported last, or was excused.
    alive: Option<Instant>,
}

/// What the watchdog finds when the serving process has not reported for half of its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Silence {
    /// Not so long yet, or there is no watchdog.
    Short,
    /// It waits for storage of the host, or was stopped; a restart would help in neither case.
    Excused,
    /// It hangs.
    Hang,
}

impl ServiceManager {
    /// The manager that the environment names.
    pub(crate) fn from_environment() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        let pid = number("WATCHDOG_PID");
        let is_for_us = pid.is_none_or(|pid| pid == u64::from(std::process::id()));
        let socket = variable("NOTIFY_SOCKET");
        let watchdog = number("WATCHDOG_USEC").filter(|time| *time > 0 && is_for_us);
        Self {
            watchdog: watchdog
                .filter(|_| socket.is_some())
                .map(Duration::from_micros),
            socket,
            is_ready: false,
            alive: None,
        }
    }

    /// Whether the serving process is to report that it serves.
    pub(crate) fn wants_reports(&self) -> bool {
        self.socket.is_some()
    }

    /// How often it is to repeat that.
    pub(crate) fn interval(&self) -> Option<Duration> {
        self.watchdog.map(|time| time / REPORTS)
    }

    /// Handles a report of the serving process.
    pub(crate) fn serves(&mut self) {
        self.alive = self.watchdog.map(|_| Instant::now());
        let state = match (self.is_ready, self.watchdog) {
            (false, _) => "READY=1\nWATCHDOG=1",
            (true, Some(_)) => "WATCHDOG=1",
            (true, None) => return,
        };
        self.is_ready = true;
        self.send(state);
    }

    /// Tells the manager that the server ends.
    pub(crate) fn stops(&self) {
        self.send("STOPPING=1");
    }

    /// How long to wait for a report before calling [`check`](Self::check).
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let patience = self.watchdog? / 2;
        let silent = self.alive?.elapsed();
        Some(
            patience
                .saturating_sub(silent)
                .max(Duration::from_millis(1)),
        )
    }

    /// Looks at a serving process that has not reported for [`timeout`](Self::timeout). Sends a
    /// keep-alive for one that is excused.
    pub(crate) fn check(&mut self, serving: Option<Pid>) -> Silence {
        let (Some(time), Some(alive)) = (self.watchdog, self.alive) else {
            return Silence::Short;
        };
        if alive.elapsed() < time / 2 {
            return Silence::Short;
        }
        self.alive = Some(Instant::now());
        let Some(state) = serving.and_then(waiting_thread) else {
            return Silence::Hang;
        };
        log::warn!(
            "the serving process has not reported for {:.1} s, and {state}",
            alive.elapsed().as_secs_f64()
        );
        self.send("WATCHDOG=1");
        Silence::Excused
    }

    /// Sends states. A socket is opened for each: between two, the serving process might replace an
    /// open one.
    fn send(&self, states: &str) {
        let Some(path) = &self.socket else { return };
        if let Err(error) = send_to(path.as_bytes(), states) {
            log::warn!(
                "telling the service manager {states:?} on {}: {error}",
                path.display()
            );
        }
    }
}

fn send_to(path: &[u8], states: &str) -> Result<(), Errno> {
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name)?,
        None => SocketAddrUnix::new(path)?,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::sendto(&socket, states.as_bytes(), SendFlags::NOSIGNAL, &address)?;
    Ok(())
}

/// What a thread of the process waits for, if it is in an uninterruptible wait or was stopped.
fn waiting_thread(process: Pid) -> Option<&'static str> {
    let threads = format!("/proc/{}/task", process.as_raw_nonzero());
    let threads = std::fs::read_dir(threads).ok()?;
    threads.filter_map(Result::ok).find_map(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
        // `PID (NAME) STATE …`, and the name may contain anything.
        match stat.rsplit_once(')')?.1.trim_start().chars().next()? {
            'D' => Some("waits for storage of the host"),
            'T' | 't' => Some("is stopped"),
            _ => None,
        }
    })
}

/// Takes over the listening socket at `path` among the descriptors that a service manager has passed
/// to this process. Returns `None` if it has passed none.
///
/// Must be called before any other descriptor is opened.
pub(crate) fn passed_listener(path: &Path) -> Result<Option<Listener>, ListenError> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    let count = number("LISTEN_FDS").unwrap_or(0);
    let count = RawFd::try_from(count).unwrap_or(RawFd::MAX - FIRST_PASSED);
    if count == 0 {
        return Ok(None);
    }
    let mut others = Vec::new();
    for fd in FIRST_PASSED..FIRST_PASSED + count {
        let listener = Listener::inherited(fd)?;
        if listener.is_at(path) {
            return Ok(Some(listener));
        }
        others.push(listener.name().to_owned());
    }
    Err(ListenError::NotPassed {
        path: path.to_owned(),
        others: others.join(", "),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn received(socket: &UnixDatagram) -> Vec<String> {
        socket.set_nonblocking(true).unwrap();
        let mut bytes = [0; 100];
        std::iter::from_fn(|| {
            let len = socket.recv(&mut bytes).ok()?;
            Some(String::from_utf8(bytes[..len].to_vec()).unwrap())
        })
        .collect()
    }

    fn manager(dir: &Path, watchdog: Option<Duration>) -> (ServiceManager, UnixDatagram) {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = ServiceManager {
            socket: Some(path.into()),
            watchdog,
            ..ServiceManager::default()
        };
        (manager, socket)
    }

    #[test]
    fn ready_is_sent_once_and_keep_alives_only_with_watchdog() {
        for watchdog in [None, Some(Duration::from_secs(1000))] {
            let dir = tempfile::tempdir().unwrap();
            let (mut manager, socket) = manager(dir.path(), watchdog);
            manager.serves();
            manager.serves();
            manager.stops();
            let mut expected = vec!["READY=1\nWATCHDOG=1", "WATCHDOG=1", "STOPPING=1"];
            expected.retain(|state| watchdog.is_some() || *state != "WATCHDOG=1");
            assert_eq!(received(&socket), expected);
        }
    }

    #[test]
    fn silence_is_a_hang_unless_a_thread_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let (mut manager, socket) = manager(dir.path(), Some(Duration::ZERO));
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        // While it is being loaded it may wait for the disk.
        let mut input = child.stdin.take().unwrap();
        input.write_all(&[0]).unwrap();
        let mut output = child.stdout.take().unwrap();
        output.read_exact(&mut [0]).unwrap();
        manager.serves();
        assert_eq!(manager.check(Some(pid)), Silence::Hang);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let options = rustix::process::WaitOptions::UNTRACED;
        rustix::process::waitpid(Some(pid), options).unwrap();
        assert_eq!(manager.check(Some(pid)), Silence::Excused);
        assert_eq!(received(&socket), ["READY=1\nWATCHDOG=1", "WATCHDOG=1"]);
        manager.watchdog = Some(Duration::from_secs(1000));
        assert_eq!(manager.check(Some(pid)), Silence::Short);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
