//! Ids of a user namespace: which ones there are, and which ids of the host they are.
//!
//! The maps are written from outside by a process that lives only for that: of more ids than
//! one's own the kernel takes them from nobody else, and `newuidmap` has to be run there. The
//! invariant: the process is in its namespace with the maps asked for, or there is an error.

use std::fmt::Write;
use std::process::Command;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions};
use rustix::thread::UnshareFlags;

use super::{Kind, Options, SandboxError, privileges};
use crate::sys::process::{self, Fork};

/// Ids that follow each other, in the namespace and on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first in the namespace.
    pub inside: u32,
    /// The first on the host.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// What is no range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a range is :NAMESPACE:HOST:COUNT:, three numbers between any character that is not a digit, \
     such as :0:100000:65536: (crosvm's \"0 100000 65536\" is that; several are several options)"
)]
pub struct IdRangeError;

impl FromStr for IdRange {
    type Err = IdRangeError;

    fn from_str(text: &str) -> Result<Self, IdRangeError> {
        let delimiter = text.chars().next().ok_or(IdRangeError)?;
        if delimiter.is_ascii_digit() {
            return Err(IdRangeError);
        }
        let rest = text.strip_prefix(delimiter).ok_or(IdRangeError)?;
        let rest = rest.strip_suffix(delimiter).unwrap_or(rest);
        let numbers: Result<Vec<u32>, _> = rest.split(delimiter).map(str::parse).collect();
        match numbers.as_deref() {
            Ok(&[inside, outside, count]) if count > 0 => {
                let fits = |first: u32| first.checked_add(count).is_some();
                (fits(inside) && fits(outside))
                    .then_some(Self {
                        inside,
                        outside,
                        count,
                    })
                    .ok_or(IdRangeError)
            }
            _ => Err(IdRangeError),
        }
    }
}

/// Why the maps can't be.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// One can't be written.
    #[error(
        "the process that writes the maps has ended with {0}: a server that isn't root maps its own \
         id alone, or ids that /etc/subuid and /etc/subgid give its user, with newuidmap and \
         newgidmap (package uidmap)"
    )]
    Refused(i32),
    /// There is no process to write them.
    #[error("starting the process that writes the maps")]
    Writer(#[source] Errno),
}

/// The maps of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Maps {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

/// Whose ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    User,
    Group,
}

impl Maps {
    /// Those of the user namespace that is needed, if one is.
    pub(super) fn wanted(options: &Options) -> Result<Option<Self>, SandboxError> {
        let mapped = !options.users.is_empty() || !options.groups.is_empty();
        if mapped && options.kind != Kind::Namespace {
            return Err(SandboxError::MapsWithoutNamespace);
        }
        let wanted = options.kind == Kind::Namespace && (mapped || privileges::is_ordinary_user());
        Ok(wanted.then(|| Self::new(&options.users, &options.groups)))
    }

    /// As told; where nothing is, the server's own id alone, which stays what it is.
    pub(super) fn new(users: &[IdRange], groups: &[IdRange]) -> Self {
        let or_own = |ranges: &[IdRange], own: u32| match ranges {
            [] => vec![IdRange {
                inside: own,
                outside: own,
                count: 1,
            }],
            ranges => ranges.to_vec(),
        };
        Self {
            users: or_own(users, rustix::process::geteuid().as_raw()),
            groups: or_own(groups, rustix::process::getegid().as_raw()),
        }
    }

    /// The user id and the group id that the server takes on: the superuser's if it is there, else
    /// its own, else the first.
    pub(super) fn own_ids(&self) -> (u32, u32) {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        (own_id(&self.users, uid), own_id(&self.groups, gid))
    }

    /// Whether there is but one user and one group, so that everything made is theirs.
    pub(super) fn is_single(&self) -> bool {
        let single = |ranges: &[IdRange]| matches!(ranges, [IdRange { count: 1, .. }]);
        single(&self.users) && single(&self.groups)
    }

    /// Has the maps of `process` written, from outside of its namespace.
    fn write(&self, process: Pid) -> Result<(), ()> {
        self.write_one(process, Whose::User)?;
        self.write_one(process, Whose::Group)
    }

