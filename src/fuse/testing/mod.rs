//! Test doubles for this module: requests as a guest would write them, a transport in memory, and a
//! file system with one directory.
//!
//! They do no I/O except on one anonymous file in memory, because data operations need a
//! descriptor.

mod one_directory;
mod samples;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::{InHeader, InitFlags, InitIn, Opcode, OutHeader};
use super::{OUT_HEADER_LEN, Outcome, RecordedIntent, Session, SessionOptions, Transport};
use crate::io::GuestBuffer;

pub(super) use one_directory::{HANDLE, OneDirectory, attributes};
pub(super) use samples::samples;

/// The number of every request created here.
pub(super) const UNIQUE: u64 = 0x5eed;

/// Encodes a request with `arguments`, on `node`.
pub(super) fn request(opcode: u32, node: u64, arguments: &[&[u8]]) -> Vec<u8> {
    let arguments = arguments.concat();
    let header = InHeader {
        len: u32::try_from(size_of::<InHeader>() + arguments.len()).unwrap(),
        opcode,
        unique: UNIQUE,
        nodeid: node,
        uid: 1000,
        gid: 100,
        pid: 42,
        total_extlen: 0,
        padding: 0,
    };
    [header.as_bytes(), &arguments].concat()
}

/// Encodes a request for `opcode`, on the root.
pub(super) fn on_root(opcode: Opcode, arguments: &[&[u8]]) -> Vec<u8> {
    request(opcode.number(), 1, arguments)
}

/// The result of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// A reply of these bytes.
    Reply(Vec<u8>),
    /// A header, and this many bytes in place behind it.
    Filled(Vec<u8>, usize),
    /// No reply.
    Nothing,
    /// The transport was dropped.
    Dropped,
}

impl Ending {
    /// The reply's body.
    pub(super) fn body(&self) -> &[u8] {
        let Self::Reply(bytes) = self else {
            panic!("no reply: {self:?}")
        };
        assert_eq!(self.header().error, 0, "an error");
        &bytes[OUT_HEADER_LEN..]
    }

    /// The reply's body as a structure, whose length it must have.
    pub(super) fn structure<T: FromBytes + Immutable>(&self) -> T {
        T::read_from_bytes(self.body()).expect("a reply of the structure's length")
    }

    /// The errno, 0 for none. Also checks the header.
    pub(super) fn errno(&self) -> i32 {
        -self.header().error
    }

    fn header(&self) -> OutHeader {
        let (bytes, len) = match self {
            Self::Reply(bytes) => (bytes, bytes.len()),
            Self::Filled(bytes, filled) => (bytes, bytes.len() + filled),
            _ => panic!("no reply: {self:?}"),
        };
        let (header, _) = OutHeader::read_from_prefix(bytes).unwrap();
        assert_eq!(
            usize::try_from(header.len).unwrap(),
            len,
            "the header's length"
        );
        assert_eq!(header.unique, UNIQUE, "the header's request");
        header
    }
}

/// A transport in memory.
pub(super) struct MemoryTransport {
    request: Vec<u8>,
    at: usize,
    room: usize,
    previous_attempt: Option<RecordedIntent>,
    recorded_intent: Option<RecordedIntent>,
    ending: Rc<RefCell<Option<Ending>>>,
}

impl MemoryTransport {
    /// A transport of a request that a previous process began, with this intent.
    pub(super) fn with_previous_attempt(intent: RecordedIntent) -> Self {
        let (mut transport, _) = Self::new(Vec::new(), 0);
        transport.previous_attempt = Some(intent);
        transport
    }

    /// The intent that this process recorded.
    pub(super) fn recorded_intent(&self) -> Option<RecordedIntent> {
        self.recorded_intent
    }

    pub(super) fn new(request: Vec<u8>, room: usize) -> (Self, Rc<RefCell<Option<Ending>>>) {
        let ending = Rc::new(RefCell::new(None));
        (
            Self {
                request,
                at: 0,
                room,
                previous_attempt: None,
                recorded_intent: None,
                ending: Rc::clone(&ending),
            },
            ending,
        )
    }

