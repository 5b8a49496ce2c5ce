//! What all operations of an adapter share: the guarded call of the file system, numbers of nodes,
//! and what the guest holds.
//!
//! The invariant: each lookup that the file system counts and the guest learns of is counted here.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::api::filesystem::{Context, Entry as BackendEntry, FsOptions, ROOT_ID};
use rustix::io::Errno;

use super::convert;
use super::forgets::{Batch, Forgets};
use super::handles::{Handles, Open};
use super::lookups::Lookups;
use super::{Backend, Options};
use crate::fs::{Caller, Entry, Handle, HandleKind, NegotiatedTerms, NodeId, Result};

/// What INIT has settled with the file system.
#[derive(Clone, Copy, Debug)]
struct Agreement {
    /// What is in effect.
    terms: NegotiatedTerms,
    /// What the file system wanted.
    wanted: FsOptions,
}

/// A file system and what the guest holds of it.
pub(super) struct Core<F> {
    fs: F,
    options: Options,
    agreement: Mutex<Option<Agreement>>,
    lookups: Lookups,
    handles: Handles,
    forgets: Arc<Forgets>,
    panics: AtomicU64,
}

impl<F: Backend> Core<F> {
    pub(super) fn new(fs: F, options: Options) -> Self {
        Self {
            fs,
            options,
            agreement: Mutex::default(),
            lookups: Lookups::default(),
            handles: Handles::default(),
            forgets: Arc::default(),
            panics: AtomicU64::new(0),
        }
    }

    pub(super) fn fs(&self) -> &F {
        &self.fs
    }

    pub(super) fn options(&self) -> &Options {
        &self.options
    }

    pub(super) fn lookups(&self) -> &Lookups {
        &self.lookups
    }

    pub(super) fn handles(&self) -> &Handles {
        &self.handles
    }

    pub(super) fn forgets(&self) -> &Arc<Forgets> {
        &self.forgets
    }

    /// Calls the file system. If it panics, the operation fails with `EIO`.
    pub(super) fn call<T>(&self, call: impl FnOnce(&F) -> io::Result<T>) -> Result<T> {
        match catch_unwind(AssertUnwindSafe(|| call(&self.fs))) {
            Ok(result) => result.map_err(|error| convert::errno(&error)),
            Err(panic) => {
                let count = self.panics.fetch_add(1, Ordering::Relaxed) + 1;
                // Ever fewer of them, so that a guest can't fill the log.
                if count <= 16 || count.is_power_of_two() {
                    let message = message(&*panic);
                    log::error!("the file system has panicked (no. {count}): {message}");
                }
                Err(Errno::IO)
            }
        }
    }

    /// The file system's number of a node.
    pub(super) fn inode(&self, node: NodeId) -> F::Inode {
        F::Inode::from(self.number(node))
    }

    /// The file system's number of a node. The guest's root and the file system's exchange their
    /// numbers, which is its own inverse.
    pub(super) fn number(&self, node: NodeId) -> u64 {
        self.exchange_roots(node.0)
    }

    fn exchange_roots(&self, number: u64) -> u64 {
        match number {
            ROOT_ID => self.options.root,
            number if number == self.options.root => ROOT_ID,
            number => number,
        }
    }

    /// What a request of `caller` is made with.
    pub(super) fn context(&self, caller: &Caller) -> Result<Context> {
        // `accept` lets no guest leave the ids out.
        let context = Context {
            uid: caller.uid.ok_or(Errno::OVERFLOW)?,
            gid: caller.gid.ok_or(Errno::OVERFLOW)?,
            pid: caller.pid.cast_signed(),
        };
        self.remapped(context)
    }

    /// What a request without a known caller is made with: the guest's kernel.
    pub(super) fn kernel(&self) -> Result<Context> {
        self.remapped(Context::new())
    }

    fn remapped(&self, mut context: Context) -> Result<Context> {
        self.call(|fs| fs.id_remap(&mut context))?;
        Ok(context)
    }

    /// Calls the file system for `caller`.
    pub(super) fn call_for<T>(
        &self,
        caller: &Caller,
        call: impl FnOnce(&F, &Context) -> io::Result<T>,
    ) -> Result<T> {
        let context = self.context(caller)?;
        self.call(|fs| call(fs, &context))
    }

    /// A lookup's result, which counts.
    pub(super) fn found(&self, entry: &BackendEntry) -> Result<Entry> {
        // A name that doesn't exist, and may be remembered as such.
        if entry.inode == 0 {
            return Err(Errno::NOENT);
        }
        if entry.inode != self.options.root {
            self.lookups.add(entry.inode);
        }
        Ok(Entry {
            node: NodeId(self.exchange_roots(entry.inode)),
            generation: entry.generation,
            attributes: convert::attributes(&entry.attr),
            attribute_ttl: entry.attr_timeout,
            entry_ttl: entry.entry_timeout,
            submount: entry.attr_flags & convert::ATTR_SUBMOUNT != 0,
        })
    }

