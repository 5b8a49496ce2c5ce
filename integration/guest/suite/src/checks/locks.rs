//! Locks: of whole files (flock) and of ranges (fcntl), between handles and between processes.
//! Invariant: holders and waiters take turns by batons, never by waiting for time to pass.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure_eq, refused, refused_with_any};
use crate::fixture::read_write;
use crate::lock::{self, Kind, Owner, Range};
use crate::process::{Baton, Child, in_child};

checks![
    flock_excludes_another_handle,
    flock_is_shared_by_readers,
    flock_excludes_another_process,
    flock_is_waited_for,
    flock_ends_with_its_last_handle,
    flock_ends_with_its_process,
    flock_is_upgraded_and_downgraded,
    range_lock_excludes_another_process,
    range_lock_of_other_bytes_is_free,
    range_lock_tells_its_holder,
    range_lock_is_waited_for,
    range_lock_is_split_by_an_unlock_in_the_middle,
    range_lock_ends_with_any_close_of_its_process,
    range_lock_of_an_open_file_excludes_another_handle,
    locks_of_both_kinds_do_not_meet,
];

const BUSY: [Errno; 2] = [Errno::AGAIN, Errno::ACCESS];
const EXCLUSIVE: FlockOperation = FlockOperation::NonBlockingLockExclusive;
const SHARED: FlockOperation = FlockOperation::NonBlockingLockShared;

fn flock_excludes_another_handle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (first, second) = (read_write(&path)?, read_write(&path)?);
    flock(&first, EXCLUSIVE)?;
    flock(&first, EXCLUSIVE)?;
    refused(flock(&second, EXCLUSIVE), Errno::AGAIN)?;
    refused(flock(&second, SHARED), Errno::AGAIN)?;
    flock(&first, FlockOperation::Unlock)?;
    flock(&second, EXCLUSIVE)?;
    refused(flock(&first, SHARED), Errno::AGAIN)
}

fn flock_is_shared_by_readers(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (first, second, third) = (read_write(&path)?, read_write(&path)?, read_write(&path)?);
    flock(&first, SHARED)?;
    flock(&second, SHARED)?;
    refused(flock(&third, EXCLUSIVE), Errno::AGAIN)?;
    flock(&first, FlockOperation::Unlock)?;
    refused(flock(&third, EXCLUSIVE), Errno::AGAIN)?;
    flock(&second, FlockOperation::Unlock)?;
    Ok(flock(&third, EXCLUSIVE)?)
}

fn flock_excludes_another_process(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    flock(&file, EXCLUSIVE)?;
    in_child(|| refused(flock(read_write(&path)?, EXCLUSIVE), Errno::AGAIN))?;
    flock(&file, FlockOperation::Unlock)?;
    in_child(|| Ok(flock(read_write(&path)?, EXCLUSIVE)?))?;
    Ok(flock(&file, EXCLUSIVE)?)
}

fn flock_is_waited_for(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    flock(&file, EXCLUSIVE)?;
    let asked = Baton::new()?;
    let waiter = Child::start(|| {
        let file = read_write(&path)?;
        asked.pass()?;
        flock(&file, FlockOperation::LockExclusive)?;
        ensure_eq!(fs::read(&path)?, b"released");
        Ok(())
    })?;
    asked.wait()?;
    waiter.let_it_sleep();
    // The waiter must not prevent this.
    file.write_all_at(b"released", 0)?;
    flock(&file, FlockOperation::Unlock)?;
    waiter.join()
}

fn flock_ends_with_its_last_handle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (first, other) = (read_write(&path)?, read_write(&path)?);
    flock(&first, EXCLUSIVE)?;
    let second = first.try_clone()?;
    drop(first);
    refused(flock(&other, EXCLUSIVE), Errno::AGAIN)?;
    drop(second);
    Ok(flock(&other, EXCLUSIVE)?)
}

fn flock_ends_with_its_process(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (held, end) = (Baton::new()?, Baton::new()?);
    let holder = Child::start(|| {
        let file = read_write(&path)?;
        flock(&file, EXCLUSIVE)?;
        held.pass()?;
        end.wait()
    })?;
    held.wait()?;
    let file = read_write(&path)?;
    refused(flock(&file, EXCLUSIVE), Errno::AGAIN)?;
    end.pass()?;
    holder.join()?;
    // The last close is told to a server after the process has gone.
    Ok(flock(&file, FlockOperation::LockExclusive)?)
}

fn flock_is_upgraded_and_downgraded(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (first, second) = (read_write(&path)?, read_write(&path)?);
    flock(&first, SHARED)?;
    flock(&first, EXCLUSIVE)?;
    refused(flock(&second, SHARED), Errno::AGAIN)?;
    flock(&first, SHARED)?;
    flock(&second, SHARED)?;
    refused(flock(&first, EXCLUSIVE), Errno::AGAIN)
}

const ALL: Range = Range(0, 0);

