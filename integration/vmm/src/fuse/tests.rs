use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use zerocopy::FromBytes;

use super::wire::{
    AttrOut, Dirent, EntryOut, InHeader, OpenOut, OutHeader, ReadIn, WriteIn, WriteOut,
};
use super::*;
use crate::event::Event;
use crate::memory::Region;
use crate::ring::QueueOptions;
use crate::ring::double::{Chain, Device};

const SOON: Duration = Duration::from_secs(10);

/// Queues without a session.
struct Bare {
    memory: Memory,
    queues: Vec<Queue>,
}

impl Guest for Bare {
    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }
}

/// A server on a thread: what it answers to a request's bytes, as header and body, on all queues
/// in turn, until it is dropped.
struct Server {
    stop: Arc<AtomicBool>,
    kicks: Vec<Arc<Event>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.kicks[0].signal().unwrap();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// What the server does with a chain: it gets the request's header and arguments, and returns
/// bytes to write and the used length.
type Answer = fn(&InHeader, &[u8]) -> (Vec<u8>, u32);

fn serve(queues: usize, answer: Answer) -> (Client<Bare>, Server) {
    let memory = Memory::new(&[Region::new(0x1000, 64 << 20)]).unwrap();
    let kick = Arc::new(Event::new().unwrap());
    let options = QueueOptions {
        event_idx: true,
        indirect: true,
        indirect_capacity: 300,
        ..QueueOptions::new(64)
    };
    let queue = |_| {
        let call = Arc::new(Event::new().unwrap());
        Queue::with_events(&memory, &options, kick.clone(), call).unwrap()
    };
    let queues: Vec<_> = (0..queues).map(queue).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let mut devices: Vec<_> = queues
        .iter()
        .map(|queue| {
            let device = Device::new(&memory, queue.addresses(), queue.size(), true);
            (device, queue.call_event().clone())
        })
        .collect();
    let server = Server {
        stop: stop.clone(),
        kicks: vec![kick.clone()],
        thread: Some(std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                for (device, call) in &mut devices {
                    let chains: Vec<_> = std::iter::from_fn(|| device.pop()).collect();
                    // Backwards, so that the client can't count on an order.
                    for chain in chains.iter().rev() {
                        if answer_one(device, chain, answer) {
                            call.signal().unwrap();
                        }
                    }
                }
                kick.wait(Duration::from_millis(100)).unwrap();
                kick.take().unwrap();
            }
        })),
    };
    (Client::new(Bare { memory, queues }), server)
}

fn answer_one(device: &mut Device, chain: &Chain, answer: Answer) -> bool {
    let input = device.input(chain);
    let (header, args) = InHeader::read_from_prefix(&input).unwrap();
    let (bytes, used) = answer(&header, args);
    let wrote = device.output(chain, &bytes);
    assert_eq!(wrote as usize, bytes.len(), "the reply did not fit");
    device.complete(chain.head, used)
}

fn reply(header: &InHeader, error: i32, body: &[u8]) -> (Vec<u8>, u32) {
    let len = u32::try_from(16 + body.len()).unwrap();
    let out = OutHeader {
        len,
        error,
        unique: header.unique,
    };
    ([out.as_bytes(), body].concat(), len)
}

