//! Writes the seed corpus: `seeds DIR` makes a directory for each target in DIR.
//!
//! The seeds are valid requests and messages, from which a fuzzer finds invalid ones sooner than
//! from nothing. `integration/fuzz/seeds` is the output of this program.

use std::path::Path;

use ringfsd::internals::migration::stream::{
    self, Agreement, Find, Flock, Inode, Locks, Nameless, Open, Range, Snapshot,
};

fn main() -> std::io::Result<()> {
    let dir = std::env::args_os().nth(1);
    let dir = dir.ok_or_else(|| std::io::Error::other("usage: seeds DIR"))?;
    let targets: [(&str, Seeds); 9] = [
        ("ring", ring()),
        ("decode", decode()),
        ("request", request()),
        ("migration", migration()),
        ("vhost_user", vhost_user()),
        ("back_channel", back_channel()),
        ("state", state()),
        ("session_snapshot", session_snapshot()),
        ("control", control()),
    ];
    for (target, seeds) in targets {
        let dir = Path::new(&dir).join(target);
        std::fs::create_dir_all(&dir)?;
        for (name, bytes) in seeds {
            std::fs::write(dir.join(name), bytes)?;
        }
    }
    Ok(())
}

/// Names and contents.
type Seeds = Vec<(&'static str, Vec<u8>)>;

/// A table's descriptors as the target `ring` takes them: place, offset, length, flags, next.
fn table(first: &[[u8; 5]]) -> Vec<u8> {
    let mut bytes: Vec<u8> = first.concat();
    bytes.resize(16 * 5, 0);
    bytes
}

/// States of sessions, without their checksums.
fn migration() -> Seeds {
    let inode = |node, from, name: &str, kind| Inode {
        node,
        lookups: 2,
        kind,
        number: 7,
        birth: Some(1),
        handle: vec![1, 0, 0, 0, 7, 7, 7, 7],
        find: Find::Path {
            from,
            path: name.into(),
            verify: false,
        },
    };
    let open = |handle, node, directory| Open {
        handle,
        node,
        flags: 2,
        directory,
        flock: Flock::Exclusive,
    };
    let snapshot = Snapshot {
        agreement: Some(Agreement {
            minor: 38,
            flags: 1,
            max_readahead: 1 << 17,
            max_write: 1 << 20,
            max_pages: 256,
            max_background: 12,
        }),
        generation: 5,
        next_node: 100,
        next_handle: 100,
        inodes: vec![
            inode(2, 1, "d", libc::S_IFDIR),
            inode(3, 2, "f", libc::S_IFREG),
            inode(4, 1, "d/d/f", libc::S_IFREG),
            Inode {
                find: Find::Nameless(Nameless {
                    mode: 0o600,
                    size: 10,
                    pieces: vec![(2, b"some".to_vec())],
                    ..Nameless::default()
                }),
                ..inode(5, 1, "", libc::S_IFREG)
            },
            Inode {
                find: Find::Nameless(Nameless::default()),
                ..inode(6, 1, "", libc::S_IFDIR)
            },
            Inode {
                find: Find::Handle,
                ..inode(7, 1, "", libc::S_IFREG)
            },
        ],
        opens: vec![open(1, 3, false), open(2, 2, true), open(3, 5, false)],
        locks: vec![Locks {
            node: 3,
            owner: 9,
            handle: 1,
            ranges: vec![Range {
                start: 1,
                end: 5,
                exclusive: true,
            }],
        }],
        ..Snapshot::default()
    };
    let bytes = |snapshot: &Snapshot| {
        let mut bytes = stream::encode(snapshot).unwrap_or_default();
        bytes.truncate(bytes.len().saturating_sub(8));
        bytes
    };
    vec![
        ("nothing", bytes(&Snapshot::default())),
        ("session", bytes(&snapshot)),
    ]
}

/// Stores into a table that are right, or nearly so.
fn state() -> Seeds {
    let store = |part: u8, word: u16, how: u8, value: u64| {
        let mut bytes = vec![part];
        bytes.extend(word.to_le_bytes());
        bytes.push(how);
        bytes.extend(value.to_le_bytes());
        bytes
    };
    let under_way = 4u64.to_le_bytes().to_vec();
    vec![
        ("whole", under_way.clone()),
        ("count", [under_way.clone(), store(0x60, 9, 0, 3)].concat()),
        (
            "elsewhere",
            [under_way, store(0x60, 14, 3, 0x0101)].concat(),
        ),
    ]
}

/// What clients of the control socket send: to which source, and then who sends what.
fn control() -> Seeds {
    // The number of a command with its arguments, and what comes with it.
    let command = |client: u8, number: u8, arguments: u16, with: u8| {
        let [low, high] = arguments.to_le_bytes();
        vec![client, with << 6 | 0x20 | number, low, high]
    };
    let bytes = |client: u8, text: &[u8]| {
        let parts = text.chunks(0x1f).map(|part| {
            let len = u8::try_from(part.len()).unwrap_or_default();
            [&[client, len][..], part].concat()
        });
        parts.collect::<Vec<_>>().concat()
    };
    let each = (0..12).map(|number| command(number % 3, number, 0, 0));
    vec![
        (
            "each",
            [vec![0], each.clone().collect::<Vec<_>>().concat()].concat(),
        ),
        (
            "each-of-several",
            [vec![1], each.collect::<Vec<_>>().concat()].concat(),
        ),
        (
            "arguments",
            [
                vec![0],
                command(0, 3, 0x60, 0),
                command(0, 4, 0x200, 0),
                command(1, 5, 0x180, 0),
                command(1, 6, 0x180, 0),
                command(2, 2, 0x80, 0),
            ]
            .concat(),
        ),
        (
            "mounts",
            [
                vec![1],
                command(0, 8, 0x09, 1),
                command(1, 8, 0x19, 3),
                command(0, 8, 0x0c, 2),
                command(2, 5, 0, 0),
                command(0, 9, 0x01, 0),
                command(1, 9, 0x02, 0),
                command(2, 6, 0, 0),
            ]
            .concat(),
        ),
        (
            "text",
            [
                vec![0],
                bytes(
                    0,
                    b"{\"version\":1,\"id\":[{}],\"command\":\"statistics\"}\n",
                ),
                bytes(1, b"{\"version\":2}\nno JSON\n\n{\"command\":\"status\""),
            ]
            .concat(),
        ),
    ]
}

/// What a session of the front leaves, without what a record begins with.
fn session_snapshot() -> Seeds {
    const NO_FD: u32 = u32::MAX;
    // The socket, flags, features and protocol features.
    let agreed = |flags: u32| words(&[5, flags, 0, 1, 0x820b, 0], &[]);
    let file = |fd: u32, offset: u32, len: u32| words(&[fd, offset, 0, len, 0], &[]);
    let no_files = [file(NO_FD, 0, 0), file(NO_FD, 0, 0), words(&[0, 0], &[])].concat();
    let region = words(&[0, 0, 0, 0x7f00, 0x8000, 0, 0, 0, 7], &[]);
    let vring = words(
        &[
            128, 0xfffe, 7, 0x1000, 0, 0x2000, 0, 0x3000, 0, 0x3000, 0, 10, 11, NO_FD,
        ],
        &[],
    );
    let count = |count: u32| words(&[count], &[]);
    let nothing = words(&[0, 0, 0], &[]);
    let whole = [
        agreed(0x1f),
        file(8, 0x1000, 0x8000),
        file(9, 0, 0x1000),
        words(&[2, 128], &[]),
        count(1),
        region,
        count(1),
        vring,
        words(&[1, 7, 2, 20, 21], b"message"),
    ];
    vec![
        (
            "new",
            [agreed(0), no_files, count(0), count(0), nothing].concat(),
        ),
        ("whole", whole.concat()),
    ]
}

fn ring() -> Seeds {
    let request = [[4, 0, 3, 1, 1], [5, 0, 4, 3, 2], [5, 0, 5, 2, 0]];
    let round = |flags: u8, what: u8, tables: &[Vec<u8>], rest: &[u8]| {
        let mut bytes = vec![flags, what];
        tables.iter().for_each(|table| bytes.extend(table));
        bytes.extend(rest);
        bytes
    };
    let own = table(&request);
    let circle = table(&[[4, 0, 3, 1, 1], [4, 0, 3, 1, 0]]);
    let indirect = table(&[[5, 0, 0x0b, 4, 0]]);
    vec![
        (
            "plain",
            round(0, 0x80, std::slice::from_ref(&own), &[0, 7, 40, 0, 1, 0, 1]),
        ),
        (
            "event-idx",
            round(
                1,
                0x80,
                std::slice::from_ref(&own),
                &[0, 0x0f, 40, 9, 0, 9, 0],
            ),
        ),
        ("circle", round(0, 0x81, &[circle], &[0, 1])),
        (
            "indirect",
            round(2, 0xc0, &[indirect, own], &[0, 7, 40, 0, 1]),
        ),
        ("jump", round(0, 0x3f, &[], &[0, 0x80])),
    ]
}

/// One request as the target `request` takes it.
fn record(opcode: u8, node: u8, handle: u8, arguments: &[u8]) -> Vec<u8> {
    record_laid(opcode, node, handle, 0, arguments)
}

fn record_laid(opcode: u8, node: u8, handle: u8, layout: u8, arguments: &[u8]) -> Vec<u8> {
    let mut bytes = vec![opcode, node, handle, layout];
    let len = u16::try_from(arguments.len()).unwrap_or_default();
    bytes.extend(len.to_le_bytes());
    bytes.extend(arguments);
    bytes
}

/// Numbers of four bytes each, and bytes behind them.
fn words(words: &[u32], behind: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(behind);
    bytes
}

const NONE: u8 = 0xff;

/// Sessions, each a list of requests.
fn sessions() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let create = |name: &[u8]| record(35, 0, NONE, &words(&[2, 0o100_644, 0o22, 0], name));
    let write = [
        &words(&[0, 0, 0, 0, 100, 0, 0, 0, 0, 0], &[])[..],
        &[7; 100],
    ]
    .concat();
    let read = words(&[0, 0, 0, 0, 0x800, 0, 0, 0, 0, 0], &[]);
    let map = |at: u32, flags: u32| {
        let range = [u32::MAX, u32::MAX, 0, 0, 0x20_0000, 0, flags, 0, at, 0];
        record(48, 1, NONE, &words(&range, &[]))
    };
    let lock = |kind: u32| words(&[0, 0, 1, 0, 0, 0, 0, 0, 99, 0, kind, 1, 0, 0], &[]);
    vec![
        (
            "mappings",
            vec![
                create(b"file\0"),
                record(16, 1, 1, &write),
                map(0, 2),
                map(0x20_0000, 3),
                map(0, 3),
                map(0x10_0000, 2),
                record(
                    49,
                    1,
                    NONE,
                    &words(
                        &[2, 0, 0, 0x20_0000, 0],
                        &words(&[0x20_0000, 0, 0x20_0000, 0], &[]),
                    ),
                ),
                map(0, 2),
                record(10, 0, NONE, b"file\0"),
            ],
        ),
        (
            "files",
            vec![
                create(b"file\0"),
                record(16, 1, 1, &write),
                record(15, 1, 1, &read),
                record_laid(15, 1, 1, 2 | 2 << 2, &read),
                record(20, 1, 1, &words(&[0, 0, 0, 0], &[])),
                record(25, 1, 1, &words(&[0, 0, 0, 0, 0, 0], &[])),
                record(3, 1, 1, &words(&[1, 0, 0, 0], &[])),
                record(
                    4,
                    1,
                    NONE,
                    &words(
                        &[
                            8, 0, 0, 0, 50, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                        ],
                        &[],
                    ),
                ),
                record(18, 1, 1, &words(&[0, 0, 0, 0, 0, 0], &[])),
                record(14, 1, NONE, &words(&[2, 0], &[])),
                record(10, 0, NONE, b"file\0"),
                record(2, 1, NONE, &words(&[1, 0], &[])),
            ],
        ),
        (
            "directories",
            vec![
                record(9, 0, NONE, &words(&[0o755, 0o22], b"dir\0")),
                record(1, 0, NONE, b"dir\0"),
                record_laid(1, 1, NONE, 3, b"nothing\0"),
                record(6, 1, NONE, b"link\0../../outside\0"),
                record(8, 1, NONE, &words(&[0o010_644, 0, 0o22, 0], b"fifo\0")),
                record(5, 2, NONE, &[]),
                record(27, 0, NONE, &words(&[0, 0], &[])),
                record(28, 0, 1, &read),
                record(44, 0, 1, &read),
                record(29, 0, 1, &words(&[0, 0, 0, 0, 0, 0], &[])),
                record(12, 0, 0, &words(&[1, 0], b"dir\0other\0")),
                record(45, 0, 0, &words(&[1, 0, 1, 0], b"other\0dir\0")),
                record(13, 0, 3, &words(&[1, 0], b"second\0")),
                record(11, 0, NONE, b"dir\0"),
                record(1, 1, NONE, b"..\0"),
                record(17, 0, NONE, &[]),
                record(34, 0, NONE, &words(&[7, 0], &[])),
            ],
        ),
        (
            "attributes",
            vec![
                create(b"file\0"),
                record(21, 1, NONE, &words(&[5, 0], b"user.x\0value")),
                record(22, 1, NONE, &words(&[100, 0], b"user.x\0")),
                record(23, 1, NONE, &words(&[100, 0], &[])),
                record(24, 1, NONE, b"user.x\0"),
                record(52, 1, 1, &words(&[0, 0, 0, 0, 0, 0xfff], &[])),
                record(39, 1, 1, &words(&[0, 0, 0, 0x8008_6601, 0, 0, 0, 8], &[])),
            ],
        ),
        (
            "further",
            vec![
                create(b"one\0"),
                create(b"two\0"),
                record(16, 1, 1, &write),
                record(43, 1, 1, &words(&[0, 0, 0, 0, 0x1000, 0, 0, 0], &[])),
                record(46, 1, 1, &words(&[0, 0, 0, 0, 3, 0], &[])),
                record(
                    47,
                    1,
                    1,
                    &words(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 200, 0, 50, 0, 0, 0], &[]),
                ),
                record(32, 1, 1, &lock(1)),
                record(33, 1, 2, &lock(1)),
                record(31, 1, 1, &lock(0)),
                record(36, 0, NONE, &words(&[4, 0], &[])),
                record(51, 0, NONE, &words(&[2, 0o100_600, 0o22, 0], b"/\0")),
                record(50, 0, NONE, &words(&[0, 0], &[])),
                record(42, 0, 1, &words(&[1, 0, 1, 0, 1, 0], &[])),
                record(38, 0, NONE, &[]),
            ],
        ),
    ]
}

