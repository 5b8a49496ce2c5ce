//! Permissions by the mode bits, for ACCESS.
//!
//! The invariant: a caller that isn't known has no more than what everybody has.

use rustix::fs::FileType;
use rustix::io::Errno;

use super::{Attributes, Caller, Result};

/// Succeeds if the caller has the permissions in `mask` (`R_OK`, `W_OK`, `X_OK`).
///
/// # Errors
///
/// `EACCES`.
pub(crate) fn check(caller: &Caller, attributes: &Attributes, mask: u32) -> Result<()> {
    if mask & 0o7 & !permissions_for(caller, attributes) == 0 {
        Ok(())
    } else {
        Err(Errno::ACCESS)
    }
}

/// Which of `R_OK`, `W_OK` and `X_OK` a caller has.
fn permissions_for(caller: &Caller, attributes: &Attributes) -> u32 {
    let mode = attributes.mode;
    let directory = FileType::from_raw_mode(mode) == FileType::Directory;
    let (Some(uid), Some(gid)) = (caller.uid, caller.gid) else {
        // An unknown caller has what all three classes have.
        return mode >> 6 & mode >> 3 & mode & 0o7;
    };
    if uid == 0 {
        // Root may do everything, except execute a file without any execute bit.
        let executable = directory || mode & 0o111 != 0;
        return if executable { 0o7 } else { 0o6 };
    }
    let shift = if uid == attributes.uid {
        6
    } else if gid == attributes.gid {
        3
    } else {
        0
    };
    mode >> shift & 0o7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_uses_first_matching_class() {
        let attributes = |mode| Attributes {
            mode,
            uid: 1000,
            gid: 100,
            ..Attributes::default()
        };
        let caller = |uid, gid| Caller {
            uid: Some(uid),
            gid: Some(gid),
            ..Caller::default()
        };
        let file = attributes(0o100_046);
        assert_eq!(permissions_for(&caller(1000, 100), &file), 0);
        assert_eq!(permissions_for(&caller(1, 100), &file), 4);
        assert_eq!(permissions_for(&caller(1, 1), &file), 6);
        assert_eq!(permissions_for(&caller(0, 0), &file), 6);
        assert_eq!(permissions_for(&caller(0, 0), &attributes(0o100_010)), 7);
        assert_eq!(permissions_for(&caller(0, 0), &attributes(0o040_000)), 7);
        // An unknown caller has what everybody has.
        for (uid, gid) in [(None, None), (Some(0), None), (None, Some(100))] {
            let implicit = Caller {
                uid,
                gid,
                ..Caller::default()
            };
            assert_eq!(permissions_for(&implicit, &file), 0);
            assert_eq!(permissions_for(&implicit, &attributes(0o100_764)), 4);
        }
    }
}
