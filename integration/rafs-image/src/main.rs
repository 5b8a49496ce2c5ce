//! Makes a RAFS image of a directory: a bootstrap (metadata) and a blob (data).
//!
//! `rafs_image SOURCE OUT [--version 5|6] [--compressor none|lz4_block|gzip|zstd] [--chunk-size BYTES]
//! [--prefetch] [--no-digests]` writes `OUT/bootstrap` and `OUT/blobs/ID`. With `--prefetch` the
//! image names the files to prefetch that standard input lists, one absolute path a line.
//! `--no-digests` leaves the chunks' digests out of a version 6 blob.

#![allow(
    clippy::print_stderr,
    reason = "a program tells its user what is wrong"
)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use nydus_api::ConfigV2;
use nydus_builder::attributes::Attributes;
use nydus_builder::{
    ArtifactStorage, BlobManager, BootstrapManager, BuildContext, Builder, ConversionType,
    DirectoryBuilder, Features, Prefetch, PrefetchPolicy, WhiteoutSpec,
};
use nydus_rafs::metadata::RafsVersion;
use nydus_utils::{compress, digest};

const USAGE: &str = "usage: rafs_image SOURCE OUT [--version 5|6] [--compressor NAME] \
    [--chunk-size BYTES] [--prefetch] [--no-digests]";

/// What to build.
struct Wanted {
    source: PathBuf,
    out: PathBuf,
    version: RafsVersion,
    compressor: compress::Algorithm,
    chunk_size: u32,
    prefetch: bool,
    digests: bool,
}

fn main() -> ExitCode {
    match wanted().and_then(|wanted| build(&wanted)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rafs_image: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wanted() -> Result<Wanted, Box<dyn Error>> {
    let mut paths = Vec::new();
    let (mut version, mut compressor) = (RafsVersion::V6, compress::Algorithm::Zstd);
    let (mut chunk_size, mut prefetch, mut digests) = (0x10_0000, false, true);
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            let value = arguments.next().and_then(|value| value.into_string().ok());
            value.ok_or(USAGE)
        };
        match argument.to_str() {
            Some("--version") => {
                version = match value()?.as_str() {
                    "5" => RafsVersion::V5,
                    "6" => RafsVersion::V6,
                    _ => return Err(USAGE.into()),
                }
            }
            Some("--compressor") => compressor = value()?.parse()?,
            Some("--chunk-size") => chunk_size = value()?.parse()?,
            Some("--prefetch") => prefetch = true,
            Some("--no-digests") => digests = false,
            _ => paths.push(PathBuf::from(argument)),
        }
    }
    let Ok([source, out]) = <[PathBuf; 2]>::try_from(paths) else {
        return Err(USAGE.into());
    };
    Ok(Wanted {
        source: source.canonicalize()?,
        out,
        version,
        compressor,
        chunk_size,
        prefetch,
        digests,
    })
}

fn build(wanted: &Wanted) -> Result<(), Box<dyn Error>> {
    let blobs = wanted.out.join("blobs");
    std::fs::create_dir_all(&blobs)?;
    let policy = match wanted.prefetch {
        true => PrefetchPolicy::Fs,
        false => PrefetchPolicy::None,
    };
    let features = match wanted.digests && wanted.version.is_v6() {
        true => Features::try_from("blob-toc")?,
        false => Features::new(),
    };
    let mut context = BuildContext::new(
        String::new(),
        wanted.version.is_v6(),
        0,
        wanted.compressor,
        digest::Algorithm::Blake3,
        true,
        WhiteoutSpec::None,
        ConversionType::DirectoryToRafs,
        wanted.source.clone(),
        Prefetch::new(policy)?,
        Some(ArtifactStorage::FileDir((blobs, String::new()))),
        None,
        false,
        features,
        false,
        Attributes::default(),
    );
    context.set_fs_version(wanted.version);
    context.set_chunk_size(wanted.chunk_size);
    context.set_configuration(Arc::new(ConfigV2::default()));
    let bootstrap = ArtifactStorage::SingleFile(bootstrap(&wanted.out));
    let mut bootstraps = BootstrapManager::new(Some(bootstrap), None);
    let mut blobs = BlobManager::new(digest::Algorithm::Blake3, false);
    DirectoryBuilder::new().build(&mut context, &mut bootstraps, &mut blobs)?;
    Ok(())
}

fn bootstrap(out: &Path) -> PathBuf {
    out.join("bootstrap")
}
