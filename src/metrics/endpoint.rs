//! Serves the counters over HTTP, on a thread of its own.
//!
//! The thread waits for all connections at once and blocks for none. Replies are made from a snapshot,
//! so however slowly a reader takes one, no counter and no other reader waits for it. The invariant:
//! connections, the bytes of each, and the time that a request and its reply may take are limited.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, accept_with, recv, sendmsg,
};

use super::Registry;
use super::http::{Decision, MAX_HEAD, Reply, Status, decide, head};
use super::text::{MEDIA_TYPE, text_of};

/// The most connections. If there are more, the one that has been idle for the longest time is closed.
const MAX_CONNECTIONS: usize = 32;
/// How long a connection may be idle between two requests.
const IDLE: Duration = Duration::from_secs(180);
/// How long a request may take to arrive, and its reply to be taken.
const EXCHANGE: Duration = Duration::from_secs(5);
/// For how long a text is used again, so that no number of readers costs more than a processor's
/// twentieth or so.
const FRESH: Duration = Duration::from_millis(5);
/// How long to wait after a connection couldn't be accepted.
const PAUSE: Duration = Duration::from_millis(200);

/// Starts to serve `metrics` to those that connect to `listener`, for as long as the process lives.
///
/// # Errors
///
/// The host has no thread, or `listener` is no socket.
pub(crate) fn serve(listener: OwnedFd, metrics: Arc<Registry>) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&listener, true)?;
    let endpoint = Endpoint {
        listener,
        metrics,
        connections: Vec::new(),
        text: None,
        accepts_from: Instant::now(),
    };
    let thread = thread::Builder::new().name("ringfsd-metrics".to_owned());
    thread.spawn(move || endpoint.run())?;
    Ok(())
}

struct Endpoint {
    listener: OwnedFd,
    metrics: Arc<Registry>,
    connections: Vec<Connection>,
    text: Option<(Instant, Arc<str>)>,
    accepts_from: Instant,
}

/// A connection of a reader.
struct Connection {
    socket: OwnedFd,
    /// What has come of a request.
    input: Vec<u8>,
    output: Option<Output>,
    /// More than one request has come at once: the next one is served after those of others.
    has_more: bool,
    /// When it is closed, unless it makes progress.
    deadline: Instant,
    /// When it was idle last.
    idle_since: Instant,
}

/// A reply that is being sent.
struct Output {
    head: String,
    body: Arc<str>,
    sent: usize,
    closes: bool,
}

impl Endpoint {
    fn run(mut self) {
        loop {
            self.wait();
            let now = Instant::now();
            if now >= self.accepts_from {
                self.accept(now);
            }
            let mut connections = std::mem::take(&mut self.connections);
            connections.retain_mut(|connection| {
                let open = connection.go_on(now, |reply| self.body(reply, now));
                open && now < connection.deadline
            });
            self.connections = connections;
        }
    }

