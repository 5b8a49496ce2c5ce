//! Tests of operations on the data of files.

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::super::{Fetched, SMALL, data, fetch};
use super::{FH, ROOM, serve_any, write};
use crate::fuse::Transport;
use crate::fuse::abi::{self, Opcode};
use crate::fuse::testing::{Ending, Guest, MemoryTransport, claim_len, on_root, samples};

fn read(offset: u64, size: u32) -> Vec<u8> {
    let args = abi::ReadIn {
        fh: FH,
        offset,
        size,
        ..Default::default()
    };
    on_root(Opcode::Read, &[args.as_bytes()])
}

fn contents(guest: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    let n = rustix::io::pread(guest.fs().backing_file(), &mut bytes, 0).unwrap();
    bytes.truncate(n);
    bytes
}

#[test]
fn cached_read_and_write_complete_at_once() {
    let guest = Guest::ready();
    let written: abi::WriteOut = guest.serve(write(2, b"data"), 24).structure();
    assert_eq!(written.size, 4);
    assert_eq!(contents(&guest), b"\0\0data");
    let lengths = [
        (0, 6, 6),
        (0, 100, 6),
        (4, 100, 2),
        (6, 100, 0),
        (1 << 40, 100, 0),
        (0, 0, 0),
    ];
    for (offset, size, filled) in lengths {
        let ending = serve_any(&guest, read(offset, size), ROOM);
        let Ending::Filled(_, n) = ending else {
            panic!("{ending:?}")
        };
        assert_eq!((n, ending.errno()), (filled, 0));
    }
}

#[test]
fn read_is_limited_by_room() {
    let guest = Guest::ready();
    guest.serve(write(0, &[1; 100]), ROOM);
    let ending = serve_any(&guest, read(0, 100), 16 + 60);
    assert!(matches!(ending, Ending::Filled(_, 60)), "{ending:?}");
    assert_eq!(serve_any(&guest, read(0, 100), 15), Ending::Nothing);
}

#[test]
fn write_without_all_data_or_room_writes_nothing() {
    let guest = Guest::ready();
    let mut short = write(0, b"data");
    short.pop();
    assert_eq!(guest.serve(short.clone(), ROOM).errno(), libc::EINVAL);
    let len = short.len();
    claim_len(&mut short, len);
    assert_eq!(guest.serve(short, ROOM).errno(), libc::EINVAL);
    assert_eq!(guest.serve(write(0, b"data"), 23).errno(), libc::EINVAL);
    assert_eq!(contents(&guest), b"");
}

#[test]
fn unknown_handle_is_ebadf() {
    let guest = Guest::ready();
    for (opcode, mut bytes) in samples() {
        let on_file = [
            Opcode::Read,
            Opcode::Write,
            Opcode::Fsync,
            Opcode::Fsyncdir,
            Opcode::Fallocate,
            Opcode::CopyFileRange,
        ];
        if on_file.contains(&opcode) {
            bytes[40] ^= 0xff;
            assert_eq!(guest.serve(bytes, ROOM).errno(), libc::EBADF, "{opcode:?}");
        }
    }
}

#[test]
fn operation_that_may_wait_is_deferred() {
    let guest = Guest::ready();
    guest.serve(write(0, b"0123456789"), ROOM);
    guest.fs().calls();
    let sync = abi::FsyncIn {
        fh: FH,
        fsync_flags: 1,
        padding: 0,
    };
    for (opcode, call) in [
        (Opcode::Fsync, "file File"),
        (Opcode::Fsyncdir, "file Directory"),
    ] {
        let reply = guest.serve_deferred(on_root(opcode, &[sync.as_bytes()]), ROOM);
        assert_eq!(reply.body(), b"");
        assert_eq!(guest.fs().calls(), [call]);
    }
    let allocate = abi::FallocateIn {
        fh: FH,
        offset: 0,
        length: 16,
        ..Default::default()
    };
    let allocate = |mode| {
        on_root(
            Opcode::Fallocate,
            &[abi::FallocateIn { mode, ..allocate }.as_bytes()],
        )
    };
    assert_eq!(guest.serve_deferred(allocate(0), ROOM).body(), b"");
    assert_eq!(contents(&guest).len(), 16);
    assert_eq!(
        guest.serve_deferred(allocate(1 << 30), ROOM).errno(),
        libc::EOPNOTSUPP
    );
}

#[test]
fn copy_file_range_reply_has_width_of_request() {
    let guest = Guest::ready();
    guest.serve(write(0, b"0123456789"), ROOM);
    let args = abi::CopyFileRangeIn {
        fh_in: FH,
        off_in: 2,
        nodeid_out: 1,
        fh_out: FH,
        off_out: 20,
        len: 4,
        flags: 0,
    };
    let reply = guest.serve_deferred(on_root(Opcode::CopyFileRange, &[args.as_bytes()]), ROOM);
    assert_eq!(reply.structure::<abi::WriteOut>().size, 4);
    assert_eq!(contents(&guest)[20..], *b"2345");
    let huge = abi::CopyFileRangeIn {
        off_in: 8,
        off_out: 40,
        len: u64::MAX,
        ..args
    };
    let huge = on_root(Opcode::CopyFileRange64, &[huge.as_bytes()]);
    let copied: abi::CopyFileRangeOut = guest.serve_deferred(huge, ROOM).structure();
    assert_eq!(copied.bytes_copied, 16);
}

#[test]
fn dropped_future_drops_its_transport() {
    let guest = Guest::ready();
    let sync = abi::FsyncIn {
        fh: FH,
        ..Default::default()
    };
    let (transport, ending) = MemoryTransport::new(on_root(Opcode::Fsync, &[sync.as_bytes()]), 16);
    drop(guest.session.serve(transport));
    assert_eq!(ending.take(), Some(Ending::Dropped));
}

#[test]
fn write_payload_is_not_fetched() {
    let (mut transport, _) = MemoryTransport::new(write(0, &[1; 5000]), 0);
    let fetched = fetch(&mut transport, &mut [0; SMALL]).unwrap();
    assert!(matches!(fetched, Fetched::Whole(80)), "{fetched:?}");
    assert_eq!(transport.readable(), 5000);
}

#[test]
fn error_without_errno_is_eio() {
    assert_eq!(data::errno(&std::io::Error::other("no errno")), Errno::IO);
    assert_eq!(data::errno(&Errno::NOSPC.into()), Errno::NOSPC);
}
