//! Options that only some sources support: refused where they would have no effect.
//!
//! The invariant: an option that is accepted for a source does for it what its help says.

use super::Options;
use super::conflict::{Conflict, OptionConflict, refuse_first};
use crate::config::Source;
use crate::fs::passthrough::{Cache, InodeFileHandles, Options as Defaults};

/// An overlay is among what is served.
fn has_overlay(source: &Source) -> bool {
    match source {
        Source::Overlay(_) => true,
        Source::Vfs(mounts) => mounts.iter().any(|(_, source)| has_overlay(source)),
        Source::Directory(_) | Source::Rafs(_) => false,
    }
}

/// A directory of the host is among what is served, alone or as a layer.
fn has_directory(source: &Source) -> bool {
    match source {
        Source::Directory(_) => true,
        Source::Vfs(mounts) => mounts.iter().any(|(_, source)| has_directory(source)),
        Source::Overlay(overlay) => {
            overlay.upper.is_some() || overlay.lower.iter().any(has_directory)
        }
        Source::Rafs(_) => false,
    }
}

/// Refuses options that have no effect on `source`, or on a part of it where that would be wrong.
pub(super) fn check(source: &Source, options: &Options) -> Result<(), OptionConflict> {
    if has_overlay(source) {
        refuse_first(of_overlays(source, options))?;
    }
    if source.has_image() {
        refuse_first(of_images(options))?;
    }
    if !has_directory(source) {
        refuse_first(of_directories(options))?;
    }
    Ok(())
}

/// What no overlay can do.
fn of_overlays(source: &Source, options: &Options) -> [Conflict; 5] {
    let (sharing, caching) = (&options.sharing, &options.caching);
    let to = "an overlay";
    [
        (
            options.extended_attributes.xattrmap.is_some(),
            "--xattrmap",
            to,
            "the attributes that describe layers have fixed names: omit it",
        ),
        (
            sharing.remember_inodes > 0,
            "--remember-inodes",
            to,
            "it forgets an inode when the guest's kernel drops it: omit the option",
        ),
        (
            caching.no_open,
            "--no-open",
            to,
            "only a request to open a file tells that it has to be copied up: omit the option",
        ),
        (
            caching.no_opendir,
            "--no-opendir",
            to,
            "layers are merged when a directory is opened: omit the option",
        ),
        (
            sharing.announce_submounts && matches!(source, Source::Overlay(_)),
            "--announce-submounts",
            to,
            "what is mounted in a layer is shown as part of it: omit the option",
        ),
    ]
}

/// What can't be done for files of an image, and would make them differ from the others.
fn of_images(options: &Options) -> [Conflict; 5] {
    let (sharing, ownership) = (&options.sharing, &options.ownership);
    let to = "an image";
    let owners = "the guest sees the owners that the image has: omit it";
    let locks = "its files are no files of the host, which could be locked: omit it";
    [
        (
            !ownership.translate_uid.is_empty(),
            "--translate-uid",
            to,
            owners,
        ),
        (
            !ownership.translate_gid.is_empty(),
            "--translate-gid",
            to,
            owners,
        ),
        (
            options.extended_attributes.xattrmap.is_some(),
            "--xattrmap",
            to,
            "its attributes have the names that the guest sees: omit it",
        ),
        (sharing.posix_locks, "--posix-locks", to, locks),
        (sharing.flock, "--flock", to, locks),
    ]
}

