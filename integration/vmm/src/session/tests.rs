use std::thread::JoinHandle;

use zerocopy::IntoBytes;

use super::*;
use crate::connection::message::request as r;
use crate::connection::message::{
    ConfigHeader, InflightLayout, VringState, backend_request, flag, request,
};
use crate::memory::Memory;

/// A message as the back end saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    request: u32,
    acknowledged: bool,
    /// The body's first eight bytes.
    word: u64,
    fds: usize,
}

/// A back end without a device: it offers these protocol features, answers each message and
/// returns what it has seen once the front end is gone.
fn back_end(stream: UnixStream, offers: u64) -> JoinHandle<Vec<Seen>> {
    std::thread::spawn(move || {
        let mut connection = Connection::new(stream).unwrap();
        let mut seen = Vec::new();
        let mut reply_ack = false;
        while let Ok(message) = connection.recv() {
            let number = message.header.request;
            let acknowledged = message.header.flags & flag::NEED_REPLY != 0;
            let word = message.value::<u64>().unwrap_or(0);
            seen.push(Seen {
                request: number,
                acknowledged,
                word,
                fds: message.fds.len(),
            });
            let features = feature::VERSION_1
                | feature::EVENT_IDX
                | feature::INDIRECT_DESC
                | feature::PROTOCOL_FEATURES
                | feature::LOG_ALL
                | feature::IN_ORDER;
            match number {
                request::GET_FEATURES => connection.reply(number, features.as_bytes()).unwrap(),
                request::GET_PROTOCOL_FEATURES => {
                    connection.reply(number, offers.as_bytes()).unwrap();
                }
                request::GET_QUEUE_NUM => connection.reply(number, 3_u64.as_bytes()).unwrap(),
                request::GET_MAX_MEM_SLOTS => connection.reply(number, 32_u64.as_bytes()).unwrap(),
                request::GET_VRING_BASE => {
                    let state = message.value::<VringState>().unwrap();
                    let state = VringState { num: 7, ..state };
                    connection.reply(number, state.as_bytes()).unwrap();
                }
                request::GET_CONFIG => {
                    let header = message.value::<ConfigHeader>().unwrap();
                    let config = FsConfig {
                        tag: [b'x'; 36],
                        num_request_queues: 2,
                    };
                    let from = header.offset as usize;
                    let bytes = &config.as_bytes()[from..from + header.size as usize];
                    let body = [header.as_bytes(), bytes].concat();
                    connection.reply(number, &body).unwrap();
                }
                request::GET_INFLIGHT_FD => {
                    let layout = message.value::<InflightLayout>().unwrap();
                    let file = Memory::new(&[crate::Region::new(0, 4096)]).unwrap();
                    let flags = flag::VERSION | flag::REPLY;
                    let fds = [file.regions()[0].fd()];
                    connection
                        .send(number, flags, layout.as_bytes(), &fds)
                        .unwrap();
                }
                request::GET_SHMEM_CONFIG => {
                    let sizes = [1_u64, 1 << 30];
                    connection.reply(number, sizes.as_bytes()).unwrap();
                }
                request::SET_PROTOCOL_FEATURES => reply_ack = word & protocol::REPLY_ACK != 0,
                _ if acknowledged && reply_ack => {
                    connection.reply(number, 0_u64.as_bytes()).unwrap();
                }
                _ => {}
            }
        }
        seen
    })
}

const EVERYTHING: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::BACKEND_SEND_FD
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS
    | protocol::DEVICE_STATE
    | protocol::SHMEM;

/// What a back end that offers everything sees of a front end with one request queue.
fn handshake(profile: Profile) -> (Vec<Seen>, SessionFacts) {
    let (front, back) = UnixStream::pair().unwrap();
    let back = back_end(back, EVERYTHING);
    let options = Options::default().request_queues(1);
    let session = profile.connect(front, &options).unwrap();
    let facts = SessionFacts {
        queues: session.queues.len(),
        size: session.queues[0].size(),
        features: session.features,
        shared_memory: session.shared_memory.clone(),
        has_config: session.config.is_some(),
        has_backend: session.backend.is_some(),
        has_inflight: session.inflight().is_some(),
    };
    drop(session);
    (back.join().unwrap(), facts)
}

struct SessionFacts {
    queues: usize,
    size: u16,
    features: u64,
    shared_memory: Vec<u64>,
    has_config: bool,
    has_backend: bool,
    has_inflight: bool,
}

