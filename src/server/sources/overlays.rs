//! Builds overlays: what the sandbox has to reach for one, and its layers.
//!
//! The invariant: the lower layers are read-only file systems, and the upper and the work directory
//! belong to one file system, so that names move between them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Builder;
use crate::config::{OverlaySource, Source};
use crate::fs::FileSystem;
use crate::fs::overlay::{self, Lower, Overlay, Upper};
use crate::fs::passthrough::Options;
use crate::sandbox::{Reached, Tree};
use crate::server::error::ServerError;

/// What the sandbox has to reach for the upper layer: the directory that has both the upper and the
/// work directory in it, and then these two.
pub(super) fn upper_tree(overlay: &OverlaySource, readonly: bool) -> Option<Tree> {
    let (upper, work) = (overlay.upper.as_ref()?, overlay.work.as_ref()?);
    let resolved = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
    let (upper, work) = (resolved(upper), resolved(work));
    let common = overlay::check(&upper, &work, &[]).unwrap_or_else(|_| upper.clone());
    Some(Tree {
        paths: vec![common, upper, work],
        readonly,
    })
}

/// Checks the directories of an overlay besides what each of them must be.
pub(super) fn check(source: &OverlaySource) -> Result<(), ServerError> {
    let (Some(upper), Some(work)) = (&source.upper, &source.work) else {
        return Ok(());
    };
    let lower: Vec<_> = source.lower.iter().flat_map(directories).collect();
    overlay::check(upper, work, &lower)?;
    Ok(())
}

/// The directories of the host that `source` serves.
fn directories(source: &Source) -> Vec<PathBuf> {
    match source {
        Source::Directory(path) => vec![path.clone()],
        Source::Vfs(mounts) => mounts
            .iter()
            .flat_map(|(_, source)| directories(source))
            .collect(),
        Source::Overlay(overlay) => overlay.lower.iter().flat_map(directories).collect(),
        Source::Rafs(_) => Vec::new(),
    }
}

/// The device of what was reached, and the descriptor.
fn device(reached: &Reached) -> Option<u64> {
    rustix::fs::fstat(&reached.fd).ok().map(|stat| stat.st_dev)
}

impl Builder {
    /// Builds an overlay, whose trees are the next ones in the order of
    /// [`trees`](super::trees).
    pub(super) fn overlay(
        &mut self,
        source: &OverlaySource,
    ) -> Result<Arc<dyn FileSystem>, ServerError> {
        // Layers have extended attributes even if the guest hasn't, and mounts within them are not
        // the guest's business.
        let layer_options = Options {
            xattr: true,
            announce_submounts: false,
            remember_inodes: 0,
            ..self.options.clone()
        };
        let mut lower = Vec::new();
        for layer in &source.lower {
            lower.push(match layer {
                Source::Directory(path) => {
                    let reached = self.next()?;
                    let device = device(&reached);
                    let options = Options {
                        readonly: true,
                        ..layer_options.clone()
                    };
                    let fs = Arc::new(self.directory(path, reached, options)?);
                    Lower { fs, device }
                }
                Source::Rafs(image) => Lower {
                    fs: self.image(image, layer_options.xattr)?,
                    device: None,
                },
                other => Lower {
                    fs: self.build(other)?,
                    device: None,
                },
            });
        }
        let upper = match &source.upper {
            Some(path) => {
                let mut paths = self.next_tree()?.into_iter();
                let mut next = || paths.next().ok_or(ServerError::NotReached);
                let (common, upper, work) = (next()?, next()?, next()?);
                let device = device(&upper);
                if layer_options.readonly {
                    // The topmost of the layers, none of which is changed.
                    let fs = Arc::new(self.directory(path, upper, layer_options)?);
                    lower.insert(0, Lower { fs, device });
                    None
                } else {
                    let within =
                        |path: &Path| path.strip_prefix(&common.path).unwrap_or(path).to_owned();
                    Some(Upper {
                        directory: within(&upper.path),
                        work: within(&work.path),
                        device,
                        fs: Arc::new(self.directory(path, common, layer_options)?),
                    })
                }
            }
            None => None,
        };
        // Each node is one of a layer's, which limits them.
        let layers = lower.len() + usize::from(upper.is_some());
        let options = overlay::Options {
            xattr_prefix: source.settings.xattr_prefix,
            redirect_dirs: source.settings.redirect_dirs,
            sync_copies: !source.settings.volatile,
            xattr: self.options.xattr,
            max_inodes: self.options.max_inodes.saturating_mul(layers),
            entry_ttl: self.options.entry_ttl,
        };
        Ok(Arc::new(Overlay::new(lower, upper, options)?))
    }
}
