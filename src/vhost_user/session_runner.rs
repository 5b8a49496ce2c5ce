//! Runs a session, and ends it if memory of the front end is lost.
//!
//! A front end may truncate the file behind the guest's memory at any time. Lost memory reads as
//! zeros from then on, so no access faults, but the data is meaningless. The invariant: a session
//! whose memory was found lost ends with an error that says where.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::epoll;

use super::session::{End, Session, SessionError};
use super::session_loop::SessionLoop;
use super::{Runner, SessionSnapshot, Stop, restore};
use crate::device::Device;
use crate::guest_memory::{DirtyLog, MemoryLostEvent};
use crate::state::Table;
use crate::virtqueue::InflightRegion;

/// Serves one front end until it disconnects or `stop` fires. On return all queues are stopped and
/// drained, also if the session failed, and `table` has no session, unless the session was left to
/// another process. Requests in flight are recorded in `table` if the front end has no in-flight
/// region.
///
/// # Errors
///
/// Fails if the front end breaks the protocol, hands over unusable resources, or truncates memory.
pub fn serve<R: Runner>(
    stream: UnixStream,
    device: &Device,
    runner: &mut R,
    table: &Arc<Table>,
    stop: Stop<'_>,
) -> Result<End, SessionError> {
    run_until_memory_lost(runner, stop, |runner, memory_lost, stop| {
        let session = Session::new(device, runner, (table, memory_lost), stop.asked)?;
        session.begin();
        SessionLoop::new(stream, session, table).run(None, stop)
    })
}

/// Resumes the session of a process that has ended for any reason. Its queues resume at the
/// indexes of their rings, and message handling resumes with the pending message.
///
/// The caller guarantees that nothing in this process owns a descriptor that `snapshot` names.
///
/// # Errors
///
/// Fails as [`serve`] does, or if a descriptor is not what `snapshot` says.
pub(crate) fn resume<R: Runner>(
    snapshot: SessionSnapshot,
    device: &Device,
    runner: &mut R,
    table: &Arc<Table>,
    stop: Stop<'_>,
) -> Result<End, SessionError> {
    run_until_memory_lost(runner, stop, |runner, memory_lost, stop| {
        let stream = restore::socket(&snapshot)?;
        let session = Session::new(device, runner, (table, memory_lost), stop.asked)?;
        SessionLoop::new(stream, session, table).run(Some(snapshot), stop)
    })
}

/// Runs `serve`, stops it if memory is lost, and returns an error in that case.
fn run_until_memory_lost<R>(
    runner: &mut R,
    stop: Stop<'_>,
    serve: impl FnOnce(&mut R, &Arc<MemoryLostEvent>, Stop<'_>) -> Result<End, SessionError>,
) -> Result<End, SessionError> {
    let memory_lost = Arc::new(MemoryLostEvent::new().map_err(SessionError::Watch)?);
    let either = either_readable(stop.asked, memory_lost.as_fd()).map_err(SessionError::Watch)?;
    let stop_or_lost = Stop {
        asked: either.as_fd(),
        ..stop
    };
    let end = serve(runner, &memory_lost, stop_or_lost);
    match memory_lost.place() {
        None => end,
        Some(DirtyLog::GONE) => Err(SessionError::LogGone),
        // `GONE` is the address of the region's first byte.
        Some(address) if address >= InflightRegion::GONE => Err(SessionError::InflightGone),
        Some(address) => Err(SessionError::MemoryGone(address)),
    }
}

/// Returns a descriptor that is readable whenever one of two is.
fn either_readable(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for fd in [one, other] {
        let data = epoll::EventData::new_u64(0);
        epoll::add(&both, fd, data, epoll::EventFlags::IN)?;
    }
    Ok(both)
}
