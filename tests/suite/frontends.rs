//! Each front end's own order of messages, then a FUSE session over what it has set up.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use testing::{Server, each_runtime};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

mod work;

/// A guest at work, and its front end, which stops the queues in the end.
fn work(profile: Profile, runtime: &str) {
    let mut server = Server::start(&["--runtime", runtime, "--request-queues", "2"]);
    let mut fs = server.session(profile, &Options::default());
    work::work(&mut fs, &server.share());
    let bases = fs.guest().stop().unwrap();
    assert!(
        bases.iter().any(|base| *base > 0),
        "requests went over some queue"
    );
    drop(fs);
    server.wait_until_it_listens();
}

#[each_runtime]
fn qemu(runtime: &str) {
    work(Profile::Qemu, runtime);
}

#[each_runtime]
fn cloud_hypervisor(runtime: &str) {
    work(Profile::CloudHypervisor, runtime);
}

#[each_runtime]
fn dragonball(runtime: &str) {
    work(Profile::Dragonball, runtime);
}

#[each_runtime]
fn crosvm(runtime: &str) {
    work(Profile::Crosvm, runtime);
}

#[each_runtime]
fn libkrun(runtime: &str) {
    work(Profile::Libkrun, runtime);
}

#[each_runtime]
fn simple(runtime: &str) {
    work(Profile::Simple, runtime);
}

#[test]
fn configuration_space_has_tag_and_queue_count() {
    let server = Server::start(&["--tag", "my files", "--request-queues", "3"]);
    let fs = server.session(Profile::Crosvm, &Options::default());
    let session = fs.into_guest();
    let config = session.config.unwrap();
    assert_eq!(&config.tag[..9], b"my files\0");
    assert_eq!({ config.num_request_queues }, 3);
    assert_eq!(
        session.queues.len(),
        4,
        "crosvm makes what GET_QUEUE_NUM says"
    );
}

#[test]
fn inflight_region_is_provided_on_request() {
    let server = Server::start(&["--request-queues", "2"]);
    let options = Options::default().request_queues(2).queue_size(256);
    let mut session = server
        .session(Profile::CloudHypervisor, &options)
        .into_guest();
    let (layout, file) = session.inflight().unwrap();
    assert_eq!((layout.num_queues, layout.queue_size), (3, 256));
    assert_eq!(layout.mmap_offset, 0);
    let len = rustix::fs::fstat(file).unwrap().st_size;
    assert_eq!(layout.mmap_size, u64::try_from(len).unwrap());
    let shorten = rustix::fs::ftruncate(file, 0);
    assert!(shorten.is_err(), "not even by the front end");
    // Queues that stop and resume do so with the same memory.
    let bases = session.stop().unwrap();
    session.restart(&bases).unwrap();
    vmm::fuse::Client::new(session).getattr(ROOT).unwrap();
}
