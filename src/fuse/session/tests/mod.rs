//! Tests of whole requests and replies: the life of a session, and properties of every request.

mod data;
mod locks;
mod nodes;

use zerocopy::IntoBytes;

use super::*;
use crate::fuse::abi::{self, InitFlags, InitOut, Opcode};
use crate::fuse::testing::{
    Ending, Guest, HANDLE, MemoryTransport, init_of, on_root, request, samples,
};

/// Room for any reply of these tests.
const ROOM: usize = 1 << 20;

const FH: u64 = HANDLE.0;

fn lookup(name: &[u8]) -> Vec<u8> {
    on_root(Opcode::Lookup, &[name, b"\0"])
}

fn write(offset: u64, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).unwrap();
    let args = abi::WriteIn {
        fh: FH,
        offset,
        size,
        ..Default::default()
    };
    on_root(Opcode::Write, &[args.as_bytes(), data])
}

/// Serves a request whose reply may be deferred.
fn serve_any(guest: &Guest, request: Vec<u8>, room: usize) -> Ending {
    let (transport, ending) = MemoryTransport::new(request, room);
    if let Outcome::Later(future) = guest.session.serve(transport) {
        crate::io::Runtime::new(crate::io::Engine::ThreadPool)
            .unwrap()
            .block_on(future);
    }
    ending.take().expect("an answer")
}

#[test]
fn init_reply_has_common_flags() {
    for (minor, len) in [(27, 16), (31, 16), (36, 64), (38, 64), (41, 64), (45, 64)] {
        let guest = Guest::new();
        let offered = InitFlags::ASYNC_READ | InitFlags::MAX_PAGES | InitFlags::SETXATTR_EXT;
        let init = init_of(7, minor, offered);
        assert_eq!(init.len(), 40 + len);
        let reply: InitOut = guest.serve(init, 80).structure();
        assert_eq!((reply.major, reply.minor), (7, minor));
        assert_eq!(
            reply.flags,
            (InitFlags::ASYNC_READ | InitFlags::MAX_PAGES).halves().0
        );
        assert_eq!(guest.session.negotiated().unwrap().minor, minor);
        assert_eq!(guest.fs().resets(), 1);
    }
}

#[test]
fn requests_before_init_fail() {
    let guest = Guest::new();
    guest.fs().put(c"name");
    for (opcode, bytes) in samples() {
        let ending = guest.serve(bytes, ROOM);
        match opcode {
            Opcode::Init | Opcode::Destroy => {
                assert_eq!(ending.errno(), 0);
                guest.session.reset();
            }
            Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt => {
                assert_eq!(ending, Ending::Nothing);
            }
            _ => assert_eq!(ending.errno(), libc::EIO, "{opcode:?}"),
        }
    }
    assert_eq!(guest.fs().calls(), Vec::<String>::new());
}

#[test]
fn init_of_old_version_is_rejected() {
    let guest = Guest::new();
    let reply = guest.serve(init_of(7, 26, InitFlags::NONE), ROOM);
    assert_eq!(reply.errno(), libc::EPROTO);
    assert_eq!(guest.session.negotiated(), None);
    assert_eq!(guest.serve(lookup(b"name"), ROOM).errno(), libc::EIO);
}

#[test]
fn init_with_newer_major_version_gets_ours() {
    let guest = Guest::new();
    let reply: InitOut = guest
        .serve(init_of(8, 3, InitFlags::NONE), ROOM)
        .structure();
    assert_eq!((reply.major, reply.minor), (7, 45));
    assert_eq!(guest.serve(lookup(b"name"), ROOM).errno(), libc::EIO);
    assert_eq!(
        guest.serve(init_of(7, 45, InitFlags::NONE), ROOM).errno(),
        0
    );
    assert_eq!(guest.serve(lookup(b"name"), ROOM).errno(), libc::ENOENT);
}

