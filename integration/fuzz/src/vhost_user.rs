//! vhost-user messages: any messages, in any order, with any descriptors, sent to a session.
//!
//! An input is what a front end sends until it hangs up. What must hold: the session ends, by
//! itself or with an error, and queues run only between `run` and `stop`.
//!
//! One message of the input is: number, flags, kind of descriptors, a length (one byte each), the
//! body. Some bodies are completed so that they can be valid.

use std::collections::HashMap;
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use ringfsd::internals::device::Device;
use ringfsd::internals::migration::{Cause, DeviceState};
use ringfsd::internals::state::{Limits, Table};
use ringfsd::internals::vhost_user::{self, Runner};
use ringfsd::internals::virtqueue::{Queue, QueueIndex};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::count;
use crate::source::Source;

/// The longest input that surely fits into the socket's buffer.
const MOST: usize = 32 * 1024;

/// Descriptors a front end may hand over.
struct Descriptors {
    /// Memory of 64 KiB.
    memory: OwnedFd,
    /// Memory of half a page.
    short: OwnedFd,
    event: OwnedFd,
    pipe: OwnedFd,
    _other_end: OwnedFd,
    null: OwnedFd,
    socket: OwnedFd,
    table: Arc<Table>,
    /// Never readable, as its other end stays open and silent.
    silent: (UnixStream, UnixStream),
}

fn table() -> Arc<Table> {
    let limits = Limits {
        inodes: 0,
        handles: 0,
        queues: 2,
    };
    Table::in_memory(&limits).expect("a table")
}

impl Descriptors {
    fn new() -> Self {
        let memory = |len| {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            let fd = rustix::fs::memfd_create("guest", flags).expect("a memfd");
            rustix::fs::ftruncate(&fd, len).expect("its length");
            fd
        };
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK);
        let (pipe, other_end) = rustix::pipe::pipe().expect("a pipe");
        Self {
            memory: memory(0x10000),
            short: memory(0x800),
            event: event.expect("an eventfd"),
            pipe,
            _other_end: other_end,
            null: File::open("/dev/null").expect("/dev/null").into(),
            socket: UnixStream::pair().expect("sockets").0.into(),
            table: table(),
            silent: UnixStream::pair().expect("sockets"),
        }
    }

    fn some(&self, which: u8) -> Vec<BorrowedFd<'_>> {
        let fds = [
            self.memory.as_fd(),
            self.event.as_fd(),
            self.short.as_fd(),
            self.pipe.as_fd(),
            self.null.as_fd(),
            self.socket.as_fd(),
        ];
        let count = usize::from(which & 0xf) % 10;
        let first = usize::from(which >> 4) % fds.len();
        std::iter::repeat_n(fds[first], count).collect()
    }
}

/// Takes what it is given, and what is on the ring when it gets it.
#[derive(Default)]
struct Taking {
    queues: HashMap<u16, Queue>,
    resets: usize,
}

impl Runner for Taking {
    fn run(&mut self, mut queue: Queue, _kick: Arc<OwnedFd>) -> std::io::Result<()> {
        for _ in 0..64 {
            let Some(chain) = queue.pop() else { break };
            drop(chain);
        }
        queue.used().publish();
        let before = self.queues.insert(queue.index().0, queue);
        assert!(before.is_none(), "it runs already");
        Ok(())
    }

    fn stop(&mut self, queue: QueueIndex) -> Option<u16> {
        let queue = self.queues.remove(&queue.0).expect("it runs");
        queue.used().drain();
        Some(queue.next_available())
    }

    fn reset(&mut self) {
        assert!(self.queues.is_empty(), "all were stopped before");
        self.resets += 1;
    }

    fn can_migrate(&self) -> bool {
        true
    }

    fn device_state(&mut self) -> Arc<dyn DeviceState> {
        assert!(self.queues.is_empty(), "all were stopped before");
        Arc::new(Stateful)
    }
}

/// A device with a state.
#[derive(Debug)]
struct Stateful;

