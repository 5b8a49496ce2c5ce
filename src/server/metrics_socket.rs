//! The socket on which the counters are read.
//!
//! It is made before the process is split, so every serving process has it, whatever its sandbox. The
//! invariant: the file of a unix socket is removed by the process that was started.

use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::error::ServerError;
use crate::metrics::Address;
use crate::recovery::{self, PassedSocket};
use crate::vhost_user::{ListenError, Listener, SocketFile};

/// A listening socket, and its file if it has one.
#[derive(Debug)]
pub(super) struct MetricsSocket {
    socket: OwnedFd,
    file: Option<SocketFile>,
}

impl MetricsSocket {
    /// Listens on `address`. Replaces the socket file of a server that no longer runs.
    pub(super) fn bind(address: &Address) -> Result<Self, ServerError> {
        match address {
            Address::Unix(path) => {
                let busy = |error: &ListenError| matches!(error, ListenError::InUse(_));
                let mut listener = recovery::wait_while(|| Listener::bind(path), busy)
                    .map_err(ServerError::MetricsSocket)?;
                let file = listener.take_file();
                let socket = listener.as_fd().try_clone_to_owned();
                let socket = socket.map_err(|source| ServerError::metrics(address, source))?;
                log::info!("metrics are served on {address}");
                Ok(Self { socket, file })
            }
            Address::Tcp(wanted) => {
                let failed = |source| ServerError::metrics(address, source);
                let listener = TcpListener::bind(wanted).map_err(failed)?;
                // With port 0 the host has chosen one.
                let address = listener.local_addr().map_err(failed)?;
                log::info!("metrics are served on http://{address}/metrics");
                Ok(Self {
                    socket: listener.into(),
                    file: None,
                })
            }
        }
    }

    /// Whether a start could listen on `address`. Leaves nothing.
    pub(super) fn check(address: &Address) -> Result<(), ServerError> {
        match address {
            Address::Unix(path) => {
                Listener::check(path, false, None).map_err(ServerError::MetricsSocket)
            }
            Address::Tcp(wanted) => TcpListener::bind(wanted)
                .map(drop)
                .map_err(|source| ServerError::metrics(address, source)),
        }
    }

    /// Continues with the socket of the previous program.
    pub(super) fn left(passed: PassedSocket) -> Self {
        let PassedSocket { socket, file } = passed;
        Self { socket, file }
    }

    /// The file, if there is one.
    pub(super) fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }

    /// Leaves the socket to the serving process, and returns the file.
    pub(super) fn into_file(self) -> Option<SocketFile> {
        self.file
    }

    /// Gives the ownership of the file to the caller.
    pub(super) fn take_file(&mut self) -> Option<SocketFile> {
        self.file.take()
    }

    /// The socket, in a serving process: its file belongs to the process that was started.
    pub(super) fn into_socket(mut self) -> OwnedFd {
        std::mem::forget(self.file.take());
        self.socket
    }
}

impl AsFd for MetricsSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
