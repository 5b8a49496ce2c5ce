//! DEVICE_STATE: saves or loads the state of the guest's session over a descriptor.
//!
//! See the vhost-user specification, "Migrating back-end state". The front end hands over one end
//! of a pipe and later asks for the result (CHECK_DEVICE_STATE). A [`Transfer`] runs in a thread of
//! its own, so that the session keeps handling messages. It is bounded in size and in time, and it
//! ends when the server is stopped or the session ends. Saving releases nothing that the session
//! holds. The invariant: received state is loaded only after all of it has arrived.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::stream;

/// How long a transfer may make no progress.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// The same once the front end has asked for the result: it closes its end before it asks.
const IDLE_TIMEOUT_CHECKED: Duration = Duration::from_secs(2);

/// How long a whole transfer may take.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(600);

/// Bytes that one read or write moves at most.
const CHUNK: usize = 256 * 1024;

/// Requested capacity of the pipe in bytes: the most that an unprivileged process can set by
/// default.
const PIPE_SIZE: usize = 1 << 20;

/// Why a [`DeviceState`] can't be saved or loaded.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The state of a device that supports neither saving nor loading.
#[derive(Debug)]
pub(crate) struct NoDeviceState;

impl DeviceState for NoDeviceState {
    fn save(&self) -> Result<Vec<u8>, Cause> {
        Err("the device's state can't be saved".into())
    }

    fn saved(&self) {}

    fn load(&self, _: &[u8]) -> Result<(), Cause> {
        Err("the device's state can't be loaded".into())
    }
}

/// Saves and loads the state of a device. The queues are stopped meanwhile.
pub trait DeviceState: fmt::Debug + Send + Sync {
    /// Serializes everything that the guest's session holds. The session stays usable: it continues
    /// if its queues are started again.
    ///
    /// # Errors
    ///
    /// Fails if the state can't be saved.
    fn save(&self) -> Result<Vec<u8>, Cause>;

    /// Reports that the front end has received all bytes. The session then has to release what only
    /// one server can own, so that the server that loads the state can acquire it.
    fn saved(&self);

    /// Replaces the session by the one that another server has saved as `bytes`.
    ///
    /// # Errors
    ///
    /// Fails if the state can't be loaded. The session is empty then.
    fn load(&self, bytes: &[u8]) -> Result<(), Cause>;
}

/// Whether a transfer saves or loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Save,
    Load,
}

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    #[error("the front end requested a transfer of the device state while queues run")]
    QueuesRunning,
    #[error("the front end requested a transfer of the device state during another one")]
    InProgress,
    #[error("the front end asked for the result of a transfer that it had not started")]
    NotStarted,
    #[error("starting the thread that transfers the device state")]
    Thread(#[source] io::Error),
    #[error("saving the device state")]
    Save(#[source] Cause),
    #[error("loading the device state")]
    Load(#[source] Cause),
    #[error("using the front end's descriptor for the device state")]
    Descriptor(#[source] Errno),
    #[error("the transfer of the device state made no progress for {} seconds", .0.as_secs())]
    Stalled(Duration),
    #[error("the transfer of the device state took more than {} seconds", TRANSFER_TIMEOUT.as_secs())]
    TimedOut,
    #[error("the device state has more than {} bytes", stream::MAX_LEN)]
    TooLarge,
    #[error(
        "the server was stopped, or the front end disconnected, during the transfer of the device \
         state"
    )]
    Cancelled,
    #[error("the thread that transferred the device state panicked")]
    Panicked,
}

/// The transfer of a session's state, if one was started.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// Readable once the server is asked to stop.
    stop: io::Result<OwnedFd>,
    running: Option<RunningTransfer>,
}

/// A transfer that was started and whose result nobody has taken yet.
#[derive(Debug)]
struct RunningTransfer {
    thread: JoinHandle<Result<(), TransferError>>,
    wakeup: Arc<Wakeup>,
}

