//! Where front ends connect: a socket of our own, or one that a launcher hands over.
//!
//! The invariant: a socket file is replaced or removed only if nobody listens on it, or if it
//! is the very file we made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::sys;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why there is nothing to listen on; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another server has the socket.
    #[error("another server listens on {0}: stop it, or give this one another path with --socket")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} is there and is not a socket: remove it, or give another path with --socket")]
    NotASocket(PathBuf),
    /// The socket can't be made.
    #[error("making the socket {path}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no such group.
    #[error("there is no group {0}, given with --socket-group")]
    NoGroup(String),
    /// The socket can't be given to a group.
    #[error("giving the socket {path} to group {group}")]
    Group {
        /// Which socket.
        path: PathBuf,
        /// Whom to.
        group: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The descriptor of `--fd` is not open.
    #[error("descriptor {fd}, given with --fd, was not left open by the launcher")]
    NotOpen {
        /// Its number.
        fd: RawFd,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The descriptor is not what `--fd` wants.
    #[error("descriptor {0} is not a listening unix stream socket, which --fd takes")]
    NotListening(RawFd),
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    name: String,
    file: Option<SocketFile>,
}

/// The file of a socket that we made; removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Listens on a new socket at `path`; the file that a dead server left there is replaced.
    ///
    /// # Errors
    ///
    /// A live server or something other than a socket is at `path`, or the host refuses.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let fail = |source| ListenError::Bind {
            path: path.to_owned(),
            source,
        };
        match std::fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => {
                return Err(ListenError::NotASocket(path.to_owned()));
            }
            Ok(_) if is_alive(path).map_err(fail)? => {
                return Err(ListenError::InUse(path.to_owned()));
            }
            Ok(_) => {
                log::info!("replacing the socket {} of a dead server", path.display());
                std::fs::remove_file(path).map_err(fail)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (),
            Err(error) => return Err(fail(error)),
        }
        let socket = UnixListener::bind(path).map_err(fail)?;
        let made = std::fs::symlink_metadata(path).map_err(fail)?;
        Ok(Self {
            socket,
            name: path.display().to_string(),
            file: Some(SocketFile {
                path: path.to_owned(),
                device: made.dev(),
                inode: made.ino(),
            }),
        })
    }

    /// Lets the members of `group`, a name or a number, connect to a socket that we made.
    ///
    /// # Errors
    ///
    /// There is no such group, or the server may not give files to it.
    pub fn admit_group(&self, group: &str) -> Result<(), ListenError> {
        let Some(SocketFile { path, .. }) = &self.file else {
            return Ok(());
        };
        let fail = |source| ListenError::Group {
            path: path.clone(),
            group: group.to_owned(),
            source,
        };
        let id = match group.parse() {
            Ok(id) => id,
            Err(_) => sys::group::id_of(group)
                .map_err(|error| fail(error.into()))?
                .ok_or_else(|| ListenError::NoGroup(group.to_owned()))?,
        };
        std::os::unix::fs::lchown(path, None, Some(id)).map_err(fail)?;
        let mode = std::fs::Permissions::from_mode(0o660);
        std::fs::set_permissions(path, mode).map_err(fail)
    }

    /// Takes over the listening socket that the launcher left open as descriptor `fd`; its file
    /// stays the launcher's. To be called before other descriptors are made.
    ///
    /// # Errors
    ///
    /// The descriptor is not open, or is not a listening unix stream socket.
    pub fn inherited(fd: RawFd) -> Result<Self, ListenError> {
        match sys::inherit::inherited_fd(fd) {
            Ok(fd) => Self::from_fd(fd),
            Err(source) => Err(ListenError::NotOpen { fd, source }),
        }
    }

    fn from_fd(fd: OwnedFd) -> Result<Self, ListenError> {
        use rustix::net::sockopt;
        use std::os::fd::AsRawFd;
        let listening = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&fd) == Ok(SocketType::STREAM)
            && sockopt::socket_acceptconn(&fd) == Ok(true);
        if !listening {
            return Err(ListenError::NotListening(fd.as_raw_fd()));
        }
        let socket = UnixListener::from(fd);
        let address = socket.local_addr().ok();
        let name = match address.as_ref().and_then(SocketAddr::as_pathname) {
            Some(path) => path.display().to_string(),
            None => "an inherited socket".to_owned(),
        };
        Ok(Self {
            socket,
            name,
            file: None,
        })
    }

    /// Goes on with a listening socket that an earlier program in this process has left open.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn left(fd: OwnedFd, file: Option<SocketFile>) -> Result<Self, ListenError> {
        let mut listener = Self::from_fd(fd)?;
        if let Some(file) = &file {
            listener.name = file.path.display().to_string();
        }
        listener.file = file;
        Ok(listener)
    }

    /// The file of a socket that we made.
    #[must_use]
    pub fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }

    /// Takes the next connection; waits for one.
    ///
    /// # Errors
    ///
    /// Those of `accept(2)`.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _peer)| stream)
    }

    /// Where it listens, for people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stops listening here and keeps the file, which another process listens on.
    #[must_use]
    pub fn into_file(self) -> Option<SocketFile> {
        self.file
    }

    /// Goes on listening, and gives the file away.
    pub fn take_file(&mut self) -> Option<SocketFile> {
        self.file.take()
    }

    /// Leaves the file to another process, which has it by [`into_file`](Self::into_file) or
    /// [`take_file`](Self::take_file).
    pub fn leave_file(&mut self) {
        std::mem::forget(self.file.take());
    }
}

impl SocketFile {
    /// Where it is, its device and its inode.
    #[must_use]
    pub fn place(&self) -> (&Path, u64, u64) {
        (&self.path, self.device, self.inode)
    }

    /// What an earlier program in this process has made.
    #[must_use]
    pub fn left(path: PathBuf, device: u64, inode: u64) -> Self {
        Self {
            path,
            device,
            inode,
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|there| (there.dev(), there.ino()) == (self.device, self.inode));
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!("removing the socket {}: {error}", self.path.display());
        }
    }
}

/// Whether a process has the socket at `path` open. The question is put as a datagram socket,
/// which a stream socket refuses by its type: so a live server never notices it.
fn is_alive(path: &Path) -> io::Result<bool> {
    let address = SocketAddrUnix::new(path)?;
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&probe, &address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Ok(()) | Err(Errno::PROTOTYPE) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_of_a_dead_server_is_replaced_and_that_of_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let first = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(_))));
        first.socket.set_nonblocking(true).unwrap();
        assert!(first.accept().is_err(), "the probe is not a connection");
    }

    #[test]
    fn a_file_that_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, ListenError::NotASocket(_)));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn the_socket_file_goes_with_the_listener_unless_it_is_another_by_then() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(Listener::bind(&path).unwrap());
        assert!(!path.exists());

        let listener = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn a_descriptor_that_does_not_listen_is_refused() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(matches!(
            Listener::from_fd(one.into()),
            Err(ListenError::NotListening(_))
        ));
    }
}
