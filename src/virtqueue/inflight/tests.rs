//! Tests of recovery after a server is killed between any two of its stores.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::guest_memory::crash_injection;
use crate::state::{Limits, Table};
use crate::virtqueue::layout::{NEXT, WRITE};
use crate::virtqueue::tests::{DESCRIPTORS, Driver, SIZE};
use crate::virtqueue::{BadChain, Call, Chain, Journal, Queue, QueueError, Tracking};

/// A request has its number in 8 bytes. The reply repeats 4 to 8 of them.
const REQUESTS: u64 = 0x5000;
const REPLIES: u64 = 0x6000;

/// A guest, and the memory in which servers track its requests.
struct Guest {
    driver: Driver,
    file: File,
    region: InflightRegion,
    table: Arc<Table>,
    in_table: bool,
    /// Numbers of the requests that were sent and not returned, by head.
    outstanding: BTreeMap<u16, u64>,
    /// The same heads, in the order in which they were made available.
    order: Vec<u16>,
    sent: u64,
    popped: u16,
}

impl Guest {
    fn new(in_table: bool) -> Self {
        let driver = Driver::new(false);
        // A request uses two descriptors: head and head + 1.
        for head in (0..SIZE).step_by(2) {
            let at = 8 * u64::from(head);
            driver.describe(DESCRIPTORS, head, REQUESTS + at, 8, NEXT, head + 1);
            driver.describe(DESCRIPTORS, head + 1, REPLIES + at, 8, WRITE, 0);
        }
        let memory_lost = Arc::new(MemoryLostEvent::new().unwrap());
        let (file, len) = InflightRegion::create(2, SIZE).unwrap();
        let map = file.try_clone().unwrap();
        let limits = Limits {
            inodes: 1,
            handles: 1,
            queues: 2,
        };
        let guest = Self {
            driver,
            file,
            region: InflightRegion::map(map, (0, len), (2, SIZE), &memory_lost).unwrap(),
            table: Table::in_memory(&limits).unwrap(),
            in_table,
            outstanding: BTreeMap::new(),
            order: Vec::new(),
            sent: 0,
            popped: 0,
        };
        // The first server starts before there is a request.
        drop(guest.serve(true).unwrap());
        guest
    }

    fn part(&self) -> InflightPart {
        if self.in_table {
            InflightPart::in_table(self.table.queue(1).unwrap())
        } else {
            self.region.part(QueueIndex(1)).unwrap()
        }
    }

    fn serve(&self, journal: bool) -> Result<Queue, QueueError> {
        let journal = journal.then(|| Journal::new(self.table.queue(1).unwrap()));
        let inflight = self.part();
        // Cloud Hypervisor gives this index, regardless of requests in flight.
        let next = self.driver.available();
        self.driver
            .tracked(next, Arc::default(), Tracking { inflight, journal })
    }

    /// Sends a request at `head`, unless that is in use.
    fn request(&mut self, head: u16) {
        if self.outstanding.contains_key(&head) {
            return;
        }
        self.sent += 1;
        let at = 8 * u64::from(head);
        self.driver.write(REQUESTS + at, &self.sent.to_le_bytes());
        self.driver.write(REPLIES + at, &[0; 8]);
        self.outstanding.insert(head, self.sent);
        self.order.push(head);
        self.driver.offer(head);
    }

    fn requests(&mut self, heads: &[u16]) {
        heads.iter().for_each(|head| self.request(*head));
    }

    /// Takes returned requests off the used ring. Checks that each is outstanding and has its own
    /// reply.
    fn pop(&mut self) -> usize {
        let before = self.popped;
        while self.popped != self.driver.used_index() {
            let (head, len) = self.driver.used_element(self.popped);
            let head = u16::try_from(head).unwrap();
            let number = self.outstanding.remove(&head);
            let number = number.unwrap_or_else(|| panic!("head {head} is returned twice"));
            self.order.retain(|other| *other != head);
            assert_eq!(len, reply_len(number));
            let reply: [u8; 8] = self.driver.read(REPLIES + 8 * u64::from(head));
            let len = usize::try_from(len).unwrap();
            assert_eq!(reply[..len], number.to_le_bytes()[..len]);
            self.popped = self.popped.wrapping_add(1);
        }
        usize::from(self.popped.wrapping_sub(before))
    }

