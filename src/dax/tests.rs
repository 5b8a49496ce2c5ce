//! The window against VMMs of two kinds: one that replaces mappings, as those do that map with
//! `MAP_FIXED`, and one that refuses to, as the specification says.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rustix::io::Errno;

use super::window::errno_of;
use super::{DaxOptions, MapRequest, NamePatterns, RANGE, Window, page_size};
use crate::device::{BackChannel, BackChannelError, BackendRequest, SharedMapping};
use crate::state::{Limits, MappingState, Table};

const WINDOW: u64 = 8 * RANGE;

/// What a VMM has mapped, and how it behaves.
#[derive(Debug, Default)]
struct Vmm {
    mapped: BTreeMap<u64, SharedMapping>,
    replaces: bool,
    /// It refuses to remove only what isn't there.
    is_honest: bool,
    requests: usize,
    /// Requests to remove what isn't there.
    wrong_removals: usize,
    /// Answers to the next requests, instead of doing them; `true`: after it was done.
    faults: Vec<(BackChannelError, bool)>,
}

#[derive(Debug, Default)]
struct Channel(Mutex<Vmm>);

impl BackChannel for Channel {
    fn request(
        &self,
        request: BackendRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), BackChannelError> {
        let mut vmm = self.0.lock().unwrap();
        vmm.requests += 1;
        let fault = vmm.faults.pop();
        let removes = matches!(request, BackendRequest::UnmapSharedMemory(_));
        let fault = fault.filter(|(fault, _)| {
            // A VMM that has a mapping doesn't refuse to remove it, unless it is told to.
            !(removes && vmm.is_honest && matches!(fault, BackChannelError::Refused(_)))
        });
        if let Some((fault, false)) = fault {
            return Err(fault);
        }
        vmm.serve(request, fd.is_some())?;
        fault.map_or(Ok(()), |(fault, _)| Err(fault))
    }
}

impl Vmm {
    fn serve(&mut self, request: BackendRequest, has_fd: bool) -> Result<(), BackChannelError> {
        let einval = BackChannelError::Refused((-22_i64).cast_unsigned());
        match request {
            BackendRequest::MapSharedMemory(mapping) => {
                assert!(has_fd);
                let end = mapping.offset + mapping.len;
                let overlaps =
                    |it: &SharedMapping| it.offset < end && mapping.offset < it.offset + it.len;
                let same =
                    |it: &SharedMapping| (it.offset, it.len) == (mapping.offset, mapping.len);
                let in_the_way = self.mapped.values().filter(|it| overlaps(it));
                for other in in_the_way {
                    // No operation of the window may do this, whatever the VMM supports.
                    assert!(same(other), "{mapping:?} cuts {other:?}");
                    if !self.replaces {
                        return Err(einval);
                    }
                }
                self.mapped.insert(mapping.offset, mapping);
            }
            BackendRequest::UnmapSharedMemory(mapping) => {
                let len = self.mapped.get(&mapping.offset).map(|it| it.len);
                if len != Some(mapping.len) {
                    self.wrong_removals += 1;
                    return Err(einval);
                }
                self.mapped.remove(&mapping.offset);
            }
            BackendRequest::ConfigChanged => panic!("not a request of the window"),
        }
        Ok(())
    }
}

struct Scene {
    window: Arc<Window>,
    channel: Arc<Channel>,
    table: Arc<Table>,
}

fn table() -> Arc<Table> {
    Table::for_this_process(&Limits {
        inodes: 0,
        handles: 0,
        queues: 1,
    })
    .unwrap()
}

fn scene(replaces: bool) -> Scene {
    let channel = Arc::new(Channel::default());
    channel.0.lock().unwrap().replaces = replaces;
    let table = table();
    Scene {
        window: window(&table, &channel),
        channel,
        table,
    }
}

