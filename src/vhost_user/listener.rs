//! The listening socket for front ends: created by the server, or inherited from a launcher.
//!
//! The invariant: a socket file is replaced or removed only if no process listens on it, or if it
//! is the file that this server created. A socket that the server creates is at no time accessible
//! to anyone but the server's user and the group that `--socket-group` names.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::sys;
use crate::sys::closing::First;
use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path of a socket in bytes: `sun_path` without its terminating NUL.
const MAX_PATH_LEN: usize = 107;

/// Why the server can't listen. The message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another server listens on the socket.
    #[error("another server listens on {0}: stop it, or give this one another path with --socket")]
    InUse(PathBuf),
    /// The path names a file that is not a socket.
    #[error("{0} exists and is not a socket: remove it, or give another path with --socket")]
    NotASocket(PathBuf),
    /// The path is longer than the address of a socket can be.
    #[error(
        "{path} can't be the path of a socket: it has {len} bytes, and the limit is {MAX_PATH_LEN}; \
         give a shorter one with --socket"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Creating the socket failed.
    #[error("creating the socket {path}")]
    Bind {
        /// Path of the socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The group of `--socket-group` doesn't exist.
    #[error("there is no group {0}, given with --socket-group")]
    NoGroup(String),
    /// Changing the socket's group failed.
    #[error("giving the socket {path} to group {group}")]
    Group {
        /// Path of the socket.
        path: PathBuf,
        /// Name or number of the group.
        group: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// None of the sockets that a service manager has passed is the one of `--socket`.
    #[error(
        "the service manager has passed {others} and not {path}, given with --socket: give the socket          unit's ListenStream= to --socket"
    )]
    NotPassed {
        /// The path of `--socket`.
        path: PathBuf,
        /// The sockets that were passed.
        others: String,
    },
    /// The descriptor of `--fd` is not open.
    #[error("descriptor {fd}, given with --fd, was not left open by the launcher")]
    NotOpen {
        /// Its number.
        fd: RawFd,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The descriptor of `--fd` is a connection instead of a listening socket.
    #[error(
        "descriptor {0}, given with --fd, is a connected socket, and this server needs a listening \
         one: listen before starting the server, or give a path with --socket"
    )]
    Connected(RawFd),
    /// The descriptor of `--fd` is not a listening Unix stream socket.
    #[error("descriptor {0}, given with --fd, is not a listening Unix stream socket")]
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

/// The file of a socket that this server created; dropping this removes the file.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// Connections that the kernel queues until they are accepted.
const BACKLOG: i32 = 128;

