//! A session: one guest kernel's use of one file system, from INIT to DESTROY.
//!
//! [`Session::serve`] decodes, dispatches and answers a request. Metadata operations are answered
//! at once; an operation that may wait becomes a future. The invariant: no request takes effect
//! whose reply can't be delivered, so no lookup is counted and no handle opened that the guest
//! doesn't learn of.

mod blocking;
mod blocking_locks;
mod data;
mod inode_flags;
mod locks;
mod mapping;
mod metadata;
mod migration;
mod object_locks;
mod reclaim;
mod replay;
mod session_barrier;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::io::Errno;

pub(crate) use self::reclaim::Queues;

use self::blocking_locks::BlockingLocks;
use self::reclaim::is_shortage;
use self::session_barrier::{ClosedBarrier, SessionBarrier};
use super::FileWatch;
use super::abi::{Handler, InitFlags, InitIn, OpenOut};
use super::dax_marks::KnownNames;
use super::init::{Agreement, negotiate, our_version};
use super::reply::{Answer, open_out, send_error};
use super::request::{
    DecodeError, HEADER_LEN, Operation, Request, bytes_wanted, decode_as, inaccessible,
};
use super::{Counters, Negotiated, OUT_HEADER_LEN, SessionOptions, Transport};
use crate::dax::Window;
use crate::fs::{FileSystem, NegotiatedTerms, NodeId, Opened, waiting};
use crate::metrics::{Registry, SessionState};
use crate::state::{Agreement as AgreementWords, Table};

/// Longest request that is copied to a small buffer. It has room for every request without a name,
/// and for those with a name of usual length; a larger buffer takes time to clear.
const SMALL: usize = 128;

/// Longest request that is copied to the stack: a RENAME2 with two names of 255 bytes.
const INLINE: usize = 568;

/// The outcome of [`Session::serve`].
#[must_use = "a request left for later is answered only if its future is run"]
pub enum Outcome {
    /// The request is answered.
    Done,
    /// This future will answer the request. It must run to completion, because the kernel may be
    /// writing to the guest's memory for it. It belongs to the thread's own runtime.
    Later(Pin<Box<dyn Future<Output = ()>>>),
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "Done",
            Self::Later(_) => "Later",
        })
    }
}

/// Serves the requests of one guest from a file system. Many threads may share it.
#[derive(Debug)]
pub struct Session<F: ?Sized> {
    options: SessionOptions,
    /// Whether INIT was answered. A request that another thread serves follows the reply to INIT,
    /// so the guest's memory orders the two. `Acquire` still pairs with the `Release` in `init`, so
    /// that the effects of `FileSystem::reset` are visible too.
    ready: AtomicBool,
    /// The flags of `negotiated`, for requests that depend on them. Set before `ready`.
    agreed: AtomicU64,
    negotiated: Mutex<Option<Negotiated>>,
    /// How many sessions have ended. Written only while the barrier is closed and read only inside
    /// it, so `Relaxed` suffices.
    ended: AtomicU64,
    counters: Counters,
    /// Entered by each request while it is served. A session begins or ends only while no request
    /// is inside.
    barrier: SessionBarrier,
    blocking_locks: Arc<BlockingLocks>,
    /// Serves the queues that requests arrive on, if there are any.
    queues: OnceLock<Box<dyn Queues>>,
    /// Whether the warning about submounts was logged.
    submounts_warned: AtomicBool,
    /// Where the negotiated parameters are recorded for a process that takes over.
    table: Option<Arc<Table>>,
    /// Counts requests by file, if it is on.
    file_watch: Option<Arc<FileWatch>>,
    /// The DAX window, if there is one.
    window: Option<Arc<Window>>,
    /// The nodes whose names have decided whether they are marked for DAX.
    known_names: KnownNames,
    /// The server's counters, if it has some.
    metrics: Option<Arc<Registry>>,
    fs: Arc<F>,
}

