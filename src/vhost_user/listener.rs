//! Where front ends connect: a socket of our own, or one that a launcher hands over.
//!
//! The invariant: a socket file is replaced or removed only if nobody listens on it, or if it
//! is the very file we made; and a socket that we make is at no moment open to anybody but the
//! server's user and the group that it is given to.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::sys;
use crate::sys::closing::First;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The most bytes of a socket's path: `sun_path` without the NUL at its end.
const LONGEST: usize = 107;

/// Why there is nothing to listen on; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another server has the socket.
    #[error("another server listens on {0}: stop it, or give this one another path with --socket")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} is there and is not a socket: remove it, or give another path with --socket")]
    NotASocket(PathBuf),
    /// Longer than an address of a socket can be.
    #[error(
        "{path} can't be the path of a socket: it has {len} bytes, and {LONGEST} is the most; give a \
         shorter one with --socket"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        len: usize,
    },
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
    /// The descriptor is a connection already.
    #[error(
        "descriptor {0}, given with --fd, is a connected socket, and this server waits for its VMM on \
         a listening one: listen before the server is started, or give a path with --socket"
    )]
    Connected(RawFd),
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
    first: Option<First>,
}

/// The file of a socket that we made; removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

impl Listener {
    /// Listens on a new socket at `path`, to which only the server's own user can connect; the file
    /// that a dead server left there is replaced.
    ///
    /// # Errors
    ///
    /// A live server or something other than a socket is at `path`, or the host refuses.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let fail = |source| ListenError::Bind {
            path: path.to_owned(),
            source,
        };
        let len = path.as_os_str().len();
        if len > LONGEST {
            return Err(ListenError::TooLong {
                path: path.to_owned(),
                len,
            });
        }
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
        let fail = |source: Errno| fail(source.into());
        let socket = bind_private(path).map_err(fail)?;
        let made = open_socket(path)
            .and_then(rustix::fs::fstat)
            .map_err(fail)?;
        Ok(Self {
            socket,
            name: path.display().to_string(),
            file: Some(SocketFile {
                path: path.to_owned(),
                device: made.st_dev,
                inode: made.st_ino,
            }),
            first: None,
        })
    }

    /// Lets the members of `group`, a name or a number, connect to a socket that we made.
    ///
    /// # Errors
    ///
    /// There is no such group, or the server may not give files to it.
    pub fn admit_group(&self, group: &str) -> Result<(), ListenError> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let path = &file.path;
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
        file.admit(id).map_err(|error| fail(error.into()))
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
        let listening = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&fd) == Ok(SocketType::STREAM)
            && sockopt::socket_acceptconn(&fd) == Ok(true);
        if !listening && rustix::net::getpeername(&fd).is_ok() {
            return Err(ListenError::Connected(fd.as_raw_fd()));
        }
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
            first: None,
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

    /// Has the socket closed before the files that a guest has, should the process be killed.
    pub fn close_first(&mut self) {
        self.first = Some(First::new(&self.socket));
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
    /// Gives the file to a group, and only then lets that group connect.
    fn admit(&self, group: u32) -> Result<(), Errno> {
        // By a descriptor: the path may be somebody else's file by now.
        let file = open_socket(&self.path)?;
        let stat = rustix::fs::fstat(&file)?;
        let ours = stat.st_uid == rustix::process::geteuid().as_raw();
        if (stat.st_dev, stat.st_ino) != (self.device, self.inode) || !ours {
            return Err(Errno::STALE);
        }
        let group = Some(Gid::from_raw(group));
        rustix::fs::chownat(&file, c"", None, group, AtFlags::EMPTY_PATH)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // Entries that a default ACL of the directory has added would come into force.
        match rustix::fs::removexattr(&path, c"system.posix_acl_access") {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
        rustix::fs::chmod(&path, Mode::RWXU | Mode::RWXG)
    }

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

/// A listening socket at `path` whose file has mode 0700 from the moment it is there, or less where the
/// umask takes something away.
fn bind_private(path: &Path) -> Result<UnixListener, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode that the socket has, less the umask.
    rustix::fs::fchmod(&socket, Mode::RWXU)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// The socket's file itself, `O_PATH`.
fn open_socket(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let mode = rustix::fs::fstat(&file)?.st_mode;
    match FileType::from_raw_mode(mode) {
        FileType::Socket => Ok(file),
        _ => Err(Errno::STALE),
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
    fn socket_is_private_whatever_the_umask() {
        // This thread's alone.
        sys::credentials::unshare_fs_context().unwrap();
        let dir = tempfile::tempdir().unwrap();
        for umask in [0, 0o002, 0o022, 0o077] {
            rustix::process::umask(Mode::from_raw_mode(umask));
            let path = dir.path().join(umask.to_string());
            let listener = Listener::bind(&path).unwrap();
            let mode = std::fs::symlink_metadata(&path).unwrap().mode();
            assert_eq!(mode & 0o7777, 0o700);
            drop(listener);
        }
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
            Err(ListenError::Connected(_))
        ));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            Listener::from_fd(file.into()),
            Err(ListenError::NotListening(_))
        ));
    }

    #[test]
    fn path_beyond_what_a_socket_can_have_is_refused_with_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let room = LONGEST - dir.path().as_os_str().len() - 1;
        assert!(Listener::bind(&dir.path().join("x".repeat(room))).is_ok());
        let long = Listener::bind(&dir.path().join("x".repeat(room + 1)));
        let error = long.unwrap_err();
        assert!(
            matches!(error, ListenError::TooLong { len: 108, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("107"), "{error}");
    }
}
