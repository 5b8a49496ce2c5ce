//! Tests of the checker: it finds nothing wrong with programs that use the shared directory
//! directly, and finds the losses of programs that keep using what a path once led to.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use host_changes::{Mounted, Plan, Programs, Result, Rules, Share, run};

fn plan(seed: u64) -> Plan {
    Plan {
        duration: Duration::from_secs(1),
        seed,
        pause: Duration::from_millis(3),
        rules: Rules::default(),
    }
}

#[test]
fn plain_directory_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let share = Share::new(root.path()).unwrap();
    let programs = vec![Mounted::at(root.path().to_owned()); 2];
    let report = run(&share, programs, &plan(1)).unwrap();
    assert_eq!(report.fault(), None);
    assert!(report.records > 0 && report.changes > 0, "{report}");
}

#[test]
fn programs_that_never_look_again_lose_records() {
    let root = tempfile::tempdir().unwrap();
    let share = Share::new(root.path()).unwrap();
    let programs = vec![Forgetful::at(root.path().to_owned())];
    let report = run(&share, programs, &plan(2)).unwrap();
    assert!(report.lost > 0, "{report}");
    assert!(report.fault().is_some());
}

/// A process that keeps using the inode that it once found at a path.
struct Forgetful {
    root: PathBuf,
    anywhere: Mounted,
    plain: Mounted,
    known: HashMap<String, File>,
}

impl Forgetful {
    fn at(root: PathBuf) -> Self {
        Self {
            anywhere: Mounted::at("/".into()),
            plain: Mounted::at(root.clone()),
            root,
            known: HashMap::new(),
        }
    }

    /// A path below the root of the host that leads to what was once at `path`.
    fn once(&mut self, path: &str) -> Option<String> {
        if !self.known.contains_key(path) {
            let mut options = std::fs::OpenOptions::new();
            let options = options.read(true).custom_flags(libc::O_PATH);
            let found = options.open(self.root.join(path)).ok()?;
            self.known.insert(path.to_owned(), found);
        }
        let fd = self.known.get(path)?.as_raw_fd();
        Some(format!("proc/self/fd/{fd}"))
    }
}

impl Programs for Forgetful {
    type File = File;

    fn open(&mut self, path: &str, flags: i32, mode: u32) -> Result<File> {
        match self.once(path) {
            Some(link) if flags & libc::O_EXCL == 0 => self.anywhere.open(&link, flags, mode),
            _ => self.plain.open(path, flags, mode),
        }
    }

    fn write(&mut self, file: &mut File, bytes: &[u8]) -> Result<()> {
        self.plain.write(file, bytes)
    }

    fn sync(&mut self, file: &mut File) -> Result<()> {
        self.plain.sync(file)
    }

    fn close(&mut self, file: File) -> Result<()> {
        self.plain.close(file)
    }

    fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        self.plain.read(path)
    }

    fn stat(&mut self, path: &str) -> Result<()> {
        self.plain.stat(path)
    }

    fn list(&mut self, path: &str) -> Result<Vec<String>> {
        self.plain.list(path)
    }

    fn truncate(&mut self, path: &str, length: u64) -> Result<()> {
        match self.once(path) {
            Some(link) => self.anywhere.truncate(&link, length),
            None => Err(libc::ENOENT),
        }
    }

    fn chmod(&mut self, path: &str, mode: u32) -> Result<()> {
        self.plain.chmod(path, mode)
    }

    fn set_attribute(&mut self, path: &str, value: &str) -> Result<()> {
        self.plain.set_attribute(path, value)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        self.known.remove(from);
        self.known.remove(to);
        self.plain.rename(from, to)
    }

    fn unlink(&mut self, path: &str) -> Result<()> {
        self.known.remove(path);
        self.plain.unlink(path)
    }

    fn mkdir(&mut self, path: &str) -> Result<()> {
        self.plain.mkdir(path)
    }

    fn drop_caches(&mut self) -> Result<()> {
        Ok(())
    }
}