    /// Takes all chains that a server finds in flight and on the ring, in order. Those whose reply
    /// is in place are returned without being taken.
    fn take_all(&mut self, queue: &mut Queue) -> VecDeque<Chain> {
        let mut chains = VecDeque::new();
        while let Some(chain) = queue.pop() {
            chains.push_back(chain.unwrap());
        }
        chains
    }

    fn words(&self) -> Vec<u64> {
        let mut bytes = vec![0; 8 * part_words(SIZE)];
        let at = bytes.len() as u64;
        self.file.read_exact_at(&mut bytes, at).unwrap();
        let words = bytes.as_chunks().0.iter();
        words.map(|word| u64::from_le_bytes(*word)).collect()
    }

    fn set_word(&self, at: usize, value: u64) {
        let at = 8 * (part_words(SIZE) + at);
        self.file
            .write_all_at(&value.to_le_bytes(), at as u64)
            .unwrap();
    }
}

fn reply_len(number: u64) -> u32 {
    u32::try_from(4 + number % 5).unwrap()
}

fn number(chain: &mut Chain) -> u64 {
    let mut bytes = [0; 8];
    assert_eq!(chain.read(&mut bytes), 8);
    u64::from_le_bytes(bytes)
}

/// Replies to a request with its number, and records it in the journal.
fn reply(mut chain: Chain) {
    let number = number(&mut chain);
    chain.record_unique(number);
    chain.record_intent([number, 1, 2, 3]);
    let len = usize::try_from(reply_len(number)).unwrap();
    chain.reply(&[&number.to_le_bytes()[..len]]);
}

/// What a server does before it is killed: takes chains together and singly, replies in another
/// order, and publishes together and singly.
fn serve_some(guest: &Guest, journal: bool) {
    let mut queue = guest.serve(journal).unwrap();
    let used = Arc::clone(queue.used());
    let mut in_flight: VecDeque<_> = (0..3).map(|_| queue.pop().unwrap().unwrap()).collect();
    reply(in_flight.remove(1).unwrap());
    reply(in_flight.pop_back().unwrap());
    used.publish();
    in_flight.push_back(queue.pop().unwrap().unwrap());
    reply(in_flight.pop_back().unwrap());
    reply(in_flight.pop_back().unwrap());
    used.publish();
}

/// Runs the next server, and checks that the guest gets all replies from it.
fn resume_and_check(guest: &mut Guest, journal: bool) {
    guest.pop();
    let order = guest.order.clone();
    let mut queue = guest.serve(journal).unwrap();
    let chains = guest.take_all(&mut queue);
    let taken: Vec<_> = chains.iter().map(Chain::head).collect();
    queue.used().publish();
    guest.pop();
    let left = order.iter().filter(|head| guest.order.contains(head));
    assert_eq!(
        taken,
        left.copied().collect::<Vec<_>>(),
        "in the order of arrival"
    );
    chains.into_iter().for_each(reply);
    queue.used().publish();
    guest.pop();
    assert!(guest.outstanding.is_empty());
    // The queue works as if no server had been killed.
    guest.request(2);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.previous(), None);
    reply(chain);
    queue.used().publish();
    assert_eq!((guest.pop(), queue.used().in_flight()), (1, 0));
}

