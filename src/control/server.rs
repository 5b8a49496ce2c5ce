//! The thread that serves the control socket, and reports when a signal asks for it.
//!
//! It owns the listening socket and the connections. Commands run on it one after the other, one for
//! each client in turn. The invariant: it sleeps unless a client or a signal wants something.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::Value;

use super::connection::{Connection, MAX_CLIENTS, is_of_connection};
use super::protocol::{Call, Code, Failure};
use crate::sys::supervision::{Peer, peer};

/// The stack of the thread: that of a worker would be mostly unused.
const STACK: usize = 512 << 10;

/// How long no connection is accepted after the host had no descriptor for one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Carries out what clients ask for.
pub(crate) trait Handler: Send {
    /// Carries out a command.
    ///
    /// # Errors
    ///
    /// Why it can't be done.
    fn call(&mut self, call: Call) -> Result<Value, Failure>;

    /// Logs a summary.
    fn report(&mut self);

    /// When [`expire`](Self::expire) is to be called, if it is.
    fn deadline(&self) -> Option<Instant>;

    /// Ends what a client has asked for only for a while.
    fn expire(&mut self);
}

/// What the thread waits for.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// Where clients connect.
    pub(crate) listener: Option<OwnedFd>,
    /// Readable when a signal has asked for a report.
    pub(crate) reports: Option<UnixStream>,
    /// This process is in a user namespace that doesn't contain all users.
    pub(crate) lacks_users: bool,
}

/// Starts the thread, which runs until the process ends. Clients of other users than this process's
/// and root are refused.
///
/// # Errors
///
/// The host has no thread for it.
pub(crate) fn start(sockets: Sockets, handler: Box<dyn Handler>) -> io::Result<()> {
    let listener = sockets.listener.map(UnixListener::from);
    if let Some(listener) = &listener {
        listener.set_nonblocking(true)?;
    }
    if let Some(reports) = &sockets.reports {
        reports.set_nonblocking(true)?;
    }
    let server = Server {
        listener,
        reports: sockets.reports,
        lacks_users: sockets.lacks_users,
        connections: Vec::new(),
        accept_again: None,
        handler,
    };
    std::thread::Builder::new()
        .name("ringfsd-control".to_owned())
        .stack_size(STACK)
        .spawn(move || server.run())
        .map(drop)
}

/// Serves clients that are connected already, on this thread, until the last has gone.
///
/// # Errors
///
/// The host has no descriptor or memory for it.
pub(crate) fn serve_clients(clients: Vec<UnixStream>, handler: Box<dyn Handler>) -> io::Result<()> {
    let connections: io::Result<_> = clients.into_iter().map(Connection::new).collect();
    let mut server = Server {
        listener: None,
        reports: None,
        lacks_users: false,
        connections: connections?,
        accept_again: None,
        handler,
    };
    Ok(server.serve_until(|server| server.connections.is_empty())?)
}

struct Server {
    listener: Option<UnixListener>,
    reports: Option<UnixStream>,
    lacks_users: bool,
    connections: Vec<Connection>,
    /// When connections are accepted again, if not now.
    accept_again: Option<Instant>,
    handler: Box<dyn Handler>,
}

impl Server {
    fn run(mut self) {
        if let Err(error) = self.serve_until(|_| false) {
            log::error!("the control socket is not served any more: {error}");
        }
    }

    fn serve_until(&mut self, ends: impl Fn(&Self) -> bool) -> Result<(), Errno> {
        while !ends(self) {
            let events = self.wait()?;
            if events.reports {
                self.report();
            }
            if self
                .handler
                .deadline()
                .is_some_and(|time| time <= Instant::now())
            {
                self.handler.expire();
            }
            self.progress(&events.connections);
            if events.listener {
                self.accept();
            }
            self.serve();
        }
        Ok(())
    }

