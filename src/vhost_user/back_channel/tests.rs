use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;

use rustix::net::RecvFlags;
use vhost::vhost_user::message::{BackendReq, VhostUserMMap, VhostUserProtocolFeatures as Feature};

use super::*;
use crate::device::SharedMapping;
use crate::sys::rights;

const CONFIG_CHANGED: u32 = BackendReq::CONFIG_CHANGE_MSG as u32;
const SHMEM_MAP: u32 = BackendReq::SHMEM_MAP as u32;

/// A channel that is open, and the VMM's end.
fn channel(timeout: Duration) -> (Arc<VmmChannel>, UnixStream) {
    let (vmm, ours) = UnixStream::pair().unwrap();
    vmm.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let channel = VmmChannel {
        timeout,
        ..VmmChannel::new(false).unwrap()
    };
    let features = Feature::REPLY_ACK | Feature::CONFIG | Feature::SHMEM;
    channel.set_protocol_features(features.bits());
    channel.connect(Some(Arc::new(Link::new(ours.into()).unwrap())));
    (Arc::new(channel), vmm)
}

fn patient() -> (Arc<VmmChannel>, UnixStream) {
    channel(Duration::from_secs(20))
}

fn impatient() -> (Arc<VmmChannel>, UnixStream) {
    channel(Duration::from_millis(10))
}

/// Sends a request on a thread of its own.
fn ask(channel: &Arc<VmmChannel>) -> thread::JoinHandle<Result<(), BackChannelError>> {
    let channel = Arc::clone(channel);
    thread::spawn(move || channel.request(BackendRequest::ConfigChanged, None))
}

fn read_header(vmm: &mut UnixStream) -> Header {
    let mut bytes = [0; Header::LEN];
    vmm.read_exact(&mut bytes).unwrap();
    Header::read(&bytes).unwrap()
}

fn answer(request: u32, value: u64) -> Vec<u8> {
    let header = Header::reply(request, 8);
    [&header.bytes()[..], &value.to_ne_bytes()].concat()
}

fn mapping() -> SharedMapping {
    SharedMapping {
        region: 3,
        offset: 0x1000,
        len: 0x2000,
        file_offset: 0x3000,
        writable: true,
    }
}

/// The channel as a process finds it that continues.
fn resumed(channel: &VmmChannel, timeout: Duration) -> Arc<VmmChannel> {
    let link = channel.link().unwrap();
    let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    let counters = duplicate(link.counters.file().unwrap().as_fd());
    let link = Link::resume(duplicate(link.socket.as_fd()), counters).unwrap();
    let next = VmmChannel {
        timeout,
        ..VmmChannel::new(false).unwrap()
    };
    next.set_protocol_features(channel.lock().protocol);
    next.connect(Some(Arc::new(link)));
    Arc::new(next)
}

#[test]
fn request_is_answered() {
    let (channel, mut vmm) = patient();
    for value in [0, 7] {
        let asked = ask(&channel);
        let header = read_header(&mut vmm);
        assert_eq!((header.request, header.size), (CONFIG_CHANGED, 0));
        assert!(header.needs_reply() && header.has_version());
        vmm.write_all(&answer(CONFIG_CHANGED, value)).unwrap();
        match (asked.join().unwrap(), value) {
            (Ok(()), 0) | (Err(BackChannelError::Refused(7)), 7) => {}
            (result, _) => panic!("{value}: {result:?}"),
        }
    }
}

