//! Whole requests: off a ring, through decoding, dispatch and a real directory, and back.
//!
//! An input is a session: requests in batches, with node ids and handles that earlier replies
//! returned (or not), laid out on the ring in one of several forms. What must hold: every chain is
//! returned, every reply counts its own bytes, nothing outside of the shared directory changes, and
//! nothing is left open after the session.
//!
//! A fuzzer's own work for each input costs as much as dozens of requests. So an input is played in
//! rounds, until there were enough: in each the requests come in another order, and each is for
//! another node and handle than before.
//!
//! One request of the input is: opcode, node, handle, layout (one byte each), the length of the
//! arguments (two bytes), the arguments.

use std::sync::Arc;

use ringfsd::fs::FileSystem;
use ringfsd::fs::passthrough::Passthrough;
use ringfsd::internals::dax::{DaxOptions, NamePatterns};
use ringfsd::internals::fuse::{Outcome, Session, SessionOptions};
use ringfsd::internals::state::{Limits, Table};
use ringfsd::internals::virtqueue::{Features, Queue};
use ringfsd::io::{Engine, Runtime, spawn};

use crate::count;
use crate::guest::{DESCRIPTOR_LEN, DESCRIPTORS, Guest, INDIRECT, NEXT, WRITE, descriptor};
use crate::share::Share;
use crate::source::Source;
use crate::transport::OnChain;
use crate::window::{Vmm, WINDOW};

/// Requests on the ring at once.
const BATCH: u16 = 16;
/// Descriptors of each request.
const EACH: u16 = 8;

/// Where each request of a batch has its bytes, and how many.
const REQUESTS: u64 = 0x10000;
/// Room of each.
const REQUEST_LEN: u64 = 0x800;
/// Where each reply goes.
const REPLIES: u64 = 0x20000;
/// Room of each.
const REPLY_LEN: u64 = 0x1000;

/// After so many requests an input has been played enough,
const ENOUGH: usize = 256;
/// or after so many rounds.
const ROUNDS: u8 = 32;

/// What is shared between inputs: a directory, and the file system on it.
struct Scene {
    guest: Guest,
    runtime: Runtime,
    fs: Arc<Passthrough>,
    share: Share,
    /// Of the DAX window.
    table: Arc<Table>,
}

impl Scene {
    fn new() -> Self {
        let share = Share::new();
        let fs = Passthrough::new(&share.path(), Share::options()).expect("a file system");
        fs.prepare_thread().expect("a thread");
        // Truncating, allocating and writing beyond the limit shall fail.
        Share::limit_files();
        Self {
            guest: Guest::new(BATCH * EACH),
            runtime: Runtime::new(Engine::ThreadPool).expect("a runtime"),
            fs: Arc::new(fs),
            share,
            table: Table::for_this_process(&Limits {
                inodes: 0,
                handles: 0,
                queues: 1,
            })
            .expect("a table"),
        }
    }
}

/// One input.
pub fn run(data: &[u8]) {
    thread_local! {
        static SCENE: std::cell::RefCell<Scene> = std::cell::RefCell::new(Scene::new());
    }
    SCENE.with_borrow_mut(|scene| with(scene, Source::new(data)));
}

fn with(scene: &mut Scene, mut source: Source<'_>) {
    let flags = source.u8();
    let options = SessionOptions {
        posix_locks: flags & 1 != 0,
        flock: flags & 2 != 0,
        cache_symlinks: flags & 4 != 0,
        kill_set_id: flags & 8 != 0,
        idmap: flags & 32 != 0,
        dax: (flags & 64 != 0).then_some(DaxOptions {
            window: WINDOW,
            marked_from: 0,
            names: NamePatterns::default(),
            writable: flags & 1 == 0,
        }),
        ..SessionOptions::default()
    };
    let vmm = Arc::new(Vmm::new(if flags & 64 != 0 { source.u8() } else { 0 }));
    let session = Session::new(Arc::clone(&scene.fs), options);
    let session = Arc::new(session.remembering(Arc::clone(&scene.table)));
    session.connected(&(Arc::clone(&vmm) as _));
    let mut queue = scene.guest.queue(Features {
        event_idx: flags & 16 != 0,
        indirect: true,
    });
    let mut play = Play {
        guest: &mut scene.guest,
        session: &session,
        nodes: vec![1],
        handles: vec![0],
        unique: 0,
        tables: [0; _],
    };
    let mut records = Vec::new();
    while let Some(record) = Record::next(&mut source) {
        records.push(record);
    }
    let mut played = 0;
    for round in 0..ROUNDS {
        // A session begins with INIT, as a guest's does, unless the input wants to see it without.
        // The later rounds mostly continue with it.
        if flags & 0x80 == 0 && round % 4 == 0 {
            play.begin(&scene.runtime, &mut queue);
        }
        for batch in records.chunks(BATCH.into()) {
            play.batch(&scene.runtime, &mut queue, batch);
        }
        played += records.len();
        if played == 0 || played >= ENOUGH {
            break;
        }
        let last = records.len() - 1;
        records.rotate_left(usize::from(round).min(last));
        records.iter_mut().for_each(Record::vary);
    }
    session.reset();
    session.finish_mappings();
    assert_eq!(vmm.mappings(), 0, "mapped after the session");
    assert_eq!(scene.fs.open_handles(), 0, "open after the session");
    assert_eq!(scene.fs.known_inodes(), 1, "known after the session");
    assert_eq!(scene.fs.inode_descriptors(), 1);
    scene.share.check_outside();
    scene.share.clear();
}

