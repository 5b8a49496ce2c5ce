//! Builds the file system of a source that is made of several directories or files.
//!
//! A source is walked twice, in the same order: for what the sandbox has to reach, and to build the
//! file systems of what it has reached. The invariant: both walks name the same trees.

mod overlays;

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::vec;

use super::error::ServerError;
use crate::config::{Config, OverlaySource, RafsSource, Source};
use crate::fs::FileSystem;
use crate::fs::passthrough::{self, Options, Passthrough, PassthroughError, Shared};
use crate::fs::vfs::{MountPoint, Vfs, VfsOptions};
use crate::sandbox::{Reached, SandboxError, Tree};
use crate::state::Table;

/// What the sandbox has to reach for `source`.
pub(super) fn trees(source: &Source, readonly: bool) -> Vec<Tree> {
    match source {
        Source::Directory(path) => vec![Tree::of(path, readonly)],
        Source::Vfs(mounts) => {
            let sources = mounts.iter().map(|(_, source)| source);
            sources.flat_map(|source| trees(source, readonly)).collect()
        }
        Source::Overlay(overlay) => {
            let lower = overlay.lower.iter();
            let mut all: Vec<_> = lower.flat_map(|lower| trees(lower, true)).collect();
            all.extend(overlays::upper_tree(overlay, readonly));
            all
        }
        Source::Rafs(RafsSource {
            bootstrap,
            blobs,
            cache_dir,
            prefetch: _,
        }) => {
            let mut all = vec![Tree::of(bootstrap, true), Tree::of(blobs, true)];
            all.extend(cache_dir.as_ref().map(|path| Tree::of(path, false)));
            all
        }
    }
}

/// Checks that all that `source` names exists, before a launcher or a VMM relies on it.
pub(super) fn check(source: &Source) -> Result<(), ServerError> {
    match source {
        Source::Directory(path) => check_directory(path),
        Source::Vfs(mounts) => mounts.iter().try_for_each(|(_, source)| check(source)),
        Source::Overlay(overlay) => {
            overlay.lower.iter().try_for_each(check)?;
            overlays::check(overlay)
        }
        Source::Rafs(RafsSource {
            bootstrap,
            blobs,
            cache_dir,
            prefetch: _,
        }) => {
            passthrough::check_shared(bootstrap)
                .map_err(|error| ServerError::share(bootstrap, error))?;
            check_directory(blobs)?;
            cache_dir.iter().try_for_each(|path| check_directory(path))
        }
    }
}

fn check_directory(path: &Path) -> Result<(), ServerError> {
    passthrough::check_shared(path).map_err(|error| ServerError::share(path, error))?;
    // Only the root can be made for a single file.
    if path.is_dir() {
        return Ok(());
    }
    let path = path.to_owned();
    Err(ServerError::share(
        &path.clone(),
        PassthroughError::NotADirectory { path },
    ))
}

/// How many directories of `source` are served by a passthrough of their own.
fn directories(source: &Source) -> usize {
    match source {
        Source::Directory(_) => 1,
        Source::Vfs(mounts) => mounts.iter().map(|(_, source)| directories(source)).sum(),
        Source::Overlay(OverlaySource { lower, upper, .. }) => {
            lower.iter().map(directories).sum::<usize>() + usize::from(upper.is_some())
        }
        Source::Rafs(_) => 0,
    }
}

/// Builds the file systems of a source.
#[derive(Debug)]
pub(super) struct Builder {
    /// The options of each directory.
    pub(super) options: Options,
    /// `/proc/self/fd`, `O_PATH`.
    proc_fds: OwnedFd,
    /// What the sandbox has reached and no file system has taken yet.
    trees: vec::IntoIter<Vec<Reached>>,
    /// For how many more directories than those of the source there are descriptors.
    pub(super) spare: usize,
}

/// For how many directories that are added later there are descriptors at least.
const MIN_SPARE: usize = 4;