#[test]
fn mapping_is_sent_with_its_descriptor() {
    let (channel, mut vmm) = patient();
    let file = File::open("/dev/null").unwrap();
    thread::scope(|scope| {
        let request = BackendRequest::MapSharedMemory(mapping());
        let (channel, fd) = (&channel, file.as_fd());
        let asked = scope.spawn(move || channel.request(request, Some(fd)));
        let mut bytes = [0; Header::LEN + size_of::<VhostUserMMap>()];
        let received = rights::receive(&vmm, &mut bytes, RecvFlags::WAITALL).unwrap();
        assert_eq!((received.len, received.fds.len()), (bytes.len(), 1));
        assert_eq!(Header::read(&bytes).unwrap().request, SHMEM_MAP);
        let numbers: Vec<_> = bytes[Header::LEN..]
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(*word.first_chunk().unwrap()))
            .collect();
        assert_eq!(numbers, [3, 0x3000, 0x1000, 0x2000, 1]);
        vmm.write_all(&answer(SHMEM_MAP, 0)).unwrap();
        asked.join().unwrap().unwrap();
    });
}

/// The features of a VMM from before SHMEM.
const OLD: Feature = Feature::REPLY_ACK
    .union(Feature::CONFIG)
    .union(Feature::BACKEND_SEND_FD);

#[test]
fn vmm_without_shmem_is_asked_by_fs_map_if_that_is_wanted() {
    let (channel, mut vmm) = patient();
    let channel = VmmChannel {
        fs_map: true,
        ..Arc::try_unwrap(channel).unwrap()
    };
    let file = File::open("/dev/null").unwrap();
    let mapping = SharedMapping {
        region: 0,
        ..mapping()
    };
    // Where SHMEM was accepted, the option changes nothing.
    for (features, number) in [(Feature::REPLY_ACK | Feature::SHMEM, SHMEM_MAP), (OLD, 6)] {
        channel.set_protocol_features(features.bits());
        thread::scope(|scope| {
            let map = BackendRequest::MapSharedMemory(mapping);
            let (channel, fd) = (&channel, file.as_fd());
            let asked = scope.spawn(move || channel.request(map, Some(fd)));
            let header = read_header(&mut vmm);
            assert_eq!(header.request, number);
            let mut body = vec![0; usize::try_from(header.size).unwrap()];
            vmm.read_exact(&mut body).unwrap();
            vmm.write_all(&answer(number, 0)).unwrap();
            asked.join().unwrap().unwrap();
        });
    }
    for (writable, flags) in [(true, 3_u64), (false, 1)] {
        thread::scope(|scope| {
            let unmap = BackendRequest::UnmapSharedMemory(SharedMapping {
                writable,
                ..mapping
            });
            let channel = &channel;
            let asked = scope.spawn(move || channel.request(unmap, None));
            let header = read_header(&mut vmm);
            assert_eq!((header.request, header.size), (7, 4 * 64));
            let mut body = [0; 4 * 64];
            vmm.read_exact(&mut body).unwrap();
            // The first of eight is used, and the others are none.
            let first_of = [0x3000, 0x1000, 0x2000, flags];
            let expected = first_of.map(|value| {
                let mut words = [0; 8];
                words[0] = value;
                words.map(u64::to_ne_bytes).concat()
            });
            assert_eq!(body[..], expected.concat());
            vmm.write_all(&answer(7, 0)).unwrap();
            asked.join().unwrap().unwrap();
        });
    }
}

#[test]
fn fs_map_needs_its_features_and_the_first_region() {
    let (channel, vmm) = patient();
    let file = File::open("/dev/null").unwrap();
    let ask = |channel: &VmmChannel, region| {
        let mapping = SharedMapping {
            region,
            ..mapping()
        };
        channel.request(BackendRequest::MapSharedMemory(mapping), Some(file.as_fd()))
    };
    channel.set_protocol_features(OLD.bits());
    let unwanted = ask(&channel, 0);
    assert!(matches!(
        unwanted,
        Err(BackChannelError::NotNegotiated("SHMEM"))
    ));
    let channel = VmmChannel {
        fs_map: true,
        ..Arc::try_unwrap(channel).unwrap()
    };
    let region = ask(&channel, 1);
    assert!(matches!(region, Err(BackChannelError::Invalid(_))));
    for (features, missing) in [
        (Feature::REPLY_ACK, "BACKEND_SEND_FD"),
        (Feature::BACKEND_SEND_FD, "REPLY_ACK"),
    ] {
        channel.set_protocol_features(features.bits());
        match ask(&channel, 0) {
            Err(BackChannelError::NotNegotiated(name)) => assert_eq!(name, missing),
            result => panic!("{missing}: {result:?}"),
        }
    }
    drop(channel);
    let mut rest = Vec::new();
    (&vmm).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"", "nothing was sent");
}

