//! A session that ends when the memory it was given is taken away.
//!
//! A front end may truncate the file behind the guest's memory at any time. What is gone reads as
//! zeros from then on, so nothing breaks at once, but nothing that follows makes sense. The
//! invariant: a session whose memory was found gone ends, with an error that says where.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::epoll;

use super::session::{End, Session, SessionError};
use super::session_loop::SessionLoop;
use super::{Runner, SessionSnapshot, Stop, restore};
use crate::device::Device;
use crate::state::Table;
use crate::virtqueue::InflightRegion;
use crate::virtqueue::memory::{DirtyLog, MemoryLostEvent};

/// Serves one front end until it disconnects or is to be stopped. All queues are stopped and
/// drained when this returns, however it returns; and `table` knows of no session any more, unless
/// it is left to another process. What is in flight is kept there, where the front end doesn't
/// keep it.
///
/// # Errors
///
/// The front end breaks the protocol, hands over what can't be used, or takes it away again.
pub fn serve<R: Runner + Send>(
    stream: UnixStream,
    device: &Device,
    runner: &mut R,
    table: &Arc<Table>,
    stop: Stop<'_>,
) -> Result<End, SessionError> {
    watch(runner, stop, |runner, alarm, stop| {
        let session = Session::new(device, runner, (table, alarm), stop.asked);
        session.begin();
        let session_loop = SessionLoop::new(stream, session, table)?;
        session_loop.run(None, stop)
    })
}

/// Goes on with a session that another process has left behind, however it ended. Its queues go on
/// where their rings stand, and messages where they were.
///
/// To be called when nobody in this process owns a descriptor that the record names.
///
/// # Errors
///
/// As [`serve`]; and what the record says is not there.
pub fn resume<R: Runner + Send>(
    record: SessionSnapshot,
    device: &Device,
    runner: &mut R,
    table: &Arc<Table>,
    stop: Stop<'_>,
) -> Result<End, SessionError> {
    watch(runner, stop, |runner, alarm, stop| {
        let stream = restore::socket(&record)?;
        let session = Session::new(device, runner, (table, alarm), stop.asked);
        let session_loop = SessionLoop::new(stream, session, table)?;
        session_loop.run(Some(record), stop)
    })
}

fn watch<R>(
    runner: &mut R,
    stop: Stop<'_>,
    serve: impl FnOnce(&mut R, &Arc<MemoryLostEvent>, Stop<'_>) -> Result<End, SessionError>,
) -> Result<End, SessionError> {
    let alarm = Arc::new(MemoryLostEvent::new().map_err(SessionError::Watch)?);
    let either = either(stop.asked, alarm.as_fd()).map_err(SessionError::Watch)?;
    let watched = Stop {
        asked: either.as_fd(),
        ..stop
    };
    let end = serve(runner, &alarm, watched);
    match alarm.place() {
        None => end,
        Some(DirtyLog::GONE) => Err(SessionError::LogGone),
        // Counted on from the first byte's.
        Some(place) if place >= InflightRegion::GONE => Err(SessionError::InflightGone),
        Some(place) => Err(SessionError::MemoryGone(place)),
    }
}

/// A descriptor that is readable when one of two is.
fn either(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for fd in [one, other] {
        let data = epoll::EventData::new_u64(0);
        epoll::add(&both, fd, data, epoll::EventFlags::IN)?;
    }
    Ok(both)
}
