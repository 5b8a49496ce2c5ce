//! Several clients at once, each with a queue of its own, over all workers: each in a subtree of
//! its own, where results must equal the host's, and now and then in a subtree that they share.
//!
//! In the shared one only what must hold in any order is checked. The invariant: a name that is
//! only ever replaced always exists, and its content is always one writer's.

use std::path::Path;
use std::sync::Mutex;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestRunner};
use testing::Server;
use vmm::fuse::wire::init;
use vmm::fuse::{Client, LINUX_OFFERS, Lane, ROOT};
use vmm::{Options, Profile};

use crate::guest::Behind;
use crate::host::Plain;
use crate::machine::Machine;
use crate::operation::case;
use crate::tree::tree;
use crate::{act_as_myself, cases, compare};

/// Clients, each on a queue.
const CLIENTS: u16 = 4;

/// Bytes of a file that is replaced.
const WHOLE: u32 = 20_000;

/// How often each client replaces a name between two cases.
const REPLACED: u8 = 10;

pub(crate) fn concurrent_clients_see_only_their_own_changes(runtime: &str, more: &[&str]) {
    let mut arguments = vec![
        "--runtime",
        runtime,
        "--request-queues",
        "4",
        "--workers",
        "3",
    ];
    arguments.extend(more);
    let mut server = Server::start(&arguments);
    let queues = Options::default().request_queues(CLIENTS);
    let session = Profile::Simple.connect(server.connect(), &queues).unwrap();
    let mut first = Client::new(session);
    // A client on a lane hasn't seen INIT, and knows the older form only.
    first
        .init_offering(LINUX_OFFERS & !init::SETXATTR_EXT)
        .unwrap();
    let shared = first.mkdir(ROOT, c"shared", 0o777).unwrap().nodeid;
    let mut session = first.into_guest();
    let plain = tempfile::tempdir_in(server.share().parent().unwrap()).unwrap();
    let lanes: Vec<_> = session.queues.drain(1..).collect();
    assert_eq!(lanes.len(), usize::from(CLIENTS));
    let shared = &Shared {
        node: shared,
        lock: Mutex::new(()),
    };
    std::thread::scope(|scope| {
        for (number, queue) in lanes.into_iter().enumerate() {
            let memory = session.memory.clone();
            let (share, plain) = (server.share(), plain.path());
            scope.spawn(move || {
                let mut client = Client::new(Lane { memory, queue });
                act_as_myself(&mut client);
                work(client, number, shared, &share, plain);
            });
        }
    });
    let left = std::fs::read(server.share().join("shared/name")).unwrap();
    assert!(is_whole(&left));
    assert_eq!(
        std::fs::read_dir(server.share().join("shared"))
            .unwrap()
            .count(),
        1
    );
    assert_eq!(server.descriptors_of("client"), 0, "all was forgotten");
    assert_eq!(server.descriptors_of("shared/"), 0, "all was forgotten");
    drop(session);
    server.wait_until_it_listens();
}

/// A directory in which all clients replace one file.
struct Shared {
    node: u64,
    /// Held while a name changes, as a guest's kernel holds a lock of its own. It looks names up
    /// meanwhile.
    lock: Mutex<()>,
}

/// One client's part.
fn work(mut client: Client<Lane>, number: usize, shared: &Shared, share: &Path, plain: &Path) {
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::default()
    });
    let strategy = case(crate::MOST);
    for round in 0..cases(12) {
        let name = format!("client-{number}-{round}");
        let operations = strategy.new_tree(&mut runner).unwrap().current();
        let mut guest = Machine::new(Behind::in_directory(client, &name));
        let mut host = Machine::new(Plain::in_directory(&plain.join(&name)));
        if let Err(error) = compare(&mut guest, &mut host, &operations) {
            panic!("{error}; the operations: {operations:#?}");
        }
        client = guest.system.into_client();
        assert_eq!(
            tree(&share.join(&name)),
            tree(&plain.join(&name)),
            "{operations:#?}"
        );
        for turn in 0..REPLACED {
            replace(&mut client, number, shared, turn);
        }
    }
}

/// Puts a new file in the place of one that all clients read and replace.
fn replace(client: &mut Client<Lane>, number: usize, shared: &Shared, turn: u8) {
    let own = std::ffi::CString::new(format!("own-{number}")).unwrap();
    let (made, handle) = client.create(shared.node, &own, 0o644).unwrap();
    let bytes = vec![turn; WHOLE as usize];
    assert_eq!(client.write(made.nodeid, handle, 0, &bytes).unwrap(), WHOLE);
    let change = shared.lock.lock().unwrap();
    client
        .rename(shared.node, &own, shared.node, c"name")
        .unwrap();
    drop(change);

    // Another may replace it between the two: the inode found is still opened.
    let found = client.lookup(shared.node, c"name").unwrap().nodeid;
    assert_ne!(found, 0, "a name that is replaced is always there");
    let opened = client.open(found, libc::O_RDONLY).unwrap();
    assert!(is_whole(&client.read(found, opened, 0, WHOLE + 1).unwrap()));
    client.release(found, opened).unwrap();
    client.forget(found, 1).unwrap();

    assert_eq!(
        client.fgetattr(made.nodeid, handle).unwrap().attr.size,
        WHOLE.into()
    );
    client.release(made.nodeid, handle).unwrap();
    client.forget(made.nodeid, 1).unwrap();
}

fn is_whole(bytes: &[u8]) -> bool {
    bytes.len() == WHOLE as usize && bytes.iter().all(|byte| *byte == bytes[0])
}
