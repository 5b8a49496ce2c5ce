//! Serves a file system that is no directory of the host: a tree in memory.
//!
//! `memory_tree SOCKET [--may-block] [--runtime auto|uring|tokio|tokio-uring]` listens on SOCKET and
//! serves the first VMM that connects, until that disconnects or SIGTERM comes. With `--may-block`
//! the tree asks to be called on threads that may wait, as a file system does whose metadata come
//! over a network.

#![allow(
    clippy::print_stderr,
    reason = "an example tells its user what is wrong"
)]

mod content;
mod tree;

use std::error::Error;
use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ringfsd::error_chain;
use ringfsd::io::Choice;
use ringfsd::service::Device;
use ringfsd::service::SessionOptions;
use ringfsd::service::{Listener, Stop};
use ringfsd::service::{Service, ServiceOptions};

use self::tree::MemoryTree;

const USAGE: &str =
    "usage: memory_tree SOCKET [--may-block] [--runtime auto|uring|tokio|tokio-uring]";

fn main() -> ExitCode {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        .init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memory_tree: {}", error_chain::one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let (mut socket, mut may_block, mut runtime) = (None, false, Choice::Auto);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--may-block" => may_block = true,
            "--runtime" => {
                runtime = match arguments.next().as_deref() {
                    Some("auto") => Choice::Auto,
                    Some("uring") => Choice::Uring,
                    Some("tokio-uring") => Choice::TokioUring,
                    Some("tokio") => Choice::Tokio,
                    _ => return Err(USAGE.into()),
                }
            }
            _ if socket.is_none() && !argument.starts_with('-') => socket = Some(argument),
            _ => return Err(USAGE.into()),
        }
    }
    let socket = socket.ok_or(USAGE)?;
    let options = ServiceOptions {
        device: Device {
            tag: Some("memory".parse()?),
            request_queues: NonZeroU16::new(2).unwrap_or(NonZeroU16::MIN),
            dax_window: 0,
            dax_fs_map: false,
        },
        workers: NonZeroUsize::new(2).unwrap_or(NonZeroUsize::MIN),
        runtime,
        poll: Duration::from_micros(50),
        session: SessionOptions::default(),
        once: true,
    };
    let tree = Arc::new(MemoryTree::new(may_block));
    let mut service = Service::new(Arc::clone(&tree) as _, options)?;
    let listener = Listener::bind(Path::new(&socket))?;
    let (asked, ask) = std::io::pipe()?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, ask)?;
    let leave = AtomicBool::new(false);
    let stop = Stop {
        asked: asked.as_fd(),
        leave: &leave,
    };
    service.run(&listener, stop)?;
    log::info!("{} inodes are left", tree.inodes());
    Ok(())
}