    fn end(&self, ending: Ending) {
        let before = self.ending.borrow_mut().replace(ending);
        assert_eq!(before, None, "replied twice");
    }
}

impl Transport for MemoryTransport {
    fn record_intent(&mut self, intent: RecordedIntent) {
        self.recorded_intent = Some(intent);
    }

    fn previous_attempt(&self) -> Option<RecordedIntent> {
        self.previous_attempt
    }

    fn readable(&self) -> usize {
        self.request.len() - self.at
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        let n = self.readable().min(into.len());
        into[..n].copy_from_slice(&self.request[self.at..self.at + n]);
        self.at += n;
        n
    }

    fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        let bytes = self.request.get(self.at..)?.get(..len)?.to_vec();
        self.at += len;
        Some(GuestBuffer::from_vec(bytes))
    }

    fn writable(&self) -> usize {
        self.room
    }

    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer> {
        (OUT_HEADER_LEN + len <= self.room).then(|| GuestBuffer::from_vec(vec![0; len]))
    }

    fn reply(self, parts: &[&[u8]]) {
        let bytes = parts.concat();
        let fits = bytes.len() <= self.room;
        self.end(if fits {
            Ending::Reply(bytes)
        } else {
            Ending::Nothing
        });
    }

    fn reply_filled(self, header: &[u8; OUT_HEADER_LEN], filled: usize) {
        assert!(OUT_HEADER_LEN + filled <= self.room);
        self.end(Ending::Filled(header.to_vec(), filled));
    }

    fn no_reply(self) {
        self.end(Ending::Nothing);
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        self.ending.borrow_mut().get_or_insert(Ending::Dropped);
    }
}

/// A guest of a session with a [`OneDirectory`].
pub(super) struct Guest {
    pub(super) session: Arc<Session<OneDirectory>>,
}

impl Guest {
    /// A guest whose session waits for INIT.
    pub(super) fn new() -> Self {
        Self::with_options(SessionOptions::default())
    }

    pub(super) fn with_options(options: SessionOptions) -> Self {
        Self {
            session: Arc::new(Session::new(Arc::default(), options)),
        }
    }

    /// A guest whose session has begun.
    pub(super) fn ready() -> Self {
        let guest = Self::new();
        let reply = guest.serve(init_of(7, 41, InitFlags::INIT_EXT), 4096);
        assert_eq!(reply.errno(), 0);
        guest
    }

    pub(super) fn fs(&self) -> &OneDirectory {
        self.session.file_system()
    }

    /// Serves a request with `room` for the reply, which must be sent at once.
    pub(super) fn serve(&self, request: Vec<u8>, room: usize) -> Ending {
        let (transport, ending) = MemoryTransport::new(request, room);
        let outcome = self.session.serve(transport);
        assert!(matches!(outcome, Outcome::Done), "deferred");
        ending.take().expect("an answer")
    }

    /// Serves a request whose reply must be deferred.
    pub(super) fn serve_deferred(&self, request: Vec<u8>, room: usize) -> Ending {
        let (transport, ending) = MemoryTransport::new(request, room);
        let Outcome::Later(future) = self.session.serve(transport) else {
            panic!("replied at once");
        };
        assert_eq!(*ending.borrow(), None, "replied before it was done");
        let runtime = crate::io::Runtime::new(crate::io::Engine::ThreadPool).unwrap();
        runtime.block_on(future);
        ending.take().expect("an answer")
    }
}

/// Encodes INIT as a kernel of this version sends it.
pub(super) fn init_of(major: u32, minor: u32, flags: InitFlags) -> Vec<u8> {
    let (flags, flags2) = flags.halves();
    let init = InitIn {
        major,
        minor,
        max_readahead: 131_072,
        flags,
        flags2,
        unused: [0; 11],
    };
    let bytes = init.as_bytes();
    let len = if minor < 36 { 16 } else { bytes.len() };
    request(Opcode::Init.number(), 0, &[&bytes[..len]])
}

/// Sets the length in the header to `len` bytes.
pub(super) fn claim_len(request: &mut [u8], len: usize) {
    request[..4].copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
}
