//! User namespaces, and mounts whose owners are mapped by one. Invariant: nothing made here
//! outlives its descriptor: no process is left behind, and no mount is attached anywhere.

#![expect(unsafe_code, reason = "system calls that no safe wrapper has")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};
use crate::fixture::path_of_descriptor;
use crate::process::{Baton, Child};

/// So many ids from `inside` on are those from `outside` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) inside: u32,
    pub(crate) outside: u32,
    pub(crate) count: u32,
}

/// A user namespace without processes.
#[derive(Debug)]
pub(crate) struct Namespace(File);

impl Namespace {
    /// One with these user and group ids.
    pub(crate) fn new(users: &[Range], groups: &[Range]) -> Result<Self, Failure> {
        let (made, seen) = (Baton::new()?, Baton::new()?);
        let child = Child::start(|| {
            // SAFETY: the child has one thread and shares nothing.
            done(unsafe { libc::unshare(libc::CLONE_NEWUSER) })?;
            made.pass()?;
            seen.wait()
        })?;
        // Should it fail it passes nothing on, and says why.
        let process = format!("/proc/{}", child.pid().as_raw_nonzero());
        let opened = wait_unless_ended(&made, &child).and_then(|()| {
            fs::write(format!("{process}/uid_map"), lines(users))?;
            fs::write(format!("{process}/gid_map"), lines(groups))?;
            Ok(File::open(format!("{process}/ns/user"))?)
        });
        seen.pass()?;
        child.join()?;
        opened.map(Self)
    }

    /// Does `act` in a process of its own, as the root of the namespace.
    pub(crate) fn as_root(&self, act: impl FnOnce() -> Outcome) -> Outcome {
        crate::process::in_child(|| {
            // SAFETY: takes a descriptor, which is open, and a flag; the child has one thread.
            done(unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWUSER) })?;
            // SAFETY: no group is read.
            done(unsafe { libc::setgroups(0, std::ptr::null()) })?;
            // SAFETY: takes numbers.
            done(unsafe { libc::setresgid(0, 0, 0) })?;
            // SAFETY: takes numbers.
            done(unsafe { libc::setresuid(0, 0, 0) })?;
            act()
        })
    }

    /// A mount of what is below `dir`, whose owners are mapped: what belongs to an id inside of the
    /// namespace belongs there to the one outside. `EINVAL` where the file system has no such mounts.
    pub(crate) fn mount(&self, dir: &Path) -> io::Result<Mapped> {
        let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes())?;
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
        // SAFETY: the path ends with a zero and is only read.
        let fd =
            unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        done(fd)?;
        // SAFETY: the call has just made it, and nothing else owns it.
        let tree = unsafe { OwnedFd::from_raw_fd(fd) };
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::try_from(self.0.as_raw_fd()).unwrap_or(u64::MAX),
        };
        // SAFETY: the empty path ends with a zero; `attributes` is read, as long as is said.
        let set = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                fd,
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        done(i32::try_from(set).unwrap_or(-1))?;
        Ok(Mapped(tree))
    }
}

/// A mount whose owners are mapped.
#[derive(Debug)]
pub(crate) struct Mapped(OwnedFd);

impl Mapped {
    /// The path of something on it.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        path_of_descriptor(&self.0).join(name)
    }
}

/// Waits for the baton; fails once the child that was to pass it on has ended.
fn wait_unless_ended(baton: &Baton, child: &Child) -> Outcome {
    use rustix::event::{PollFd, PollFlags, poll};
    let end = child.end_event()?;
    let mut fds = [
        PollFd::new(baton, PollFlags::IN),
        PollFd::new(&end, PollFlags::IN),
    ];
    poll(&mut fds, None)?;
    if fds[0].revents().is_empty() {
        return Err(Failure::new("no user namespace"));
    }
    baton.wait()
}

fn lines(ranges: &[Range]) -> String {
    let line = |range: &Range| format!("{} {} {}\n", range.inside, range.outside, range.count);
    ranges.iter().map(line).collect()
}

fn done(result: i32) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
