//! A plain directory of the host, used by plain system calls.
//!
//! It does no more than what the trait says. The invariant: an inode is an `O_PATH` descriptor, so
//! it stays the same one whatever happens to its name.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::machine::{Attributes, Result, System};

/// A directory that is the root here.
pub(crate) struct Plain {
    root: Rc<OwnedFd>,
}

type At<'a> = (&'a Rc<OwnedFd>, &'a str);

fn errno(errno: Errno) -> i32 {
    errno.raw_os_error()
}

/// A name of what a descriptor stands for.
fn link(node: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", node.as_raw_fd())
}

fn flags(flags: i32) -> OFlags {
    OFlags::from_bits_retain(flags.cast_unsigned()) | OFlags::CLOEXEC
}

fn seen(node: &OwnedFd) -> Result<Attributes> {
    let stat = fs::fstat(node).map_err(errno)?;
    let kind = stat.st_mode & libc::S_IFMT;
    let nanoseconds = |count| u32::try_from(count).unwrap();
    Ok(Attributes {
        mode: stat.st_mode,
        links: u32::try_from(stat.st_nlink).unwrap(),
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: if kind == libc::S_IFDIR {
            0
        } else {
            stat.st_size.cast_unsigned()
        },
        accessed: (stat.st_atime, nanoseconds(stat.st_atime_nsec)),
        modified: (stat.st_mtime, nanoseconds(stat.st_mtime_nsec)),
    })
}

impl Plain {
    /// Takes a new directory as the root.
    pub(crate) fn in_directory(path: &Path) -> Self {
        std::fs::create_dir(path).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = Rc::new(fs::open(path, flags, Mode::empty()).unwrap());
        Self { root }
    }
}

impl System for Plain {
    type Node = Rc<OwnedFd>;
    type File = OwnedFd;

    fn root(&self) -> Rc<OwnedFd> {
        Rc::clone(&self.root)
    }