fn numbers(seen: &[Seen]) -> Vec<u32> {
    seen.iter().map(|seen| seen.request).collect()
}

#[test]
fn qemu_resets_twice_adds_memory_by_regions_and_calls_last() {
    let (seen, facts) = handshake(Profile::Qemu);
    let order = [
        r::GET_FEATURES,
        r::GET_PROTOCOL_FEATURES,
        r::SET_PROTOCOL_FEATURES,
        r::GET_QUEUE_NUM,
        r::GET_MAX_MEM_SLOTS,
        r::SET_BACKEND_REQ_FD,
        r::SET_OWNER,
        r::GET_FEATURES,
        r::SET_VRING_CALL,
        r::SET_VRING_CALL,
        r::SET_VRING_ERR,
        r::SET_VRING_CALL,
        r::SET_VRING_ERR,
        r::RESET_DEVICE,
        r::RESET_DEVICE,
        r::SET_VRING_CALL,
        r::SET_VRING_CALL,
        r::SET_FEATURES,
        r::ADD_MEM_REG,
        r::ADD_MEM_REG,
        r::SET_VRING_NUM,
        r::SET_VRING_BASE,
        r::SET_VRING_ADDR,
        r::SET_VRING_KICK,
        r::SET_VRING_NUM,
        r::SET_VRING_BASE,
        r::SET_VRING_ADDR,
        r::SET_VRING_KICK,
        r::SET_VRING_ENABLE,
        r::SET_VRING_ENABLE,
        r::SET_VRING_CALL,
        r::SET_VRING_CALL,
    ];
    assert_eq!(numbers(&seen), order);
    let acknowledged: Vec<_> = seen.iter().filter(|seen| seen.acknowledged).collect();
    let acknowledged: Vec<_> = acknowledged.iter().map(|seen| seen.request).collect();
    let expected = [
        r::ADD_MEM_REG,
        r::ADD_MEM_REG,
        r::SET_VRING_ENABLE,
        r::SET_VRING_ENABLE,
        r::SET_VRING_CALL,
        r::SET_VRING_CALL,
    ];
    assert_eq!(acknowledged, expected);
    assert_eq!((facts.queues, facts.size), (2, 128));
    assert!(!facts.has_config && facts.has_backend && !facts.has_inflight);
}

#[test]
fn cloud_hypervisor_asks_for_a_reply_to_everything() {
    let (seen, facts) = handshake(Profile::CloudHypervisor);
    let order = [
        r::SET_OWNER,
        r::GET_FEATURES,
        r::GET_PROTOCOL_FEATURES,
        r::SET_PROTOCOL_FEATURES,
        r::GET_QUEUE_NUM,
        r::SET_FEATURES,
        r::SET_MEM_TABLE,
        r::SET_VRING_NUM,
        r::SET_VRING_NUM,
        r::GET_INFLIGHT_FD,
        r::SET_INFLIGHT_FD,
        r::SET_VRING_ADDR,
        r::SET_VRING_BASE,
        r::SET_VRING_CALL,
        r::SET_VRING_KICK,
        r::SET_VRING_ADDR,
        r::SET_VRING_BASE,
        r::SET_VRING_CALL,
        r::SET_VRING_KICK,
        r::SET_VRING_ENABLE,
        r::SET_VRING_ENABLE,
    ];
    assert_eq!(numbers(&seen), order);
    let asks: Vec<_> = seen.iter().map(|seen| seen.acknowledged).collect();
    assert_eq!(asks[..4], [false; 4]);
    assert!(asks[4..].iter().all(|&asks| asks));
    let table = seen.iter().find(|seen| seen.request == r::SET_MEM_TABLE);
    assert_eq!(table.map(|seen| (seen.word, seen.fds)), Some((2, 2)));
    assert_eq!((facts.queues, facts.size), (2, 1024));
    assert!(facts.has_inflight && !facts.has_backend);
}

#[test]
fn dragonball_sets_features_first_and_each_call_twice() {
    let (seen, facts) = handshake(Profile::Dragonball);
    let order = [
        r::GET_FEATURES,
        r::SET_OWNER,
        r::GET_FEATURES,
        r::SET_FEATURES,
        r::GET_PROTOCOL_FEATURES,
        r::SET_PROTOCOL_FEATURES,
        r::SET_VRING_CALL,
        r::SET_VRING_CALL,
        r::SET_MEM_TABLE,
        r::SET_VRING_NUM,
        r::SET_VRING_NUM,
        r::SET_VRING_BASE,
        r::SET_VRING_BASE,
        r::SET_VRING_ADDR,
        r::SET_VRING_ADDR,
        r::SET_VRING_KICK,
        r::SET_VRING_KICK,
        r::SET_VRING_CALL,
        r::SET_VRING_CALL,
        r::SET_VRING_ENABLE,
        r::SET_VRING_ENABLE,
    ];
    assert_eq!(numbers(&seen), order);
    assert!(seen.iter().all(|seen| !seen.acknowledged));
    assert!(!facts.has_backend);
}

