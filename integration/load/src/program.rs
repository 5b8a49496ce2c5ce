//! What a slot does: the requests of one operation, one after the other.
//!
//! A [`Program`] keeps its requests prepared in guest memory and patches what changes. It knows
//! nothing of queues and of time. The invariant: one request of a program is in flight at a time,
//! and neither `begin` nor `reply` allocates.

mod attributes;
mod data;
mod files;
mod listing;
mod mixed;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm::Memory;
use vmm::fuse::wire::InHeader;
use vmm::fuse::{Call, Client, FuseError, Guest, Prepared};
use vmm::ring::RingError;

use crate::forgets::Forgets;
use crate::scene::Scene;
use crate::share::{COLD_FILES, KNOWN_FILES};
use crate::spec::{Kind, PAGE, Spec};
pub(crate) use attributes::{Getattr, Lookup, Revalidate};
pub(crate) use data::{Read, Write, Written};
pub(crate) use files::{Create, Visit};
pub(crate) use listing::Listing;
pub(crate) use mixed::Mixed;

/// Why a case fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The server refused a request, or broke the protocol.
    #[error("a request failed")]
    Request(#[from] FuseError),
    /// The ring failed, or nothing was returned in time.
    #[error("a queue failed")]
    Queue(#[from] RingError),
    /// A chain came back that is not ours.
    #[error("chain {0:#x} was returned and is not of this queue")]
    Stray(u64),
    /// A transfer was shorter than asked for.
    #[error("{done} bytes of {asked} were transferred at offset {offset}")]
    Short { offset: u64, asked: u32, done: u32 },
    /// A file does not contain what it should.
    #[error("the content at offset {offset} is wrong")]
    Content { offset: u64 },
    /// A name led to another file, or to no file.
    #[error("name number {number} led to node {found} instead of {wanted}")]
    Node {
        number: u32,
        found: u64,
        wanted: u64,
    },
    /// The listing of a directory was wrong.
    #[error("{found} entries were listed instead of {wanted}, of which {known} by their names")]
    Listing { found: u32, wanted: u32, known: u32 },
    /// The mix has no requests.
    #[error("the mix is empty")]
    Mix,
    /// An entry does not fit in its reply, or its name doesn't exist.
    #[error("entry number {0} of a listing is wrong")]
    Entry(u32),
}

/// A returned chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Returned {
    /// The request's number.
    pub(crate) unique: u64,
    /// Bytes that the server says it has written.
    pub(crate) used: u32,
}

/// One operation after the other.
pub(crate) trait Program: Send {
    /// Begins an operation: its first request.
    fn begin(&mut self) -> Result<&Prepared, Failure>;

    /// Takes a completion. Returns the operation's next request, or none if it is done.
    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure>;
}

/// The offset of the node id in a request.
const NODEID: usize = offset_of!(InHeader, nodeid);
/// The offset of the arguments in a request, and of the data in a reply.
const ARGUMENTS: usize = Prepared::ARGUMENTS;
const BODY: usize = 16;

/// Options of all cases.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    pub(crate) verify: bool,
    pub(crate) flush: bool,
    /// Ask for `security.capability` before each write, unless the server replies that it has no
    /// extended attributes.
    pub(crate) capabilities: bool,
}

/// Makes the programs of a case's slots.
pub(crate) struct Builder<'a, G> {
    /// Prepares the requests.
    pub(crate) client: Client<G>,
    pub(crate) memory: Memory,
    pub(crate) scene: &'a Scene,
    pub(crate) spec: Spec,
    pub(crate) manner: Manner,
    /// Pages that were written, if that is verified.
    pub(crate) written: Option<Arc<Written>>,
    cursor: Arc<AtomicU64>,
    /// The number of the next slot.
    slot: u32,
}

impl<'a, G: Guest> Builder<'a, G> {
    /// Makes the programs of this case.
    pub(crate) fn new(
        client: Client<G>,
        memory: Memory,
        scene: &'a Scene,
        spec: Spec,
        manner: Manner,
    ) -> Self {
        let writes = matches!(spec.kind, Kind::Data(transfer) if transfer.write);
        let pages = scene.file_size / u64::from(PAGE);
        Self {
            client,
            memory,
            scene,
            spec,
            manner,
            written: (manner.verify && writes).then(|| Arc::new(Written::new(pages))),
            cursor: Arc::default(),
            slot: 0,
        }
    }

    /// The next slot's program.
    pub(crate) fn build(&mut self) -> Result<Box<dyn Program>, Failure> {
        self.slot += 1;
        Ok(match self.spec.kind {
            Kind::Getattr | Kind::Idle => Box::new(self.getattr()?),
            Kind::Chmod => Box::new(Getattr::chmod(self)?),
            Kind::Lookup => Box::new(Lookup::known(self)?),
            Kind::Revalidate => Box::new(Revalidate::new(self)?),
            Kind::LookupNew => Box::new(Lookup::new_names(self)?),
            Kind::LookupAbsent => Box::new(Lookup::absent(self)?),
            Kind::Data(transfer) if transfer.write => Box::new(Write::new(self, transfer)?),
            Kind::Data(transfer) => Box::new(Read::new(self, transfer)?),
            Kind::Create => Box::new(Create::new(self)?),
            Kind::OpenReadClose => Box::new(Visit::known(self, libc::O_RDONLY)?),
            Kind::OpenRwClose => Box::new(Visit::known(self, libc::O_RDWR)?),
            Kind::Cold => Box::new(Visit::cold(self)?),
            Kind::Readdirplus => Box::new(Listing::new(self)?),
            Kind::ListLookup => Box::new(Listing::with_lookups(self)?),
            Kind::Mixed => Box::new(Mixed::hundred(self)?),
            Kind::VmLike => Box::new(Mixed::recorded(self)?),
        })
    }

    fn getattr(&mut self) -> Result<Getattr, Failure> {
        Getattr::new(self)
    }

    fn prepare(&mut self, call: &Call<'_>) -> Result<Prepared, Failure> {
        Ok(self.client.prepare(call)?)
    }

    fn slot(&self) -> u64 {
        self.slot.into()
    }

    /// Small files in turn, over all slots, so that no two slots use the same one.
    fn turns(&self) -> Turns {
        Turns {
            cursor: Arc::clone(&self.cursor),
            count: u64::from(COLD_FILES),
        }
    }
}

/// Numbers in turn.
#[derive(Debug)]
struct Turns {
    cursor: Arc<AtomicU64>,
    count: u64,
}

impl Turns {
    fn next(&self) -> u64 {
        // Relaxed: only the number itself matters.
        self.cursor.fetch_add(1, Ordering::Relaxed) % self.count
    }

    fn next_file(&self) -> u32 {
        u32::try_from(self.next()).unwrap_or(0)
    }
}

/// Reads a value from a reply, `at` bytes after its header.
fn read_u64(request: &Prepared, at: usize) -> Result<u64, FuseError> {
    let mut bytes = [0; 8];
    request.read_reply(BODY + at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// How many items a case's operation has: the entries of a listing.
pub(crate) fn items(kind: Kind) -> u32 {
    match kind {
        Kind::Readdirplus | Kind::ListLookup => COLD_FILES,
        _ => 1,
    }
}

/// Bytes that a case's operation transfers.
pub(crate) fn bytes(spec: Spec) -> u32 {
    match spec.kind {
        Kind::Data(_) => spec.size,
        Kind::OpenReadClose | Kind::OpenRwClose | Kind::Cold => crate::share::SMALL,
        _ => 0,
    }
}

const _: () = assert!(KNOWN_FILES > 128, "slots should rarely use the same file");