impl DeviceState for Stateful {
    fn save(&self) -> Result<Vec<u8>, Cause> {
        Ok(vec![7; 1000])
    }

    fn saved(&self) {}

    fn load(&self, bytes: &[u8]) -> Result<(), Cause> {
        if bytes.is_empty() {
            return Err("nothing".into());
        }
        Ok(())
    }
}

/// One input.
pub fn run(data: &[u8]) {
    thread_local! {
        static DESCRIPTORS: Descriptors = Descriptors::new();
    }
    DESCRIPTORS.with(|descriptors| with(descriptors, &data[..data.len().min(MOST)]));
}

fn with(descriptors: &Descriptors, data: &[u8]) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("no waiting");
    let mut source = Source::new(data);
    let mut messages = 0;
    while !source.is_empty() {
        let [request, flags, fds, len] = [(); 4].map(|()| source.u8());
        let body = source.bytes(len.into());
        let body = completed(request, body);
        let flags = match flags {
            0..0x80 => 1 | u32::from(flags & 8),
            flags => u32::from(flags & 0x7f),
        };
        let told = match len {
            0xff => u32::from(fds) << 8,
            _ => u32::try_from(body.len()).unwrap_or_default(),
        };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u32::from(request % 48).to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&told.to_le_bytes());
        bytes.extend_from_slice(&body);
        messages += 1;
        if !send(&ours, &bytes, &descriptors.some(fds)) {
            break;
        }
    }
    ours.shutdown(Shutdown::Write).expect("an end");
    let device = Device {
        tag: None,
        request_queues: std::num::NonZeroU16::MIN,
        dax_window: 8 << 20,
        dax_fs_map: false,
    };
    let mut runner = Taking::default();
    let leave = std::sync::atomic::AtomicBool::new(false);
    let stop = vhost_user::Stop {
        asked: descriptors.silent.0.as_fd(),
        leave: &leave,
    };
    let end = vhost_user::serve(theirs, &device, &mut runner, &descriptors.table, stop);
    assert!(
        descriptors.table.session_snapshot().is_none(),
        "forgotten at the end"
    );
    assert!(runner.queues.is_empty(), "stopped at the end: {end:?}");
    count::add(messages);
}

/// Makes a body that could be right of fewer bytes: addresses that are in the memory, one region
/// or two, a queue that there is.
fn completed(request: u8, body: &[u8]) -> Vec<u8> {
    let mut source = Source::new(body);
    let place = |byte: u8| 0x7000_0000 + (u64::from(byte) << 8);
    let mut words: Vec<u64> = Vec::new();
    match (request % 48, body.len()) {
        // SET_MEM_TABLE
        (5, 1..8) => {
            let count = u64::from(source.u8() % 3);
            words.push(count);
            for at in 0..count {
                let shift = u64::from(source.u8()) << 8;
                words.extend([at * 0x8000 + shift, 0x8000, 0x7000_0000 + at * 0x8000, 0]);
            }
        }
        // SET_VRING_ADDR
        (9, 1..8) => {
            words.push(u64::from(source.u8() & 1));
            let [descriptors, used, available] = [(); 3].map(|()| place(source.u8()));
            words.extend([descriptors, used, available, 0]);
        }
        // SET_VRING_NUM, BASE, ENABLE
        (8 | 10 | 11 | 18, 1..4) => {
            let index = u64::from(source.u8() & 1);
            words.push(index | u64::from(source.u16()) << 32);
        }
        // ADD_MEM_REG, REM_MEM_REG
        (37 | 38, 1..8) => {
            let at = u64::from(source.u8()) << 8;
            words.extend([0, at, 0x4000, 0x7000_0000 + at, 0]);
        }
        // SET_FEATURES, SET_PROTOCOL_FEATURES
        (2 | 16, 1) => words.push(match source.u8() {
            0 => 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28,
            1 => 1 << 32 | 1 << 30 | 1 << 26,
            2 => 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15,
            byte => u64::from(byte),
        }),
        _ => return body.to_vec(),
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn send(to: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(
        to,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    ) == Ok(bytes.len())
}