#[test]
fn requests_that_cannot_be_sent_are_refused() {
    let (channel, vmm) = patient();
    let fd = File::open("/dev/null").unwrap();
    let ask = |request, fd: Option<&File>| channel.request(request, fd.map(AsFd::as_fd));
    let map = BackendRequest::MapSharedMemory;
    let with_fd = ask(BackendRequest::ConfigChanged, Some(&fd));
    assert!(matches!(with_fd, Err(BackChannelError::Invalid(_))));
    let without_fd = ask(map(mapping()), None);
    assert!(matches!(without_fd, Err(BackChannelError::Invalid(_))));
    let overflow = SharedMapping {
        offset: u64::MAX,
        ..mapping()
    };
    let overflow = ask(map(overflow), Some(&fd));
    assert!(matches!(overflow, Err(BackChannelError::Invalid(_))));
    channel.set_protocol_features(Feature::REPLY_ACK.bits());
    let no_shmem = ask(map(mapping()), Some(&fd));
    assert!(matches!(
        no_shmem,
        Err(BackChannelError::NotNegotiated("SHMEM"))
    ));
    channel.set_protocol_features(Feature::CONFIG.bits());
    let no_ack = ask(BackendRequest::ConfigChanged, None);
    assert!(matches!(
        no_ack,
        Err(BackChannelError::NotNegotiated("REPLY_ACK"))
    ));
    channel.connect(None);
    let not_connected = ask(BackendRequest::ConfigChanged, None);
    assert!(matches!(not_connected, Err(BackChannelError::NotConnected)));
    let mut rest = Vec::new();
    (&vmm).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"", "nothing was sent");
    assert!(Link::new(fd.into()).is_err(), "no socket");
}

#[test]
fn late_answer_is_not_taken_for_the_next() {
    let (channel, mut vmm) = impatient();
    let ask = || channel.request(BackendRequest::ConfigChanged, None);
    assert!(matches!(ask(), Err(BackChannelError::TimedOut)));
    // The next one isn't sent before the answer to the first has come.
    assert!(matches!(ask(), Err(BackChannelError::TimedOut)));
    read_header(&mut vmm);
    vmm.set_nonblocking(true).unwrap();
    assert!(vmm.read(&mut [0]).is_err());
    vmm.set_nonblocking(false).unwrap();
    vmm.write_all(&answer(CONFIG_CHANGED, 5)).unwrap();
    let next = resumed(&channel, Duration::from_secs(20));
    let asked = self::ask(&next);
    read_header(&mut vmm);
    vmm.write_all(&answer(CONFIG_CHANGED, 6)).unwrap();
    let result = asked.join().unwrap();
    assert!(matches!(result, Err(BackChannelError::Refused(6))));
}

#[test]
fn what_is_no_answer_makes_the_channel_unusable() {
    let header = |request, flags, size| Header {
        request,
        flags,
        size,
    };
    let with = |header: Header| [&header.bytes()[..], &[0; 8]].concat();
    for (what, bytes) in [
        ("another request's", answer(SHMEM_MAP, 0)),
        ("no reply", with(header(CONFIG_CHANGED, 1, 8))),
        ("another version", with(header(CONFIG_CHANGED, 6, 8))),
        ("another size", with(header(CONFIG_CHANGED, 5, 16))),
        ("a huge size", with(header(CONFIG_CHANGED, 5, u32::MAX))),
        ("zeros", vec![0; ANSWER]),
    ] {
        let (channel, mut vmm) = patient();
        let asked = ask(&channel);
        read_header(&mut vmm);
        vmm.write_all(&bytes).unwrap();
        let result = asked.join().unwrap();
        assert!(
            matches!(result, Err(BackChannelError::Malformed(_))),
            "{what}: {result:?}"
        );
        // For the next process, too.
        for channel in [resumed(&channel, TIMEOUT), channel] {
            let next = channel.request(BackendRequest::ConfigChanged, None);
            assert!(matches!(next, Err(BackChannelError::Closed)), "{what}");
        }
    }
}

