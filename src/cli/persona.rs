//! Whose defaults and behaviour the program has: its own, or those of virtiofsd.
//!
//! It is virtiofsd for launchers that start it under that name, or with `--compat virtiofsd`.
//! [`DIFFERENCES`] lists what that changes, and the manual shows the same table. The invariant: no
//! other part of the program asks for the persona; everything that depends on it is a field of
//! [`Behaviour`].

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::ValueEnum;

use crate::config::Descriptors;
use crate::fs::passthrough::InodeFileHandles;

/// Whose defaults and behaviour the program has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Persona {
    /// Its own.
    #[default]
    Ringfsd,
    /// Those of virtiofsd 1.14.
    Virtiofsd,
}

/// One difference between the personas, as the manual shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The option or the behaviour.
    pub subject: &'static str,
    /// What ringfsd does.
    pub ringfsd: &'static str,
    /// What virtiofsd does.
    pub virtiofsd: &'static str,
    /// Why ringfsd does something else.
    pub why: &'static str,
}

macro_rules! differences {
    ($(
        $(#[$doc:meta])*
        $field:ident: $type:ty, $subject:literal;
        ringfsd: $own:expr, $own_text:literal;
        virtiofsd: $other:expr, $other_text:literal;
        why: $why:literal;
    )+) => {
        /// What depends on the persona.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Behaviour {
            $($(#[$doc])* pub $field: $type,)+
        }

        const RINGFSD: Behaviour = Behaviour { $($field: $own,)+ };

        const VIRTIOFSD: Behaviour = Behaviour { $($field: $other,)+ };

        /// What the personas differ in.
        pub const DIFFERENCES: &[Difference] = &[$(Difference {
            subject: $subject,
            ringfsd: $own_text,
            virtiofsd: $other_text,
            why: $why,
        },)+];
    };
}

differences! {
    /// Exit when the first VMM disconnects, unless an option says otherwise.
    once: bool, "VMMs that a server serves";
    ringfsd: false, "one after the other; one with `--fd`, unless `--state` is given";
    virtiofsd: true, "one; then it exits with 0";
    why: "a VM can be restarted without its server";

    /// Serve extended attributes, unless an option says otherwise.
    xattr: bool, "`--xattr`, `--no-xattr`";
    ringfsd: true, "`--xattr`";
    virtiofsd: false, "`--no-xattr`";
    why: "copies without extended attributes lose capabilities, labels and ACLs";

    /// Guests that don't enforce POSIX ACLs can neither read nor set them.
    hide_acls: bool, "ACLs without `--posix-acl`";
    ringfsd: false, "extended attributes like others";
    virtiofsd: true, "hidden; setting one fails with `EOPNOTSUPP`";
    why: "copies and archives keep ACLs";

    /// Clear set-ID bits on behalf of the guest's kernel where that saves requests, unless an option
    /// says otherwise.
    kill_set_id: bool, "`--killpriv-v2`, `--no-killpriv-v2`";
    ringfsd: true, "`--killpriv-v2` with extended attributes";
    virtiofsd: false, "`--no-killpriv-v2`";
    why: "it halves the requests of a program that writes in small pieces";

    /// When to use file handles, unless an option says otherwise.
    inode_file_handles: InodeFileHandles, "`--inode-file-handles`";
    ringfsd: InodeFileHandles::Never, "`never`";
    virtiofsd: InodeFileHandles::Prefer, "`prefer`";
    why: "file handles need a capability that reaches the whole file system";

    /// Write a PID file beside the socket, unless an option names another.
    pid_file: bool, "`--pid-file`";
    ringfsd: false, "none";
    virtiofsd: true, "the path of the socket with `.pid` appended; none with `--fd`";
    why: "the socket shows whether a server runs";

    /// The limit of open files, unless an option says otherwise.
    descriptors: Descriptors, "`--rlimit-nofile`";
    ringfsd: Descriptors::Most, "the hard limit";
    virtiofsd: Descriptors::AtLeast(1_000_000), "1000000 if permitted, else the hard limit";
    why: "the hard limit is what the administrator grants";

    /// The environment variable with the filters of the log.
    log_variable: &'static str, "environment variable with log filters";
    ringfsd: "RINGFSD_LOG", "`RINGFSD_LOG`, added to `--log-level`";
    virtiofsd: "RUST_LOG", "`RUST_LOG`, instead of `--log-level`";
    why: "`RUST_LOG` is meant for whatever program a user is debugging";

    /// The facility of records for syslog.
    syslog_facility: u8, "`--syslog`: facility";
    ringfsd: 3, "`daemon`";
    virtiofsd: 1, "`user`";
    why: "it is a daemon";

    /// The name in syslog and in error messages.
    program: &'static str, "name in error messages and in syslog";
    ringfsd: "ringfsd", "`ringfsd`";
    virtiofsd: "virtiofsd", "`virtiofsd`";
    why: "launchers and log filters look for the name of the program they started";

    /// What `--version` shows after the name.
    version: &'static str, "`--version`";
    ringfsd: env!("CARGO_PKG_VERSION"), "ringfsd's version";
    virtiofsd: concat!("1.14.0 (ringfsd ", env!("CARGO_PKG_VERSION"), ")"),
        "`virtiofsd 1.14.0`, then ringfsd's version";
    why: "launchers compare the version with the oldest they support";

    /// A signal that asks the server to end is a failure.
    signal_is_failure: bool, "exit status when asked to end by a signal";
    ringfsd: false, "0";
    virtiofsd: true, "1 for `SIGTERM` and `SIGHUP`; killed by `SIGINT` or `SIGQUIT`";
    why: "ending when asked is no failure";

    /// If the serving process is killed, exit with a status instead of by the same signal.
    kill_is_status: bool, "exit status when the serving process is killed by signal N";
    ringfsd: false, "killed by signal N";
    virtiofsd: true, "256 - N";
    why: "the launcher sees what happened";

    /// The exit status for what virtiofsd takes as options, and finds to be wrong afterwards.
    conflict_status: u8,
        "exit status for options that contradict each other, wrong `--modcaps`, empty paths, empty `--uid-map`, and `-o` without a directory";
    ringfsd: 2, "2";
    virtiofsd: 1, "1";
    why: "they are wrong options like any other";

    /// Options that contradict each other are taken where virtiofsd takes them.
    lenient: bool, "`--no-xattr` with an option that needs extended attributes; two directories";
    ringfsd: false, "refused";
    virtiofsd: true, "the other option wins; `-o source=` wins";
    why: "one of the two is a mistake";

    /// Of two options, the one wins that virtiofsd prefers, instead of the later one.
    own_precedence: bool,
        "`--socket` with `--socket-path`; `-d` with `--log-level trace`; `--no-announce-submounts` with `-o announce_submounts`";
    ringfsd: false, "the last one; `--log-level`; `-o`";
    virtiofsd: true, "`--socket-path`; `-d`; `--no-announce-submounts`";
    why: "as for all options";

    /// Replace any file at the socket's path.
    replaces_files: bool, "a file other than a socket at the path of the socket";
    ringfsd: false, "refused";
    virtiofsd: true, "replaced";
    why: "the file may still be needed";
}

impl Persona {
    /// The persona that a command line asks for: by `--compat`, or else by the program's name.
    #[must_use]
    pub fn of(arguments: &[OsString]) -> Self {
        let mut persona = Self::of_name(arguments.first().map_or(OsStr::new(""), |name| name));
        let own = arguments.iter().skip(1);
        let mut own = own.take_while(|argument| *argument != "--");
        while let Some(argument) = own.next() {
            let value = match argument.as_bytes().strip_prefix(b"--compat") {
                Some(b"") => own.next().map(|value| value.as_bytes()),
                Some(value) => value.strip_prefix(b"="),
                None => continue,
            };
            let value = value.and_then(|value| std::str::from_utf8(value).ok());
            // The parser reports other values.
            if let Some(Ok(named)) = value.map(|value| Self::from_str(value, true)) {
                persona = named;
            }
        }
        persona
    }

    fn of_name(name: &OsStr) -> Self {
        match Path::new(name).file_name() {
            Some(name) if name == "virtiofsd" => Self::Virtiofsd,
            _ => Self::Ringfsd,
        }
    }

    /// What this persona does.
    #[must_use]
    pub const fn behaviour(self) -> &'static Behaviour {
        match self {
            Self::Ringfsd => &RINGFSD,
            Self::Virtiofsd => &VIRTIOFSD,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn persona_goes_by_compat_and_else_by_name() {
        let of = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
            Persona::of(&arguments)
        };
        for virtiofsd in [
            &["virtiofsd"][..],
            &["/usr/libexec/virtiofsd", "--fd=3"],
            &["ringfsd", "--compat=virtiofsd"],
            &["ringfsd", "--compat", "virtiofsd"],
            &["ringfsd", "--compat=ringfsd", "--compat=VIRTIOFSD"],
        ] {
            assert_eq!(of(virtiofsd), Persona::Virtiofsd, "{virtiofsd:?}");
        }
        for own in [
            &[][..],
            &["ringfsd"],
            &["virtiofsd/ringfsd"],
            &["/usr/libexec/virtiofsd", "--compat=ringfsd"],
            &["virtiofsd", "--compat", "ringfsd"],
            &["ringfsd", "--", "--compat=virtiofsd"],
            &["ringfsd", "--compat"],
            &["ringfsd", "--compat-virtiofsd"],
        ] {
            assert_eq!(of(own), Persona::Ringfsd, "{own:?}");
        }
    }

    #[test]
    fn differences_are_differences() {
        for row in DIFFERENCES {
            assert_ne!(row.ringfsd, row.virtiofsd, "{}", row.subject);
            let texts = [row.subject, row.ringfsd, row.virtiofsd, row.why];
            assert!(
                texts
                    .iter()
                    .all(|text| !text.is_empty() && !text.contains('|'))
            );
        }
    }
}
