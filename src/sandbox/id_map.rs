//! The user namespace and its id maps.
//!
//! A short-lived process outside of the namespace writes the maps: the kernel accepts a map of more
//! ids than one's own only from there, and `newuidmap` has to run there too. The invariant: the
//! process is in a namespace that has the maps of the options, or there is an error.

use std::fmt::Write;
use std::process::Command;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions};
use rustix::thread::UnshareFlags;

use super::{Kind, Options, SandboxError, privileges};
use crate::sys::process::{self, Fork};

/// A range of ids, in the namespace and on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first id in the namespace.
    pub inside: u32,
    /// The first id on the host.
    pub outside: u32,
    /// The number of ids.
    pub count: u32,
}

/// The error of a malformed range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a range is :NAMESPACE:HOST:COUNT:, three numbers that any character but a digit separates, \
     such as :0:100000:65536: (crosvm writes \"0 100000 65536\"; give the option once for each range)"
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

/// Why the id maps can't be written.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// A map can't be written.
    #[error(
        "the process that writes the maps has exited with {0}: a server that isn't root can map its \
         own id, or ids that /etc/subuid and /etc/subgid give its user, for which it needs \
         newuidmap and newgidmap (package uidmap)"
    )]
    Refused(i32),
    /// The process that writes the maps can't be made.
    #[error("starting the process that writes the maps")]
    Writer(#[source] Errno),
}

/// The id maps of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Maps {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

/// Which of the two maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapKind {
    User,
    Group,
}

impl Maps {
    /// The maps of the user namespace, if the options need one.
    pub(super) fn wanted(options: &Options) -> Result<Option<Self>, SandboxError> {
        let mapped = !options.users.is_empty() || !options.groups.is_empty();
        if mapped && options.kind != Kind::Namespace {
            return Err(SandboxError::MapsWithoutNamespace);
        }
        let wanted = options.kind == Kind::Namespace && (mapped || privileges::is_ordinary_user());
        Ok(wanted.then(|| Self::new(&options.users, &options.groups)))
    }

    /// These ranges; without ranges, the server's own id, mapped to itself.
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

    /// The user id and the group id that the server gets: 0 if it is mapped, else its own, else the
    /// first.
    pub(super) fn own_ids(&self) -> (u32, u32) {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        (own_id(&self.users, uid), own_id(&self.groups, gid))
    }

    /// Whether there is only one user and one group, which then own everything that is created.
    pub(super) fn is_single(&self) -> bool {
        let single = |ranges: &[IdRange]| matches!(ranges, [IdRange { count: 1, .. }]);
        single(&self.users) && single(&self.groups)
    }

    /// Writes the maps of `process`, from outside of its namespace.
    fn write(&self, process: Pid) -> Result<(), ()> {
        self.write_one(process, MapKind::User)?;
        self.write_one(process, MapKind::Group)
    }

    fn write_one(&self, process: Pid, kind: MapKind) -> Result<(), ()> {
        let process = process.as_raw_nonzero();
        let (ranges, own, file, program) = match kind {
            MapKind::User => {
                let own = rustix::process::geteuid().as_raw();
                (&self.users, own, "uid_map", "newuidmap")
            }
            MapKind::Group => {
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
            if kind == MapKind::Group && !is_root {
                // Otherwise the process could leave a group that restricts it (user_namespaces(7)).
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

/// Moves the process into a user namespace with these maps and, with `own_pids`, the processes that
/// it forks from now on into a PID namespace.
pub(super) fn enter_user_namespace(maps: &Maps, own_pids: bool) -> Result<(), SandboxError> {
    let no_writer = |error| SandboxError::Map(MapError::Writer(error));
    let (wait_end, start_end) = pipe_with(PipeFlags::CLOEXEC).map_err(no_writer)?;
    let this = rustix::process::getpid();
    let writer = match process::fork().map_err(no_writer)? {
        Fork::Parent(writer) => writer,
        Fork::Child => {
            drop(start_end);
            let mut byte = [0];
            let code = match rustix::io::read(&wait_end, &mut byte) {
                Ok(1) if maps.write(this).is_ok() => 0,
                _ => 1,
            };
            process::exit_now(code);
        }
    };
    drop(wait_end);
    let mut namespaces = UnshareFlags::NEWUSER;
    namespaces.set(UnshareFlags::NEWPID, own_pids);
    let entered = process::unshare_namespaces(namespaces);
    if entered.is_ok() {
        // If the writer has ended already, its status says so.
        let _ = rustix::io::write(&start_end, &[1]);
    }
    drop(start_end);
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
    fn range_is_three_delimited_numbers() {
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
    fn server_gets_id_0_if_it_is_mapped() {
        let range = |text: &str| text.parse::<IdRange>().unwrap();
        let many = [range(":1:100000:1000:"), range(":0:1000:1:")];
        assert_eq!(own_id(&many, 1000), 0);
        assert_eq!(own_id(&many[..1], 100_005), 6);
        assert_eq!(own_id(&many[..1], 1000), 1);
        assert!(Maps::new(&[], &[]).is_single());
        assert!(!Maps::new(&many, &[]).is_single());
    }

    #[test]
    fn own_id_is_mapped_to_itself_by_default() {
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
