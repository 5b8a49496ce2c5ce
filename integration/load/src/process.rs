//! What a process uses: CPU time, threads, context switches, memory.
//!
//! CPU time is the kernel's own count of nanoseconds for the whole process, threads that have
//! ended included. The invariant: a [`Process`] is read, never touched.

#![expect(
    unsafe_code,
    reason = "the CPU clock of another process has no safe wrapper"
)]

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;

/// What can go wrong with reading a process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    /// No such process, or not ours to see.
    #[error("can't read the CPU clock of process {pid}")]
    Clock {
        pid: i32,
        #[source]
        source: io::Error,
    },
    /// Its files in /proc could not be read.
    #[error("can't read {path}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// A process to be measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    pid: i32,
    clock: libc::clockid_t,
}

/// A moment of a process.
#[derive(Clone, Debug)]
pub(crate) struct Moment {
    cpu: u64,
    /// Of each thread.
    switches: HashMap<i32, u64>,
}

/// What a process used between two moments, and has at the second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Nanoseconds.
    pub(crate) cpu: u64,
    pub(crate) switches: u64,
    pub(crate) threads: u64,
    /// KiB, the guest's memory not counted.
    pub(crate) memory: u64,
}

impl Process {
    /// The process of this number, or its child, if it has one that runs the same program: a
    /// server in a sandbox is two processes, of which the child serves.
    pub(crate) fn new(pid: i32) -> Result<Self, ProcessError> {
        let pid = serving_child(pid).unwrap_or(pid);
        let mut clock = 0;
        // SAFETY: the pointer is to a live local of the type that the function writes.
        let code = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
        if code != 0 {
            let source = io::Error::from_raw_os_error(code);
            return Err(ProcessError::Clock { pid, source });
        }
        let process = Self { pid, clock };
        process.moment()?;
        Ok(process)
    }

    /// How it is now.
    pub(crate) fn moment(&self) -> Result<Moment, ProcessError> {
        Ok(Moment {
            cpu: self.cpu()?,
            switches: self.switches()?,
        })
    }

    /// What it has used since.
    pub(crate) fn since(&self, before: &Moment) -> Result<Usage, ProcessError> {
        let now = self.moment()?;
        let switches = now.switches.iter().map(|(thread, count)| {
            let earlier = before.switches.get(thread).copied().unwrap_or(0);
            count.saturating_sub(earlier)
        });
        let status = self.read("status")?;
        let resident = field(&status, "VmRSS:");
        Ok(Usage {
            cpu: now.cpu.saturating_sub(before.cpu),
            switches: switches.sum(),
            threads: field(&status, "Threads:"),
            memory: resident.saturating_sub(field(&status, "RssShmem:")),
        })
    }

    fn cpu(&self) -> Result<u64, ProcessError> {
        let mut time = MaybeUninit::<libc::timespec>::uninit();
        // SAFETY: the pointer is to a live local of the type that the function writes.
        let code = unsafe { libc::clock_gettime(self.clock, time.as_mut_ptr()) };
        if code != 0 {
            let (pid, source) = (self.pid, io::Error::last_os_error());
            return Err(ProcessError::Clock { pid, source });
        }
        // SAFETY: the call succeeded, so it has written the whole structure.
        let time = unsafe { time.assume_init() };
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        Ok(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
    }

    fn switches(&self) -> Result<HashMap<i32, u64>, ProcessError> {
        let path = format!("/proc/{}/task", self.pid);
        let read = |source| ProcessError::Read {
            path: path.clone(),
            source,
        };
        let mut switches = HashMap::new();
        for entry in fs::read_dir(&path).map_err(read)? {
            let name = entry.map_err(read)?.file_name();
            let Some(thread) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A thread may end while it is read.
            let Ok(status) = self.read(&format!("task/{thread}/status")) else {
                continue;
            };
            let voluntary = field(&status, "voluntary_ctxt_switches:");
            let count = voluntary + field(&status, "nonvoluntary_ctxt_switches:");
            switches.insert(thread, count);
        }
        Ok(switches)
    }

    /// Whether it has a descriptor of `file` with these flags; by number, as a process may have
    /// another root.
    pub(crate) fn has_open(&self, file: &std::path::Path, flags: i32) -> bool {
        let number_of = |path: &std::path::Path| {
            let there = fs::metadata(path).ok()?;
            Some((there.dev(), there.ino()))
        };
        let Some(file) = number_of(file) else {
            return false;
        };
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else {
            return false;
        };
        entries.flatten().any(|entry| {
            let same = number_of(&entry.path()) == Some(file);
            let number = entry.file_name();
            same && number.to_str().is_some_and(|number| {
                let info = self.read(&format!("fdinfo/{number}")).unwrap_or_default();
                let line = info.lines().find_map(|line| line.strip_prefix("flags:"));
                let found = line.and_then(|line| i32::from_str_radix(line.trim(), 8).ok());
                found.is_some_and(|found| found & flags == flags && found & libc::O_PATH == 0)
            })
        })
    }

    fn read(&self, name: &str) -> Result<String, ProcessError> {
        let path = format!("/proc/{}/{name}", self.pid);
        fs::read_to_string(&path).map_err(|source| ProcessError::Read { path, source })
    }
}

/// The child of `pid` that runs the same program.
fn serving_child(pid: i32) -> Option<i32> {
    let program = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let own = program(pid)?;
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let child = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(format!("/proc/{child}/status")).ok()?;
        let parent = u64::try_from(pid).ok()?;
        (field(&status, "PPid:") == parent && program(child)? == own).then_some(child)
    })
}

/// The number after this name at the beginning of a line.
fn field(status: &str, name: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix(name));
    let number = value.and_then(|value| value.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_as_cpu_time_and_threads_are_counted() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let process = Process::new(pid).unwrap();
        let before = process.moment().unwrap();
        let mut sum = 0_u64;
        for number in 0..20_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_add(number));
        }
        let used = process.since(&before).unwrap();
        assert!(used.cpu > 1_000_000, "{used:?}");
        assert!(used.threads >= 1 && used.memory > 0, "{used:?}");
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(Process::new(0x3f_ffff).is_err());
    }

    #[test]
    fn descriptors_are_found_by_their_flags() {
        let process = Process::new(i32::try_from(std::process::id()).unwrap()).unwrap();
        let path = fs::canonicalize("/proc/self/exe").unwrap();
        let _open = fs::File::open(&path).unwrap();
        assert!(process.has_open(&path, 0));
        assert!(!process.has_open(&path, libc::O_APPEND));
    }
}