#[test]
fn dragonball_with_a_window_hands_over_a_socket() {
    let (front, back) = UnixStream::pair().unwrap();
    let back = back_end(back, EVERYTHING);
    let options = Options::default().dax_window(true);
    let session = Profile::Dragonball.connect(front, &options).unwrap();
    assert!(session.backend.is_some());
    drop(session);
    assert!(numbers(&back.join().unwrap()).contains(&r::SET_BACKEND_REQ_FD));
}

#[test]
fn crosvm_takes_all_queues_and_reads_the_tag_byte_by_byte() {
    let (seen, facts) = handshake(Profile::Crosvm);
    let mut order = vec![
        r::SET_OWNER,
        r::GET_FEATURES,
        r::GET_PROTOCOL_FEATURES,
        r::SET_PROTOCOL_FEATURES,
        r::SET_BACKEND_REQ_FD,
        r::GET_QUEUE_NUM,
        r::GET_SHMEM_CONFIG,
    ];
    order.extend([r::GET_CONFIG; 37]);
    order.extend([r::SET_FEATURES, r::SET_MEM_TABLE]);
    for _ in 0..3 {
        order.extend([
            r::SET_VRING_NUM,
            r::SET_VRING_ADDR,
            r::SET_VRING_BASE,
            r::SET_VRING_CALL,
            r::SET_VRING_KICK,
            r::SET_VRING_ENABLE,
        ]);
    }
    assert_eq!(numbers(&seen), order);
    assert!(seen.iter().all(|seen| !seen.acknowledged));
    assert_eq!((facts.queues, facts.size), (3, 32768));
    assert_eq!(facts.shared_memory, [1 << 30]);
    assert!(facts.has_config && facts.has_backend);
}

#[test]
fn libkrun_comes_as_owner_after_it_has_read_the_configuration() {
    let (seen, facts) = handshake(Profile::Libkrun);
    let mut order = vec![
        r::GET_FEATURES,
        r::GET_PROTOCOL_FEATURES,
        r::SET_PROTOCOL_FEATURES,
    ];
    order.extend([r::GET_CONFIG; 37]);
    order.extend([r::SET_OWNER, r::SET_MEM_TABLE, r::SET_FEATURES]);
    for _ in 0..2 {
        order.extend([
            r::SET_VRING_NUM,
            r::SET_VRING_BASE,
            r::SET_VRING_ADDR,
            r::SET_VRING_KICK,
            r::SET_VRING_CALL,
            r::SET_VRING_ENABLE,
        ]);
    }
    assert_eq!(numbers(&seen), order);
    assert_eq!((facts.queues, facts.size), (2, 256));
}

#[test]
fn libkrun_unasked_takes_all_queues_and_shares_one_call() {
    let (front, back) = UnixStream::pair().unwrap();
    let back = back_end(back, EVERYTHING);
    let session = Profile::Libkrun.connect(front, &Options::default());
    let session = session.unwrap();
    assert_eq!(session.queues.len(), 3);
    let first = session.queues[0].call_event();
    let same = |queue: &Queue| Arc::ptr_eq(first, queue.call_event());
    assert!(session.queues.iter().all(same));
    drop(session);
    back.join().unwrap();
}

#[test]
fn what_is_not_meant_is_not_accepted() {
    for profile in Profile::ALL {
        let (_, facts) = handshake(profile);
        assert_eq!(facts.features & feature::IN_ORDER, 0, "{profile:?}");
        assert_eq!(facts.features & feature::LOG_ALL, 0, "{profile:?}");
        assert_ne!(facts.features & feature::VERSION_1, 0, "{profile:?}");
    }
}

#[test]
fn more_queues_than_there_are_is_refused() {
    let (front, back) = UnixStream::pair().unwrap();
    let back = back_end(back, EVERYTHING);
    let options = Options::default().request_queues(3);
    let refused = Profile::CloudHypervisor.connect(front, &options);
    let expected = SessionError::TooManyQueues {
        wanted: 4,
        offered: 3,
    };
    assert_eq!(refused.unwrap_err().to_string(), expected.to_string());
    back.join().unwrap();
}

