use std::os::fd::AsFd;

use super::message::{InflightLayout, VringState, request};
use super::*;
use crate::event::Event;

/// Two connected ends: a front end and, as its peer, another one that answers by hand.
fn pair() -> (Connection, Connection) {
    let (front, back) = UnixStream::pair().unwrap();
    (
        Connection::new(front).unwrap(),
        Connection::new(back).unwrap(),
    )
}

#[test]
fn a_query_takes_the_reply_to_its_own_message() {
    let (mut front, mut back) = pair();
    back.reply(request::GET_FEATURES, 7_u64.as_bytes()).unwrap();
    assert_eq!(front.get_features().unwrap(), 7);
    let asked = back.recv().unwrap();
    assert_eq!(asked.header.request, request::GET_FEATURES);
    assert_eq!(asked.header.flags, flag::VERSION);

    back.reply(request::GET_QUEUE_NUM, 7_u64.as_bytes())
        .unwrap();
    let wrong = front.get_features();
    assert!(matches!(wrong, Err(ConnectionError::BadReply { .. })));
}

#[test]
fn a_command_is_acknowledged_only_once_reply_ack_is_negotiated() {
    let (mut front, mut back) = pair();
    front.set_need_reply(true);
    front.set_owner().unwrap();
    front.set_protocol_features(protocol::REPLY_ACK).unwrap();
    back.recv().unwrap();
    back.recv().unwrap();

    back.reply(request::SET_FEATURES, 0_u64.as_bytes()).unwrap();
    front.set_features(1).unwrap();
    let flags = back.recv().unwrap().header.flags;
    assert_eq!(flags, flag::VERSION | flag::NEED_REPLY);

    back.reply(request::SET_FEATURES, 3_u64.as_bytes()).unwrap();
    let refused = front.set_features(1);
    assert!(matches!(
        refused,
        Err(ConnectionError::Refused { code: 3, .. })
    ));
}

#[test]
fn one_call_can_be_acknowledged_alone() {
    let (mut front, mut back) = pair();
    front.set_protocol_features(protocol::REPLY_ACK).unwrap();
    back.recv().unwrap();
    let message = request::SET_VRING_ENABLE;
    back.reply(message, 0_u64.as_bytes()).unwrap();
    front.acknowledged(|c| c.set_vring_enable(1, true)).unwrap();
    let asked = back.recv().unwrap();
    assert_eq!(asked.header.flags, flag::VERSION | flag::NEED_REPLY);
    assert_eq!(
        asked.value::<VringState>().unwrap(),
        VringState { index: 1, num: 1 }
    );
    front.set_vring_enable(1, false).unwrap();
    assert_eq!(back.recv().unwrap().header.flags, flag::VERSION);
}

#[test]
fn file_descriptors_arrive_with_their_message() {
    let (mut front, mut back) = pair();
    let event = Event::new().unwrap();
    front.set_vring_kick(2, Some(&event)).unwrap();
    let message = back.recv().unwrap();
    assert_eq!(message.value::<u64>().unwrap(), 2);
    assert_eq!(message.fds.len(), 1);
    front.set_vring_call(2, None).unwrap();
    let message = back.recv().unwrap();
    assert_eq!(message.value::<u64>().unwrap(), 0x102);
    assert!(message.fds.is_empty());
}

#[test]
fn too_many_file_descriptors_are_refused_here() {
    let (mut front, mut back) = pair();
    let event = Event::new().unwrap();
    let fds = vec![event.as_fd(); MAX_FDS + 1];
    let sent = front.send(1, flag::VERSION, &[], &fds);
    assert!(matches!(sent, Err(ConnectionError::TooManyFds(254))));
    front.send(1, flag::VERSION, &[], &fds[1..]).unwrap();
    assert_eq!(back.recv().unwrap().fds.len(), MAX_FDS);
}

#[test]
fn silence_times_out_and_a_hang_up_is_told() {
    let (mut front, back) = pair();
    front.set_timeout(Duration::from_millis(1)).unwrap();
    let silence = front.get_features();
    assert!(matches!(
        silence,
        Err(ConnectionError::TimedOut { request: 1 })
    ));
    drop(back);
    assert!(front.get_features().is_err());
    front.wait_closed().unwrap();
}

#[test]
fn inflight_layouts_come_with_and_without_padding() {
    for len in [20, 24] {
        let (mut front, mut back) = pair();
        let layout = InflightLayout {
            mmap_size: 4096,
            mmap_offset: 0,
            num_queues: 2,
            queue_size: 64,
            padding: 0,
        };
        let event = Event::new().unwrap();
        let flags = flag::VERSION | flag::REPLY;
        let body = &layout.as_bytes()[..len];
        back.send(request::GET_INFLIGHT_FD, flags, body, &[event.as_fd()])
            .unwrap();
        assert_eq!(front.get_inflight_fd(2, 64).unwrap().0, layout);
    }
}

#[test]
fn a_header_can_lie() {
    let (mut front, mut back) = pair();
    let header = Header {
        request: 99,
        flags: 0,
        size: 2,
    };
    front.send_with_header(header, b"abc", &[]).unwrap();
    let message = back.recv().unwrap();
    assert_eq!(
        (message.header, message.body.as_slice()),
        (header, &b"ab"[..])
    );
    back.set_timeout(Duration::from_millis(1)).unwrap();
    assert!(matches!(back.recv(), Err(ConnectionError::TimedOut { .. })));
}
