//! The list of open descriptors that one program passes to the next program in the same process.
//!
//! The list is a sequence of `name value` lines in a memfd, whose number is in an environment
//! variable. A program reads the list formats that it knows. It refuses all others while the
//! running program is still there ([`check_for_upgrade`](super::check_for_upgrade)). The invariant:
//! a descriptor is used only if it is still the file that the list says it is.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::supervisor::Supervisor;
use super::upgrade_attempt::UpgradeAttempt;
use crate::sandbox::{FdIdentity, Identity, Ids, InheritedSandbox, SandboxError, SandboxRefs};
use crate::vhost_user::{ListenError, Listener, SocketFile};

/// The version of the list's format.
pub(super) const FORMAT: u32 = 1;

/// The environment variable that holds the number of the list's descriptor.
pub(super) const VARIABLE: &str = "RINGFSD_HAND_OVER";

/// The names of the values that describe the file of the front end's socket.
const LISTENER_FILE: [&str; 3] = ["socket", "socket-device", "socket-inode"];
/// Those of the file of the metrics' socket.
const METRICS_FILE: [&str; 3] = ["metrics-socket", "metrics-device", "metrics-inode"];

/// Why a program can't take over from the previous one.
#[derive(Debug, thiserror::Error)]
pub enum ExecHandoverError {
    /// The list can't be read.
    #[error("reading the list that {VARIABLE} names")]
    Read(#[source] std::io::Error),
    /// The list has another format.
    #[error("the list has format {0}, and this program reads {FORMAT}")]
    Format(String),
    /// A value is missing or malformed.
    #[error("the list has no valid {0}")]
    Invalid(&'static str),
    /// A descriptor isn't open.
    #[error("descriptor {fd}, which should be the {what}")]
    Closed {
        /// Its number.
        fd: RawFd,
        /// What it should be.
        what: &'static str,
        /// The error of looking at it.
        #[source]
        source: std::io::Error,
    },
    /// A descriptor is another file.
    #[error(transparent)]
    Replaced(#[from] SandboxError),
    /// The socket can't be listened on.
    #[error("listening on the inherited socket")]
    Listen(#[from] ListenError),
}

/// The list that the previous program in this process has written.
#[derive(Debug)]
pub struct ExecHandover(BTreeMap<String, String>);

/// The descriptors on the list that a server is built from.
pub(crate) struct ServerFds {
    pub(crate) listener: Listener,
    pub(crate) control: Option<Listener>,
    pub(crate) user: Option<u32>,
    pub(crate) state: OwnedFd,
    /// The file of the counters, if the previous program had one.
    pub(crate) metrics: Option<OwnedFd>,
    /// The socket on which they are read.
    pub(crate) metrics_socket: Option<PassedSocket>,
    pub(crate) pid_file: Option<OwnedFd>,
}

/// A listening socket on the list, and its file if it has one.
pub(crate) struct PassedSocket {
    pub(crate) socket: OwnedFd,
    pub(crate) file: Option<SocketFile>,
}

/// What is on the list about the processes: the sandbox, and the upgrade in progress.
pub(crate) struct PassedOn {
    pub(super) past: InheritedSandbox,
    pub(super) attempt: UpgradeAttempt,
}

impl ExecHandover {
    /// Reads the list, if a previous program has left one. To be called at the start.
    ///
    /// # Errors
    ///
    /// The environment names a list that can't be read.
    pub fn take() -> Result<Option<Self>, ExecHandoverError> {
        let Some(number) = std::env::var_os(VARIABLE) else {
            return Ok(None);
        };
        // A program that is run from a descriptor is named after the descriptor's number.
        let _ = rustix::thread::set_name(c"ringfsd");
        let fd = number.to_str().and_then(|text| text.parse().ok());
        let fd = fd.ok_or(ExecHandoverError::Invalid("number"))?;
        let mut text = String::new();
        let file = crate::sandbox::left_open(fd).map_err(ExecHandoverError::Read)?;
        std::fs::File::from(file)
            .read_to_string(&mut text)
            .map_err(ExecHandoverError::Read)?;
        let list = Self::parse(&text);
        match list.value("form") {
            Ok(format) if format == FORMAT.to_string() => Ok(Some(list)),
            Ok(format) => Err(ExecHandoverError::Format(format.to_owned())),
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self(pairs.collect())
    }

    fn value(&self, name: &'static str) -> Result<&str, ExecHandoverError> {
        let value = self.0.get(name).map(String::as_str);
        value.ok_or(ExecHandoverError::Invalid(name))
    }

    fn number<T: std::str::FromStr>(&self, name: &'static str) -> Result<T, ExecHandoverError> {
        let number = self.value(name)?.parse();
        number.map_err(|_malformed| ExecHandoverError::Invalid(name))
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Parses `NUMBER IDENTITY`.
    fn fd_identity(&self, name: &'static str) -> Result<FdIdentity, ExecHandoverError> {
        let invalid = || ExecHandoverError::Invalid(name);
        let (fd, identity) = self.value(name)?.split_once(' ').ok_or_else(invalid)?;
        let fd = fd.parse().map_err(|_malformed| invalid())?;
        let identity: Identity = identity.parse().map_err(|_malformed| invalid())?;
        let closed = |source| ExecHandoverError::Closed {
            fd,
            what: name,
            source,
        };
        FdIdentity::inherited(fd, identity).map_err(closed)
    }

    fn optional<T>(
        &self,
        name: &'static str,
        get: impl FnOnce(&Self, &'static str) -> Result<T, ExecHandoverError>,
    ) -> Result<Option<T>, ExecHandoverError> {
        self.has(name).then(|| get(self, name)).transpose()
    }

    /// The file of a socket; `names` are those of its path, its device and its inode.
    fn socket_file(
        &self,
        [path, device, inode]: [&'static str; 3],
    ) -> Result<Option<SocketFile>, ExecHandoverError> {
        self.optional(path, |list, name| {
            let invalid = || ExecHandoverError::Invalid(name);
            let path = unhex(list.value(name)?).ok_or_else(invalid)?;
            let path = PathBuf::from(std::ffi::OsString::from_vec(path));
            Ok(SocketFile::left(
                path,
                list.number(device)?,
                list.number(inode)?,
            ))
        })
    }

    /// Takes over everything on the list.
    pub(crate) fn open(self) -> Result<(PassedOn, ServerFds), ExecHandoverError> {
        let sandbox_refs = SandboxRefs {
            root: self.fd_identity("root")?,
            mounts: self.optional("mounts", Self::fd_identity)?,
        };
        let ids = Ids {
            inside: self
                .optional("user", Self::number)?
                .zip(self.optional("group", Self::number)?),
            change: self.number::<u8>("ids")? != 0,
        };
        let file = self.socket_file(LISTENER_FILE)?;
        let listener = Listener::left(self.fd_identity("listener")?.take()?, file)?;
        let control = self
            .optional("control", Self::fd_identity)?
            .map(FdIdentity::take)
            .transpose()?;
        let file = self.socket_file(["control-path", "control-device", "control-inode"])?;
        let control = control.map(|control| Listener::left(control, file));
        let state = self.fd_identity("state")?.take()?;
        let pid_file = self
            .optional("pid-file", Self::fd_identity)?
            .map(FdIdentity::take)
            .transpose()?;
        let metrics = self
            .optional("metrics", Self::fd_identity)?
            .map(FdIdentity::take)
            .transpose()?;
        let metrics_socket = self.optional("metrics-listener", |list, name| {
            Ok(PassedSocket {
                socket: list.fd_identity(name)?.take()?,
                file: list.socket_file(METRICS_FILE)?,
            })
        })?;
        let client = self
            .optional("asker", Self::fd_identity)?
            .map(FdIdentity::take);
        let attempt = UpgradeAttempt {
            since: Duration::from_nanos(self.number("since")?),
            old: self.optional("old", Self::fd_identity)?,
            client: client.transpose()?.map(UnixStream::from),
            failed: self.optional("failed", |list, name| {
                let text = unhex(list.value(name)?).unwrap_or_default();
                Ok(String::from_utf8_lossy(&text).into_owned())
            })?,
        };
        let past = InheritedSandbox { ids, sandbox_refs };
        let fds = ServerFds {
            listener,
            control: control.transpose()?,
            user: self.optional("started-by", Self::number)?,
            state,
            metrics,
            metrics_socket,
            pid_file,
        };
        Ok((PassedOn { past, attempt }, fds))
    }
}

/// What is passed to the next program.
#[derive(Debug)]
pub(super) struct Outgoing<'a> {
    pub(super) supervisor: &'a Supervisor,
    pub(super) listener: &'a Listener,
    pub(super) control: Option<&'a Listener>,
    pub(super) user: u32,
    pub(super) state: BorrowedFd<'a>,
    pub(super) metrics: Option<BorrowedFd<'a>>,
    pub(super) metrics_socket: Option<(BorrowedFd<'a>, Option<&'a SocketFile>)>,
    pub(super) pid_file: Option<BorrowedFd<'a>>,
    pub(super) attempt: &'a UpgradeAttempt,
}

impl Outgoing<'_> {
    /// Writes the list to a memfd and returns it.
    pub(super) fn write(&self) -> std::io::Result<OwnedFd> {
        let fd = rustix::fs::memfd_create("ringfsd-hand-over", rustix::fs::MemfdFlags::CLOEXEC)?;
        let text = self.text()?;
        let mut file = std::fs::File::from(fd);
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        std::io::Seek::rewind(&mut file)?;
        Ok(file.into())
    }

    fn text(&self) -> std::io::Result<String> {
        let mut list = List(format!("form {FORMAT}\n"));
        let sandbox_refs = self.supervisor.sandbox_refs();
        if let Some(sandbox_refs) = sandbox_refs {
            list.fd_identity("root", &sandbox_refs.root);
            if let Some(mounts) = &sandbox_refs.mounts {
                list.fd_identity("mounts", mounts);
            }
        }
        let ids = self.supervisor.ids();
        if let Some((user, group)) = ids.inside {
            list.add("user", user);
            list.add("group", group);
        }
        list.add("ids", u8::from(ids.change));
        list.open("listener", self.listener)?;
        if let Some(file) = self.listener.file() {
            list.socket_file(LISTENER_FILE, file);
        }
        list.add("started-by", self.user);
        if let Some(control) = self.control {
            list.open("control", control)?;
            if let Some(file) = control.file() {
                let names = ["control-path", "control-device", "control-inode"];
                list.socket_file(names, file);
            }
        }
        list.open("state", self.state)?;
        if let Some(metrics) = self.metrics {
            list.open("metrics", metrics)?;
        }
        if let Some((socket, file)) = self.metrics_socket {
            list.open("metrics-listener", socket)?;
            if let Some(file) = file {
                list.socket_file(METRICS_FILE, file);
            }
        }
        if let Some(pid_file) = self.pid_file {
            list.open("pid-file", pid_file)?;
        }
        list.add("since", self.attempt.since.as_nanos());
        if let Some(old) = &self.attempt.old {
            list.fd_identity("old", old);
        }
        if let Some(client) = &self.attempt.client {
            list.open("asker", client)?;
        }
        if let Some(failed) = &self.attempt.failed {
            list.add("failed", hex(failed.as_bytes()));
        }
        Ok(list.0)
    }
}

struct List(String);

impl List {
    fn add(&mut self, name: &str, value: impl std::fmt::Display) {
        // Writing to a string doesn't fail.
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn socket_file(&mut self, names: [&str; 3], file: &SocketFile) {
        let [path_name, device_name, inode_name] = names;
        let (path, device, inode) = file.place();
        self.add(path_name, hex(path.as_os_str().as_bytes()));
        self.add(device_name, device);
        self.add(inode_name, inode);
    }

    fn fd_identity(&mut self, name: &str, identity: &FdIdentity) {
        let value = format!("{} {}", identity.fd.as_raw_fd(), identity.identity());
        self.add(name, value);
    }

    fn open(&mut self, name: &str, fd: impl AsFd) -> std::io::Result<()> {
        let fd = fd.as_fd();
        let identity = Identity::of(fd)?;
        self.add(name, format!("{} {identity}", fd.as_raw_fd()));
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string doesn't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    let pairs = pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_any_bytes_survives_hex() {
        let bytes = b"/run/\xff\n 1";
        assert_eq!(unhex(&hex(bytes)).unwrap(), bytes);
        assert_eq!(unhex("0g"), None);
    }

    #[test]
    fn list_without_required_values_is_refused() {
        for text in [
            "",
            "form 1\n",
            "form 1\nroot\n",
            "form 1\nroot 3\n",
            "root x 1:2",
        ] {
            let refused = ExecHandover::parse(text).open();
            assert!(refused.is_err(), "{text}");
        }
    }

    #[test]
    fn replaced_descriptor_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let text = format!("state {} 1:2:3:4:5\n", file.as_raw_fd());
        let state = ExecHandover::parse(&text).fd_identity("state").unwrap();
        let refused = state.take();
        assert!(matches!(refused, Err(SandboxError::Replaced(_))));
        std::mem::forget(file);
    }
}
