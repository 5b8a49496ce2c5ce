//! From options as typed to a [`Config`]: defaults are filled in, and options that contradict each
//! other are refused where clap can't express it.

use std::num::{NonZeroU16, NonZeroUsize};
use std::time::Duration;

use super::caching::{Cache, Caching};
use super::sharing::{FileHandles, Sharing};
use super::{Connection, Options};
use crate::config::{Config, Descriptors, Listen, Share};
use crate::fs::passthrough;
use crate::fs::passthrough::{IdMap, IdOverlap, IdRule};
use crate::fuse::{Readdirplus, SessionOptions};

/// Options, or the rules of one option, contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionConflict {
    /// Two rules of one option.
    #[error("{option}: {overlap}")]
    Rules {
        /// The option.
        option: &'static str,
        /// The rules.
        overlap: IdOverlap,
    },
    /// Two options.
    #[error("{option} can't be used with {other}: {reason}")]
    Options {
        /// One option.
        option: &'static str,
        /// The other option.
        other: &'static str,
        /// Why they exclude each other.
        reason: &'static str,
    },
}

/// The rules of one option as a map.
fn id_map(option: &'static str, rules: &[IdRule]) -> Result<IdMap, OptionConflict> {
    IdMap::new(rules).map_err(|overlap| OptionConflict::Rules { option, overlap })
}

/// Checks what `--no-open` and `--no-opendir` exclude, beyond what clap checks.
fn check_handleless(caching: &Caching, sharing: &Sharing) -> Result<(), OptionConflict> {
    let cached = "the guest always caches what it uses without opening it";
    let lost = "a file that the guest uses without opening it would end with its last name";
    let conflicts = [
        (
            caching.no_open && caching.cache == Cache::Never,
            "--no-open",
            "--cache never",
            cached,
        ),
        (
            caching.no_open && caching.cache == Cache::Metadata,
            "--no-open",
            "--cache metadata",
            cached,
        ),
        (
            caching.no_opendir && caching.cache == Cache::Never,
            "--no-opendir",
            "--cache never",
            cached,
        ),
        (
            caching.no_open && sharing.inode_file_handles != FileHandles::Never,
            "--no-open",
            "--inode-file-handles",
            lost,
        ),
    ];
    match conflicts.into_iter().find(|(conflicting, ..)| *conflicting) {
        None => Ok(()),
        Some((_, option, other, reason)) => Err(OptionConflict::Options {
            option,
            other,
            reason,
        }),
    }
}

/// The options of the file system and of the FUSE session.
fn share(options: &Options) -> Result<Share, OptionConflict> {
    let (sharing, caching) = (&options.sharing, &options.caching);
    let (ownership, xattrs) = (&options.ownership, &options.extended_attributes);
    check_handleless(caching, sharing)?;
    let cache = passthrough::Cache::from(caching.cache);
    let attribute_ttl = caching.attr_timeout.unwrap_or(cache.ttl());
    let entry_ttl = caching.entry_timeout.unwrap_or(cache.ttl());
    let readdirplus = if caching.cache == Cache::Never || caching.no_readdirplus {
        Readdirplus::Never
    } else {
        Readdirplus::Auto
    };
    Ok(Share {
        file_system: passthrough::Options {
            cache,
            users: id_map("--translate-uid", &ownership.translate_uid)?,
            groups: id_map("--translate-gid", &ownership.translate_gid)?,
            attribute_ttl,
            entry_ttl,
            xattr: !xattrs.no_xattr,
            xattr_map: xattrs.xattrmap.clone(),
            allow_direct_io: caching.allow_direct_io,
            readonly: sharing.readonly,
            announce_submounts: !sharing.no_announce_submounts,
            inode_file_handles: sharing.inode_file_handles.into(),
            preserve_noatime: sharing.preserve_noatime,
            max_open_inodes: sharing.max_open_inodes.map(NonZeroUsize::get),
            max_inodes: sharing.max_inodes.get(),
            remember_inodes: sharing.remember_inodes,
            max_handles: sharing.max_handles.map(NonZeroUsize::get),
            max_closed_files: caching.max_spare_files,
            migration: options.migration.into(),
            ..passthrough::Options::default()
        },
        session: SessionOptions {
            readdirplus,
            negative_ttl: caching.negative_timeout,
            writeback: caching.writeback && !sharing.readonly,
            submounts: !sharing.no_announce_submounts,
            kill_set_id: ownership.killpriv_v2,
            security_label: xattrs.security_label,
            posix_acl: xattrs.posix_acl.into(),
            no_open: caching.no_open,
            no_opendir: caching.no_opendir,
            direct_io_mmap: caching.allow_mmap,
            idmap: true,
            cache_symlinks: !attribute_ttl.is_zero() && !entry_ttl.is_zero(),
            posix_locks: sharing.posix_locks,
            flock: sharing.flock,
            lock_wait_limit: sharing.lock_wait_limit,
            ..SessionOptions::default()
        },
    })
}

