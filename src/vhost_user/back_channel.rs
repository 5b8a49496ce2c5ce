//! The back channel: the socket on which this back end sends requests to the VMM.
//!
//! The front end opens it by SET_BACKEND_REQ_FD. One request is outstanding at a time: the next one
//! is sent only when the answer to the one before has arrived, even if no thread waits for that any
//! more. Requests wait on the threads that send them, and the session's thread waits for none of
//! them longer than [`GRACE`]: the VMM may be waiting for the session's reply before it answers. The
//! invariant: an answer is never taken for that to another request, also after a kill (`counters`).

mod counters;
mod message;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Feature;

use self::counters::{ANSWER, Found, RequestCounters};
use self::message::{Form, Message};
use super::message::Header;
use super::session_snapshot::BackChannelRecord;
use crate::device::{BackChannel, BackChannelError, BackendRequest};

/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request may still take while the session's thread stops a queue.
const GRACE: Duration = Duration::from_millis(250);

/// The back channel of a session. It exists as long as the session, whether the front end has opened
/// it or not.
#[derive(Debug)]
pub(super) struct VmmChannel {
    state: Mutex<State>,
    /// Notified when `state` changes.
    changed: Condvar,
    /// Readable while a request that waits has to look at `state`.
    wake: OwnedFd,
    timeout: Duration,
    /// A front end that hasn't accepted SHMEM is asked by FS_MAP and FS_UNMAP.
    fs_map: bool,
}

#[derive(Debug, Default)]
struct State {
    link: Option<Arc<Link>>,
    /// The protocol features that the front end has accepted.
    protocol: u64,
    /// A request is being sent, or waits for its answer.
    busy: bool,
    /// How many [`WaitLimit`]s there are.
    wait_limits: usize,
    /// When requests have to end because of them.
    waits_end: Option<Instant>,
}

/// The socket of a back channel, and what is known of its requests.
#[derive(Debug)]
pub(super) struct Link {
    socket: UnixStream,
    counters: RequestCounters,
}

/// Limits how long requests wait, while it exists.
#[derive(Debug)]
pub(super) struct WaitLimit<'a>(&'a VmmChannel);

/// The one request that is outstanding.
struct Turn<'a> {
    channel: &'a VmmChannel,
    link: Arc<Link>,
    deadline: Instant,
}

impl Link {
    /// A new channel.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            counters: RequestCounters::new()?,
            socket: stream_socket(socket)?,
        })
    }

    /// The channel of a process that has ended.
    pub(super) fn resume(socket: OwnedFd, counters: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            counters: RequestCounters::resume(counters)?,
            socket: stream_socket(socket)?,
        })
    }

    /// Its descriptors.
    pub(super) fn record(&self) -> Option<BackChannelRecord> {
        Some(BackChannelRecord {
            socket: self.socket.as_raw_fd(),
            counters: self.counters.file()?.as_raw_fd(),
        })
    }
}

/// Returns the socket if it is of the kind that a back channel has to be.
fn stream_socket(fd: OwnedFd) -> io::Result<UnixStream> {
    let domain = sockopt::socket_domain(&fd)?;
    if domain == AddressFamily::UNIX && sockopt::socket_type(&fd)? == SocketType::STREAM {
        Ok(fd.into())
    } else {
        Err(io::Error::other("it is not a Unix stream socket"))
    }
}