/// Wakes the thread of a transfer while it waits for the pipe.
#[derive(Debug)]
struct Wakeup {
    /// An eventfd.
    event: OwnedFd,
    /// Whether the session has ended; otherwise the front end asks for the result. Set before the
    /// eventfd is written, whose reading orders it.
    session_ended: AtomicBool,
}

impl Wakeup {
    fn new() -> rustix::io::Result<Self> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Self {
            event: rustix::event::eventfd(0, flags)?,
            session_ended: AtomicBool::new(false),
        })
    }

    fn notify(&self, session_ended: bool) {
        self.session_ended.store(session_ended, Ordering::Relaxed);
        // The counter can't overflow: `notify` is called twice at most.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }
}

impl Transfer {
    pub(crate) fn new(stop: BorrowedFd<'_>) -> Self {
        Self {
            stop: stop.try_clone_to_owned(),
            running: None,
        }
    }

    /// Starts a transfer over `fd`.
    pub(crate) fn start(
        &mut self,
        direction: Direction,
        fd: File,
        state: Arc<dyn DeviceState>,
    ) -> Result<(), TransferError> {
        match &self.running {
            Some(running) if !running.thread.is_finished() => {
                return Err(TransferError::InProgress);
            }
            // Nobody has asked for the result of the previous one.
            Some(_) | None => drop(self.finish()),
        }
        let stop = match &self.stop {
            Ok(stop) => stop.try_clone(),
            Err(error) => Err(error.kind().into()),
        };
        let stop = stop.map_err(TransferError::Thread)?;
        let wakeup = Wakeup::new().map_err(|error| TransferError::Thread(error.into()))?;
        let wakeup = Arc::new(wakeup);
        let thread_wakeup = Arc::clone(&wakeup);
        let run = move || {
            let mut pipe = PipeTransfer::new(&fd, &stop, &thread_wakeup)?;
            match direction {
                Direction::Save => {
                    let bytes = state.save().map_err(TransferError::Save)?;
                    pipe.send(&bytes)?;
                    state.saved();
                    log::info!("saved the device state: {} bytes", bytes.len());
                }
                Direction::Load => {
                    let bytes = pipe.receive()?;
                    state.load(&bytes).map_err(TransferError::Load)?;
                    log::info!("loaded the device state: {} bytes", bytes.len());
                }
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("state".to_owned());
        let thread = thread.spawn(run).map_err(TransferError::Thread)?;
        self.running = Some(RunningTransfer { thread, wakeup });
        Ok(())
    }

    /// Waits for the end of the transfer that was started, and returns its result.
    pub(crate) fn finish(&mut self) -> Result<(), TransferError> {
        let running = self.running.take();
        let RunningTransfer { thread, wakeup } = running.ok_or(TransferError::NotStarted)?;
        wakeup.notify(false);
        thread.join().unwrap_or(Err(TransferError::Panicked))
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(RunningTransfer { thread, wakeup }) = self.running.take() {
            wakeup.notify(true);
            drop(thread.join());
        }
    }
}

/// The front end's descriptor, and what may end the wait for it.
struct PipeTransfer<'a> {
    fd: BorrowedFd<'a>,
    stop: BorrowedFd<'a>,
    wakeup: &'a Wakeup,
    idle_timeout: Duration,
    started: Instant,
}

impl<'a> PipeTransfer<'a> {
    fn new(fd: &'a File, stop: &'a OwnedFd, wakeup: &'a Wakeup) -> Result<Self, TransferError> {
        let fd = fd.as_fd();
        let flags = rustix::fs::fcntl_getfl(fd).map_err(TransferError::Descriptor)?;
        rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(TransferError::Descriptor)?;
        // Each time the pipe is full or empty the guest waits for a switch between two processes,
        // so make it as large as allowed. Where that fails, or `fd` is no pipe, it stays as it is.
        let _ = rustix::pipe::fcntl_setpipe_size(fd, PIPE_SIZE);
        Ok(Self {
            fd,
            stop: stop.as_fd(),
            wakeup,
            idle_timeout: IDLE_TIMEOUT,
            started: Instant::now(),
        })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), TransferError> {
        let mut left = bytes;
        while !left.is_empty() {
            let chunk = &left[..left.len().min(CHUNK)];
            let fd = self.fd;
            let sent = self.retry(PollFlags::OUT, || rustix::io::write(fd, chunk))?;
            left = left.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads until the other side closes its end.
    fn receive(&mut self) -> Result<Vec<u8>, TransferError> {
        let mut bytes = Vec::new();
        let mut chunk = vec![0; CHUNK];
        loop {
            let fd = self.fd;
            let count = self.retry(PollFlags::IN, || rustix::io::read(fd, &mut chunk[..]))?;
            let received = chunk.get(..count).unwrap_or_default();
            if received.is_empty() {
                return Ok(bytes);
            }
            if bytes.len() + received.len() > stream::MAX_LEN {
                return Err(TransferError::TooLarge);
            }
            bytes.extend_from_slice(received);
        }
    }

    /// Waits for `event` and runs `operation`, until that succeeds or fails for good.
    fn retry(
        &mut self,
        event: PollFlags,
        mut operation: impl FnMut() -> rustix::io::Result<usize>,
    ) -> Result<usize, TransferError> {
        loop {
            self.wait(event)?;
            match operation() {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result.map_err(TransferError::Descriptor),
            }
        }
    }

    fn wait(&mut self, event: PollFlags) -> Result<(), TransferError> {
        loop {
            let left = TRANSFER_TIMEOUT.saturating_sub(self.started.elapsed());
            if left.is_zero() {
                return Err(TransferError::TimedOut);
            }
            let mut fds = [
                PollFd::from_borrowed_fd(self.fd, event),
                PollFd::from_borrowed_fd(self.stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.wakeup.event.as_fd(), PollFlags::IN),
            ];
            let wait = left.min(self.idle_timeout);
            let timeout = Timespec {
                tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            };
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Err(TransferError::Stalled(wait)),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(TransferError::Descriptor(error)),
            }
            let [pipe, stop, wakeup] = fds.map(|fd| fd.revents());
            if !wakeup.is_empty() {
                let _ = rustix::io::read(&self.wakeup.event, &mut [0; 8][..]);
                // The front end is waiting for the result.
                self.idle_timeout = IDLE_TIMEOUT_CHECKED;
            }
            if !stop.is_empty() || self.wakeup.session_ended.load(Ordering::Relaxed) {
                return Err(TransferError::Cancelled);
            }
            if !pipe.is_empty() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::Mutex;

    use super::*;

    /// Saves a given state, and records what it loads.
    #[derive(Debug, Default)]
    struct FakeState {
        content: Vec<u8>,
        loaded: Mutex<Option<Vec<u8>>>,
        saved: Mutex<bool>,
    }

    impl DeviceState for FakeState {
        fn save(&self) -> Result<Vec<u8>, Cause> {
            if self.content.is_empty() {
                return Err("no state".into());
            }
            Ok(self.content.clone())
        }

        fn saved(&self) {
            *self.saved.lock().unwrap() = true;
        }

        fn load(&self, bytes: &[u8]) -> Result<(), Cause> {
            *self.loaded.lock().unwrap() = Some(bytes.to_vec());
            if bytes == b"bad" {
                Err("bad state".into())
            } else {
                Ok(())
            }
        }
    }

    fn state(content: &[u8]) -> Arc<FakeState> {
        let content = content.to_vec();
        Arc::new(FakeState {
            content,
            ..FakeState::default()
        })
    }

    fn transfer() -> (Transfer, OwnedFd) {
        let (stop, stopper) = rustix::pipe::pipe().unwrap();
        (Transfer::new(stop.as_fd()), stopper)
    }

    fn pipe() -> (File, File) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        (read.into(), write.into())
    }

    #[test]
    fn save_of_state_larger_than_pipe_is_complete() {
        let state = state(&vec![7; 300_000]);
        let (mut transfer, _stopper) = transfer();
        let (mut read, write) = pipe();
        transfer
            .start(Direction::Save, write, state.clone())
            .unwrap();
        let mut bytes = Vec::new();
        read.read_to_end(&mut bytes).unwrap();
        transfer.finish().unwrap();
        assert_eq!(bytes, state.content);
        assert!(*state.saved.lock().unwrap());
    }

    #[test]
    fn save_to_closed_pipe_fails_without_saved_callback() {
        let state = state(&vec![7; 300_000]);
        let (mut transfer, _stopper) = transfer();
        let (read, write) = pipe();
        // Closed before the start: later, the whole state might already be in the pipe.
        drop(read);
        transfer
            .start(Direction::Save, write, state.clone())
            .unwrap();
        assert!(matches!(
            transfer.finish(),
            Err(TransferError::Descriptor(Errno::PIPE))
        ));
        assert!(!*state.saved.lock().unwrap());
    }

    #[test]
    fn load_happens_only_after_all_bytes_arrived() {
        let state = state(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, mut write) = pipe();
        transfer
            .start(Direction::Load, read, state.clone())
            .unwrap();
        write.write_all(b"one ").unwrap();
        assert_eq!(*state.loaded.lock().unwrap(), None);
        write.write_all(b"two").unwrap();
        drop(write);
        transfer.finish().unwrap();
        assert_eq!(
            state.loaded.lock().unwrap().as_deref(),
            Some(&b"one two"[..])
        );
    }

    #[test]
    fn failed_load_is_reported_once_and_next_load_succeeds() {
        let state = state(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, mut write) = pipe();
        write.write_all(b"bad").unwrap();
        drop(write);
        transfer
            .start(Direction::Load, read, state.clone())
            .unwrap();
        assert!(matches!(transfer.finish(), Err(TransferError::Load(_))));
        assert!(matches!(transfer.finish(), Err(TransferError::NotStarted)));
        let (read, mut write) = pipe();
        write.write_all(b"good").unwrap();
        drop(write);
        transfer.start(Direction::Load, read, state).unwrap();
        transfer.finish().unwrap();
    }

    #[test]
    fn stop_cancels_waiting_transfer() {
        let state = state(b"");
        let (mut transfer, stopper) = transfer();
        let (read, _write) = pipe();
        transfer.start(Direction::Load, read, state).unwrap();
        rustix::io::write(&stopper, &[0]).unwrap();
        assert!(matches!(transfer.finish(), Err(TransferError::Cancelled)));
    }

    #[test]
    fn end_of_session_cancels_waiting_transfer() {
        let state = state(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, _write) = pipe();
        let started = Instant::now();
        transfer.start(Direction::Load, read, state).unwrap();
        drop(transfer);
        assert!(started.elapsed() < IDLE_TIMEOUT / 2);
    }

    #[test]
    fn check_of_stalled_transfer_fails_soon() {
        let state = state(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, _write) = pipe();
        transfer.start(Direction::Load, read, state).unwrap();
        assert!(matches!(
            transfer.finish(),
            Err(TransferError::Stalled(IDLE_TIMEOUT_CHECKED))
        ));
    }

    #[test]
    fn second_concurrent_transfer_is_refused() {
        let state = state(b"");
        let (mut transfer, _stopper) = transfer();
        let ((read, write), (other, _)) = (pipe(), pipe());
        transfer
            .start(Direction::Load, read, state.clone())
            .unwrap();
        assert!(matches!(
            transfer.start(Direction::Load, other, state),
            Err(TransferError::InProgress)
        ));
        drop(write);
        transfer.finish().unwrap();
    }
}
