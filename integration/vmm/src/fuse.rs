//! A FUSE client over the queues: what the guest's kernel is to a virtio-fs server.
//!
//! A [`Client`] encodes requests, lays them out in guest memory, and checks the replies. It caches
//! nothing and counts no lookups: each method is one request. The invariant: a reply is returned
//! only if its header's `unique` is the request's and its `len` is the used length.

mod attributes;
mod directories;
mod entries;
mod error;
mod files;
mod layout;
mod prepared;
mod requests;
pub mod wire;

pub use directories::{DirEntry, DirEntryPlus};
pub use error::{Errno, FuseError};
pub use files::Handle;
pub use layout::{Cut, Layout};
pub use prepared::Prepared;
pub use requests::{Call, Pending, Reply};

use std::collections::HashMap;
use std::time::Duration;

use zerocopy::IntoBytes;

use crate::memory::Memory;
use crate::ring::Queue;
use crate::session::Session;
use layout::Pool;
use requests::InFlight;
use wire::{InitIn, InitOut, init, opcode};

/// The nodeid of the root.
pub const ROOT: u64 = 1;

/// How long a reply may take unless [`Client::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a client needs of a guest.
pub trait Guest {
    /// The guest's memory, to put buffers into.
    fn memory(&self) -> &Memory;
    /// The queues: the first is the high-priority one, unless it is the only one.
    fn queues(&mut self) -> &mut [Queue];
}

impl Guest for Session {
    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }
}

impl<G: Guest> Guest for &mut G {
    fn memory(&self) -> &Memory {
        (**self).memory()
    }

    fn queues(&mut self) -> &mut [Queue] {
        (**self).queues()
    }
}

/// One queue of a session for one thread: all requests go over it.
#[derive(Debug)]
pub struct Lane {
    /// The session's memory.
    pub memory: Memory,
    /// The queue, taken out of [`Session::queues`].
    pub queue: Queue,
}

impl Guest for Lane {
    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn queues(&mut self) -> &mut [Queue] {
        std::slice::from_mut(&mut self.queue)
    }
}

/// The caller that requests name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process.
    pub pid: u32,
}

/// Stands for no user and no group (`FUSE_INVALID_UIDGID`): the caller's id, if Linux doesn't
/// tell it.
pub const NO_ID: u32 = u32::MAX;

/// A FUSE client.
#[derive(Debug)]
pub struct Client<G> {
    guest: G,
    pool: Pool,
    in_flight: HashMap<u64, InFlight>,
    last_unique: u64,
    queue: usize,
    credentials: Credentials,
    umask: u32,
    layout: Layout,
    timeout: Duration,
    init: Option<InitOut>,
}

impl<G: Guest> Client<G> {
    /// A client over this guest's queues: `Client::new(&mut session)`, or `Client::new(session)`
    /// for one that owns it. Nothing is sent.
    pub fn new(mut guest: G) -> Self {
        let queue = usize::from(guest.queues().len() > 1);
        Self {
            guest,
            pool: Pool::new(),
            in_flight: HashMap::new(),
            last_unique: 0,
            queue,
            credentials: Credentials::default(),
            umask: 0o022,
            layout: Layout::default(),
            timeout: DEFAULT_TIMEOUT,
            init: None,
        }
    }

    /// The session that the client uses.
    pub fn guest(&mut self) -> &mut G {
        &mut self.guest
    }

    /// Gives the guest back. Requests in flight are forgotten here.
    pub fn into_guest(self) -> G {
        self.guest
    }

    /// Sends requests over queue `queue` from now on; 1 at first. What the high-priority queue is
    /// for goes there all the same.
    pub fn use_queue(&mut self, queue: usize) {
        self.queue = queue;
    }

    /// Makes requests in this user's name from now on; root's at first.
    pub fn act_as(&mut self, uid: u32, gid: u32) {
        self.credentials = Credentials {
            uid,
            gid,
            ..self.credentials
        };
    }

    /// Names this process in requests from now on.
    pub fn set_pid(&mut self, pid: u32) {
        self.credentials.pid = pid;
    }

    /// The umask sent with what makes files from now on; 022 at first.
    pub fn set_umask(&mut self, umask: u32) {
        self.umask = umask;
    }

    /// Lays requests out like this from now on.
    pub fn set_layout(&mut self, layout: Layout) {
        self.layout = layout;
    }

    /// How long a reply may take from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// INIT, with all that Linux 6.18 offers on virtio-fs but SECURITY_CTX, which would change
    /// what CREATE and the like carry.
    ///
    /// # Errors
    /// [`FuseError`].
    pub fn init(&mut self) -> Result<InitOut, FuseError> {
        self.init_offering(LINUX_OFFERS)
    }

    /// INIT with these flags of [`wire::init`].
    ///
    /// # Errors
    /// [`FuseError`].
    pub fn init_offering(&mut self, flags: u64) -> Result<InitOut, FuseError> {
        let (major, minor) = wire::VERSION;
        self.init_with(&InitIn {
            major,
            minor,
            max_readahead: 128 << 10,
            flags: low(flags),
            flags2: low(flags >> 32),
            unused: [0; 11],
        })
    }

    /// INIT with anything.
    ///
    /// # Errors
    /// [`FuseError`].
    pub fn init_with(&mut self, asked: &InitIn) -> Result<InitOut, FuseError> {
        let call = Call::new(opcode::INIT, 0);
        let reply = self.request(call.arg(asked.as_bytes()).reply_of::<InitOut>())?;
        let init = reply.value()?;
        self.init = Some(init);
        Ok(init)
    }

    /// Whether INIT has agreed on all these flags of [`wire::init`].
    #[must_use]
    pub fn has(&self, flags: u64) -> bool {
        let agreed = self.init.map_or(0, |init| {
            u64::from(init.flags) | u64::from(init.flags2) << 32
        });
        agreed & flags == flags
    }

    /// The longest WRITE that INIT has agreed on; 4096 before.
    #[must_use]
    pub fn max_write(&self) -> u32 {
        self.init.map_or(4096, |init| init.max_write)
    }

    /// DESTROY. A chain that is returned empty counts as a reply, as in Linux:
    /// virtiofsd does not write one.
    ///
    /// # Errors
    /// [`FuseError`].
    pub fn destroy(&mut self) -> Result<(), FuseError> {
        match self.request(Call::new(opcode::DESTROY, 0).reply(0)) {
            Ok(_) | Err(FuseError::Empty { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// What Linux 6.18 offers, as [`Client::init`] says.
pub const LINUX_OFFERS: u64 = init::ASYNC_READ
    | init::POSIX_LOCKS
    | init::ATOMIC_O_TRUNC
    | init::EXPORT_SUPPORT
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::SPLICE_WRITE
    | init::SPLICE_MOVE
    | init::SPLICE_READ
    | init::FLOCK_LOCKS
    | init::HAS_IOCTL_DIR
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::WRITEBACK_CACHE
    | init::NO_OPEN_SUPPORT
    | init::PARALLEL_DIROPS
    | init::HANDLE_KILLPRIV
    | init::POSIX_ACL
    | init::ABORT_ERROR
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::NO_OPENDIR_SUPPORT
    | init::EXPLICIT_INVAL_DATA
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::CREATE_SUPP_GROUP
    | init::HAS_EXPIRE_ONLY
    | init::DIRECT_IO_ALLOW_MMAP
    | init::NO_EXPORT_SUPPORT
    | init::HAS_RESEND
    | init::ALLOW_IDMAP
    | init::REQUEST_TIMEOUT;

/// The lower half.
fn low(flags: u64) -> u32 {
    u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