    /// Waits until a connection has something to do, or its time is up.
    fn wait(&self) {
        let now = Instant::now();
        let paused = now < self.accepts_from;
        let accepts = PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN);
        let mut fds: Vec<_> = (!paused).then_some(accepts).into_iter().collect();
        fds.extend(self.connections.iter().map(|connection| {
            let flags = match connection.output {
                Some(_) => PollFlags::OUT,
                None => PollFlags::IN,
            };
            PollFd::from_borrowed_fd(connection.socket.as_fd(), flags)
        }));
        let deadlines = self
            .connections
            .iter()
            .map(|connection| connection.deadline);
        let more = self
            .connections
            .iter()
            .any(|connection| connection.has_more);
        let end = deadlines
            .chain(paused.then_some(self.accepts_from))
            .chain(more.then_some(now))
            .min();
        let left = end.map(|end| end.saturating_duration_since(now));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                log::error!("waiting for readers of the metrics: {error}");
                thread::sleep(PAUSE);
            }
        }
    }

    /// Accepts the connections that are waiting.
    fn accept(&mut self, now: Instant) {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.listener, flags) {
                Ok(socket) => self.add(socket, now),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    log::debug!("accepting a reader of the metrics: {error}");
                    self.accepts_from = now + PAUSE;
                    return;
                }
            }
        }
    }

    fn add(&mut self, socket: OwnedFd, now: Instant) {
        if self.connections.len() >= MAX_CONNECTIONS {
            let connections = self.connections.iter().enumerate();
            let oldest = connections.min_by_key(|(_, connection)| connection.idle_since);
            if let Some((oldest, _)) = oldest {
                self.connections.swap_remove(oldest);
            }
        }
        self.connections.push(Connection {
            socket,
            input: Vec::new(),
            output: None,
            has_more: false,
            deadline: now + EXCHANGE,
            idle_since: now,
        });
    }

    /// The body of a reply.
    fn body(&mut self, reply: &Reply, now: Instant) -> Arc<str> {
        if reply.status != Status::Ok {
            return format!("{}\n", reply.status.line()).into();
        }
        let text = self.text.take();
        let fresh = text.filter(|(made, _)| now.saturating_duration_since(*made) < FRESH);
        let text = match fresh {
            Some((made, text)) => (made, text),
            None => (now, text_of(self.metrics.snapshot()).into()),
        };
        Arc::clone(&self.text.insert(text).1)
    }
}

impl Connection {
    /// Receives and sends what is possible now. Returns whether the connection stays open.
    fn go_on(&mut self, now: Instant, mut body: impl FnMut(&Reply) -> Arc<str>) -> bool {
        self.has_more = false;
        loop {
            if let Some(output) = &mut self.output {
                match output.send(&self.socket) {
                    Sent::Some => return true,
                    Sent::All if output.closes => return false,
                    Sent::All => {
                        self.output = None;
                        (self.deadline, self.idle_since) = (now + IDLE, now);
                        self.has_more = !self.input.is_empty();
                        if self.has_more {
                            return true;
                        }
                    }
                    Sent::Failed => return false,
                }
            }
            match decide(&self.input) {
                Decision::Reply(reply) => {
                    let body = body(&reply);
                    let (status, len) = (reply.status, body.len());
                    self.input.drain(..reply.consumed.min(self.input.len()));
                    self.deadline = now + EXCHANGE;
                    self.output = Some(Output {
                        head: head(&reply, media_type(status), len),
                        body: if reply.head_only { "".into() } else { body },
                        sent: 0,
                        closes: reply.closes,
                    });
                }
                Decision::More => {
                    let mut bytes = [0; 1024];
                    let room = bytes.len().min(MAX_HEAD - self.input.len());
                    match recv(&self.socket, &mut bytes[..room], RecvFlags::DONTWAIT) {
                        Ok((0, _)) => return false,
                        Ok((count, _)) => {
                            if self.input.is_empty() {
                                self.deadline = now + EXCHANGE;
                            }
                            self.input.extend_from_slice(&bytes[..count]);
                        }
                        Err(Errno::AGAIN) => return true,
                        Err(Errno::INTR) => {}
                        Err(_closed) => return false,
                    }
                }
            }
        }
    }
}

/// What came of sending.
enum Sent {
    All,
    Some,
    Failed,
}

impl Output {
    fn send(&mut self, socket: &OwnedFd) -> Sent {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let head = self.head.as_bytes().get(self.sent..).unwrap_or_default();
            let body = self.sent.saturating_sub(self.head.len());
            let body = self.body.as_bytes().get(body..).unwrap_or_default();
            if head.is_empty() && body.is_empty() {
                return Sent::All;
            }
            // In one call: TCP would hold a body back until the head is acknowledged.
            let parts = [IoSlice::new(head), IoSlice::new(body)];
            match sendmsg(socket, &parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Sent::Some,
                Err(Errno::INTR) => {}
                Err(_closed) => return Sent::Failed,
            }
        }
    }
}

fn media_type(status: Status) -> &'static str {
    match status {
        Status::Ok => MEDIA_TYPE,
        _ => "text/plain; charset=utf-8",
    }
}
