//! What a server uses: CPU time, threads, context switches, memory.
//!
//! A server may be several processes (one that waits and one that serves, in a sandbox): all
//! descendants of the given one are counted with it. CPU time is the kernel's own count of
//! nanoseconds for each whole process, threads that have ended included. The invariant: a
//! [`Process`] is read, never changed.

#![expect(
    unsafe_code,
    reason = "the CPU clock of another process has no safe wrapper"
)]

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;

/// Errors of reading a process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    /// There is no such process, or it may not be inspected.
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

/// The name that `vmm` gives to the file of the guest's memory.
const GUEST_MEMORY: &str = "/memfd:guest";

/// A process to be measured, with its descendants.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    first: Part,
    others: Vec<Part>,
}

/// One of the processes.
#[derive(Clone, Copy, Debug)]
struct Part {
    pid: i32,
    clock: libc::clockid_t,
}

/// The counters of a process at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    cpu: u64,
    /// The context switches of each thread.
    switches: HashMap<i32, u64>,
}

/// What a process used between two moments, and what it has at the second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Nanoseconds.
    pub(crate) cpu: u64,
    pub(crate) switches: u64,
    pub(crate) threads: u64,
    /// KiB without the guest's memory; of memory that several processes share, this one's part.
    pub(crate) memory: u64,
    /// KiB that no other process maps, without the guest's memory.
    pub(crate) private: u64,
}

impl Process {
    /// The process with this id, and all its current descendants.
    pub(crate) fn new(pid: i32) -> Result<Self, ProcessError> {
        let first = Part::new(pid)?;
        let children = children();
        let of = |parent| children.get(&parent).into_iter().flatten().copied();
        let mut found: Vec<i32> = of(pid).collect();
        let mut next = 0;
        while let Some(child) = found.get(next) {
            found.extend(of(*child));
            next += 1;
        }
        // A process that has ended in the meantime is left out.
        let others = found.into_iter().filter_map(|child| Part::new(child).ok());
        let process = Self {
            first,
            others: others.collect(),
        };
        process.counters()?;
        Ok(process)
    }

    /// The current counters.
    pub(crate) fn counters(&self) -> Result<Counters, ProcessError> {
        let mut counters = self.first.counters()?;
        // If one of the others has ended, its counters are lost.
        for other in self.others.iter().filter_map(|other| other.counters().ok()) {
            counters.cpu += other.cpu;
            counters.switches.extend(other.switches);
        }
        Ok(counters)
    }

    /// What it has used since then.
    pub(crate) fn since(&self, before: &Counters) -> Result<Usage, ProcessError> {
        let now = self.counters()?;
        let switches = now.switches.iter().map(|(thread, count)| {
            let earlier = before.switches.get(thread).copied().unwrap_or(0);
            count.saturating_sub(earlier)
        });
        let (mut threads, mut memory) = self.first.size()?;
        for other in self.others.iter().filter_map(|other| other.size().ok()) {
            threads += other.0;
            memory.shared += other.1.shared;
            memory.private += other.1.private;
        }
        Ok(Usage {
            cpu: now.cpu.saturating_sub(before.cpu),
            switches: switches.sum(),
            threads,
            memory: memory.shared,
            private: memory.private,
        })
    }

    /// Whether it has a descriptor of `file` with these flags. Files are compared by number, as a process
    /// may have another root.
    pub(crate) fn has_open(&self, file: &std::path::Path, flags: i32) -> bool {
        let mut parts = std::iter::once(&self.first).chain(&self.others);
        parts.any(|part| part.has_open(file, flags))
    }
}

impl Part {
    fn new(pid: i32) -> Result<Self, ProcessError> {
        let mut clock = 0;
        // SAFETY: the pointer is to a live local of the type that the function writes.
        let code = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
        if code != 0 {
            let source = io::Error::from_raw_os_error(code);
            return Err(ProcessError::Clock { pid, source });
        }
        Ok(Self { pid, clock })
    }

    fn counters(&self) -> Result<Counters, ProcessError> {
        Ok(Counters {
            cpu: self.cpu()?,
            switches: self.switches()?,
        })
    }

    /// Threads, and KiB of memory.
    fn size(&self) -> Result<(u64, Memory), ProcessError> {
        let threads = field(&self.read("status")?, "Threads:");
        Ok((threads, memory(&self.read("smaps")?)))
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

    fn has_open(&self, file: &std::path::Path, flags: i32) -> bool {
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

/// The running children of each process.
fn children() -> HashMap<i32, Vec<i32>> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        if let Ok(parent) = i32::try_from(field(&status, "PPid:")) {
            children.entry(parent).or_default().push(pid);
        }
    }
    children
}

/// KiB of a process without the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Memory {
    /// With this process's part of what other processes map too.
    shared: u64,
    /// Only what no other process maps.
    private: u64,
}

/// The memory of all mappings (`/proc/PID/smaps`) except the guest's.
fn memory(smaps: &str) -> Memory {
    let (mut sum, mut guests) = (Memory::default(), false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // The first line of a mapping: addresses, access, offset, device, inode, path.
            guests = words.nth(4) == Some(GUEST_MEMORY);
        } else if !guests {
            let kib = words.next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
            match first {
                "Pss:" => sum.shared += kib,
                "Private_Clean:" | "Private_Dirty:" => sum.private += kib,
                _ => {}
            }
        }
    }
    sum
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
        let before = process.counters().unwrap();
        let mut sum = 0_u64;
        for number in 0..20_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_add(number));
        }
        let used = process.since(&before).unwrap();
        assert!(used.cpu > 1_000_000, "{used:?}");
        assert!(used.threads >= 1 && used.memory > 0, "{used:?}");
    }

    #[test]
    fn the_guests_memory_is_not_the_servers() {
        let smaps = "\
7f0000000000-7f0000001000 rw-s 00000000 00:01 2048 /memfd:guest (deleted)
Rss:                  40 kB
Pss:                  20 kB
Private_Dirty:        16 kB
7f0000001000-7f0000002000 rw-s 00000000 00:01 2049 /memfd:state (deleted)
Pss:                   4 kB
Pss_Dirty:             4 kB
7f0000002000-7f0000003000 rw-p 00000000 00:00 0
Pss:                   8 kB
Private_Clean:         1 kB
Private_Dirty:         6 kB
";
        let found = memory(smaps);
        assert_eq!((found.shared, found.private), (12, 7));
    }

    #[test]
    fn a_child_counts_with_its_parent() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::new(own).unwrap();
        let number = i32::try_from(child.id()).unwrap();
        let counted = process.others.iter().any(|part| part.pid == number);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(counted, "{process:?}");
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
