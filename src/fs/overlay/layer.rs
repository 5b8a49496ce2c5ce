//! A layer, and the extended attributes by which layers describe whiteouts and directories.
//!
//! The format is that of the kernel's overlayfs, which Docker and containerd write: a whiteout is a
//! character device 0/0, or an empty file with the attribute `whiteout` in a directory whose
//! `opaque` is `x`; an `opaque` of `y` hides what lies below; `redirect` says under which name it
//! lies there. The invariant: the guest neither sees nor sets an attribute of this kind.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::fs::{Attributes, Caller, FileSystem, NodeId, Result, XattrFlags};

/// The caller of what the overlay does for itself.
pub(super) const SERVER: Caller = Caller {
    uid: Some(0),
    gid: Some(0),
    pid: 0,
    kill_set_id: false,
    group: None,
};

/// The limit of values that are read here; a path fits.
const VALUE_MAX: usize = 4096;

/// By which bits the inode numbers of different file systems differ.
const FILE_SYSTEM_SHIFT: u32 = 56;

/// The prefix of the attributes of overlays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XattrPrefix {
    /// `trusted.overlay.`, as the kernel uses unless it is mounted with `userxattr`. Needs
    /// `CAP_SYS_ADMIN`.
    #[default]
    Trusted,
    /// `user.overlay.`
    User,
}

impl XattrPrefix {
    pub(super) fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.",
            Self::User => b"user.overlay.",
        }
    }

    pub(super) fn opaque(self) -> &'static CStr {
        match self {
            Self::Trusted => c"trusted.overlay.opaque",
            Self::User => c"user.overlay.opaque",
        }
    }

    pub(super) fn redirect(self) -> &'static CStr {
        match self {
            Self::Trusted => c"trusted.overlay.redirect",
            Self::User => c"user.overlay.redirect",
        }
    }

    pub(super) fn metacopy(self) -> &'static CStr {
        match self {
            Self::Trusted => c"trusted.overlay.metacopy",
            Self::User => c"user.overlay.metacopy",
        }
    }

    fn whiteout(self) -> &'static CStr {
        match self {
            Self::Trusted => c"trusted.overlay.whiteout",
            Self::User => c"user.overlay.whiteout",
        }
    }

    /// The name in a layer of the guest's attribute `name`: one of the overlay's own names is
    /// escaped, as by the kernel, so that overlays can be nested.
    pub(super) fn to_layer(self, name: &CStr) -> Option<CString> {
        let rest = name.to_bytes().strip_prefix(self.as_bytes())?;
        CString::new([self.as_bytes(), b"overlay.", rest].concat()).ok()
    }

    /// The guest's names of the attributes in the list `names`, each with its NUL. The overlay's own
    /// ones are left out.
    pub(super) fn to_guest(self, names: &[u8]) -> Vec<u8> {
        let mut list = Vec::with_capacity(names.len());
        for name in names.split_inclusive(|byte| *byte == 0) {
            match name.strip_prefix(self.as_bytes()) {
                None => list.extend_from_slice(name),
                Some(rest) => {
                    if let Some(escaped) = rest.strip_prefix(b"overlay.") {
                        list.extend_from_slice(self.as_bytes());
                        list.extend_from_slice(escaped);
                    }
                }
            }
        }
        list
    }
}

/// A redirect: where a directory lies in the layers below.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Redirect {
    /// Under another name in the same directory.
    Name(CString),
    /// At this path from the root, component by component.
    Path(Vec<CString>),
}

impl Redirect {
    pub(super) fn parse(value: &[u8]) -> Result<Self> {
        let component = |part: &[u8]| match part {
            b"" | b"." | b".." => Err(Errno::IO),
            _ => CString::new(part).map_err(|_nul| Errno::IO),
        };
        match value.strip_prefix(b"/") {
            Some(path) => path
                .split(|byte| *byte == b'/')
                .map(component)
                .collect::<Result<_>>()
                .map(Self::Path),
            None if value.contains(&b'/') => Err(Errno::IO),
            None => component(value).map(Self::Name),
        }
    }
}

/// What a directory of a layer says about the layers below.
#[derive(Debug, Default)]
pub(super) struct DirMarks {
    pub(super) is_opaque: bool,
    pub(super) redirect: Option<Redirect>,
}