    /// The guest drops `count` lookups of `node`.
    pub(super) fn forget(self: &Arc<Self>, node: NodeId, count: u64) {
        let inode = self.number(node);
        let held = self.lookups.take(inode, count);
        if held > 0 {
            self.tell_forgotten(inode, held);
        }
    }

    /// Tells the file system that lookups which it has counted are dropped.
    pub(super) fn tell_forgotten(self: &Arc<Self>, inode: u64, count: u64) {
        if inode == 0 || inode == self.options.root {
            return;
        }
        if !self.options.may_block {
            self.apply_forgets(vec![(inode, count)]);
            return;
        }
        self.forgets.push((inode, count), || {
            let core = Arc::clone(self);
            Box::new(move |batch| core.apply_forgets(batch))
        });
    }

    fn apply_forgets(&self, batch: Batch) {
        let requests = batch
            .into_iter()
            .map(|(inode, count)| (F::Inode::from(inode), count))
            .collect();
        // There is no reply, and `call` has logged a panic.
        let _ = self.kernel().and_then(|context| {
            self.call(|fs| {
                fs.batch_forget(&context, requests);
                Ok(())
            })
        });
    }

    /// INIT: offers `terms` to the file system and returns those that it wants.
    pub(super) fn init(&self, terms: &NegotiatedTerms) -> Result<NegotiatedTerms> {
        let offered = convert::offered(terms);
        let wanted = self.call(|fs| fs.init(offered))? & offered;
        let terms = convert::wanted(terms, wanted);
        *self.agreement() = Some(Agreement { terms, wanted });
        Ok(terms)
    }

    /// The terms in effect; the defaults before INIT.
    pub(super) fn terms(&self) -> NegotiatedTerms {
        self.agreement()
            .map(|agreed| agreed.terms)
            .unwrap_or_default()
    }

    /// Whether INIT has been called, and resulted in these terms.
    pub(super) fn has_begun_with(&self, terms: &NegotiatedTerms) -> bool {
        self.agreement()
            .is_some_and(|agreed| agreed.terms == *terms)
    }

    /// Whether the file system wanted `option` at INIT.
    pub(super) fn wants(&self, option: FsOptions) -> bool {
        self.agreement()
            .is_some_and(|agreed| agreed.wanted.contains(option))
    }

    /// An open file of `node`, or the node itself where the guest needs no OPEN.
    pub(super) fn opened(
        &self,
        node: NodeId,
        handle: Handle,
        kind: HandleKind,
    ) -> Result<Arc<Open>> {
        if handle.0 == 0 && self.needs_no_open(kind) {
            return Ok(Arc::new(Open::implicit(node, kind)));
        }
        self.handles.get(node, handle, Some(kind))
    }

    /// Whether the guest uses files of this kind without OPEN.
    pub(super) fn needs_no_open(&self, kind: HandleKind) -> bool {
        let terms = self.terms();
        match kind {
            HandleKind::File => terms.no_open,
            HandleKind::Directory => terms.no_opendir,
        }
    }

    /// The file system's handle of a request on an open file, if there is one.
    pub(super) fn handle_if_any(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<Option<F::Handle>> {
        let Some(handle) = handle.filter(|handle| handle.0 != 0) else {
            return Ok(None);
        };
        let open = self.handles.get(node, handle, None)?;
        Ok(open.is_explicit.then(|| F::Handle::from(open.handle)))
    }

    /// Returns everything that the guest holds, and ends the session with the file system.
    pub(super) fn end(&self) {
        let mut rest = self.forgets.take_rest();
        for open in self.handles.take_all() {
            // Nobody is left who could be told of an error.
            let _ = self.release(&open);
        }
        rest.extend(self.lookups.take_all());
        if !rest.is_empty() {
            self.apply_forgets(rest);
        }
        if self.agreement().take().is_some() {
            let _ = self.call(|fs| {
                fs.destroy();
                Ok(())
            });
        }
    }

    /// RELEASE and RELEASEDIR.
    pub(super) fn release(&self, open: &Open) -> Result<()> {
        let (inode, handle) = (self.inode(open.node), F::Handle::from(open.handle));
        let (context, flags) = (&open.context, open.flags());
        match open.kind {
            HandleKind::File => {
                let flock = open.flock_owner().map(|owner| owner.0);
                self.call(|fs| {
                    let unlocks = flock.is_some();
                    fs.release(context, inode, flags, handle, false, unlocks, flock)
                })
            }
            HandleKind::Directory => self.call(|fs| fs.releasedir(context, inode, flags, handle)),
        }
    }

    fn agreement(&self) -> MutexGuard<'_, Option<Agreement>> {
        self.agreement
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a panic says.
fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