    fn write_one(&self, process: Pid, whose: Whose) -> Result<(), ()> {
        let process = process.as_raw_nonzero();
        let (ranges, own, file, program) = match whose {
            Whose::User => {
                let own = rustix::process::geteuid().as_raw();
                (&self.users, own, "uid_map", "newuidmap")
            }
            Whose::Group => {
                let own = rustix::process::getegid().as_raw();
                (&self.groups, own, "gid_map", "newgidmap")
            }
        };
        let is_root = rustix::process::geteuid().is_root();
        let own_alone = matches!(ranges[..], [IdRange { outside, count: 1, .. }] if outside == own);
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            log::error!("{what}: {error}");
        };
        if is_root || own_alone {
            let map = ranges.iter().fold(String::new(), |mut map, range| {
                // Writing to a string doesn't fail.
                let _ = writeln!(map, "{} {} {}", range.inside, range.outside, range.count);
                map
            });
            let write = |name: &str, text: &str| {
                let path = format!("/proc/{process}/{name}");
                std::fs::write(&path, text).map_err(|error| failed(&path, &error))
            };
            if whose == Whose::Group && !is_root {
                // Else groups that take rights away could be left (user_namespaces(7)).
                write("setgroups", "deny")?;
            }
            return write(file, &map);
        }
        let mut command = Command::new(program);
        command.arg(process.to_string());
        for range in ranges {
            command.args([range.inside, range.outside, range.count].map(|id| id.to_string()));
        }
        match command.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => {
                failed(program, &status);
                Err(())
            }
            Err(error) => {
                failed(program, &error);
                Err(())
            }
        }
    }
}

/// See [`Maps::own_ids`]; `own` is the id on the host.
fn own_id(ranges: &[IdRange], own: u32) -> u32 {
    let within =
        |first: u32, range: &IdRange, id: u32| id.checked_sub(first).filter(|n| *n < range.count);
    let has_root = ranges.iter().any(|range| range.inside == 0);
    if has_root {
        return 0;
    }
    let mut found = ranges
        .iter()
        .filter_map(|range| Some(range.inside + within(range.outside, range, own)?));
    found
        .next()
        .or(ranges.first().map(|range| range.inside))
        .unwrap_or(own)
}

/// Moves the process into a user namespace with these maps, and, with `own_pids`, what it forks from
/// now on into a PID namespace.
pub(super) fn enter_user_namespace(maps: &Maps, own_pids: bool) -> Result<(), SandboxError> {
    let no_writer = |error| SandboxError::Map(MapError::Writer(error));
    let (go, told) = pipe_with(PipeFlags::CLOEXEC).map_err(no_writer)?;
    let this = rustix::process::getpid();
    let writer = match process::fork().map_err(no_writer)? {
        Fork::Parent(writer) => writer,
        Fork::Child => {
            drop(told);
            let mut byte = [0];
            let code = match rustix::io::read(&go, &mut byte) {
                Ok(1) if maps.write(this).is_ok() => 0,
                _ => 1,
            };
            process::exit_now(code);
        }
    };
    drop(go);
    let mut namespaces = UnshareFlags::NEWUSER;
    namespaces.set(UnshareFlags::NEWPID, own_pids);
    let entered = process::unshare_namespaces(namespaces);
    if entered.is_ok() {
        // Should the writer be gone, its status says so.
        let _ = rustix::io::write(&told, &[1]);
    }
    drop(told);
    let status = loop {
        match rustix::process::waitpid(Some(writer), WaitOptions::empty()) {
            Err(Errno::INTR) | Ok(None) => {}
            Ok(Some((_, status))) => break status,
            Err(error) => return Err(no_writer(error)),
        }
    };
    entered.map_err(SandboxError::UserNamespace)?;
    match status.exit_status() {
        Some(0) => Ok(()),
        Some(code) => Err(MapError::Refused(code).into()),
        None => Err(MapError::Refused(-1).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_three_numbers_between_delimiters() {
        let range = IdRange {
            inside: 0,
            outside: 100_000,
            count: 65536,
        };
        for text in [
            ":0:100000:65536:",
            ":0:100000:65536",
            "/0/100000/65536/",
            ",0,100000,65536,",
        ] {
            assert_eq!(text.parse(), Ok(range), "{text}");
        }
        for bad in [
            "",
            ":",
            "0:1:1",
            ":0:1:",
            ":0:1:0:",
            ":0:1:2:3:",
            ":a:1:1:",
            ":0:-1:1:",
            ":4294967295:0:2:",
        ] {
            assert_eq!(bad.parse::<IdRange>(), Err(IdRangeError), "{bad}");
        }
    }

    #[test]
    fn the_server_is_the_superuser_there_if_there_is_one() {
        let range = |text: &str| text.parse::<IdRange>().unwrap();
        let many = [range(":1:100000:1000:"), range(":0:1000:1:")];
        assert_eq!(own_id(&many, 1000), 0);
        assert_eq!(own_id(&many[..1], 100_005), 6);
        assert_eq!(own_id(&many[..1], 1000), 1);
        assert!(Maps::new(&[], &[]).is_single());
        assert!(!Maps::new(&many, &[]).is_single());
    }

    #[test]
    fn without_a_word_ones_own_id_stays_what_it_is() {
        let maps = Maps::new(&[], &[]);
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(
            maps.users,
            [IdRange {
                inside: own,
                outside: own,
                count: 1
            }]
        );
    }
}
