//! The dirty log of a migration: one bit for each page of guest memory that the device wrote.

use zerocopy::FromBytes;

use super::{Session, SessionError, number};
use crate::connection::message::{Log, VRING_LOG, feature};
use crate::memory::{Gpa, Memory, Region};

/// Bytes of guest memory for each bit.
const PAGE: u64 = 4096;

/// A dirty log that the back end writes to.
#[derive(Debug)]
pub struct DirtyLog {
    bits: Memory,
    pages: u64,
}

impl DirtyLog {
    /// Whether the page that `gpa` is in was written to.
    #[must_use]
    pub fn is_dirty(&self, gpa: Gpa) -> bool {
        let page = gpa.0 / PAGE;
        let byte = self.bits.read_obj::<u8>(Gpa(page / 8)).unwrap_or(0);
        byte & (1 << (page % 8)) != 0
    }

    /// The addresses of all pages that were written to, and forgets them. A page written to
    /// meanwhile may be lost: stop the rings first.
    ///
    /// # Errors
    /// [`SessionError::Memory`].
    pub fn take(&self) -> Result<Vec<Gpa>, SessionError> {
        let len = self.pages.div_ceil(64) * 8;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let bytes = self.bits.read_vec(Gpa(0), len)?;
        self.bits.fill(Gpa(0), len, 0)?;
        let mut dirty = Vec::new();
        for (position, word) in (0_u64..).zip(bytes.chunks_exact(8)) {
            let mut word = u64::read_from_bytes(word).unwrap_or(0);
            while word != 0 {
                let page = position * 64 + u64::from(word.trailing_zeros());
                dirty.push(Gpa(page * PAGE));
                word &= word - 1;
            }
        }
        Ok(dirty)
    }
}

impl Session {
    /// Starts a dirty log, in QEMU's order: the log, the features with LOG_ALL, and each ring's
    /// addresses with the log's flag.
    ///
    /// # Errors
    /// [`SessionError::Connection`], [`SessionError::Memory`].
    pub fn start_log(&mut self) -> Result<DirtyLog, SessionError> {
        let pages = self.memory.end().0.div_ceil(PAGE);
        let size = pages.div_ceil(8).next_multiple_of(PAGE);
        let log = DirtyLog {
            bits: Memory::new(&[Region::new(0, size)])?,
            pages,
        };
        if let Some(region) = log.bits.regions().first() {
            let base = Log { size, offset: 0 };
            self.connection.set_log_base(base, region.fd())?;
        }
        self.log_writes(true)?;
        Ok(log)
    }

    /// Stops the dirty log.
    ///
    /// # Errors
    /// [`SessionError::Connection`].
    pub fn stop_log(&mut self) -> Result<(), SessionError> {
        self.log_writes(false)
    }

    /// Each message is known to be done when the next is sent, or what is written meanwhile would
    /// be lost.
    fn log_writes(&mut self, on: bool) -> Result<(), SessionError> {
        let (bit, flags) = if on {
            (feature::LOG_ALL, VRING_LOG)
        } else {
            (0, 0)
        };
        let features = self.features & !feature::LOG_ALL | bit;
        self.features = features;
        self.connection.settled(|c| c.set_features(features))?;
        for (index, queue) in self.queues.iter().enumerate() {
            let (index, memory) = (u32::from(number(index)), &self.memory);
            self.connection
                .settled(|c| c.set_vring_addr(index, memory, queue, flags))?;
        }
        Ok(())
    }
}
