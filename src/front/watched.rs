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

use super::Runner;
use super::session::{self, End, SessionError};
use crate::device::Device;
use crate::state::Table;
use crate::virtqueue::InflightRegion;
use crate::virtqueue::memory::{Alarm, DirtyLog};

/// Serves one front end until it disconnects or `stop` becomes readable. All queues are
/// stopped and drained when this returns, however it returns. What is in flight is kept in `table`,
/// where the front end doesn't keep it.
///
/// # Errors
///
/// The front end breaks the protocol, hands over what can't be used, or takes it away again.
pub fn serve<R: Runner + Send>(
    stream: UnixStream,
    device: &Device,
    runner: &mut R,
    table: &Arc<Table>,
    stop: BorrowedFd<'_>,
) -> Result<End, SessionError> {
    let alarm = Arc::new(Alarm::new().map_err(SessionError::Watch)?);
    let either = either(stop, alarm.as_fd()).map_err(SessionError::Watch)?;
    let end = session::serve(stream, device, runner, (table, &alarm), either.as_fd());
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
