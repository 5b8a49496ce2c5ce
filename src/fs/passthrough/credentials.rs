//! Who owns what is created: the caller's ids and umask, worn by the thread.
//!
//! The guest's kernel has checked permissions before it asks, and on creation knows more than
//! is told here (the caller's supplementary groups). So a caller's ids never decide whether
//! something is allowed; they only become the owner of what is made. The invariant: with and
//! without a section, the thread has all the rights that the server has.
//!
//! A thread that took on another file system uid would lose its capabilities over files
//! (`CAP_DAC_OVERRIDE` and its like). `SECBIT_NO_SETUID_FIXUP` keeps them; where the thread may
//! not set it, `capset` takes them back after a change, which needs no privilege. As the ids
//! change no right then, they stay as the last creation left them, and a creation for the same
//! user costs no system call.
//!
//! What goes by the file system ids in spite of capabilities, and what is done about it:
//!
//! - opening an existing file with `O_CREAT` in a world-writable sticky directory
//!   (`fs.protected_regular`): creation always says `O_EXCL`, see `names`;
//! - ext4's blocks reserved for a uid: without `CAP_SYS_RESOURCE`, the last creator's share;
//! - file systems whose server decides (NFS, SMB, 9P, FUSE, Ceph): there the ids are put back
//!   at the end of each section, see [`CredentialPolicy::restored_each_time`];
//! - a server that lacks the capabilities, and so lives on what its own uid owns: likewise.
//!
//! By capabilities alone go sticky directories, `O_NOATIME`, `fs.protected_hardlinks`, modes,
//! ACLs and times of others' files (`CAP_FOWNER`), file capabilities (`CAP_SETFCAP`) and device
//! nodes (`CAP_MKNOD`); quotas go by the owner of the file. A process that has changed
//! credentials dumps no core unless `fs.suid_dumpable` says so, and its threads lose their
//! parent-death signal.

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;

use rustix::fs::{Gid, Mode};
use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use crate::fs::{Caller, Result};
use crate::sys::credentials as sys;

/// Capabilities that make the file system uid irrelevant for what is allowed.
const OVERRIDING: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::CHOWN);

/// Whether this process may open whatever is there, whoever owns it.
pub(super) fn overrides() -> Result<bool> {
    let sets = rustix::thread::capabilities(None)?;
    Ok(sets.effective.contains(OVERRIDING))
}

/// File system ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ids {
    uid: u32,
    gid: u32,
}

/// What a thread may do about its ids.
#[derive(Clone, Copy, Debug)]
enum Power {
    /// Change them; capabilities stay.
    Change,
    /// Change them; capabilities are to be taken back after leaving uid 0.
    ChangeAndRaise(CapabilitySets),
    /// Nothing: all that is created is the server's own.
    None,
}

/// What the calling thread is like at present.
#[derive(Clone, Copy, Debug)]
struct Thread {
    power: Power,
    overriding: bool,
    own: Ids,
    now: Ids,
    umask: u32,
}

thread_local! {
    /// `None` until the thread is prepared.
    static THREAD: Cell<Option<Thread>> = const { Cell::new(None) };
}

/// How sections are made for one file system.
#[derive(Debug)]
pub(super) struct CredentialPolicy {
    restore: bool,
}

impl CredentialPolicy {
    /// For file systems that go by capabilities as local ones do.
    pub(super) fn left_in_place() -> Self {
        Self { restore: false }
    }

    /// For file systems where somebody else decides by the ids what is allowed.
    pub(super) fn restored_each_time() -> Self {
        Self { restore: true }
    }

    /// Begins a section in which whatever is created belongs to `caller`, its mode masked by
    /// `umask` (if it has a mode at all, which a symbolic link has not). The kernel applies
    /// the mask, as it alone knows whether a default ACL stands in its place.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW` if the caller has no ids, as on any file system where they can't be mapped;
    /// `EPERM` if they have no mapping in the server's user namespace.
    pub(super) fn as_caller(
        &self,
        proc_fds: &OwnedFd,
        caller: &Caller,
        umask: Option<u32>,
    ) -> Result<CredentialsGuard> {
        let (Some(uid), Some(gid)) = (caller.uid, caller.gid) else {
            return Err(Errno::OVERFLOW);
        };
        let mut thread = prepared(proc_fds)?;
        if let Some(umask) = umask.map(|mask| mask & 0o777)
            && umask != thread.umask
        {
            rustix::process::umask(Mode::from_raw_mode(umask));
            thread.umask = umask;
            THREAD.set(Some(thread));
        }
        // Made first, so that it puts back what a change gone wrong half-way leaves.
        let mut guard = CredentialsGuard {
            restore: (self.restore || !thread.overriding).then_some(thread.own),
            groups: None,
            not_send: PhantomData,
        };
        // Where the ids decide what is allowed, that the caller is in the directory's group may
        // be all that lets it create there.
        if let Some(group) = caller.group
            && guard.restore.is_some()
            && !matches!(thread.power, Power::None)
        {
            let own = rustix::process::getgroups()?;
            sys::set_groups(&[Gid::from_raw(group)])?;
            guard.groups = Some(own);
        }
        change(&mut thread, Ids { uid, gid })?;
        Ok(guard)
    }
}

