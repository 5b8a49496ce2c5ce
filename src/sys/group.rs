//! Looks up the host's groups by name.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::ptr;

use rustix::io::Errno;

/// The maximum size of a group's entry, which contains the list of its members.
const MAX_ENTRY: usize = 1 << 24;

/// The id of the group `name` (`getgrnam_r(3)`); `None` if there is no such group.
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
        // SAFETY: `name` ends with a NUL; `entry`, `found` and all of `strings`, whose length is
        // passed, are writable and exclusively borrowed during the call.
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
            libc::ERANGE if strings.len() < MAX_ENTRY => strings.resize(strings.len() * 4, 0),
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
    fn group_of_root_is_found_and_unknown_name_is_not() {
        assert_eq!(id_of("root"), Ok(Some(0)));
        assert_eq!(id_of("no such group"), Ok(None));
        assert_eq!(id_of("with\0nul"), Ok(None));
    }
}
