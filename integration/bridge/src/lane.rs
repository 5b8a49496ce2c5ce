//! A lane: one descriptor of `/dev/fuse`, one track, one thread.
//!
//! It passes requests on and replies back and never waits for one of them: it sleeps only when
//! there is neither a request nor a reply, so a request that blocks in the server delays no other.
//! Only headers are copied: `/dev/fuse` is read into guest memory and written from there. The
//! invariant: a slot is free, or in exactly one chain in flight.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use vmm::fuse::wire::{OutHeader, opcode};
use vmm::memory::MemoryError;
use vmm::ring::{RingError, Used};
use vmm::{Buf, Event, Memory};

use crate::counters::Counters;
use crate::device::Device;
use crate::error::LaneError;
use crate::init;
use crate::record::{Recorded, Recorder};
use crate::request::{IN_HEADER, OUT_HEADER, Request};
use crate::slot::{MOST_BUFFERS, SLOTS};
use crate::track::{CLOSING, Track};
use crate::urgent::Urgent;

/// State that all lanes of a mount share, and successive mounts.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: Memory,
    pub(crate) urgent: Urgent,
    pub(crate) counters: Counters,
    /// Records requests, if that is wanted.
    pub(crate) recorder: Option<Recorder>,
    /// Signalled by a lane when it has the reply to INIT, and when it ends.
    pub(crate) news: Event,
    /// Lanes that have ended. Incremented before the end is signalled, while their threads still run.
    pub(crate) ended: AtomicUsize,
    /// Tells lanes to end, whatever is in flight.
    pub(crate) stop: Event,
}

impl Shared {
    /// Resets the count for the next mount, after the lanes of the previous one have ended.
    pub(crate) fn begin_anew(&self) -> io::Result<()> {
        // Their threads have been joined.
        self.ended.store(0, Ordering::Relaxed);
        self.news.take()?;
        self.stop.take()?;
        Ok(())
    }
}

/// How a lane ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The file system was unmounted, and everything in flight has been returned.
    Unmounted,
    /// The lane was told to stop.
    Stopped,
}

/// One thread's part of a mount.
#[derive(Debug)]
pub(crate) struct Lane {
    device: Device,
    track: Track,
    shared: Arc<Shared>,
    epoll: OwnedFd,
    /// The request in each slot that is in use.
    under_way: Vec<Option<Request>>,
    /// What is recorded of them, if that is wanted.
    recorded: Vec<Option<Recorded>>,
    free: Vec<usize>,
    /// Whether the device is in the epoll set: only while a slot is free.
    listens: bool,
    readable: Vec<Buf>,
    writable: Vec<Buf>,
}

/// The result of reading `/dev/fuse`.
enum Taken {
    Request,
    Nothing,
    Unmounted,
}