/// As many request queues as workers, unless the option says otherwise.
fn request_queues(connection: &Connection, workers: NonZeroUsize) -> NonZeroU16 {
    connection.request_queues.unwrap_or_else(|| {
        let count = u16::try_from(workers.get()).unwrap_or(u16::MAX);
        NonZeroU16::new(count).unwrap_or(NonZeroU16::MIN)
    })
}

impl TryFrom<Options> for Config {
    type Error = OptionConflict;

    fn try_from(options: Options) -> Result<Self, OptionConflict> {
        let share = share(&options)?;
        let connection = options.connection;
        let workers = connection.workers.unwrap_or_else(Self::default_workers);
        Ok(Self {
            request_queues: request_queues(&connection, workers),
            listen: match (connection.socket, connection.fd) {
                (Some(path), _) => Listen::Path(path),
                (None, fd) => Listen::Inherited(fd.unwrap_or(-1)),
            },
            shared_dir: options.sharing.shared_dir,
            socket_group: connection.socket_group,
            tag: connection.tag,
            workers,
            runtime: connection.runtime.into(),
            poll: Duration::from_micros(u64::from(connection.poll_us)),
            state: options.recovery.state,
            once: connection.once,
            supervise: options.recovery.supervise,
            descriptors: match options.sharing.rlimit_nofile {
                None => Descriptors::Most,
                Some(0) => Descriptors::Inherited,
                Some(limit) => Descriptors::Limit(limit),
            },
            sandbox: options.isolation.into(),
            share,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn config(arguments: &[&str]) -> Config {
        let required = ["ringfsd", "--fd=3", "--shared-dir=/d"];
        let options = Options::try_parse_from(required.iter().chain(arguments)).unwrap();
        Config::try_from(options).unwrap()
    }

    #[test]
    fn socket_and_socket_path_are_the_same() {
        for name in ["--socket", "--socket-path"] {
            let options =
                Options::try_parse_from(["ringfsd", name, "/s", "--shared-dir", "/d"]).unwrap();
            assert_eq!(
                Config::try_from(options).unwrap().listen,
                Listen::Path("/s".into())
            );
        }
    }

    #[test]
    fn numbers_are_taken_as_given() {
        let poll = |arguments: &[&str]| config(arguments).poll.as_micros();
        assert_eq!((poll(&[]), poll(&["--poll-us=7"])), (50, 7));
        assert_eq!(poll(&["--poll-us", "0"]), 0);
        let most = |arguments: &[&str]| config(arguments).share.file_system.max_open_inodes;
        assert_eq!((most(&[]), most(&["--max-open-inodes=7"])), (None, Some(7)));
        let workers = config(&["--workers=3", "--thread-pool-size=9"]);
        let queues = workers.request_queues.get();
        assert_eq!((workers.workers.get(), queues), (3, 3));
        assert_eq!(config(&["--request-queues=5"]).request_queues.get(), 5);
    }

    #[test]
    fn impossible_options_are_refused() {
        for bad in [
            &["--shared-dir", "/d"][..],
            &["--socket", "/s"],
            &["--socket", "/s", "--fd", "3", "--shared-dir", "/d"],
            &["--fd", "-1", "--shared-dir", "/d"],
            &["--fd=3", "--shared-dir=/d", "--workers", "0"],
            &["--fd=3", "--shared-dir=/d", "--max-open-inodes", "0"],
            &["--fd=3", "--shared-dir=/d", "--request-queues", "1025"],
            &["--fd=3", "--shared-dir=/d", "--tag", ""],
            &["--fd=3", "--shared-dir=/d", "--poll-us", "1001"],
            &["--fd=3", "--shared-dir=/d", "--runtime", "epoll"],
        ] {
            let arguments = std::iter::once(&"ringfsd").chain(bad);
            let error = Options::try_parse_from(arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn single_timeout_overrides_the_policy() {
        let share = config(&["--cache=always", "--entry-timeout=0"]).share;
        assert_eq!(share.file_system.attribute_ttl, Duration::from_secs(86400));
        assert_eq!(share.file_system.entry_ttl, Duration::ZERO);
        assert!(!share.session.cache_symlinks);
    }
}
