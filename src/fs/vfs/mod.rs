//! Several file systems under one mount.
//!
//! The invariant: see [`MountPoint`].

mod mount_point;

pub use self::mount_point::{MountPoint, MountPointError};
