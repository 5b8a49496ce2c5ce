//! Memory that is taken away after it was shared.

use std::os::fd::AsFd;

use testing::each_runtime;
use vmm::connection::message::{Log, feature};
use vmm::fuse::ROOT;
use vmm::fuse::wire::opcode;
use vmm::{Options, Profile};

use super::scene::{END, Scene, memory, readable, then, writable};

/// What is put on the ring before the high region is truncated, or after.
#[derive(Clone, Copy, Debug)]
enum What {
    /// The request lies where memory is gone.
    Request,
    /// So does the room for the reply.
    Reply,
    /// So does an indirect table.
    Table,
    /// So do the rings themselves.
    Rings,
}

#[each_runtime]
fn truncated_memory_file_ends_session(runtime: &str) {
    let mut scene = Scene::new(runtime);
    for what in [What::Request, What::Reply, What::Table, What::Rings] {
        take_away(&mut scene, what);
        let line = scene.server.wait_for("the session is ended: ");
        assert!(
            line.contains("the guest's memory at 0x"),
            "{what:?}: {line}"
        );
        assert!(line.contains("is gone"), "{what:?}: {line}");
        drop(scene.fs);
        scene.server.wait_until_it_listens();
        scene = Scene::on(scene.server, &memory());
        scene.is_well(&format!("{what:?}"));
    }
    data_that_is_gone_is_an_errno(&mut scene);
}

fn take_away(scene: &mut Scene, what: What) {
    let memory = scene.memory();
    let high = &memory.regions()[2];
    let low = memory.alloc_in(0, 4096, 4096).unwrap();
    let request = super::scene::request(opcode::GETATTR, ROOT, &[0; 16]);
    let len = request.len() as u32;
    memory.write(low, &request).unwrap();
    let gone = vmm::Gpa(END - 4096);
    let chain = match what {
        What::Request => vec![
            then(readable(gone, len), 1),
            writable(low.offset(1024), 200),
        ],
        What::Reply => vec![then(readable(low, len), 1), writable(gone, 200)],
        What::Table => vec![vmm::ring::Descriptor {
            flags: super::scene::INDIRECT,
            ..readable(gone, 32)
        }],
        What::Rings => vec![then(readable(low, len), 1), writable(low.offset(1024), 200)],
    };
    scene.write(&chain);
    let head = scene.own[0];
    if matches!(what, What::Rings) {
        // From now on nothing here may touch the first region either.
        let kick = scene.queue().kick_event().clone();
        scene.queue().push_head(head);
        rustix::fs::ftruncate(memory.regions()[0].fd(), 0).unwrap();
        kick.signal().unwrap();
        return;
    }
    rustix::fs::ftruncate(high.fd(), high.len() - 4096).unwrap();
    scene.queue().push_head(head);
    scene.queue().kick_always().unwrap();
}

/// What the kernel itself finds gone, as it reads a file into it, is an errno and no more.
fn data_that_is_gone_is_an_errno(scene: &mut Scene) {
    let (file, handle) = scene.fs.create(ROOT, c"data", 0o644).unwrap();
    scene.fs.write(file.nodeid, handle, 0, &[7; 4096]).unwrap();
    let memory = scene.memory();
    let high = &memory.regions()[2];
    rustix::fs::ftruncate(high.fd(), high.len() - (8 << 20)).unwrap();
    let low = memory.alloc_in(1, 8192, 4096).unwrap();
    let read = vmm::fuse::wire::ReadIn {
        fh: handle.fh,
        size: 4096,
        ..vmm::fuse::wire::ReadIn::default()
    };
    let bytes = super::scene::request(
        opcode::READ,
        file.nodeid,
        zerocopy::IntoBytes::as_bytes(&read),
    );
    memory.write(low, &bytes).unwrap();
    scene.reply = low.offset(4096);
    let chain = [
        then(readable(low, bytes.len() as u32), 1),
        then(writable(scene.reply, 16), 2),
        writable(vmm::Gpa(END - 4096), 4096),
    ];
    let back = scene.chain(&chain);
    assert_eq!(back, super::scene::Back::Errno(libc::EFAULT));
    // What is still there is served.
    let again = scene.fs.guest().connection.get_features();
    assert!(again.is_ok());
}

#[each_runtime]
fn truncated_dirty_log_ends_session(runtime: &str) {
    let mut server = testing::Server::start(&["--runtime", runtime]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    let len = (5_u64 << 30) / 4096 / 8;
    let log = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&log, len).unwrap();
    let session = fs.guest();
    let features = session.features | feature::LOG_ALL;
    let connection = &mut session.connection;
    connection
        .set_log_base(
            Log {
                size: len,
                offset: 0,
            },
            log.as_fd(),
        )
        .unwrap();
    connection.set_features(features).unwrap();
    fs.getattr(ROOT).unwrap();
    rustix::fs::ftruncate(&log, 0).unwrap();
    let _answered_or_not = fs.submit(vmm::fuse::Call::new(opcode::STATFS, ROOT).reply(80));
    let line = server.wait_for("the session is ended: ");
    assert!(line.contains("the dirty log is gone"), "{line}");
    server.wait_until_it_listens();
    let mut fs = server.session(Profile::Simple, &Options::default());
    fs.getattr(ROOT).unwrap();
}

#[each_runtime]
fn truncated_inflight_region_ends_session(runtime: &str) {
    let mut server = testing::Server::start(&["--runtime", runtime]);
    let mut fs = server.session(Profile::CloudHypervisor, &Options::default());
    let session = fs.guest();
    let (layout, _) = session.inflight().unwrap();
    // Not the server's own file, which can't be truncated.
    let file = rustix::fs::memfd_create("in flight", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, layout.mmap_size).unwrap();
    session
        .connection
        .set_inflight_fd(layout, file.as_fd())
        .unwrap();
    fs.getattr(ROOT).unwrap();
    rustix::fs::ftruncate(&file, 0).unwrap();
    let _answered_or_not = fs.submit(vmm::fuse::Call::new(opcode::STATFS, ROOT).reply(80));
    let line = server.wait_for("the session is ended: ");
    assert!(line.contains("in-flight region is gone"), "{line}");
    server.wait_until_it_listens();
    let mut fs = server.session(Profile::Simple, &Options::default());
    fs.getattr(ROOT).unwrap();
}
