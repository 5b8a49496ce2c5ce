//! Options of what the guest may do with the shared directory, and of what it may cache.
//!
//! Only words become settings here; whether the host can do it is found out at the start.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::config::Share;
use crate::fs::passthrough;
use crate::fs::passthrough::{IdMap, IdOverlap, IdRule, XattrMap};
use crate::fuse::{Readdirplus, SessionOptions, Wanted};

/// What may be done with the shared directory.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "What the guest may do and keep")]
pub struct Sharing {
    /// What the guest may keep of the files it has seen. never: nothing; every look is a look
    /// at the host. metadata: names and attributes for a day, data not. auto: names and
    /// attributes for a second, data until the file has changed. always: all for a day, data
    /// also across close and open: for directories that nobody else changes.
    #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
    pub cache: Cache,

    /// Seconds, such as 0.5, for which the guest may rely on the attributes of a file. Set by
    /// --cache unless given.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub attr_timeout: Option<Duration>,

    /// Seconds for which the guest may rely on a name that it has looked up. Set by --cache
    /// unless given.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub entry_timeout: Option<Duration>,

    /// Seconds for which the guest may rely on a name not being there. Programs that search
    /// along a path ask less often; a file made on the host is seen as much later.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "0")]
    pub negative_timeout: Duration,

    /// Let the guest collect writes and send them later, in larger pieces. Faster for many small
    /// writes; what a crash of the guest loses is what its own disk would have lost. Nobody else
    /// may write to the same files meanwhile.
    #[arg(long)]
    pub writeback: bool,

    /// Pass O_DIRECT of programs in the guest on to the host, so that they bypass the host's
    /// cache too. Without it only the guest's is bypassed.
    #[arg(long)]
    pub allow_direct_io: bool,

    /// Let programs in the guest map files shared and writable where --cache keeps no data
    /// (never and metadata). Mapped pages are cached then, whatever --cache says.
    #[arg(long)]
    pub allow_mmap: bool,

    /// Answer lists of names without the attributes of each file: for directories whose files
    /// are seldom looked at, such as queues of mail.
    #[arg(long)]
    pub no_readdirplus: bool,

