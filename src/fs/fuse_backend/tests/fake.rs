//! A file system that records what it is asked.

use std::ffi::CStr;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry as BackendDirEntry, Entry as BackendEntry, FileLock, FileSystem as Trait,
    FsOptions, GetxattrReply, OpenOptions, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rustix::io::Errno;

/// A file system that has what the name says, and records its calls.
pub(super) struct Fake {
    pub(super) calls: Arc<Mutex<Vec<String>>>,
    /// What INIT wants.
    pub(super) wants: FsOptions,
    /// Address and length of the memory that data went to or came from.
    pub(super) memory: Mutex<Vec<(usize, usize)>>,
    pub(super) panics: AtomicBool,
    /// Whether OPEN returns no handle.
    pub(super) without_handles: bool,
    pub(super) mode: Mutex<u32>,
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            calls: Arc::default(),
            wants: FsOptions::empty(),
            memory: Mutex::default(),
            panics: AtomicBool::new(false),
            without_handles: false,
            mode: Mutex::default(),
        }
    }
}

/// A file of ones, which remembers where it was read to or written from.
struct Ones<'a>(&'a Fake);

impl FileReadWriteVolatile for Ones<'_> {
    fn read_volatile(&mut self, _: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(Errno::INVAL.into())
    }

    fn write_volatile(&mut self, _: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(Errno::INVAL.into())
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, _: u64) -> io::Result<usize> {
        self.read_vectored_at_volatile(&[slice], 0)
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice<'_>, _: u64) -> io::Result<usize> {
        self.write_vectored_at_volatile(&[slice], 0)
    }

    fn read_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        self.0
            .record(format!("{} pieces at {offset}", slices.len()));
        let mut memory = self.0.memory.lock().unwrap();
        memory.extend(
            slices
                .iter()
                .map(|slice| (slice.as_ptr().addr(), slice.len())),
        );
        Ok(slices.iter().map(FileVolatileSlice::len).sum())
    }

    fn write_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        self.read_vectored_at_volatile(slices, offset)
    }
}

impl Fake {
    fn record(&self, call: impl Into<String>) {
        assert!(!self.panics.load(Ordering::Relaxed), "as it was told");
        self.calls.lock().unwrap().push(call.into());
    }

    fn stat(&self, inode: u64) -> stat64 {
        let mut stat = BackendEntry::default().attr;
        stat.st_ino = inode;
        stat.st_mode = *self.mode.lock().unwrap();
        stat
    }

    fn entry(&self, inode: u64) -> BackendEntry {
        BackendEntry {
            inode,
            generation: 3,
            attr: self.stat(inode),
            attr_flags: u32::from(inode == 9),
            attr_timeout: Duration::from_secs(1),
            entry_timeout: Duration::from_secs(2),
        }
    }
}

/// Names are the numbers of inodes.
fn number(name: &CStr) -> io::Result<u64> {
    let name = name.to_str().unwrap();
    name.parse()
        .map_err(|_not_a_number| io::ErrorKind::NotFound.into())
}