impl Listener {
    /// Listens on a new socket at `path`, to which only the server's own user can connect. Replaces
    /// the socket file of a server that no longer runs.
    ///
    /// # Errors
    ///
    /// Fails if a running server or something other than a socket is at `path`, or if the host
    /// refuses.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        Self::bind_replacing(path, false)
    }

    /// As [`bind`](Self::bind), but also replaces a file that isn't a socket.
    ///
    /// # Errors
    ///
    /// Fails if a running server or a directory is at `path`, or if the host refuses.
    pub fn bind_over(path: &Path) -> Result<Self, ListenError> {
        Self::bind_replacing(path, true)
    }

    /// Checks whether a socket can be created at `path` now, with `any` also in the place of a file that
    /// isn't a socket, and whether `group` exists. Creates and changes nothing.
    ///
    /// # Errors
    ///
    /// As for [`bind`](Self::bind) and [`admit_group`](Self::admit_group).
    pub(crate) fn check(path: &Path, any: bool, group: Option<&str>) -> Result<(), ListenError> {
        present_at(path, any)?;
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let access = Access::WRITE_OK | Access::EXEC_OK;
        rustix::fs::accessat(CWD, parent, access, AtFlags::EACCESS)
            .map_err(|source| cant_bind(path, source.into()))?;
        group.map_or(Ok(()), |group| id_of_group(group, path).map(|_| ()))
    }

    /// A listening socket without a file, which the kernel has named and nobody is told of.
    ///
    /// # Errors
    ///
    /// The host refuses.
    pub(crate) fn without_file() -> Result<Self, ListenError> {
        let path = Path::new("without a file");
        let socket = bind_private(&SocketAddrUnix::new_unnamed());
        Ok(Self {
            socket: socket.map_err(|source| cant_bind(path, source.into()))?,
            name: path.display().to_string(),
            file: None,
            first: None,
        })
    }

    fn bind_replacing(path: &Path, any: bool) -> Result<Self, ListenError> {
        let fail = |source| cant_bind(path, source);
        match present_at(path, any)? {
            Present::Nothing => {}
            Present::Other => {
                log::warn!("replacing {}, which is not a socket", path.display());
                std::fs::remove_file(path).map_err(fail)?;
            }
            Present::DeadSocket => {
                log::info!(
                    "replacing the socket {}, on which no server listens",
                    path.display()
                );
                std::fs::remove_file(path).map_err(fail)?;
            }
        }
        let fail = |source: Errno| fail(source.into());
        let address = SocketAddrUnix::new(path).map_err(fail)?;
        let socket = bind_private(&address).map_err(fail)?;
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

    /// Lets the members of `group`, a name or a number, connect to a socket that this server
    /// created.
    ///
    /// # Errors
    ///
    /// Fails if the group doesn't exist, or if the server may not give files to it.
    pub fn admit_group(&self, group: &str) -> Result<(), ListenError> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let id = id_of_group(group, &file.path)?;
        file.admit(id)
            .map_err(|error| cant_admit(group, &file.path, error))
    }

    /// Takes ownership of the listening socket that the launcher left open as descriptor `fd`. The
    /// socket's file stays with the launcher. Must be called before any other descriptor is opened.
    ///
    /// # Errors
    ///
    /// Fails if the descriptor is not open, or is not a listening Unix stream socket.
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

    /// Resumes listening on a socket that the program executed earlier in this process left open.
    ///
    /// # Errors
    ///
    /// Fails if `fd` is not a listening Unix stream socket.
    pub(crate) fn left(fd: OwnedFd, file: Option<SocketFile>) -> Result<Self, ListenError> {
        let mut listener = Self::from_fd(fd)?;
        if let Some(file) = &file {
            listener.name = file.path.display().to_string();
        }
        listener.file = file;
        Ok(listener)
    }

    /// Returns the file of the socket, if this server created it.
    #[must_use]
    pub(crate) fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }

    /// If the process is killed, makes the kernel close the socket before the guest's files.
    pub fn close_first(&mut self) {
        self.first = Some(First::new(&self.socket));
    }

    /// Whether this is the socket at `path`.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        let address = self.socket.local_addr().ok();
        address.as_ref().and_then(SocketAddr::as_pathname) == Some(path)
    }

    /// Waits for the next connection and accepts it.
    ///
    /// # Errors
    ///
    /// Fails as `accept(2)` does.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _peer)| stream)
    }

    /// Returns a name for the socket that messages can show.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stops listening, and keeps the file for another process that listens on it.
    #[must_use]
    pub(crate) fn into_file(self) -> Option<SocketFile> {
        self.file
    }

    /// The listening socket itself, in a process that leaves the file to another.
    #[must_use]
    pub(crate) fn into_socket(mut self) -> OwnedFd {
        self.leave_file();
        self.socket.into()
    }

    /// Keeps listening, and gives the ownership of the file to the caller.
    pub(crate) fn take_file(&mut self) -> Option<SocketFile> {
        self.file.take()
    }

    /// Leaves the file to another process, which got it by `into_file` or `take_file`.
    pub fn leave_file(&mut self) {
        std::mem::forget(self.file.take());
    }
}