fn window(table: &Arc<Table>, channel: &Arc<Channel>) -> Arc<Window> {
    let options = DaxOptions {
        window: WINDOW,
        marked_from: 0,
        names: NamePatterns::default(),
        writable: true,
    };
    let window = Window::new(&options, Arc::clone(table));
    window.connect(Arc::clone(channel) as _);
    window
}

/// Opens anything; nothing is mapped here.
fn open(_node: u64, _writable: bool) -> Result<OwnedFd, Errno> {
    Ok(File::open("/dev/null").unwrap().into())
}

/// Opens for reading only, as a read-only share does.
fn open_to_read(node: u64, writable: bool) -> Result<OwnedFd, Errno> {
    if writable {
        Err(Errno::ROFS)
    } else {
        open(node, writable)
    }
}

fn request(slot: u64, writable: bool) -> MapRequest {
    MapRequest {
        node: 7,
        file_offset: slot * RANGE,
        offset: slot * RANGE,
        len: RANGE,
        writable,
    }
}

impl Scene {
    fn map(&self, request: &MapRequest) -> Result<(), Errno> {
        self.window.map(self.window.epoch(), request, &open)
    }

    fn unmap(&self, ranges: &[(u64, u64)]) -> Result<(), Errno> {
        self.window.unmap_ranges(self.window.epoch(), ranges, &open)
    }

    fn vmm<T>(&self, look: impl FnOnce(&mut Vmm) -> T) -> T {
        look(&mut self.channel.0.lock().unwrap())
    }

    fn fail_next(&self, fault: BackChannelError, done: bool) {
        self.vmm(|vmm| vmm.faults.push((fault, done)));
    }

    fn mapped(&self) -> Vec<(u64, bool)> {
        self.vmm(|vmm| {
            vmm.mapped
                .values()
                .map(|it| (it.offset, it.writable))
                .collect()
        })
    }

    /// The state of the only record.
    fn state(&self) -> MappingState {
        let records = self.table.mappings();
        assert_eq!(records.len(), 1);
        records[0].state()
    }

    /// A process that takes over.
    fn next_process(self) -> Self {
        Self {
            window: window(&self.table, &self.channel),
            ..self
        }
    }
}

#[test]
fn mapping_is_made_once_upgraded_and_removed() {
    for replaces in [true, false] {
        let scene = scene(replaces);
        scene.map(&request(0, false)).unwrap();
        // A VMM that can't replace a mapping gets it writable from the beginning.
        assert_eq!(scene.mapped(), [(0, !replaces)]);
        let requests = scene.vmm(|vmm| vmm.requests);
        scene.map(&request(0, false)).unwrap();
        assert_eq!(scene.vmm(|vmm| vmm.requests), requests, "it is there");
        scene.map(&request(0, true)).unwrap();
        assert_eq!(scene.mapped(), [(0, true)]);
        let upgrades = usize::from(replaces);
        assert_eq!(scene.vmm(|vmm| vmm.requests), requests + upgrades);
        scene.map(&request(1, false)).unwrap();
        assert_eq!(scene.mapped(), [(0, true), (RANGE, !replaces)]);
        scene
            .unmap(&[(0, RANGE), (RANGE, RANGE), (0, RANGE)])
            .unwrap();
        assert_eq!(scene.mapped(), []);
        assert_eq!(scene.table.mappings().len(), 0);
        scene.unmap(&[(0, WINDOW)]).unwrap();
    }
}

#[test]
fn read_only_mapping_stays_read_only_where_the_file_cannot_be_written() {
    for replaces in [true, false] {
        let scene = scene(replaces);
        let map = |request: MapRequest| {
            let epoch = scene.window.epoch();
            scene.window.map(epoch, &request, &open_to_read)
        };
        map(request(0, false)).unwrap();
        map(request(1, false)).unwrap();
        assert_eq!(map(request(0, true)), Err(Errno::ROFS));
        assert_eq!(map(request(2, true)), Err(Errno::ROFS));
        assert_eq!(scene.mapped(), [(0, false), (RANGE, false)]);
    }
}

