//! What is served, as the options spell it: `MOUNTPOINT=SPEC`, layers, images.
//!
//! The invariant: what is returned names every file of the host that it needs.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::comma_list::items;
use crate::config::{OverlaySettings, OverlaySource, Prefetch, RafsSource, Source};
use crate::fs::overlay::XattrPrefix;
use crate::fs::vfs::{MountPoint, MountPointError};

/// The settings of an overlay, for messages.
const OVERLAY_SETTINGS: &str = "lower=, upper=, work=, rafs=, blobs=, cache-dir=, prefetch=, xattr=, \
                                redirect-dir= and volatile";

/// Why a source can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// There is no mount point.
    #[error("{0:?} is not MOUNTPOINT=SPEC")]
    NoMountPoint(String),
    /// The mount point is malformed.
    #[error(transparent)]
    MountPoint(#[from] MountPointError),
    /// A path is missing.
    #[error("{0} needs a path")]
    NoPath(&'static str),
    /// A setting is unknown.
    #[error("{setting:?} is not a setting of {of}, which has {known}")]
    Setting {
        /// The text.
        setting: String,
        /// What it was given to.
        of: &'static str,
        /// What there is.
        known: &'static str,
    },
    /// A setting is given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// There is nothing to see.
    #[error("an overlay needs a layer: lower=DIR[:DIR…], upper=DIR, or both")]
    NoLayer,
    /// Changes can't be prepared.
    #[error("upper= and work= belong together: give both, or neither for a read-only overlay")]
    UpperWithoutWork,
    /// This build can't read images.
    #[error(
        "this ringfsd was built without support for RAFS images: build it with --features nydus"
    )]
    NoImages,
}

/// Parses `MOUNTPOINT=SPEC`.
pub(super) fn vfs_mount(text: &OsStr) -> Result<(MountPoint, Source), SourceError> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=');
    let at = at.ok_or_else(|| SourceError::NoMountPoint(text.display().to_string()))?;
    let (point, spec) = (&bytes[..at], &bytes[at + 1..]);
    let point = MountPoint::parse(OsStr::from_bytes(point))?;
    let source = if let Some(layers) = spec.strip_prefix(b"overlay:") {
        let layers = overlay(OsStr::from_bytes(layers))?;
        if layers.lower.is_empty() && layers.upper.is_none() {
            return Err(SourceError::NoLayer);
        }
        Source::Overlay(layers)
    } else if let Some(image) = spec.strip_prefix(b"rafs:") {
        Source::Rafs(rafs(OsStr::from_bytes(image))?)
    } else {
        Source::Directory(path(spec, "MOUNTPOINT=")?)
    };
    Ok((point, source))
}

/// Parses `lower=A:B,upper=U,work=W`, and `rafs=BOOTSTRAP,blobs=DIR` with the settings of an image for
/// the lowest layer. There may be no layer: an image can be the only one.
pub(super) fn overlay(text: &OsStr) -> Result<OverlaySource, SourceError> {
    let (mut lower, mut upper, mut work) = (None, None, None);
    let (mut prefix, mut redirects, mut volatile) = (None, None, None);
    let mut image = ImageSettings::default();
    for item in items(text) {
        let (name, value) = setting(&item);
        match name {
            b"rafs" => set(&mut image.bootstrap, "rafs=", path(value, "rafs=")?)?,
            _ if image.take(name, value)? => {}
            b"lower" => set(&mut lower, "lower=", layers(value)?)?,
            b"upper" => set(&mut upper, "upper=", path(value, "upper=")?)?,
            b"work" => set(&mut work, "work=", path(value, "work=")?)?,
            b"xattr" => set(&mut prefix, "xattr=", xattr_prefix(value)?)?,
            b"redirect-dir" => set(&mut redirects, "redirect-dir=", on_or_off(value)?)?,
            b"volatile" if value.is_empty() => set(&mut volatile, "volatile", true)?,
            _ => return Err(unknown(&item, "an overlay", OVERLAY_SETTINGS)),
        }
    }
    if upper.is_some() != work.is_some() {
        return Err(SourceError::UpperWithoutWork);
    }
    let mut lower = lower.unwrap_or_default();
    if !image.is_empty() {
        lower.push(Source::Rafs(image.finish("rafs=")?));
    }
    Ok(OverlaySource {
        lower,
        upper,
        work,
        settings: OverlaySettings {
            xattr_prefix: prefix.unwrap_or_default(),
            redirect_dirs: redirects.unwrap_or_default(),
            volatile: volatile.unwrap_or_default(),
        },
    })
}