/// A file system with one file, whose bytes are their offsets, and which accepts all FORGETs.
fn small(header: &InHeader, args: &[u8]) -> (Vec<u8>, u32) {
    assert_eq!(header.len as usize, 40 + args.len());
    let entry = EntryOut {
        nodeid: 2,
        ..EntryOut::default()
    };
    match header.opcode {
        opcode::INIT => {
            let (asked, _) = InitIn::read_from_prefix(args).unwrap();
            let out = InitOut {
                major: 7,
                minor: asked.minor,
                flags: asked.flags,
                flags2: asked.flags2,
                max_write: 1 << 20,
                ..InitOut::default()
            };
            reply(header, 0, out.as_bytes())
        }
        opcode::FORGET | opcode::BATCH_FORGET => (Vec::new(), 0),
        opcode::LOOKUP if args == b"file\0" => reply(header, 0, entry.as_bytes()),
        opcode::LOOKUP => reply(header, -libc::ENOENT, &[]),
        opcode::GETATTR => {
            let mut out = AttrOut::default();
            (out.attr.uid, out.attr.gid) = (header.uid, header.gid);
            reply(header, 0, out.as_bytes())
        }
        opcode::CREATE => {
            assert_eq!(&args[16..], b"a\0");
            let mut entry = entry;
            (entry.attr.uid, entry.attr.gid) = (header.uid, header.gid);
            let opened = OpenOut {
                fh: 77,
                open_flags: wire::fopen::KEEP_CACHE,
                backing_id: 0,
            };
            reply(header, 0, &[entry.as_bytes(), opened.as_bytes()].concat())
        }
        opcode::READ => {
            let (asked, _) = ReadIn::read_from_prefix(args).unwrap();
            reply(header, 0, &bytes(asked.offset, asked.size))
        }
        opcode::WRITE => {
            let (asked, payload) = WriteIn::read_from_prefix(args).unwrap();
            assert_eq!(payload, bytes(asked.offset, asked.size));
            let out = WriteOut {
                size: asked.size,
                padding: 0,
            };
            reply(header, 0, out.as_bytes())
        }
        opcode::READDIR => {
            let (asked, _) = ReadIn::read_from_prefix(args).unwrap();
            let body = match asked.offset {
                0 => [dirent(1, b"one\0\0\0\0\0"), dirent(2, b"two\0\0\0\0\0")].concat(),
                _ => Vec::new(),
            };
            reply(header, 0, &body)
        }
        opcode::LISTXATTR => reply(header, 0, b"user.a\0user.b\0"),
        opcode::SETXATTR => {
            assert_eq!(args, b"\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0user.a\0hi");
            reply(header, 0, &[])
        }
        opcode::DESTROY => reply(header, 0, &[]),
        _ => reply(header, -libc::ENOSYS, &[]),
    }
}

fn dirent(off: u64, padded: &[u8]) -> Vec<u8> {
    let dirent = Dirent {
        ino: 40 + off,
        off,
        namelen: 3,
        r#type: 8,
    };
    [dirent.as_bytes(), padded].concat()
}

fn bytes(offset: u64, size: u32) -> Vec<u8> {
    let one = |at: u64| (at % 251).try_into().unwrap();
    (offset..offset + u64::from(size)).map(one).collect()
}

#[test]
fn a_story_reads_as_it_should() {
    let (mut fs, _server) = serve(2, small);
    let init = fs.init().unwrap();
    assert_eq!(init.max_write, fs.max_write());
    assert!(fs.has(init::SETXATTR_EXT | init::HAS_RESEND));
    let (file, handle) = fs.create(ROOT, c"a", 0o644).unwrap();
    assert_eq!((file.nodeid, handle.fh), (2, 77));
    assert_eq!(handle.open_flags, wire::fopen::KEEP_CACHE);
    let payload = bytes(3, 5);
    assert_eq!(fs.write(2, handle, 3, &payload).unwrap(), 5);
    assert_eq!(fs.read(2, handle, 3, 5).unwrap(), payload);
    assert_eq!(fs.lookup(ROOT, c"file").unwrap().nodeid, 2);
    let missing = fs.lookup(ROOT, c"none").unwrap_err();
    assert_eq!(missing.errno(), Some(libc::ENOENT));
    fs.forget(2, 1).unwrap();
    fs.batch_forget(&[(2, 1), (3, 4)]).unwrap();
    fs.setxattr(2, c"user.a", b"hi", 0).unwrap();
    assert_eq!(fs.listxattr(2).unwrap(), [c"user.a", c"user.b"]);
    fs.act_as(1000, 100);
    let (made, _) = fs.create(ROOT, c"a", 0o644).unwrap();
    assert_eq!((made.attr.uid, made.attr.gid), (1000, 100));
    // Where owners may be mapped, Linux names the caller only in requests that create.
    assert!(fs.has(init::ALLOW_IDMAP));
    let attr = fs.getattr(2).unwrap().attr;
    assert_eq!((attr.uid, attr.gid), (u32::MAX, u32::MAX));
    let dir = Handle::raw(1);
    let names: Vec<_> = fs.readdir_all(ROOT, dir).unwrap();
    let names: Vec<_> = names.into_iter().map(|entry| entry.name).collect();
    assert_eq!(names, ["one", "two"]);
    fs.destroy().unwrap();
}

#[test]
fn every_layout_carries_the_same_bytes() {
    let (mut fs, _server) = serve(2, small);
    let layouts = [
        Layout::default(),
        Layout::linux(),
        Layout {
            readable: Cut::Whole,
            writable: Cut::Whole,
            gap: 0,
        },
        Layout::odd(&[1, 1, 37, 5, 4093]),
    ];
    let handle = Handle::raw(0);
    for layout in layouts {
        fs.set_layout(layout);
        for size in [0, 1, 4096, 100_001, 1 << 20] {
            let payload = bytes(9, size);
            assert_eq!(fs.write(2, handle, 9, &payload).unwrap(), size);
            assert_eq!(fs.read(2, handle, 9, size).unwrap(), payload);
        }
    }
    assert_eq!(fs.in_flight(), 0);
}