#[test]
fn second_init_and_destroy_reset_file_system() {
    let guest = Guest::ready();
    guest.fs().put(c"name");
    guest.serve(lookup(b"name"), ROOM);
    assert_eq!(guest.fs().lookups(100), 1);
    guest.serve(init_of(7, 38, InitFlags::NONE), ROOM);
    assert_eq!(guest.fs().lookups(100), 0);
    assert_eq!(guest.session.negotiated().unwrap().minor, 38);
    guest.serve(lookup(b"name"), ROOM);
    assert_eq!(guest.serve(on_root(Opcode::Destroy, &[]), ROOM).body(), b"");
    assert_eq!(guest.fs().lookups(100), 0);
    assert_eq!(guest.session.negotiated(), None);
    assert_eq!(guest.serve(lookup(b"name"), ROOM).errno(), libc::EIO);
}

#[test]
fn interrupt_has_no_reply() {
    let interrupt = on_root(
        Opcode::Interrupt,
        &[abi::InterruptIn { unique: 9 }.as_bytes()],
    );
    assert_eq!(Guest::ready().serve(interrupt, ROOM), Ending::Nothing);
}

#[test]
fn request_without_room_for_reply_has_no_effect() {
    let guest = Guest::ready();
    guest.fs().put(c"name");
    let open = on_root(Opcode::Open, &[abi::OpenIn::default().as_bytes()]);
    let create = on_root(
        Opcode::Create,
        &[abi::CreateIn::default().as_bytes(), b"new\0"],
    );
    let unlink = on_root(Opcode::Unlink, &[b"name\0"]);
    for (bytes, needed) in [
        (lookup(b"name"), 16 + 128),
        (open, 16 + 16),
        (create, 16 + 128 + 16),
        (unlink, 16),
    ] {
        for room in [0, 8, 15, 16, needed - 1]
            .into_iter()
            .filter(|room| *room < needed)
        {
            let ending = guest.serve(bytes.clone(), room);
            if room < 16 {
                assert_eq!(ending, Ending::Nothing);
            } else {
                assert_eq!(ending.errno(), libc::EINVAL, "{room}");
            }
            assert_eq!((guest.fs().lookups(100), guest.fs().opened()), (0, 0));
        }
        assert_eq!(guest.serve(bytes, needed).errno(), 0);
        guest.session.reset();
        guest.serve(init_of(7, 41, InitFlags::NONE), ROOM);
    }
    let before = guest.fs().resets();
    assert_eq!(
        guest.serve(init_of(7, 41, InitFlags::NONE), 79).errno(),
        libc::EINVAL
    );
    assert_eq!(guest.fs().resets(), before);
}

#[test]
fn unsupported_opcode_is_enosys() {
    let guest = Guest::ready();
    for opcode in [0, 7, 19, 31, 33, 37, 40, 41, 48, 54, 4096, u32::MAX] {
        let ending = guest.serve(request(opcode, 1, &[&[0; 64]]), ROOM);
        assert_eq!(ending.errno(), libc::ENOSYS, "{opcode}");
    }
}