    /// Let the guest use files without asking to open and close them; the server opens them when
    /// they are read or written, and keeps the descriptors as long as there is room. Saves three
    /// requests for each file that a program opens. Needs --cache auto or always.
    #[arg(
        long,
        conflicts_with_all = ["posix_locks", "flock", "allow_direct_io", "preserve_noatime"]
    )]
    pub no_open: bool,

    /// Let the guest read directories without asking to open and close them; it may then keep
    /// their lists of names until they change. Not with --cache never.
    #[arg(long)]
    pub no_opendir: bool,

    /// Keep O_NOATIME when a program in the guest opens a file with it. The host allows it only
    /// to a server that owns the file or has CAP_FOWNER, else opening fails with EPERM.
    #[arg(long)]
    pub preserve_noatime: bool,

    /// Refuse with EROFS whatever would change something. The guest may mount with -o ro or
    /// without.
    #[arg(long)]
    pub readonly: bool,

    /// Take set-user-ID and set-group-ID bits away from a file that is written, truncated or
    /// given away, as the guest asks for it, instead of leaving that to the guest's kernel, which
    /// needs a request more for it.
    #[arg(long)]
    pub killpriv_v2: bool,

    /// Tell the guest where another file system is mounted inside the directory, so that it shows
    /// a mount of its own there: with a device number of its own, on which programs rely to
    /// tell files apart. On unless --no-announce-submounts is given.
    #[arg(long, overrides_with = "no_announce_submounts")]
    pub announce_submounts: bool,

    /// Show other file systems inside the directory as part of one.
    #[arg(long)]
    pub no_announce_submounts: bool,

    /// Keep files within reach by file handle instead of an open descriptor each. never: not even
    /// when descriptors run short (names serve then). prefer: wherever they work. mandatory: or not at all. Needs
    /// CAP_DAC_READ_SEARCH.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    pub inode_file_handles: FileHandles,

    /// Translate user ids by a rule, which may be given several times: map:GUEST:HOST:COUNT both
    /// ways, guest:GUEST:HOST:COUNT what the guest sets, host:HOST:GUEST:COUNT what it sees;
    /// squash-guest and squash-host make one id of COUNT; forbid-guest:GUEST:COUNT answers
    /// EPERM. Ids without a rule stay.
    #[arg(long, value_name = "RULE", help_heading = "Owners")]
    pub translate_uid: Vec<IdRule>,

    /// Translate group ids, as --translate-uid does user ids.
    #[arg(long, value_name = "RULE", help_heading = "Owners")]
    pub translate_gid: Vec<IdRule>,

    /// Serve extended attributes. They are served unless --no-xattr is given: without them
    /// copies lose data that programs rely on (capabilities, labels, ACLs).
    #[arg(
        long,
        overrides_with = "no_xattr",
        help_heading = "Extended attributes"
    )]
    pub xattr: bool,

    /// Serve no extended attributes; saves the guest's kernel a request with each write that
    /// asks for security.capability.
    #[arg(long, help_heading = "Extended attributes")]
    pub no_xattr: bool,

    /// Give what the guest makes the security label (SELinux) that the guest's kernel says,
    /// from its beginning. Needs CAP_SYS_ADMIN, or --xattrmap to store labels under other
    /// names.
    #[arg(
        long,
        conflicts_with = "no_xattr",
        help_heading = "Extended attributes"
    )]
    pub security_label: bool,

    /// Give extended attributes other names on the host, by rules of the form
    /// :TYPE:SCOPE:KEY:PREPEND: or :map:KEY:PREPEND:, which the manual explains. An example is
    /// :map::user.guest.: for a server without privileges.
    #[arg(
        long,
        value_name = "RULES",
        conflicts_with_all = ["no_xattr", "killpriv_v2"],
        help_heading = "Extended attributes"
    )]
    pub xattrmap: Option<XattrMap>,

    /// Let the guest use POSIX ACLs, which the host's file system has to have. auto: if the
    /// guest can. always: so, and an error if it can't. --posix-acl alone means always.
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_value_t,
        default_missing_value = "always",
        conflicts_with = "no_xattr",
        help_heading = "Extended attributes"
    )]
    pub posix_acl: PosixAcl,
}

/// `--cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Nothing.
    Never,
    /// Names and attributes.
    Metadata,
    /// A little of everything.
    #[default]
    Auto,
    /// Everything.
    Always,
}

/// `--posix-acl`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PosixAcl {
    /// Not at all.
    #[default]
    Never,
    /// If the guest can.
    Auto,
    /// Only with guests that can.
    Always,
}

impl From<PosixAcl> for Wanted {
    fn from(acl: PosixAcl) -> Self {
        match acl {
            PosixAcl::Never => Self::No,
            PosixAcl::Auto => Self::IfOffered,
            PosixAcl::Always => Self::Needed,
        }
    }
}

/// `--inode-file-handles`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FileHandles {
    /// When descriptors run short.
    #[default]
    Never,
    /// Wherever they work.
    Prefer,
    /// Always, or an error.
    Mandatory,
}

impl From<FileHandles> for passthrough::InodeFileHandles {
    fn from(handles: FileHandles) -> Self {
        match handles {
            FileHandles::Never => Self::Never,
            FileHandles::Prefer => Self::Prefer,
            FileHandles::Mandatory => Self::Mandatory,
        }
    }
}

impl From<Cache> for passthrough::Cache {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::Never => Self::Never,
            Cache::Metadata => Self::Metadata,
            Cache::Auto => Self::Auto,
            Cache::Always => Self::Always,
        }
    }
}

/// A time in seconds, with a fraction if need be.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "a number of seconds, such as 1 or 0.5".to_owned())
}

/// The rules of one option, which must not contradict each other.
fn id_map(option: &'static str, rules: &[IdRule]) -> Result<IdMap, Contradiction> {
    IdMap::new(rules).map_err(|overlap| Contradiction::Rules { option, overlap })
}