/// One request as the input has it.
struct Record<'a> {
    opcode: u8,
    node: u8,
    handle: u8,
    layout: u8,
    arguments: &'a [u8],
}

impl<'a> Record<'a> {
    fn next(source: &mut Source<'a>) -> Option<Self> {
        if source.is_empty() {
            return None;
        }
        let [opcode, node, handle, layout] = [(); 4].map(|()| source.u8());
        let len = usize::from(source.u16() % 0x600);
        Some(Self {
            opcode: opcode % 64,
            node,
            handle,
            layout,
            arguments: source.bytes(len),
        })
    }

    /// Makes it one for another node, with another handle, in other pieces.
    fn vary(&mut self) {
        if self.node != 0xff {
            self.node = (self.node + 1) % 0xff;
        }
        if self.handle != 0xff {
            self.handle = (self.handle + 1) % 0xff;
        }
        self.layout = self.layout & !3 | self.layout.wrapping_add(1) & 3;
    }
}

/// A session in progress.
struct Play<'a> {
    guest: &'a mut Guest,
    session: &'a Arc<Session<Passthrough>>,
    nodes: Vec<u64>,
    handles: Vec<u64>,
    unique: u64,
    /// The descriptors of a batch, which go to the guest's memory at once.
    tables: [u8; DESCRIPTOR_LEN * (BATCH * EACH) as usize],
}

