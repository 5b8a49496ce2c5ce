//! The passthrough file system against a plain directory: random sequences of operations, through
//! the socket and by system calls, must return the same and leave the same.
//!
//! `RINGFSD_MODEL_CASES` sets more cases than the gate has time for. It is a process of its own, because
//! its umask is empty, so that the modes of plain files are those that are asked for.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod changes;
mod guest;
mod host;
mod kernel;
mod machine;
mod operation;
mod together;
mod tree;

use std::cell::{Cell, RefCell};

use proptest::test_runner::{Config, TestCaseError, TestRunner};
use testing::{Server, each_runtime};

use guest::Behind;
use host::Plain;
use machine::Machine;
use operation::{Operation, case};
use tree::tree;
use vmm::fuse::{Client, Guest};
use vmm::{Options, Profile};

/// The longest case.
const MOST: usize = 120;

/// Cases of one test: as many as the environment says, or these.
fn cases(usual: u32) -> u32 {
    let asked = std::env::var("RINGFSD_MODEL_CASES").ok();
    asked.map_or(usual, |count| count.parse().unwrap())
}

/// How cases are run. What fails is shown, made as short as it can be, and not kept in a file: the
/// sequence is all that it takes to see it again.
fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        max_shrink_time: 60_000,
        ..Config::default()
    })
}

/// Requests are made in the name of who runs this: so the host does, too.
fn act_as_myself<G: Guest>(client: &mut Client<G>) {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    client.act_as(uid, gid);
    client.set_umask(0);
    rustix::process::umask(rustix::fs::Mode::empty());
}

/// Does one case on both, and compares each answer. Both let go of everything in the end.
fn compare<G: Guest>(
    guest: &mut Machine<Behind<G>>,
    host: &mut Machine<Plain>,
    operations: &[Operation],
) -> Result<(), TestCaseError> {
    let mut result = Ok(());
    for (number, operation) in operations.iter().enumerate() {
        let (found, wanted) = (guest.apply(operation), host.apply(operation));
        if found != wanted {
            let text = format!(
                "operation {number}, {operation:?}: the guest is told {found:?}, the host's is {wanted:?}"
            );
            result = Err(TestCaseError::fail(shortened(text)));
            break;
        }
    }
    assert_eq!((guest.end(), host.end()), (Ok(()), Ok(())));
    result
}

/// What a person wants to read of it.
fn shortened(text: String) -> String {
    if text.len() < 2000 {
        text
    } else {
        text.chars().take(2000).collect::<String>() + " ..."
    }
}

/// Random cases on a server with these arguments.
fn answers_and_leaves_the_same(arguments: &[&str], usual: u32) {
    let mut server = Server::start(arguments);
    let mut client = server.session(Profile::Simple, &Options::default());
    act_as_myself(&mut client);
    let plain = tempfile::tempdir_in(server.share().parent().unwrap()).unwrap();
    let client = RefCell::new(Some(client));
    let number = Cell::new(0);
    let result = runner(cases(usual)).run(&case(MOST), |operations| {
        number.set(number.get() + 1);
        let name = format!("case-{}", number.get());
        let (shared, beside) = (server.share().join(&name), plain.path().join(&name));
        let idle = client.take().unwrap();
        let mut guest = Machine::new(Behind::in_directory(idle, &name));
        let mut host = Machine::new(Plain::in_directory(&beside));
        let result = compare(&mut guest, &mut host, &operations);
        client.replace(Some(guest.system.into_client()));
        result?;
        let (found, wanted) = (tree(&shared), tree(&beside));
        if found != wanted {
            let text = format!("the guest leaves {found:?}, the host {wanted:?}");
            return Err(TestCaseError::fail(shortened(text)));
        }
        std::fs::remove_dir_all(&shared).unwrap();
        std::fs::remove_dir_all(&beside).unwrap();
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert_eq!(server.descriptors_of("case"), 0, "all was forgotten");
    drop(client);
    server.wait_until_it_listens();
}

#[each_runtime]
fn random_operations_return_what_plain_directory_returns(runtime: &str) {
    answers_and_leaves_the_same(&["--runtime", runtime], 100);
}

#[each_runtime]
fn random_operations_with_few_descriptors_return_what_plain_directory_returns(runtime: &str) {
    let arguments = ["--runtime", runtime, "--max-open-inodes", "8"];
    answers_and_leaves_the_same(&arguments, 50);
}

#[each_runtime]
fn concurrent_clients_see_only_their_own_changes(runtime: &str) {
    together::concurrent_clients_see_only_their_own_changes(runtime, &[]);
}

#[each_runtime]
fn concurrent_clients_with_few_descriptors_see_only_their_own_changes(runtime: &str) {
    together::concurrent_clients_see_only_their_own_changes(runtime, &["--max-open-inodes", "8"]);
}

#[each_runtime]
fn alternating_changes_of_host_and_guest_lose_no_record(runtime: &str) {
    changes::alternating_changes_of_host_and_guest_lose_no_record(runtime);
}

#[each_runtime]
fn concurrent_changes_of_host_lose_no_record(runtime: &str) {
    changes::concurrent_changes_of_host_lose_no_record(runtime);
}