#[test]
fn what_comes_unasked_answers_nothing() {
    for bytes in [&answer(CONFIG_CHANGED, 0)[..], &[0]] {
        let (channel, mut vmm) = patient();
        vmm.write_all(bytes).unwrap();
        let result = channel.request(BackendRequest::ConfigChanged, None);
        assert!(matches!(result, Err(BackChannelError::Malformed(_))));
    }
}

#[test]
fn request_on_closed_channel_fails() {
    let (channel, mut vmm) = patient();
    let asked = ask(&channel);
    read_header(&mut vmm);
    drop(vmm);
    let result = asked.join().unwrap();
    assert!(matches!(result, Err(BackChannelError::Closed)));
    let next = channel.request(BackendRequest::ConfigChanged, None);
    assert!(matches!(next, Err(BackChannelError::Closed)));
}

#[test]
fn full_socket_delays_no_longer_than_the_time_limit() {
    let (channel, _vmm) = impatient();
    let link = channel.link().unwrap();
    link.socket.set_nonblocking(true).unwrap();
    while (&link.socket).write(&[0; 4096]).is_ok() {}
    link.socket.set_nonblocking(false).unwrap();
    let result = channel.request(BackendRequest::ConfigChanged, None);
    assert!(matches!(result, Err(BackChannelError::TimedOut)));
    assert_eq!(link.counters.due(), 0, "nothing was sent");
}

#[test]
fn requests_of_several_threads_are_sent_one_after_the_other() {
    let (channel, mut vmm) = patient();
    let (done, results) = mpsc::channel();
    for _ in 0..3 {
        let (channel, done) = (Arc::clone(&channel), done.clone());
        thread::spawn(move || done.send(channel.request(BackendRequest::ConfigChanged, None)));
    }
    for _ in 0..3 {
        read_header(&mut vmm);
        vmm.set_nonblocking(true).unwrap();
        assert!(vmm.read(&mut [0]).is_err(), "another is outstanding");
        vmm.set_nonblocking(false).unwrap();
        vmm.write_all(&answer(CONFIG_CHANGED, 0)).unwrap();
        results.recv().unwrap().unwrap();
    }
}

#[test]
fn limit_ends_what_waits_and_close_does_not_wait_for_it() {
    let (channel, mut vmm) = patient();
    let (one, other) = (ask(&channel), ask(&channel));
    read_header(&mut vmm);
    // As if a queue were stopped: its requests are waited for.
    let limit = channel.limit_waits();
    for asked in [one, other] {
        let result = asked.join().unwrap();
        assert!(matches!(result, Err(BackChannelError::Interrupted)));
    }
    drop(limit);
    vmm.write_all(&answer(CONFIG_CHANGED, 1)).unwrap();
    let asked = ask(&channel);
    read_header(&mut vmm);
    channel.connect(None);
    assert!(asked.join().unwrap().is_err());
}

#[test]
fn answer_within_a_limit_is_delivered() {
    let (channel, mut vmm) = patient();
    let _limit = channel.limit_waits();
    vmm.write_all(&[]).unwrap();
    let asked = ask(&channel);
    read_header(&mut vmm);
    vmm.write_all(&answer(CONFIG_CHANGED, 0)).unwrap();
    // The machine may be slow.
    match asked.join().unwrap() {
        Ok(()) | Err(BackChannelError::Interrupted) => {}
        result => panic!("{result:?}"),
    }
}
