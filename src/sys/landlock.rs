//! The version of Landlock that the kernel has.

use rustix::io::Errno;

use super::last_errno;

/// `LANDLOCK_CREATE_RULESET_VERSION` (uapi `linux/landlock.h`).
const VERSION: libc::c_uint = 1;

/// The version.
///
/// # Errors
///
/// `ENOSYS` if the kernel was built without Landlock, `EOPNOTSUPP` if it was started without it.
pub(crate) fn version() -> Result<u32, Errno> {
    // SAFETY: with this flag the kernel takes no attributes and reads no memory.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            VERSION,
        )
    };
    u32::try_from(version).map_err(|_negative| last_errno())
}