#[test]
fn without_protocol_features_nothing_is_enabled() {
    let (front, back) = UnixStream::pair().unwrap();
    let back = back_end(back, EVERYTHING);
    let options = Options::default().without_features(feature::PROTOCOL_FEATURES);
    drop(Profile::Simple.connect(front, &options).unwrap());
    let seen = numbers(&back.join().unwrap());
    assert!(!seen.contains(&r::SET_VRING_ENABLE));
    assert!(!seen.contains(&r::GET_PROTOCOL_FEATURES));
}

#[test]
fn a_session_stops_and_restarts_where_it_was() {
    for profile in Profile::ALL {
        let (front, back) = UnixStream::pair().unwrap();
        let back = back_end(back, EVERYTHING);
        let options = Options::default().request_queues(1);
        let mut session = profile.connect(front, &options).unwrap();
        let bases = session.stop().unwrap();
        assert!(bases.iter().all(|&base| base == 7));
        session.restart(&bases).unwrap();
        drop(session);
        let seen = back.join().unwrap();
        let restarted = seen
            .iter()
            .rev()
            .find(|seen| seen.request == r::SET_VRING_BASE)
            .unwrap();
        let expected = if profile == Profile::Libkrun { 0 } else { 7 };
        assert_eq!(restarted.word >> 32, expected, "{profile:?}");
    }
}

#[test]
fn a_reconnection_asks_for_nothing_and_goes_on_at_the_available_index() {
    let (front, back) = UnixStream::pair().unwrap();
    let first = back_end(back, EVERYTHING);
    let options = Options::default();
    let mut session = Profile::CloudHypervisor.connect(front, &options).unwrap();
    let buf = crate::Buf::new(crate::Gpa(0), 16);
    for token in 0..5 {
        session.queues[1].push(&[buf], &[], token).unwrap();
    }
    let (front, back) = UnixStream::pair().unwrap();
    let second = back_end(back, EVERYTHING);
    session.reconnect(front).unwrap();
    assert_eq!(session.queues[1].in_flight(), 5);
    assert_eq!(session.queues[1].kick_event().take().unwrap(), 0);
    drop(session);
    first.join().unwrap();
    let seen = second.join().unwrap();
    let head = [
        r::SET_OWNER,
        r::GET_FEATURES,
        r::SET_PROTOCOL_FEATURES,
        r::SET_FEATURES,
        r::SET_MEM_TABLE,
        r::SET_VRING_NUM,
        r::SET_VRING_NUM,
        r::SET_INFLIGHT_FD,
    ];
    assert_eq!(numbers(&seen)[..8], head);
    let bases = seen.iter().filter(|seen| seen.request == r::SET_VRING_BASE);
    let bases: Vec<_> = bases.map(|seen| seen.word).collect();
    assert_eq!(bases, [0, 1 | 5 << 32]);
}

#[test]
fn the_dirty_log_covers_all_memory() {
    let (front, back) = UnixStream::pair().unwrap();
    let back = back_end(back, EVERYTHING);
    let options = Options::default().without_protocol_features(protocol::LOG_SHMFD);
    let mut session = Profile::Qemu.connect(front, &options).unwrap();
    let log = session.start_log().unwrap();
    assert!(session.has(feature::LOG_ALL));
    assert!(!log.is_dirty(crate::Gpa(0)));
    assert!(log.take().unwrap().is_empty());
    session.stop_log().unwrap();
    assert!(!session.has(feature::LOG_ALL));
    drop(session);
    let seen = back.join().unwrap();
    let base = seen.iter().find(|seen| seen.request == r::SET_LOG_BASE);
    // One bit for each page below 4 GiB and 512 MiB.
    assert_eq!(base.map(|seen| (seen.word, seen.fds)), Some((147_456, 1)));
}

#[test]
fn the_back_ends_requests_can_be_answered() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut back = Connection::new(theirs).unwrap();
    let mut front = Connection::new(ours).unwrap();
    let message = backend_request::CONFIG_CHANGE_MSG;
    back.send(message, flag::VERSION | flag::NEED_REPLY, &[], &[])
        .unwrap();
    assert_eq!(front.recv().unwrap().header.request, message);
    front.reply(message, 0_u64.as_bytes()).unwrap();
    assert_eq!(back.recv_reply(message).unwrap().value::<u64>().unwrap(), 0);
}