#[test]
fn kill_after_any_store_returns_each_request_once() {
    for (in_table, journal) in [(false, false), (false, true), (true, true)] {
        let mut cuts = 0;
        loop {
            let mut guest = Guest::new(in_table);
            // Complete some requests first, so that the part has old marks and links.
            guest.requests(&[0, 2, 4, 6]);
            resume_and_check(&mut guest, journal);
            guest.requests(&[6, 0, 2, 4]);
            let killed = crash_injection::kill_after(cuts, || serve_some(&guest, journal));
            resume_and_check(&mut guest, journal);
            if !killed {
                break;
            }
            cuts += 1;
        }
        assert!(cuts > 30, "{cuts} stores");
    }
}

#[test]
fn kill_during_recovery_leaves_all_requests_to_next_server() {
    for first in 0..60 {
        for second in 0.. {
            let mut guest = Guest::new(false);
            guest.requests(&[6, 0, 2, 4]);
            crash_injection::kill_after(first, || serve_some(&guest, true));
            guest.pop();
            let killed = crash_injection::kill_after(second, || {
                let mut queue = guest.serve(true).unwrap();
                guest.take_all(&mut queue).into_iter().for_each(reply);
                queue.used().publish();
            });
            resume_and_check(&mut guest, true);
            if !killed {
                break;
            }
        }
    }
}

#[test]
fn recorded_intent_is_available_to_next_server() {
    let mut guest = Guest::new(false);
    guest.requests(&[4, 2, 6]);
    crash_injection::kill_after(1000, || {
        let mut queue = guest.serve(true).unwrap();
        let mut chains = guest.take_all(&mut queue);
        assert!(chains.iter().all(|chain| chain.previous().is_none()));
        chains[0].record_unique(77);
        chains[0].record_intent([5, 6, 7, 8]);
        chains[1].record_unique(78);
        chains[1].record_intent([1, 1, 1, 1]);
        chains[1].record_intent([0; 4]);
        // A killed process drops nothing.
        chains.drain(..).for_each(std::mem::forget);
    });
    let mut queue = guest.serve(true).unwrap();
    let chains = guest.take_all(&mut queue);
    let previous: Vec<_> = chains
        .iter()
        .map(|chain| chain.previous().unwrap())
        .collect();
    assert_eq!((previous[0].unique, previous[0].intent), (77, [5, 6, 7, 8]));
    assert_eq!((previous[1].unique, previous[1].intent), (78, [0; 4]));
    assert_eq!((previous[2].unique, previous[2].intent), (0, [0; 4]));
}

#[test]
fn journal_slot_of_earlier_use_of_head_is_ignored() {
    let mut guest = Guest::new(false);
    guest.request(4);
    // A server with a journal replies; then a server without one takes the next request.
    resume_and_check(&mut guest, true);
    guest.request(4);
    let mut queue = guest.serve(false).unwrap();
    guest
        .take_all(&mut queue)
        .into_iter()
        .for_each(std::mem::forget);
    let mut queue = guest.serve(true).unwrap();
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.previous().unwrap().unique, 0);
    reply(chain);
    queue.used().publish();
    assert_eq!(guest.pop(), 1);
}

#[test]
fn kill_with_repeated_or_invalid_heads_returns_other_heads_once() {
    for cut in 0.. {
        let mut guest = Guest::new(false);
        guest.requests(&[6, 0, 2, 4]);
        resume_and_check(&mut guest, true);
        let begin = guest.popped;
        for head in [6, 0, SIZE + 1, 0, 2] {
            guest.driver.offer(head);
        }
        let killed = crash_injection::kill_after(cut, || {
            let mut queue = guest.serve(true).unwrap();
            let chains: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
            let faults: Vec<_> = chains.iter().map(|it| it.as_ref().err()).collect();
            let [index, twice] = [BadChain::Index, BadChain::Twice];
            if crash_injection::is_alive() {
                assert_eq!(faults, [None, None, Some(&index), Some(&twice), None]);
            }
            let mut chains = chains.into_iter().flatten();
            reply(chains.nth(1).unwrap());
            queue.used().publish();
            chains.for_each(reply);
            queue.used().publish();
        });
        let mut queue = guest.serve(true).unwrap();
        std::iter::from_fn(|| queue.pop()).flatten().for_each(reply);
        queue.used().publish();
        assert_eq!(queue.used().in_flight(), 0);
        let mut back: Vec<_> = (begin..guest.driver.used_index())
            .map(|at| guest.driver.used_element(at).0)
            .collect();
        back.sort_unstable();
        // Of two chains with the same head either may be the repeated one, and one may be lost or
        // returned twice with it. The other heads are returned once.
        back.retain(|head| *head != 0);
        assert_eq!(back, [2, 6, u32::from(SIZE) + 1], "cut {cut}");
        if !killed {
            break;
        }
    }
}