/// Options, or the rules of one, contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// Rules of one option do.
    #[error("{option}: {overlap}")]
    Rules {
        /// Which option.
        option: &'static str,
        /// Which rules.
        overlap: IdOverlap,
    },
    /// Two options do.
    #[error("{option} can't be used with {other}: {reason}")]
    Options {
        /// The one.
        option: &'static str,
        /// The other.
        other: &'static str,
        /// Why not.
        reason: &'static str,
    },
}

/// What `--no-open` and `--no-opendir` don't go together with, beyond what clap is told.
fn untold(sharing: &Sharing) -> Result<(), Contradiction> {
    let kept = "what is used without being opened is always kept";
    let gone = "a file that is open without being told would end with its last name";
    let contradictions = [
        (
            sharing.no_open && sharing.cache == Cache::Never,
            "--no-open",
            "--cache never",
            kept,
        ),
        (
            sharing.no_open && sharing.cache == Cache::Metadata,
            "--no-open",
            "--cache metadata",
            kept,
        ),
        (
            sharing.no_opendir && sharing.cache == Cache::Never,
            "--no-opendir",
            "--cache never",
            kept,
        ),
        (
            sharing.no_open && sharing.inode_file_handles != FileHandles::Never,
            "--no-open",
            "--inode-file-handles",
            gone,
        ),
    ];
    match contradictions.into_iter().find(|(holds, ..)| *holds) {
        None => Ok(()),
        Some((_, option, other, reason)) => Err(Contradiction::Options {
            option,
            other,
            reason,
        }),
    }
}

impl TryFrom<Sharing> for Share {
    type Error = Contradiction;

    fn try_from(sharing: Sharing) -> Result<Self, Contradiction> {
        untold(&sharing)?;
        let cache = passthrough::Cache::from(sharing.cache);
        let attribute_ttl = sharing.attr_timeout.unwrap_or(cache.ttl());
        let entry_ttl = sharing.entry_timeout.unwrap_or(cache.ttl());
        let readdirplus = if sharing.cache == Cache::Never || sharing.no_readdirplus {
            Readdirplus::Never
        } else {
            Readdirplus::Auto
        };
        Ok(Self {
            file_system: passthrough::Options {
                cache,
                users: id_map("--translate-uid", &sharing.translate_uid)?,
                groups: id_map("--translate-gid", &sharing.translate_gid)?,
                attribute_ttl,
                entry_ttl,
                xattr: !sharing.no_xattr,
                xattr_map: sharing.xattrmap,
                allow_direct_io: sharing.allow_direct_io,
                readonly: sharing.readonly,
                announce_submounts: !sharing.no_announce_submounts,
                inode_file_handles: sharing.inode_file_handles.into(),
                preserve_noatime: sharing.preserve_noatime,
                ..passthrough::Options::default()
            },
            session: SessionOptions {
                readdirplus,
                negative_ttl: sharing.negative_timeout,
                writeback: sharing.writeback && !sharing.readonly,
                submounts: !sharing.no_announce_submounts,
                kill_set_id: sharing.killpriv_v2,
                security_label: sharing.security_label,
                posix_acl: sharing.posix_acl.into(),
                no_open: sharing.no_open,
                no_opendir: sharing.no_opendir,
                direct_io_mmap: sharing.allow_mmap,
                idmap: true,
                cache_symlinks: !attribute_ttl.is_zero() && !entry_ttl.is_zero(),
                ..SessionOptions::default()
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_with_fractions() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("86400"), Ok(Duration::from_secs(86400)));
        for bad in ["", "-1", "1s", "nan", "inf", "1e300"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_single_timeout_overrides_the_policy() {
        let share = Share::try_from(Sharing {
            cache: Cache::Always,
            entry_timeout: Some(Duration::ZERO),
            ..Sharing::default()
        })
        .unwrap();
        assert_eq!(share.file_system.attribute_ttl, Duration::from_secs(86400));
        assert_eq!(share.file_system.entry_ttl, Duration::ZERO);
        assert!(!share.session.cache_symlinks);
    }
}
