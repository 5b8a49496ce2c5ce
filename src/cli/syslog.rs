//! A log writer that sends records to syslog.
//!
//! Each record is one datagram to `/dev/log`, in the traditional format (RFC 3164). The invariant: a
//! syslog that doesn't read never blocks the server.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use super::persona::Behaviour;

/// Where syslog listens.
const SOCKET: &str = "/dev/log";

/// A connection to syslog; clones share it.
#[derive(Clone, Debug)]
pub struct Syslog {
    socket: Arc<UnixDatagram>,
}

impl Syslog {
    /// Connects to `/dev/log`.
    ///
    /// # Errors
    ///
    /// Fails if no process listens there.
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

/// The header of a record of this level; `pid` is the server's process ID on the host.
#[must_use]
pub fn header(behaviour: &Behaviour, level: log::Level, pid: u32) -> String {
    let severity = match level {
        log::Level::Error => 3,
        log::Level::Warn => 4,
        log::Level::Info => 6,
        log::Level::Debug | log::Level::Trace => 7,
    };
    let Behaviour {
        program,
        syslog_facility,
        ..
    } = behaviour;
    // RFC 3164, 4.1.1.
    let priority = syslog_facility << 3 | severity;
    format!("<{priority}>{program}[{pid}]: ")
}

impl io::Write for Syslog {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        // If syslog is full or restarting, the record is lost and the server continues.
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
    use crate::cli::Persona;
    use std::io::Write;

    #[test]
    fn record_is_one_datagram_with_its_severity() {
        let (sender, receiver) = UnixDatagram::pair().unwrap();
        let mut syslog = Syslog {
            socket: Arc::new(sender),
        };
        let own = Persona::Ringfsd.behaviour();
        let line = format!("{}it listens\n", header(own, log::Level::Info, 17));
        syslog.write_all(line.as_bytes()).unwrap();
        let mut bytes = [0; 100];
        let len = receiver.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"<30>ringfsd[17]: it listens");
        assert!(header(own, log::Level::Error, 1).starts_with("<27>"));
        let other = Persona::Virtiofsd.behaviour();
        assert_eq!(header(other, log::Level::Warn, 1), "<12>virtiofsd[1]: ");
    }
}
