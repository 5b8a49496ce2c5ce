//! Processes of a check's own: children that do a part of it and report the result, also as another
//! user, and a baton to take turns by. Invariant: a child never returns into the code that forked
//! it, and what it found reaches its parent.

#![expect(
    unsafe_code,
    reason = "fork, and what has to be done to a process after it"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};

use crate::failure::{Failure, Outcome};

/// Who a child runs as.
#[derive(Clone, Copy, Debug)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: &'static [u32],
}

/// The user that most checks mean.
pub(crate) const ALICE: User = User {
    uid: 1000,
    gid: 1000,
    groups: &[],
};

/// Another one.
pub(crate) const BOB: User = User {
    uid: 1001,
    gid: 1001,
    groups: &[],
};

/// A process that does a part of a check.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    report: File,
}

impl Child {
    /// Forks a child that does `act` and ends.
    pub(crate) fn start(act: impl FnOnce() -> Outcome) -> Result<Self, Failure> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // SAFETY: no thread but this one exists here, by the runner's design: checks start their
        // threads after their children, or join them before.
        let pid = unsafe { libc::fork() };
        match pid {
            0 => {
                drop(read);
                finish(act(), write)
            }
            _ => match Pid::from_raw(pid) {
                Some(pid) if !pid.is_init() => Ok(Self {
                    pid,
                    report: File::from(read),
                }),
                _ => Err(std::io::Error::last_os_error().into()),
            },
        }
    }

    /// Forks a child that does `act` as `user`.
    pub(crate) fn start_as(user: User, act: impl FnOnce() -> Outcome) -> Result<Self, Failure> {
        Self::start(move || {
            become_user(user)?;
            act()
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// A descriptor that becomes readable when the child has ended.
    pub(crate) fn end_event(&self) -> Result<OwnedFd, Failure> {
        let flags = rustix::process::PidfdFlags::empty();
        Ok(rustix::process::pidfd_open(self.pid, flags)?)
    }

    /// Waits for the child's end and passes on how it went.
    pub(crate) fn join(self) -> Outcome {
        let (status, said) = self.end()?;
        match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => Ok(()),
            (Some(1), _) if !said.is_empty() => Err(Failure::reported(&said)),
            (Some(code), _) => Err(Failure::reported(&format!("ended with {code}"))),
            (_, Some(libc::SIGALRM)) => Err(Failure::reported("did not end in its time")),
            (_, Some(signal)) => Err(Failure::reported(&format!("killed by signal {signal}"))),
            _ => Err(Failure::reported("neither ended nor killed")),
        }
    }

    /// Waits for the child's end, to see which signal it was, if any.
    pub(crate) fn signal(self) -> Result<Option<i32>, Failure> {
        Ok(self.end()?.0.terminating_signal())
    }

    fn end(mut self) -> Result<(WaitStatus, String), Failure> {
        // The child first: a grandchild may hold the pipe open for longer.
        let mut status = None;
        while status.is_none() {
            status = match waitpid(Some(self.pid), WaitOptions::empty()) {
                Ok(ended) => ended.map(|(_, status)| status),
                Err(rustix::io::Errno::INTR) => None,
                Err(error) => return Err(error.into()),
            };
        }
        let status = status.ok_or_else(|| Failure::new("no status"))?;
        let mut said = String::new();
        if status.exit_status() == Some(1) {
            rustix::io::ioctl_fionbio(self.report.as_fd(), true)?;
            let mut bytes = vec![0; 8192];
            let length = self.report.read(&mut bytes).unwrap_or(0);
            said = String::from_utf8_lossy(&bytes[..length]).into_owned();
        }
        Ok((status, said))
    }

    /// Waits until the child sleeps in the kernel, for half a second at most: makes it likely that
    /// it waits for what it is meant to wait for. Nothing may depend on it.
    pub(crate) fn let_it_sleep(&self) {
        let path = format!("/proc/{}/stat", self.pid.as_raw_nonzero());
        let deadline = Instant::now() + Duration::from_millis(500);
        while Instant::now() < deadline {
            let stat = std::fs::read_to_string(&path).unwrap_or_default();
            let state = stat.rsplit(") ").next().and_then(|s| s.chars().next());
            if matches!(state, Some('S' | 'D') | None) {
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// Does `act` in a process of its own.
pub(crate) fn in_child(act: impl FnOnce() -> Outcome) -> Outcome {
    Child::start(act)?.join()
}

/// Does `act` in a process of its own, as `user`.
pub(crate) fn as_user(user: User, act: impl FnOnce() -> Outcome) -> Outcome {
    Child::start_as(user, act)?.join()
}

/// Gives this process a limited time: after it the kernel ends it.
pub(crate) fn limit_time(limit: Duration) {
    let seconds = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX);
    // SAFETY: alarm takes any number.
    unsafe { libc::alarm(seconds) };
}

/// Sets the mask for the modes of what this process creates.
pub(crate) fn set_umask(mask: u32) {
    let _ = rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask));
}

/// Gets the limit of open files up to what is allowed.
pub(crate) fn raise_open_files(wanted: u64) -> Outcome {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let maximum = now.maximum.map(|maximum| maximum.max(wanted));
    Ok(setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(wanted),
            maximum,
        },
    )?)
}

fn become_user(user: User) -> Outcome {
    let done = |result: i32| match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: the pointer and the length are those of one slice, which is only read.
    done(unsafe { libc::setgroups(user.groups.len(), user.groups.as_ptr()) })?;
    // SAFETY: setgid takes any number.
    done(unsafe { libc::setgid(user.gid) })?;
    // SAFETY: setuid takes any number.
    done(unsafe { libc::setuid(user.uid) })?;
    Ok(())
}

fn finish(outcome: Outcome, report: OwnedFd) -> ! {
    let code = match outcome {
        Ok(()) => 0,
        Err(failure) => {
            let mut text = failure.to_string();
            text = text.chars().take(1000).collect();
            // The exit status tells that it failed even where this can't be told.
            let _ = File::from(report).write_all(text.as_bytes());
            1
        }
    };
    let _ = std::io::stdout().flush();
    // SAFETY: ends the process at once; nothing of it is needed any more.
    unsafe { libc::_exit(code) }
}

/// Two processes take turns by it: one waits until the other passes it on.
#[derive(Debug)]
pub(crate) struct Baton {
    read: File,
    write: File,
}

impl Baton {
    pub(crate) fn new() -> Result<Self, Failure> {
        let (read, write) = rustix::pipe::pipe()?;
        Ok(Self {
            read: read.into(),
            write: write.into(),
        })
    }

    pub(crate) fn pass(&self) -> Outcome {
        Ok((&self.write).write_all(b"!")?)
    }

    pub(crate) fn wait(&self) -> Outcome {
        let mut byte = [0];
        Ok((&self.read).read_exact(&mut byte)?)
    }
}

/// Readable when it has been passed on.
impl AsFd for Baton {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}
