//! A directory for the data of an image that is given none, for the lifetime of the server.
//!
//! It is made before the process is split, because nothing can be made outside of the sandbox
//! afterwards. The invariant: the process outside of the sandbox removes it.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use super::error::ServerError;
use crate::config::Source;

/// A directory that is removed with all that it contains when this is dropped.
#[derive(Debug)]
pub(super) struct TemporaryCache(PathBuf);

impl TemporaryCache {
    /// Makes one for each image of `source` that has no cache.
    pub(super) fn make_for(source: &mut Source) -> Result<Vec<Self>, ServerError> {
        let mut made = Vec::new();
        let mut left = vec![source];
        while let Some(source) = left.pop() {
            match source {
                Source::Directory(_) => {}
                Source::Vfs(mounts) => left.extend(mounts.iter_mut().map(|(_, source)| source)),
                Source::Overlay(overlay) => left.extend(&mut overlay.lower),
                Source::Rafs(image) if image.cache_dir.is_none() => {
                    let cache = Self::make()?;
                    image.cache_dir = Some(cache.0.clone());
                    made.push(cache);
                }
                Source::Rafs(_) => {}
            }
        }
        Ok(made)
    }

    fn make() -> Result<Self, ServerError> {
        let parent = std::env::temp_dir();
        let mut number = 0_u32;
        loop {
            let path = parent.join(format!("ringfsd-cache-{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(source) => return Err(ServerError::Cache { path, source }),
            }
        }
    }

    /// Leaves the directory to the other process.
    pub(super) fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for TemporaryCache {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::warn!(
                "can't remove the temporary cache {}: {error}",
                self.0.display()
            );
        }
    }
}