impl Builder {
    /// Builds from the `trees` that the sandbox has reached. What `options` limit is divided between
    /// all directories; `with_spare` says that as many more may be added.
    pub(super) fn new(
        config: &Config,
        options: Options,
        proc_fds: OwnedFd,
        trees: Vec<Vec<Reached>>,
        with_spare: bool,
    ) -> Self {
        let own = directories(&config.source);
        let spare = if with_spare { own.max(MIN_SPARE) } else { 0 };
        let parts = NonZeroUsize::new(own + spare).unwrap_or(NonZeroUsize::MIN);
        Self {
            spare,
            options: options.divided_by(parts),
            proc_fds,
            trees: trees.into_iter(),
        }
    }

    /// Builds `source`, the next one in the order of [`trees`].
    pub(super) fn build(&mut self, source: &Source) -> Result<Arc<dyn FileSystem>, ServerError> {
        match source {
            Source::Directory(path) => {
                let reached = self.next()?;
                let fs = self.directory(path, reached, self.options.clone())?;
                Ok(Arc::new(fs))
            }
            Source::Vfs(mounts) => Ok(self.vfs(mounts)?),
            Source::Overlay(overlay) => self.overlay(overlay),
            Source::Rafs(image) => self.image(image, self.options.xattr),
        }
    }

    /// Several file systems under one mount.
    pub(super) fn vfs(&mut self, mounts: &[(MountPoint, Source)]) -> Result<Arc<Vfs>, ServerError> {
        let vfs = Vfs::new(VfsOptions {
            xattr: self.options.xattr,
            announce_submounts: self.options.announce_submounts,
        });
        for (point, source) in mounts {
            vfs.mount(point, self.build(source)?)?;
        }
        Ok(Arc::new(vfs))
    }

    /// The passthrough of a directory.
    pub(super) fn directory(
        &self,
        path: &Path,
        reached: Reached,
        mut options: Options,
    ) -> Result<Passthrough, ServerError> {
        options.readonly |= reached.readonly;
        let proc_fds = self.proc_fds.try_clone();
        let shared = Shared {
            root: reached.fd,
            proc_fds: proc_fds.map_err(SandboxError::Descriptors)?,
            path: path.to_owned(),
        };
        let table = Table::for_this_process(&options.limits(1))?;
        let built = Passthrough::with_table(shared, options, &table, None);
        built
            .map(|(fs, _)| fs)
            .map_err(|error| ServerError::share(path, error))
    }

    /// An image, with extended attributes if `xattr` is true.
    #[cfg(feature = "nydus")]
    fn image(
        &mut self,
        image: &RafsSource,
        xattr: bool,
    ) -> Result<Arc<dyn FileSystem>, ServerError> {
        use crate::config::Prefetch;
        use crate::fs::rafs::{self, Places, Rafs, RafsOptions};

        let reached = Places {
            bootstrap: self.next()?.path,
            blobs: self.next()?.path,
            cache: self.next()?.path,
        };
        let named = Places {
            bootstrap: image.bootstrap.clone(),
            blobs: image.blobs.clone(),
            cache: image.cache_dir.clone().unwrap_or_default(),
        };
        let options = RafsOptions {
            reached,
            named,
            prefetch: match image.prefetch {
                Prefetch::None => rafs::Prefetch::None,
                Prefetch::Named => rafs::Prefetch::Named,
                Prefetch::All => rafs::Prefetch::All,
            },
        };
        let fs =
            Rafs::open(&options).map_err(|error| ServerError::share(&image.bootstrap, error))?;
        Ok(Arc::new(if xattr { fs } else { fs.without_xattrs() }))
    }

    #[cfg(not(feature = "nydus"))]
    #[allow(clippy::unused_self, reason = "the same call with the feature")]
    fn image(&mut self, _: &RafsSource, _: bool) -> Result<Arc<dyn FileSystem>, ServerError> {
        Err(ServerError::NotBuiltIn("--rafs"))
    }

    /// The only path of the next tree.
    pub(super) fn next(&mut self) -> Result<Reached, ServerError> {
        let mut paths = self.next_tree()?.into_iter();
        paths.next().ok_or(ServerError::NotReached)
    }

    /// The paths of the next tree.
    pub(super) fn next_tree(&mut self) -> Result<Vec<Reached>, ServerError> {
        self.trees.next().ok_or(ServerError::NotReached)
    }
}