impl<F: FileSystem + ?Sized> Session<F> {
    /// Creates a session that waits for INIT.
    pub fn new(fs: Arc<F>, mut options: SessionOptions) -> Self {
        if options.dax.is_some() && !fs.maps_files() {
            log::warn!("the files of this file system can't be mapped: there is no DAX");
            options.dax = None;
        }
        Self {
            options,
            ready: AtomicBool::new(false),
            agreed: AtomicU64::new(0),
            negotiated: Mutex::new(None),
            ended: AtomicU64::new(0),
            counters: Counters::default(),
            barrier: SessionBarrier::default(),
            blocking_locks: Arc::default(),
            queues: OnceLock::new(),
            submounts_warned: AtomicBool::new(false),
            table: None,
            file_watch: None,
            window: None,
            known_names: KnownNames::default(),
            metrics: None,
            fs,
        }
    }

    /// Lets `watch` count requests by file.
    #[must_use]
    pub(crate) fn watched_by(mut self, watch: Arc<FileWatch>) -> Self {
        self.file_watch = Some(watch);
        self
    }

    /// Records the negotiated parameters and the mappings of the DAX window in `table`. If the table
    /// has some already, the session resumes with them.
    #[must_use]
    pub fn remembering(mut self, table: Arc<Table>) -> Self {
        if let Some(agreement) = table.agreement() {
            self.agree(Negotiated::from_words(agreement));
        }
        self.window = (self.options.dax.as_ref()).map(|dax| Window::new(dax, Arc::clone(&table)));
        self.table = Some(table);
        self
    }

    /// The file system that is served. Each thread that calls [`serve`](Self::serve) must have
    /// called its [`prepare_thread`](FileSystem::prepare_thread) once.
    pub fn file_system(&self) -> &Arc<F> {
        &self.fs
    }

