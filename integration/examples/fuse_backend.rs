//! Serves file systems of fuse-backend-rs by the adapter: its passthrough, its `Vfs`, its overlay.
//!
//! `fuse_backend SOCKET [OPTION...] passthrough DIR`, or `vfs NAME=DIR...`, or
//! `overlay UPPER WORK LOWER...` (the topmost layer first), listens on SOCKET and serves the first
//! VMM that connects, until that disconnects or SIGTERM comes. Options: `--immediate` calls the
//! file system on the workers, `--writeback` offers the guest to cache writes, `--runtime` chooses
//! the engine, `--workers` and `--request-queues` set their numbers.

#![allow(
    clippy::print_stderr,
    reason = "an example tells its user what is wrong"
)]

use std::error::Error;
use std::io;
use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::Layer;
use fuse_backend_rs::api::{Vfs, VfsOptions};
use fuse_backend_rs::overlayfs::{self, OverlayFs};
use fuse_backend_rs::passthrough::{self, CachePolicy, PassthroughFs};
use ringfsd::error_chain;
use ringfsd::fs::FileSystem;
use ringfsd::fs::fuse_backend::{Adapter, Backend, Options};
use ringfsd::io::Choice;
use ringfsd::service::Device;
use ringfsd::service::SessionOptions;
use ringfsd::service::{Listener, Stop};
use ringfsd::service::{Service, ServiceOptions};

const USAGE: &str =
    "usage: fuse_backend SOCKET [--immediate] [--writeback] [--runtime auto|uring|tokio|tokio-uring]
         [--workers N] [--request-queues N]
         (passthrough DIR | vfs NAME=DIR... | overlay UPPER WORK LOWER...)";

/// How long the guest may rely on what it is told.
const TTL: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        .filter_module("fuse_backend_rs", log::LevelFilter::Warn)
        .init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fuse_backend: {}", error_chain::one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or(USAGE)?;
    let mut options = ServiceOptions {
        device: Device {
            tag: Some("backend".parse()?),
            request_queues: NonZeroU16::new(2).ok_or(USAGE)?,
            dax_window: 0,
            dax_fs_map: false,
        },
        workers: NonZeroUsize::new(2).ok_or(USAGE)?,
        runtime: Choice::Auto,
        poll: Duration::from_micros(50),
        session: SessionOptions::default(),
        once: true,
    };
    let mut adapter = Options::default();
    let kind = loop {
        let argument = arguments.next().ok_or(USAGE)?;
        let mut value = || arguments.next().ok_or(USAGE);
        match argument.as_str() {
            "--immediate" => adapter.may_block = false,
            "--writeback" => options.session.writeback = true,
            "--workers" => options.workers = value()?.parse()?,
            "--request-queues" => options.device.request_queues = value()?.parse()?,
            "--runtime" => {
                options.runtime = match value()?.as_str() {
                    "auto" => Choice::Auto,
                    "uring" => Choice::Uring,
                    "tokio" => Choice::Tokio,
                    "tokio-uring" => Choice::TokioUring,
                    _ => return Err(USAGE.into()),
                }
            }
            _ => break argument,
        }
    };
    // The file systems apply the guest's umask, and expect to have none.
    rustix::process::umask(rustix::fs::Mode::empty());
    let rest: Vec<_> = arguments.collect();
    let writeback = options.session.writeback;
    match (kind.as_str(), rest.as_slice()) {
        ("passthrough", [dir]) => {
            let fs = directory(dir, true, writeback)?;
            serve(&socket, options, Adapter::with_options(fs, adapter))
        }
        ("vfs", mounts @ [_, ..]) => {
            let fs = vfs(mounts, writeback)?;
            serve(&socket, options, Adapter::with_options(fs, adapter))
        }
        ("overlay", [upper, work, lower @ ..]) if !lower.is_empty() => {
            let fs = overlay(upper, work, lower, writeback)?;
            serve(&socket, options, Adapter::with_options(fs, adapter))
        }
        _ => Err(USAGE.into()),
    }
}

/// The passthrough for `dir`, which reads its root at INIT, or at once where another file system
/// sends it no INIT of its own.
fn directory(dir: &str, at_init: bool, writeback: bool) -> io::Result<PassthroughFs> {
    let fs = PassthroughFs::new(passthrough::Config {
        root_dir: dir.to_owned(),
        cache_policy: CachePolicy::Auto,
        attr_timeout: TTL,
        entry_timeout: TTL,
        xattr: true,
        do_import: at_init,
        writeback,
        ..passthrough::Config::default()
    })?;
    if !at_init {
        fs.import()?;
    }
    Ok(fs)
}

/// Directories, each mounted under its name in the root.
fn vfs(mounts: &[String], writeback: bool) -> Result<Vfs, Box<dyn Error>> {
    let vfs = Vfs::new(VfsOptions {
        no_open: false,
        no_opendir: false,
        no_writeback: !writeback,
        ..VfsOptions::default()
    });
    for mount in mounts {
        let (name, dir) = mount.split_once('=').ok_or(USAGE)?;
        let fs = directory(dir, false, writeback)?;
        vfs.mount(Box::new(fs), &format!("/{name}"))?;
    }
    Ok(vfs)
}

fn overlay(upper: &str, work: &str, lower: &[String], writeback: bool) -> io::Result<OverlayFs> {
    type BoxedLayer = Box<dyn Layer<Inode = u64, Handle = u64> + Send + Sync>;
    let layer = |dir: &String| -> io::Result<Arc<BoxedLayer>> {
        Ok(Arc::new(Box::new(directory(dir, false, writeback)?)))
    };
    let lower = lower.iter().map(layer).collect::<io::Result<_>>()?;
    OverlayFs::new(
        Some(layer(&upper.to_owned())?),
        lower,
        overlayfs::config::Config {
            work: work.to_owned(),
            do_import: true,
            writeback,
            attr_timeout: TTL,
            entry_timeout: TTL,
            ..overlayfs::config::Config::default()
        },
    )
}

fn serve<F: Backend>(
    socket: &str,
    options: ServiceOptions,
    adapter: Adapter<F>,
) -> Result<(), Box<dyn Error>> {
    let adapter = Arc::new(adapter);
    let fs: Arc<dyn FileSystem> = Arc::clone(&adapter) as _;
    let mut service = Service::new(fs, options)?;
    let listener = Listener::bind(Path::new(socket))?;
    let (asked, ask) = io::pipe()?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, ask)?;
    let leave = AtomicBool::new(false);
    let stop = Stop {
        asked: asked.as_fd(),
        leave: &leave,
    };
    service.run(&listener, stop)?;
    log::info!(
        "{} lookups and {} open files are left",
        adapter.lookups(),
        adapter.open_files()
    );
    Ok(())
}
