//! Wrong messages, memory and rings that a front end can send.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, SealFlags};
use vmm::connection::message::{Log, MemoryRegion, VringAddress, flag, request};
use vmm::{Event, Session};
use zerocopy::IntoBytes;

/// What is done to a session that is up.
pub type Act = fn(&mut Session);

/// A case: its name, what is done, and what the server says of the session's end.
pub type Case = (&'static str, Act, &'static str);

pub const PROTOCOL: &str = "broke the vhost-user protocol";
const NOT_SHARED: &str = "has not shared the VM's memory";
const QUEUE: &str = "queue can't be used";
const MAPPING: &str = "mapping 0x4000 bytes of guest memory at 0x10000000000";

/// Where a region may be added that overlaps none.
const FREE: u64 = 1 << 40;

fn memfd(len: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("memory", flags).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

fn region() -> MemoryRegion {
    MemoryRegion {
        gpa: FREE,
        size: 0x4000,
        user_address: FREE,
        mmap_offset: 0,
    }
}

/// Adds a region; that the session ends is the answer.
fn add(session: &mut Session, region: MemoryRegion, fd: &impl AsFd) {
    let _ended = session.connection.add_mem_reg_raw(region, Some(fd.as_fd()));
}

pub fn send(session: &mut Session, number: u32, body: &[u8]) {
    let _ended = session.connection.send(number, flag::VERSION, body, &[]);
}

fn send_with(session: &mut Session, number: u32, body: &[u8], fd: &impl AsFd) {
    let fd = fd.as_fd();
    let _ended = session.connection.send(number, flag::VERSION, body, &[fd]);
}

fn bytes(session: &mut Session, bytes: &[u8]) {
    let _ended = session.connection.send_bytes(bytes, &[]);
}

pub fn header(number: u32, flags: u32, size: u32) -> Vec<u8> {
    [number, flags, size].map(u32::to_le_bytes).concat()
}

fn address(session: &Session, change: impl FnOnce(&mut VringAddress)) -> VringAddress {
    let addresses = session.queues[1].addresses();
    let user = |gpa| session.memory.user_address(gpa).unwrap();
    let mut address = VringAddress {
        index: 1,
        flags: 0,
        descriptors: user(addresses.descriptors),
        used: user(addresses.used),
        available: user(addresses.available),
        log: 0,
    };
    change(&mut address);
    address
}

fn set_address(session: &mut Session, change: impl FnOnce(&mut VringAddress)) {
    let address = address(session, change);
    let _ended = session.connection.set_vring_addr_raw(address);
}

/// Messages that are none.
pub const FRAMES: &[Case] = &[
    ("all ones", |s| bytes(s, &[0xff; 12]), PROTOCOL),
    ("message 0", |s| send(s, 0, &[]), PROTOCOL),
    ("message 45", |s| send(s, 45, &[]), PROTOCOL),
    ("message 2^32 - 1", |s| send(s, u32::MAX, &[]), PROTOCOL),
    ("version 0", |s| bytes(s, &header(1, 0, 0)), PROTOCOL),
    ("version 2", |s| bytes(s, &header(1, 2, 0)), PROTOCOL),
    (
        "a reply",
        |s| bytes(s, &header(1, 1 | flag::REPLY, 0)),
        PROTOCOL,
    ),
    (
        "flags that nobody knows",
        |s| bytes(s, &header(1, 0xffff_fff1, 0)),
        PROTOCOL,
    ),
    (
        "a body of 64 KiB",
        |s| bytes(s, &header(5, 1, 0x1_0000)),
        PROTOCOL,
    ),
    (
        "a body of 4 GiB",
        |s| bytes(s, &header(5, 1, u32::MAX)),
        PROTOCOL,
    ),
    (
        "a body that is too short",
        |s| send(s, request::SET_VRING_NUM, &[1, 0, 0, 0]),
        PROTOCOL,
    ),
    (
        "a body that is too long",
        |s| send(s, request::SET_VRING_NUM, &[0; 100]),
        PROTOCOL,
    ),
    (
        "a body where there is none",
        |s| send(s, request::GET_FEATURES, &[0; 8]),
        PROTOCOL,
    ),
];

/// Memory that can't be.
pub const TABLES: &[Case] = &[
    (
        "a table of a region without descriptor",
        |s| {
            send(
                s,
                request::SET_MEM_TABLE,
                &[&1_u64.to_le_bytes()[..], region().as_bytes()].concat(),
            );
        },
        NOT_SHARED,
    ),
    (
        "a table that counts more than it has",
        |s| {
            let body = [&2_u64.to_le_bytes()[..], region().as_bytes()].concat();
            send_with(s, request::SET_MEM_TABLE, &body, &memfd(0x4000));
        },
        PROTOCOL,
    ),
    (
        "a table of 4 billion regions",
        |s| {
            send_with(
                s,
                request::SET_MEM_TABLE,
                &u64::from(u32::MAX).to_le_bytes(),
                &memfd(0x4000),
            );
        },
        PROTOCOL,
    ),
    (
        "a table with a descriptor too many",
        |s| {
            let (one, two) = (memfd(0x4000), memfd(0x4000));
            let _ended = s
                .connection
                .set_mem_table_raw(&[region()], &[one.as_fd(), two.as_fd()]);
        },
        PROTOCOL,
    ),
    (
        "regions of a table that overlap",
        |s| {
            let (one, two) = (memfd(0x4000), memfd(0x4000));
            let second = MemoryRegion {
                gpa: FREE + 0x3000,
                user_address: FREE + 0x4000,
                ..region()
            };
            let _ended = s
                .connection
                .set_mem_table_raw(&[region(), second], &[one.as_fd(), two.as_fd()]);
        },
        "overlap",
    ),
    (
        "a region over one that is there",
        |s| {
            add(
                s,
                MemoryRegion {
                    gpa: 0x1000,
                    ..region()
                },
                &memfd(0x4000),
            );
        },
        "overlap",
    ),
    (
        "a region without descriptor",
        |s| {
            let _ended = s.connection.add_mem_reg_raw(region(), None);
        },
        NOT_SHARED,
    ),
    (
        "a file that is a byte too short",
        |s| add(s, region(), &memfd(0x3fff)),
        MAPPING,
    ),
    ("an empty file", |s| add(s, region(), &memfd(0)), MAPPING),
    (
        "an offset that makes it too short",
        |s| {
            add(
                s,
                MemoryRegion {
                    mmap_offset: 0x1000,
                    ..region()
                },
                &memfd(0x4000),
            );
        },
        MAPPING,
    ),
    (
        "an offset of all ones",
        |s| {
            add(
                s,
                MemoryRegion {
                    mmap_offset: u64::MAX,
                    ..region()
                },
                &memfd(0x4000),
            );
        },
        MAPPING,
    ),
    (
        "an offset within a page",
        |s| {
            add(
                s,
                MemoryRegion {
                    mmap_offset: 0x10,
                    ..region()
                },
                &memfd(0x8000),
            );
        },
        MAPPING,
    ),
    (
        "a region of 0 bytes",
        |s| {
            add(
                s,
                MemoryRegion {
                    size: 0,
                    ..region()
                },
                &memfd(0x4000),
            );
        },
        "can't be",
    ),
    (
        "a region of 2^64 - 1 bytes",
        |s| {
            add(
                s,
                MemoryRegion {
                    size: u64::MAX,
                    ..region()
                },
                &memfd(0x4000),
            );
        },
        "can't be",
    ),
    (
        "a region over the end of addresses",
        |s| {
            add(
                s,
                MemoryRegion {
                    gpa: u64::MAX - 0x1000,
                    ..region()
                },
                &memfd(0x4000),
            );
        },
        "can't be",
    ),
    (
        "a region whose own addresses wrap around",
        |s| {
            add(
                s,
                MemoryRegion {
                    user_address: u64::MAX - 0x1000,
                    ..region()
                },
                &memfd(0x4000),
            );
        },
        "can't be",
    ),
    (
        "an eventfd as memory",
        |s| add(s, region(), s_event()),
        MAPPING,
    ),
    (
        "a socket as memory",
        |s| add(s, region(), &UnixStream::pair().unwrap().0),
        MAPPING,
    ),
    (
        "a pipe as memory",
        |s| add(s, region(), &rustix::pipe::pipe().unwrap().0),
        MAPPING,
    ),
    (
        "a directory as memory",
        |s| add(s, region(), &File::open("/").unwrap()),
        MAPPING,
    ),
    (
        "a file for reading only as memory",
        |s| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&[0; 0x4000]).unwrap();
            add(s, region(), &File::open(file.path()).unwrap());
        },
        MAPPING,
    ),
    (
        "memory sealed against writing",
        |s| {
            let fd = memfd(0x4000);
            rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE).unwrap();
            add(s, region(), &fd);
        },
        MAPPING,
    ),
    (
        "taking away a region that is not there",
        |s| {
            let _ended = s.connection.rem_mem_reg(region());
        },
        "no memory region",
    ),
    (
        "taking away half a region",
        |s| {
            let _ended = s.connection.rem_mem_reg(MemoryRegion {
                gpa: 0,
                size: 0x1000,
                ..region()
            });
        },
        "no memory region",
    ),
    (
        "the memory of running rings taken away",
        |s| {
            let fd = memfd(0x4000);
            let _ended = s.connection.set_mem_table_raw(&[region()], &[fd.as_fd()]);
        },
        QUEUE,
    ),
    (
        "more regions than there may be",
        |s| {
            let fd = memfd(0x1000);
            for at in 0..513 {
                let at = FREE + (at << 12);
                let region = MemoryRegion {
                    gpa: at,
                    size: 0x1000,
                    user_address: at,
                    mmap_offset: 0,
                };
                if s.connection
                    .add_mem_reg_raw(region, Some(fd.as_fd()))
                    .is_err()
                {
                    return;
                }
            }
        },
        "more than 512 memory regions",
    ),
    (
        "a log without descriptor",
        |s| {
            send(
                s,
                request::SET_LOG_BASE,
                Log {
                    size: 0x1000,
                    offset: 0,
                }
                .as_bytes(),
            );
        },
        PROTOCOL,
    ),
    (
        "a log in a file that is too short",
        |s| {
            send_with(
                s,
                request::SET_LOG_BASE,
                Log {
                    size: 0x1000,
                    offset: 0,
                }
                .as_bytes(),
                &memfd(0xfff),
            );
        },
        "mapping the dirty log",
    ),
    (
        "a log of 2^64 - 1 bytes",
        |s| {
            send_with(
                s,
                request::SET_LOG_BASE,
                Log {
                    size: u64::MAX,
                    offset: 0,
                }
                .as_bytes(),
                &memfd(0x1000),
            );
        },
        "mapping the dirty log",
    ),
    (
        "a log whose offset wraps around",
        |s| {
            send_with(
                s,
                request::SET_LOG_BASE,
                Log {
                    size: 0x1000,
                    offset: u64::MAX,
                }
                .as_bytes(),
                &memfd(0x1000),
            );
        },
        "",
    ),
];