impl Play<'_> {
    /// INIT. A few of the nodes and handles of the session before are kept, which are stale then.
    fn begin(&mut self, runtime: &Runtime, queue: &mut Queue) {
        self.nodes.truncate(8);
        self.handles.truncate(8);
        let mut init = vec![0; 64];
        init[..16].copy_from_slice(&[7, 0, 0, 0, 45, 0, 0, 0, 0, 0, 2, 0, 0xff, 0xff, 0xff, 0x7f]);
        init[16..20].copy_from_slice(&[0xff; 4]);
        let init = Record {
            opcode: 26,
            node: 0,
            handle: 0xff,
            layout: 0,
            arguments: &init,
        };
        self.batch(runtime, queue, &[init]);
    }

    fn batch(&mut self, runtime: &Runtime, queue: &mut Queue, records: &[Record<'_>]) {
        let before = self.guest.used();
        let heads: Vec<u16> = (0..)
            .zip(records)
            .map(|(slot, record)| self.put(slot, record))
            .collect();
        self.guest.write(DESCRIPTORS, &self.tables);
        self.guest.make_available(&heads);
        runtime.block_on(async {
            let mut later = Vec::new();
            while let Some(chain) = queue.pop() {
                let Ok(chain) = chain else { continue };
                match self.session.serve(OnChain(chain)) {
                    Outcome::Done => {}
                    Outcome::Later(request) => later.push(spawn(request)),
                }
            }
            // What waits for a lock would wait for ever.
            let _no_waits = self.session.end_waits();
            for request in later {
                request.await.expect("no panic");
            }
        });
        queue.used().publish();
        assert_eq!(queue.used().in_flight(), 0, "a chain is stuck");
        assert_eq!(self.guest.used(), self.guest.available(), "all came back");
        assert_eq!(queue.used().stats().dropped, 0, "a request was given up");
        for (head, len) in self.guest.used_elements(before) {
            let slot = u16::try_from(head).unwrap_or_default() / EACH;
            if let Some(record) = records.get(usize::from(slot)) {
                self.learn(slot, record, len);
            }
        }
        count::add(records.len());
    }

    /// Lays a request out on the ring; answers its head.
    fn put(&mut self, slot: u16, record: &Record<'_>) -> u16 {
        self.unique += 2;
        let mut bytes = vec![0; 40];
        let node = match record.node {
            0xff => u64::from(record.layout) << 8,
            at => self.nodes[usize::from(at) % self.nodes.len()],
        };
        bytes.extend_from_slice(record.arguments);
        let told = match record.layout >> 4 & 3 {
            3 => u32::from(record.node) << (record.handle & 0x1f),
            _ => u32::try_from(bytes.len()).unwrap_or_default(),
        };
        bytes[..4].copy_from_slice(&told.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::from(record.opcode).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.unique.to_le_bytes());
        bytes[16..24].copy_from_slice(&node.to_le_bytes());
        if record.layout & 0x40 != 0 {
            bytes[24..28].copy_from_slice(&1000_u32.to_le_bytes());
            bytes[28..32].copy_from_slice(&1000_u32.to_le_bytes());
        }
        if record.handle != 0xff {
            let handle = self.handles[usize::from(record.handle) % self.handles.len()];
            for at in handles_of(record.opcode) {
                if let Some(place) = bytes.get_mut(40 + at..48 + at) {
                    place.copy_from_slice(&handle.to_le_bytes());
                }
            }
            for at in nodes_of(record.opcode) {
                if let Some(place) = bytes.get_mut(40 + at..48 + at) {
                    let other = self.nodes[usize::from(record.handle) % self.nodes.len()];
                    place.copy_from_slice(&other.to_le_bytes());
                }
            }
        }
        let from = REQUESTS + u64::from(slot) * REQUEST_LEN;
        self.guest.write(from, &bytes);
        let readable = u32::try_from(bytes.len()).unwrap_or_default();
        let to = REPLIES + u64::from(slot) * REPLY_LEN;
        let mut pieces: Vec<(u64, u32, u16)> = match record.layout & 3 {
            0 | 3 => vec![(from, readable, 0)],
            1 => vec![(from, 40, 0), (from + 40, readable - 40, 0)],
            _ => vec![
                (from, 7, 0),
                (from + 7, 40, 0),
                (from + 47, readable.saturating_sub(47), 0),
            ],
        };
        match record.layout >> 2 & 3 {
            0 => pieces.push((to, 0x1000, WRITE)),
            1 => pieces.push((to, u32::from(record.handle), WRITE)),
            2 => pieces.extend([
                (to, 16, WRITE),
                (to + 16, 7, WRITE),
                (to + 23, 0x800, WRITE),
            ]),
            _ => {}
        }
        self.lay(slot, &pieces, record.layout & 3 == 3)
    }

    fn lay(&mut self, slot: u16, pieces: &[(u64, u32, u16)], indirect: bool) -> u16 {
        let head = slot * EACH;
        let first = if indirect { 0 } else { head };
        let mut table = Vec::new();
        for (at, (address, len, write)) in (first..).zip(pieces) {
            let last = usize::from(at - first) + 1 == pieces.len();
            let next = if last { 0 } else { NEXT };
            table.extend_from_slice(&descriptor(*address, *len, write | next, at + 1));
        }
        if indirect {
            let at = 0x50000 + u64::from(slot) * 0x80;
            let len = u32::try_from(table.len()).unwrap_or_default();
            self.guest.write(at, &table);
            table = descriptor(at, len, INDIRECT, 0).to_vec();
        }
        let own = DESCRIPTOR_LEN * usize::from(head);
        self.tables[own..own + table.len()].copy_from_slice(&table);
        head
    }

    /// Checks a reply, and keeps what later requests may use of it.
    fn learn(&mut self, slot: u16, record: &Record<'_>, used: u32) {
        if used == 0 {
            return;
        }
        let mut reply = [0; 160];
        self.guest
            .read(REPLIES + u64::from(slot) * REPLY_LEN, &mut reply);
        if record.layout >> 2 & 3 != 2 && used >= 16 {
            let told = u32::from_le_bytes(reply[..4].try_into().expect("four bytes"));
            assert_eq!(told, used, "a reply says how long it is");
        }
        let error = i32::from_le_bytes(reply[4..8].try_into().expect("four bytes"));
        assert!((-4095..=0).contains(&error), "{error}");
        if error != 0 {
            return;
        }
        let number = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().expect("eight"));
        match record.opcode {
            // LOOKUP, SYMLINK, MKNOD, MKDIR, LINK
            1 | 6 | 8 | 9 | 13 => keep(&mut self.nodes, number(16)),
            // OPEN, OPENDIR
            14 | 27 => keep(&mut self.handles, number(16)),
            // CREATE, TMPFILE
            35 | 51 => {
                keep(&mut self.nodes, number(16));
                keep(&mut self.handles, number(16 + 128));
            }
            _ => {}
        }
    }
}

fn keep(numbers: &mut Vec<u64>, number: u64) {
    if numbers.len() < 200 {
        numbers.push(number);
    }
}

/// Where an opcode's arguments have handles.
fn handles_of(opcode: u8) -> &'static [usize] {
    match opcode {
        // READ, WRITE, RELEASE, FSYNC, FLUSH, READDIR, RELEASEDIR, FSYNCDIR, the locks, IOCTL,
        // POLL, FALLOCATE, READDIRPLUS, LSEEK
        15 | 16 | 18 | 20 | 25 | 28 | 29 | 30 | 31 | 32 | 33 | 39 | 40 | 43 | 44 | 46 => &[0],
        // COPY_FILE_RANGE
        47 | 53 => &[0, 24],
        // GETATTR, SETATTR, STATX
        3 | 4 | 52 => &[8],
        _ => &[],
    }
}

/// Where they have further nodes.
fn nodes_of(opcode: u8) -> &'static [usize] {
    match opcode {
        // RENAME, LINK, RENAME2
        12 | 13 | 45 => &[0],
        // BATCH_FORGET
        42 => &[8],
        47 | 53 => &[16],
        _ => &[],
    }
}
