//! Builds an overlay: checks the directories, prepares the work directory, finds the roots.
//!
//! The invariant: an overlay that was built can write its upper layer in the format of layers.

use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, StatxFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::handles::{Handles, MAX_LAYERS};
use super::layer::{Layer, SERVER, XattrPrefix};
use super::node::{Real, Stack};
use super::table::NodeTable;
use super::work::{EXCHANGE, PRIVATE_DIRECTORY};
use super::{Lower, Options, Overlay, OverlayError, UPPER, Upper, UpperLayer};
use crate::fs::{HandleKind, NodeId, OpenFile, Result as FsResult};
use crate::io::File;

/// The directory within the work directory, as in the kernel, so that either can use the other's.
const WORK: &str = "work";

/// Checks the directories of an overlay on the host, before anything relies on them. Returns the
/// closest directory that has both `upper` and `work` in it.
///
/// # Errors
///
/// See [`OverlayError`].
pub fn check(upper: &Path, work: &Path, lower: &[PathBuf]) -> Result<PathBuf, OverlayError> {
    let resolve = |what: &'static str, path: &Path| {
        let failed = |source| OverlayError::Directory {
            what,
            path: path.to_path_buf(),
            source,
        };
        let resolved = path.canonicalize();
        let resolved =
            resolved.map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        let flags = StatxFlags::TYPE | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(CWD, &resolved, AtFlags::empty(), flags).map_err(failed)?;
        if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::Directory {
            return Err(failed(Errno::NOTDIR));
        }
        let mount = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_mnt_id);
        Ok((resolved, mount))
    };
    let (upper, upper_mount) = resolve("the upper directory", upper)?;
    let (work, work_mount) = resolve("the work directory", work)?;
    if upper_mount != work_mount {
        return Err(OverlayError::DifferentMounts { upper, work });
    }
    let mut directories = vec![upper.clone(), work.clone()];
    for lower in lower {
        // Layers below an overlay may overlap each other.
        let (lower, _) = resolve("the lower layer", lower)?;
        for own in &directories[..2] {
            separate(own, &lower)?;
        }
        directories.push(lower);
    }
    separate(&upper, &work)?;
    let common: PathBuf = upper
        .components()
        .zip(work.components())
        .take_while(|(upper, work)| upper == work)
        .map(|(component, _)| component)
        .collect();
    let (_, common_mount) = resolve("the parent directory", &common)?;
    if common_mount != upper_mount {
        // Two mounts of one file system can be told apart only by their parents.
        return Err(OverlayError::DifferentMounts { upper, work });
    }
    Ok(common)
}

/// Whether this process sees `trusted.` attributes. To others they look absent, and what they hide
/// would appear.
fn may_read_trusted() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// Fails if one of two directories lies within the other.
fn separate(one: &Path, other: &Path) -> Result<(), OverlayError> {
    for (inner, outer) in [(one, other), (other, one)] {
        if inner.starts_with(outer) {
            return Err(OverlayError::Nested {
                inner: inner.to_path_buf(),
                outer: outer.to_path_buf(),
            });
        }
    }
    Ok(())
}