impl VmmChannel {
    /// A channel that isn't open. With `fs_map` a front end that hasn't accepted SHMEM is asked to
    /// map by FS_MAP and FS_UNMAP.
    pub(super) fn new(fs_map: bool) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            wake: eventfd(0, flags)?,
            timeout: TIMEOUT,
            fs_map,
        })
    }

    /// Replaces the channel to the VMM, or closes it.
    pub(super) fn connect(&self, link: Option<Arc<Link>>) {
        let _limit = self.limit_waits();
        let mut state = self.lock();
        while state.busy {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.link = link;
    }

    #[cfg(test)]
    fn link(&self) -> Option<Arc<Link>> {
        self.lock().link.clone()
    }

    /// Sets the protocol features that the front end has accepted.
    pub(super) fn set_protocol_features(&self, accepted: u64) {
        self.lock().protocol = accepted;
    }

    /// Limits how long requests wait from now on, until the returned value is dropped: for the
    /// session's thread, which is going to wait for those who have sent them.
    pub(super) fn limit_waits(&self) -> WaitLimit<'_> {
        let mut state = self.lock();
        state.wait_limits += 1;
        if state.waits_end.is_none() {
            state.waits_end = Some(Instant::now() + GRACE);
            if state.busy {
                // Fails only if it is readable anyway.
                let _readable = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
                self.changed.notify_all();
            }
        }
        WaitLimit(self)
    }

    /// How this front end is asked to map.
    fn form(&self) -> Form {
        let has_shared_memory = self.lock().protocol & Feature::SHMEM.bits() != 0;
        if self.fs_map && !has_shared_memory {
            Form::FsMap
        } else {
            Form::SharedMemory
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no other request is outstanding.
    fn turn(&self, request: &Message) -> Result<Turn<'_>, BackChannelError> {
        let deadline = Instant::now() + self.timeout;
        let mut state = self.lock();
        loop {
            let link = state.link.as_ref().ok_or(BackChannelError::NotConnected)?;
            request.check_negotiated(state.protocol)?;
            if !state.busy {
                let link = Arc::clone(link);
                state.busy = true;
                return Ok(Turn {
                    channel: self,
                    link,
                    deadline,
                });
            }
            let left = state.left(deadline)?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl State {
    /// How long a request may still wait.
    fn left(&self, deadline: Instant) -> Result<Duration, BackChannelError> {
        let now = Instant::now();
        let late = |end: Instant| end <= now;
        if self.waits_end.is_some_and(late) {
            return Err(BackChannelError::Interrupted);
        }
        if late(deadline) {
            return Err(BackChannelError::TimedOut);
        }
        let end = self.waits_end.map_or(deadline, |end| end.min(deadline));
        Ok(end.saturating_duration_since(now))
    }
}

impl BackChannel for VmmChannel {
    fn request(
        &self,
        request: BackendRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), BackChannelError> {
        let message = Message::new(request, fd, self.form())?;
        self.turn(&message)?.run(&message)
    }
}

impl Drop for WaitLimit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.wait_limits = state.wait_limits.saturating_sub(1);
        if state.wait_limits == 0 {
            state.waits_end = None;
            // Fails only if it isn't readable.
            let _cleared = rustix::io::read(&self.0.wake, &mut [0; 8]);
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.channel.lock().busy = false;
        self.channel.changed.notify_all();
    }
}

impl Turn<'_> {
    /// Sends the request and waits for its answer.
    fn run(&self, message: &Message<'_>) -> Result<(), BackChannelError> {
        let counters = &self.link.counters;
        if counters.is_broken() {
            return Err(BackChannelError::Closed);
        }
        let result = self.try_run(message);
        let unusable = matches!(
            result,
            Err(BackChannelError::Malformed(_) | BackChannelError::Closed)
        );
        if unusable {
            counters.break_off();
        }
        result
    }

    fn try_run(&self, message: &Message<'_>) -> Result<(), BackChannelError> {
        let Link { socket, counters } = &*self.link;
        let mut bytes = [0; ANSWER];
        // The answer to a request that is not waited for any more.
        match counters.due() {
            0 => {}
            1 => self.receive(&mut bytes)?,
            _ => return Err(BackChannelError::Malformed("a wrong count")),
        }
        match counters.receive(socket, &mut bytes).map_err(failed)? {
            Found::Nothing if counters.partial() == 0 => {}
            Found::End => return Err(BackChannelError::Closed),
            _ => return Err(BackChannelError::Malformed("something unasked")),
        }
        loop {
            match counters.send(socket, &message.bytes, message.fd.as_slice()) {
                Ok(()) => break,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        self.receive(&mut bytes)?;
        let wrong = BackChannelError::Malformed("a message of another kind");
        let answer = Header::read(&bytes).ok_or(wrong)?;
        if answer.request != message.number {
            return Err(BackChannelError::Malformed("the answer to another request"));
        }
        match bytes.last_chunk().map(|value| u64::from_ne_bytes(*value)) {
            Some(0) => Ok(()),
            value => Err(BackChannelError::Refused(value.unwrap_or(u64::MAX))),
        }
    }

    /// Waits for an answer.
    fn receive(&self, bytes: &mut [u8; ANSWER]) -> Result<(), BackChannelError> {
        let Link { socket, counters } = &*self.link;
        // A process that was killed has received the beginning.
        let is_whole = counters.partial() == 0;
        loop {
            match counters.receive(socket, bytes).map_err(failed)? {
                Found::Answer => break,
                Found::Nothing => self.wait(PollFlags::IN)?,
                Found::End => return Err(BackChannelError::Closed),
                Found::Descriptors => {
                    return Err(BackChannelError::Malformed("file descriptors"));
                }
            }
        }
        let valid = Header::read(bytes).is_some_and(|header| {
            header.is_reply() && header.has_version() && header.message_len() == Some(ANSWER)
        });
        if valid || !is_whole {
            Ok(())
        } else {
            Err(BackChannelError::Malformed("a message of another kind"))
        }
    }

    /// Waits until the socket is ready.
    fn wait(&self, flags: PollFlags) -> Result<(), BackChannelError> {
        let state = self.channel.lock();
        let left = state.left(self.deadline)?;
        let limited = state.wait_limits != 0;
        drop(state);
        // `wake` has told all that it has to tell if there is a limit.
        let wake_flags = if limited {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        let mut fds = [
            PollFd::new(&self.link.socket, flags),
            PollFd::new(&self.channel.wake, wake_flags),
        ];
        let timeout = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }
}

fn failed(error: Errno) -> BackChannelError {
    match error {
        Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => BackChannelError::Closed,
        error => BackChannelError::Io(error.into()),
    }
}
