//! Translates the ids in POSIX ACLs, where ids are translated (`--translate-uid`,
//! `--translate-gid`).
//!
//! An ACL is the value of an extended attribute (uapi `linux/posix_acl_xattr.h`): a version, then
//! entries of a tag, permissions and an id. The invariant: a value keeps its length, and a value
//! that isn't an ACL isn't changed; the host's kernel refuses it.

use std::borrow::Cow;
use std::ffi::CStr;

use super::id_map::IdMap;
use crate::fs::Result;

/// The ACL that controls access to the file itself.
pub(crate) const ACCESS: &CStr = c"system.posix_acl_access";

/// The ACL that files created in the directory get.
const DEFAULT: &CStr = c"system.posix_acl_default";

/// The version of the format, little-endian like all its numbers.
const VERSION: [u8; 4] = 2_u32.to_le_bytes();

/// An entry: tag and permissions, two bytes each, and the id.
const ENTRY: usize = 8;

/// Tag of an entry for the user of the id.
const USER: [u8; 2] = 0x02_u16.to_le_bytes();

/// Tag of an entry for the group of the id.
const GROUP: [u8; 2] = 0x08_u16.to_le_bytes();

/// The maps of user and group ids.
#[derive(Clone, Copy)]
pub(crate) struct Maps<'a> {
    pub(crate) users: &'a IdMap,
    pub(crate) groups: &'a IdMap,
}

impl Maps<'_> {
    fn concern(self, name: &CStr) -> bool {
        let translate = !self.users.is_empty() || !self.groups.is_empty();
        translate && (name == ACCESS || name == DEFAULT)
    }

    /// Returns the value for the host of an attribute that the guest sets.
    ///
    /// # Errors
    ///
    /// `EPERM` if the guest may not use one of the ids.
    pub(crate) fn to_host<'a>(self, name: &CStr, value: &'a [u8]) -> Result<Cow<'a, [u8]>> {
        if !self.concern(name) {
            return Ok(Cow::Borrowed(value));
        }
        let mut value = value.to_vec();
        let user = |id| self.users.to_host(id);
        let group = |id| self.groups.to_host(id);
        translate(&mut value, user, group)?;
        Ok(Cow::Owned(value))
    }

    /// Translates the value of an attribute of the host for the guest.
    pub(crate) fn to_guest(self, name: &CStr, value: &mut [u8]) -> Result<()> {
        if !self.concern(name) {
            return Ok(());
        }
        let user = |id| Ok(self.users.to_guest(id));
        let group = |id| Ok(self.groups.to_guest(id));
        translate(value, user, group)
    }
}

fn translate(
    value: &mut [u8],
    user: impl Fn(u32) -> Result<u32>,
    group: impl Fn(u32) -> Result<u32>,
) -> Result<()> {
    let Some((header, entries)) = value.split_first_chunk_mut() else {
        return Ok(());
    };
    if *header != VERSION || entries.len() % ENTRY != 0 {
        return Ok(());
    }
    for entry in entries.chunks_exact_mut(ENTRY) {
        let (tag, rest) = entry.split_at_mut(2);
        let Some(id) = rest.last_chunk_mut() else {
            continue;
        };
        let old = u32::from_le_bytes(*id);
        let new = match tag {
            tag if *tag == USER => user(old)?,
            tag if *tag == GROUP => group(old)?,
            _ => continue,
        };
        *id = new.to_le_bytes();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    /// An ACL with these entries: tag, permissions, id.
    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut value = VERSION.to_vec();
        for (tag, permissions, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    fn map(rules: &[&str]) -> IdMap {
        let rules: Vec<_> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        IdMap::new(&rules).unwrap()
    }

    const NONE: u32 = u32::MAX;

    #[test]
    fn ids_of_users_and_groups_are_translated_both_ways() {
        let users = map(&["map:0:100000:1000"]);
        let groups = map(&["map:0:200000:1000", "forbid-guest:5000:1"]);
        let maps = Maps {
            users: &users,
            groups: &groups,
        };
        let entries = |user, group| {
            acl(&[
                (0x01, 7, NONE),
                (0x02, 6, user),
                (0x04, 5, NONE),
                (0x08, 4, group),
                (0x10, 7, NONE),
                (0x20, 0, NONE),
            ])
        };
        for name in [ACCESS, DEFAULT] {
            let (guest, host) = (entries(7, 8), entries(100_007, 200_008));
            assert_eq!(*maps.to_host(name, &guest).unwrap(), *host);
            let mut value = host;
            maps.to_guest(name, &mut value).unwrap();
            assert_eq!(value, guest);
        }
        let forbidden = entries(7, 5000);
        assert_eq!(maps.to_host(ACCESS, &forbidden), Err(Errno::PERM));
        // Of another attribute, the value isn't an ACL.
        assert_eq!(*maps.to_host(c"user.a", &forbidden).unwrap(), *forbidden);
    }

    #[test]
    fn value_that_is_no_acl_is_unchanged() {
        let users = map(&["map:0:100000:1000"]);
        let maps = Maps {
            users: &users,
            groups: &users,
        };
        let whole = acl(&[(0x02, 7, 1)]);
        let mut other_version = whole.clone();
        other_version[0] = 1;
        for value in [&b""[..], b"\x02", &whole[..11], &other_version] {
            assert_eq!(*maps.to_host(ACCESS, value).unwrap(), *value);
        }
        assert_ne!(*maps.to_host(ACCESS, &whole).unwrap(), *whole);
    }
}
