//! SETUPMAPPING and REMOVEMAPPING: parts of files in the DAX window.
//!
//! The VMM maps them, and is waited for on a blocking thread. The invariant: a file is opened for a
//! mapping as OPEN would open it, with the access that the mapping gives and no more.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::data::errno;
use super::{Outcome, Session};
use crate::dax::{MapRequest, Window};
use crate::device::BackChannel;
use crate::fs::{FileSystem, NodeId};
use crate::fuse::Transport;
use crate::fuse::abi::InitFlags;
use crate::fuse::dax_marks::DaxMarks;
use crate::fuse::reply::Answer;
use crate::fuse::request::{Operation, Request};
use crate::io::blocking;

/// What a request changes in the window, without borrowing from the request.
enum Change {
    Map(MapRequest),
    Unmap(Vec<(u64, u64)>),
}

impl<F: FileSystem + ?Sized> Session<F> {
    /// Sets the channel on which the VMM is asked for mappings.
    pub fn connected(&self, channel: &Arc<dyn BackChannel>) {
        if let Some(window) = &self.window {
            window.connect(Arc::clone(channel));
        }
    }

    /// Called when requests can be sent on that channel. A VMM that has `reconnected` is asked for
    /// all mappings that the guest had.
    pub fn channel_opened(self: &Arc<Self>, reconnected: bool) {
        if let Some(window) = &self.window {
            let session = Arc::clone(self);
            window.opened(reconnected, move |node, writable| {
                session.fs.prepare_thread().map_err(|error| errno(&error))?;
                session.open_to_map(node, writable)
            });
        }
    }

    /// Waits for what runs on behalf of the window, after the channel was closed.
    pub fn finish_mappings(&self) {
        if let Some(window) = &self.window {
            window.finish();
        }
    }

    /// The number of mappings in the DAX window.
    pub fn mappings(&self) -> usize {
        self.window.as_ref().map_or(0, |window| window.mappings())
    }

    /// Decides which files are marked for DAX.
    pub(super) fn dax_marks(&self) -> DaxMarks<'_> {
        let policy = self.options.dax.as_ref();
        let policy = policy.filter(|_| self.has_agreed(InitFlags::HAS_INODE_DAX));
        DaxMarks::new(policy, &self.known_names)
    }

    pub(super) fn mapping<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        request: &Request<'_>,
    ) -> Outcome {
        let unique = request.unique;
        let change = match request.operation {
            Operation::Setupmapping(mapping) => Change::Map(MapRequest {
                node: request.node.0,
                file_offset: mapping.file_offset,
                offset: mapping.offset,
                len: mapping.len,
                writable: mapping.writable,
            }),
            Operation::Removemapping(ranges) => Change::Unmap(ranges.iter().collect()),
            _ => return self.reply_now(transport, unique, Err(Errno::NOSYS)),
        };
        let Some(window) = self.window.clone() else {
            return self.reply_now(transport, unique, Err(Errno::NOSYS));
        };
        let epoch = window.epoch();
        let session = Arc::clone(self);
        let served = blocking(move || session.serve_mapping(&window, epoch, &change));
        let session = Arc::clone(self);
        self.defer(async move {
            let answer = served.await.unwrap_or_else(|error| Err(errno(&error)));
            session.finish(transport, unique, answer);
        })
    }

    fn serve_mapping(&self, window: &Window, epoch: u64, change: &Change) -> Result<Answer, Errno> {
        self.fs.prepare_thread().map_err(|error| errno(&error))?;
        let ended = self.ended.load(Ordering::Relaxed);
        let open = |node, writable| {
            let _inside = self.barrier.enter();
            if self.ended.load(Ordering::Relaxed) != ended {
                return Err(Errno::IO);
            }
            self.open_to_map(node, writable)
        };
        match change {
            Change::Map(request) => window.map(epoch, request, &open)?,
            Change::Unmap(ranges) => window.unmap_ranges(epoch, ranges, &open)?,
        }
        Ok(Answer::Done)
    }

    fn open_to_map(&self, node: u64, writable: bool) -> Result<OwnedFd, Errno> {
        self.fs.open_to_map(NodeId(node), writable)
    }
}
