//! `--limit-space`: a project quota for the shared directory.
//!
//! What is created in a directory of a project belongs to the project, and the host's file system
//! counts and limits what belongs to it. The invariant: a server that starts with the option shares
//! a directory whose whole content is limited.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::config::SpaceLimit;
use crate::sys::inode_flags;
use crate::sys::project_quota::{self, Quota};

/// `FS_XFLAG_PROJINHERIT`: what is created in a directory belongs to its project.
const INHERIT: u32 = 0x200;

/// Project ids that are tried before giving up.
const TRIES: u32 = 1000;

/// Why the space can't be limited.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// The directory can't be opened or read.
    #[error("--limit-space: reading {path}")]
    Read {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is shared.
    #[error("--limit-space: {0} is a file, and only directories have a quota")]
    File(PathBuf),
    /// The file system has no project quotas, or they are off.
    #[error(
        "--limit-space: the file system of {path} doesn't enforce project quotas: mount it with \
         -o prjquota (ext4 also needs mkfs.ext4 -O quota,project, or tune2fs -O project -Q prjquota \
         while it isn't mounted; other file systems than ext4, F2FS and XFS have none)"
    )]
    Off {
        /// The directory.
        path: PathBuf,
        /// What the kernel says.
        source: Errno,
    },
    /// They are counted, but not enforced.
    #[error(
        "--limit-space: the file system of {0} counts what projects use and doesn't limit it: mount \
         it with -o prjquota"
    )]
    NotEnforced(PathBuf),
    /// The privilege is missing.
    #[error(
        "--limit-space: setting a quota needs CAP_SYS_ADMIN in the host's own user namespace while \
         the server starts, which drops it then: start it as root, or set the quota of {0} by other \
         means and omit the option"
    )]
    Privilege(PathBuf),
    /// There are files that belong to no project.
    #[error(
        "--limit-space: {path} has contents that belong to no project, and wouldn't be counted: put \
         all of it into a project that nothing else uses, by chattr -R +P -p {project} {path} on ext4, or \
         xfs_io -r -c 'chproj -R {project}' -c 'chattr -R +P' {path} on XFS"
    )]
    Contents {
        /// The directory.
        path: PathBuf,
        /// A project that isn't used.
        project: u32,
    },
    /// No project id is unused.
    #[error("--limit-space: found no project id that isn't used: give {0} one, by chattr +P -p ID")]
    NoProject(PathBuf),
    /// Something else fails.
    #[error("--limit-space: {act} {path}")]
    Host {
        /// What was tried.
        act: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
}

/// Gives `path` a project, unless it has one, and the project its limits.
pub(super) fn limit(path: &Path, limit: SpaceLimit) -> Result<(), SpaceError> {
    let read = |source| SpaceError::Read {
        path: path.to_owned(),
        source,
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(directory) => File::from(directory),
        Err(Errno::NOTDIR) => return Err(SpaceError::File(path.to_owned())),
        Err(errno) => return Err(read(errno.into())),
    };
    match project_quota::is_enforced(&directory) {
        Ok(true) => {}
        Ok(false) => return Err(SpaceError::NotEnforced(path.to_owned())),
        Err(errno) => {
            return Err(quota_error(
                path,
                "reading the quotas of the file system of",
                errno,
            ));
        }
    }
    let mut attributes = inode_flags::get(&directory).map_err(|source| SpaceError::Off {
        path: path.to_owned(),
        source,
    })?;
    let had_project = attributes.project != 0;
    if !had_project {
        let inode = directory.metadata().map_err(read)?.ino();
        attributes.project = unused_project(&directory, path, inode)?;
        if std::fs::read_dir(path).map_err(read)?.next().is_some() {
            return Err(SpaceError::Contents {
                path: path.to_owned(),
                project: attributes.project,
            });
        }
    }
    if !had_project || attributes.flags & INHERIT == 0 {
        attributes.flags |= INHERIT;
        inode_flags::set(&directory, &attributes).map_err(|errno| match errno {
            // EINVAL: a user namespace, in which projects can't be changed.
            Errno::PERM | Errno::ACCESS | Errno::INVAL => SpaceError::Privilege(path.to_owned()),
            source => SpaceError::Host {
                act: "setting the project of",
                path: path.to_owned(),
                source,
            },
        })?;
    }
    let project = attributes.project;
    let limits = (
        limit.bytes.get().div_ceil(1024),
        limit.inodes.map_or(0, std::num::NonZeroU64::get),
    );
    project_quota::set_limits(&directory, project, limits)
        .map_err(|errno| quota_error(path, "setting the quota of", errno))?;
    let Quota { space, inodes, .. } = project_quota::get(&directory, project)
        .map_err(|errno| quota_error(path, "reading the quota of", errno))?;
    let found = if had_project { "that it had" } else { "new" };
    log::info!("--limit-space: project {project} ({found}) uses {space} bytes and {inodes} inodes");
    Ok(())
}

/// A project that has no files and no limits. It is derived from the directory's inode number, so
/// that servers which start at the same time don't find the same.
fn unused_project(directory: &File, path: &Path, inode: u64) -> Result<u32, SpaceError> {
    // Above those that people number from 1, and positive as a signed number.
    const FIRST: u64 = 1 << 20;
    const COUNT: u64 = 1 << 30;
    for n in 0..TRIES {
        let offset = inode.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 34;
        let project = FIRST + (offset + u64::from(n)) % COUNT;
        let project = u32::try_from(project).unwrap_or(u32::MAX);
        match project_quota::get(directory, project) {
            Ok(quota) if quota.is_unused() => return Ok(project),
            Ok(_) => {}
            Err(Errno::NOENT) => return Ok(project),
            Err(errno) => return Err(quota_error(path, "reading the quotas of", errno)),
        }
    }
    Err(SpaceError::NoProject(path.to_owned()))
}

fn quota_error(path: &Path, act: &'static str, errno: Errno) -> SpaceError {
    let path = path.to_owned();
    match errno {
        Errno::PERM | Errno::ACCESS => SpaceError::Privilege(path),
        Errno::SRCH | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOTTY => {
            SpaceError::Off {
                path,
                source: errno,
            }
        }
        source => SpaceError::Host { act, path, source },
    }
}
