//! The host's groups by name.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::ptr;

use rustix::io::Errno;

/// The most bytes that a group's entry may take: the list of its members is part of it.
const LONGEST: usize = 1 << 24;

/// The id of the group that is called `name` (`getgrnam_r(3)`); `None` if there is none.
///
/// # Errors
///
/// The host's database of groups can't be read.
pub(crate) fn id_of(name: &str) -> Result<Option<u32>, Errno> {
    let Ok(name) = CString::new(name) else {
        return Ok(None);
    };
    let mut entry = MaybeUninit::<libc::group>::uninit();
    let mut strings = vec![0; 4096];
    loop {
        let mut found = ptr::null_mut();
        // SAFETY: `name` ends with a NUL; `entry`, `found` and the whole of `strings`, whose
        // length is told, are writable and exclusively borrowed during the call.
        let error = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                strings.as_mut_ptr(),
                strings.len(),
                &raw mut found,
            )
        };
        match error {
            0 if found.is_null() => return Ok(None),
            // SAFETY: the call has succeeded with a result, so it has filled in `entry`.
            0 => return Ok(Some(unsafe { entry.assume_init() }.gr_gid)),
            libc::ERANGE if strings.len() < LONGEST => strings.resize(strings.len() * 4, 0),
            libc::EINTR => {}
            libc::ENOENT | libc::ESRCH => return Ok(None),
            error => return Err(Errno::from_raw_os_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_group_is_0_and_nonsense_is_none() {
        assert_eq!(id_of("root"), Ok(Some(0)));
        assert_eq!(id_of("no such group"), Ok(None));
        assert_eq!(id_of("with\0nul"), Ok(None));
    }
}
