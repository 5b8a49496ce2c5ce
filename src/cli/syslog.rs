//! The log on its way to syslog.
//!
//! One record is one datagram to `/dev/log`, in the form that daemons have always sent. The
//! invariant: a log that nobody reads never makes the server wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

/// Where syslog listens.
const SOCKET: &str = "/dev/log";

/// The facility for daemons, times 8 (RFC 3164, 4.1.1).
const DAEMON: u8 = 3 << 3;

/// A connection to syslog; clones share it.
#[derive(Clone, Debug)]
pub struct Syslog {
    socket: Arc<UnixDatagram>,
}

impl Syslog {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Nobody listens on `/dev/log`.
    pub fn connect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect(SOCKET)?;
        Ok(Self {
            socket: Arc::new(socket),
        })
    }
}

impl AsFd for Syslog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What stands before a record of this level; `pid` is the number by which the host knows the
/// server.
#[must_use]
pub fn head(level: log::Level, pid: u32) -> String {
    let severity = match level {
        log::Level::Error => 3,
        log::Level::Warn => 4,
        log::Level::Info => 6,
        log::Level::Debug | log::Level::Trace => 7,
    };
    format!("<{}>ringfsd[{pid}]: ", DAEMON | severity)
}

impl io::Write for Syslog {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        // A full or restarted syslog loses records; the server goes on.
        let _ = self.socket.send(record.trim_ascii_end());
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_record_is_a_datagram_with_its_severity() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let mut syslog = Syslog {
            socket: Arc::new(ours),
        };
        let line = format!("{}it listens\n", head(log::Level::Info, 17));
        syslog.write_all(line.as_bytes()).unwrap();
        let mut bytes = [0; 100];
        let len = theirs.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"<30>ringfsd[17]: it listens");
        assert!(head(log::Level::Error, 1).starts_with("<27>"));
    }
}
