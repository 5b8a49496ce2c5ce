//! What a front end sends on the back channel, which is not always an answer.
//!
//! A session has a back channel, and threads send requests on it, while the input's bytes come back. What
//! must hold: each request ends, with an error unless there was an answer to it, and once something else
//! has come the channel is closed.
//!
//! The input: the number of requests (one byte, of which the highest bit asks for the older form of the
//! requests) and of threads (one byte), then what comes for each request:
//! the length (one byte, of which the highest bit asks for a right answer instead), the bytes.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use ringfsd::internals::device::{BackChannel, BackendRequest, Device, SharedMapping};
use ringfsd::internals::state::{Limits, Table};
use ringfsd::internals::vhost_user::{self, Runner};
use ringfsd::internals::virtqueue::{Queue, QueueIndex};

use crate::count;
use crate::source::Source;
use crate::vhost_user::send;

/// Sends requests when it may.
#[derive(Default)]
struct Asking {
    channel: Option<Arc<dyn BackChannel>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    requests: u8,
    count: u8,
}

impl Runner for Asking {
    fn run(&mut self, _queue: Queue, _kick: Arc<OwnedFd>) -> std::io::Result<()> {
        Ok(())
    }

    fn stop(&mut self, _queue: QueueIndex) -> Option<u16> {
        None
    }

    fn reset(&mut self) {}

    fn connected(&mut self, channel: Arc<dyn BackChannel>) {
        self.channel = Some(channel);
    }

    fn channel_opened(&mut self, _resumed: bool) {
        for _ in 0..self.count {
            let channel = Arc::clone(self.channel.as_ref().expect("connected before"));
            let requests = self.requests;
            self.threads.push(std::thread::spawn(move || {
                let null = std::fs::File::open("/dev/null").expect("/dev/null");
                let mapping = SharedMapping {
                    region: 0,
                    offset: 0,
                    len: 4096,
                    file_offset: 0,
                    writable: false,
                };
                for number in 0..requests {
                    let _any = match number % 3 {
                        0 => channel.request(BackendRequest::ConfigChanged, None),
                        1 => channel
                            .request(BackendRequest::MapSharedMemory(mapping), Some(null.as_fd())),
                        _ => channel.request(BackendRequest::UnmapSharedMemory(mapping), None),
                    };
                }
            }));
        }
        // Whoever stops the session waits for them.
        for thread in self.threads.drain(..) {
            thread.join().expect("no panic");
        }
    }
}

/// One input.
pub fn run(data: &[u8]) {
    let mut source = Source::new(data);
    let first = source.u8();
    let (requests, dax_fs_map) = (first % 16, first & 0x80 != 0);
    let count = 1 + source.u8() % 3;
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let (vmm, device_end) = UnixStream::pair().expect("sockets");
    let message = |request: u32, body: &[u8], fd: Option<&UnixStream>| {
        let len = u32::try_from(body.len()).expect("short");
        let header = [request, 1, len].map(u32::to_le_bytes).concat();
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        assert!(send(&ours, &[&header[..], body].concat(), &fds));
    };
    // GET_FEATURES; REPLY_ACK, BACKEND_REQ, CONFIG, BACKEND_SEND_FD, SHMEM; SET_BACKEND_REQ_FD.
    let shmem = u64::from(!dax_fs_map) << 22;
    let features: u64 = 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10 | shmem;
    message(1, &[], None);
    message(16, &features.to_le_bytes(), None);
    message(21, &[], Some(&device_end));
    drop(device_end);
    ours.shutdown(std::net::Shutdown::Write).expect("an end");
    let answers: Vec<_> = std::iter::from_fn(|| {
        (!source.is_empty()).then(|| {
            let len = source.u8();
            (
                len & 0x80 != 0,
                source.bytes(usize::from(len & 0x7f)).to_vec(),
            )
        })
    })
    .collect();
    count::add(usize::from(requests) * usize::from(count));
    let front_end = std::thread::spawn(move || answer(vmm, answers));
    let table = Table::for_this_process(&Limits {
        inodes: 0,
        handles: 0,
        queues: 2,
    });
    let device = Device {
        tag: None,
        request_queues: std::num::NonZeroU16::MIN,
        dax_window: 8 << 20,
        dax_fs_map,
    };
    let mut runner = Asking {
        requests,
        count,
        ..Asking::default()
    };
    let silent = UnixStream::pair().expect("sockets");
    let leave = AtomicBool::new(false);
    let stop = vhost_user::Stop {
        asked: silent.0.as_fd(),
        leave: &leave,
    };
    let table = table.expect("a table");
    let _end = vhost_user::serve(theirs, &device, &mut runner, &table, stop);
    drop(runner);
    front_end.join().expect("no panic");
}

/// Answers each request with the next of `answers`, and closes the channel after the last.
fn answer(mut vmm: UnixStream, answers: Vec<(bool, Vec<u8>)>) {
    for (is_right, bytes) in answers {
        let mut header = [0; 12];
        if vmm.read_exact(&mut header).is_err() {
            return;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four"));
        let mut body = vec![0; usize::try_from(word(8)).expect("short")];
        if vmm.read_exact(&mut body).is_err() {
            return;
        }
        let mut reply = Vec::new();
        if is_right {
            reply.extend([word(0), 5, 8].map(u32::to_le_bytes).concat());
            let value = bytes.first().copied().unwrap_or(0);
            reply.extend(u64::from(value).to_le_bytes());
        } else {
            reply = bytes;
        }
        if vmm.write_all(&reply).is_err() {
            return;
        }
        if !is_right && reply.len() < 20 {
            // The rest won't come, and nobody shall wait for it.
            return;
        }
    }
}