/// While it lives the thread creates for a caller. Bound to its thread, and so to synchronous
/// code: it can't be held across an await of a future that may move.
#[must_use]
pub(super) struct CredentialsGuard {
    restore: Option<Ids>,
    groups: Option<Vec<Gid>>,
    not_send: PhantomData<*const ()>,
}

impl Drop for CredentialsGuard {
    fn drop(&mut self) {
        if let (Some(own), Some(mut thread)) = (self.restore, THREAD.get()) {
            // The thread's own ids are always allowed and always mapped. Should a seccomp
            // filter say no all the same, `THREAD` still knows what the ids are.
            if let Err(error) = change(&mut thread, own) {
                log::error!("can't take the server's own file system ids back: {error}");
            }
        }
        if let Some(own) = &self.groups
            && let Err(error) = sys::set_groups(own)
        {
            log::error!("can't take the server's own groups back: {error}");
        }
    }
}

/// Makes the thread's ids `ids`, if it has the power. `THREAD` follows each step.
fn change(thread: &mut Thread, ids: Ids) -> Result<()> {
    if ids == thread.now || matches!(thread.power, Power::None) {
        return Ok(());
    }
    if ids.gid != thread.now.gid {
        sys::set_fs_gid(ids.gid)?;
        thread.now.gid = ids.gid;
        THREAD.set(Some(*thread));
    }
    if ids.uid != thread.now.uid {
        sys::set_fs_uid(ids.uid)?;
        let left_root = thread.now.uid == 0;
        thread.now.uid = ids.uid;
        THREAD.set(Some(*thread));
        if let Power::ChangeAndRaise(sets) = thread.power
            && left_root
        {
            rustix::thread::set_capabilities(None, sets)?;
        }
    }
    Ok(())
}

/// Gives the calling thread an umask and a working directory of its own, the latter being
/// `/proc/self/fd`, and finds out what it may do about its ids. Does nothing the second time.
///
/// The working directory is what makes one system call of those that take only a path
/// (`setxattr(2)` and its like, `truncate(2)`): `"7"` is the inode that descriptor 7 is open
/// on, also after the server has given up its view of `/proc`.
///
/// # Errors
///
/// The host refuses `unshare(CLONE_FS)` or the change of directory, which need no privilege.
pub(super) fn prepare_thread(proc_fds: &OwnedFd) -> Result<()> {
    prepared(proc_fds).map(|_| ())
}

fn prepared(proc_fds: &OwnedFd) -> Result<Thread> {
    if let Some(thread) = THREAD.get() {
        return Ok(thread);
    }
    sys::unshare_fs_context()?;
    rustix::process::fchdir(proc_fds)?;
    rustix::process::umask(Mode::empty());
    let (own, power, overriding) = powers()?;
    let thread = Thread {
        power,
        overriding,
        own,
        now: own,
        umask: 0,
    };
    THREAD.set(Some(thread));
    Ok(thread)
}

/// The server's own ids, what this thread may do about its own, and whether its capabilities
/// make ids irrelevant.
fn powers() -> Result<(Ids, Power, bool)> {
    let own = Ids {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    };
    // A thread inherits the ids that its parent happens to wear.
    if sys::fs_gid()? != own.gid {
        sys::set_fs_gid(own.gid)?;
    }
    if sys::fs_uid()? != own.uid {
        sys::set_fs_uid(own.uid)?;
    }
    let sets = rustix::thread::capabilities(None)?;
    let needed = CapabilitySet::SETUID.union(CapabilitySet::SETGID);
    if !sets.effective.contains(needed) {
        return Ok((own, Power::None, false));
    }
    let overriding = sets.effective.contains(OVERRIDING);
    if keep_capabilities().is_ok() {
        return Ok((own, Power::Change, overriding));
    }
    Ok(match rustix::thread::set_capabilities(None, sets) {
        Ok(()) => (own, Power::ChangeAndRaise(sets), overriding),
        // Then the ids are put back each time, and with them the capabilities.
        Err(_) => (own, Power::Change, false),
    })
}

/// Makes this thread's capabilities stay whatever its file system uid becomes.
fn keep_capabilities() -> Result<()> {
    let bits = rustix::thread::capabilities_secure_bits()?;
    if bits.contains(CapabilitiesSecureBits::NO_SETUID_FIXUP) {
        return Ok(());
    }
    rustix::thread::set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)
}
