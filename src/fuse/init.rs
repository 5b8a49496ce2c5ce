//! INIT: negotiates the protocol version, the flags and the limits of a session.
//!
//! This module only decides; the session applies the result. The invariant: no flag is negotiated
//! that the guest didn't offer.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use super::abi::{self, InitFlags, InitIn, InitOut};
use crate::dax::{self, DaxOptions};

/// The oldest supported minor version: that of Linux 4.18. The first kernel with virtio-fs, 5.4,
/// has 31.
const OLDEST_MINOR: u32 = 27;

/// The unit of `max_pages` in bytes, whatever the size of the guest's pages.
const PAGE: u32 = 4096;

/// The flags that are accepted from a guest whatever the options say.
///
/// `ATOMIC_O_TRUNC`, which makes OPEN truncate, is not among them. Linux sends OPEN before it has
/// checked whether the file may be truncated: a file that is being executed and is opened with
/// `O_RDONLY | O_TRUNC`, or one that Landlock protects from truncation, would be empty by the time
/// `open(2)` fails. It also leaves set-ID bits to the server, which can't know the caller's groups.
/// Without the flag the guest's kernel checks first, and then truncates by SETATTR.
const ALWAYS_ACCEPTED: InitFlags = union(&[
    InitFlags::ASYNC_READ,
    InitFlags::EXPORT_SUPPORT,
    InitFlags::BIG_WRITES,
    InitFlags::DONT_MASK,
    InitFlags::AUTO_INVAL_DATA,
    InitFlags::ASYNC_DIO,
    InitFlags::PARALLEL_DIROPS,
    InitFlags::MAX_PAGES,
    InitFlags::INIT_EXT,
    InitFlags::CREATE_SUPP_GROUP,
]);

/// When the guest reads directories by READDIRPLUS, which returns each entry with the result of its
/// LOOKUP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Readdirplus {
    /// Never.
    Never,
    /// When the guest's kernel expects to need it.
    #[default]
    Auto,
    /// Always.
    Always,
}

/// Whether a feature is wanted that not every guest supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Wanted {
    /// No.
    #[default]
    No,
    /// If the guest supports it.
    IfOffered,
    /// Required: a guest without support is rejected.
    Needed,
}

/// The options of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Maximum length of WRITE and READ, bytes; clamped to between 4 KiB and 1 MiB.
    pub max_write: u32,
    /// When to use READDIRPLUS.
    pub readdirplus: Readdirplus,
    /// Maximum number of background requests of the guest (read-ahead, write-back, direct I/O).
    /// Congestion begins at three quarters of it.
    pub max_background: u16,
    /// How long the guest may cache that a name doesn't exist; not at all if zero.
    pub negative_ttl: Duration,
    /// The guest may cache the targets of symbolic links as long as their attributes are valid.
    pub cache_symlinks: bool,
    /// The guest may mount directories that are announced as submounts by itself.
    pub submounts: bool,
    /// The server clears set-user-ID bits when the guest asks for it.
    pub kill_set_id: bool,
    /// Requests that create an inode carry a security label.
    pub security_label: Wanted,
    /// The guest enforces POSIX ACLs.
    pub posix_acl: Wanted,
    /// A guest that doesn't enforce POSIX ACLs can neither read nor set them as extended attributes.
    pub hide_acls: bool,
    /// The guest may cache writes.
    pub writeback: bool,
    /// Files can be used without OPEN.
    pub no_open: bool,
    /// Directories can be used without OPENDIR.
    pub no_opendir: bool,
    /// The guest may create shared mappings of files that it opened for direct I/O.
    pub direct_io_mmap: bool,
    /// Record locks are sent to the server.
    pub posix_locks: bool,
    /// Locks on whole files (`flock(2)`) are sent to the server.
    pub flock: bool,
    /// The DAX window, if there is one.
    pub dax: Option<DaxOptions>,
    /// How long a request may wait for a lock; no limit if zero.
    pub lock_wait_limit: Duration,
    /// The guest may use idmapped mounts. Only for transports whose guests mount with
    /// `default_permissions`, as Linux' virtio-fs driver always does: a kernel that doesn't would
    /// reject the session.
    pub idmap: bool,
}

