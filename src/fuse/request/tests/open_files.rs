//! Tests of locks and device control.

use super::*;
use crate::io::LockKind;

fn lock_in(kind: i32, start: u64, end: u64) -> abi::LkIn {
    abi::LkIn {
        fh: 7,
        owner: 9,
        lk: abi::FileLock {
            start,
            end,
            kind: kind.cast_unsigned(),
            pid: 42,
        },
        ..Default::default()
    }
}

fn locking(opcode: Opcode, args: &abi::LkIn) -> Result<Locking, Fault> {
    match decode(&on_root(opcode, &[args.as_bytes()])) {
        Ok(request) => match request.operation {
            Operation::Setlk(locking) => Ok(locking),
            other => panic!("{other:?}"),
        },
        Err(error) => Err(error.fault),
    }
}

#[test]
fn record_lock_is_acquired_released_or_waited_for() {
    for (kind, meaning) in [
        (libc::F_RDLCK, LockKind::Shared),
        (libc::F_WRLCK, LockKind::Exclusive),
        (libc::F_UNLCK, LockKind::Unlock),
    ] {
        for (opcode, wait) in [(Opcode::Setlk, false), (Opcode::Setlkw, true)] {
            let expected = Locking {
                handle: Handle(7),
                owner: LockOwner(9),
                lock: Lock::Record(RecordLock {
                    kind: meaning,
                    start: 10,
                    end: 20,
                }),
                wait,
            };
            assert_eq!(locking(opcode, &lock_in(kind, 10, 20)), Ok(expected));
        }
    }
}

#[test]
fn flock_locks_whole_file_for_any_range() {
    for (start, end) in [(0, i64::MAX as u64), (0, u64::MAX), (5, 3)] {
        let args = abi::LkIn {
            lk_flags: abi::lk_flags::FLOCK,
            ..lock_in(libc::F_WRLCK, start, end)
        };
        let lock = locking(Opcode::Setlk, &args).unwrap().lock;
        assert_eq!(lock, Lock::Whole(LockKind::Exclusive));
        // GETLK doesn't exist for it.
        let asked = on_root(Opcode::Getlk, &[args.as_bytes()]);
        assert_eq!(fault(&asked), Fault::Value("type"));
    }
}

#[test]
fn invalid_locks_are_refused() {
    let most = i64::MAX as u64;
    assert!(locking(Opcode::Setlk, &lock_in(libc::F_RDLCK, 0, most)).is_ok());
    assert!(locking(Opcode::Setlk, &lock_in(libc::F_RDLCK, 7, 7)).is_ok());
    for (kind, start, end, field) in [
        (libc::F_RDLCK, 8, 7, "range"),
        (libc::F_RDLCK, 0, most + 1, "range"),
        (libc::F_RDLCK, u64::MAX, u64::MAX, "range"),
        (libc::F_UNLCK, 0, u64::MAX, "range"),
        (3, 0, 10, "type"),
        (-1, 0, 10, "type"),
    ] {
        for opcode in [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw] {
            let bytes = on_root(opcode, &[lock_in(kind, start, end).as_bytes()]);
            assert_eq!(fault(&bytes), Fault::Value(field), "{opcode:?} {kind}");
            assert_eq!(errno(&bytes), Errno::INVAL);
        }
    }
}

#[test]
fn getlk_passes_requested_lock() {
    let ask = |kind| on_root(Opcode::Getlk, &[lock_in(kind, 10, 20).as_bytes()]);
    let bytes = ask(libc::F_WRLCK);
    let Operation::Getlk {
        handle,
        owner,
        lock,
    } = decode(&bytes).unwrap().operation
    else {
        panic!("not a GETLK");
    };
    assert_eq!((handle, owner), (Handle(7), LockOwner(9)));
    assert_eq!(
        (lock.kind, lock.start, lock.end),
        (LockKind::Exclusive, 10, 20)
    );
    assert_eq!(fault(&ask(libc::F_UNLCK)), Fault::Value("type"));
}

fn ioctl_with(args: abi::IoctlIn, data: &[u8]) -> Result<Ioctl, Fault> {
    match decode(&on_root(Opcode::Ioctl, &[args.as_bytes(), data])) {
        Ok(request) => match request.operation {
            Operation::Ioctl { handle, ioctl } => {
                assert_eq!(handle, Handle(args.fh));
                Ok(ioctl)
            }
            other => panic!("{other:?}"),
        },
        Err(error) => Err(error.fault),
    }
}

fn ioctl(cmd: u32, in_size: u32, out_size: u32, data: &[u8]) -> Result<Ioctl, Fault> {
    let args = abi::IoctlIn {
        fh: 7,
        cmd,
        in_size,
        out_size,
        ..Default::default()
    };
    ioctl_with(args, data)
}