    fn lookup(&mut self, directory: &Rc<OwnedFd>, name: &str) -> Result<Rc<OwnedFd>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = fs::openat(&**directory, name, flags, Mode::empty());
        Ok(Rc::new(node.map_err(errno)?))
    }

    fn attributes(&mut self, node: &Rc<OwnedFd>) -> Result<Attributes> {
        seen(node)
    }

    fn create(&mut self, at: At<'_>, mode: u32, how: i32) -> Result<OwnedFd> {
        let flags = flags(how) | OFlags::NOFOLLOW;
        let made = fs::openat(&**at.0, at.1, flags, Mode::from_raw_mode(mode));
        made.map_err(errno)
    }

    fn make_directory(&mut self, at: At<'_>, mode: u32) -> Result<()> {
        fs::mkdirat(&**at.0, at.1, Mode::from_raw_mode(mode)).map_err(errno)
    }

    fn make_pipe(&mut self, at: At<'_>, mode: u32) -> Result<()> {
        let mode = Mode::from_raw_mode(mode);
        fs::mknodat(&**at.0, at.1, fs::FileType::Fifo, mode, 0).map_err(errno)
    }

    fn symlink(&mut self, at: At<'_>, to: &str) -> Result<()> {
        fs::symlinkat(to, &**at.0, at.1).map_err(errno)
    }

    fn read_link(&mut self, node: &Rc<OwnedFd>) -> Result<Vec<u8>> {
        let read = fs::readlinkat(&**node, "", Vec::new());
        Ok(read.map_err(errno)?.into_bytes())
    }

    fn link(&mut self, node: &Rc<OwnedFd>, at: At<'_>) -> Result<()> {
        let follow = AtFlags::SYMLINK_FOLLOW;
        fs::linkat(CWD, link(node), &**at.0, at.1, follow).map_err(errno)
    }

    fn unlink(&mut self, at: At<'_>) -> Result<()> {
        fs::unlinkat(&**at.0, at.1, AtFlags::empty()).map_err(errno)
    }

    fn remove_directory(&mut self, at: At<'_>) -> Result<()> {
        fs::unlinkat(&**at.0, at.1, AtFlags::REMOVEDIR).map_err(errno)
    }

    fn rename(&mut self, from: At<'_>, to: At<'_>, flags: u32) -> Result<()> {
        let flags = fs::RenameFlags::from_bits_retain(flags);
        fs::renameat_with(&**from.0, from.1, &**to.0, to.1, flags).map_err(errno)
    }

    fn set_mode(&mut self, node: &Rc<OwnedFd>, mode: u32) -> Result<()> {
        let mode = Mode::from_raw_mode(mode);
        fs::chmodat(CWD, link(node), mode, AtFlags::empty()).map_err(errno)
    }

    fn set_owner(&mut self, node: &Rc<OwnedFd>, uid: u32, gid: u32) -> Result<()> {
        let (uid, gid) = (fs::Uid::from_raw(uid), fs::Gid::from_raw(gid));
        let node = &**node;
        fs::chownat(node, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH).map_err(errno)
    }

    fn set_times(&mut self, node: &Rc<OwnedFd>, at: (i64, u32)) -> Result<()> {
        let time = Timespec {
            tv_sec: at.0,
            tv_nsec: at.1.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        fs::utimensat(&**node, "", &times, AtFlags::EMPTY_PATH).map_err(errno)
    }

    fn truncate(&mut self, node: &Rc<OwnedFd>, length: u64) -> Result<()> {
        let file = self.open(node, libc::O_WRONLY)?;
        fs::ftruncate(file, length).map_err(errno)
    }

    fn list(&mut self, node: &Rc<OwnedFd>, _: u32, _: bool) -> Result<Vec<(String, u32)>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = fs::openat(&**node, ".", flags, Mode::empty()).map_err(errno)?;
        let mut names = Vec::new();
        let mut buffer = Vec::with_capacity(1 << 16);
        // Not `Dir`, which takes a directory that is no more (ENOENT) for an empty one.
        let mut entries = fs::RawDir::new(opened, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(errno)?;
            let kind = match entry.file_type() {
                fs::FileType::Directory => libc::DT_DIR,
                fs::FileType::RegularFile => libc::DT_REG,
                fs::FileType::Symlink => libc::DT_LNK,
                fs::FileType::Fifo => libc::DT_FIFO,
                other => unreachable!("nothing here makes {other:?}"),
            };
            let name = entry.file_name().to_str().unwrap().to_owned();
            names.push((name, kind.into()));
        }
        Ok(names)
    }

    fn set_attribute(
        &mut self,
        node: &Rc<OwnedFd>,
        name: &CStr,
        value: &[u8],
        flags: i32,
    ) -> Result<()> {
        let flags = fs::XattrFlags::from_bits_retain(flags.cast_unsigned());
        fs::setxattr(link(node), name, value, flags).map_err(errno)
    }

    fn attribute(&mut self, node: &Rc<OwnedFd>, name: &CStr) -> Result<Vec<u8>> {
        let mut value = vec![0; 1 << 16];
        let length = fs::getxattr(link(node), name, &mut value[..]).map_err(errno)?;
        value.truncate(length);
        Ok(value)
    }

    fn remove_attribute(&mut self, node: &Rc<OwnedFd>, name: &CStr) -> Result<()> {
        fs::removexattr(link(node), name).map_err(errno)
    }

    fn list_attributes(&mut self, node: &Rc<OwnedFd>) -> Result<Vec<String>> {
        let mut names = vec![0; 1 << 16];
        let length = fs::listxattr(link(node), &mut names[..]).map_err(errno)?;
        let names = names[..length].split_inclusive(|byte| *byte == 0);
        let text = |name| CStr::from_bytes_with_nul(name).unwrap().to_str().unwrap();
        Ok(names.map(|name| text(name).to_owned()).collect())
    }

    fn open(&mut self, node: &Rc<OwnedFd>, how: i32) -> Result<OwnedFd> {
        fs::open(link(node), flags(how), Mode::empty()).map_err(errno)
    }

    fn read(&mut self, file: &OwnedFd, offset: u64, length: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        let read = rustix::io::pread(file, &mut bytes[..], offset).map_err(errno)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    fn write(&mut self, file: &OwnedFd, offset: u64, bytes: &[u8]) -> Result<usize> {
        rustix::io::pwrite(file, bytes, offset).map_err(errno)
    }

    fn allocate(&mut self, file: &OwnedFd, mode: i32, offset: u64, length: u64) -> Result<()> {
        let mode = fs::FallocateFlags::from_bits_retain(mode.cast_unsigned());
        fs::fallocate(file, mode, offset, length).map_err(errno)
    }

    fn set_length(&mut self, file: &OwnedFd, length: u64) -> Result<()> {
        fs::ftruncate(file, length).map_err(errno)
    }

    fn file_attributes(&mut self, file: &OwnedFd) -> Result<Attributes> {
        seen(file)
    }

    fn copy(&mut self, from: (&OwnedFd, u64), to: (&OwnedFd, u64), length: u32) -> Result<usize> {
        let (mut at, mut there) = (from.1, to.1);
        let length = length as usize;
        let copied = fs::copy_file_range(from.0, Some(&mut at), to.0, Some(&mut there), length);
        copied.map_err(errno)
    }

    fn sync(&mut self, file: &OwnedFd, data_only: bool) -> Result<()> {
        let synced = if data_only {
            fs::fdatasync(file)
        } else {
            fs::fsync(file)
        };
        synced.map_err(errno)
    }

    fn close(&mut self, file: OwnedFd) -> Result<()> {
        drop(file);
        Ok(())
    }

    fn forget(&mut self, _: &[&Rc<OwnedFd>]) -> Result<()> {
        Ok(())
    }
}
