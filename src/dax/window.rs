//! The mappings in the window: made and removed on the guest's request, by requests to the VMM.
//!
//! Requests to the VMM wait for its answer, so all of it runs on threads that may block; one
//! operation at a time (`turn`), as the back channel has one request at a time anyway. Each change is
//! recorded in the state table before the VMM is asked and after it has answered, so a process that
//! takes over knows which ranges may be mapped.
//!
//! A mapping that the guest uses is replaced by one request, because a virtual processor may access
//! it meanwhile. The specification lets a VMM refuse that. Whether this one does is found out by the
//! first mapping, which nobody uses yet; with such a VMM a file is mapped for writing from the
//! beginning, if it can be opened so, and never needs to be replaced.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::helpers::Helpers;
use super::overlap::{Range, overlapping};
use super::{DaxOptions, REGION, page_size};
use crate::device::{BackChannel, BackChannelError, BackendRequest, SharedMapping};
use crate::state::{MappingFields, MappingRecord, MappingState, Table};

/// The most mappings. A VMM that maps each by `mmap(2)` may have 65,530 (`vm.max_map_count`), and
/// needs some for itself.
const MAX_MAPPINGS: usize = 32_768;

/// What a guest asks to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRequest {
    /// The file's inode.
    pub node: u64,
    /// Where the mapping begins in the file.
    pub file_offset: u64,
    /// Where it begins in the window.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u64,
    /// The guest is going to write to it.
    pub writable: bool,
}

/// Opens an inode's file to be mapped: for writing too if the second argument is true.
pub type OpenToMap<'a> = dyn Fn(u64, bool) -> Result<OwnedFd, Errno> + 'a;

/// The window of one guest's session.
#[derive(Debug)]
pub struct Window {
    len: u64,
    /// The guest may write to files.
    writable: bool,
    table: Arc<Table>,
    /// Held for the whole of an operation. Taken before `state`.
    turn: Mutex<()>,
    state: Mutex<State>,
    pub(super) helpers: Helpers,
    /// Whether a failure of the VMM was logged as a warning.
    warned: AtomicBool,
}

#[derive(Debug)]
struct State {
    channel: Option<Arc<dyn BackChannel>>,
    /// By their offsets in the window.
    records: BTreeMap<u64, MappingRecord>,
    /// Whether the VMM replaces mappings, if that is known.
    replaces: Option<bool>,
    /// How many times all mappings were discarded.
    epoch: u64,
}

impl Window {
    /// The window of a session that is recorded in `table`, with the mappings that it has there.
    #[must_use]
    pub fn new(options: &DaxOptions, table: Arc<Table>) -> Arc<Self> {
        let records = table.mappings().into_iter();
        let records = records.map(|record| (record.fields().offset, record));
        Arc::new(Self {
            len: options.window,
            writable: options.writable,
            turn: Mutex::new(()),
            state: Mutex::new(State {
                channel: None,
                records: records.collect(),
                replaces: None,
                epoch: 0,
            }),
            table,
            helpers: Helpers::default(),
            warned: AtomicBool::new(false),
        })
    }

    /// Sets the channel on which the VMM is asked.
    pub fn connect(&self, channel: Arc<dyn BackChannel>) {
        self.state().channel = Some(channel);
    }

