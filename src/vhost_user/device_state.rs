//! DEVICE_STATE: what the guest's session holds goes out, or comes in, over a descriptor.
//!
//! See the vhost-user specification, "Migrating back-end state". The front end hands over one end
//! of a pipe and then asks how it went (CHECK_DEVICE_STATE). The transfer runs in a thread of its own,
//! so that messages are answered meanwhile, and it ends by itself: after so many bytes, so much time,
//! when the server is to stop, or when the session ends. Saving gives nothing up. The invariant: what has come in is handed on
//! only when all of it has come.

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

use crate::state::stream;

/// For how long nothing may move.
const SILENCE: Duration = Duration::from_secs(60);

/// The same once the front end has asked how it went: it has closed its end before.
const SILENCE_ASKED: Duration = Duration::from_secs(2);

/// How long a transfer may take.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(600);

/// Bytes that are moved at once.
const PIECE: usize = 256 * 1024;

/// Bytes that a pipe may hold, without privilege and unless the host says less.
const PIPE: usize = 1 << 20;

/// Why something can't be saved or loaded, as whoever does so says it.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A device whose state can't be had.
#[derive(Debug)]
pub(super) struct Stateless;

impl DeviceState for Stateless {
    fn save(&self) -> Result<Vec<u8>, Cause> {
        Err("the device's state can't be saved".into())
    }

    fn saved(&self) {}

    fn load(&self, _: &[u8]) -> Result<(), Cause> {
        Err("the device's state can't be loaded".into())
    }
}

/// What saves and loads. The queues are stopped while it does.
pub trait DeviceState: fmt::Debug + Send + Sync {
    /// All that a guest's session holds, as bytes. The session goes on if its queues do.
    ///
    /// # Errors
    ///
    /// It can't be had.
    fn save(&self) -> Result<Vec<u8>, Cause>;

    /// The bytes are with the front end, all of them: whoever loads them may have what one alone
    /// can have.
    fn saved(&self);

    /// Goes on from the bytes of another server. What was there before is forgotten.
    ///
    /// # Errors
    ///
    /// They can't be gone on from. There is no session, then.
    fn load(&self, bytes: &[u8]) -> Result<(), Cause>;
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Save,
    Load,
}

/// Why a transfer has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    #[error("a transfer of the device's state was asked for while queues run")]
    Running,
    #[error("a transfer of the device's state was asked for while another is under way")]
    UnderWay,
    #[error("the front end asked how a transfer went that it had not begun")]
    None,
    #[error("starting the thread that transfers the device's state")]
    Thread(#[source] io::Error),
    #[error("saving the device's state")]
    Save(#[source] Cause),
    #[error("loading the device's state")]
    Load(#[source] Cause),
    #[error("the front end's descriptor for the device's state")]
    Descriptor(#[source] Errno),
    #[error("the device's state stood still for {} seconds", .0.as_secs())]
    Silent(Duration),
    #[error("the device's state was not through after {} seconds", TRANSFER_TIMEOUT.as_secs())]
    Long,
    #[error("the device's state has more than {} bytes", stream::MOST)]
    Large,
    #[error(
        "the server is to stop, or the front end is gone, while the device's state is transferred"
    )]
    Stop,
    #[error("the thread that transferred the device's state has panicked")]
    Panicked,
}

/// The transfer of a session, if there is one.
#[derive(Debug)]
pub(super) struct Transfer {
    /// Readable when the server is to stop.
    stop: io::Result<OwnedFd>,
    running: Option<Running>,
}

/// A transfer that was begun.
#[derive(Debug)]
struct Running {
    thread: JoinHandle<Result<(), TransferError>>,
    wakeup: Arc<Wakeup>,
}

/// What the thread of a transfer is told while it waits.
#[derive(Debug)]
struct Wakeup {
    /// An eventfd.
    event: OwnedFd,
    /// The front end is gone; else it asks how it went. Set before the event, whose reading
    /// orders it.
    gone: AtomicBool,
}

impl Wakeup {
    fn new() -> rustix::io::Result<Self> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Self {
            event: rustix::event::eventfd(0, flags)?,
            gone: AtomicBool::new(false),
        })
    }

    fn tell(&self, gone: bool) {
        self.gone.store(gone, Ordering::Relaxed);
        // It can't be full, as it is told twice at most.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }
}

impl Transfer {
    pub(super) fn new(stop: BorrowedFd<'_>) -> Self {
        Self {
            stop: stop.try_clone_to_owned(),
            running: None,
        }
    }

