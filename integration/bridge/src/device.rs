//! `/dev/fuse`: opens it, mounts it, clones it for further threads, unmounts it.
//!
//! It knows nothing of requests. The invariant: a [`Device`] that exists belongs to a mount, so
//! reading it never fails for want of one.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// FUSE_DEV_IOC_CLONE.
const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);

/// Errors of the device and the mount.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// The device doesn't exist, or may not be opened.
    #[error("can't open /dev/fuse")]
    Open(#[source] io::Error),
    /// Not a general mount option.
    #[error("unknown mount option {0}")]
    Option(String),
    /// mount(2) failed.
    #[error("can't mount on {mountpoint}")]
    Mount {
        /// The directory.
        mountpoint: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A second descriptor for the mount couldn't be opened.
    #[error("can't clone /dev/fuse")]
    Clone(#[source] io::Error),
    /// Unmounting failed; the mount stays.
    #[error("can't unmount {mountpoint}")]
    Unmount {
        /// The directory.
        mountpoint: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// One descriptor of a mount's `/dev/fuse`. The reply to a request must go to the descriptor that
/// it was read from.
#[derive(Debug)]
pub(crate) struct Device {
    fd: OwnedFd,
}

impl Device {
    /// Mounts a file system. Its requests can be read afterwards: the first is INIT.
    ///
    /// The kernel checks permissions and every user may use the mount, as on virtio-fs; and as there,
    /// device nodes and set-user-ID bits are effective unless `flags` say otherwise.
    pub(crate) fn mount(
        source: &str,
        mountpoint: &Path,
        flags: MountFlags,
    ) -> Result<Self, DeviceError> {
        let fd = open().map_err(DeviceError::Open)?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            fd.as_raw_fd()
        );
        let failed = |source| DeviceError::Mount {
            mountpoint: mountpoint.to_owned(),
            source,
        };
        let data = CString::new(data).map_err(|nul| failed(nul.into()))?;
        mount(source, mountpoint, "fuse", flags, data.as_c_str())
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self { fd })
    }

    /// A second descriptor for the same mount, with requests of its own in flight.
    pub(crate) fn clone_for_thread(&self) -> Result<Self, DeviceError> {
        let fd = open().map_err(DeviceError::Open)?;
        let mounted = self.fd.as_raw_fd().cast_unsigned();
        clone_into(fd.as_fd(), mounted).map_err(|errno| DeviceError::Clone(errno.into()))?;
        Ok(Self { fd })
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The flags of mount(2) for a comma-separated list of mount(8)'s `options`.
pub(crate) fn flags(options: &str) -> Result<MountFlags, DeviceError> {
    let mut flags = MountFlags::empty();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "rw" => flags -= MountFlags::RDONLY,
            "ro" => flags |= MountFlags::RDONLY,
            "suid" => flags -= MountFlags::NOSUID,
            "nosuid" => flags |= MountFlags::NOSUID,
            "dev" => flags -= MountFlags::NODEV,
            "nodev" => flags |= MountFlags::NODEV,
            "exec" => flags -= MountFlags::NOEXEC,
            "noexec" => flags |= MountFlags::NOEXEC,
            "async" => flags -= MountFlags::SYNCHRONOUS,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "atime" => flags -= MountFlags::NOATIME,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "lazytime" => flags |= MountFlags::LAZYTIME,
            "defaults" => {}
            other => return Err(DeviceError::Option(other.to_owned())),
        }
    }
    Ok(flags)
}

/// Unmounts, unless a process uses the mount: then returns false.
pub(crate) fn unmount_idle(mountpoint: &Path) -> Result<bool, DeviceError> {
    match unmount(mountpoint, UnmountFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(errno) => Err(unmount_error(mountpoint, errno)),
    }
}

/// Ends the mount at once, if it still exists: requests in flight and later ones fail. The source
/// tells our mount from one that it covered.
pub(crate) fn unmount_by_force(source: &str, mountpoint: &Path) -> Result<(), DeviceError> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let ours = format!("{source} ");
    if !mounts.lines().any(|line| line.starts_with(&ours)) {
        return Ok(());
    }
    match unmount(mountpoint, UnmountFlags::FORCE | UnmountFlags::DETACH) {
        // Unmounted in the meantime.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(unmount_error(mountpoint, errno)),
    }
}

fn unmount_error(mountpoint: &Path, errno: Errno) -> DeviceError {
    DeviceError::Unmount {
        mountpoint: mountpoint.to_owned(),
        source: errno.into(),
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(rustix::fs::open("/dev/fuse", flags, Mode::empty())?)
}

#[expect(unsafe_code, reason = "an ioctl has the type that its number says")]
fn clone_into(fresh: BorrowedFd<'_>, mounted: u32) -> rustix::io::Result<()> {
    // SAFETY: FUSE_DEV_IOC_CLONE reads one `u32` through its pointer, which is what a `Setter` of
    // a `u32` passes.
    let request = unsafe { Setter::<CLONE, u32>::new(mounted) };
    // SAFETY: the request is the one for a `/dev/fuse`, which `fresh` is, and writes no memory.
    unsafe { ioctl(fresh, request) }
}