fn xattr_prefix(value: &[u8]) -> Result<XattrPrefix, SourceError> {
    match value {
        b"trusted" => Ok(XattrPrefix::Trusted),
        b"user" => Ok(XattrPrefix::User),
        _ => Err(unknown(value, "xattr=", "trusted and user")),
    }
}

fn on_or_off(value: &[u8]) -> Result<bool, SourceError> {
    match value {
        b"on" => Ok(true),
        b"off" => Ok(false),
        _ => Err(unknown(value, "redirect-dir=", "on and off")),
    }
}

/// The settings of an image, as far as they have been read.
#[derive(Debug, Default)]
struct ImageSettings {
    bootstrap: Option<PathBuf>,
    blobs: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
    prefetch: Option<Prefetch>,
}

impl ImageSettings {
    /// Takes a setting, if it is one of an image.
    fn take(&mut self, name: &[u8], value: &[u8]) -> Result<bool, SourceError> {
        match name {
            b"blobs" => set(&mut self.blobs, "blobs=", path(value, "blobs=")?)?,
            b"cache-dir" => {
                set(
                    &mut self.cache_dir,
                    "cache-dir=",
                    path(value, "cache-dir=")?,
                )?;
            }
            b"prefetch" => set(&mut self.prefetch, "prefetch=", prefetch(value)?)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn is_empty(&self) -> bool {
        let paths = [&self.bootstrap, &self.blobs, &self.cache_dir];
        paths.iter().all(|path| path.is_none()) && self.prefetch.is_none()
    }

    /// The image, whose bootstrap is spelled as `bootstrap`.
    fn finish(self, bootstrap: &'static str) -> Result<RafsSource, SourceError> {
        image(
            self.bootstrap.ok_or(SourceError::NoPath(bootstrap))?,
            self.blobs.ok_or(SourceError::NoPath("blobs="))?,
            self.cache_dir,
            self.prefetch.unwrap_or_default(),
        )
    }
}

fn prefetch(value: &[u8]) -> Result<Prefetch, SourceError> {
    match value {
        b"none" => Ok(Prefetch::None),
        b"named" => Ok(Prefetch::Named),
        b"all" => Ok(Prefetch::All),
        _ => Err(unknown(value, "prefetch=", "none, named and all")),
    }
}

/// Parses `BOOTSTRAP,blobs=DIR[,cache-dir=DIR][,prefetch=WHAT]`.
fn rafs(text: &OsStr) -> Result<RafsSource, SourceError> {
    let mut image = ImageSettings::default();
    for item in items(text) {
        let (name, value) = setting(&item);
        if image.take(name, value)? {
            continue;
        }
        if image.bootstrap.is_some() {
            return Err(unknown(
                &item,
                "an image",
                "blobs=, cache-dir= and prefetch=",
            ));
        }
        image.bootstrap = Some(path(&item, "rafs:")?);
    }
    image.finish("rafs:")
}

/// An image, if this build can read one.
pub(super) fn image(
    bootstrap: PathBuf,
    blobs: PathBuf,
    cache_dir: Option<PathBuf>,
    prefetch: Prefetch,
) -> Result<RafsSource, SourceError> {
    if cfg!(feature = "nydus") {
        Ok(RafsSource {
            bootstrap,
            blobs,
            cache_dir,
            prefetch,
        })
    } else {
        Err(SourceError::NoImages)
    }
}

/// Parses `A:B`, the topmost layer first; `\:` is a colon within a path and `\\` a backslash.
fn layers(text: &[u8]) -> Result<Vec<Source>, SourceError> {
    let mut paths = vec![Vec::new()];
    let mut bytes = text.iter().peekable();
    while let Some(byte) = bytes.next() {
        let escaped = || bytes.next_if(|next| matches!(next, b':' | b'\\'));
        match (byte, paths.last_mut()) {
            (b':', _) => paths.push(Vec::new()),
            (b'\\', Some(path)) => path.push(*{ escaped }().unwrap_or(&b'\\')),
            (byte, Some(path)) => path.push(*byte),
            (_, None) => {}
        }
    }
    let sources = paths.iter().map(|path| {
        let path = self::path(path, "lower=")?;
        Ok(Source::Directory(path))
    });
    sources.collect()
}

/// The name of a setting and its value.
fn setting(item: &[u8]) -> (&[u8], &[u8]) {
    match item.iter().position(|byte| *byte == b'=') {
        Some(at) => (&item[..at], &item[at + 1..]),
        None => (item, b""),
    }
}

fn set<T>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), SourceError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(SourceError::Twice(name)),
    }
}

fn path(bytes: &[u8], of: &'static str) -> Result<PathBuf, SourceError> {
    match bytes {
        b"" => Err(SourceError::NoPath(of)),
        path => Ok(OsString::from_vec(path.to_vec()).into()),
    }
}