#[test]
fn layout_is_that_of_specification() {
    let mut guest = Guest::new(false);
    let mut queue = guest.serve(false).unwrap();
    guest.requests(&[6, 2]);
    let mut chains = guest.take_all(&mut queue);
    let words = guest.words();
    assert_eq!(words[0], 0, "features");
    assert_eq!(words[1] & 0xffff_ffff, 1 | u64::from(SIZE) << 16);
    assert_eq!(
        (words[2 + 12], words[2 + 13]),
        (1, 1),
        "head 6: inflight, counter"
    );
    assert_eq!((words[2 + 4], words[2 + 5]), (1, 2), "head 2");
    reply(chains.pop_front().unwrap());
    reply(chains.pop_front().unwrap());
    let words = guest.words();
    assert_eq!(words[1] >> 32 & 0xffff, 2, "last_batch_head");
    assert_eq!(words[2 + 4] >> 48, 6, "next");
    assert_eq!(
        (words[2 + 4] & 0xff, words[1] >> 48),
        (1, 0),
        "not published yet"
    );
    queue.used().publish();
    let words = guest.words();
    assert_eq!((words[2 + 4] & 0xff, words[2 + 12] & 0xff), (0, 0));
    assert_eq!(words[1] >> 48, 2, "used_idx");
    assert_eq!(
        InflightRegion::create(3, 128).unwrap().1,
        3 * (64 + 128 * 16)
    );
}