    /// The number of mappings.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.state().records.len()
    }

    /// A number that changes when all mappings are discarded.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.state().epoch
    }

    /// Maps part of a file. A mapping of exactly the same range is replaced; others within the range
    /// are removed first.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range isn't one of whole pages within the window, or overlaps part of another
    /// mapping; `EIO` if the mappings were discarded since `epoch`; otherwise those of `open`, and
    /// those that the VMM answers with.
    pub fn map(&self, epoch: u64, request: &MapRequest, open: &OpenToMap<'_>) -> Result<(), Errno> {
        let range = Range::new(request.offset, request.len, self.len)?;
        let file_end = request.file_offset.checked_add(request.len);
        let fits = file_end.is_some_and(|end| i64::try_from(end).is_ok());
        if !fits || !request.file_offset.is_multiple_of(page_size()) {
            return Err(Errno::INVAL);
        }
        let _turn = self.turn();
        let (overlapping, replaces) = self.overlapping(epoch, range)?;
        let same = overlapping
            .iter()
            .find(|record| range_of(record) == range)
            .cloned();
        if same.as_ref().is_some_and(|record| serves(record, request)) {
            return Ok(());
        }
        let widest = self.writable && !request.writable && replaces == Some(false);
        let (fd, writable) = match widest.then(|| open(request.node, true)) {
            Some(Ok(fd)) => (fd, true),
            _ => (open(request.node, request.writable)?, request.writable),
        };
        let wanted = MappingFields {
            offset: request.offset,
            len: request.len,
            file_offset: request.file_offset,
            node: request.node,
            writable,
        };
        if let Some(record) = same {
            return self.replace(&record, &wanted, &fd, open);
        }
        for record in overlapping {
            self.unmap(&record, open)?;
        }
        let record = self.record(&wanted)?;
        match self.ask_to_map(&wanted, &fd) {
            Ok(()) => {
                record.set_state(MappingState::Made);
                self.find_out_replacement(&record, &wanted, &fd, open)
            }
            Err(error) => {
                if matches!(error, BackChannelError::Refused(_)) || is_unsent(&error) {
                    self.drop_record(&record);
                }
                Err(self.errno(&error))
            }
        }
    }

    /// Removes mappings. What isn't mapped is skipped.
    ///
    /// # Errors
    ///
    /// `EINVAL` if a range isn't one of whole pages within the window, or covers part of a mapping;
    /// nothing is removed then. `EIO` if the mappings were discarded since `epoch`; otherwise those
    /// that the VMM answers with.
    pub fn unmap_ranges(
        &self,
        epoch: u64,
        ranges: &[(u64, u64)],
        open: &OpenToMap<'_>,
    ) -> Result<(), Errno> {
        let ranges = ranges
            .iter()
            .map(|(offset, len)| Range::new(*offset, *len, self.len))
            .collect::<Result<Vec<_>, _>>()?;
        let _turn = self.turn();
        // A request may name a mapping twice.
        let mut records = BTreeMap::new();
        for range in ranges {
            let found = self.overlapping(epoch, range)?.0.into_iter();
            records.extend(found.map(|record| (record.fields().offset, record)));
        }
        // All are tried: the guest doesn't ask for any of them again.
        let mut result = Ok(());
        for record in records.values() {
            result = result.and(self.unmap(record, open));
        }
        result
    }

    /// Discards all mappings, because the guest's session has ended, and asks the VMM to remove
    /// them. The caller doesn't wait for that.
    pub fn discard(self: &Arc<Self>) {
        let mut state = self.state();
        state.epoch = state.epoch.wrapping_add(1);
        for record in state.records.values() {
            record.set_state(MappingState::Stale);
        }
        drop(state);
        self.sweep_later();
    }

    /// Called when the VMM has opened the back channel of a session whose mappings are in the table.
    /// A VMM that has `reconnected` may have lost the mappings, so all are made again; else it has
    /// them. The caller doesn't wait for that.
    pub fn opened(
        self: &Arc<Self>,
        reconnected: bool,
        open: impl Fn(u64, bool) -> Result<OwnedFd, Errno> + Send + 'static,
    ) {
        self.sweep_later();
        if reconnected && self.mappings() != 0 {
            let window = Arc::clone(self);
            self.helpers.start(move || window.make_again(&open));
        }
    }

    /// Waits for what runs on behalf of the window. To be called when the back channel is closed, so
    /// that no request to the VMM can delay it.
    pub fn finish(&self) {
        self.helpers.join();
    }

    fn sweep_later(self: &Arc<Self>) {
        if self.stale().is_some() {
            let window = Arc::clone(self);
            self.helpers.start(move || window.sweep());
        }
    }

    /// Removes the mappings that are stale.
    fn sweep(&self) {
        loop {
            let _turn = self.turn();
            let Some(record) = self.stale() else {
                return;
            };
            match self.ask_to_unmap(&record.fields()) {
                Ok(()) | Err(BackChannelError::Refused(_)) => self.drop_record(&record),
                // The VMM is gone, or has never been there.
                Err(BackChannelError::NotConnected | BackChannelError::Closed) => {
                    self.drop_record(&record);
                }
                // They are removed when the guest needs their ranges, or by the next sweep.
                Err(_) => return,
            }
        }
    }

    fn stale(&self) -> Option<MappingRecord> {
        let is_stale = |record: &&MappingRecord| record.state() == MappingState::Stale;
        self.state().records.values().find(is_stale).cloned()
    }

    /// Makes all mappings again.
    fn make_again(&self, open: &OpenToMap<'_>) {
        let epoch = self.epoch();
        let all: Vec<_> = self.state().records.keys().copied().collect();
        let (mut made, mut kept) = (0_u32, 0_u32);
        for offset in all {
            let _turn = self.turn();
            let record = self.state().records.get(&offset).cloned();
            let Some(record) = record.filter(|record| record.state() != MappingState::Stale) else {
                continue;
            };
            if self.epoch() != epoch {
                return;
            }
            let fields = record.fields();
            let asked = open(fields.node, fields.writable)
                .map_err(|_unavailable| BackChannelError::Invalid("no file"))
                .and_then(|fd| self.ask_to_map(&fields, &fd));
            match asked {
                Ok(()) => {
                    record.set_state(MappingState::Made);
                    made += 1;
                }
                // A VMM that doesn't replace mappings refuses what it has.
                Err(_) => kept += 1,
            }
        }
        log::info!("DAX: {made} mappings made again for the VMM that has reconnected, {kept} kept");
    }

    /// Replaces what is mapped in a range.
    fn replace(
        &self,
        record: &MappingRecord,
        wanted: &MappingFields,
        fd: &OwnedFd,
        open: &OpenToMap<'_>,
    ) -> Result<(), Errno> {
        let old = (record.state() == MappingState::Made).then(|| record.fields());
        record.set_fields(wanted);
        let error = match self.ask_to_map(wanted, fd) {
            Ok(()) => {
                record.set_state(MappingState::Made);
                return Ok(());
            }
            Err(error) => error,
        };
        let keep_old = |old: &MappingFields| {
            record.set_fields(old);
            record.set_state(MappingState::Made);
        };
        match (&error, &old) {
            (BackChannelError::Refused(_), Some(old)) if self.state().replaces == Some(true) => {
                keep_old(old);
                return Err(self.errno(&error));
            }
            (BackChannelError::Refused(_), _) => {}
            (_, Some(old)) if is_unsent(&error) => {
                keep_old(old);
                return Err(self.errno(&error));
            }
            _ => return Err(self.errno(&error)),
        }
        // What is there must be removed first.
        match self.ask_to_unmap(wanted) {
            Ok(()) | Err(BackChannelError::Refused(_)) => {}
            Err(error) => return Err(self.errno(&error)),
        }
        let error = match self.ask_to_map(wanted, fd) {
            Ok(()) => {
                self.state().replaces = Some(false);
                record.set_state(MappingState::Made);
                return Ok(());
            }
            Err(error) => error,
        };
        if matches!(error, BackChannelError::Refused(_)) {
            let made_again = old.is_some_and(|old| {
                let fd = open(old.node, old.writable);
                fd.is_ok_and(|fd| self.ask_to_map(&old, &fd).is_ok())
            });
            match old {
                Some(old) if made_again => keep_old(&old),
                _ => self.drop_record(record),
            }
        }
        Err(self.errno(&error))
    }

    /// If it isn't known whether the VMM replaces mappings, has it replace one that nobody uses yet
    /// by itself. If it refuses, this one is made again for writing, if possible.
    fn find_out_replacement(
        &self,
        record: &MappingRecord,
        made: &MappingFields,
        fd: &OwnedFd,
        open: &OpenToMap<'_>,
    ) -> Result<(), Errno> {
        if made.writable || !self.writable || self.state().replaces.is_some() {
            return Ok(());
        }
        let replaces = match self.ask_to_map(made, fd) {
            Ok(()) => true,
            Err(BackChannelError::Refused(_)) => false,
            // It is there anyway.
            Err(_) => return Ok(()),
        };
        self.state().replaces = Some(replaces);
        if replaces {
            return Ok(());
        }
        log::info!("DAX: the VMM doesn't replace mappings; files are mapped for writing at once");
        let Ok(fd) = open(made.node, true) else {
            return Ok(());
        };
        let wanted = MappingFields {
            writable: true,
            ..*made
        };
        self.replace(record, &wanted, &fd, open)
    }

    /// Removes a mapping, and its record. If it isn't known whether it is there, it is made before:
    /// a VMM that is asked to remove what isn't there may take that for an error of the session.
    fn unmap(&self, record: &MappingRecord, open: &OpenToMap<'_>) -> Result<(), Errno> {
        let was_made = record.state() == MappingState::Made;
        let fields = record.fields();
        if record.state() == MappingState::Unsure
            && let Ok(fd) = open(fields.node, fields.writable)
            && let Err(error) = self.ask_to_map(&fields, &fd)
            && !matches!(error, BackChannelError::Refused(_))
        {
            return Err(self.errno(&error));
        }
        record.set_state(MappingState::Unsure);
        match self.ask_to_unmap(&fields) {
            Ok(()) => {}
            // It may not be there.
            Err(BackChannelError::Refused(_)) if !was_made => {}
            Err(error) => {
                if was_made && (is_unsent(&error) || matches!(error, BackChannelError::Refused(_)))
                {
                    record.set_state(MappingState::Made);
                }
                return Err(self.errno(&error));
            }
        }
        self.drop_record(record);
        Ok(())
    }

    fn ask_to_map(&self, fields: &MappingFields, fd: &OwnedFd) -> Result<(), BackChannelError> {
        let request = BackendRequest::MapSharedMemory(shared(fields));
        self.channel()?.request(request, Some(fd.as_fd()))
    }

    fn ask_to_unmap(&self, fields: &MappingFields) -> Result<(), BackChannelError> {
        let request = BackendRequest::UnmapSharedMemory(shared(fields));
        self.channel()?.request(request, None)
    }

    fn channel(&self) -> Result<Arc<dyn BackChannel>, BackChannelError> {
        let channel = self.state().channel.clone();
        channel.ok_or(BackChannelError::NotConnected)
    }

    /// The mappings that overlap `range`, and whether the VMM replaces mappings. Fails if one of
    /// them that a guest uses reaches beyond the range.
    fn overlapping(
        &self,
        epoch: u64,
        range: Range,
    ) -> Result<(Vec<MappingRecord>, Option<bool>), Errno> {
        let state = self.state();
        if state.epoch != epoch {
            return Err(Errno::IO);
        }
        let found = overlapping(&state.records, range, range_of);
        let is_cut = |record: &MappingRecord| {
            record.state() != MappingState::Stale && !range.contains(range_of(record))
        };
        if found.iter().any(is_cut) {
            return Err(Errno::INVAL);
        }
        Ok((found, state.replaces))
    }

    /// Records a mapping that the VMM is going to be asked for.
    fn record(&self, fields: &MappingFields) -> Result<MappingRecord, Errno> {
        let mut state = self.state();
        if state.records.len() >= MAX_MAPPINGS {
            return Err(Errno::NOSPC);
        }
        let record = self.table.new_mapping(fields).ok_or(Errno::NOSPC)?;
        state.records.insert(fields.offset, record.clone());
        Ok(record)
    }

    fn drop_record(&self, record: &MappingRecord) {
        let removed = self.state().records.remove(&record.fields().offset);
        if let Some(record) = removed {
            record.remove();
        }
    }

    /// The guest's errno for what the VMM hasn't done.
    fn errno(&self, error: &BackChannelError) -> Errno {
        let errno = errno_of(error);
        // Relaxed: orders nothing.
        if errno != Errno::AGAIN && !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!("DAX: {error}; the guest gets an error ({errno})");
        } else {
            log::debug!("DAX: {error} ({errno})");
        }
        errno
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn range_of(record: &MappingRecord) -> Range {
    let fields = record.fields();
    Range::recorded(fields.offset, fields.len)
}