const GET: u32 = 0x8008_6601;
const SET: u32 = 0x4008_6602;
const GET_EXTENDED: u32 = 0x801c_581f;
const SET_EXTENDED: u32 = 0x401c_5820;

#[test]
fn only_ioctls_for_inode_flags_are_supported() {
    assert_eq!(ioctl(GET, 0, 4, &[]), Ok(Ioctl::GetFlags { size: 4 }));
    assert_eq!(ioctl(GET, 0, 8, &[]), Ok(Ioctl::GetFlags { size: 8 }));
    let flags = 0x20u32.to_ne_bytes();
    assert_eq!(ioctl(SET, 4, 0, &flags), Ok(Ioctl::SetFlags(0x20)));
    let long = 0x20u64.to_ne_bytes();
    assert_eq!(ioctl(SET, 8, 0, &long), Ok(Ioctl::SetFlags(0x20)));
    assert_eq!(ioctl(GET_EXTENDED, 0, 28, &[]), Ok(Ioctl::GetExtended));
    let all = [7; 28];
    assert_eq!(
        ioctl(SET_EXTENDED, 28, 0, &all),
        Ok(Ioctl::SetExtended(all))
    );
    for (cmd, in_size, out_size) in [
        (GET, 0, 0),
        (GET, 0, 5),
        (GET, 0, u32::MAX),
        (SET, 0, 0),
        (SET, 5, 0),
        (GET_EXTENDED, 0, 27),
        (SET_EXTENDED, 29, 0),
        (0, 4, 4),
        (0x5401, 0, 60),
        (u32::MAX, u32::MAX, u32::MAX),
    ] {
        let other = ioctl(cmd, in_size, out_size, &[0; 64]);
        assert_eq!(other, Ok(Ioctl::Other), "{cmd:#x} {in_size} {out_size}");
    }
}

#[test]
fn ioctl_with_less_data_than_counted_is_refused() {
    for len in 0..4 {
        assert_eq!(ioctl(SET, 4, 0, &[0; 4][..len]), Err(Fault::Truncated));
    }
    for len in 0..28 {
        let short = ioctl(SET_EXTENDED, 28, 0, &[0; 28][..len]);
        assert_eq!(short, Err(Fault::Truncated));
    }
}

#[test]
fn unrestricted_ioctl_is_not_supported() {
    let args = abi::IoctlIn {
        flags: abi::ioctl_flags::UNRESTRICTED,
        cmd: SET,
        in_size: 4,
        ..Default::default()
    };
    assert_eq!(ioctl_with(args, &[0; 4]), Ok(Ioctl::Other));
}

proptest! {
    #[test]
    fn any_lock_is_one_that_a_file_can_have_or_refused(
        kind in prop_oneof![0i32..4, any::<i32>()],
        start in prop_oneof![0u64..100, any::<u64>()],
        end in prop_oneof![0u64..100, any::<u64>()],
        flags in 0u32..4,
        which in 0..3usize,
    ) {
        let opcode = [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw][which];
        let args = abi::LkIn { lk_flags: flags, ..lock_in(kind, start, end) };
        let bytes = on_root(opcode, &[args.as_bytes()]);
        match decode(&bytes).map(|request| request.operation) {
            Ok(Operation::Setlk(Locking { lock: Lock::Record(lock), .. })
                | Operation::Getlk { lock, .. }) => {
                prop_assert!(lock.start <= lock.end && lock.end <= i64::MAX as u64);
            }
            Ok(Operation::Setlk(Locking { lock: Lock::Whole(_), .. })) => {
                prop_assert!(flags & abi::lk_flags::FLOCK != 0);
            }
            Ok(other) => prop_assert!(false, "{other:?}"),
            Err(error) => prop_assert_eq!(error.errno(), Errno::INVAL),
        }
    }

    #[test]
    fn any_ioctl_is_decoded_or_refused(
        cmd in prop_oneof![
            Just(GET), Just(SET), Just(GET_EXTENDED), Just(SET_EXTENDED), any::<u32>()
        ],
        flags in any::<u32>(),
        in_size in prop_oneof![0u32..30, any::<u32>()],
        out_size in prop_oneof![0u32..30, any::<u32>()],
        data in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let args = abi::IoctlIn { cmd, flags, in_size, out_size, ..Default::default() };
        let known = [GET, SET, GET_EXTENDED, SET_EXTENDED].contains(&cmd);
        match ioctl_with(args, &data) {
            Ok(Ioctl::Other) => {}
            Ok(_) => prop_assert!(known),
            Err(fault) => prop_assert_eq!(fault, Fault::Truncated),
        }
    }
}