/// What concerns files and directories of the host.
fn of_directories(options: &Options) -> [Conflict; 9] {
    let (sharing, caching) = (&options.sharing, &options.caching);
    let defaults = Defaults::default();
    let to = "an image alone";
    let unneeded = "its inodes and files need no descriptors and no memory of their own: omit it";
    let unchanging = "it never changes, so the guest may cache all of it: omit the option";
    [
        (
            sharing
                .inode_file_handles
                .is_some_and(|handles| handles != InodeFileHandles::Never),
            "--inode-file-handles",
            to,
            unneeded,
        ),
        (
            sharing.max_inodes.get() != defaults.max_inodes,
            "--max-inodes",
            to,
            unneeded,
        ),
        (sharing.max_handles.is_some(), "--max-handles", to, unneeded),
        (
            sharing.max_open_inodes.is_some(),
            "--max-open-inodes",
            to,
            unneeded,
        ),
        (
            caching.max_spare_files != defaults.max_closed_files,
            "--max-spare-files",
            to,
            unneeded,
        ),
        (
            matches!(caching.cache, Cache::Never | Cache::Metadata),
            "--cache never and metadata",
            to,
            unchanging,
        ),
        (
            caching.attr_timeout.is_some(),
            "--attr-timeout",
            to,
            unchanging,
        ),
        (
            caching.entry_timeout.is_some(),
            "--entry-timeout",
            to,
            unchanging,
        ),
        (
            caching.allow_direct_io,
            "--allow-direct-io",
            to,
            "what is read of it is decompressed into the host's cache: omit the option",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::config::Config;

    /// What an option does for a source.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Does {
        /// What its help says.
        Effect,
        /// Nothing, as what it asks for is so anyway.
        AsItIs,
        /// Nothing, so it is refused.
        Refused,
    }

    use Does::{AsItIs, Effect, Refused};

    /// The options of the headings that concern files, each with other options that it needs, and
    /// what it does for several directories, an overlay of directories, and an image.
    const OPTIONS: &[(&[&str], [Does; 3])] = &[
        // An image is read-only.
        (&["--readonly"], [Effect, Effect, AsItIs]),
        (&["--announce-submounts"], [Effect, Refused, AsItIs]),
        (&["--no-announce-submounts"], [Effect, AsItIs, AsItIs]),
        (&["--inode-file-handles=prefer"], [Effect, Effect, Refused]),
        // Reading an image changes no time.
        (&["--preserve-noatime"], [Effect, Effect, AsItIs]),
        (&["--posix-locks"], [Effect, Effect, Refused]),
        (&["--flock"], [Effect, Effect, Refused]),
        (
            &["--lock-wait-limit=1", "--flock"],
            [Effect, Effect, Refused],
        ),
        (&["--max-inodes=9"], [Effect, Effect, Refused]),
        (&["--max-handles=9"], [Effect, Effect, Refused]),
        (&["--max-open-inodes=9"], [Effect, Effect, Refused]),
        (&["--rlimit-nofile=9999"], [Effect, Effect, Effect]),
        // A file handle of an image's inode is always valid.
        (&["--remember-inodes=9"], [Effect, Refused, AsItIs]),
        (&["--limit-iops=9"], [Effect, Effect, Effect]),
        (&["--limit-bandwidth=9M"], [Effect, Effect, Effect]),
        (&["--limit-space=9G"], [Refused, Refused, Refused]),
        (&["--cache=never"], [Effect, Effect, Refused]),
        (&["--attr-timeout=9"], [Effect, Effect, Refused]),
        (&["--entry-timeout=9"], [Effect, Effect, Refused]),
        (&["--negative-timeout=9"], [Effect, Effect, Effect]),
        (&["--writeback"], [Effect, Effect, AsItIs]),
        (&["--allow-direct-io"], [Effect, Effect, Refused]),
        // Files of an image are always cached, so mapping them is allowed.
        (&["--allow-mmap"], [Effect, Effect, AsItIs]),
        (&["--no-readdirplus"], [Effect, Effect, Effect]),
        (&["--no-open"], [Effect, Refused, Effect]),
        (&["--no-opendir"], [Effect, Refused, Effect]),
        (&["--max-spare-files=9"], [Effect, Effect, Refused]),
        (&["--dax-window=8M"], [Effect, Refused, Refused]),
        (
            &["--dax=always", "--dax-window=8M"],
            [Effect, Refused, Refused],
        ),
        (
            &["--dax-min-size=8M", "--dax-window=8M"],
            [Effect, Refused, Refused],
        ),
        (
            &["--dax-include=*.so", "--dax-window=8M"],
            [Effect, Refused, Refused],
        ),
        (
            &["--dax-exclude=*.so", "--dax-window=8M"],
            [Effect, Refused, Refused],
        ),
        (
            &["--dax-fs-map", "--dax-window=8M"],
            [Effect, Refused, Refused],
        ),
        (&["--translate-uid=map:0:1:1"], [Effect, Effect, Refused]),
        (&["--translate-gid=map:0:1:1"], [Effect, Effect, Refused]),
        (&["--killpriv-v2"], [Effect, Effect, AsItIs]),
        (&["--no-killpriv-v2"], [Effect, Effect, AsItIs]),
        (&["--xattr"], [Effect, Effect, Effect]),
        (&["--no-xattr"], [Effect, Effect, Effect]),
        (
            &["--xattrmap=:map::user.guest.:"],
            [Effect, Refused, Refused],
        ),
        (&["--posix-acl"], [Effect, Effect, Effect]),
        // Nothing is created in an image.
        (&["--security-label"], [Effect, Effect, AsItIs]),
        (
            &["--migration-mode=file-handles"],
            [Refused, Refused, Refused],
        ),
        (
            &["--migration-on-error=guest-error"],
            [Refused, Refused, Refused],
        ),
        (&["--migration-verify-handles"], [Refused, Refused, Refused]),
        (&["--migration-confirm-paths"], [Refused, Refused, Refused]),
        (&["--supervise"], [Refused, Refused, Refused]),
        (&["--state=/s"], [Refused, Refused, Refused]),
    ];

    /// Headings whose options don't depend on what is served, except `--sandbox chroot`.
    const INDEPENDENT: [&str; 3] = ["Connection", "Isolation", "Observability"];

    /// The options that say what is served.
    const SOURCES: [&str; 7] = [
        "shared-dir",
        "vfs",
        "overlay",
        "rafs",
        "blobs",
        "cache-dir",
        "rafs-prefetch",
    ];

    const DIRECTORIES: &[&str] = &["--vfs=/a=/d", "--vfs=/b=/e"];
    const LAYERS: &[&str] = &["--overlay=lower=/a:/b,upper=/u/u,work=/u/w"];
    const IMAGE: &[&str] = &["--rafs=/b", "--blobs=/d"];

    fn resolve(arguments: &[&[&str]]) -> Result<Config, String> {
        let program: &[&str] = &["ringfsd", "--fd=3"];
        let arguments = [program].into_iter().chain(arguments.iter().copied());
        let options = Options::try_parse_from(arguments.flatten()).unwrap();
        Config::try_from(options).map_err(|error| error.to_string())
    }

    fn name_of(argument: &str) -> &str {
        argument.trim_start_matches("--").split('=').next().unwrap()
    }

    #[test]
    fn table_has_every_option_that_concerns_files() {
        let mut command = Options::command();
        command.build();
        let concerned = command.get_arguments().filter(|argument| {
            argument
                .get_help_heading()
                .is_some_and(|heading| !INDEPENDENT.contains(&heading))
        });
        let mut names: Vec<_> = concerned.filter_map(|option| option.get_long()).collect();
        names.retain(|name| !SOURCES.contains(name));
        let mut listed: Vec<_> = OPTIONS.iter().map(|(line, _)| name_of(line[0])).collect();
        names.sort_unstable();
        listed.sort_unstable();
        assert_eq!(names, listed, "say in OPTIONS what it does for each source");
    }

    #[test]
    fn option_without_effect_is_refused_and_no_other() {
        let sources = [DIRECTORIES, LAYERS, IMAGE];
        for (line, does) in OPTIONS {
            for (source, does) in sources.into_iter().zip(does) {
                if source == IMAGE && !cfg!(feature = "nydus") {
                    continue;
                }
                let resolved = resolve(&[line, source]);
                assert_eq!(
                    resolved.is_err(),
                    *does == Refused,
                    "{line:?} {source:?}: {:?}",
                    resolved.err()
                );
                let Err(said) = resolved else { continue };
                let name = name_of(line[line.len() - 1]);
                let migration = name.starts_with("migration-") && said.contains("migration");
                assert!(said.contains(name) || migration, "{line:?}: {said}");
                assert!(said.contains("omit") || said.contains("only"), "{said}");
            }
        }
    }

    #[test]
    fn options_of_overlays_apply_to_one_among_several_file_systems() {
        let mixed: &[&str] = &["--vfs=/a=/d", "--vfs=/b=overlay:lower=/l"];
        for line in ["--remember-inodes=9", "--no-open", "--no-opendir"] {
            assert!(resolve(&[&[line], mixed]).is_err(), "{line}");
        }
        // Where the overlay is mounted is announced.
        assert!(resolve(&[&["--announce-submounts"], mixed]).is_ok());
    }

    #[test]
    #[cfg(feature = "nydus")]
    fn options_of_directories_apply_to_those_beside_an_image() {
        let beside: &[&str] = &["--vfs=/a=/d", "--vfs=/i=rafs:/b,blobs=/d"];
        let below: &[&str] = &["--overlay=lower=/a", "--rafs=/b", "--blobs=/d"];
        for source in [beside, below] {
            for line in ["--max-inodes=9", "--cache=never", "--allow-direct-io"] {
                assert!(resolve(&[&[line], source]).is_ok(), "{line} {source:?}");
            }
            for line in ["--translate-uid=map:0:1:1", "--flock", "--posix-locks"] {
                assert!(resolve(&[&[line], source]).is_err(), "{line} {source:?}");
            }
        }
    }
}