impl SessionOptions {
    /// The largest possible WRITE, bytes.
    pub const MAX_WRITE: u32 = 1024 * 1024;
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            max_write: Self::MAX_WRITE,
            readdirplus: Readdirplus::default(),
            max_background: 128,
            negative_ttl: Duration::ZERO,
            cache_symlinks: false,
            submounts: false,
            kill_set_id: false,
            security_label: Wanted::No,
            posix_acl: Wanted::No,
            hide_acls: false,
            writeback: false,
            no_open: false,
            no_opendir: false,
            direct_io_mmap: false,
            posix_locks: false,
            flock: false,
            dax: None,
            lock_wait_limit: Duration::ZERO,
            idmap: false,
        }
    }
}

/// The negotiated parameters of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Minor version that is used.
    pub minor: u32,
    /// Flags that both support.
    pub flags: InitFlags,
    /// Read-ahead of the guest, bytes.
    pub max_readahead: u32,
    /// Maximum length of a WRITE, bytes.
    pub max_write: u32,
    /// Maximum number of pages of 4 KiB in one request; 0 if the guest doesn't support the limit.
    pub max_pages: u16,
    /// Maximum number of background requests.
    pub max_background: u16,
}

impl Negotiated {
    /// Encodes the parameters for [`from_words`](Self::from_words), which may run in another
    /// process.
    pub(super) fn words(&self) -> [u64; 8] {
        let pages = u64::from(self.max_pages) | u64::from(self.max_background) << 16;
        [
            u64::from(self.minor),
            self.flags.bits(),
            u64::from(self.max_readahead),
            u64::from(self.max_write),
            pages,
            0,
            0,
            0,
        ]
    }

    pub(super) fn from_words(words: [u64; 8]) -> Self {
        let [minor, flags, max_readahead, max_write, pages, ..] = words;
        let narrow = |word: u64| u32::try_from(word).unwrap_or(u32::MAX);
        let half = |word: u64| u16::try_from(word & 0xffff).unwrap_or(u16::MAX);
        Self {
            minor: narrow(minor),
            flags: InitFlags::from_bits(flags),
            max_readahead: narrow(max_readahead),
            max_write: narrow(max_write),
            max_pages: half(pages),
            max_background: half(pages >> 16),
        }
    }

    /// The reply to INIT.
    pub(super) fn reply(&self) -> InitOut {
        let (flags, flags2) = self.flags.halves();
        let quarter = self.max_background / 4;
        InitOut {
            major: abi::MAJOR,
            minor: self.minor,
            max_readahead: self.max_readahead,
            flags,
            max_background: self.max_background,
            congestion_threshold: self.max_background.saturating_sub(quarter),
            max_write: self.max_write,
            time_gran: 1,
            max_pages: self.max_pages,
            map_alignment: map_alignment(self.flags),
            flags2,
            ..InitOut::default()
        }
    }
}

impl fmt::Display for Negotiated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FUSE {}.{}, requests of {} KiB, read-ahead {} KiB, {} in the background, {}",
            abi::MAJOR,
            self.minor,
            self.max_write / 1024,
            self.max_readahead / 1024,
            self.max_background,
            self.flags,
        )
    }
}

/// The outcome of an INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreement {
    /// The session begins.
    Agreed(Negotiated),
    /// The guest uses a newer major version; it gets ours and sends INIT again.
    NewerMajor,
}

/// Why a guest is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum NegotiationError {
    #[error(
        "the guest uses FUSE {major}.{minor}, but the oldest supported version is 7.27 (Linux \
         4.18)"
    )]
    TooOld { major: u32, minor: u32 },
    #[error("the guest doesn't support POSIX ACLs, which the options require")]
    NoPosixAcl,
    #[error("the guest doesn't support security labels, which the options require")]
    NoSecurityLabel,
}