/// A layer: a file system of which an overlay is made.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) fs: Arc<dyn FileSystem>,
    prefix: XattrPrefix,
    /// Distinguishes the inode numbers of different file systems.
    file_system: u64,
    /// Files with an attribute may be whiteouts in this layer.
    has_xattr_whiteouts: bool,
}

impl Layer {
    pub(super) fn new(fs: Arc<dyn FileSystem>, prefix: XattrPrefix, file_system: u64) -> Self {
        Self {
            fs,
            prefix,
            file_system,
            has_xattr_whiteouts: false,
        }
    }

    /// Looks whether the layer, whose root is `root`, has whiteouts that are files.
    pub(super) fn look_for_xattr_whiteouts(&mut self, root: NodeId) {
        self.has_xattr_whiteouts = matches!(self.opaque(root), Ok(Some(value)) if value == b"x");
    }

    /// The inode number that the guest sees.
    pub(super) fn number(&self, inode: u64) -> u64 {
        inode ^ self.file_system << FILE_SYSTEM_SHIFT
    }

    /// The attribute of a directory or file, if it has it.
    pub(super) fn xattr(&self, node: NodeId, name: &CStr) -> Result<Option<Vec<u8>>> {
        match self.fs.getxattr(&SERVER, node, name, VALUE_MAX) {
            Ok(value) => Ok(Some(value)),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn opaque(&self, node: NodeId) -> Result<Option<Vec<u8>>> {
        self.xattr(node, self.prefix.opaque())
    }

    /// What the directory `node` says about the layers below.
    pub(super) fn marks(&self, node: NodeId) -> Result<DirMarks> {
        if self.opaque(node)?.is_some_and(|value| value == b"y") {
            return Ok(DirMarks {
                is_opaque: true,
                redirect: None,
            });
        }
        let redirect = self.xattr(node, self.prefix.redirect())?;
        Ok(DirMarks {
            is_opaque: false,
            redirect: redirect.map(|value| Redirect::parse(&value)).transpose()?,
        })
    }

    /// Marks a directory as hiding what lies below.
    pub(super) fn set_opaque(&self, node: NodeId) -> Result<()> {
        let (name, flags) = (self.prefix.opaque(), XattrFlags::empty());
        self.fs.setxattr(&SERVER, node, name, b"y", flags)
    }

    /// Whether the inode with these `attributes`, found in the directory `parent`, is a whiteout.
    pub(super) fn is_whiteout(
        &self,
        parent: NodeId,
        node: NodeId,
        attributes: &Attributes,
    ) -> Result<bool> {
        match FileType::from_raw_mode(attributes.mode) {
            FileType::CharacterDevice => Ok(attributes.rdev == 0),
            FileType::RegularFile if self.has_xattr_whiteouts && attributes.size == 0 => {
                let marked = matches!(self.opaque(parent)?, Some(value) if value == b"x");
                Ok(marked && self.xattr(node, self.prefix.whiteout())?.is_some())
            }
            _ => Ok(false),
        }
    }

    /// Whether an entry of this type may be a whiteout.
    pub(super) fn may_be_whiteout(&self, kind: u8) -> bool {
        match kind {
            libc::DT_CHR | libc::DT_UNKNOWN => true,
            libc::DT_REG => self.has_xattr_whiteouts,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_attributes_are_hidden_and_the_guests_escaped() {
        let prefix = XattrPrefix::Trusted;
        let escaped = prefix.to_layer(c"trusted.overlay.opaque");
        assert_eq!(escaped.as_deref(), Some(c"trusted.overlay.overlay.opaque"));
        assert_eq!(prefix.to_layer(c"user.overlay.opaque"), None);
        let names = b"user.a\0trusted.overlay.opaque\0trusted.overlay.overlay.opaque\0trusted.b\0";
        assert_eq!(
            prefix.to_guest(names),
            b"user.a\0trusted.overlay.opaque\0trusted.b\0"
        );
    }

    #[test]
    fn redirect_is_a_name_or_an_absolute_path() {
        assert_eq!(Redirect::parse(b"a"), Ok(Redirect::Name(c"a".to_owned())));
        let path = Redirect::Path(vec![c"a".to_owned(), c"b".to_owned()]);
        assert_eq!(Redirect::parse(b"/a/b"), Ok(path));
        for malformed in [&b""[..], b"..", b"a/b", b"/a//b", b"/a/../b", b"/"] {
            assert_eq!(Redirect::parse(malformed), Err(Errno::IO));
        }
    }
}