impl SocketFile {
    /// Changes the file's group, and only then lets that group connect.
    fn admit(&self, group: u32) -> Result<(), Errno> {
        // Through a descriptor: the path may name another file by now.
        let file = open_socket(&self.path)?;
        let stat = rustix::fs::fstat(&file)?;
        let ours = stat.st_uid == rustix::process::geteuid().as_raw();
        if (stat.st_dev, stat.st_ino) != (self.device, self.inode) || !ours {
            return Err(Errno::STALE);
        }
        let group = Some(Gid::from_raw(group));
        rustix::fs::chownat(&file, c"", None, group, AtFlags::EMPTY_PATH)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // The chmod below would activate entries that a default ACL of the directory has added.
        match rustix::fs::removexattr(&path, c"system.posix_acl_access") {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
        rustix::fs::chmod(&path, Mode::RWXU | Mode::RWXG)
    }

    /// Returns the file's path, device and inode number.
    #[must_use]
    pub(crate) fn place(&self) -> (&Path, u64, u64) {
        (&self.path, self.device, self.inode)
    }

    /// Describes a socket file that the program executed earlier in this process created.
    #[must_use]
    pub(crate) fn left(path: PathBuf, device: u64, inode: u64) -> Self {
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

/// What is at the path of a new socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Present {
    Nothing,
    /// A file that isn't a socket, and may be replaced.
    Other,
    /// The socket of a server that no longer runs.
    DeadSocket,
}

/// What a new socket at `path` would replace; with `any` that may be a file that isn't a socket.
fn present_at(path: &Path, any: bool) -> Result<Present, ListenError> {
    let len = path.as_os_str().len();
    if len > MAX_PATH_LEN {
        return Err(ListenError::TooLong {
            path: path.to_owned(),
            len,
        });
    }
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() && any => Ok(Present::Other),
        Ok(there) if !there.file_type().is_socket() => {
            Err(ListenError::NotASocket(path.to_owned()))
        }
        Ok(_) => match is_alive(path) {
            Ok(true) => Err(ListenError::InUse(path.to_owned())),
            Ok(false) => Ok(Present::DeadSocket),
            Err(error) => Err(cant_bind(path, error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Present::Nothing),
        Err(error) => Err(cant_bind(path, error)),
    }
}

fn cant_bind(path: &Path, source: io::Error) -> ListenError {
    ListenError::Bind {
        path: path.to_owned(),
        source,
    }
}

fn cant_admit(group: &str, path: &Path, source: Errno) -> ListenError {
    ListenError::Group {
        path: path.to_owned(),
        group: group.to_owned(),
        source: source.into(),
    }
}

/// The number of a group, of which `group` is the name or the number.
fn id_of_group(group: &str, path: &Path) -> Result<u32, ListenError> {
    match group.parse() {
        Ok(id) => Ok(id),
        Err(_) => sys::group::id_of(group)
            .map_err(|error| cant_admit(group, path, error))?
            .ok_or_else(|| ListenError::NoGroup(group.to_owned())),
    }
}

/// Creates a listening socket at `address` whose file has mode 0700, less the umask, from its
/// creation on.
fn bind_private(address: &SocketAddrUnix) -> Result<UnixListener, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the socket, less the umask.
    rustix::fs::fchmod(&socket, Mode::RWXU)?;
    rustix::net::bind(&socket, address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Opens the socket's file itself, with `O_PATH`.
fn open_socket(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let mode = rustix::fs::fstat(&file)?.st_mode;
    match FileType::from_raw_mode(mode) {
        FileType::Socket => Ok(file),
        _ => Err(Errno::STALE),
    }
}

/// Whether a process has the socket at `path` open. Probes it with a datagram socket, which a
/// stream socket refuses by its type, so a running server never notices the probe.
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
    fn bind_replaces_socket_of_dead_server_only() {
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
        // Makes the umask this thread's own.
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
    fn bind_over_regular_file_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, ListenError::NotASocket(_)));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let listener = Listener::bind_over(&path).unwrap();
        assert!(matches!(
            Listener::bind_over(&path),
            Err(ListenError::InUse(_))
        ));
        drop(listener);
        std::fs::create_dir(&path).unwrap();
        assert!(Listener::bind_over(&path).is_err());
    }

    #[test]
    fn drop_of_listener_removes_only_its_own_socket_file() {
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
    fn inherited_descriptor_that_does_not_listen_is_refused() {
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
    fn bind_to_too_long_path_fails_with_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let room = MAX_PATH_LEN - dir.path().as_os_str().len() - 1;
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