#[test]
fn damaged_region_is_refused() {
    type Damage = (usize, u64, fn(&InflightError) -> bool);
    let cases: [Damage; 4] = [
        (0, 1, |e| {
            matches!(e, InflightError::Version { features: 1, .. })
        }),
        (1, 2 | 8 << 16, |e| {
            matches!(e, InflightError::Version { version: 2, .. })
        }),
        (1, 1 | 16 << 16, |e| {
            matches!(
                e,
                InflightError::Entries {
                    found: 16,
                    wanted: 8
                }
            )
        }),
        (1, 1 | 4 << 16, |e| {
            matches!(
                e,
                InflightError::Entries {
                    found: 4,
                    wanted: 8
                }
            )
        }),
    ];
    for (at, value, expected) in cases {
        let guest = Guest::new(false);
        drop(guest.serve(false).unwrap());
        guest.set_word(at, value);
        match guest.serve(false).unwrap_err() {
            QueueError::Inflight { source, .. } => assert!(expected(&source), "{source}"),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn region_for_larger_queue_is_used_and_for_smaller_one_is_not() {
    let memory_lost = Arc::new(MemoryLostEvent::new().unwrap());
    for size in [SIZE * 2, SIZE / 2] {
        let mut guest = Guest::new(false);
        let (file, len) = InflightRegion::create(2, size).unwrap();
        let region = InflightRegion::map(file, (0, len), (2, size), &memory_lost).unwrap();
        guest.region = region;
        guest.requests(&[6, 2]);
        let tracking = Tracking {
            inflight: guest.part(),
            journal: None,
        };
        let mut queue = guest.driver.tracked(0, Arc::default(), tracking).unwrap();
        let chains = guest.take_all(&mut queue);
        assert_eq!(chains.len(), 2);
        chains.into_iter().for_each(std::mem::forget);
        let mut next = guest.serve(false).unwrap();
        let waiting = next.waiting();
        assert_eq!(waiting, if size > SIZE { 2 } else { 0 });
        if size > SIZE {
            // Mark a head that the ring doesn't have.
            let words = guest.part().words;
            words.store(entry(SIZE), MARK);
            let error = guest.serve(false).unwrap_err();
            let QueueError::Inflight { source, .. } = error else {
                panic!("{error}");
            };
            assert!(matches!(source, InflightError::Head { head: 8, size: 8 }));
        }
        drop(guest.take_all(&mut next));
    }
}

#[test]
fn region_that_is_too_short_or_has_no_queue_is_refused() {
    let memory_lost = Arc::new(MemoryLostEvent::new().unwrap());
    let map = |len: u64, queues, size| {
        let (file, _) = InflightRegion::create(2, SIZE).unwrap();
        InflightRegion::map(file, (0, len), (queues, size), &memory_lost)
    };
    let whole = InflightRegion::create(2, SIZE).unwrap().1;
    assert!(map(whole, 2, SIZE).is_ok());
    let short = map(whole - 1, 2, SIZE);
    assert!(matches!(short, Err(InflightError::Short { .. })));
    // The message claims more than the file has.
    let longer = map(1 << 20, 100, SIZE);
    assert!(matches!(longer, Err(InflightError::Memory(_))));
    for (queues, size) in [(0, 8), (1, 0), (1, 32769)] {
        let invalid = map(whole, queues, size);
        assert!(matches!(invalid, Err(InflightError::Shape { .. })));
    }
    assert!(map(whole, 2, SIZE).unwrap().part(QueueIndex(2)).is_none());
}

#[test]
fn reset_rings_start_at_index_of_front_end() {
    let mut guest = Guest::new(false);
    (0..40).for_each(|_| resume_and_check(&mut guest, false));
    guest.requests(&[6, 2]);
    let mut queue = guest.serve(false).unwrap();
    guest
        .take_all(&mut queue)
        .into_iter()
        .for_each(std::mem::forget);
    // The guest reboots.
    guest.driver.reset();
    guest.outstanding.clear();
    guest.order.clear();
    guest.popped = 0;
    guest.request(4);
    let inflight = guest.part();
    let tracking = Tracking {
        inflight,
        journal: None,
    };
    let mut queue = guest.driver.tracked(0, Arc::default(), tracking).unwrap();
    let chains = guest.take_all(&mut queue);
    assert_eq!(chains.iter().map(Chain::head).collect::<Vec<_>>(), [4]);
    assert_eq!(chains[0].previous(), None);
}

#[test]
fn resumed_queue_calls_guest_once() {
    use rustix::event::{EventfdFlags, eventfd};
    let guest = Guest::new(false);
    for resumes in [false, true] {
        if !resumes {
            guest.part().clear();
        }
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let call = Arc::new(Call::default());
        call.set(Some(Arc::new(fd.try_clone().unwrap())));
        let inflight = guest.part();
        let tracking = Tracking {
            inflight,
            journal: None,
        };
        drop(guest.driver.tracked(0, call, tracking).unwrap());
        assert_eq!(rustix::io::read(&fd, &mut [0; 8]).is_ok(), resumes);
    }
}

#[test]
fn lost_region_is_reported() {
    let memory_lost = Arc::new(MemoryLostEvent::new().unwrap());
    let fd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(0x10000).unwrap();
    let map = file.try_clone().unwrap();
    let region = InflightRegion::map(map, (0, 0x10000), (2, 1024), &memory_lost).unwrap();
    let mut guest = Guest::new(false);
    guest.region = region;
    let inflight = guest.part();
    let tracking = Tracking {
        inflight,
        journal: None,
    };
    let mut queue = guest.driver.tracked(0, Arc::default(), tracking).unwrap();
    assert_eq!(memory_lost.place(), None);
    file.set_len(0).unwrap();
    guest.request(2);
    guest.take_all(&mut queue).into_iter().for_each(reply);
    queue.used().publish();
    assert_eq!(guest.pop(), 1);
    assert!(memory_lost.place().unwrap() >= InflightRegion::GONE);
}

#[test]
fn created_region_is_sealed_against_truncation() {
    let (file, len) = InflightRegion::create(2, SIZE).unwrap();
    assert!(file.set_len(0).is_err());
    assert_eq!(file.metadata().unwrap().len(), len);
}

/// A step of a server or its guest.
#[derive(Clone, Copy, Debug)]
enum Step {
    Request(u16),
    Pop,
    Take,
    Reply(usize),
    Publish,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..SIZE / 2).prop_map(|head| Step::Request(2 * head)),
        1 => Just(Step::Pop),
        3 => Just(Step::Take),
        3 => (0usize..8).prop_map(Step::Reply),
        1 => Just(Step::Publish),
    ];
    prop::collection::vec(step, 0..40)
}

fn run_server(guest: &mut Guest, steps: &[Step], journal: bool) {
    let mut queue = guest.serve(journal).unwrap();
    let mut in_flight = Vec::new();
    for step in steps {
        match *step {
            Step::Request(head) => guest.request(head),
            Step::Pop => {
                guest.pop();
            }
            Step::Take => match queue.pop() {
                Some(Ok(chain)) => in_flight.push(chain),
                // The stores of a killed process have no effect, so it finds marks that it removed.
                Some(Err(fault)) => assert!(!crash_injection::is_alive(), "{fault}"),
                None => (),
            },
            Step::Reply(which) if !in_flight.is_empty() => {
                reply(in_flight.swap_remove(which % in_flight.len()));
            }
            Step::Reply(_) => (),
            Step::Publish => queue.used().publish(),
        }
    }
    in_flight.into_iter().for_each(std::mem::forget);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Servers run and are killed while the guest continues: each of its requests is returned once,
    /// with its own reply.
    #[test]
    fn any_sequence_of_killed_servers_returns_each_request_once(
        servers in prop::collection::vec((steps(), 0usize..120), 1..5),
        in_table in any::<bool>(),
        journal in any::<bool>(),
    ) {
        let mut guest = Guest::new(in_table);
        for (steps, stores) in servers {
            crash_injection::kill_after(stores, || run_server(&mut guest, &steps, journal));
            guest.pop();
        }
        resume_and_check(&mut guest, journal);
    }

    /// A region with any content is refused or used, and no chain is served twice.
    #[test]
    fn any_region_is_refused_or_served(
        words in prop::collection::vec((0usize..18, any::<u64>()), 0..12),
        marks in prop::collection::vec((0u16..SIZE, any::<u16>(), 0u64..9), 0..8),
        used in 0u16..10,
        last in 0u16..10,
        there in 0usize..5,
        size in any::<bool>(),
    ) {
        let mut guest = Guest::new(false);
        drop(guest.serve(true).unwrap());
        let entries = if size { SIZE } else { last };
        let state = State { version: 1, entries, last, used };
        guest.set_word(STATE, state.word());
        for (head, link, counter) in marks {
            guest.set_word(entry(head), MARK | u64::from(link) << LINK);
            guest.set_word(counter_of(head), counter);
        }
        for (at, word) in words {
            guest.set_word(at, word);
        }
        for head in [6, 0, 2, 4].into_iter().take(there) {
            guest.request(head);
        }
        if let Ok(mut queue) = guest.serve(true) {
            let chains: Vec<_> = std::iter::from_fn(|| queue.pop()).flatten().collect();
            let mut heads: Vec<_> = chains.iter().map(Chain::head).collect();
            heads.sort_unstable();
            let count = heads.len();
            heads.dedup();
            prop_assert_eq!(heads.len(), count);
            prop_assert!(count <= there);
        }
    }
}
