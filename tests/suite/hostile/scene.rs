//! A server, a session on it, and requests that are put on the ring by hand.

use std::fmt;

use testing::{Server, TIMEOUT};
use vmm::fuse::wire::{InHeader, OutHeader, opcode};
use vmm::fuse::{Client, ROOT};
use vmm::ring::Descriptor;
use vmm::{Gpa, Memory, Options, Profile, Queue, Region, Session};
use zerocopy::{FromBytes, IntoBytes};

/// `Descriptor::NEXT`, `WRITE` and `INDIRECT`, for short.
pub const NEXT: u16 = Descriptor::NEXT;
pub const WRITE: u16 = Descriptor::WRITE;
pub const INDIRECT: u16 = Descriptor::INDIRECT;

/// Bytes of a request's header, and of a reply's.
pub const IN: usize = 40;
pub const OUT: u32 = 16;

/// Two regions that touch, then a hole, then a third.
pub const LOW: u64 = 0;
pub const BORDER: u64 = 8 << 20;
pub const HOLE: u64 = 16 << 20;
pub const HIGH: u64 = 4 << 30;
pub const END: u64 = HIGH + (16 << 20);

/// The number that requests made by hand have.
const UNIQUE: u64 = 0x1234_5678_9abc;

/// What a chain comes back with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Back {
    /// Nothing was written.
    Empty,
    /// A reply with this errno.
    Errno(i32),
    /// A reply of this many bytes behind the header.
    Reply(u32),
}

impl fmt::Debug for Back {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("Empty"),
            Self::Errno(errno) => {
                let error = std::io::Error::from_raw_os_error(*errno);
                write!(f, "Errno({errno}: {error})")
            }
            Self::Reply(len) => write!(f, "Reply({len})"),
        }
    }
}

/// A session whose driver is hostile.
pub struct Scene {
    pub server: Server,
    pub fs: Client<Session>,
    /// Descriptors of queue 1 that are written by hand.
    pub own: Vec<u16>,
    /// Where requests are laid, a region of 64 KiB and more in each of the three.
    pub request: Gpa,
    pub reply: Gpa,
}

/// Guest memory as above.
pub fn memory() -> Options {
    Options::default().queue_size(64).memory(&[
        Region::new(LOW, BORDER),
        Region::new(BORDER, HOLE - BORDER),
        Region::new(HIGH, END - HIGH),
    ])
}

impl Scene {
    pub fn new(runtime: &str) -> Self {
        Self::with(runtime, &[], &memory())
    }

    pub fn with(runtime: &str, args: &[&str], options: &Options) -> Self {
        let args = [&["--runtime", runtime], args].concat();
        let server = Server::start(&args);
        std::fs::write(server.share().join("file"), "content").unwrap();
        std::fs::create_dir(server.share().join("dir")).unwrap();
        Self::on(server, options)
    }

    /// A session on a server that is there.
    pub fn on(server: Server, options: &Options) -> Self {
        let mut fs = server.session(Profile::Simple, options);
        let own = (0..16).map(|_| queue(&mut fs).reserve().unwrap()).collect();
        let memory = fs.guest().memory.clone();
        let request = memory.alloc_in(2, 1 << 20, 4096).unwrap();
        let reply = memory.alloc_in(2, 1 << 20, 4096).unwrap();
        Self {
            server,
            fs,
            own,
            request,
            reply,
        }
    }

    pub fn memory(&mut self) -> Memory {
        self.fs.guest().memory.clone()
    }

    pub fn queue(&mut self) -> &mut Queue {
        queue(&mut self.fs)
    }

    /// Lays a request with a right header down; answers its length.
    pub fn lay(&mut self, opcode: u32, node: u64, args: &[u8]) -> u32 {
        let bytes = request(opcode, node, args);
        let at = self.request;
        self.memory().write(at, &bytes).unwrap();
        bytes.len() as u32
    }

    /// A GETATTR of the root.
    pub fn lay_good(&mut self) -> u32 {
        self.lay(opcode::GETATTR, ROOT, &[0; 16])
    }

    /// Writes descriptors into `own`, from the first on; `next` counts in `own`.
    pub fn write(&mut self, descriptors: &[Descriptor]) {
        let own = self.own.clone();
        for (at, descriptor) in descriptors.iter().enumerate() {
            let next = own.get(usize::from(descriptor.next)).copied();
            let next = next.unwrap_or(descriptor.next);
            let descriptor = Descriptor {
                next,
                ..*descriptor
            };
            self.queue().write_desc(own[at], descriptor);
        }
    }

