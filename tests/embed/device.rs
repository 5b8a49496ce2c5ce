//! The life of a device: activation, reset, several in one process, what is left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ringfsd::embed::{Call, Choice, DeviceError, Kick, LimitSettings, Memory, VirtioFs};
use ringfsd::metrics::SessionState;
use vmm::fuse::{Client, ROOT};

use crate::guest::{Driver, device, engines, mounted, options, passthrough, setup};
use crate::work::work;

#[test]
fn guest_works_on_a_device_in_its_process() {
    for engine in engines() {
        let share = tempfile::tempdir().unwrap();
        let mut device = device(share.path(), engine);
        let driver = Driver::new();
        driver.activate(&mut device);
        let mut client = Client::new(driver);
        client.init().unwrap();
        work(&mut client, share.path());
        assert!(device.has_session());
    }
}

#[test]
fn guest_is_counted_and_limited_while_it_works() {
    let share = tempfile::tempdir().unwrap();
    let mut device = device(share.path(), Choice::Tokio);
    let (metrics, limits) = (Arc::clone(device.metrics()), Arc::clone(device.limits()));
    assert_eq!(metrics.snapshot().session, SessionState::Waiting);
    metrics.set_timed(true);
    let driver = Driver::new();
    driver.activate(&mut device);
    assert_eq!(metrics.snapshot().session, SessionState::Connected);
    let mut client = Client::new(driver);
    client.init().unwrap();
    let (file, handle) = client.create(ROOT, c"file", 0o644).unwrap();
    client.write(file.nodeid, handle, 0, b"0123456789").unwrap();
    // The first READ passes, and the next one would wait for seconds.
    limits.set(LimitSettings {
        bytes_read: Some("1".parse().unwrap()),
        ..LimitSettings::default()
    });
    assert_eq!(client.read(file.nodeid, handle, 0, 100).unwrap().len(), 10);
    let held = client.submit_read(file.nodeid, handle, 0, 100).unwrap();
    for _ in 0..100 {
        client.getattr(ROOT).unwrap();
    }
    let snapshot = metrics.snapshot();
    assert_eq!(snapshot.operation("read").unwrap().requests, 1);
    limits.set(LimitSettings::default());
    assert_eq!(client.collect(held).unwrap().bytes, b"0123456789");
    drop(client);
    device.reset();

    // All threads have told what they did.
    let snapshot = metrics.snapshot();
    let read = snapshot.operation("read").unwrap();
    assert_eq!((read.requests, read.latency.count()), (2, 2));
    assert_eq!((snapshot.bytes_read, snapshot.bytes_written), (20, 10));
    assert_eq!((&*snapshot.share, snapshot.workers), ("shared", 2));
    assert_eq!(snapshot.session, SessionState::Waiting);
    assert!(snapshot.usage.max_inodes.is_some());
    let text = snapshot.to_open_metrics();
    let sample = "ringfsd_requests_total{share=\"shared\",operation=\"read\"} 2\n";
    assert!(text.contains(sample), "{text}");
    // The counters keep neither the device nor its file system.
    drop(device);
    assert_eq!(metrics.snapshot().usage.max_inodes, None);
    assert_eq!(metrics.snapshot().requests(), snapshot.requests());
}

#[test]
fn devices_of_one_process_are_independent() {
    let shares = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let mut guests: Vec<_> = shares.iter().map(|share| mounted(share.path())).collect();
    std::thread::scope(|scope| {
        for ((_, client), share) in guests.iter_mut().zip(&shares) {
            scope.spawn(|| work(client, share.path()));
        }
    });
    guests[0].0.reset();
    let (_, client) = &mut guests[1];
    client.lookup(ROOT, c"from the host").unwrap();
    drop(guests.remove(0));
    let (_, client) = &mut guests[1];
    client.lookup(ROOT, c"from the host").unwrap();
}

#[test]
fn configuration_space_has_tag_and_queue_count() {
    let share = tempfile::tempdir().unwrap();
    let device = device(share.path(), Choice::Tokio);
    assert_eq!(device.queues(), 3);
    let mut space = [0xff; 50];
    device.read_config(0, &mut space);
    assert_eq!(&space[..7], b"shared\0");
    assert_eq!(space[36..40], 2_u32.to_le_bytes());
    assert_eq!(space[44..], [0; 6], "beyond its end");
    let mut count = [0; 4];
    device.read_config(36, &mut count);
    assert_eq!(u32::from_le_bytes(count), 2);
    device.read_config(usize::MAX, &mut count);
    assert_eq!(count, [0; 4]);
}

