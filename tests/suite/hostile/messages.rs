//! vhost-user messages: wrong ones, in wrong order, with wrong descriptors.

use std::time::Instant;

use testing::{Server, TIMEOUT, each_runtime};
use vmm::connection::message::request;
use vmm::connection::{Connection, ConnectionError};
use vmm::fuse::ROOT;
use vmm::{Event, Memory, Options, Profile, Region, Session};

use super::faults::{FRAMES, RINGS, TABLES, header, send};

/// What was not offered, or is none of a file system's business.
const FOREIGN: [(&str, u32, usize); 17] = [
    ("SET_LOG_FD", request::SET_LOG_FD, 0),
    ("SEND_RARP", 19, 8),
    ("NET_SET_MTU", 20, 8),
    ("SET_BACKEND_REQ_FD", request::SET_BACKEND_REQ_FD, 0),
    ("IOTLB_MSG", 22, 32),
    ("SET_VRING_ENDIAN", 23, 8),
    ("CREATE_CRYPTO_SESSION", 26, 100),
    ("CLOSE_CRYPTO_SESSION", 27, 8),
    ("POSTCOPY_ADVISE", 28, 0),
    ("POSTCOPY_LISTEN", 29, 0),
    ("POSTCOPY_END", 30, 0),
    ("GET_INFLIGHT_FD", request::GET_INFLIGHT_FD, 24),
    ("SET_INFLIGHT_FD", request::SET_INFLIGHT_FD, 24),
    ("GPU_SET_SOCKET", 33, 0),
    ("SET_STATUS", request::SET_STATUS, 8),
    ("GET_STATUS", request::GET_STATUS, 0),
    ("SET_DEVICE_STATE_FD", request::SET_DEVICE_STATE_FD, 8),
];

#[each_runtime]
fn malformed_message_ends_only_its_session(runtime: &str) {
    // Each of the lines that are waited for shall come, and there are more than are logged
    // otherwise.
    let mut server = Server::start(&["--runtime", runtime, "--log-level=info,server=debug"]);
    // The first session's workers exist before it does.
    is_well(&server, "nothing");
    server.wait_until_it_listens();
    let holdings = server.holdings();
    for (name, act, words) in FRAMES.iter().chain(TABLES).chain(RINGS) {
        let mut session = session(&server);
        act(&mut session);
        ends(&mut server, session, name, words);
    }
    for (name, number, len) in FOREIGN {
        let mut session = session(&server);
        send(&mut session, number, &vec![0; len]);
        ends(&mut server, session, name, "");
    }
    // This one has an answer that can say no.
    let mut session = session(&server);
    assert!(session.connection.check_device_state().is_err());
    session.connection.get_features().unwrap();
    drop(session);
    server.wait_until_it_listens();
    cut_short(&mut server);
    in_any_order(&mut server);
    is_well(&server, "everything");
    server.wait_until_it_listens();
    assert_eq!(
        server.holdings().descriptors,
        holdings.descriptors,
        "something is left open"
    );
    assert_eq!(
        server.holdings().guest_mappings,
        0,
        "something is left mapped"
    );
}

fn session(server: &Server) -> Session {
    let options =
        Options::default().memory(&[Region::new(0, 8 << 20), Region::new(4 << 30, 8 << 20)]);
    Profile::Simple.connect(server.connect(), &options).unwrap()
}

/// The session has ended, with the fault's name, and the next one is served.
fn ends(server: &mut Server, mut session: Session, name: &str, words: &str) {
    // The answer to a message that would be right shows that the bad one has been dealt with.
    let after = session.connection.get_features();
    let continues = matches!(after, Ok(_) | Err(ConnectionError::BadReply { .. }));
    assert!(!continues, "after {name} the session continues");
    let line = server.wait_for("the session is ended: ");
    assert!(line.contains(words), "{name}: {line}");
    drop(session);
    server.wait_until_it_listens();
    is_well(server, name);
    server.wait_until_it_listens();
}

fn is_well(server: &Server, after: &str) {
    let mut fs = server.session(Profile::Simple, &Options::default());
    let root = fs.getattr(ROOT);
    assert!(root.is_ok(), "after {after}: {root:?}");
}

/// A message that stops in the middle, and the front end goes.
fn cut_short(server: &mut Server) {
    let whole = [header(request::SET_VRING_NUM, 1, 8), vec![0; 8]].concat();
    for len in 1..whole.len() {
        let mut connection = Connection::new(server.connect()).unwrap();
        connection.send_bytes(&whole[..len], &[]).unwrap();
        drop(connection);
        server.wait_until_it_listens();
    }
}

/// Right messages in orders that no front end has: before anything else, twice, after the end.
fn in_any_order(server: &mut Server) {
    let event = Event::new().unwrap();
    let orders: [fn(&mut Connection, &Event); 6] = [
        |c, _| drop(c.get_vring_base(0)),
        |c, _| drop(c.set_vring_enable(0, true)),
        |c, event| drop(c.set_vring_kick(0, Some(event))),
        |c, event| {
            drop(c.set_vring_call(0, Some(event)));
            drop(c.set_vring_call(0, Some(event)));
        },
        |c, _| {
            drop(c.reset_owner());
            drop(c.reset_owner());
        },
        |c, _| {
            let memory = Memory::new(&[Region::new(0, 0x1000)]).unwrap();
            drop(c.set_mem_table(&memory));
            drop(c.set_mem_table(&memory));
        },
    ];
    for order in orders {
        let mut connection = Connection::new(server.connect()).unwrap();
        order(&mut connection, &event);
        drop(connection);
        server.wait_until_it_listens();
    }
    // Stopped twice, reset in between, and set up again: no fault at all.
    let mut session = session(server);
    session.stop().unwrap();
    let bases = session.stop().unwrap();
    session.restart(&bases).unwrap();
    session.connection.get_features().unwrap();
    drop(session);
    server.wait_until_it_listens();
}

/// An eventfd whose counter is full, so that writers would wait: the server must not.
#[each_runtime]
fn full_eventfd_blocks_no_session(runtime: &str) {
    let mut server = Server::start(&["--runtime", runtime]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    let call = Event::blocking().unwrap();
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let session = fs.guest();
    session.connection.set_vring_call(1, Some(&call)).unwrap();
    let root = fs
        .submit(vmm::fuse::Call::new(vmm::fuse::wire::opcode::STATFS, ROOT).reply(80))
        .unwrap();
    // Nothing calls, so the ring is looked at until it comes back.
    let end = Instant::now() + TIMEOUT;
    while fs.guest().queues[1].ready().unwrap() == 0 {
        assert!(Instant::now() < end, "the request does not come back");
        std::thread::yield_now();
    }
    fs.collect(root).unwrap();
    fs.guest().stop().unwrap();
    drop(fs);
    server.wait_until_it_listens();
    is_well(&server, "a stalled eventfd");
}