#[test]
fn invalid_ranges_are_refused_without_a_request() {
    let scene = scene(true);
    scene.map(&request(1, true)).unwrap();
    let requests = scene.vmm(|vmm| vmm.requests);
    let page = page_size();
    let with = |offset, len, file_offset| MapRequest {
        offset,
        len,
        file_offset,
        ..request(0, false)
    };
    for bad in [
        with(0, 0, 0),
        with(0, page - 1, 0),
        with(1, page, 0),
        with(0, page, 1),
        with(WINDOW, page, 0),
        with(WINDOW - page, 2 * page, 0),
        with(u64::MAX - page + 1, page, 0),
        with(0, u64::MAX - page + 1, 0),
        with(0, page, i64::MAX.cast_unsigned() - page + 2),
        with(0, page, u64::MAX - page + 1),
        // Parts of the mapping that is there.
        with(RANGE, page, 0),
        with(2 * RANGE - page, 2 * page, 0),
        with(RANGE + page, page, 0),
    ] {
        assert_eq!(scene.map(&bad), Err(Errno::INVAL), "{bad:?}");
    }
    for bad in [
        (RANGE, page),
        (0, RANGE + page),
        (2 * RANGE - page, RANGE),
        (0, 1),
        (WINDOW, page),
    ] {
        assert_eq!(
            scene.unmap(&[(RANGE, RANGE), bad]),
            Err(Errno::INVAL),
            "{bad:?}"
        );
    }
    assert_eq!(scene.vmm(|vmm| vmm.requests), requests);
    assert_eq!(scene.mapped(), [(RANGE, true)]);
    // Whole mappings within a larger range are removed before it is mapped.
    scene.map(&with(0, 4 * RANGE, 0)).unwrap();
    assert_eq!(scene.mapped(), [(0, false)]);
}

#[test]
fn refusal_is_an_errno_and_leaves_the_range_free() {
    let scene = scene(true);
    scene.fail_next(BackChannelError::Refused((-19_i64).cast_unsigned()), false);
    assert_eq!(scene.map(&request(0, true)), Err(Errno::NODEV));
    assert_eq!((scene.mapped(), scene.window.mappings()), (vec![], 0));
    // A mapping that is there survives a refused replacement.
    scene.map(&request(0, false)).unwrap();
    scene.fail_next(BackChannelError::Refused(1), false);
    assert_eq!(scene.map(&request(0, true)), Err(Errno::IO));
    assert_eq!(scene.mapped(), [(0, false)]);
    assert_eq!(scene.state(), MappingState::Made);
    scene.map(&request(0, true)).unwrap();
    assert_eq!(scene.mapped(), [(0, true)]);
    scene.fail_next(BackChannelError::Refused(1), false);
    assert_eq!(scene.unmap(&[(0, RANGE)]), Err(Errno::IO));
    scene.unmap(&[(0, RANGE)]).unwrap();
    assert_eq!(scene.mapped(), []);
}

#[test]
fn errnos_are_those_of_the_vmm_but_never_one_that_is_retried() {
    let refused = |value: i64| errno_of(&BackChannelError::Refused(value.cast_unsigned()));
    assert_eq!(refused(-12), Errno::NOMEM);
    for value in [
        1,
        0,
        -i64::from(libc::EAGAIN),
        -i64::from(libc::EINTR),
        -4096,
        i64::MIN,
    ] {
        assert_eq!(refused(value), Errno::IO, "{value}");
    }
    assert_eq!(errno_of(&BackChannelError::Interrupted), Errno::AGAIN);
    assert_eq!(errno_of(&BackChannelError::NotConnected), Errno::OPNOTSUPP);
    assert_eq!(errno_of(&BackChannelError::TimedOut), Errno::IO);
}