#[test]
fn many_in_flight_come_back_in_any_order() {
    let (mut fs, _server) = serve(3, small);
    let handle = Handle::raw(0);
    for round in 0..50 {
        let mut out = Vec::new();
        for i in 0..20 {
            fs.use_queue(1 + i % 2);
            out.push(fs.submit_read(2, handle, i as u64 + round, 10).unwrap());
        }
        for (i, pending) in out.into_iter().enumerate() {
            let read = fs.collect(pending).unwrap().bytes;
            assert_eq!(read, bytes(i as u64 + round, 10));
        }
    }
}

#[test]
fn what_is_back_can_be_asked_without_waiting() {
    let (mut fs, _server) = serve(1, small);
    let pending = fs.submit_read(2, Handle::raw(0), 0, 10).unwrap();
    fs.guest().queues[0].wait(SOON).unwrap();
    assert_eq!(fs.returned().unwrap(), [pending]);
    assert_eq!(fs.collect(pending).unwrap().bytes.len(), 10);
    assert!(matches!(
        fs.collect(pending),
        Err(FuseError::NotInFlight(_))
    ));
}

#[test]
fn a_lane_is_a_queue_for_one_thread() {
    let (fs, _server) = serve(3, small);
    let Bare { memory, queues } = fs.into_guest();
    std::thread::scope(|scope| {
        for queue in queues {
            let memory = memory.clone();
            scope.spawn(move || {
                let mut fs = Client::new(Lane { memory, queue });
                for offset in 0..200 {
                    let read = fs.read(2, Handle::raw(0), offset, 5000).unwrap();
                    assert_eq!(read, bytes(offset, 5000));
                }
                fs.forget(2, 1).unwrap();
            });
        }
    });
}

/// What the client says of a server that answers GETATTR like this.
fn of(answer: Answer) -> FuseError {
    let (mut fs, _server) = serve(2, answer);
    fs.set_layout(Layout::odd(&[5]));
    fs.getattr(ROOT).unwrap_err()
}

#[test]
fn what_breaks_the_protocol_is_told() {
    assert!(matches!(of(|_, _| (vec![], 0)), FuseError::Empty { .. }));
    let wrong: [Answer; 7] = [
        // No header fits.
        |_, _| (vec![], 8),
        // Another request's number.
        |header, _| {
            let other = InHeader {
                unique: header.unique + 2,
                ..*header
            };
            reply(&other, 0, &[0; 104])
        },
        // Less used than the header says, and more.
        |header, _| (reply(header, 0, &[0; 104]).0, 119),
        |header, _| (reply(header, 0, &[0; 96]).0, 120),
        // More used than there is room for.
        |header, _| (reply(header, 0, &[0; 104]).0, 121),
        // Not as long as the structure is.
        |header, _| reply(header, 0, &[0; 96]),
        // An error that is none.
        |header, _| reply(header, 5, &[]),
    ];
    for answer in wrong {
        let error = of(answer);
        assert!(matches!(error, FuseError::BadReply { .. }), "{error}");
    }
    let refused = of(|header, _| reply(header, -libc::EIO, &[]));
    assert_eq!(refused.errno(), Some(libc::EIO));
}

#[test]
fn a_server_that_is_silent_is_waited_for_only_so_long() {
    let memory = Memory::new(&[Region::new(0, 1 << 20)]).unwrap();
    let queue = Queue::new(&memory, &QueueOptions::new(4)).unwrap();
    let mut fs = Client::new(Lane { memory, queue });
    fs.set_timeout(Duration::from_millis(1));
    let silent = fs.getattr(ROOT);
    assert!(matches!(silent, Err(FuseError::Ring(_))));
    assert_eq!(fs.in_flight(), 1);
}

#[test]
fn a_full_ring_gives_the_buffers_back() {
    let memory = Memory::new(&[Region::new(0, 1 << 20)]).unwrap();
    let queue = Queue::new(&memory, &QueueOptions::new(4)).unwrap();
    let mut fs = Client::new(Lane { memory, queue });
    let handle = Handle::raw(0);
    let first = fs.submit_read(2, handle, 0, 4096).unwrap();
    for _ in 0..10_000 {
        assert!(fs.submit_read(2, handle, 0, 4096).is_err());
    }
    assert_eq!(fs.in_flight(), 1);
    assert_eq!(first.unique(), 2);
}
