//! What one program leaves to the next in the same process, beside open descriptors: which of them
//! is what.
//!
//! A list of words, one a line, in memory whose descriptor the environment names. A program reads
//! the forms that it knows and refuses others, before the running one ends
//! ([`check`](super::check_for_upgrade)). The invariant: no descriptor is taken that isn't what the
//! list says it is.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::upgrade::UpgradeAttempt;
use crate::sandbox::{FdIdentity, Identity, Ids, Past, SandboxError, SandboxRefs, Supervisor};
use crate::vhost_user::{ListenError, Listener, SocketFile};

/// The form of the list.
pub(super) const FORM: u32 = 1;

/// Where the number of the descriptor stands.
pub(super) const VARIABLE: &str = "RINGFSD_HAND_OVER";

/// Why there is nothing to take over.
#[derive(Debug, thiserror::Error)]
pub enum ExecHandoverError {
    /// The list isn't there.
    #[error("reading the list that {VARIABLE} names")]
    Read(#[source] std::io::Error),
    /// It is of another form.
    #[error("the list has form {0}, and this program knows {FORM}")]
    Form(String),
    /// It lacks something, or has nonsense for it.
    #[error("the list has no {0} that makes sense")]
    Lacks(&'static str),
    /// A descriptor isn't there.
    #[error("descriptor {fd}, which should be the {what}")]
    Gone {
        /// Its number.
        fd: RawFd,
        /// What it should be.
        what: &'static str,
        /// Why it isn't.
        #[source]
        source: std::io::Error,
    },
    /// A descriptor is something else.
    #[error(transparent)]
    Other(#[from] SandboxError),
    /// Nothing listens.
    #[error("going on to listen")]
    Listen(#[from] ListenError),
}

/// What an earlier program in this process has left.
#[derive(Debug)]
pub struct ExecHandover(BTreeMap<String, String>);

/// Of it, what a server is made of.
pub(super) struct Parts {
    pub(super) listener: Listener,
    pub(super) state: OwnedFd,
}

impl ExecHandover {
    /// What has been left, if anything has. To be called at the start.
    ///
    /// # Errors
    ///
    /// The environment names a list, and there is none.
    pub fn take() -> Result<Option<Self>, ExecHandoverError> {
        let Some(number) = std::env::var_os(VARIABLE) else {
            return Ok(None);
        };
        // By which it can be found; what is run by a descriptor has its number for a name.
        let _ = rustix::thread::set_name(c"ringfsd");
        let fd = number.to_str().and_then(|text| text.parse().ok());
        let fd = fd.ok_or(ExecHandoverError::Lacks("number"))?;
        let mut text = String::new();
        let file = crate::sandbox::left_open(fd).map_err(ExecHandoverError::Read)?;
        std::fs::File::from(file)
            .read_to_string(&mut text)
            .map_err(ExecHandoverError::Read)?;
        let list = Self::parse(&text);
        match list.word("form") {
            Ok(form) if form == FORM.to_string() => Ok(Some(list)),
            Ok(form) => Err(ExecHandoverError::Form(form.to_owned())),
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self(pairs.collect())
    }

    fn word(&self, name: &'static str) -> Result<&str, ExecHandoverError> {
        let value = self.0.get(name).map(String::as_str);
        value.ok_or(ExecHandoverError::Lacks(name))
    }

    fn number<T: std::str::FromStr>(&self, name: &'static str) -> Result<T, ExecHandoverError> {
        let number = self.word(name)?.parse();
        number.map_err(|_unclear| ExecHandoverError::Lacks(name))
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// `NUMBER IDENTITY`
    fn noted(&self, name: &'static str) -> Result<FdIdentity, ExecHandoverError> {
        let lacks = || ExecHandoverError::Lacks(name);
        let (fd, identity) = self.word(name)?.split_once(' ').ok_or_else(lacks)?;
        let fd = fd.parse().map_err(|_unclear| lacks())?;
        let identity: Identity = identity.parse().map_err(|_unclear| lacks())?;
        let gone = |source| ExecHandoverError::Gone {
            fd,
            what: name,
            source,
        };
        FdIdentity::left(fd, identity).map_err(gone)
    }

    fn maybe<T>(
        &self,
        name: &'static str,
        get: impl FnOnce(&Self, &'static str) -> Result<T, ExecHandoverError>,
    ) -> Result<Option<T>, ExecHandoverError> {
        self.has(name).then(|| get(self, name)).transpose()
    }

    /// Takes all of it over.
    pub(super) fn open(self) -> Result<(Past, UpgradeAttempt, Parts), ExecHandoverError> {
        let sandbox_refs = SandboxRefs {
            root: self.noted("root")?,
            mounts: self.maybe("mounts", Self::noted)?,
        };
        let ids = Ids {
            inside: self
                .maybe("user", Self::number)?
                .zip(self.maybe("group", Self::number)?),
            change: self.number::<u8>("ids")? != 0,
        };
        let file = self.maybe("socket", |list, name| {
            let lacks = || ExecHandoverError::Lacks(name);
            let path = unhex(list.word(name)?).ok_or_else(lacks)?;
            let path = PathBuf::from(std::ffi::OsString::from_vec(path));
            let (device, inode) = (list.number("socket-device")?, list.number("socket-inode")?);
            Ok(SocketFile::left(path, device, inode))
        })?;
        let listener = Listener::left(self.noted("listener")?.take()?, file)?;
        let state = self.noted("state")?.take()?;
        let asker = self.maybe("asker", Self::noted)?.map(FdIdentity::take);
        let attempt = UpgradeAttempt {
            since: Duration::from_nanos(self.number("since")?),
            old: self.maybe("old", Self::noted)?,
            asker: asker.transpose()?.map(UnixStream::from),
            failed: self.maybe("failed", |list, name| {
                let text = unhex(list.word(name)?).unwrap_or_default();
                Ok(String::from_utf8_lossy(&text).into_owned())
            })?,
        };
        Ok((
            Past { ids, sandbox_refs },
            attempt,
            Parts { listener, state },
        ))
    }
}

/// What is left to the next program.
#[derive(Debug)]
pub(super) struct Leaving<'a> {
    pub(super) supervisor: &'a Supervisor,
    pub(super) listener: &'a Listener,
    pub(super) state: BorrowedFd<'a>,
    pub(super) attempt: &'a UpgradeAttempt,
}

impl Leaving<'_> {
    /// Writes the list, and answers the memory that it stands in.
    pub(super) fn write(&self) -> std::io::Result<OwnedFd> {
        let fd = rustix::fs::memfd_create("ringfsd-hand-over", rustix::fs::MemfdFlags::CLOEXEC)?;
        let text = self.text()?;
        let mut file = std::fs::File::from(fd);
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        std::io::Seek::rewind(&mut file)?;
        Ok(file.into())
    }

    fn text(&self) -> std::io::Result<String> {
        let mut list = List(format!("form {FORM}\n"));
        let sandbox_refs = self.supervisor.sandbox_refs();
        if let Some(sandbox_refs) = sandbox_refs {
            list.noted("root", &sandbox_refs.root);
            if let Some(mounts) = &sandbox_refs.mounts {
                list.noted("mounts", mounts);
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
            let (path, device, inode) = file.place();
            list.add("socket", hex(path.as_os_str().as_bytes()));
            list.add("socket-device", device);
            list.add("socket-inode", inode);
        }
        list.open("state", self.state)?;
        list.add("since", self.attempt.since.as_nanos());
        if let Some(old) = &self.attempt.old {
            list.noted("old", old);
        }
        if let Some(asker) = &self.attempt.asker {
            list.open("asker", asker)?;
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

    fn noted(&mut self, name: &str, noted: &FdIdentity) {
        let value = format!("{} {}", noted.fd.as_raw_fd(), noted.identity());
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
    fn any_path_survives() {
        let bytes = b"/run/\xff\n 1";
        assert_eq!(unhex(&hex(bytes)).unwrap(), bytes);
        assert_eq!(unhex("0g"), None);
    }

    #[test]
    fn a_list_without_what_is_needed_is_refused() {
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
    fn a_descriptor_that_is_another_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let text = format!("state {} 1:2:3:4:5\n", file.as_raw_fd());
        let noted = ExecHandover::parse(&text).noted("state").unwrap();
        let refused = noted.take();
        assert!(matches!(refused, Err(SandboxError::Replaced(_))));
        std::mem::forget(file);
    }
}
