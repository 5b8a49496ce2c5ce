//! From options as typed to a [`Config`]: defaults are filled in, and options that contradict each
//! other are refused where clap can't express it.

use std::ffi::CStr;
use std::num::{NonZeroU16, NonZeroUsize};
use std::time::Duration;

use super::caching::Caching;
use super::conflict::{OptionConflict, refuse_first};
use super::extended_attributes::ExtendedAttributes;
use super::persona::Behaviour;
use super::sharing::Sharing;
use super::source_options;
use super::sources::{self, SourceError};
use super::{Connection, Options, Ownership};
use crate::config::{Config, Descriptors, Listen, OverlaySource, Share, Source};
use crate::dax::{DaxOptions, NamePatterns};
use crate::fs::passthrough;
use crate::fs::passthrough::{Cache, IdMap, IdRule, InodeFileHandles, MigrationOptions};
use crate::fs::vfs::MountPoint;
use crate::fuse::{Readdirplus, SessionOptions, Wanted};
use crate::io::Choice;
use crate::sandbox::{self, Kind};

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
            caching.no_open && sharing.inode_file_handles.is_some_and(uses_handles),
            "--no-open",
            "--inode-file-handles",
            lost,
        ),
    ];
    refuse_first(conflicts)
}

fn uses_handles(handles: InodeFileHandles) -> bool {
    handles != InodeFileHandles::Never
}

/// Whether extended attributes are served.
fn serves_xattrs(
    xattrs: &ExtendedAttributes,
    behaviour: &Behaviour,
) -> Result<bool, OptionConflict> {
    let implied = [
        (xattrs.xattrmap.is_some(), "--xattrmap"),
        (xattrs.posix_acl != Wanted::No, "--posix-acl"),
        (xattrs.security_label != Wanted::No, "--security-label"),
    ];
    let is_implied = implied.iter().any(|(given, _)| *given);
    if xattrs.no_xattr && !behaviour.lenient {
        let reason = "it needs extended attributes";
        refuse_first(implied.map(|(given, option)| (given, option, "--no-xattr", reason)))?;
    }
    let asked = if xattrs.no_xattr {
        false
    } else {
        xattrs.xattr || behaviour.xattr
    };
    Ok(asked || is_implied)
}

/// The extended attribute that makes a program privileged.
const CAPABILITY: &CStr = c"security.capability";

/// Whether the host clears a file's capabilities when it is written: only under their own name.
fn host_clears_capabilities(xattrs: &ExtendedAttributes) -> bool {
    let map = xattrs.xattrmap.as_ref();
    map.is_none_or(|map| !map.renames(CAPABILITY))
}

/// Whether the server clears set-ID bits. By default it does where that saves the guest's kernel
/// from asking for `security.capability` before each write. It never does where the host can't clear
/// that attribute.
fn clears_set_id(options: &Options, serves_xattrs: bool, behaviour: &Behaviour) -> bool {
    let Ownership {
        killpriv_v2,
        no_killpriv_v2,
        ..
    } = options.ownership;
    let useful = serves_xattrs && behaviour.kill_set_id && !no_killpriv_v2;
    (killpriv_v2 || useful) && host_clears_capabilities(&options.extended_attributes)
}

/// Returns what the user of these options should know, for the log.
#[must_use]
pub fn notices(options: &Options) -> Vec<String> {
    let mut notices = Vec::new();
    if options.ownership.killpriv_v2 && !host_clears_capabilities(&options.extended_attributes) {
        notices.push(
            "--killpriv-v2 has no effect: --xattrmap stores security.capability under another \
             name, which the host doesn't clear when a file is written, so the guest's kernel has \
             to"
            .to_owned(),
        );
    }
    notices
}

