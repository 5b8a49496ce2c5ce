//! Servers that are killed between any two of their stores, and those that come after them.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::state::{Limits, Table};
use crate::virtqueue::layout::{NEXT, WRITE};
use crate::virtqueue::tests::{DESCRIPTORS, Driver, SIZE};
use crate::virtqueue::{
    BadChain, Call, Chain, Journal, Queue, QueueError, Tracking, crash_injection,
};

/// Requests have their number in 8 bytes, and get it back in as many or fewer.
const REQUESTS: u64 = 0x5000;
const REPLIES: u64 = 0x6000;

/// A guest, and the memory in which servers track what they have of it.
struct Guest {
    driver: Driver,
    file: File,
    region: InflightRegion,
    table: Arc<Table>,
    kept: bool,
    /// Numbers of requests that were made and have not come back, by head.
    outstanding: BTreeMap<u16, u64>,
    /// The same heads, in the order in which they were made available.
    order: Vec<u16>,
    made: u64,
    popped: u16,
}

impl Guest {
    fn new(kept: bool) -> Self {
        let driver = Driver::new(false);
        // A request takes two descriptors: head, and head + 1.
        for head in (0..SIZE).step_by(2) {
            let at = 8 * u64::from(head);
            driver.describe(DESCRIPTORS, head, REQUESTS + at, 8, NEXT, head + 1);
            driver.describe(DESCRIPTORS, head + 1, REPLIES + at, 8, WRITE, 0);
        }
        let alarm = Arc::new(MemoryLostEvent::new().unwrap());
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
            region: InflightRegion::map(map, (0, len), (2, SIZE), &alarm).unwrap(),
            table: Table::in_memory(&limits).unwrap(),
            kept,
            outstanding: BTreeMap::new(),
            order: Vec::new(),
            made: 0,
            popped: 0,
        };
        // The first server has started before there is a request.
        drop(guest.serve(true).unwrap());
        guest
    }

    fn part(&self) -> InflightPart {
        if self.kept {
            InflightPart::kept(self.table.queue(1).unwrap())
        } else {
            self.region.part(QueueIndex(1)).unwrap()
        }
    }

    fn serve(&self, journal: bool) -> Result<Queue, QueueError> {
        let journal = journal.then(|| Journal::new(self.table.queue(1).unwrap()));
        let inflight = self.part();
        // As Cloud Hypervisor does, whatever is in flight.
        let next = self.driver.available();
        self.driver
            .tracked(next, Arc::default(), Tracking { inflight, journal })
    }

    /// Makes a request at a head that is free.
    fn request(&mut self, head: u16) {
        if self.outstanding.contains_key(&head) {
            return;
        }
        self.made += 1;
        let at = 8 * u64::from(head);
        self.driver.write(REQUESTS + at, &self.made.to_le_bytes());
        self.driver.write(REPLIES + at, &[0; 8]);
        self.outstanding.insert(head, self.made);
        self.order.push(head);
        self.driver.offer(head);
    }

    fn requests(&mut self, heads: &[u16]) {
        heads.iter().for_each(|head| self.request(*head));
    }

    /// Takes back what the used ring shows; each request has to be one that is outstanding, and to
    /// have its own reply.
    fn pop(&mut self) -> usize {
        let before = self.popped;
        while self.popped != self.driver.used_index() {
            let (head, len) = self.driver.used_element(self.popped);
            let head = u16::try_from(head).unwrap();
            let number = self.outstanding.remove(&head);
            let number = number.unwrap_or_else(|| panic!("head {head} comes back twice"));
            self.order.retain(|other| *other != head);
            assert_eq!(len, reply_len(number));
            let reply: [u8; 8] = self.driver.read(REPLIES + 8 * u64::from(head));
            let len = usize::try_from(len).unwrap();
            assert_eq!(reply[..len], number.to_le_bytes()[..len]);
            self.popped = self.popped.wrapping_add(1);
        }
        usize::from(self.popped.wrapping_sub(before))
    }

    /// The heads that a server finds in flight and on the ring, in order; those whose reply is in
    /// place come back by themselves.
    fn rest(&mut self, queue: &mut Queue) -> VecDeque<Chain> {
        let mut chains = VecDeque::new();
        while let Some(chain) = queue.take() {
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

fn answer(mut chain: Chain) {
    let number = number(&mut chain);
    chain.note_unique(number);
    chain.set_intent([number, 1, 2, 3]);
    let len = usize::try_from(reply_len(number)).unwrap();
    chain.reply(&[&number.to_le_bytes()[..len]]);
}

/// What a server does in the tests of every cut: chains taken together and one by one, answered in
/// another order, shown together and one by one.
fn a_day(guest: &Guest, journal: bool) {
    let mut queue = guest.serve(journal).unwrap();
    let used = Arc::clone(queue.used());
    let mut held: VecDeque<_> = (0..3).map(|_| queue.take().unwrap().unwrap()).collect();
    answer(held.remove(1).unwrap());
    answer(held.pop_back().unwrap());
    used.publish();
    held.push_back(queue.take().unwrap().unwrap());
    answer(held.pop_back().unwrap());
    answer(held.pop_back().unwrap());
    used.publish();
}

/// The next server, and what the guest has to get from it.
fn goes_on(guest: &mut Guest, journal: bool) {
    guest.pop();
    let order = guest.order.clone();
    let mut queue = guest.serve(journal).unwrap();
    let chains = guest.rest(&mut queue);
    let taken: Vec<_> = chains.iter().map(Chain::head).collect();
    queue.used().publish();
    guest.pop();
    let left = order.iter().filter(|head| guest.order.contains(head));
    assert_eq!(taken, left.copied().collect::<Vec<_>>(), "in their order");
    chains.into_iter().for_each(answer);
    queue.used().publish();
    guest.pop();
    assert!(guest.outstanding.is_empty());
    // All is as in a queue in which nothing ever went wrong.
    guest.request(2);
    let chain = queue.take().unwrap().unwrap();
    assert_eq!(chain.previous(), None);
    answer(chain);
    queue.used().publish();
    assert_eq!((guest.pop(), queue.used().in_flight()), (1, 0));
}

#[test]
fn whatever_store_is_the_last_each_request_comes_back_once() {
    for (kept, journal) in [(false, false), (false, true), (true, true)] {
        let mut cuts = 0;
        loop {
            let mut guest = Guest::new(kept);
            // Some are done before, so that marks and links of former times are there.
            guest.requests(&[0, 2, 4, 6]);
            goes_on(&mut guest, journal);
            guest.requests(&[6, 0, 2, 4]);
            let killed = crash_injection::after(cuts, || a_day(&guest, journal));
            goes_on(&mut guest, journal);
            if !killed {
                break;
            }
            cuts += 1;
        }
        assert!(cuts > 30, "{cuts} stores");
    }
}

#[test]
fn a_server_that_is_killed_as_it_takes_over_leaves_all_to_the_next() {
    for first in 0..60 {
        for second in 0.. {
            let mut guest = Guest::new(false);
            guest.requests(&[6, 0, 2, 4]);
            crash_injection::after(first, || a_day(&guest, true));
            guest.pop();
            let killed = crash_injection::after(second, || {
                let mut queue = guest.serve(true).unwrap();
                guest.rest(&mut queue).into_iter().for_each(answer);
                queue.used().publish();
            });
            goes_on(&mut guest, true);
            if !killed {
                break;
            }
        }
    }
}

#[test]
fn what_was_noted_of_a_request_is_told_to_the_next_server() {
    let mut guest = Guest::new(false);
    guest.requests(&[4, 2, 6]);
    crash_injection::after(1000, || {
        let mut queue = guest.serve(true).unwrap();
        let mut chains = guest.rest(&mut queue);
        assert!(chains.iter().all(|chain| chain.previous().is_none()));
        chains[0].note_unique(77);
        chains[0].set_intent([5, 6, 7, 8]);
        chains[1].note_unique(78);
        chains[1].set_intent([1, 1, 1, 1]);
        chains[1].set_intent([0; 4]);
        // The process is gone, and nothing is dropped.
        chains.drain(..).for_each(std::mem::forget);
    });
    let mut queue = guest.serve(true).unwrap();
    let chains = guest.rest(&mut queue);
    let previous: Vec<_> = chains
        .iter()
        .map(|chain| chain.previous().unwrap())
        .collect();
    assert_eq!((previous[0].unique, previous[0].intent), (77, [5, 6, 7, 8]));
    assert_eq!((previous[1].unique, previous[1].intent), (78, [0; 4]));
    assert_eq!((previous[2].unique, previous[2].intent), (0, [0; 4]));
}

#[test]
fn a_slot_of_another_taking_is_not_taken_for_this_ones() {
    let mut guest = Guest::new(false);
    guest.request(4);
    // It is answered, by a server with a journal; then taken by one without.
    goes_on(&mut guest, true);
    guest.request(4);
    let mut queue = guest.serve(false).unwrap();
    guest
        .rest(&mut queue)
        .into_iter()
        .for_each(std::mem::forget);
    let mut queue = guest.serve(true).unwrap();
    let chain = queue.take().unwrap().unwrap();
    assert_eq!(chain.previous().unwrap().unique, 0);
    answer(chain);
    queue.used().publish();
    assert_eq!(guest.pop(), 1);
}

#[test]
fn what_a_faulty_driver_does_twice_or_beyond_the_table_is_survived_at_every_cut() {
    for cut in 0.. {
        let mut guest = Guest::new(false);
        guest.requests(&[6, 0, 2, 4]);
        goes_on(&mut guest, true);
        let begin = guest.popped;
        for head in [6, 0, SIZE + 1, 0, 2] {
            guest.driver.offer(head);
        }
        let killed = crash_injection::after(cut, || {
            let mut queue = guest.serve(true).unwrap();
            let chains: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
            let faults: Vec<_> = chains.iter().map(|it| it.as_ref().err()).collect();
            let [index, twice] = [BadChain::Index, BadChain::Twice];
            if crash_injection::is_running() {
                assert_eq!(faults, [None, None, Some(&index), Some(&twice), None]);
            }
            let mut chains = chains.into_iter().flatten();
            answer(chains.nth(1).unwrap());
            queue.used().publish();
            chains.for_each(answer);
            queue.used().publish();
        });
        let mut queue = guest.serve(true).unwrap();
        std::iter::from_fn(|| queue.take())
            .flatten()
            .for_each(answer);
        queue.used().publish();
        assert_eq!(queue.used().in_flight(), 0);
        let mut back: Vec<_> = (begin..guest.driver.used_index())
            .map(|at| guest.driver.used_element(at).0)
            .collect();
        back.sort_unstable();
        // Which of two of the same head is the second may differ, and one may be lost or come
        // twice with it; the others come once.
        back.retain(|head| *head != 0);
        assert_eq!(back, [2, 6, u32::from(SIZE) + 1], "cut {cut}");
        if !killed {
            break;
        }
    }
}

#[test]
fn the_layout_is_that_of_the_specification() {
    let mut guest = Guest::new(false);
    let mut queue = guest.serve(false).unwrap();
    guest.requests(&[6, 2]);
    let mut chains = guest.rest(&mut queue);
    let words = guest.words();
    assert_eq!(words[0], 0, "features");
    assert_eq!(words[1] & 0xffff_ffff, 1 | u64::from(SIZE) << 16);
    assert_eq!(
        (words[2 + 12], words[2 + 13]),
        (1, 1),
        "head 6: inflight, counter"
    );
    assert_eq!((words[2 + 4], words[2 + 5]), (1, 2), "head 2");
    answer(chains.pop_front().unwrap());
    answer(chains.pop_front().unwrap());
    let words = guest.words();
    assert_eq!(words[1] >> 32 & 0xffff, 2, "last_batch_head");
    assert_eq!(words[2 + 4] >> 48, 6, "next");
    assert_eq!(
        (words[2 + 4] & 0xff, words[1] >> 48),
        (1, 0),
        "not shown yet"
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
fn a_region_that_is_damaged_is_refused() {
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
fn a_region_of_a_larger_queue_is_used_and_of_a_smaller_one_is_not() {
    let alarm = Arc::new(MemoryLostEvent::new().unwrap());
    for size in [SIZE * 2, SIZE / 2] {
        let mut guest = Guest::new(false);
        let (file, len) = InflightRegion::create(2, size).unwrap();
        let region = InflightRegion::map(file, (0, len), (2, size), &alarm).unwrap();
        guest.region = region;
        guest.requests(&[6, 2]);
        let tracking = Tracking {
            inflight: guest.part(),
            journal: None,
        };
        let mut queue = guest.driver.tracked(0, Arc::default(), tracking).unwrap();
        let chains = guest.rest(&mut queue);
        assert_eq!(chains.len(), 2);
        chains.into_iter().for_each(std::mem::forget);
        let mut again = guest.serve(false).unwrap();
        let there = again.waiting();
        assert_eq!(there, if size > SIZE { 2 } else { 0 });
        if size > SIZE {
            // A head in flight that the ring doesn't have.
            let words = guest.part().words;
            words.store(entry(SIZE), MARK);
            let error = guest.serve(false).unwrap_err();
            let QueueError::Inflight { source, .. } = error else {
                panic!("{error}");
            };
            assert!(matches!(source, InflightError::Head { head: 8, size: 8 }));
        }
        drop(guest.rest(&mut again));
    }
}

#[test]
fn a_region_that_is_too_short_or_of_no_queue_is_refused() {
    let alarm = Arc::new(MemoryLostEvent::new().unwrap());
    let map = |len: u64, queues, size| {
        let (file, _) = InflightRegion::create(2, SIZE).unwrap();
        InflightRegion::map(file, (0, len), (queues, size), &alarm)
    };
    let whole = InflightRegion::create(2, SIZE).unwrap().1;
    assert!(map(whole, 2, SIZE).is_ok());
    let short = map(whole - 1, 2, SIZE);
    assert!(matches!(short, Err(InflightError::Short { .. })));
    // What the message says is longer than the file.
    let lie = map(1 << 20, 100, SIZE);
    assert!(matches!(lie, Err(InflightError::Memory(_))));
    for (queues, size) in [(0, 8), (1, 0), (1, 32769)] {
        let none = map(whole, queues, size);
        assert!(matches!(none, Err(InflightError::Shape { .. })));
    }
    assert!(map(whole, 2, SIZE).unwrap().part(QueueIndex(2)).is_none());
}

#[test]
fn rings_of_another_time_begin_afresh_where_the_front_end_says() {
    let mut guest = Guest::new(false);
    (0..40).for_each(|_| goes_on(&mut guest, false));
    guest.requests(&[6, 2]);
    let mut queue = guest.serve(false).unwrap();
    guest
        .rest(&mut queue)
        .into_iter()
        .for_each(std::mem::forget);
    // The guest boots anew.
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
    let chains = guest.rest(&mut queue);
    assert_eq!(chains.iter().map(Chain::head).collect::<Vec<_>>(), [4]);
    assert_eq!(chains[0].previous(), None);
}

#[test]
fn a_guest_is_called_for_what_it_may_have_missed() {
    use rustix::event::{EventfdFlags, eventfd};
    let guest = Guest::new(false);
    for past in [false, true] {
        if !past {
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
        assert_eq!(rustix::io::read(&fd, &mut [0; 8]).is_ok(), past);
    }
}

#[test]
fn memory_that_is_taken_away_is_told() {
    let alarm = Arc::new(MemoryLostEvent::new().unwrap());
    let fd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(0x10000).unwrap();
    let map = file.try_clone().unwrap();
    let region = InflightRegion::map(map, (0, 0x10000), (2, 1024), &alarm).unwrap();
    let mut guest = Guest::new(false);
    guest.region = region;
    let inflight = guest.part();
    let tracking = Tracking {
        inflight,
        journal: None,
    };
    let mut queue = guest.driver.tracked(0, Arc::default(), tracking).unwrap();
    assert_eq!(alarm.place(), None);
    file.set_len(0).unwrap();
    guest.request(2);
    guest.rest(&mut queue).into_iter().for_each(answer);
    queue.used().publish();
    assert_eq!(guest.pop(), 1);
    assert!(alarm.place().unwrap() >= InflightRegion::GONE);
}

#[test]
fn a_region_of_our_own_can_not_be_shortened() {
    let (file, len) = InflightRegion::create(2, SIZE).unwrap();
    assert!(file.set_len(0).is_err());
    assert_eq!(file.metadata().unwrap().len(), len);
}

/// What happens in a life of a server and around it.
#[derive(Clone, Copy, Debug)]
enum Step {
    Request(u16),
    Pop,
    Take,
    Answer(usize),
    Publish,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..SIZE / 2).prop_map(|head| Step::Request(2 * head)),
        1 => Just(Step::Pop),
        3 => Just(Step::Take),
        3 => (0usize..8).prop_map(Step::Answer),
        1 => Just(Step::Publish),
    ];
    prop::collection::vec(step, 0..40)
}

fn live(guest: &mut Guest, steps: &[Step], journal: bool) {
    let mut queue = guest.serve(journal).unwrap();
    let mut held = Vec::new();
    for step in steps {
        match *step {
            Step::Request(head) => guest.request(head),
            Step::Pop => {
                guest.pop();
            }
            Step::Take => match queue.take() {
                Some(Ok(chain)) => held.push(chain),
                // A process that is gone takes nothing, and finds marks that it took off.
                Some(Err(fault)) => assert!(!crash_injection::is_running(), "{fault}"),
                None => (),
            },
            Step::Answer(which) if !held.is_empty() => {
                answer(held.swap_remove(which % held.len()));
            }
            Step::Answer(_) => (),
            Step::Publish => queue.used().publish(),
        }
    }
    held.into_iter().for_each(std::mem::forget);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Servers live and are killed, and the guest goes on: each of its requests comes back once,
    /// with its own reply.
    #[test]
    fn through_any_lives_each_request_comes_back_once(
        lives in prop::collection::vec((steps(), 0usize..120), 1..5),
        kept in any::<bool>(),
        journal in any::<bool>(),
    ) {
        let mut guest = Guest::new(kept);
        for (steps, stores) in lives {
            crash_injection::after(stores, || live(&mut guest, &steps, journal));
            guest.pop();
        }
        goes_on(&mut guest, journal);
    }

    /// Whatever a region says, it is refused or served, and no chain is served twice.
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
            let chains: Vec<_> = std::iter::from_fn(|| queue.take()).flatten().collect();
            let mut heads: Vec<_> = chains.iter().map(Chain::head).collect();
            heads.sort_unstable();
            let count = heads.len();
            heads.dedup();
            prop_assert_eq!(heads.len(), count);
            prop_assert!(count <= there);
        }
    }
}
