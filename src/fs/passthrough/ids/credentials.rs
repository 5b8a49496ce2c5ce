//! Sets the owner of new files: the thread takes the caller's file system ids and umask.
//!
//! The guest's kernel checks permissions before it sends a request, and on creation it knows more
//! than it tells (the caller's supplementary groups). So the caller's ids never decide whether
//! something is allowed; they only become the owner of new files. The invariant: with and without a
//! [`CredentialsGuard`], the thread has all the rights that the server has.
//!
//! A thread that changes its file system uid from 0 loses its capabilities over files (such as
//! `CAP_DAC_OVERRIDE`). `SECBIT_NO_SETUID_FIXUP` keeps them. If the thread may not set that bit, it
//! restores them with `capset` after the change, which needs no privilege. As the ids then don't
//! affect any right, they stay as the last creation left them, and another creation for the same
//! user costs no system call.
//!
//! What depends on the file system ids in spite of capabilities, and how it is handled:
//!
//! - opening an existing file with `O_CREAT` in a world-writable sticky directory
//!   (`fs.protected_regular`): creations always set `O_EXCL`, see `names`;
//! - ext4's blocks reserved for a uid: without `CAP_SYS_RESOURCE` the ids of the last creation
//!   apply;
//! - file systems whose server decides (NFS, SMB, 9P, FUSE, Ceph): the ids are restored when the
//!   guard is dropped, see [`CredentialPolicy::restored_each_time`];
//! - a server without the capabilities, which can only use what its own uid may use: likewise.
//!
//! Capabilities alone decide about sticky directories, `O_NOATIME`, `fs.protected_hardlinks`,
//! modes, ACLs and times of others' files (`CAP_FOWNER`), file capabilities (`CAP_SETFCAP`) and
//! device nodes (`CAP_MKNOD`). Quotas depend on the owner of the file. A process that has changed
//! credentials doesn't dump core unless `fs.suid_dumpable` allows it, and its threads lose their
//! parent-death signal.

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;

use rustix::fs::{Gid, Mode};
use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use crate::fs::{Caller, Result};
use crate::sys::credentials as sys;

/// Capabilities with which the file system uid doesn't affect what is allowed.
const OVERRIDING: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::CHOWN);

/// Whether this process may open every file, whoever owns it.
pub(crate) fn overrides() -> Result<bool> {
    let sets = rustix::thread::capabilities(None)?;
    Ok(sets.effective.contains(OVERRIDING))
}

/// File system ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ids {
    uid: u32,
    gid: u32,
}

/// What a thread may do with its ids.
#[derive(Clone, Copy, Debug)]
enum Power {
    /// Change them, keeping the capabilities.
    Change,
    /// Change them, and restore the capabilities after a change from uid 0.
    ChangeAndRaise(CapabilitySets),
    /// Nothing: every new file belongs to the server.
    None,
}

/// The state of the calling thread.
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

/// Whether ids stay on the thread, for one file system.
#[derive(Debug)]
pub(super) struct CredentialPolicy {
    restore: bool,
}

impl CredentialPolicy {
    /// The policy for the file system of `root`.
    pub(super) fn for_file_system(root: &OwnedFd) -> Result<Self> {
        /// Magic numbers of uapi `linux/magic.h`: NFS, SMB, CIFS, SMB 2, FUSE (virtio-fs too), 9P,
        /// Ceph, AFS (two), Coda; and Lustre.
        const REMOTE: [u32; 11] = [
            0x6969,
            0x517b,
            0xff53_4d42,
            0xfe53_4d42,
            0x6573_5546,
            0x0102_1997,
            0x00c3_6400,
            0x5346_414f,
            0x6b41_4653,
            0x7375_7245,
            0x0bd0_0bd0,
        ];
        let kind = rustix::fs::fstatfs(root)?.f_type;
        let is_remote = REMOTE
            .iter()
            .any(|&magic| i64::from(magic) == kind & 0xffff_ffff);
        Ok(if is_remote {
            Self::restored_each_time()
        } else {
            Self::kept_between_requests()
        })
    }

    /// For file systems that decide by capabilities, as local ones do.
    pub(super) fn kept_between_requests() -> Self {
        Self { restore: false }
    }

    /// For file systems where another machine or process decides by the ids what is allowed.
    pub(super) fn restored_each_time() -> Self {
        Self { restore: true }
    }

    /// Makes `caller` the owner of everything created until the guard is dropped, with the mode
    /// masked by `umask` (symbolic links have no mode). The kernel applies the mask, as only it
    /// knows whether a default ACL replaces it.
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
        // Created first, so that it reverts a change that fails half-way.
        let mut guard = CredentialsGuard {
            restore: (self.restore || !thread.overriding).then_some(thread.own),
            groups: None,
            not_send: PhantomData,
        };
        // If the ids decide what is allowed, the caller may be able to create there only because it
        // is in the directory's group.
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

/// While it exists, the thread creates files for a caller. It is bound to its thread and thus to
/// synchronous code: a future that can move between threads can't hold it across an await.
#[must_use]
pub(crate) struct CredentialsGuard {
    restore: Option<Ids>,
    groups: Option<Vec<Gid>>,
    not_send: PhantomData<*const ()>,
}

impl Drop for CredentialsGuard {
    fn drop(&mut self) {
        if let (Some(own), Some(mut thread)) = (self.restore, THREAD.get()) {
            // A thread may always set its own ids, and they are always mapped. If a seccomp filter
            // refuses it nevertheless, `THREAD` still has the current ids.
            if let Err(error) = change(&mut thread, own) {
                log::error!("can't restore the server's file system ids: {error}");
            }
        }
        if let Some(own) = &self.groups
            && let Err(error) = sys::set_groups(own)
        {
            log::error!("can't restore the server's groups: {error}");
        }
    }
}

/// Sets the thread's ids if it may. `THREAD` is updated with each step.
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

/// Gives the calling thread its own umask and working directory, the latter being `/proc/self/fd`,
/// and finds out what it may do with its ids. Further calls do nothing.
///
/// With this working directory, system calls that take only a path (`setxattr(2)` and the like,
/// `truncate(2)`) need no other call: `"7"` is the inode that descriptor 7 is open on, even after
/// the server has given up its view of `/proc`.
///
/// # Errors
///
/// The host refuses `unshare(CLONE_FS)` or the change of directory, neither of which needs a
/// privilege.
pub(crate) fn prepare_thread(proc_fds: &OwnedFd) -> Result<()> {
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

/// The server's own ids, what this thread may do with its ids, and whether its capabilities make
/// the ids irrelevant.
fn powers() -> Result<(Ids, Power, bool)> {
    let own = Ids {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    };
    // A thread inherits the current ids of the thread that created it.
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
        // The ids are then restored each time, and the capabilities with them.
        Err(_) => (own, Power::Change, false),
    })
}

/// Keeps this thread's capabilities when its file system uid changes.
fn keep_capabilities() -> Result<()> {
    let bits = rustix::thread::capabilities_secure_bits()?;
    if bits.contains(CapabilitiesSecureBits::NO_SETUID_FIXUP) {
        return Ok(());
    }
    rustix::thread::set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)
}