fn request() -> Seeds {
    let session = |(name, records): (_, Vec<Vec<u8>>)| {
        // With a window, and what its VMM is like.
        let how = if name == "mappings" {
            vec![64, 0]
        } else {
            vec![3]
        };
        (name, [how, records.concat()].concat())
    };
    sessions().into_iter().map(session).collect()
}

/// The same requests, as the target `decode` takes them: how, opcode, length, body.
fn decode() -> Seeds {
    let one = |record: Vec<u8>| {
        let body = &record[6..];
        let len = u16::try_from(body.len()).unwrap_or_default();
        let mut bytes = vec![8, record[0]];
        bytes.extend(len.to_le_bytes());
        bytes.extend(body);
        bytes
    };
    let all =
        |(name, records): (_, Vec<Vec<u8>>)| (name, records.into_iter().flat_map(one).collect());
    sessions().into_iter().map(all).collect()
}

fn vhost_user() -> Seeds {
    const EVENT: u8 = 0x11;
    const MEMORY: u8 = 0x02;
    let message = |number: u8, fds: u8, body: &[u8]| {
        let len = u8::try_from(body.len()).unwrap_or_default();
        [&[number, 0, fds, len][..], body].concat()
    };
    let set_up = [
        message(1, 0, &[]),
        message(15, 0, &[]),
        message(16, 0, &[2]),
        message(3, 0, &[]),
        message(17, 0, &[]),
        message(2, 0, &[0]),
        message(36, 0, &[]),
        message(5, MEMORY, &[2, 0, 0]),
        message(8, 0, &[0, 16, 0]),
        message(10, 0, &[0]),
        message(9, 0, &[0, 0, 1, 2]),
        message(13, EVENT, &[0; 8]),
        message(12, EVENT, &[0; 8]),
        message(18, 0, &[0, 1, 0]),
    ];
    let end = [
        message(24, 0, &words(&[0, 40, 0], &[0; 40])),
        message(18, 0, &[0, 0, 0]),
        message(11, 0, &[0]),
        message(34, 0, &[]),
    ];
    let add = [
        message(37, 0x01, &[1]),
        message(38, 0, &[1]),
        message(6, 0x01, &words(&[0x1000, 0, 0, 0], &[])),
    ];
    let hello = set_up[..6].concat();
    vec![
        ("session", [set_up.concat(), end.concat()].concat()),
        ("regions", [hello, add.concat()].concat()),
    ]
}

/// Requests, threads; then for each request a right answer, or bytes.
fn back_channel() -> Seeds {
    vec![
        (
            "answered",
            vec![6, 1, 0x81, 0, 0x81, 0, 0x81, 5, 0x81, 0, 0x81, 0],
        ),
        ("garbage", [&[3, 0, 0x81, 0, 20][..], &[0xff; 20]].concat()),
        ("closed", vec![9, 2, 0x81, 0, 4, 9, 0, 0, 0]),
    ]
}
