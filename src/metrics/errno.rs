//! The names of errnos.
//!
//! The invariant: one that has no name here is shown as its number.

use std::borrow::Cow;

macro_rules! names {
    ($($name:ident)*) => {
        /// The name of an errno, as Linux numbers it.
        pub(super) fn name_of(errno: u32) -> Cow<'static, str> {
            match libc::c_int::try_from(errno) {
                $(Ok(libc::$name) => Cow::Borrowed(stringify!($name)),)*
                _ => Cow::Owned(errno.to_string()),
            }
        }
    };
}

names! {
    EPERM ENOENT EINTR EIO ENXIO E2BIG EBADF EAGAIN ENOMEM
    EACCES EFAULT ENOTBLK EBUSY EEXIST EXDEV ENODEV ENOTDIR EISDIR
    EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS
    EMLINK EPIPE ERANGE EDEADLK ENAMETOOLONG ENOLCK ENOSYS ENOTEMPTY ELOOP
    ENODATA EOVERFLOW EPROTO EOPNOTSUPP ETIMEDOUT ESTALE EDQUOT EREMOTEIO ESRCH
    ECHILD ECANCELED EKEYEXPIRED EBADMSG EILSEQ EUCLEAN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_without_a_name_is_a_number() {
        assert_eq!(name_of(2), "ENOENT");
        assert_eq!(name_of(4095), "4095");
    }
}
