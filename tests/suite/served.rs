//! Serves a file system of the test's own by the library's service, over a socket.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ringfsd::fs::FileSystem;
use ringfsd::io::{Choice, Engine};
use ringfsd::service::Device;
use ringfsd::service::SessionOptions;
use ringfsd::service::{Exit, Service, ServiceOptions};
use ringfsd::service::{Listener, Stop};
use vmm::fuse::Client;
use vmm::{Options, Profile, Session};

/// The engines of this machine.
pub(crate) fn engines() -> Vec<Choice> {
    let is_usable = |engine: &&Engine| match engine.probe() {
        Ok(()) => true,
        Err(reason) => {
            println!("SKIPPED on {engine}: {reason}");
            false
        }
    };
    let choice = |engine: &Engine| match engine {
        Engine::ThreadPool => Choice::Tokio,
        Engine::Uring => Choice::Uring,
        #[cfg(feature = "tokio-uring")]
        Engine::TokioUring => Choice::TokioUring,
        engine => panic!("no choice of {engine}"),
    };
    Engine::ALL.iter().filter(is_usable).map(choice).collect()
}

/// Serves `fs` to `guest` with this many workers, and returns when the server has ended.
pub(crate) fn serve(
    fs: Arc<dyn FileSystem>,
    (runtime, workers): (Choice, usize),
    session: SessionOptions,
    guest: impl FnOnce(&mut Client<Session>),
) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listener = Listener::bind(&socket).unwrap();
    let options = ServiceOptions {
        device: Device {
            tag: None,
            request_queues: NonZeroU16::new(2).unwrap(),
            dax_window: 0,
            dax_fs_map: false,
        },
        workers: NonZeroUsize::new(workers).unwrap(),
        runtime,
        poll: Duration::ZERO,
        session,
        once: true,
    };
    let mut service = Service::new(fs, options).unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (never, _keep) = std::io::pipe().unwrap();
            let leave = AtomicBool::new(false);
            let stop = Stop {
                asked: never.as_fd(),
                leave: &leave,
            };
            service.run(&listener, stop).unwrap()
        });
        let stream = UnixStream::connect(&socket).unwrap();
        let session = Profile::Qemu.connect(stream, &Options::default()).unwrap();
        let mut client = Client::new(session);
        client.init().unwrap();
        guest(&mut client);
        drop(client);
        assert_eq!(server.join().unwrap(), Exit::Ended);
    });
}