    /// Waits for the next event.
    fn wait(&mut self) -> Result<Events, Errno> {
        let now = Instant::now();
        self.accept_again = self.accept_again.filter(|time| *time > now);
        let mut fds = Vec::with_capacity(self.connections.len() + 2);
        let reports = self
            .reports
            .as_ref()
            .map(|fd| push(&mut fds, fd, PollFlags::IN));
        let listener = self
            .listener
            .as_ref()
            .filter(|_| self.accept_again.is_none());
        let listener = listener.map(|fd| push(&mut fds, fd, PollFlags::IN));
        let first = fds.len();
        for connection in &self.connections {
            push(&mut fds, connection, connection.interest());
        }
        let deadlines = self.connections.iter().filter_map(Connection::deadline);
        let others = self.accept_again.into_iter().chain(self.handler.deadline());
        let mut until = deadlines.chain(others).min();
        if self.connections.iter().any(Connection::has_request) {
            until = Some(now);
        }
        let timeout = until.map(|until| timespec(until.saturating_duration_since(now)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let happened = |at: Option<usize>| {
            let fd = at.and_then(|at| fds.get(at));
            fd.is_some_and(|fd| !fd.revents().is_empty())
        };
        Ok(Events {
            reports: happened(reports),
            listener: happened(listener),
            connections: fds.iter().skip(first).map(PollFd::revents).collect(),
        })
    }

    fn report(&mut self) {
        let mut bytes = [0; 64];
        // Several signals in a row ask for one report.
        match self
            .reports
            .as_ref()
            .map(|mut reports| reports.read(&mut bytes))
        {
            Some(Ok(0)) => self.reports = None,
            Some(Ok(_)) => {
                let handler = &mut self.handler;
                if catch_unwind(AssertUnwindSafe(|| handler.report())).is_err() {
                    log::error!("reporting panicked");
                }
            }
            Some(Err(_)) | None => {}
        }
    }

    /// Receives and sends; `events` are those of the connections, in their order.
    fn progress(&mut self, events: &[PollFlags]) {
        let now = Instant::now();
        let mut events = events.iter().copied();
        self.connections.retain_mut(|connection| {
            let events = events.next().unwrap_or(PollFlags::empty());
            connection.progress(events, now).is_ok()
        });
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if is_of_connection(&error) => return,
            Err(error) => {
                log::warn!("accepting a client of the control socket: {error}");
                self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                return;
            }
        };
        let refusal = refusal(peer(&stream), self.lacks_users);
        let Ok(mut connection) = Connection::new(stream) else {
            return;
        };
        if let Some(failure) = refusal {
            connection.refuse(failure);
            if connection.send().is_err() {
                return;
            }
        }
        if self.connections.len() >= MAX_CLIENTS {
            let times = self.connections.iter().map(Connection::last_active);
            let oldest = times.enumerate().min_by_key(|(_, time)| *time);
            if let Some((oldest, _)) = oldest {
                self.connections.swap_remove(oldest);
            }
        }
        self.connections.push(connection);
    }

    /// Carries out one request of each client that has one.
    fn serve(&mut self) {
        let handler = &mut self.handler;
        self.connections.retain_mut(|connection| {
            let Some(request) = connection.take_request() else {
                return true;
            };
            let outcome = request.call.and_then(|call| {
                let command = call.command;
                log::debug!("control: {command}");
                catch_unwind(AssertUnwindSafe(|| handler.call(call))).unwrap_or_else(|_panic| {
                    let message = format!("the server has failed to carry out {command}");
                    Err(Failure::new(Code::Failed, message).hint("its log has the reason"))
                })
            });
            connection.answer(request.id, outcome);
            connection.send().is_ok()
        });
    }
}

/// What has happened.
struct Events {
    reports: bool,
    listener: bool,
    connections: Vec<PollFlags>,
}

fn push<'a>(fds: &mut Vec<PollFd<'a>>, fd: &'a impl AsFd, flags: PollFlags) -> usize {
    fds.push(PollFd::new(fd, flags));
    fds.len() - 1
}

fn timespec(time: Duration) -> Timespec {
    // Rounded up: polling again a moment too early would repeat until the time has come.
    let time = time + Duration::from_millis(1);
    Timespec {
        tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// The id by which a user namespace shows all users that it doesn't contain, root among them.
const UNKNOWN_USER: u32 = 65534;

/// Why a client is refused, if it is. Where the namespace `lacks_users`, nothing but the mode of the
/// socket tells root from others.
fn refusal(client: Result<Peer, Errno>, lacks_users: bool) -> Option<Failure> {
    let own = rustix::process::geteuid().as_raw();
    match client {
        Ok(Peer { uid, .. }) if uid == own || uid == 0 => None,
        Ok(Peer { uid, .. }) if uid == UNKNOWN_USER && lacks_users => None,
        Ok(Peer { uid, .. }) => {
            log::warn!("a client of user {uid} was refused at the control socket");
            Some(Failure::new(
                Code::Denied,
                "only the server's user and root may control it",
            ))
        }
        Err(errno) => Some(Failure::new(
            Code::Denied,
            format!("the client's user can't be told: {errno}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_users_are_refused() {
        let client = |uid| Ok(Peer { pid: 1, uid });
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(refusal(client(own), false), None);
        assert_eq!(refusal(client(0), false), None);
        for uid in [own + 1, UNKNOWN_USER] {
            let refused = refusal(client(uid), false).unwrap();
            assert_eq!(refused.code, Code::Denied);
        }
        assert_eq!(refusal(client(UNKNOWN_USER), true), None);
        assert!(refusal(client(own + 1), true).is_some());
        assert!(refusal(Err(Errno::BADF), true).is_some());
    }
}
