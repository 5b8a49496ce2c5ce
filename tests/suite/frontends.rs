//! Each front end's own order of messages, then a FUSE session over what it has set up.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use testing::{Server, each_runtime, pattern};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

/// A guest at work: directories, files, data, names, and all of it gone again.
fn work(profile: Profile, runtime: &str) {
    let mut server = Server::start(&["--runtime", runtime, "--request-queues", "2"]);
    std::fs::write(server.share().join("from the host"), "hello guest").unwrap();
    let mut fs = server.session(profile, &Options::default());

    let there = fs.lookup(ROOT, c"from the host").unwrap();
    let handle = fs.open(there.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(
        fs.read(there.nodeid, handle, 0, 100).unwrap(),
        b"hello guest"
    );
    fs.release(there.nodeid, handle).unwrap();

    let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    let (file, handle) = fs.create(dir.nodeid, c"file", 0o644).unwrap();
    let data = pattern(300_000, 7);
    assert_eq!(fs.write(file.nodeid, handle, 5, &data).unwrap(), 300_000);
    assert_eq!(fs.read(file.nodeid, handle, 5, 300_000).unwrap(), data);
    assert_eq!(fs.getattr(file.nodeid).unwrap().attr.size, 300_005);
    fs.flush(file.nodeid, handle).unwrap();
    fs.fsync(file.nodeid, handle, false).unwrap();
    fs.release(file.nodeid, handle).unwrap();
    let on_host = std::fs::read(server.share().join("dir/file")).unwrap();
    assert_eq!(on_host[..5], [0; 5]);
    assert_eq!(on_host[5..], data);

    let open = fs.opendir(dir.nodeid).unwrap();
    let names: Vec<_> = fs
        .readdirplus_all(dir.nodeid, open)
        .unwrap()
        .into_iter()
        .map(|found| found.entry.name.to_string_lossy().into_owned())
        .collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names.contains(&"file".to_owned()));
    fs.releasedir(dir.nodeid, open).unwrap();

    fs.unlink(dir.nodeid, c"file").unwrap();
    fs.rmdir(ROOT, c"dir").unwrap();
    assert!(!server.share().join("dir").exists());
    fs.forget(dir.nodeid, 1).unwrap();

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