impl Trait for Fake {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.record(format!("init {:?}", capable & FsOptions::WRITEBACK_CACHE));
        Ok(self.wants)
    }

    fn destroy(&self) {
        self.record("destroy");
    }

    fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<BackendEntry> {
        let Context { uid, gid, pid } = context;
        self.record(format!("lookup {parent}/{name:?} {uid} {gid} {pid}"));
        number(name).map(|inode| self.entry(inode))
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.record(format!("forget {inode} {count}"));
    }

    fn getattr(
        &self,
        _: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.record(format!("getattr {inode} {handle:?}"));
        Ok((self.stat(inode), Duration::from_secs(5)))
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        stat: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (mode, time) = (stat.st_mode, (stat.st_mtime, stat.st_mtime_nsec));
        self.record(format!(
            "setattr {inode} {handle:?} {valid:?} {mode:o} {time:?}"
        ));
        Ok((self.stat(inode), Duration::ZERO))
    }

    fn mkdir(
        &self,
        _: &Context,
        _: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<BackendEntry> {
        self.record(format!("mkdir {mode:o} {umask:o}"));
        number(name).map(|inode| self.entry(inode))
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.record(format!("rmdir {parent}/{name:?}"));
        Ok(())
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        self.record(format!("open {inode} {flags:#o} {fuse_flags}"));
        let handle = (!self.without_handles).then_some(inode + 1000);
        Ok((handle, OpenOptions::KEEP_CACHE, None))
    }

    fn create(
        &self,
        _: &Context,
        _: u64,
        name: &CStr,
        arguments: CreateIn,
    ) -> io::Result<(BackendEntry, Option<u64>, OpenOptions, Option<u32>)> {
        let CreateIn { flags, mode, .. } = arguments;
        self.record(format!("create {flags:#o} {mode:o}"));
        let entry = self.entry(number(name)?);
        let handle = (!self.without_handles).then_some(entry.inode + 1000);
        Ok((entry, handle, OpenOptions::DIRECT_IO, None))
    }

    fn read(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.record(format!("read {inode} {handle} {} {flags:#o}", context.uid));
        let size = usize::try_from(size).unwrap();
        assert_eq!(writer.available_bytes(), size);
        writer.write_from(&mut Ones(self), size, offset)
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        flags: u32,
        _: u32,
    ) -> io::Result<usize> {
        self.record(format!("write {inode} {handle} {flags:#o}"));
        reader.read_to(&mut Ones(self), usize::try_from(size).unwrap(), offset)
    }

    fn flush(&self, _: &Context, inode: u64, handle: u64, owner: u64) -> io::Result<()> {
        self.record(format!("flush {inode} {handle} {owner}"));
        Ok(())
    }

    fn fsync(&self, _: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.record(format!("fsync {inode} {handle} {data_only}"));
        Ok(())
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        _: bool,
        unlocks: bool,
        owner: Option<u64>,
    ) -> io::Result<()> {
        self.record(format!(
            "release {inode} {handle} {flags:#o} {unlocks} {owner:?}"
        ));
        Ok(())
    }

    fn setxattr(&self, _: &Context, _: u64, _: &CStr, _: &[u8], _: u32) -> io::Result<()> {
        self.record("setxattr");
        Err(Errno::OPNOTSUPP.into())
    }

    fn getxattr(&self, _: &Context, _: u64, _: &CStr, size: u32) -> io::Result<GetxattrReply> {
        match size {
            0 => Ok(GetxattrReply::Count(5)),
            5.. => Ok(GetxattrReply::Value(b"value".to_vec())),
            _ => Err(Errno::RANGE.into()),
        }
    }

    fn opendir(&self, _: &Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.record(format!("opendir {inode}"));
        Ok((Some(inode), OpenOptions::CACHE_DIR))
    }

    fn readdirplus(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(BackendDirEntry<'_>, BackendEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        // As the overlay does it: whatever is added may make it more than `size`, and what isn't
        // is not uncounted.
        let mut used = 0;
        let names = [".", ".."].map(str::to_owned).into_iter();
        for (n, name) in (0_u64..).zip(names.chain((10..60).map(|n: u64| n.to_string()))) {
            let inode = name.parse().unwrap_or(7);
            if n < offset {
                continue;
            }
            self.record(format!("found {inode}"));
            let dir_entry = BackendDirEntry {
                ino: inode,
                offset: n + 1,
                type_: libc::DT_REG.into(),
                name: name.as_bytes(),
            };
            match add(dir_entry, self.entry(inode))? {
                0 => break,
                len => used += len,
            }
            if used >= usize::try_from(size).unwrap() {
                break;
            }
        }
        Ok(())
    }

    fn releasedir(&self, _: &Context, inode: u64, _: u32, handle: u64) -> io::Result<()> {
        self.record(format!("releasedir {inode} {handle}"));
        Ok(())
    }

    fn setlk(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<()> {
        let FileLock {
            start,
            end,
            lock_type,
            ..
        } = lock;
        self.record(format!("setlk {owner} {start}-{end} {lock_type} {flags}"));
        Ok(())
    }
}
