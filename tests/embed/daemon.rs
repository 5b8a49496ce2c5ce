//! The stock daemon of `vhost-user-backend` serves the device to each front end.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ringfsd::embed::{Choice, VhostUserDevice};
use testing::TIMEOUT;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm::connection::message::feature;
use vmm::fuse::wire::opcode;
use vmm::fuse::{Call, Client, ROOT};
use vmm::{Options, Profile, Session};

use crate::guest::{engines, options, passthrough};
use crate::work::work;

/// A daemon that serves one front end.
struct Daemon {
    share: tempfile::TempDir,
    socket: PathBuf,
    device: VhostUserDevice,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Daemon {
    fn start(runtime: Choice) -> Self {
        Self::sharing(tempfile::tempdir().unwrap(), runtime)
    }

    fn sharing(share: tempfile::TempDir, runtime: Choice) -> Self {
        let fs = passthrough(share.path());
        let device = VhostUserDevice::new(fs, options(runtime)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let mut listener = Listener::new(&socket, false).unwrap();
        let served = device.clone();
        let thread = std::thread::spawn(move || {
            let memory = GuestMemoryMmap::<BitmapMmapRegion>::new();
            let memory = GuestMemoryAtomic::new(memory);
            let mut daemon = VhostUserDaemon::new("fs".to_owned(), served.clone(), memory).unwrap();
            daemon.start(&mut listener).unwrap();
            // A front end that disconnects is an error for the daemon.
            let _ = daemon.wait();
            served.disconnected();
            drop(dir);
        });
        Self {
            share,
            socket,
            device,
            thread: Some(thread),
        }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    fn session(&self, profile: Profile) -> Client<Session> {
        let session = profile.connect(self.connect(), &Options::default());
        let mut client = Client::new(session.unwrap());
        client.init().unwrap();
        client
    }

    /// Waits until the front end's disconnection has ended the session.
    fn end(mut self) -> tempfile::TempDir {
        self.thread.take().unwrap().join().unwrap();
        self.share
    }
}

fn serves(profile: Profile) {
    for engine in engines() {
        let daemon = Daemon::start(engine);
        let mut client = daemon.session(profile);
        work(&mut client, daemon.share.path());
        let bases = client.guest().stop().unwrap();
        assert!(bases.iter().any(|base| *base > 0));
        // libkrun always begins at 0, so it can't continue.
        if profile != Profile::Libkrun {
            client.guest().restart(&bases).unwrap();
            client.lookup(ROOT, c"from the host").unwrap();
        }
        drop(client);
        daemon.end();
    }
}

#[test]
fn qemu() {
    serves(Profile::Qemu);
}

#[test]
fn cloud_hypervisor() {
    serves(Profile::CloudHypervisor);
}

#[test]
fn dragonball() {
    serves(Profile::Dragonball);
}

#[test]
fn crosvm() {
    serves(Profile::Crosvm);
}

#[test]
fn libkrun() {
    serves(Profile::Libkrun);
}

#[test]
fn simple() {
    serves(Profile::Simple);
}

#[test]
fn configuration_space_has_tag_and_queue_count() {
    let daemon = Daemon::start(Choice::Tokio);
    let session = daemon.session(Profile::Crosvm).into_guest();
    let config = session.config.as_ref().unwrap();
    assert_eq!(&config.tag[..7], b"shared\0");
    assert_eq!({ config.num_request_queues }, 2);
    assert_eq!(session.queues.len(), 3);
}

#[test]
fn disabled_ring_is_not_served() {
    let daemon = Daemon::start(Choice::Auto);
    let mut client = daemon.session(Profile::Crosvm);
    for index in 0..3 {
        client
            .guest()
            .connection
            .set_vring_enable(index, false)
            .unwrap();
    }
    // Disabled once this is answered.
    client.guest().connection.get_features().unwrap();
    let request = Call::new(opcode::GETATTR, ROOT).arg(&[0; 16]).reply(104);
    let pending = client.submit(request).unwrap();
    client.guest().connection.get_features().unwrap();
    assert!(client.returned().unwrap().is_empty());
    for index in 0..3 {
        client
            .guest()
            .connection
            .set_vring_enable(index, true)
            .unwrap();
    }
    client.collect(pending).unwrap();
}

#[test]
fn session_migrates_between_daemons() {
    let from = Daemon::start(Choice::Auto);
    let mut client = from.session(Profile::Qemu);
    let (file, handle) = client.create(ROOT, c"file", 0o644).unwrap();
    client.write(file.nodeid, handle, 0, b"content").unwrap();
    client.guest().stop().unwrap();
    let state = client.guest().save_state(TIMEOUT).unwrap();
    drop(client);
    let to = Daemon::sharing(from.end(), Choice::Auto);
    let options = Options::default();
    let mut session = Profile::Qemu.prepare(to.connect(), &options).unwrap();
    session.load_state(&state).unwrap();
    session.restart(&[]).unwrap();
    let mut client = Client::new(session);
    assert_eq!(client.read(file.nodeid, handle, 0, 10).unwrap(), b"content");
}

#[test]
fn changed_pages_are_in_the_dirty_log() {
    let daemon = Daemon::start(Choice::Auto);
    std::fs::write(daemon.share.path().join("file"), vec![7; 9000]).unwrap();
    let mut client = daemon.session(Profile::Qemu);
    let entry = client.lookup(ROOT, c"file").unwrap();
    let handle = client.open(entry.nodeid, libc::O_RDONLY).unwrap();
    assert!(client.guest().has(feature::EVENT_IDX));
    let log = client.guest().start_log().unwrap();
    client.read(entry.nodeid, handle, 0, 9000).unwrap();
    let used: Vec<_> = client
        .guest()
        .queues
        .iter()
        .map(|queue| queue.addresses().used)
        .collect();
    client.guest().stop().unwrap();
    assert!(used.iter().any(|used| log.is_dirty(*used)), "a used ring");
    let pages = log.take().unwrap();
    assert!(pages.len() >= 3, "the reply has 9,000 bytes: {pages:?}");
}

#[test]
fn device_serves_the_next_front_end_through_another_daemon() {
    let daemon = Daemon::start(Choice::Auto);
    let mut client = daemon.session(Profile::CloudHypervisor);
    client.create(ROOT, c"file", 0o644).unwrap();
    drop(client);
    let device = daemon.device.clone();
    let share = daemon.end();
    assert!(
        format!("{device:?}").contains("active: None"),
        "it was reset"
    );
    let next = Daemon::sharing(share, Choice::Auto);
    next.session(Profile::CloudHypervisor)
        .lookup(ROOT, c"file")
        .unwrap();
}