#[test]
fn reset_discards_the_session_and_activation_begins_another() {
    let share = tempfile::tempdir().unwrap();
    let fs = passthrough(share.path());
    let mut device = VirtioFs::new(Arc::clone(&fs) as _, options(Choice::Auto)).unwrap();
    for _ in 0..2 {
        let driver = Driver::new();
        driver.activate(&mut device);
        let mut client = Client::new(driver);
        client.init().unwrap();
        client.create(ROOT, c"file", 0o644).unwrap();
        assert_eq!((fs.open_handles(), device.is_active()), (1, true));
        device.reset();
        assert_eq!((fs.open_handles(), device.is_active()), (0, false));
        assert!(!device.has_session());
    }
    drop(device);
    assert_eq!(Arc::strong_count(&fs), 1, "nothing uses it any more");
}

#[test]
fn kicks_and_calls_need_no_eventfd_of_the_vmm() {
    let share = tempfile::tempdir().unwrap();
    let mut device = device(share.path(), Choice::Auto);
    let driver = Driver::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let mut setups = driver.setups();
    let kick = Kick::new().unwrap();
    let (_, request) = &mut setups[1];
    request.kick = kick.clone();
    // The interrupt: it wakes the driver, as an eventfd would.
    let (counted, interrupt) = (
        Arc::clone(&calls),
        Arc::clone(driver.queues[1].call_event()),
    );
    request.call = Call::function(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        interrupt.signal().unwrap();
    });
    let memory = Memory::of(driver.mapped::<()>()).unwrap();
    device.activate(memory, device.features(), setups).unwrap();
    // The doorbell: what the guest writes comes to the VMM, which kicks.
    let doorbell = Arc::clone(driver.queues[1].kick_event());
    std::thread::spawn(move || {
        while doorbell.wait(testing::TIMEOUT).unwrap() {
            doorbell.take().unwrap();
            kick.notify();
        }
    });
    let mut client = Client::new(driver);
    client.init().unwrap();
    work(&mut client, share.path());
    assert_ne!(calls.load(Ordering::Relaxed), 0);
}

#[test]
fn what_a_device_does_not_have_is_refused() {
    let share = tempfile::tempdir().unwrap();
    let mut device = device(share.path(), Choice::Tokio);
    let driver = Driver::new();
    let memory = || Memory::of(driver.mapped::<()>()).unwrap();
    let good = || setup(&driver.queues[0]);

    let error = device.start_queue(0, good()).unwrap_err();
    assert!(matches!(error, DeviceError::Inactive), "{error}");
    let packed = 1 << 34;
    let error = device.activate(memory(), packed, []).unwrap_err();
    assert!(matches!(error, DeviceError::Features { extra, .. } if extra == packed));
    let error = device.activate(memory(), 0, [(3, good())]).unwrap_err();
    let expected = matches!(
        error,
        DeviceError::NoSuchQueue {
            index: 3,
            queues: 3
        }
    );
    assert!(expected, "{error}");
    let mut outside = good();
    outside.ring.used = 1 << 40;
    let error = device.activate(memory(), 0, [(1, outside)]).unwrap_err();
    let expected = matches!(
        error,
        DeviceError::NotInMemory {
            part: "used ring",
            ..
        }
    );
    assert!(expected, "{error}");
    let mut odd = good();
    odd.ring.size = 48;
    let error = device.activate(memory(), 0, [(1, odd)]).unwrap_err();
    assert!(matches!(error, DeviceError::Queue(_)), "{error}");
    assert!(!device.is_active(), "a failed activation leaves nothing");

    driver.activate(&mut device);
    let error = device.activate(memory(), 0, []).unwrap_err();
    assert!(matches!(error, DeviceError::Active), "{error}");
    let error = device.start_queue(0, good()).unwrap_err();
    assert!(matches!(error, DeviceError::Runs(0)), "{error}");
    assert!(matches!(device.save(), Err(DeviceError::QueuesRun)));
    assert!(matches!(device.load(&[]), Err(DeviceError::QueuesRun)));
    device.pause();
    assert!(matches!(
        device.load(b"no session"),
        Err(DeviceError::Load(_))
    ));
}

#[test]
fn device_leaves_signals_and_working_directory_of_the_process() {
    let before = process_settings();
    let share = tempfile::tempdir().unwrap();
    let (device, mut client) = mounted(share.path());
    work(&mut client, share.path());
    assert_eq!(process_settings(), before);
    drop(device);
    assert_eq!(process_settings(), before);
}

/// What all threads of the process share: the action of each signal, working directory, umask, and
/// the main thread's credentials.
fn process_settings() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kept = ["SigIgn", "SigCgt", "Umask", "Uid", "Gid", "CapEff"];
    let lines = status
        .lines()
        .filter(|line| kept.iter().any(|name| line.starts_with(name)));
    let mut settings: Vec<_> = lines.map(str::to_owned).collect();
    let directory = std::env::current_dir().unwrap();
    settings.push(directory.display().to_string());
    settings.push(format!("{:#x}", sigbus_handler()));
    settings
}

#[allow(unsafe_code, reason = "a signal's action can't be read otherwise")]
fn sigbus_handler() -> usize {
    // SAFETY: all-zero bytes are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asks for the action only, and `action` is valid for the call.
    let result = unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut action) };
    assert_eq!(result, 0);
    action.sa_sigaction
}