/// Negotiates an INIT.
pub(super) fn negotiate(
    init: &InitIn,
    options: &SessionOptions,
) -> Result<Agreement, NegotiationError> {
    if init.major > abi::MAJOR {
        return Ok(Agreement::NewerMajor);
    }
    if init.major < abi::MAJOR || init.minor < OLDEST_MINOR {
        return Err(NegotiationError::TooOld {
            major: init.major,
            minor: init.minor,
        });
    }
    let offered = InitFlags::from_halves(init.flags, 0);
    let offered = if offered.contains(InitFlags::INIT_EXT) {
        InitFlags::from_halves(init.flags, init.flags2)
    } else {
        offered
    };
    let flags = offered & accepted_by_options(options);
    if options.posix_acl == Wanted::Needed && !flags.contains(InitFlags::POSIX_ACL) {
        return Err(NegotiationError::NoPosixAcl);
    }
    if options.security_label == Wanted::Needed && !flags.contains(InitFlags::SECURITY_CTX) {
        return Err(NegotiationError::NoSecurityLabel);
    }
    let max_write = options.max_write.clamp(PAGE, SessionOptions::MAX_WRITE);
    let max_pages = if flags.contains(InitFlags::MAX_PAGES) {
        u16::try_from(max_write.div_ceil(PAGE)).unwrap_or(u16::MAX)
    } else {
        0
    };
    Ok(Agreement::Agreed(Negotiated {
        minor: init.minor.min(abi::MINOR),
        flags,
        max_readahead: init.max_readahead,
        max_write,
        max_pages,
        max_background: options.max_background.max(1),
    }))
}

/// The alignment of mappings as INIT has it: the exponent of a power of two.
fn map_alignment(flags: InitFlags) -> u16 {
    if flags.contains(InitFlags::MAP_ALIGNMENT) {
        u16::try_from(dax::page_size().trailing_zeros()).unwrap_or_default()
    } else {
        0
    }
}

/// The reply to a guest with a newer major version, which looks only at the version.
pub(super) fn our_version() -> InitOut {
    InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR,
        ..InitOut::default()
    }
}

/// The flags that a session negotiated by another server may have: those that these options would
/// accept, and those that concern only the guest.
pub(super) fn accepted(options: &SessionOptions) -> InitFlags {
    let own = union(&[
        InitFlags::DO_READDIRPLUS,
        InitFlags::READDIRPLUS_AUTO,
        InitFlags::CACHE_SYMLINKS,
        InitFlags::SUBMOUNTS,
        InitFlags::DIRECT_IO_ALLOW_MMAP,
        // No option is needed to serve it.
        InitFlags::HANDLE_KILLPRIV_V2,
    ]);
    accepted_by_options(options) | own
}

fn accepted_by_options(options: &SessionOptions) -> InitFlags {
    let readdirplus = match options.readdirplus {
        Readdirplus::Never => InitFlags::NONE,
        Readdirplus::Auto => InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO,
        Readdirplus::Always => InitFlags::DO_READDIRPLUS,
    };
    [
        (options.cache_symlinks, InitFlags::CACHE_SYMLINKS),
        (options.submounts, InitFlags::SUBMOUNTS),
        (options.kill_set_id, InitFlags::HANDLE_KILLPRIV_V2),
        (
            options.security_label != Wanted::No,
            InitFlags::SECURITY_CTX,
        ),
        (options.posix_acl != Wanted::No, InitFlags::POSIX_ACL),
        (options.posix_acl != Wanted::No, InitFlags::SETXATTR_EXT),
        (options.writeback, InitFlags::WRITEBACK_CACHE),
        (options.no_open, InitFlags::NO_OPEN_SUPPORT),
        (options.no_opendir, InitFlags::NO_OPENDIR_SUPPORT),
        (options.direct_io_mmap, InitFlags::DIRECT_IO_ALLOW_MMAP),
        (options.posix_locks, InitFlags::POSIX_LOCKS),
        (options.flock, InitFlags::FLOCK_LOCKS),
        (options.idmap, InitFlags::ALLOW_IDMAP),
        (options.dax.is_some(), InitFlags::MAP_ALIGNMENT),
        (options.dax.is_some(), InitFlags::HAS_INODE_DAX),
    ]
    .into_iter()
    .filter(|(accepted_by_options, _)| *accepted_by_options)
    .fold(ALWAYS_ACCEPTED | readdirplus, |all, (_, flag)| all | flag)
}

