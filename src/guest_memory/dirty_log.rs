//! The front end's bitmap of changed pages (vhost-user specification, "Migration").
//!
//! The invariant: the bit of a page is set after the page was changed, and no bit is ever cleared
//! here.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::mmap::MmapRegionError;

use super::GuestAddress;
use super::change_log::ChangeLog;
use super::error::MemoryError;
use super::mapping::{MapFault, Mapping};
use super::sigbus::MemoryLostEvent;

/// Bytes of guest memory that one bit of the dirty log stands for (`VHOST_LOG_PAGE`,
/// vhost-user specification, "Migration").
pub(super) const LOG_PAGE: u64 = 4096;

/// The front end's bitmap of changed pages (vhost-user specification, "Migration").
#[derive(Debug)]
pub(crate) struct DirtyLog {
    mapping: Mapping,
}

impl DirtyLog {
    /// The address by which a [`MemoryLostEvent`] reports a lost log.
    pub(crate) const GONE: u64 = u64::MAX - 1;

    /// Maps the log: `len` bytes of `file` from `offset` on, with a bit for each [`LOG_PAGE`]. If
    /// the file is truncated later, `memory_lost` reports [`GONE`](Self::GONE).
    ///
    /// # Errors
    ///
    /// Fails if the file is too short or can't be mapped.
    pub(crate) fn map(
        file: File,
        offset: u64,
        len: u64,
        memory_lost: &Arc<MemoryLostEvent>,
    ) -> Result<Self, MemoryError> {
        let fail = |fault| match fault {
            MapFault::Map(source) => MemoryError::MapLog {
                len,
                offset,
                source,
            },
            MapFault::Watch(source) => MemoryError::Watch { len, source },
        };
        let size = usize::try_from(len)
            .map_err(|_too_large| fail(MmapRegionError::InvalidOffsetLength.into()))?;
        log::debug!("dirty log of {len} bytes on fd {}", file.as_raw_fd());
        let mapping = Mapping::new(file, (offset, size), Self::GONE, memory_lost).map_err(fail)?;
        Ok(Self { mapping })
    }

    /// Returns the mapped file, the offset of the log in it, and the log's length in bytes.
    #[must_use]
    pub(crate) fn file(&self) -> Option<(BorrowedFd<'_>, u64, u64)> {
        let (file, offset) = self.mapping.file()?;
        Some((file, offset, self.mapping.bytes.size() as u64))
    }
}

impl ChangeLog for DirtyLog {
    /// Sets the bits of all pages that overlap `guest..guest + len`. Ignores pages beyond the end
    /// of the log.
    fn mark(&self, guest: GuestAddress, len: u64) {
        let Some(last) = len.checked_sub(1).map(|more| guest.saturating_add(more)) else {
            return;
        };
        for page in guest / LOG_PAGE..=last / LOG_PAGE {
            let Some(byte) = usize::try_from(page / 8)
                .ok()
                .filter(|b| *b < self.mapping.bytes.size())
            else {
                return;
            };
            // SAFETY: `byte` is below the mapping's size, and bytes need no alignment; the
            // mapping lives as long as `self`.
            let byte =
                unsafe { AtomicU8::from_ptr(self.mapping.bytes.as_ptr().wrapping_add(byte)) };
            // Release: pairs with the front end's atomic exchange when it collects the log. It
            // orders the page's new contents before its bit.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}
