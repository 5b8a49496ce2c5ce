//! Rings: chains, tables, indexes.

use testing::{TIMEOUT, each_runtime};
use vmm::Gpa;
use vmm::connection::message::feature;
use vmm::fuse::ROOT;
use vmm::fuse::wire::{AttrOut, ReadIn, WriteIn, opcode};
use vmm::ring::Descriptor;
use zerocopy::IntoBytes;

use super::scene::{
    BORDER, Back, END, HIGH, HOLE, IN, INDIRECT, NEXT, OUT, Scene, WRITE, memory, readable,
    request, then, writable,
};

/// What a GETATTR answers.
const ATTR: Back = Back::Reply(size_of::<AttrOut>() as u32);

/// A case: its name, the chain, what comes back.
type Case = (&'static str, Vec<Descriptor>, Back);

/// Chains of the ring's own descriptors. `r` is a good request, `w` room for its reply.
fn direct(r: Descriptor, w: Descriptor) -> Vec<Case> {
    let at = |addr, descriptor: Descriptor| Descriptor { addr, ..descriptor };
    let long = |len, descriptor: Descriptor| Descriptor { len, ..descriptor };
    let flags = |flags, descriptor: Descriptor| Descriptor {
        flags,
        ..descriptor
    };
    let before = |descriptor: Descriptor| then(descriptor, 1);
    let empty = Gpa(r.addr);
    vec![
        ("a good chain", vec![before(r), w], ATTR),
        (
            "a descriptor that is its own next",
            vec![then(r, 0)],
            Back::Empty,
        ),
        ("a circle of two", vec![then(r, 1), then(r, 0)], Back::Empty),
        (
            "a circle of three",
            vec![then(r, 1), then(r, 2), then(r, 1)],
            Back::Empty,
        ),
        (
            "a circle of writable ones",
            vec![then(r, 1), then(w, 1)],
            Back::Empty,
        ),
        (
            "a circle of empty ones",
            vec![then(long(0, r), 1), then(long(0, r), 0)],
            Back::Empty,
        ),
        (
            "a next just beyond the table",
            vec![then(r, 64)],
            Back::Empty,
        ),
        (
            "a next far beyond the table",
            vec![then(r, u16::MAX)],
            Back::Empty,
        ),
        (
            "a readable of 4 GiB",
            vec![before(long(u32::MAX, r)), w],
            Back::Empty,
        ),
        (
            "a writable of 4 GiB",
            vec![before(r), long(u32::MAX, w)],
            Back::Empty,
        ),
        (
            "readables of 4 GiB together",
            vec![
                then(at(HIGH, long(16 << 20, r)), 1),
                then(long(u32::MAX - (16 << 20) + 1, r), 2),
                w,
            ],
            Back::Empty,
        ),
        (
            "a readable past the end",
            vec![before(at(END, r)), w],
            Back::Empty,
        ),
        (
            "a writable past the end",
            vec![before(r), at(END, w)],
            Back::Empty,
        ),
        (
            "a readable one byte past the end",
            vec![before(at(END - u64::from(r.len) + 1, r)), w],
            Back::Empty,
        ),
        (
            "a writable over the end",
            vec![before(r), long(0x1000, at(END - 0xfff, w))],
            Back::Empty,
        ),
        (
            "an address of all ones",
            vec![before(at(u64::MAX, r)), w],
            Back::Empty,
        ),
        (
            "an address that wraps around",
            vec![before(at(u64::MAX - 8, r)), w],
            Back::Empty,
        ),
        (
            "a writable that wraps around",
            vec![before(r), at(u64::MAX - 8, w)],
            Back::Empty,
        ),
        (
            "a readable in the hole",
            vec![before(at(HOLE + 0x1000, r)), w],
            Back::Empty,
        ),
        (
            "a writable in the hole",
            vec![before(r), at(HOLE + 0x1000, w)],
            Back::Empty,
        ),
        (
            "a readable into the hole",
            vec![before(at(HOLE - 8, r)), w],
            Back::Empty,
        ),
        (
            "a writable into the hole",
            vec![before(r), at(HOLE - 8, w)],
            Back::Empty,
        ),
        (
            "a readable out of the hole",
            vec![before(at(HIGH - 8, r)), w],
            Back::Empty,
        ),
        (
            "a readable over the whole hole",
            vec![before(long(u32::MAX, at(HOLE - 8, r))), w],
            Back::Empty,
        ),
        (
            "an empty readable where there is no memory",
            vec![then(long(0, at(HOLE, r)), 1), then(r, 2), w],
            ATTR,
        ),
        ("an empty chain", vec![long(0, r)], Back::Empty),
        (
            "empty ones around good ones",
            vec![then(long(0, r), 1), then(r, 2), then(long(0, w), 3), w],
            ATTR,
        ),
        ("only an empty writable", vec![long(0, w)], Back::Empty),
        (
            "a readable behind a writable",
            vec![then(w, 1), r],
            Back::Empty,
        ),
        (
            "readable, writable, readable",
            vec![then(r, 1), then(w, 2), r],
            Back::Empty,
        ),
        (
            "a readable behind an empty writable",
            vec![then(long(0, w), 1), then(r, 2), w],
            ATTR,
        ),
        ("only room", vec![w], Back::Empty),
        ("no room", vec![r], Back::Empty),
        (
            "flags that nobody knows",
            vec![flags(NEXT | 0xfff8, before(r)), flags(WRITE | 0xfff8, w)],
            ATTR,
        ),
        (
            "a next that is not meant",
            vec![
                before(r),
                Descriptor {
                    next: u16::MAX,
                    ..w
                },
            ],
            ATTR,
        ),
        (
            "an indirect one that is not the last",
            vec![flags(INDIRECT | NEXT, r), w],
            Back::Empty,
        ),
        (
            "request and reply in the same place",
            vec![before(r), at(empty.0, w)],
            Back::Reply(120),
        ),
    ]
}

/// Indirect tables at `table`: the descriptor that points there, and what lies there.
type Indirect = (&'static str, Descriptor, Vec<Descriptor>, Back);

fn indirect(table: Gpa, r: Descriptor, w: Descriptor) -> Vec<Indirect> {
    let to = |len: u32| Descriptor {
        addr: table.0,
        len,
        flags: INDIRECT,
        next: 0,
    };
    let good = vec![then(r, 1), w];
    let bytes = |count: usize| {
        // A byte each, then all the room.
        let mut all: Vec<_> = (0..count)
            .map(|at| {
                let addr = r.addr + (at as u64).min(0x10000);
                then(readable(Gpa(addr), 1), at as u16 + 1)
            })
            .collect();
        all.push(w);
        all
    };
    vec![
        ("a good table", to(32), good.clone(), ATTR),
        ("a table with room behind", to(0x1000), good.clone(), ATTR),
        ("a table of length 0", to(0), good.clone(), Back::Empty),
        ("a table of 1 byte", to(1), good.clone(), Back::Empty),
        ("a table of 15 bytes", to(15), good.clone(), Back::Empty),
        ("a table of 33 bytes", to(33), good.clone(), Back::Empty),
        (
            "a table of 65,536 descriptors",
            to(16 << 16),
            good.clone(),
            Back::Empty,
        ),
        ("a table of 4 GiB", to(u32::MAX), good.clone(), Back::Empty),
        (
            "a table of 4 GiB in whole descriptors",
            to(u32::MAX - 15),
            good.clone(),
            Back::Empty,
        ),
        (
            "a table too short for its chain",
            to(16),
            good.clone(),
            Back::Empty,
        ),
        (
            "a table past the end",
            Descriptor {
                addr: END,
                ..to(32)
            },
            vec![],
            Back::Empty,
        ),
        (
            "a table in the hole",
            Descriptor {
                addr: HOLE,
                ..to(32)
            },
            vec![],
            Back::Empty,
        ),
        (
            "a table over the end",
            Descriptor {
                addr: END - 8,
                ..to(32)
            },
            vec![],
            Back::Empty,
        ),
        (
            "a table that wraps around",
            Descriptor {
                addr: u64::MAX - 15,
                ..to(32)
            },
            vec![],
            Back::Empty,
        ),
        ("a table within a table", to(16), vec![to(32)], Back::Empty),
        (
            "a table within a table, further on",
            to(32),
            vec![then(r, 1), to(32)],
            Back::Empty,
        ),
        (
            "a circle in a table",
            to(32),
            vec![then(r, 1), then(r, 0)],
            Back::Empty,
        ),
        (
            "a next beyond the table",
            to(32),
            vec![then(r, 2)],
            Back::Empty,
        ),
        (
            "a next far beyond the table",
            to(32),
            vec![then(r, u16::MAX)],
            Back::Empty,
        ),
        (
            "a readable behind a writable in a table",
            to(32),
            vec![then(w, 1), r],
            Back::Empty,
        ),
        (
            "a table that is said to be writable",
            Descriptor {
                flags: INDIRECT | WRITE,
                ..to(32)
            },
            good,
            ATTR,
        ),
        (
            "30,000 readable pieces",
            to(16 * 30_001),
            bytes(30_000),
            ATTR,
        ),
        (
            "65,000 readable pieces",
            to(16 * 65_001),
            bytes(65_000),
            Back::Empty,
        ),
    ]
}

#[each_runtime]
fn malformed_chain_is_refused_alone(runtime: &str) {
    let mut scene = Scene::new(runtime);
    let len = scene.lay_good();
    let (r, w) = (readable(scene.request, len), writable(scene.reply, 0x1000));
    for (name, chain, back) in direct(r, w) {
        scene.lay_good();
        assert_eq!(scene.chain(&chain), back, "{name}");
        scene.is_well(name);
        // Four of them are right chains of a request that can't be answered.
        let whole = [
            "an empty chain",
            "only an empty writable",
            "only room",
            "no room",
        ];
        let faulty = u32::from(back == Back::Empty && !whole.contains(&name));
        assert_eq!(scene.faulty(), faulty, "{name}: it is counted");
    }
    let memory = scene.memory();
    let table = memory.alloc_in(1, 16 * 65_002, 16).unwrap();
    for (name, head, descriptors, back) in indirect(table, r, w) {
        scene.lay_good();
        for (at, descriptor) in descriptors.iter().enumerate() {
            lay_descriptor(&mut scene, table.offset(16 * at as u64), descriptor);
        }
        assert_eq!(scene.chain(&[head]), back, "{name}");
        scene.is_well(name);
        let faulty = u32::from(back == Back::Empty);
        assert_eq!(scene.faulty(), faulty, "{name}: it is counted");
    }
    for (name, head) in [
        ("a head just beyond the table", 64),
        ("a head far beyond the table", u16::MAX),
    ] {
        assert_eq!(scene.push(head), Back::Empty, "{name}");
        scene.is_well(name);
        assert_eq!(scene.faulty(), 1, "{name}: it is counted");
    }
    an_unaligned_table(&mut scene, r, w);
    across_the_border(&mut scene);
    one_head_many_times(&mut scene, r, w);
    let totals = scene.totals();
    assert!(totals.contains(" 0 of them dropped, 0 faulty"), "{totals}");
}

/// A guest that reads a file into memory that it has mapped of another, by DAX, uses the memory of a
/// device as a buffer.
#[each_runtime]
fn buffer_outside_of_guest_memory_fails_with_efault(runtime: &str) {
    let mut scene = Scene::new(runtime);
    let node = scene.fs.lookup(ROOT, c"file").unwrap().nodeid;
    let handle = scene.fs.open(node, libc::O_RDWR).unwrap();
    let read = ReadIn {
        fh: handle.fh,
        size: 0x1000,
        ..ReadIn::default()
    };
    let write = WriteIn {
        fh: handle.fh,
        size: 7,
        ..WriteIn::default()
    };
    let efault = Back::Errno(libc::EFAULT);
    for (what, at) in [("in the hole", HOLE), ("past the end", END)] {
        let elsewhere = Gpa(at);
        let len = scene.lay(opcode::READ, node, read.as_bytes());
        let (r, w) = (readable(scene.request, len), writable(scene.reply, OUT));
        let chain = [then(r, 1), then(w, 2), writable(elsewhere, 0x1000)];
        assert_eq!(scene.chain(&chain), efault, "READ {what}");
        // In part, with good memory before and behind.
        let good = scene.reply.offset(64);
        let chain = [
            then(r, 1),
            then(w, 2),
            then(writable(good, 64), 3),
            then(writable(elsewhere, 0x1000), 4),
            writable(good, 64),
        ];
        assert_eq!(scene.chain(&chain), efault, "READ, partly {what}");
        let untouched = scene.memory().read_vec(good, 64).unwrap();
        assert_eq!(untouched, [0xee; 64], "READ, partly {what}");
        // WRITE takes effect in none of its parts.
        let bytes = request(
            opcode::WRITE,
            node,
            &[write.as_bytes(), b"changed"].concat(),
        );
        let len = bytes.len() as u32;
        scene.memory().write(scene.request, &bytes).unwrap();
        let header = then(readable(scene.request, len - 7), 1);
        let chain = [header, then(readable(elsewhere, 7), 2), w];
        assert_eq!(scene.chain(&chain), efault, "WRITE {what}");
        let first = readable(scene.request.offset(u64::from(len - 7)), 3);
        let chain = [header, then(first, 2), then(readable(elsewhere, 4), 3), w];
        assert_eq!(scene.chain(&chain), efault, "WRITE, partly {what}");
        let content = std::fs::read(scene.server.share().join("file")).unwrap();
        assert_eq!(content, b"content");
        // What has no reply gets none.
        for opcode in [opcode::BATCH_FORGET, opcode::FORGET] {
            let len = scene.lay(opcode, node, &[]);
            let header = then(readable(scene.request, len), 1);
            let chain = [header, then(readable(elsewhere, 16), 2), w];
            assert_eq!(scene.chain(&chain), Back::Empty, "{opcode} {what}");
        }
        // Neither the request's number nor the place of the reply is known.
        let len = scene.lay_good();
        let r = readable(scene.request, len);
        let chain = [then(readable(elsewhere, 40), 1), then(r, 2), w];
        assert_eq!(scene.chain(&chain), Back::Empty, "a header {what}");
        let chain = [then(r, 1), then(writable(elsewhere, OUT), 2), w];
        assert_eq!(scene.chain(&chain), Back::Empty, "a reply {what}");
        scene.is_well(what);
    }
    assert_eq!(scene.faulty(), 4, "those without a header or a reply");
    let read = scene.fs.read(node, handle, 0, 100).unwrap();
    assert_eq!(read, b"content");
}

fn lay_descriptor(scene: &mut Scene, at: Gpa, descriptor: &Descriptor) {
    let memory = scene.memory();
    memory.write(at, descriptor.addr.as_bytes()).unwrap();
    memory
        .write(at.offset(8), descriptor.len.as_bytes())
        .unwrap();
    memory
        .write(at.offset(12), descriptor.flags.as_bytes())
        .unwrap();
    memory
        .write(at.offset(14), descriptor.next.as_bytes())
        .unwrap();
}

/// Nobody says that a table must be aligned.
fn an_unaligned_table(scene: &mut Scene, r: Descriptor, w: Descriptor) {
    scene.lay_good();
    let at = scene.memory().alloc_in(1, 64, 16).unwrap().offset(3);
    lay_descriptor(scene, at, &then(r, 1));
    lay_descriptor(scene, at.offset(16), &w);
    let head = Descriptor {
        addr: at.0,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    assert_eq!(scene.chain(&[head]), ATTR, "a table at an odd address");
    scene.is_well("a table at an odd address");
}

/// Two regions that touch are as one, for headers, tables and replies.
fn across_the_border(scene: &mut Scene) {
    let memory = scene.memory();
    let bytes = request(opcode::GETATTR, ROOT, &[0; 16]);
    for within in [1, 8, IN as u64, bytes.len() as u64 - 1] {
        let at = Gpa(BORDER - within);
        memory.write(at, &bytes).unwrap();
        let reply = scene.reply;
        let chain = [
            then(readable(at, bytes.len() as u32), 1),
            writable(reply, 120),
        ];
        assert_eq!(
            scene.chain(&chain),
            ATTR,
            "a request {within} bytes before the border"
        );
    }
    let len = scene.lay_good();
    let at = Gpa(BORDER - 60);
    let chain = [then(readable(scene.request, len), 1), writable(at, 120)];
    assert_eq!(
        scene.chain(&chain),
        Back::Reply(120),
        "a reply across the border"
    );
    let whole = memory.read_vec(at, 120).unwrap();
    assert_eq!(whole[..4], 120_u32.to_le_bytes());
    let table = Gpa(BORDER - 24);
    let len = scene.lay_good();
    lay_descriptor(scene, table, &then(readable(scene.request, len), 1));
    lay_descriptor(scene, table.offset(16), &writable(scene.reply, 120));
    let head = Descriptor {
        addr: table.0,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    assert_eq!(scene.chain(&[head]), ATTR, "a table across the border");
    scene.is_well("the border");
}

/// The same head fills the whole ring: each comes back, empty while one is being served.
fn one_head_many_times(scene: &mut Scene, r: Descriptor, w: Descriptor) {
    scene.lay_good();
    scene.write(&[then(r, 1), w]);
    let head = scene.own[0];
    let queue = scene.queue();
    for _ in 0..64 {
        queue.push_head(head);
    }
    queue.kick_always().unwrap();
    queue.wait_for(64, TIMEOUT).unwrap();
    let mut empty = 0;
    for _ in 0..64 {
        let back = queue.pop_raw().unwrap();
        assert!(matches!(back, Some((id, 0 | 120)) if id == u32::from(head)));
        empty += u32::from(matches!(back, Some((_, 0))));
    }
    assert!(empty < 64, "none was served");
    scene.is_well("one head many times");
    assert_eq!(scene.faulty(), empty, "they are counted");
}

#[each_runtime]
fn indirect_descriptor_without_feature_is_not_followed(runtime: &str) {
    let options = memory().without_features(feature::INDIRECT_DESC);
    let mut scene = Scene::with(runtime, &[], &options);
    let len = scene.lay_good();
    let table = scene.memory().alloc_in(1, 64, 16).unwrap();
    let (r, w) = (readable(scene.request, len), writable(scene.reply, 120));
    lay_descriptor(&mut scene, table, &then(r, 1));
    lay_descriptor(&mut scene, table.offset(16), &w);
    let head = Descriptor {
        addr: table.0,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    assert_eq!(scene.chain(&[head]), Back::Empty);
    scene.is_well("a table that was not agreed on");
    assert!(scene.totals().contains(" 1 faulty"));
}

#[each_runtime]
fn jumping_available_index_serves_nothing(runtime: &str) {
    let mut scene = Scene::new(runtime);
    for jump in [65, 66, 1000, 0x7fff, 0x8000, 0xff00, u16::MAX] {
        let queue = scene.queue();
        let (right, used) = (queue.avail_idx(), queue.used_idx());
        queue.set_avail_idx(right.wrapping_add(jump));
        queue.kick_event().signal().unwrap();
        scene.server.wait_for("available index jumped");
        let queue = scene.queue();
        assert_eq!(queue.used_idx(), used, "a jump of {jump}");
        queue.set_avail_idx(right);
        scene.is_well("a jump");
    }
    // Kicks without anything on the ring.
    for _ in 0..1000 {
        scene.queue().kick_event().signal().unwrap();
    }
    // Flags and events that mean nothing.
    for garbage in [0xfffe, 0x5554] {
        scene.queue().set_avail_flags(garbage);
        scene.queue().set_used_event(garbage);
        scene.is_well("garbage in flags and used_event");
    }
}

/// The parts of a ring over each other, and requests and replies over the rings: what the guest
/// gets is its own affair, but nothing else breaks.
#[each_runtime]
fn overlapping_rings_damage_no_other_session(runtime: &str) {
    let scene = Scene::new(runtime);
    let mut server = scene.server;
    drop(scene.fs);
    server.wait_until_it_listens();
    for which in 0..7 {
        let mut scene = Scene::on(server, &memory());
        let len = scene.lay_good();
        let addresses = scene.queue().addresses();
        let (table, available, used) = (addresses.descriptors, addresses.available, addresses.used);
        let (r, w) = (readable(scene.request, len), writable(scene.reply, 0x1000));
        let chain = match which {
            0 => [then(r, 1), writable(table, 0x400)],
            1 => [then(r, 1), writable(available, 134)],
            2 => [then(r, 1), writable(used, 518)],
            3 => [then(readable(used, 518), 1), w],
            4 => [then(readable(table, 0x400), 1), w],
            5 => [then(readable(available, 134), 1), writable(available, 134)],
            _ => [then(r, 1), w],
        };
        scene.write(&chain);
        if which == 6 {
            overlap_the_areas(&mut scene);
        }
        let head = scene.own[0];
        scene.queue().push_head(head);
        scene.queue().kick_always().unwrap();
        // The other queue is served all the same.
        scene.fs.forget(1, 1).unwrap();
        // The answer may have gone over the ring itself, so there is nothing to wait for; a stop
        // waits for all that was taken.
        scene.fs.guest().stop().unwrap();
        server = scene.server;
        drop(scene.fs);
        server.wait_until_it_listens();
    }
    Scene::on(server, &memory()).is_well("rings over each other");
}

/// Tells the server that all three parts of ring 1 lie at the same place.
fn overlap_the_areas(scene: &mut Scene) {
    let at = scene.queue().addresses().descriptors;
    let user = scene.memory().user_address(at).unwrap();
    let address = vmm::connection::message::VringAddress {
        index: 1,
        flags: 0,
        descriptors: user,
        used: user,
        available: user,
        log: 0,
    };
    let connection = &mut scene.fs.guest().connection;
    connection.set_vring_addr_raw(address).unwrap();
    connection.get_features().unwrap();
}