#[test]
fn unanswered_request_is_repeated_by_the_next_process() {
    for replaces in [true, false] {
        for done in [true, false] {
            let mut scene = scene(replaces);
            scene.fail_next(BackChannelError::TimedOut, done);
            assert_eq!(scene.map(&request(0, true)), Err(Errno::IO));
            assert_eq!(scene.state(), MappingState::Unsure);
            // As a process that replays the request.
            scene = scene.next_process();
            scene.map(&request(0, true)).unwrap();
            assert_eq!(
                (scene.mapped(), scene.state()),
                (vec![(0, true)], MappingState::Made)
            );
            scene.fail_next(BackChannelError::Interrupted, done);
            assert_eq!(scene.unmap(&[(0, RANGE)]), Err(Errno::AGAIN));
            scene = scene.next_process();
            scene.unmap(&[(0, RANGE)]).unwrap();
            assert_eq!((scene.mapped(), scene.window.mappings()), (vec![], 0));
            assert_eq!(scene.vmm(|vmm| vmm.wrong_removals), 0);
        }
    }
}

#[test]
fn interrupted_upgrade_is_completed() {
    for done in [true, false] {
        let mut scene = scene(true);
        scene.map(&request(0, false)).unwrap();
        scene.fail_next(BackChannelError::Interrupted, done);
        assert_eq!(scene.map(&request(0, true)), Err(Errno::AGAIN));
        scene = scene.next_process();
        scene.map(&request(0, true)).unwrap();
        assert_eq!(scene.mapped(), [(0, true)]);
    }
}

#[test]
fn discarded_mappings_are_removed_and_late_requests_fail() {
    let scene = scene(true);
    for slot in 0..4 {
        scene.map(&request(slot, true)).unwrap();
    }
    let before = scene.window.epoch();
    scene.window.discard();
    let late = scene.window.map(before, &request(5, true), &open);
    assert_eq!(late, Err(Errno::IO));
    assert_eq!(
        scene.window.unmap_ranges(before, &[(0, RANGE)], &open),
        Err(Errno::IO)
    );
    scene.window.finish();
    assert_eq!((scene.mapped(), scene.window.mappings()), (vec![], 0));
    assert_eq!(scene.table.mappings().len(), 0);
}

#[test]
fn stale_mapping_is_in_nobodys_way() {
    let scene = scene(false);
    scene.map(&request(0, true)).unwrap();
    scene.map(&request(1, true)).unwrap();
    // As if the VMM hadn't answered to the sweep.
    for record in scene.table.mappings() {
        record.set_state(MappingState::Stale);
    }
    let part = MapRequest {
        len: page_size(),
        ..request(1, true)
    };
    scene.map(&part).unwrap();
    scene.map(&request(0, false)).unwrap();
    assert_eq!(scene.mapped(), [(0, false), (RANGE, true)]);
}

#[test]
fn vmm_that_reconnects_gets_all_mappings_again() {
    for replaces in [true, false] {
        let first = scene(replaces);
        for slot in 0..3 {
            first.map(&request(slot, true)).unwrap();
        }
        // One VMM has kept them, another has lost them.
        for kept in [true, false] {
            let channel = Arc::new(Channel::default());
            let mapped = first.vmm(|vmm| vmm.mapped.clone());
            let mut vmm = channel.0.lock().unwrap();
            vmm.replaces = replaces;
            if kept {
                vmm.mapped = mapped;
            }
            drop(vmm);
            let next = Scene {
                window: window(&first.table, &channel),
                channel,
                table: Arc::clone(&first.table),
            };
            next.window.opened(true, open);
            next.window.finish();
            assert_eq!(next.mapped(), first.mapped());
            assert_eq!(next.window.mappings(), 3);
        }
    }
}

#[test]
fn number_of_mappings_is_limited() {
    let scene = scene(true);
    let page = page_size();
    let small = |slot: u64| MapRequest {
        offset: slot * page,
        len: page,
        ..request(0, true)
    };
    // The window has fewer pages than there may be mappings.
    for slot in 0..WINDOW / page {
        scene.map(&small(slot)).unwrap();
    }
    assert_eq!(scene.window.mappings() as u64, WINDOW / page);
    scene.unmap(&[(0, WINDOW)]).unwrap();
    assert_eq!(scene.window.mappings(), 0);
}