impl Overlay {
    /// An overlay of `lower` layers, topmost first, below an `upper` one if there is one. Without it,
    /// the overlay is read-only.
    ///
    /// # Errors
    ///
    /// See [`OverlayError`].
    pub fn new(
        lower: Vec<Lower>,
        upper: Option<Upper>,
        options: Options,
    ) -> Result<Self, OverlayError> {
        if lower.is_empty() && upper.is_none() {
            return Err(OverlayError::NoLayers);
        }
        if options.xattr_prefix == XattrPrefix::Trusted && !may_read_trusted() {
            return Err(OverlayError::NotTrusted);
        }
        let count = lower.len() + usize::from(upper.is_some());
        if count > MAX_LAYERS {
            return Err(OverlayError::TooManyLayers {
                count,
                most: MAX_LAYERS,
            });
        }
        // The numbers of the first file system, usually the upper layer's, stay as they are.
        let mut devices: Vec<Option<u64>> = Vec::new();
        let mut file_system = |device: Option<u64>| {
            let known = devices
                .iter()
                .position(|known| device.is_some() && *known == device);
            let index = known.unwrap_or_else(|| {
                devices.push(device);
                devices.len() - 1
            });
            u64::try_from(index).unwrap_or_default()
        };
        let prefix = options.xattr_prefix;
        let mut layers = Vec::with_capacity(count);
        let (mut upper_layer, mut paths) = (None, None);
        if let Some(upper) = upper {
            layers.push(Layer::new(upper.fs, prefix, file_system(upper.device)));
            paths = Some((upper.directory, upper.work));
        }
        for lower in lower {
            let mut layer = Layer::new(lower.fs, prefix, file_system(lower.device));
            layer.look_for_xattr_whiteouts(NodeId::ROOT);
            layers.push(layer);
        }
        if let Some((directory, work)) = paths {
            upper_layer = Some(UpperLayer {
                directory,
                work,
                work_node: RwLock::default(),
                next_name: 0.into(),
                _lock: None,
            });
        }
        let mut overlay = Self {
            options,
            layers,
            upper: upper_layer,
            nodes: NodeTable::new(options.max_inodes),
            handles: Handles::default(),
            renames: Mutex::default(),
        };
        // The layers change the working directory and the umask of threads that create files.
        std::thread::scope(|scope| {
            let overlay = &mut overlay;
            let prepared = scope.spawn(|| overlay.prepare());
            prepared
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok(overlay)
    }

    fn prepare(&mut self) -> Result<(), OverlayError> {
        if let Some(upper) = &self.upper {
            let work = upper.work.clone();
            let lock = self.lock_work(&work)?;
            if let Some(upper) = &mut self.upper {
                upper._lock = lock;
            }
            self.make_work(&work)
                .map_err(|source| OverlayError::Directory {
                    what: "the work directory",
                    path: work,
                    source,
                })?;
        }
        self.attach()
            .map_err(|(path, source)| OverlayError::Directory {
                what: "a layer",
                path,
                source,
            })?;
        self.probe()
    }

    /// Locks the work directory, so that no two servers write to one upper layer.
    fn lock_work(&self, work: &Path) -> Result<Option<File>, OverlayError> {
        let in_use = || OverlayError::InUse {
            path: work.to_path_buf(),
        };
        let locked = self.walk(work).and_then(|node| {
            let fs = &self.layers[UPPER].fs;
            let opened = fs.opendir(&SERVER, node, 0)?;
            let file = fs.file(node, opened.handle, HandleKind::Directory);
            fs.releasedir(node, opened.handle)?;
            self.forget_walked(node);
            match file? {
                OpenFile::Host(file) => {
                    let exclusive = FlockOperation::NonBlockingLockExclusive;
                    rustix::fs::flock(file.as_fd(), exclusive).map(|()| Some(file))
                }
                OpenFile::Object(_) => Ok(None),
            }
        });
        locked.map_err(|error| match error {
            Errno::AGAIN => in_use(),
            source => OverlayError::Directory {
                what: "the work directory",
                path: work.to_path_buf(),
                source,
            },
        })
    }

    /// Creates the directory in which the overlay works, or removes what an earlier server has left
    /// in it.
    fn make_work(&self, work: &Path) -> FsResult<()> {
        let fs = &self.layers[UPPER].fs;
        let parent = self.walk(work)?;
        let made = match fs.mkdir(&SERVER, parent, c"work", &PRIVATE_DIRECTORY) {
            Ok(entry) => {
                self.forget_upper(entry.node);
                Ok(())
            }
            Err(Errno::EXIST) => {
                let entry = fs.lookup(&SERVER, parent, c"work")?;
                let emptied = self.empty_directory(entry.node);
                self.forget_upper(entry.node);
                emptied
            }
            Err(error) => Err(error),
        };
        self.forget_walked(parent);
        made
    }

    /// The directory `path` of the upper layer; counts one lookup, unless it is the root.
    fn walk(&self, path: &Path) -> FsResult<NodeId> {
        use std::os::unix::ffi::OsStrExt;

        let fs = &self.layers[UPPER].fs;
        let mut node = NodeId::ROOT;
        for component in path.components() {
            let name = match component {
                Component::Normal(name) => name.as_bytes(),
                Component::RootDir | Component::CurDir => continue,
                _ => return Err(Errno::INVAL),
            };
            let name = std::ffi::CString::new(name).map_err(|_nul| Errno::INVAL)?;
            let next = fs.lookup(&SERVER, node, &name);
            self.forget_walked(node);
            node = next?.node;
        }
        Ok(node)
    }

    fn forget_walked(&self, node: NodeId) {
        if node != NodeId::ROOT {
            self.forget_upper(node);
        }
    }

    /// Finds the roots of the layers. Fails with the path that can't be reached.
    pub(super) fn attach(&self) -> Result<(), (PathBuf, Errno)> {
        let mut stack = Stack::new();
        if let Some(upper) = &self.upper {
            let at = |path: &Path| {
                let path = path.to_path_buf();
                move |error| (path, error)
            };
            let node = self.walk(&upper.directory);
            let node = node.map_err(at(&upper.directory))?;
            stack.push(Real { layer: UPPER, node });
            let work = self.walk(&upper.work.join(WORK));
            *upper
                .work_node
                .write()
                .unwrap_or_else(PoisonError::into_inner) = Some(work.map_err(at(&upper.work))?);
        }
        let lower = stack.len()..self.layers.len();
        stack.extend(lower.map(|layer| Real {
            layer,
            node: NodeId::ROOT,
        }));
        let top = stack.first().copied();
        let top = top.ok_or_else(|| (PathBuf::new(), Errno::NOENT))?;
        let attributes = self.layer(top).getattr(&SERVER, top.node, None);
        let (attributes, _) = attributes.map_err(|error| (PathBuf::from("/"), error))?;
        let number = self.layers[top.layer].number(attributes.inode);
        self.nodes.reset(Some((number, stack)));
        Ok(())
    }

    /// Tries whether the upper layer can store what an overlay needs.
    fn probe(&self) -> Result<(), OverlayError> {
        let Some(upper) = &self.upper else {
            return Ok(());
        };
        let unsupported = |act, advice| {
            let path = upper.directory.clone();
            move |source| OverlayError::Unsupported {
                path,
                act,
                advice,
                source,
            }
        };
        let (fs, _, work) = self
            .work()
            .map_err(unsupported("be written", "check its permissions"))?;
        let name = upper.new_name();
        let entry = fs
            .mkdir(&SERVER, work, &name, &PRIVATE_DIRECTORY)
            .map_err(unsupported("be written", "check its permissions"))?;
        let marked = self.layers[UPPER].set_opaque(entry.node);
        self.forget_upper(entry.node);
        let advice = "use a file system with extended attributes, such as ext4, XFS or Btrfs, or tmpfs \
                      since Linux 6.6";
        marked.map_err(unsupported("store the overlay's attributes", advice))?;
        let advice = "use a local file system, such as ext4, XFS, Btrfs or tmpfs";
        let whiteout = self.new_whiteout().map_err(unsupported(
            "store whiteouts (character devices 0/0)",
            advice,
        ))?;
        let exchanged = fs.rename(&SERVER, (work, &whiteout), (work, &name), EXCHANGE);
        exchanged.map_err(unsupported("exchange names (RENAME_EXCHANGE)", advice))?;
        self.discard(&whiteout, true);
        self.discard(&name, false);
        Ok(())
    }
}
