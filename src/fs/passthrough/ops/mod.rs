//! The FUSE operations: what each request does, put together from the rooms below.
//!
//! The invariant: every access starts from a descriptor or a file handle that was derived from the
//! shared directory, one path component at a time.

mod attributes;
mod create;
mod files;
mod inode_flags;
mod labels;
mod lookup;
mod lookup_by_node;
mod open;
mod path_checks;
mod readdir;
mod remove;
mod rename;
mod retries;
mod terms;
mod xattrs;

use std::os::fd::OwnedFd;

use self::path_checks::PathChecks;
use self::terms::CurrentTerms;
use crate::fs::passthrough::descriptors::Descriptors;
use crate::fs::passthrough::ids::{self, Ids};
use crate::fs::passthrough::options::Options;
use crate::fs::passthrough::xattr::Xattrs;
use crate::fs::{NegotiatedTerms, Result};

/// What serves the requests of a guest.
#[derive(Debug)]
pub(crate) struct Operations {
    options: Options,
    terms: CurrentTerms,
    fds: Descriptors,
    ids: Ids,
    xattrs: Xattrs,
    path_checks: PathChecks,
    /// The shared file, if the share is a single file and the root is a directory made for it.
    single_file: Option<OwnedFd>,
}

impl Operations {
    pub(crate) fn new(options: Options, fds: Descriptors, ids: Ids, xattrs: Xattrs) -> Self {
        Self {
            options,
            terms: CurrentTerms::default(),
            fds,
            ids,
            xattrs,
            path_checks: PathChecks::new(),
            single_file: None,
        }
    }

    /// Applies what INIT has negotiated.
    pub(crate) fn begin(&self, terms: &NegotiatedTerms) {
        self.terms.set(terms);
        self.fds
            .set_unreported_opens(terms.no_open, terms.no_opendir);
    }

    pub(crate) fn fds(&self) -> &Descriptors {
        &self.fds
    }

    pub(crate) fn terms(&self) -> &CurrentTerms {
        &self.terms
    }

    #[cfg(test)]
    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    /// Makes SYNCFS of the root sync the file system of `file`.
    pub(crate) fn set_single_file(&mut self, file: OwnedFd) {
        self.single_file = Some(file);
    }

    /// Prepares the calling thread if that has not been done.
    pub(crate) fn prepare(&self) -> Result<()> {
        ids::prepare_thread(self.fds.proc_fds())
    }
}