/// The options of the file system and of the FUSE session.
fn share(options: &Options, behaviour: &Behaviour) -> Result<Share, OptionConflict> {
    let (sharing, caching) = (&options.sharing, &options.caching);
    let (ownership, xattrs) = (&options.ownership, &options.extended_attributes);
    check_handleless(caching, sharing)?;
    let cache = caching.cache;
    let attribute_ttl = caching.attr_timeout.unwrap_or(cache.ttl());
    let entry_ttl = caching.entry_timeout.unwrap_or(cache.ttl());
    let readdirplus = if caching.cache == Cache::Never || caching.no_readdirplus {
        Readdirplus::Never
    } else {
        Readdirplus::Auto
    };
    let xattr = serves_xattrs(xattrs, behaviour)?;
    let handles = if caching.no_open {
        InodeFileHandles::Never
    } else {
        behaviour.inode_file_handles
    };
    Ok(Share {
        file_system: passthrough::Options {
            cache,
            users: id_map("--translate-uid", &ownership.translate_uid)?,
            groups: id_map("--translate-gid", &ownership.translate_gid)?,
            attribute_ttl,
            entry_ttl,
            xattr,
            xattr_map: xattrs.xattrmap.clone(),
            allow_direct_io: caching.allow_direct_io,
            readonly: sharing.readonly,
            announce_submounts: !sharing.no_announce_submounts,
            inode_file_handles: sharing.inode_file_handles.unwrap_or(handles),
            preserve_noatime: sharing.preserve_noatime,
            max_open_inodes: sharing.max_open_inodes.map(NonZeroUsize::get),
            max_inodes: sharing.max_inodes.get(),
            remember_inodes: sharing.remember_inodes,
            max_handles: sharing.max_handles.map(NonZeroUsize::get),
            max_closed_files: caching.max_spare_files,
            migration: options.migration.resolved(),
            ..passthrough::Options::default()
        },
        session: SessionOptions {
            readdirplus,
            negative_ttl: caching.negative_timeout,
            writeback: caching.writeback && !sharing.readonly,
            submounts: !sharing.no_announce_submounts,
            kill_set_id: clears_set_id(options, xattr, behaviour),
            security_label: xattrs.security_label,
            posix_acl: xattrs.posix_acl,
            hide_acls: xattr && behaviour.hide_acls,
            no_open: caching.no_open,
            no_opendir: caching.no_opendir,
            direct_io_mmap: caching.allow_mmap,
            idmap: true,
            cache_symlinks: !attribute_ttl.is_zero() && !entry_ttl.is_zero(),
            posix_locks: sharing.posix_locks,
            flock: sharing.flock,
            lock_wait_limit: sharing.lock_wait_limit,
            dax: options.dax.dax_window.map(|window| DaxOptions {
                window,
                marked_from: options.dax.marked_from(),
                names: NamePatterns {
                    include: options.dax.dax_include.clone(),
                    exclude: options.dax.dax_exclude.clone(),
                },
                writable: !sharing.readonly,
            }),
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

/// What is served.
fn source(options: &Options) -> Result<Source, OptionConflict> {
    let sharing = &options.sharing;
    let image = match (&sharing.rafs, &sharing.blobs) {
        (Some(bootstrap), Some(blobs)) => {
            let cache_dir = sharing.cache_dir.clone();
            let image = sources::image(
                bootstrap.clone(),
                blobs.clone(),
                cache_dir,
                sharing.rafs_prefetch,
            )?;
            Some(Source::Rafs(image))
        }
        _ => None,
    };
    let source = match (&sharing.overlay, image) {
        (Some(overlay), image) => {
            let mut overlay: OverlaySource = overlay.clone();
            overlay.lower.extend(image);
            if overlay.lower.is_empty() && overlay.upper.is_none() {
                return Err(SourceError::NoLayer.into());
            }
            Source::Overlay(overlay)
        }
        (None, Some(image)) => image,
        (None, None) if !sharing.vfs.is_empty() => Source::Vfs(mounts(&sharing.vfs)?),
        (None, None) => Source::Directory(sharing.shared_dir.clone().unwrap_or_default()),
    };
    check_source(&source, options)?;
    refuse_first([(
        options.limits.limit_space.is_some() && options.isolation.modcaps.keeps_sys_resource(),
        "--limit-space",
        "--modcaps=+sys_resource",
        "a process with that capability may exceed quotas",
    )])?;
    Ok(source)
}

/// The file systems of `--vfs`, if each has a mount point of its own.
fn mounts(mounts: &[(MountPoint, Source)]) -> Result<Vec<(MountPoint, Source)>, OptionConflict> {
    for (at, (point, _)) in mounts.iter().enumerate() {
        if mounts[..at].iter().any(|(other, _)| other == point) {
            return Err(OptionConflict::MountedTwice(point.clone()));
        }
    }
    Ok(mounts.to_vec())
}

/// Refuses what only works with a single directory.
fn check_source(source: &Source, options: &Options) -> Result<(), OptionConflict> {
    if matches!(source, Source::Directory(_)) {
        return Ok(());
    }
    let recovery = &options.recovery;
    let migration = options.migration.resolved();
    let isolation = &options.isolation;
    let unrecorded = "a session is recorded only for --shared-dir: use that, or omit the option";
    let one_root = "a root directory can't be made of several directories without mounts: use \
                    --sandbox namespace, or none where the launcher has its own sandbox";
    let unmappable = "files of layers and images can't be mapped: only those of directories";
    let other = source.option();
    source_options::check(source, options)?;
    refuse_first([
        (
            options.dax.dax_window.is_some() && !source.can_be_mapped(),
            "--dax-window",
            other,
            unmappable,
        ),
        (
            options.limits.limit_space.is_some(),
            "--limit-space",
            other,
            "only a single directory gets a quota",
        ),
        (recovery.supervise, "--supervise", other, unrecorded),
        (recovery.state.is_some(), "--state", other, unrecorded),
        (
            migration != MigrationOptions::default(),
            "an option of live migration",
            other,
            unrecorded,
        ),
        (
            sandbox::Options::from(isolation.clone()).kind == Kind::Chroot,
            "--sandbox chroot",
            other,
            one_root,
        ),
    ])
}

/// Whether the server ends when the first VMM has disconnected. Nobody else has a reason to connect
/// to a socket that a launcher has made for one VMM, but a VMM that finds its session in a state
/// file may connect again.
fn ends_with_vmm(options: &Options, behaviour: &Behaviour) -> bool {
    let connection = &options.connection;
    let has_launcher = connection.fd.is_some() && options.recovery.state.is_none();
    connection.once || !connection.keep_listening && (behaviour.once || has_launcher)
}

impl TryFrom<Options> for Config {
    type Error = OptionConflict;

    fn try_from(options: Options) -> Result<Self, OptionConflict> {
        let connection = &options.connection;
        let behaviour = connection.compat.unwrap_or_default().behaviour();
        let share = share(&options, behaviour)?;
        let source = source(&options)?;
        let once = ends_with_vmm(&options, behaviour);
        let connection = options.connection;
        if connection.runtime == Choice::TokioUring && !cfg!(feature = "tokio-uring") {
            return Err(OptionConflict::NotBuilt {
                option: "--runtime tokio-uring",
                feature: "tokio-uring",
            });
        }
        let workers = connection.workers.unwrap_or_else(Self::default_workers);
        let request_queues = request_queues(&connection, workers);
        let pid_file = connection.pid_file.or_else(|| {
            let socket = connection.socket.as_ref().filter(|_| behaviour.pid_file)?;
            let mut path = socket.clone().into_os_string();
            path.push(".pid");
            Some(path.into())
        });
        Ok(Self {
            request_queues,
            listen: match (connection.socket, connection.fd) {
                (Some(path), _) => Listen::Path(path),
                (None, fd) => Listen::Inherited(fd.unwrap_or(-1)),
            },
            source,
            socket_group: connection.socket_group,
            tag: connection.tag,
            workers,
            pid_file,
            metrics: options.observability.metrics,
            replaces_files: behaviour.replaces_files,
            runtime: connection.runtime,
            poll: Duration::from_micros(u64::from(connection.poll_us)),
            state: options.recovery.state,
            control: options.observability.control,
            once,
            supervise: options.recovery.supervise,
            dax_fs_map: options.dax.dax_fs_map,
            descriptors: match options.sharing.rlimit_nofile {
                None => behaviour.descriptors,
                Some(0) => Descriptors::Inherited,
                Some(limit) => Descriptors::Limit(limit),
            },
            limits: options.limits.settings(),
            space: options.limits.limit_space,
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
    fn runtime_that_is_not_built_is_refused() {
        let line = [
            "ringfsd",
            "--fd=3",
            "--shared-dir=/d",
            "--runtime=tokio-uring",
        ];
        let resolved = Config::try_from(Options::try_parse_from(line).unwrap());
        if cfg!(feature = "tokio-uring") {
            assert_eq!(resolved.unwrap().runtime, Choice::TokioUring);
        } else {
            let error = resolved.unwrap_err().to_string();
            assert!(error.contains("--features tokio-uring"), "{error}");
        }
    }

    #[test]
    fn numbers_are_taken_as_given() {
        let poll = |arguments: &[&str]| config(arguments).poll.as_micros();
        assert_eq!((poll(&[]), poll(&["--poll-us=7"])), (100, 7));
        assert_eq!(poll(&["--poll-us", "0"]), 0);
        let most = |arguments: &[&str]| config(arguments).share.file_system.max_open_inodes;
        assert_eq!((most(&[]), most(&["--max-open-inodes=7"])), (None, Some(7)));
        let workers = config(&["--workers=3", "--thread-pool-size=9"]);
        let queues = workers.request_queues.get();
        assert_eq!((workers.workers.get(), queues), (3, 3));
        assert_eq!(config(&["--request-queues=5"]).request_queues.get(), 5);
    }

    #[test]
    fn server_clears_set_id_bits_where_that_saves_requests() {
        let clears = |arguments: &[&str]| config(arguments).share.session.kill_set_id;
        for on in [
            &[][..],
            &["--writeback"],
            &["--no-xattr", "--killpriv-v2"],
            &["--no-killpriv-v2", "--killpriv-v2"],
        ] {
            assert!(clears(on), "{on:?}");
        }
        for off in [
            &["--no-xattr"][..],
            &["--compat=virtiofsd"],
            &["--compat=virtiofsd", "--xattr"],
            &["--xattrmap=:map::user.guest.:"],
            &["--killpriv-v2", "--no-killpriv-v2"],
        ] {
            assert!(!clears(off), "{off:?}");
        }
    }

    #[test]
    fn server_ends_with_the_vmm_where_nobody_else_connects() {
        let once = |arguments: &[&str]| config(arguments).once;
        assert!(once(&[]));
        assert!(once(&["--supervise"]));
        assert!(!once(&["--state=/s"]));
        assert!(!once(&["--keep-listening"]));
        assert!(!once(&["--once", "--keep-listening"]));
        assert!(once(&["--keep-listening", "--once", "--state=/s"]));
        assert!(once(&["--compat=virtiofsd", "--state=/s"]));
        assert!(!once(&["--compat=virtiofsd", "--keep-listening"]));
        let socket = |arguments: &[&str]| {
            let required = ["ringfsd", "--socket=/s", "--shared-dir=/d"];
            let options = Options::try_parse_from(required.iter().chain(arguments)).unwrap();
            Config::try_from(options).unwrap()
        };
        assert!(!socket(&[]).once);
        assert!(socket(&["--once"]).once);
        let other = socket(&["--compat=virtiofsd"]);
        assert!(other.once);
        assert_eq!(other.pid_file, Some("/s.pid".into()));
        assert_eq!(socket(&[]).pid_file, None);
        assert_eq!(config(&["--compat=virtiofsd"]).pid_file, None);
    }

    #[test]
    fn what_needs_extended_attributes_brings_them() {
        let served = |arguments: &[&str]| {
            let compat = ["--compat=virtiofsd"];
            let arguments: Vec<_> = compat.iter().chain(arguments).copied().collect();
            config(&arguments).share.file_system.xattr
        };
        assert!(!served(&[]));
        assert!(!served(&["--posix-acl=never", "--security-label=never"]));
        for bringing in [
            "--xattr",
            "--posix-acl",
            "--posix-acl=AUTO",
            "--security-label=auto",
            "--xattrmap=:map::user.guest.:",
        ] {
            assert!(served(&[bringing]), "{bringing}");
        }
        assert!(served(&["--no-xattr", "--posix-acl"]));
        let own = [
            "ringfsd",
            "--fd=3",
            "--shared-dir=/d",
            "--no-xattr",
            "--posix-acl",
        ];
        let refused = Config::try_from(Options::try_parse_from(own).unwrap()).unwrap_err();
        assert!(refused.to_string().contains("--no-xattr"), "{refused}");
    }

    #[test]
    fn set_id_bits_are_left_to_the_guest_where_the_host_cannot_clear_capabilities() {
        let kills = |arguments: &[&str]| config(arguments).share.session.kill_set_id;
        assert!(kills(&["--killpriv-v2"]));
        assert!(!kills(&["--killpriv-v2", "--no-killpriv-v2"]));
        assert!(!kills(&["--killpriv-v2", "--xattrmap=:map::user.guest.:"]));
        assert!(kills(&[
            "--killpriv-v2",
            "--xattrmap=:map:trusted.:user.guest.:"
        ]));
    }

    #[test]
    fn window_needs_files_of_directories() {
        let resolve = |source: &str| {
            let arguments = ["ringfsd", "--fd=3", "--dax-window=8M", source];
            Config::try_from(Options::try_parse_from(arguments).unwrap())
        };
        for source in ["--shared-dir=/d", "--vfs=/a=/d"] {
            let dax = resolve(source).unwrap().share.session.dax.unwrap();
            assert_eq!(
                (dax.window, dax.marked_from, dax.writable),
                (8 << 20, 1 << 20, true)
            );
        }
        for source in ["--overlay=lower=/a:/b", "--vfs=/a=overlay:lower=/a:/b"] {
            let refused = resolve(source).unwrap_err().to_string();
            assert!(refused.starts_with("--dax-window"), "{refused}");
        }
    }

    #[test]
    fn space_is_limited_only_where_a_quota_holds() {
        let resolve = |arguments: &[&str]| {
            let required = ["ringfsd", "--fd=3", "--limit-space=1G"];
            let options = Options::try_parse_from(required.iter().chain(arguments)).unwrap();
            Config::try_from(options).map_err(|error| error.to_string())
        };
        let config = resolve(&["--shared-dir=/d"]).unwrap();
        assert_eq!(config.space.unwrap().bytes.get(), 1 << 30);
        let refused = resolve(&["--vfs=/=/d"]).unwrap_err();
        assert!(refused.contains("--vfs"), "{refused}");
        let refused = resolve(&["--shared-dir=/d", "--modcaps=+sys_resource"]).unwrap_err();
        assert!(refused.contains("sys_resource"), "{refused}");
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