    /// The negotiated parameters; `None` before INIT and after DESTROY.
    pub fn negotiated(&self) -> Option<Negotiated> {
        *self
            .negotiated
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports to `metrics`, and so do the workers that serve the session.
    #[must_use]
    pub(crate) fn reporting_to(mut self, metrics: Arc<Registry>) -> Self {
        self.metrics = Some(metrics);
        self
    }

    /// The counters that the session reports to, if there are any.
    pub(crate) fn metrics(&self) -> Option<&Arc<Registry>> {
        self.metrics.as_ref()
    }

    /// Reports the state of the session, which a VMM is about to use. Later changes are reported as they
    /// happen.
    pub(crate) fn report_state(&self) {
        if let Some(metrics) = &self.metrics {
            metrics.set_session(match self.is_ready() {
                true => SessionState::Mounted,
                false => SessionState::Connected,
            });
        }
    }

    /// The session's counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Ends the session, because the device was reset or the guest is gone. Waits for requests that
    /// other threads are serving.
    pub fn reset(&self) {
        self.end(&self.barrier.close());
    }

    fn end(&self, closed: &ClosedBarrier<'_>) {
        self.clear_agreement(closed);
        self.fs.reset();
    }

    /// Ends the session on the guest's own request (INIT or DESTROY). The same guest may begin
    /// another one.
    fn unmount(&self, closed: &ClosedBarrier<'_>) {
        self.clear_agreement(closed);
        self.fs.unmounted();
    }

    fn clear_agreement(&self, _closed: &ClosedBarrier<'_>) {
        if let Some(window) = &self.window {
            window.discard();
        }
        self.known_names.clear();
        self.ready.store(false, Ordering::Release);
        self.ended.fetch_add(1, Ordering::Relaxed);
        self.record_agreement(None);
        *self
            .negotiated
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        self.blocking_locks.end_all(Errno::INTR);
        self.report_state();
    }

    /// Serves one request: answers it, or returns the future that will.
    pub fn serve<E: Transport>(self: &Arc<Self>, mut transport: E) -> Outcome {
        let mut small = [0; SMALL];
        let fetched = if transport.is_incomplete() {
            let (header, _) = small.split_at_mut(HEADER_LEN);
            let len = transport.read(header);
            Err(inaccessible(header.get(..len).unwrap_or_default()))
        } else {
            fetch(&mut transport, &mut small)
        };
        match fetched {
            Ok(Fetched::Whole(len)) => {
                self.serve_bytes(transport, small.get(..len).unwrap_or_default())
            }
            Ok(Fetched::Header { wanted }) => self.serve_long(transport, &small, wanted),
            Err(error) => {
                self.refuse(transport, &error);
                Outcome::Done
            }
        }
    }

    /// Serves a request of which the header was read, and which is too long for the small buffer.
    #[inline(never)]
    fn serve_long<E: Transport>(
        self: &Arc<Self>,
        mut transport: E,
        small: &[u8],
        wanted: usize,
    ) -> Outcome {
        let (mut inline, mut spilled) = ([0; INLINE], Vec::new());
        let header = small.get(..HEADER_LEN).unwrap_or_default();
        let bytes = fetch_rest(&mut transport, header, wanted, &mut inline, &mut spilled);
        self.serve_bytes(transport, bytes)
    }

    /// Serves the request that `bytes` begin.
    fn serve_bytes<E: Transport>(self: &Arc<Self>, mut transport: E, bytes: &[u8]) -> Outcome {
        let request = match decode_as(bytes, self.agreed()) {
            Ok(request) => request,
            Err(error) => {
                self.refuse(transport, &error);
                return Outcome::Done;
            }
        };
        if request.row.handler == Handler::Session {
            return self.serve_init_or_destroy(transport, &request);
        }
        let _inside = self.barrier.enter();
        transport.note(request.unique);
        if let Some(replay) = self.fs.replay() {
            replay.begin_request(request.unique);
        }
        match request.row.handler {
            Handler::Forget | Handler::Interrupt => {
                self.serve_unanswered(&transport, &request);
                transport.no_reply();
                Outcome::Done
            }
            handler => match self.admit(&request, transport.writable()) {
                Ok(()) => {
                    if let Some(watch) = &self.file_watch
                        && watch.is_on()
                    {
                        watch.count(&request);
                    }
                    self.dispatch(transport, &request, handler, bytes)
                }
                Err(errno) => self.reply_now(transport, request.unique, Err(errno)),
            },
        }
    }

    /// Fails if `request` must not take effect: in this state of the session, or because `room` is
    /// too small for its reply.
    fn admit(&self, request: &Request<'_>, room: usize) -> Result<(), Errno> {
        let needed = request.row.reply.saturating_add(OUT_HEADER_LEN);
        match request.row.handler {
            _ if room < needed => Err(Errno::INVAL),
            Handler::Session => Ok(()),
            _ if !self.is_ready() => Err(Errno::IO),
            Handler::Unserved => Err(Errno::NOSYS),
            _ if request.caller.lacks_ids() && !self.has_agreed(InitFlags::ALLOW_IDMAP) => {
                Err(Errno::INVAL)
            }
            _ => Ok(()),
        }
    }

    /// Dispatches `request`, which was decoded from `bytes`, to its handler.
    fn dispatch<E: Transport>(
        self: &Arc<Self>,
        mut transport: E,
        request: &Request<'_>,
        handler: Handler,
        bytes: &[u8],
    ) -> Outcome {
        match handler {
            Handler::Data => self.data(transport, request),
            Handler::Lock => self.lock(transport, request),
            Handler::Mapping => self.mapping(transport, request),
            Handler::Metadata if self.fs.may_block_at(request.node) => {
                self.metadata_blocking(transport, request.unique, bytes)
            }
            Handler::Metadata
                if matches!(request.operation, Operation::Statfs) && self.may_reclaim() =>
            {
                self.after_reclaim(transport, bytes, (request.unique, Errno::IO))
            }
            Handler::Metadata => {
                let room = transport.writable().saturating_sub(OUT_HEADER_LEN);
                let answer = match transport.previous_attempt() {
                    Some(intent) => self.replay_metadata(request, intent, room),
                    None => {
                        self.record_intent(&mut transport, request);
                        match waiting::forbid(|| self.metadata(request, room)) {
                            Err(waiting::MUST_WAIT) => {
                                return self.metadata_blocking(transport, request.unique, bytes);
                            }
                            Err(errno) if is_shortage(errno) && self.may_reclaim() => {
                                let failed = (request.unique, errno);
                                return self.after_reclaim(transport, bytes, failed);
                            }
                            answer => answer,
                        }
                    }
                };
                self.reply_now(transport, request.unique, answer)
            }
            Handler::Session | Handler::Forget | Handler::Interrupt | Handler::Unserved => {
                self.reply_now(transport, request.unique, Err(Errno::NOSYS))
            }
        }
    }

    /// FORGET, BATCH_FORGET and INTERRUPT.
    fn serve_unanswered<E: Transport>(&self, transport: &E, request: &Request<'_>) {
        match request.operation {
            Operation::Forget { count } => {
                self.forget(transport, request.unique, (request.node, count));
            }
            Operation::BatchForget(forgets) => {
                for forgotten in forgets.iter() {
                    self.forget(transport, request.unique, forgotten);
                }
            }
            // Only requests that may wait for the guest without a limit, such as locks, are
            // interrupted, and those that aren't served yet.
            Operation::Interrupt { unique } => self.interrupt(unique),
            // The opcode table dispatches none of these to this method.
            Operation::Init(_)
            | Operation::Destroy
            | Operation::Lookup { .. }
            | Operation::LookupSelf
            | Operation::LookupParent
            | Operation::Getattr { .. }
            | Operation::Statx { .. }
            | Operation::Setattr { .. }
            | Operation::Readlink
            | Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Unlink { .. }
            | Operation::Rmdir { .. }
            | Operation::Rename { .. }
            | Operation::Link { .. }
            | Operation::Open { .. }
            | Operation::Opendir { .. }
            | Operation::Create { .. }
            | Operation::Tmpfile { .. }
            | Operation::Syncfs
            | Operation::Ioctl { .. }
            | Operation::Read(_)
            | Operation::Write { .. }
            | Operation::Readdir { .. }
            | Operation::Statfs
            | Operation::Release { .. }
            | Operation::Releasedir { .. }
            | Operation::Flush { .. }
            | Operation::Getlk { .. }
            | Operation::Setlk(_)
            | Operation::Fsync { .. }
            | Operation::Setxattr { .. }
            | Operation::Getxattr { .. }
            | Operation::Listxattr { .. }
            | Operation::Removexattr { .. }
            | Operation::Access { .. }
            | Operation::Fallocate { .. }
            | Operation::Lseek { .. }
            | Operation::CopyFileRange(_)
            | Operation::Setupmapping(_)
            | Operation::Removemapping(_)
            | Operation::Unserved => {}
        }
    }

    /// INIT and DESTROY, which never run beside other requests.
    fn serve_init_or_destroy<E: Transport>(&self, transport: E, request: &Request<'_>) -> Outcome {
        let answer =
            self.admit(request, transport.writable())
                .and_then(|()| match request.operation {
                    Operation::Init(init) => self.init(&init),
                    Operation::Destroy => {
                        self.unmount(&self.barrier.close());
                        Ok(Answer::Done)
                    }
                    // The opcode table dispatches none of these to this method.
                    Operation::Interrupt { .. }
                    | Operation::Lookup { .. }
                    | Operation::LookupSelf
                    | Operation::LookupParent
                    | Operation::Forget { .. }
                    | Operation::BatchForget(_)
                    | Operation::Getattr { .. }
                    | Operation::Statx { .. }
                    | Operation::Setattr { .. }
                    | Operation::Readlink
                    | Operation::Symlink { .. }
                    | Operation::Mknod { .. }
                    | Operation::Mkdir { .. }
                    | Operation::Unlink { .. }
                    | Operation::Rmdir { .. }
                    | Operation::Rename { .. }
                    | Operation::Link { .. }
                    | Operation::Open { .. }
                    | Operation::Opendir { .. }
                    | Operation::Create { .. }
                    | Operation::Tmpfile { .. }
                    | Operation::Syncfs
                    | Operation::Ioctl { .. }
                    | Operation::Read(_)
                    | Operation::Write { .. }
                    | Operation::Readdir { .. }
                    | Operation::Statfs
                    | Operation::Release { .. }
                    | Operation::Releasedir { .. }
                    | Operation::Flush { .. }
                    | Operation::Getlk { .. }
                    | Operation::Setlk(_)
                    | Operation::Fsync { .. }
                    | Operation::Setxattr { .. }
                    | Operation::Getxattr { .. }
                    | Operation::Listxattr { .. }
                    | Operation::Removexattr { .. }
                    | Operation::Access { .. }
                    | Operation::Fallocate { .. }
                    | Operation::Lseek { .. }
                    | Operation::CopyFileRange(_)
                    | Operation::Setupmapping(_)
                    | Operation::Removemapping(_)
                    | Operation::Unserved => Err(Errno::NOSYS),
                });
        self.reply_now(transport, request.unique, answer)
    }

    /// INIT. A second one means that the guest has restarted.
    fn init(&self, init: &InitIn) -> Result<Answer, Errno> {
        let closed = self.barrier.close();
        let logs = should_log(self.counters.count_init());
        if self.is_ready() && logs {
            log::info!("the previous session is discarded: the guest sent INIT again");
        }
        self.unmount(&closed);
        match negotiate(init, &self.options) {
            Ok(Agreement::Agreed(negotiated)) => {
                let negotiated = self.accepted_by_file_system(negotiated, logs)?;
                if logs {
                    log::info!("session begins: {negotiated}");
                }
                self.agree(negotiated);
                self.record_agreement(Some(negotiated.words()));
                Ok(Answer::Init(negotiated.reply()))
            }
            Ok(Agreement::NewerMajor) => Ok(Answer::Init(our_version())),
            Err(error) => {
                if logs {
                    log::error!("no session: {error}");
                }
                Err(Errno::PROTO)
            }
        }
    }

    /// Leaves out the flags that the file system doesn't support. `logs` says whether an error is logged.
    fn accepted_by_file_system(
        &self,
        negotiated: Negotiated,
        logs: bool,
    ) -> Result<Negotiated, Errno> {
        let accepted = self
            .fs
            .accept(&terms(negotiated.flags))
            .inspect_err(|errno| {
                if logs {
                    log::error!("no session: the file system can't be used: {errno}");
                }
            })?;
        let flags = negotiated.flags & flags_for(&accepted);
        Ok(Negotiated {
            flags,
            ..negotiated
        })
    }

    fn record_agreement(&self, agreement: Option<AgreementWords>) {
        if let Some(table) = &self.table {
            table.set_agreement(agreement);
        }
    }

    /// Applies the negotiated parameters from now on.
    fn agree(&self, negotiated: Negotiated) {
        *self
            .negotiated
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(negotiated);
        let flags = negotiated.flags;
        self.agreed.store(flags.bits(), Ordering::Relaxed);
        self.fs.begin(&terms(flags));
        self.ready.store(true, Ordering::Release);
        self.report_state();
    }

    fn forget<E: Transport>(&self, transport: &E, unique: u64, (node, count): (NodeId, u64)) {
        self.known_names.forget(node, count);
        match transport.previous_attempt() {
            _ if !self.is_ready() => {}
            Some(_) => self.replay_forget(unique, node, count),
            None => self.fs.forget(node, count),
        }
    }

    /// Whether all of these flags were negotiated.
    fn has_agreed(&self, flags: InitFlags) -> bool {
        self.agreed().contains(flags)
    }

    /// The reply to a request that has opened a file or directory.
    fn open_out(&self, opened: &Opened) -> OpenOut {
        open_out(opened, self.has_agreed(InitFlags::POSIX_LOCKS))
    }

    /// Warns once that the share contains another file system and that the guest can't be told
    /// where it begins.
    fn warn_about_submounts(&self, seen: bool) {
        if seen
            && !self.agreed().contains(InitFlags::SUBMOUNTS)
            && !self.submounts_warned.swap(true, Ordering::Relaxed)
        {
            log::warn!(
                "other file systems are mounted in the shared directory, and the guest's kernel doesn't \
                 support submounts (Linux does since 5.10): files on them may have the same inode \
                 numbers as others, which backup and copy programs take for hard links; unmount \
                 them, or share each separately"
            );
        }
    }

    fn agreed(&self) -> InitFlags {
        InitFlags::from_bits(self.agreed.load(Ordering::Relaxed))
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Sends `answer`.
    fn finish<E: Transport>(&self, transport: E, unique: u64, answer: Result<Answer, Errno>) {
        match answer {
            Ok(answer) => answer.send(transport, unique),
            Err(errno) => {
                send_error(transport, unique, self.guest_errno(errno));
            }
        }
    }

    /// The errno to send to the guest. A shortage of descriptors in the server's process says
    /// nothing about the guest's process.
    fn guest_errno(&self, errno: Errno) -> Errno {
        match errno {
            Errno::MFILE | Errno::NFILE => {
                self.fs.report_shortage();
                Errno::NFILE
            }
            errno => errno,
        }
    }

    /// Answers a request that can't be decoded.
    fn refuse<E: Transport>(&self, mut transport: E, error: &DecodeError) {
        // Any program in the guest can use a name that is too long, or read into memory of a device,
        // and the guest's kernel passes it on, so this is not a malformed request.
        if !matches!(error.errno(), Errno::NAMETOOLONG | Errno::FAULT) {
            transport.note_malformed();
            let count = self.counters.count_malformed();
            if should_log(count) {
                let fault = error.source().map(ToString::to_string).unwrap_or_default();
                log::warn!("malformed request no. {count}: {error}: {fault}");
            }
        }
        match error.unique {
            Some(unique) if !error.has_no_reply() => {
                self.finish(transport, unique, Err(error.errno()));
            }
            _ => transport.no_reply(),
        }
    }
}

/// The part of the negotiated flags that a file system depends on.
fn terms(flags: InitFlags) -> NegotiatedTerms {
    NegotiatedTerms {
        collects_writes: flags.contains(InitFlags::WRITEBACK_CACHE),
        no_open: flags.contains(InitFlags::NO_OPEN_SUPPORT),
        no_opendir: flags.contains(InitFlags::NO_OPENDIR_SUPPORT),
        idmapped: flags.contains(InitFlags::ALLOW_IDMAP),
        kills_set_id: flags.contains(InitFlags::HANDLE_KILLPRIV_V2),
        record_locks: flags.contains(InitFlags::POSIX_LOCKS),
        file_locks: flags.contains(InitFlags::FLOCK_LOCKS),
    }
}

/// All flags but those of `terms` that are not in effect.
fn flags_for(terms: &NegotiatedTerms) -> InitFlags {
    let NegotiatedTerms {
        collects_writes,
        no_open,
        no_opendir,
        idmapped,
        kills_set_id,
        record_locks,
        file_locks,
    } = *terms;
    let without = [
        (collects_writes, InitFlags::WRITEBACK_CACHE),
        (no_open, InitFlags::NO_OPEN_SUPPORT),
        (no_opendir, InitFlags::NO_OPENDIR_SUPPORT),
        (idmapped, InitFlags::ALLOW_IDMAP),
        (kills_set_id, InitFlags::HANDLE_KILLPRIV_V2),
        (record_locks, InitFlags::POSIX_LOCKS),
        (file_locks, InitFlags::FLOCK_LOCKS),
    ];
    let without = without.into_iter().filter(|(in_effect, _)| !in_effect);
    InitFlags::from_bits(without.fold(u64::MAX, |all, (_, flag)| all & !flag.bits()))
}

/// Whether the `count`th occurrence of an event is logged: the first few are, then ever fewer, so
/// that a guest can't fill the log.
fn should_log(count: u64) -> bool {
    count <= 16 || count.is_power_of_two()
}

/// What [`fetch`] has read of a request.
#[derive(Debug)]
enum Fetched {
    /// This many bytes: all that [`decode_as()`] needs.
    Whole(usize),
    /// The header; what is to be decoded has `wanted` bytes more, for which there is no room.
    Header { wanted: usize },
}

/// Copies the part of a request that [`decode_as()`] needs to `small`, if there is room for it.
fn fetch<E: Transport>(transport: &mut E, small: &mut [u8; SMALL]) -> Result<Fetched, DecodeError> {
    let (header, rest) = small.split_at_mut(HEADER_LEN);
    let header_len = transport.read(header);
    let wanted = bytes_wanted(
        header.get(..header_len).unwrap_or_default(),
        transport.readable(),
    )?;
    Ok(match rest.get_mut(..wanted) {
        Some(rest) => Fetched::Whole(header_len.saturating_add(transport.read(rest))),
        None => Fetched::Header { wanted },
    })
}

/// Copies the `wanted` bytes behind `header` to `inline`, or to `spilled` if they are too many, and
/// returns both.
fn fetch_rest<'a, E: Transport>(
    transport: &mut E,
    header: &[u8],
    wanted: usize,
    inline: &'a mut [u8; INLINE],
    spilled: &'a mut Vec<u8>,
) -> &'a [u8] {
    let len = header.len().saturating_add(wanted);
    let bytes = match inline.get_mut(..len) {
        Some(bytes) => bytes,
        None => {
            spilled.resize(len, 0);
            &mut spilled[..]
        }
    };
    let (start, rest) = bytes.split_at_mut(header.len());
    start.copy_from_slice(header);
    let read = transport.read(rest);
    bytes
        .get(..header.len().saturating_add(read))
        .unwrap_or_default()
}