fn unknown(item: &[u8], of: &'static str, known: &'static str) -> SourceError {
    SourceError::Setting {
        setting: String::from_utf8_lossy(item).into_owned(),
        of,
        known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> Result<(String, Source), SourceError> {
        vfs_mount(OsStr::new(text)).map(|(point, source)| (point.to_string(), source))
    }

    fn directory(path: &str) -> Source {
        Source::Directory(path.into())
    }

    #[test]
    fn mount_has_a_point_and_a_directory() {
        for (text, point, path) in [
            ("/=/srv", "/", "/srv"),
            ("/a/b/=x=y", "/a/b", "x=y"),
            ("/a=./overlay:x", "/a", "./overlay:x"),
        ] {
            assert_eq!(mount(text), Ok((point.to_owned(), directory(path))));
        }
        for bad in ["", "/a", "a=/b", "/a=", "/../a=/b"] {
            assert!(mount(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn overlay_has_layers_topmost_first() {
        let (_, source) = mount(r"/o=overlay:lower=/a\:1:/b,,2:/c\\d,upper=/u,work=/w").unwrap();
        let Source::Overlay(overlay) = source else {
            panic!("{source:?}");
        };
        let lower = [r"/a:1", "/b,2", r"/c\d"].map(directory);
        assert_eq!(overlay.lower, lower);
        assert_eq!(overlay.upper, Some("/u".into()));
        assert_eq!(overlay.work, Some("/w".into()));
        for bad in [
            "",
            "lower=",
            "lower=/a:",
            "lower=/a,lower=/b",
            "lower=/a,upper=/u",
            "lower=/a,work=/w",
            "lower=/a,middle=/m",
            "lower=/a,xattr=none",
            "lower=/a,redirect-dir=",
            "lower=/a,volatile=off",
        ] {
            assert!(mount(&format!("/o=overlay:{bad}")).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn image_is_the_lowest_layer_of_an_overlay() {
        let read = mount("/o=overlay:rafs=/boot,lower=/a:/b,blobs=/blobs,prefetch=none");
        if cfg!(feature = "nydus") {
            let Ok((_, Source::Overlay(overlay))) = read else {
                panic!("{read:?}");
            };
            let image = RafsSource {
                bootstrap: "/boot".into(),
                blobs: "/blobs".into(),
                cache_dir: None,
                prefetch: Prefetch::None,
            };
            let layers = [directory("/a"), directory("/b"), Source::Rafs(image)];
            assert_eq!(overlay.lower, layers);
        } else {
            assert_eq!(read, Err(SourceError::NoImages));
        }
        for bad in [
            "rafs=/boot",
            "blobs=/blobs,lower=/a",
            "prefetch=all,lower=/a",
            "rafs=,blobs=/blobs",
            "rafs=/boot,rafs=/boot,blobs=/blobs",
            "rafs=/boot,blobs=/blobs,prefetch=some",
        ] {
            let read = mount(&format!("/o=overlay:{bad}"));
            let refused = read.is_err_and(|error| error != SourceError::NoImages);
            assert!(refused, "{bad:?}");
        }
    }

    #[test]
    fn overlay_has_settings() {
        let settings = |text: &str| match mount(&format!("/o=overlay:lower=/a{text}")) {
            Ok((_, Source::Overlay(overlay))) => overlay.settings,
            other => panic!("{other:?}"),
        };
        assert_eq!(settings(""), OverlaySettings::default());
        assert_eq!(
            settings(",xattr=user,redirect-dir=on,volatile"),
            OverlaySettings {
                xattr_prefix: XattrPrefix::User,
                redirect_dirs: true,
                volatile: true,
            }
        );
    }

    #[test]
    fn image_names_bootstrap_and_blobs() {
        let read = mount("/i=rafs:/boot,blobs=/blobs,cache-dir=/cache,prefetch=all");
        if cfg!(feature = "nydus") {
            let image = RafsSource {
                bootstrap: "/boot".into(),
                blobs: "/blobs".into(),
                cache_dir: Some("/cache".into()),
                prefetch: Prefetch::All,
            };
            assert_eq!(read, Ok(("/i".to_owned(), Source::Rafs(image))));
        } else {
            assert_eq!(read, Err(SourceError::NoImages));
        }
        for bad in ["", "/boot", "blobs=/b", "/boot,blobs=", "/boot,blobs=/b,/c"] {
            let read = mount(&format!("/i=rafs:{bad}"));
            assert!(
                read.is_err_and(|error| error != SourceError::NoImages),
                "{bad:?}"
            );
        }
    }
}
