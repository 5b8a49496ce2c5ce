//! Pauses and snapshots: where queues stop, and how they continue, here and on another device.

use ringfsd::embed::{Choice, DeviceError, Kick, Memory, RingState};
use virtio_queue::{Queue, QueueT};
use vmm::fuse::wire::opcode;
use vmm::fuse::{Call, Client, ROOT};
use vmm_sys_util::eventfd::EventFd;

use crate::guest::{device, mounted};
use crate::work::work;

#[test]
fn requests_of_a_paused_device_are_served_when_it_resumes() {
    let share = tempfile::tempdir().unwrap();
    let (mut device, mut client) = mounted(share.path());
    work(&mut client, share.path());
    let before = device.pause();
    assert_eq!(before.len(), 3);
    assert!(
        before
            .iter()
            .all(|(_, ring)| ring.next_available == ring.next_used)
    );
    assert!(before[1].1.next_used > 0);
    assert!(device.pause().is_empty(), "no queue runs any more");
    let request = Call::new(opcode::GETATTR, ROOT).arg(&[0; 16]).reply(104);
    let pending = client.submit(request).unwrap();
    assert!(client.returned().unwrap().is_empty());
    device.resume().unwrap();
    client.collect(pending).unwrap();
    let after = device.pause();
    let moved = after[1].1.next_used.wrapping_sub(before[1].1.next_used);
    assert_eq!(moved, 1, "one request since");
}

#[test]
fn session_continues_on_another_device_from_the_snapshot_of_a_vmm() {
    let share = tempfile::tempdir().unwrap();
    let (mut from, mut client) = mounted(share.path());
    let (file, handle) = client.create(ROOT, c"file", 0o644).unwrap();
    client.write(file.nodeid, handle, 0, b"before").unwrap();

    // The VMM's snapshot has queues of its own type.
    let paused = from.pause();
    let queues: Vec<_> = paused
        .iter()
        .map(|(index, _)| Queue::try_from(from.queue_state(*index, 256).unwrap()).unwrap())
        .collect();
    let session = from.save().unwrap();
    from.release_for_migration();
    drop(from);

    let mut to = device(share.path(), Choice::Auto);
    to.load(&session).unwrap();
    assert!(to.has_session() && !to.is_active());
    let memory = Memory::of(client.guest().mapped::<()>()).unwrap();
    let mut setups = client.guest().setups();
    for ((_, setup), queue) in setups.iter_mut().zip(&queues) {
        assert_eq!(
            (queue.size(), queue.max_size(), queue.ready()),
            (64, 256, true)
        );
        setup.ring = RingState::from(&queue.state());
    }
    to.activate(memory, to.features(), setups).unwrap();
    let mut client = Client::new(client.into_guest());
    assert_eq!(client.read(file.nodeid, handle, 0, 10).unwrap(), b"before");
    client.write(file.nodeid, handle, 6, b" and after").unwrap();
    let content = std::fs::read(share.path().join("file")).unwrap();
    assert_eq!(content, b"before and after");
}

#[test]
fn ring_at_another_position_than_its_state_is_refused() {
    let share = tempfile::tempdir().unwrap();
    let (mut device, mut client) = mounted(share.path());
    let paused = device.pause();
    device.reset();
    let mut setups = client.guest().setups();
    let memory = Memory::of(client.guest().mapped::<()>()).unwrap();
    let (_, ring) = paused[1];
    assert_eq!(ring.next_used, 1, "INIT");
    let error = device.activate(memory.clone(), device.features(), setups.clone());
    let refused = matches!(
        error,
        Err(DeviceError::Position {
            index: 1,
            wanted: 0,
            found: 1
        })
    );
    assert!(refused, "{error:?}");
    setups[1].1.ring = ring;
    device.activate(memory, device.features(), setups).unwrap();
    client.init().unwrap();
}

#[test]
fn eventfds_of_the_vmm_kick_and_are_called() {
    let share = tempfile::tempdir().unwrap();
    let mut device = device(share.path(), Choice::Auto);
    let driver = crate::guest::Driver::new();
    let mut setups = driver.setups();
    let ioeventfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    setups[1].1.kick = Kick::try_from(&ioeventfd).unwrap();
    setups[1].1.call = ringfsd::embed::Call::by_eventfd(&irqfd).unwrap();
    let memory = Memory::of(driver.mapped::<()>()).unwrap();
    device.activate(memory, device.features(), setups).unwrap();
    let mut client = Client::new(driver);
    let init = Call::new(opcode::INIT, 0).arg(&[7, 0, 0, 0, 38, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let pending = client.submit(init.reply(64)).unwrap();
    ioeventfd.write(1).unwrap();
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(
        borrow(&irqfd),
        rustix::event::PollFlags::IN,
    )];
    let timeout = rustix::event::Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap(), 1);
    assert_eq!(client.returned().unwrap().len(), 1);
    client.collect(pending).unwrap();
    assert!(device.has_session());
}

#[allow(
    unsafe_code,
    reason = "the eventfd of vmm-sys-util lends no descriptor"
)]
fn borrow(eventfd: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open as long as `eventfd`, which stays borrowed.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}