/// Whether the mapping is the one that is asked for.
fn serves(record: &MappingRecord, request: &MapRequest) -> bool {
    let fields = record.fields();
    record.state() == MappingState::Made
        && (fields.node, fields.file_offset) == (request.node, request.file_offset)
        && (fields.writable || !request.writable)
}

fn shared(fields: &MappingFields) -> SharedMapping {
    SharedMapping {
        region: REGION,
        offset: fields.offset,
        len: fields.len,
        file_offset: fields.file_offset,
        writable: fields.writable,
    }
}

/// Whether the request was certainly not sent.
fn is_unsent(error: &BackChannelError) -> bool {
    matches!(
        error,
        BackChannelError::NotConnected
            | BackChannelError::NotNegotiated(_)
            | BackChannelError::Invalid(_)
    )
}

/// A VMM answers with a negative errno, or with any other number. `EAGAIN` makes a guest repeat the
/// page fault, so it stands only for a request that was given up because a queue is being stopped.
pub(super) fn errno_of(error: &BackChannelError) -> Errno {
    match error {
        BackChannelError::Interrupted => Errno::AGAIN,
        BackChannelError::NotConnected | BackChannelError::NotNegotiated(_) => Errno::OPNOTSUPP,
        BackChannelError::Refused(value) => {
            let errno = value.cast_signed().checked_neg();
            let errno = errno.and_then(|errno| i32::try_from(errno).ok());
            match errno {
                Some(libc::EAGAIN | libc::EINTR) => Errno::IO,
                Some(errno @ 1..=4095) => Errno::from_raw_os_error(errno),
                _ => Errno::IO,
            }
        }
        _ => Errno::IO,
    }
}