#[test]
fn caller_without_ids_is_served_if_negotiated() {
    let without_ids = |at: usize| {
        let mut bytes = lookup(b"name");
        bytes[at..at + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
        bytes
    };
    for (flags, errno) in [
        (InitFlags::INIT_EXT, libc::EINVAL),
        (InitFlags::INIT_EXT | InitFlags::ALLOW_IDMAP, 0),
    ] {
        let guest = Guest::with_options(SessionOptions {
            idmap: true,
            ..SessionOptions::default()
        });
        guest.fs().put(c"name");
        // Before INIT the check is not reached.
        for at in [24, 28] {
            assert_eq!(guest.serve(without_ids(at), ROOM).errno(), libc::EIO);
        }
        assert_eq!(guest.serve(init_of(7, 41, flags), ROOM).errno(), 0);
        for at in [24, 28] {
            assert_eq!(
                guest.serve(without_ids(at), ROOM).errno(),
                errno,
                "{flags} {at}"
            );
        }
    }
}

#[test]
fn every_sample_is_served() {
    let guest = Guest::ready();
    guest.fs().put(c"name");
    guest.fs().put(c"there");
    for (opcode, bytes) in samples() {
        let ending = serve_any(&guest, bytes, ROOM);
        assert_ne!(ending, Ending::Dropped);
        if let Ending::Reply(_) | Ending::Filled(..) = ending {
            let by_option = [
                Opcode::Getlk,
                Opcode::Setlk,
                Opcode::Setlkw,
                Opcode::Setupmapping,
                Opcode::Removemapping,
            ];
            let not_by_this_file_system = [Opcode::Statx, Opcode::Tmpfile, Opcode::Syncfs];
            let unserved = [&by_option[..], &not_by_this_file_system[..]]
                .concat()
                .contains(&opcode);
            assert_eq!(ending.errno() == libc::ENOSYS, unserved, "{opcode:?}");
            assert_ne!(ending.errno(), libc::EIO, "{opcode:?}");
        }
    }
    assert_eq!(guest.session.counters().malformed(), 0);
}

#[test]
fn truncated_request_gets_errno() {
    let guest = Guest::ready();
    for (opcode, bytes) in samples() {
        if opcode == Opcode::Destroy {
            continue;
        }
        for len in 0..bytes.len() {
            let ending = serve_any(&guest, bytes[..len].to_vec(), ROOM);
            let silent = len < 16 || len >= 40 && opcode.has_no_reply();
            if silent {
                assert_eq!(ending, Ending::Nothing, "{opcode:?} of {len} bytes");
            } else {
                assert_eq!(ending.errno(), libc::EINVAL, "{opcode:?} of {len} bytes");
            }
        }
    }
    assert!(guest.session.counters().malformed() > 1000);
}

#[test]
fn every_request_is_answered_with_any_room() {
    let guest = Guest::ready();
    for (_, bytes) in samples() {
        for room in (0..200).chain([ROOM]) {
            let ending = serve_any(&guest, bytes.clone(), room);
            assert_ne!(ending, Ending::Dropped);
            if let Ending::Reply(_) = ending {
                ending.errno();
            }
            guest.serve(init_of(7, 41, InitFlags::NONE), ROOM);
        }
    }
}

#[test]
fn malformed_requests_are_counted_and_failed_ones_are_not() {
    let guest = Guest::ready();
    guest.serve(lookup(b"nothing"), ROOM);
    guest.serve(lookup(b"a/b"), ROOM);
    assert_eq!(guest.session.counters().malformed(), 1);
}

/// What is fetched of a request that is too long for the small buffer, and whether on the heap.
fn fetched_whole(transport: &mut MemoryTransport) -> (Vec<u8>, bool) {
    let mut small = [0; SMALL];
    let Ok(Fetched::Header { wanted }) = fetch(transport, &mut small) else {
        panic!("the request fits the small buffer, or is malformed");
    };
    let (mut inline, mut spilled) = ([0; INLINE], Vec::new());
    let header = &small[..HEADER_LEN];
    let bytes = fetch_rest(transport, header, wanted, &mut inline, &mut spilled).to_vec();
    (bytes, spilled.capacity() != 0)
}

#[test]
fn longest_rename_is_fetched_to_stack() {
    let name = [[b'a'; 255].as_slice(), &[0]].concat();
    let args = abi::Rename2In {
        newdir: 1,
        ..Default::default()
    };
    let bytes = on_root(Opcode::Rename2, &[args.as_bytes(), &name, &name]);
    let (mut transport, _) = MemoryTransport::new(bytes, 0);
    let (fetched, spilled) = fetched_whole(&mut transport);
    assert_eq!((fetched.len(), spilled), (INLINE, false));
}

#[test]
fn request_too_long_for_stack_is_fetched_whole() {
    let value: Vec<u8> = (0..4000).map(|at: u16| at.to_le_bytes()[0]).collect();
    let args = abi::SetxattrIn {
        size: 4000,
        ..Default::default()
    };
    let bytes = on_root(Opcode::Setxattr, &[args.as_bytes(), b"user.x\0", &value]);
    let (mut transport, _) = MemoryTransport::new(bytes.clone(), 0);
    assert_eq!(fetched_whole(&mut transport), (bytes, true));
}

#[test]
fn repeated_event_is_logged_less_often() {
    let lines = |happened: u64| (1..=happened).filter(|count| should_log(*count)).count();
    assert_eq!((lines(16), lines(1 << 20)), (16, 16 + 16));
}