impl Lane {
    /// Makes a lane of this device on this track.
    pub(crate) fn new(
        device: Device,
        track: Track,
        shared: Arc<Shared>,
    ) -> Result<Self, LaneError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(wait_error)?;
        // Edge-triggered and never read: the ring has the information.
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        add(&epoll, track.queue.call_event(), edge)?;
        add(&epoll, &shared.stop, epoll::EventFlags::IN)?;
        let mut lane = Self {
            device,
            track,
            shared,
            epoll,
            under_way: vec![None; usize::from(SLOTS)],
            recorded: vec![None; usize::from(SLOTS)],
            free: (0..usize::from(SLOTS)).rev().collect(),
            listens: false,
            readable: Vec::with_capacity(MOST_BUFFERS),
            writable: Vec::with_capacity(MOST_BUFFERS),
        };
        lane.listen(true)?;
        Ok(lane)
    }

    /// Works until the file system is unmounted or the lane is stopped.
    ///
    /// Closes the device; with its last descriptor the kernel fails what is left. Returns the
    /// track.
    pub(crate) fn run(mut self) -> (Result<End, LaneError>, Track) {
        let end = self.work();
        (end, self.track)
    }

    fn work(&mut self) -> Result<End, LaneError> {
        loop {
            let mut idle = !self.return_replies()?;
            while !self.free.is_empty() {
                match self.take_request()? {
                    Taken::Request => idle = false,
                    Taken::Nothing => break,
                    Taken::Unmounted => return self.drain(),
                }
            }
            if idle {
                self.track.queue.ask_for_call(1);
                if self.track.queue.ready()? == 0 && self.sleep()? {
                    return Ok(End::Stopped);
                }
            }
        }
    }

    /// Passes one request on.
    fn take_request(&mut self) -> Result<Taken, LaneError> {
        let Some(&token) = self.free.last() else {
            return Ok(Taken::Nothing);
        };
        let Shared { memory, urgent, .. } = &*self.shared;
        let slot = &mut self.track.slots[token];
        match memory.read_from(self.device.as_fd(), slot.request.incoming()) {
            Ok(_) => {}
            Err(MemoryError::Transfer(error)) => {
                return match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => Ok(Taken::Nothing),
                    // ECONNABORTED if ABORT_ERROR is negotiated.
                    Some(Errno::NODEV | Errno::CONNABORTED) => Ok(Taken::Unmounted),
                    // The request was withdrawn while it was read.
                    Some(Errno::NOENT | Errno::INTR) => Ok(Taken::Request),
                    _ => Err(LaneError::Read(error)),
                };
            }
            Err(error) => return Err(error.into()),
        }
        let start = slot.request.incoming().gpa;
        let request = Request::parse(memory, start)?;
        self.shared.counters.count_request();
        let recorder = self.shared.recorder.as_ref();
        let recorded = recorder
            .map(|recorder| recorder.request(memory, start, &request))
            .transpose()?;
        if request.is_urgent() {
            if let Some((recorder, recorded)) = recorder.zip(recorded) {
                recorder.unanswered(&recorded);
            }
            urgent.send(&request, &mut slot.request)?;
            return Ok(Taken::Request);
        }
        if request.opcode == opcode::INIT {
            init::limit_offer(memory, start.offset(IN_HEADER.into()))?;
        }
        slot.request.readable(&request, &mut self.readable);
        slot.writable(request.reply, &mut self.writable);
        self.track
            .queue
            .push(&self.readable, &self.writable, token as u64)?;
        self.track.queue.kick()?;
        self.free.pop();
        self.under_way[token] = Some(request);
        self.recorded[token] = recorded;
        Ok(Taken::Request)
    }

    /// Passes back all replies that have arrived. False if there were none.
    fn return_replies(&mut self) -> Result<bool, LaneError> {
        let mut some = false;
        while let Some(used) = self.track.queue.pop()? {
            some = true;
            self.return_reply(used)?;
        }
        if some && !self.listens {
            self.listen(true)?;
        }
        Ok(some)
    }

    fn return_reply(&mut self, used: Used) -> Result<(), LaneError> {
        let token = usize::try_from(used.token).unwrap_or(usize::MAX);
        let Some(request) = self.under_way.get_mut(token).and_then(Option::take) else {
            return Ok(());
        };
        self.free.push(token);
        if request.reply.is_none() {
            return Ok(());
        }
        let memory = &self.shared.memory;
        let at = self.track.slots[token].reply();
        let Request { opcode, unique, .. } = request;
        let fault = |what| {
            self.shared
                .counters
                .count_fault(format_args!("opcode {opcode}: {what}"));
        };
        let header: OutHeader = memory.read_obj(at)?;
        if used.len < OUT_HEADER {
            fault(format!("{} bytes in the place of a reply", used.len));
        } else if header.len != used.len || header.unique != unique {
            fault(format!(
                "request {unique} has a reply of {} bytes for request {}, {} bytes used",
                header.len, header.unique, used.len
            ));
        } else {
            if opcode == opcode::INIT {
                if header.error == 0 {
                    init::limit_answer(memory, at.offset(OUT_HEADER.into()))?;
                }
                self.shared.news.signal().map_err(LaneError::Wait)?;
            }
            let recorded = self.recorded[token].take();
            if let Some((recorder, recorded)) = self.shared.recorder.as_ref().zip(recorded) {
                recorder.answered(memory, at, &recorded)?;
            }
            match self.write(token, used.len)? {
                None => return Ok(()),
                Some(error) => fault(format!(
                    "the kernel rejects a reply of {} bytes, error {}: {error}",
                    header.len, header.error
                )),
            }
        }
        let failure = OutHeader {
            len: OUT_HEADER,
            error: -libc::EIO,
            unique,
        };
        memory.write_obj(at, &failure)?;
        self.write(token, OUT_HEADER)?;
        Ok(())
    }

    /// Writes the reply in this slot to the device. Returns the kernel's error if it rejects it.
    fn write(&self, token: usize, len: u32) -> Result<Option<io::Error>, LaneError> {
        let reply = Buf::new(self.track.slots[token].reply(), len);
        match self.shared.memory.write_to(self.device.as_fd(), reply) {
            Ok(_) => Ok(None),
            Err(MemoryError::Transfer(error)) => match Errno::from_io_error(&error) {
                // No process waits for it any longer.
                Some(Errno::NOENT | Errno::NODEV) => Ok(None),
                _ => Ok(Some(error)),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a request, a reply, or the end. True for the end.
    fn sleep(&mut self) -> Result<bool, LaneError> {
        if self.listens == self.free.is_empty() {
            self.listen(!self.free.is_empty())?;
        }
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 4];
        match epoll::wait(&self.epoll, &mut events, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(wait_error(errno)),
        }
        let stop = self.shared.stop.wait(Duration::ZERO);
        stop.map_err(LaneError::Wait)
    }

    /// Waits for what is in flight after the file system was unmounted.
    fn drain(&mut self) -> Result<End, LaneError> {
        let deadline = Instant::now() + CLOSING;
        while self.track.queue.in_flight() > 0 {
            let stopped = self.shared.stop.wait(Duration::ZERO);
            if stopped.map_err(LaneError::Wait)? || Instant::now() > deadline {
                return Ok(End::Stopped);
            }
            match self.track.queue.wait(Duration::from_millis(100)) {
                Ok(()) | Err(RingError::TimedOut { .. }) => self.return_replies()?,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(End::Unmounted)
    }

    /// Adds the device to the epoll set or removes it. A request wakes one of the sleeping lanes.
    fn listen(&mut self, on: bool) -> Result<(), LaneError> {
        if on {
            let exclusive = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
            add(&self.epoll, &self.device, exclusive)?;
        } else {
            epoll::delete(&self.epoll, &self.device).map_err(wait_error)?;
        }
        self.listens = on;
        Ok(())
    }
}

fn add(epoll: &OwnedFd, fd: &impl AsFd, flags: epoll::EventFlags) -> Result<(), LaneError> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(0), flags).map_err(wait_error)
}

fn wait_error(errno: Errno) -> LaneError {
    LaneError::Wait(errno.into())
}