/// What the guest does.
#[derive(Clone, Debug)]
enum Act {
    Map(MapRequest),
    Unmap(u64, u64),
    NextProcess,
    Discard,
}

fn act() -> impl Strategy<Value = Act> {
    let pages = 0..WINDOW / page_size() + 2;
    let range =
        (pages.clone(), pages).prop_map(|(at, len)| (at * page_size(), len % 40 * page_size()));
    let slots = (0..9_u64, 0..3_u64).prop_map(|(slot, len)| (slot * RANGE, len * RANGE));
    let range = prop_oneof![range, slots];
    let map = (range.clone(), 1..4_u64, 0..4_u64, any::<bool>()).prop_map(
        |((offset, len), node, at, writable)| {
            Act::Map(MapRequest {
                node,
                file_offset: at * RANGE,
                offset,
                len,
                writable,
            })
        },
    );
    let unmap = range.prop_map(|(offset, len)| Act::Unmap(offset, len));
    prop_oneof![6 => map, 3 => unmap, 1 => Just(Act::NextProcess), 1 => Just(Act::Discard)]
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever the guest asks for and whatever requests fail, the table names what the VMM has
    /// mapped, and once nothing fails the VMM has what the guest was told.
    #[test]
    fn table_names_what_the_vmm_has_mapped(
        replaces in any::<bool>(),
        acts in proptest::collection::vec((act(), 0..12_u8), 1..60),
    ) {
        let mut scene = scene(replaces);
        scene.vmm(|vmm| vmm.is_honest = true);
        let mut told: BTreeMap<u64, MapRequest> = BTreeMap::new();
        for (act, fault) in acts {
            scene.vmm(|vmm| vmm.faults.clear());
            match fault {
                0 => scene.fail_next(BackChannelError::TimedOut, true),
                1 => scene.fail_next(BackChannelError::Interrupted, false),
                2 => scene.fail_next(BackChannelError::Refused(1), false),
                _ => {}
            }
            match act {
                Act::Map(request) => {
                    let end = request.offset.saturating_add(request.len);
                    let before = told.clone();
                    let result = scene.map(&request);
                    if result == Err(Errno::INVAL) {
                        prop_assert_eq!(&told, &before);
                        continue;
                    }
                    // What it covers is gone, or is doubtful if it has failed.
                    told.retain(|_, it| it.offset + it.len <= request.offset || it.offset >= end);
                    if result.is_ok() {
                        told.insert(request.offset, request);
                    }
                }
                Act::Unmap(offset, len) => {
                    if scene.unmap(&[(offset, len)]) != Err(Errno::INVAL) {
                        let end = offset.saturating_add(len);
                        told.retain(|_, it| it.offset + it.len <= offset || it.offset >= end);
                    }
                }
                Act::NextProcess => scene = scene.next_process(),
                Act::Discard => {
                    scene.window.discard();
                    scene.window.finish();
                    told.clear();
                }
            }
            let recorded: Vec<_> = scene.table.mappings().iter().map(|it| it.fields()).collect();
            let mapped = scene.vmm(|vmm| vmm.mapped.clone());
            for mapping in mapped.values() {
                let same = |offset, len| (offset, len) == (mapping.offset, mapping.len);
                let is_recorded = recorded.iter().any(|it| same(it.offset, it.len));
                prop_assert!(is_recorded, "{mapping:?} is in no record");
            }
            for request in told.values() {
                let mapping = mapped.get(&request.offset);
                let is_right = mapping.is_some_and(|it| {
                    (it.len, it.file_offset) == (request.len, request.file_offset)
                        && (it.writable || !request.writable)
                });
                prop_assert!(is_right, "{request:?} is mapped as {mapping:?}");
            }
        }
    }
}