    /// Makes a head available and waits until it comes back.
    pub fn push(&mut self, head: u16) -> Back {
        let reply = self.reply;
        let blank = [0xee; 256];
        self.memory().write(reply, &blank).unwrap();
        let queue = self.queue();
        queue.push_head(head);
        queue.kick_always().unwrap();
        queue.wait(TIMEOUT).expect("the chain is stuck");
        let (id, len) = queue.pop_raw().unwrap().unwrap();
        assert_eq!(id, u32::from(head), "another chain came back");
        self.look(len)
    }

    /// As [`push`](Self::push), for the first of `own`, of `descriptors`.
    pub fn chain(&mut self, descriptors: &[Descriptor]) -> Back {
        self.write(descriptors);
        self.push(self.own[0])
    }

    /// What lies at `reply`, `len` bytes having been written.
    fn look(&mut self, len: u32) -> Back {
        if len == 0 {
            return Back::Empty;
        }
        let header = self.memory().read_vec(self.reply, 16).unwrap();
        let header = OutHeader::read_from_bytes(&header).unwrap();
        if header.unique != UNIQUE {
            // Replies that were directed elsewhere are looked at by the case itself.
            return Back::Reply(len);
        }
        assert_eq!(header.len, len, "a reply says how long it is");
        match header.error {
            0 => Back::Reply(len - OUT),
            error => Back::Errno(-error),
        }
    }

    /// One request, in one piece, with much room.
    pub fn request(&mut self, bytes: &[u8]) -> Back {
        self.request_with_room(bytes, 0x1000)
    }

    pub fn request_with_room(&mut self, bytes: &[u8], room: u32) -> Back {
        let (request, reply) = (self.request, self.reply);
        self.memory().write(request, bytes).unwrap();
        let mut descriptors = vec![readable(request, bytes.len() as u32)];
        if room != 0 {
            descriptors[0].flags = NEXT;
            descriptors[0].next = 1;
            descriptors.push(writable(reply, room));
        }
        self.chain(&descriptors)
    }

    /// The session is served.
    pub fn is_well(&mut self, after: &str) {
        let root = self.fs.getattr(ROOT);
        assert!(root.is_ok(), "after {after}: {root:?}");
        let file = self.fs.lookup(ROOT, c"file");
        let file = file.unwrap_or_else(|error| panic!("after {after}: {error}"));
        self.fs.forget(file.nodeid, 1).unwrap();
    }

    /// How many chains the server has found faulty since this was last asked.
    pub fn faulty(&mut self) -> u32 {
        let bases = self.fs.guest().stop().unwrap();
        let line = self.totals_of_stopped();
        self.fs.guest().restart(&bases).unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let at = words.iter().position(|word| *word == "faulty,").unwrap();
        words[at - 1].parse().unwrap()
    }

    /// Stops the queues, and answers the server's line on queue 1.
    pub fn totals(&mut self) -> String {
        self.fs.guest().stop().unwrap();
        self.totals_of_stopped()
    }

    fn totals_of_stopped(&mut self) -> String {
        loop {
            let line = self.server.wait_for("chains returned");
            if line.contains("queue 1: ") {
                return line;
            }
        }
    }
}

fn queue(fs: &mut Client<Session>) -> &mut Queue {
    &mut fs.guest().queues[1]
}

/// A request's bytes with a header that is right.
pub fn request(opcode: u32, node: u64, args: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: (IN + args.len()) as u32,
        opcode,
        unique: UNIQUE,
        nodeid: node,
        ..InHeader::default()
    };
    [header.as_bytes(), args].concat()
}

/// A descriptor of bytes for the server to read, the last of its chain.
pub fn readable(at: Gpa, len: u32) -> Descriptor {
    Descriptor {
        addr: at.0,
        len,
        flags: 0,
        next: 0,
    }
}

/// A descriptor of room for the server to write to, the last of its chain.
pub fn writable(at: Gpa, len: u32) -> Descriptor {
    Descriptor {
        flags: WRITE,
        ..readable(at, len)
    }
}

/// The same, with the chain going on.
pub fn then(descriptor: Descriptor, next: u16) -> Descriptor {
    Descriptor {
        flags: descriptor.flags | NEXT,
        next,
        ..descriptor
    }
}