    /// Begins one over `fd`.
    pub(super) fn begin(
        &mut self,
        direction: Direction,
        fd: File,
        state: Arc<dyn DeviceState>,
    ) -> Result<(), TransferError> {
        match &self.running {
            Some(running) if !running.thread.is_finished() => return Err(TransferError::UnderWay),
            // One that nobody has asked about.
            Some(_) | None => drop(self.end()),
        }
        let stop = match &self.stop {
            Ok(stop) => stop.try_clone(),
            Err(error) => Err(error.kind().into()),
        };
        let stop = stop.map_err(TransferError::Thread)?;
        let wakeup = Wakeup::new().map_err(|error| TransferError::Thread(error.into()))?;
        let wakeup = Arc::new(wakeup);
        let nudged = Arc::clone(&wakeup);
        let run = move || {
            let mut way = PipeWait::new(&fd, &stop, &nudged)?;
            match direction {
                Direction::Save => {
                    let bytes = state.save().map_err(TransferError::Save)?;
                    way.send(&bytes)?;
                    state.saved();
                    log::info!("the device's state, {} bytes, is saved", bytes.len());
                }
                Direction::Load => {
                    let bytes = way.receive()?;
                    state.load(&bytes).map_err(TransferError::Load)?;
                    log::info!("the device's state, {} bytes, is loaded", bytes.len());
                }
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("state".to_owned());
        let thread = thread.spawn(run).map_err(TransferError::Thread)?;
        self.running = Some(Running { thread, wakeup });
        Ok(())
    }

    /// Waits for the end of the one that was begun, and answers how it went.
    pub(super) fn end(&mut self) -> Result<(), TransferError> {
        let Running { thread, wakeup } = self.running.take().ok_or(TransferError::None)?;
        wakeup.tell(false);
        thread.join().unwrap_or(Err(TransferError::Panicked))
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(Running { thread, wakeup }) = self.running.take() {
            wakeup.tell(true);
            drop(thread.join());
        }
    }
}

/// What bytes go over.
struct PipeWait<'a> {
    fd: BorrowedFd<'a>,
    stop: BorrowedFd<'a>,
    nudged: &'a Wakeup,
    silence: Duration,
    begun: Instant,
}

impl<'a> PipeWait<'a> {
    fn new(fd: &'a File, stop: &'a OwnedFd, nudged: &'a Wakeup) -> Result<Self, TransferError> {
        let fd = fd.as_fd();
        let flags = rustix::fs::fcntl_getfl(fd).map_err(TransferError::Descriptor)?;
        rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(TransferError::Descriptor)?;
        // As large as it may be: each time it is full or empty the guest waits for two processes to
        // take turns. What is no pipe, or may not, stays as it is.
        let _ = rustix::pipe::fcntl_setpipe_size(fd, PIPE);
        Ok(Self {
            fd,
            stop: stop.as_fd(),
            nudged,
            silence: SILENCE,
            begun: Instant::now(),
        })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), TransferError> {
        let mut left = bytes;
        while !left.is_empty() {
            let piece = &left[..left.len().min(PIECE)];
            let fd = self.fd;
            let sent = self.act(PollFlags::OUT, || rustix::io::write(fd, piece))?;
            left = left.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// All that comes until the other side closes.
    fn receive(&mut self) -> Result<Vec<u8>, TransferError> {
        let mut bytes = Vec::new();
        let mut piece = vec![0; PIECE];
        loop {
            let fd = self.fd;
            let came = self.act(PollFlags::IN, || rustix::io::read(fd, &mut piece[..]))?;
            let came = piece.get(..came).unwrap_or_default();
            if came.is_empty() {
                return Ok(bytes);
            }
            if bytes.len() + came.len() > stream::MOST {
                return Err(TransferError::Large);
            }
            bytes.extend_from_slice(came);
        }
    }

    /// Does what can't wait, once it need not.
    fn act(
        &mut self,
        event: PollFlags,
        mut act: impl FnMut() -> rustix::io::Result<usize>,
    ) -> Result<usize, TransferError> {
        loop {
            self.wait(event)?;
            match act() {
                Err(Errno::AGAIN | Errno::INTR) => {}
                done => return done.map_err(TransferError::Descriptor),
            }
        }
    }

    fn wait(&mut self, event: PollFlags) -> Result<(), TransferError> {
        loop {
            let left = TRANSFER_TIMEOUT.saturating_sub(self.begun.elapsed());
            if left.is_zero() {
                return Err(TransferError::Long);
            }
            let mut fds = [
                PollFd::from_borrowed_fd(self.fd, event),
                PollFd::from_borrowed_fd(self.stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.nudged.event.as_fd(), PollFlags::IN),
            ];
            let wait = left.min(self.silence);
            let timeout = Timespec {
                tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            };
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Err(TransferError::Silent(wait)),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(TransferError::Descriptor(error)),
            }
            let [own, stop, nudged] = fds.map(|fd| fd.revents());
            if !nudged.is_empty() {
                let _ = rustix::io::read(&self.nudged.event, &mut [0; 8][..]);
                // It waits for an answer.
                self.silence = SILENCE_ASKED;
            }
            if !stop.is_empty() || self.nudged.gone.load(Ordering::Relaxed) {
                return Err(TransferError::Stop);
            }
            if !own.is_empty() {
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

    /// Has a state, and remembers what it was given.
    #[derive(Debug, Default)]
    struct Memory {
        has: Vec<u8>,
        got: Mutex<Option<Vec<u8>>>,
        saved: Mutex<bool>,
    }

    impl DeviceState for Memory {
        fn save(&self) -> Result<Vec<u8>, Cause> {
            if self.has.is_empty() {
                return Err("there is nothing".into());
            }
            Ok(self.has.clone())
        }

        fn saved(&self) {
            *self.saved.lock().unwrap() = true;
        }

        fn load(&self, bytes: &[u8]) -> Result<(), Cause> {
            *self.got.lock().unwrap() = Some(bytes.to_vec());
            if bytes == b"bad" {
                Err("it is bad".into())
            } else {
                Ok(())
            }
        }
    }

    fn memory(has: &[u8]) -> Arc<Memory> {
        let has = has.to_vec();
        Arc::new(Memory {
            has,
            ..Memory::default()
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
    fn a_state_larger_than_a_pipe_goes_out_as_a_whole() {
        let memory = memory(&vec![7; 300_000]);
        let (mut transfer, _stopper) = transfer();
        let (mut read, write) = pipe();
        transfer
            .begin(Direction::Save, write, memory.clone())
            .unwrap();
        let mut bytes = Vec::new();
        read.read_to_end(&mut bytes).unwrap();
        transfer.end().unwrap();
        assert_eq!(bytes, memory.has);
        assert!(*memory.saved.lock().unwrap());
    }

    #[test]
    fn a_state_that_is_not_taken_is_not_saved() {
        let memory = memory(&vec![7; 300_000]);
        let (mut transfer, _stopper) = transfer();
        let (read, write) = pipe();
        // Not later: all of it may be in the pipe by then.
        drop(read);
        transfer
            .begin(Direction::Save, write, memory.clone())
            .unwrap();
        assert!(matches!(
            transfer.end(),
            Err(TransferError::Descriptor(Errno::PIPE))
        ));
        assert!(!*memory.saved.lock().unwrap());
    }

    #[test]
    fn a_state_is_loaded_when_all_of_it_has_come() {
        let memory = memory(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, mut write) = pipe();
        transfer
            .begin(Direction::Load, read, memory.clone())
            .unwrap();
        write.write_all(b"one ").unwrap();
        assert_eq!(*memory.got.lock().unwrap(), None);
        write.write_all(b"two").unwrap();
        drop(write);
        transfer.end().unwrap();
        assert_eq!(memory.got.lock().unwrap().as_deref(), Some(&b"one two"[..]));
    }

    #[test]
    fn what_went_wrong_is_told_once_and_the_next_one_may_go_well() {
        let memory = memory(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, mut write) = pipe();
        write.write_all(b"bad").unwrap();
        drop(write);
        transfer
            .begin(Direction::Load, read, memory.clone())
            .unwrap();
        assert!(matches!(transfer.end(), Err(TransferError::Load(_))));
        assert!(matches!(transfer.end(), Err(TransferError::None)));
        let (read, mut write) = pipe();
        write.write_all(b"good").unwrap();
        drop(write);
        transfer.begin(Direction::Load, read, memory).unwrap();
        transfer.end().unwrap();
    }

    #[test]
    fn stop_ends_a_transfer_that_waits() {
        let memory = memory(b"");
        let (mut transfer, stopper) = transfer();
        let (read, _write) = pipe();
        transfer.begin(Direction::Load, read, memory).unwrap();
        rustix::io::write(&stopper, &[0]).unwrap();
        assert!(matches!(transfer.end(), Err(TransferError::Stop)));
    }

    #[test]
    fn the_end_of_a_session_ends_a_transfer_that_waits() {
        let memory = memory(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, _write) = pipe();
        let begun = Instant::now();
        transfer.begin(Direction::Load, read, memory).unwrap();
        drop(transfer);
        assert!(begun.elapsed() < SILENCE / 2);
    }

    #[test]
    fn who_asks_before_the_end_is_not_kept_waiting() {
        let memory = memory(b"");
        let (mut transfer, _stopper) = transfer();
        let (read, _write) = pipe();
        transfer.begin(Direction::Load, read, memory).unwrap();
        assert!(matches!(
            transfer.end(),
            Err(TransferError::Silent(SILENCE_ASKED))
        ));
    }

    #[test]
    fn two_at_once_are_refused() {
        let memory = memory(b"");
        let (mut transfer, _stopper) = transfer();
        let ((read, write), (other, _)) = (pipe(), pipe());
        transfer
            .begin(Direction::Load, read, memory.clone())
            .unwrap();
        assert!(matches!(
            transfer.begin(Direction::Load, other, memory),
            Err(TransferError::UnderWay)
        ));
        drop(write);
        transfer.end().unwrap();
    }
}