fn range_lock_excludes_another_process(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    lock::set(file.as_fd(), Owner::Process, Kind::Write, Range(100, 50))?;
    in_child(|| {
        let file = read_write(&path)?;
        let set = |kind, range| lock::set(file.as_fd(), Owner::Process, kind, range);
        refused_with_any(set(Kind::Write, Range(149, 1)), &BUSY)?;
        refused_with_any(set(Kind::Read, Range(100, 1)), &BUSY)?;
        refused_with_any(set(Kind::Write, ALL), &BUSY)
    })?;
    lock::set(file.as_fd(), Owner::Process, Kind::Read, Range(100, 50))?;
    in_child(|| {
        let file = read_write(&path)?;
        let set = |kind, range| lock::set(file.as_fd(), Owner::Process, kind, range);
        set(Kind::Read, Range(100, 50))?;
        refused_with_any(set(Kind::Write, Range(100, 50)), &BUSY)
    })?;
    lock::set(file.as_fd(), Owner::Process, Kind::Unlock, ALL)?;
    in_child(|| {
        Ok(lock::set(
            read_write(&path)?.as_fd(),
            Owner::Process,
            Kind::Write,
            ALL,
        )?)
    })
}

fn range_lock_of_other_bytes_is_free(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    lock::set(file.as_fd(), Owner::Process, Kind::Write, Range(100, 50))?;
    in_child(|| {
        let file = read_write(&path)?;
        lock::set(file.as_fd(), Owner::Process, Kind::Write, Range(0, 100))?;
        lock::set(file.as_fd(), Owner::Process, Kind::Write, Range(150, 0))?;
        Ok(lock::set(
            file.as_fd(),
            Owner::Process,
            Kind::Read,
            Range(1 << 40, 5),
        )?)
    })
}

fn range_lock_tells_its_holder(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    lock::set(file.as_fd(), Owner::Process, Kind::Write, Range(10, 10))?;
    let this = rustix::process::getpid().as_raw_nonzero().get();
    in_child(|| {
        let file = read_write(&path)?;
        ensure_eq!(lock::holder(file.as_fd(), Kind::Write, ALL)?, Some(this));
        ensure_eq!(lock::holder(file.as_fd(), Kind::Write, Range(20, 5))?, None);
        Ok(())
    })?;
    // One's own lock doesn't conflict.
    ensure_eq!(lock::holder(file.as_fd(), Kind::Write, ALL)?, None);
    Ok(())
}

fn range_lock_is_waited_for(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    lock::set(file.as_fd(), Owner::Process, Kind::Write, Range(0, 10))?;
    let asked = Baton::new()?;
    let waiter = Child::start(|| {
        let file = read_write(&path)?;
        asked.pass()?;
        lock::set_waiting(file.as_fd(), Owner::Process, Kind::Read, Range(5, 1))?;
        ensure_eq!(fs::read(&path)?, b"released");
        Ok(())
    })?;
    asked.wait()?;
    waiter.let_it_sleep();
    file.write_all_at(b"released", 0)?;
    lock::set(file.as_fd(), Owner::Process, Kind::Unlock, Range(0, 10))?;
    waiter.join()
}

fn range_lock_is_split_by_an_unlock_in_the_middle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    lock::set(file.as_fd(), Owner::Process, Kind::Write, Range(0, 100))?;
    lock::set(file.as_fd(), Owner::Process, Kind::Unlock, Range(40, 20))?;
    in_child(|| {
        let file = read_write(&path)?;
        let set = |range| lock::set(file.as_fd(), Owner::Process, Kind::Write, range);
        set(Range(40, 20))?;
        refused_with_any(set(Range(39, 1)), &BUSY)?;
        refused_with_any(set(Range(60, 1)), &BUSY)
    })
}

fn range_lock_ends_with_any_close_of_its_process(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    lock::set(file.as_fd(), Owner::Process, Kind::Write, ALL)?;
    // Also with that of a handle that has nothing to do with it: so POSIX wants it.
    drop(read_write(&path)?);
    in_child(|| {
        Ok(lock::set(
            read_write(&path)?.as_fd(),
            Owner::Process,
            Kind::Write,
            ALL,
        )?)
    })
}

fn range_lock_of_an_open_file_excludes_another_handle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (first, second) = (read_write(&path)?, read_write(&path)?);
    lock::set(first.as_fd(), Owner::OpenFile, Kind::Write, Range(0, 10))?;
    let set = |range| lock::set(second.as_fd(), Owner::OpenFile, Kind::Write, range);
    refused_with_any(set(Range(5, 10)), &BUSY)?;
    set(Range(10, 10))?;
    // A close elsewhere does not end it.
    drop(read_write(&path)?);
    refused_with_any(set(Range(0, 1)), &BUSY)?;
    drop(first);
    Ok(lock::set_waiting(
        second.as_fd(),
        Owner::OpenFile,
        Kind::Write,
        Range(0, 1),
    )?)
}

fn locks_of_both_kinds_do_not_meet(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    flock(&file, EXCLUSIVE)?;
    in_child(|| {
        Ok(lock::set(
            read_write(&path)?.as_fd(),
            Owner::Process,
            Kind::Write,
            ALL,
        )?)
    })?;
    lock::set(file.as_fd(), Owner::Process, Kind::Write, ALL)?;
    in_child(|| refused(flock(read_write(&path)?, EXCLUSIVE), Errno::AGAIN))
}