/// Rings that can't be.
pub const RINGS: &[Case] = &[
    (
        "a ring of 0 entries",
        |s| {
            let _ended = s.connection.set_vring_num(1, 0);
        },
        QUEUE,
    ),
    (
        "a ring of 3 entries",
        |s| {
            let _ended = s.connection.set_vring_num(1, 3);
        },
        QUEUE,
    ),
    (
        "a ring of 65,536 entries",
        |s| {
            let _ended = s.connection.set_vring_num(1, 0x1_0000);
        },
        QUEUE,
    ),
    (
        "a ring of 4 billion entries",
        |s| {
            let _ended = s.connection.set_vring_num(1, u32::MAX);
        },
        QUEUE,
    ),
    (
        "a ring larger than its memory",
        |s| {
            set_address(s, |a| {
                a.descriptors = a.used;
                a.available = a.used;
            });
            let _ended = s.connection.set_vring_num(1, 0x8000);
            let memory = s.memory.clone();
            let end = memory.user_address(vmm::Gpa(0)).unwrap() + memory.regions()[0].len();
            set_address(s, |a| a.used = end - 0x100);
        },
        QUEUE,
    ),
    (
        "the size of a ring that there is not",
        |s| {
            let _ended = s.connection.set_vring_num(99, 8);
        },
        "set up queue 99",
    ),
    (
        "a ring with the number 2^32 - 1",
        |s| {
            let _ended = s.connection.set_vring_num(u32::MAX, 8);
        },
        "set up queue",
    ),
    (
        "the base of a ring that there is not",
        |s| {
            let _ended = s.connection.set_vring_base(99, 0);
        },
        "set up queue 99",
    ),
    (
        "a ring enabled that there is not",
        |s| {
            let _ended = s.connection.set_vring_enable(99, true);
        },
        "set up queue 99",
    ),
    (
        "a ring stopped that there is not",
        |s| {
            let _ended = s.connection.get_vring_base(99);
        },
        "set up queue 99",
    ),
    (
        "the address of a ring that there is not",
        |s| set_address(s, |a| a.index = 99),
        "set up queue 99",
    ),
    (
        "descriptors where there is no memory",
        |s| set_address(s, |a| a.descriptors = 0x10),
        QUEUE,
    ),
    (
        "an available ring where there is none",
        |s| set_address(s, |a| a.available = u64::MAX - 1),
        "",
    ),
    (
        "a used ring where there is none",
        |s| set_address(s, |a| a.used = 0x10_0000_0000),
        QUEUE,
    ),
    (
        "descriptors at an odd address",
        |s| set_address(s, |a| a.descriptors += 1),
        "",
    ),
    (
        "an available ring at an odd address",
        |s| set_address(s, |a| a.available += 1),
        "",
    ),
    (
        "a used ring at an odd address",
        |s| set_address(s, |a| a.used += 2),
        "",
    ),
    (
        "a ring over the end of its region",
        |s| {
            let end = s.memory.user_address(vmm::Gpa(0)).unwrap() + s.memory.regions()[0].len();
            set_address(s, |a| a.used = end - 8);
        },
        QUEUE,
    ),
    (
        "a kick without eventfd",
        |s| {
            let _ended = s.connection.set_vring_kick(1, None);
        },
        "polling",
    ),
    (
        "a file as kick",
        |s| kick(s, request::SET_VRING_KICK, &memfd(1)),
        "not an eventfd",
    ),
    (
        "a pipe as kick",
        |s| kick(s, request::SET_VRING_KICK, &rustix::pipe::pipe().unwrap().0),
        "not an eventfd",
    ),
    (
        "a directory as kick",
        |s| kick(s, request::SET_VRING_KICK, &File::open("/").unwrap()),
        "not an eventfd",
    ),
    (
        "a file as call",
        |s| kick(s, request::SET_VRING_CALL, &memfd(1)),
        "not an eventfd",
    ),
    (
        "a pipe as call",
        |s| kick(s, request::SET_VRING_CALL, &rustix::pipe::pipe().unwrap().1),
        "not an eventfd",
    ),
    (
        "a socket as call",
        |s| kick(s, request::SET_VRING_CALL, &UnixStream::pair().unwrap().0),
        "not an eventfd",
    ),
    (
        "a device as call",
        |s| {
            kick(
                s,
                request::SET_VRING_CALL,
                &File::options().write(true).open("/dev/full").unwrap(),
            );
        },
        "not an eventfd",
    ),
    (
        "the kick of a ring that there is not",
        |s| {
            let _ended = s.connection.set_vring_kick(99, Some(s_event()));
        },
        "set up queue 99",
    ),
    (
        "the call of a ring that there is not",
        |s| {
            let _ended = s.connection.set_vring_call(99, Some(s_event()));
        },
        "set up queue 99",
    ),
    (
        "two kicks in one message",
        |s| {
            let (one, two) = (Event::new().unwrap(), Event::new().unwrap());
            let _ended = s.connection.send(
                request::SET_VRING_KICK,
                flag::VERSION,
                &1_u64.to_le_bytes(),
                &[one.as_fd(), two.as_fd()],
            );
        },
        PROTOCOL,
    ),
    (
        "features that were not offered",
        |s| {
            let _ended = s.connection.set_features(u64::MAX);
        },
        "not offered",
    ),
    (
        "a packed ring",
        |s| {
            let _ended = s.connection.set_features(1 << 34 | 1 << 32);
        },
        "not offered",
    ),
    (
        "protocol features that were not offered",
        |s| {
            let _ended = s.connection.set_protocol_features(u64::MAX);
        },
        "not offered",
    ),
];

/// An eventfd that lives as long as the process.
fn s_event() -> &'static Event {
    static EVENT: std::sync::OnceLock<Event> = std::sync::OnceLock::new();
    EVENT.get_or_init(|| Event::new().unwrap())
}

fn kick(session: &mut Session, number: u32, fd: &impl AsFd) {
    send_with(session, number, &1_u64.to_le_bytes(), fd);
}