const fn union(flags: &[InitFlags]) -> InitFlags {
    let mut all = InitFlags::NONE;
    let mut rest = flags;
    while let [flag, tail @ ..] = rest {
        all = all.with(*flag);
        rest = tail;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What kernels with these minor versions offer a virtio-fs server.
    fn offer(minor: u32) -> InitIn {
        let until_27 = 0x003f_fffb;
        let (flags, flags2) = match minor {
            27 => (until_27, 0),
            31 => (until_27 | 0x07c0_0000, 0),
            36..=38 => (0x7fff_fffb, 0b0011),
            _ => (0x7fff_fffb, 0b0111_1101_1111),
        };
        InitIn {
            major: 7,
            minor,
            max_readahead: 131_072,
            flags,
            flags2,
            unused: [0; 11],
        }
    }

    fn agreed(init: &InitIn, options: &SessionOptions) -> Negotiated {
        match negotiate(init, options) {
            Ok(Agreement::Agreed(negotiated)) => negotiated,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn smaller_minor_version_is_used() {
        for (theirs, both) in [
            (27, 27),
            (31, 31),
            (36, 36),
            (38, 38),
            (41, 41),
            (45, 45),
            (99, 45),
        ] {
            let negotiated = agreed(&offer(theirs), &SessionOptions::default());
            assert_eq!((negotiated.minor, negotiated.reply().minor), (both, both));
            assert_eq!(negotiated.reply().major, 7);
        }
    }

    #[test]
    fn flag_that_was_not_offered_is_not_accepted() {
        for minor in [27, 31, 36, 37, 38, 41, 45] {
            let init = offer(minor);
            let reply = agreed(&init, &SessionOptions::default()).reply();
            assert_eq!(reply.flags & !init.flags, 0, "{minor}");
            assert_eq!(reply.flags2 & !init.flags2, 0, "{minor}");
        }
        let nothing = InitIn {
            flags: 0,
            ..offer(31)
        };
        let reply = agreed(&nothing, &SessionOptions::default()).reply();
        assert_eq!((reply.flags, reply.flags2, reply.max_pages), (0, 0, 0));
    }

    #[test]
    fn old_kernel_gets_its_flags() {
        let flags = agreed(&offer(27), &SessionOptions::default()).flags;
        assert!(flags.contains(InitFlags::ASYNC_READ | InitFlags::PARALLEL_DIROPS));
        assert!(!flags.contains(InitFlags::MAX_PAGES));
    }

    #[test]
    fn requests_of_a_mebibyte_are_256_pages() {
        for minor in [31, 37, 41] {
            let reply = agreed(&offer(minor), &SessionOptions::default()).reply();
            assert_eq!((reply.max_pages, reply.max_write), (256, 1 << 20));
            assert_eq!(
                (reply.max_background, reply.congestion_threshold),
                (128, 96)
            );
            assert_eq!((reply.max_readahead, reply.time_gran), (131_072, 1));
        }
    }

    #[test]
    fn second_half_of_flags_needs_init_ext() {
        let high = InitIn {
            flags2: u32::MAX,
            ..offer(41)
        };
        let flags = agreed(&high, &SessionOptions::default()).flags;
        assert!(flags.contains(InitFlags::INIT_EXT));
        let (first, _) = InitFlags::INIT_EXT.halves();
        let without = InitIn {
            flags: high.flags & !first,
            ..high
        };
        let reply = agreed(&without, &SessionOptions::default()).reply();
        assert_eq!((reply.flags & first, reply.flags2), (0, 0));
    }

    #[test]
    fn unsupported_flag_is_not_accepted() {
        let everything = InitIn {
            flags: u32::MAX,
            flags2: u32::MAX,
            ..offer(45)
        };
        let flags = agreed(&everything, &SessionOptions::default()).flags;
        for flag in [
            InitFlags::POSIX_LOCKS,
            InitFlags::FLOCK_LOCKS,
            InitFlags::WRITEBACK_CACHE,
            InitFlags::NO_OPEN_SUPPORT,
            InitFlags::HANDLE_KILLPRIV,
            InitFlags::HANDLE_KILLPRIV_V2,
            InitFlags::POSIX_ACL,
            InitFlags::SETXATTR_EXT,
            InitFlags::SECURITY_CTX,
            InitFlags::MAP_ALIGNMENT,
            InitFlags::HAS_RESEND,
            InitFlags::ALLOW_IDMAP,
            InitFlags::PASSTHROUGH,
            InitFlags::OVER_IO_URING,
            InitFlags::REQUEST_TIMEOUT,
        ] {
            assert!(!flags.contains(flag), "{flag}");
        }
    }

    #[test]
    fn idmap_is_accepted_if_enabled() {
        for (idmap, minor, agreed_on) in [(true, 41, true), (false, 41, false), (true, 31, false)] {
            let options = SessionOptions {
                idmap,
                ..SessionOptions::default()
            };
            let flags = agreed(&offer(minor), &options).flags;
            assert_eq!(flags.contains(InitFlags::ALLOW_IDMAP), agreed_on);
            // A guest that uses it can be taken over only where it is supported.
            assert_eq!(accepted(&options).contains(InitFlags::ALLOW_IDMAP), idmap);
        }
    }

    #[test]
    fn dax_is_negotiated_if_there_is_a_window() {
        let flags = InitFlags::MAP_ALIGNMENT | InitFlags::HAS_INODE_DAX;
        let (low, high) = flags.halves();
        let offered = InitIn {
            flags: offer(41).flags | low,
            flags2: offer(41).flags2 | high,
            ..offer(41)
        };
        let nothing = InitIn {
            flags: 0,
            ..offer(31)
        };
        let dax = DaxOptions {
            window: dax::RANGE,
            marked_from: 0,
            names: dax::NamePatterns::default(),
            writable: true,
        };
        for (init, dax, agreed_on) in [
            (&offered, Some(dax.clone()), true),
            (&offered, None, false),
            (&nothing, Some(dax), false),
        ] {
            let has_window = dax.is_some();
            let options = SessionOptions {
                dax,
                ..SessionOptions::default()
            };
            let negotiated = agreed(init, &options);
            assert_eq!(negotiated.flags.contains(flags), agreed_on);
            let alignment = negotiated.reply().map_alignment;
            assert_eq!(1 << alignment == dax::page_size(), agreed_on);
            assert_eq!(accepted(&options).contains(flags), has_window);
        }
    }

    #[test]
    fn atomic_truncation_is_never_accepted() {
        for no_open in [false, true] {
            let options = SessionOptions {
                no_open,
                ..SessionOptions::default()
            };
            let flags = agreed(&offer(41), &options).flags;
            assert_eq!(flags.contains(InitFlags::NO_OPEN_SUPPORT), no_open);
            assert!(!flags.contains(InitFlags::ATOMIC_O_TRUNC));
        }
    }

    #[test]
    fn readdirplus_follows_option() {
        let both = InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO;
        for (readdirplus, expected) in [
            (Readdirplus::Never, InitFlags::NONE),
            (Readdirplus::Auto, both),
            (Readdirplus::Always, InitFlags::DO_READDIRPLUS),
        ] {
            let options = SessionOptions {
                readdirplus,
                ..SessionOptions::default()
            };
            assert_eq!(agreed(&offer(41), &options).flags & both, expected);
        }
    }

    #[test]
    fn options_out_of_range_are_clamped() {
        for (asked, write, pages) in [(0, 4096, 1), (5000, 5000, 2), (u32::MAX, 1 << 20, 256)] {
            let options = SessionOptions {
                max_write: asked,
                max_background: 0,
                ..Default::default()
            };
            let reply = agreed(&offer(41), &options).reply();
            assert_eq!((reply.max_write, reply.max_pages), (write, pages));
            assert_eq!((reply.max_background, reply.congestion_threshold), (1, 1));
        }
    }

    #[test]
    fn newer_major_version_gets_ours() {
        let newer = InitIn {
            major: 8,
            minor: 0,
            ..offer(45)
        };
        assert_eq!(
            negotiate(&newer, &SessionOptions::default()),
            Ok(Agreement::NewerMajor)
        );
        assert_eq!((our_version().major, our_version().minor), (7, 45));
    }

    #[test]
    fn old_guest_error_names_required_version() {
        for (major, minor) in [(7, 26), (7, 0), (6, 45), (0, 0)] {
            let old = InitIn {
                major,
                minor,
                ..offer(27)
            };
            let error = negotiate(&old, &SessionOptions::default()).unwrap_err();
            assert!(error.to_string().contains("Linux 4.18"), "{error}");
        }
    }

    #[test]
    fn log_line_names_parameters() {
        let negotiated = agreed(&offer(31), &SessionOptions::default());
        let line = negotiated.to_string();
        assert!(
            line.starts_with(
                "FUSE 7.31, requests of 1024 KiB, read-ahead 128 KiB, 128 in the background, \
                 ASYNC_READ"
            ),
            "{line}"
        );
        assert!(line.ends_with("MAX_PAGES"), "{line}");
    }
}
