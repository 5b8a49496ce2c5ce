//! INIT: what the guest offers, what is taken of it, and the reply.
//!
//! Only decides; the session acts on it. The invariant: no flag is agreed on that the guest
//! didn't offer.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use super::abi::{self, InitFlags, InitIn, InitOut};

/// The oldest minor version served: that of Linux 4.18. The first kernel with virtio-fs, 5.4,
/// has 31.
const OLDEST_MINOR: u32 = 27;

/// Bytes that `max_pages` counts in, whatever the guest's own pages are.
const PAGE: u32 = 4096;

/// What is taken of a guest's offer whatever the options say.
///
/// Not so `ATOMIC_O_TRUNC`, by which OPEN truncates. Linux sends OPEN before it has asked whether
/// the file may be truncated: one that is being executed and was opened by `O_RDONLY | O_TRUNC`,
/// or one that Landlock keeps from being truncated, would be empty by the time that `open(2)`
/// fails; and it leaves set-id bits to the server, who can't know what groups the caller is in.
/// Without it the guest's kernel asks, and then truncates by SETATTR.
const ALWAYS: InitFlags = union(&[
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

/// When directory entries come with what a LOOKUP of each would say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Readdirplus {
    /// Never.
    Never,
    /// When the guest's kernel thinks that it will need it.
    #[default]
    Auto,
    /// Always.
    Always,
}

/// Whether the guest shall do something that not every guest can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Wanted {
    /// No.
    #[default]
    No,
    /// If it can.
    IfOffered,
    /// It must, or there is no session.
    Needed,
}

/// What of a session can be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// The longest WRITE and READ the guest may send, bytes; from 4 KiB to 1 MiB, and brought
    /// there if it isn't.
    pub max_write: u32,
    /// When to answer READDIRPLUS.
    pub readdirplus: Readdirplus,
    /// How many requests the guest may have under way in the background (read-ahead,
    /// write-back, direct I/O). Congestion begins at three quarters of it.
    pub max_background: u16,
    /// How long the guest may rely on a name not being there; not at all if zero.
    pub negative_ttl: Duration,
    /// The guest may keep where symbolic links point, as long as their attributes hold.
    pub cache_symlinks: bool,
    /// The guest may mount by itself what is announced as a submount.
    pub submounts: bool,
    /// The server takes set-user-ID bits away where the guest asks for it.
    pub kill_set_id: bool,
    /// New inodes come with a security label.
    pub security_label: bool,
    /// The guest goes by POSIX ACLs.
    pub posix_acl: Wanted,
    /// The guest may collect writes.
    pub writeback: bool,
    /// Files need no OPEN.
    pub no_open: bool,
    /// Directories need no OPENDIR.
    pub no_opendir: bool,
    /// The guest may map files shared that it opened for direct I/O.
    pub direct_io_mmap: bool,
    /// Record locks come here.
    pub posix_locks: bool,
    /// Locks on whole files come here.
    pub flock: bool,
    /// How long a request may wait for a lock; without limit if zero.
    pub lock_wait_limit: Duration,
    /// The guest may mount with mapped owners (idmapped mounts). Only for transports whose guests
    /// mount with `default_permissions`, as Linux' virtio-fs driver always does: a kernel that
    /// doesn't would refuse the session.
    pub idmap: bool,
}

impl SessionOptions {
    /// The longest WRITE there can be, bytes.
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
            security_label: false,
            posix_acl: Wanted::No,
            writeback: false,
            no_open: false,
            no_opendir: false,
            direct_io_mmap: false,
            posix_locks: false,
            flock: false,
            lock_wait_limit: Duration::ZERO,
            idmap: false,
        }
    }
}

/// What guest and server agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Minor version both speak.
    pub minor: u32,
    /// Flags both have.
    pub flags: InitFlags,
    /// Read-ahead of the guest, bytes.
    pub max_readahead: u32,
    /// Longest WRITE, bytes.
    pub max_write: u32,
    /// Most pages of 4 KiB in one request; 0 where the guest doesn't ask.
    pub max_pages: u16,
    /// Most requests in the background.
    pub max_background: u16,
}

impl Negotiated {
    /// As words for [`from_words`](Self::from_words), in whatever process.
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

    /// The reply that says so.
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

/// What an INIT leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreement {
    /// The session begins.
    Agreed(Negotiated),
    /// The guest speaks a newer protocol; it is told ours and will send INIT again.
    NewerMajor,
}

/// Why there is no session with this guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Unserved {
    #[error(
        "the guest speaks FUSE {major}.{minor}; 7.27 (Linux 4.18) is the oldest that is served \
         here"
    )]
    TooOld { major: u32, minor: u32 },
    #[error("the guest has no POSIX ACLs, without which it is not to be served")]
    NoAcl,
}

/// Decides on an INIT.
pub(super) fn negotiate(init: &InitIn, options: &SessionOptions) -> Result<Agreement, Unserved> {
    if init.major > abi::MAJOR {
        return Ok(Agreement::NewerMajor);
    }
    if init.major < abi::MAJOR || init.minor < OLDEST_MINOR {
        return Err(Unserved::TooOld {
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
    let flags = offered & wanted(options);
    if options.posix_acl == Wanted::Needed && !flags.contains(InitFlags::POSIX_ACL) {
        return Err(Unserved::NoAcl);
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

/// The reply to a guest whose protocol is newer: it looks at the version only.
pub(super) fn our_version() -> InitOut {
    InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR,
        ..InitOut::default()
    }
}

/// What can be served with these options to a guest that has agreed on it elsewhere: what would be
/// agreed on, and what is the guest's own affair.
pub(super) fn served(options: &SessionOptions) -> InitFlags {
    let own = union(&[
        InitFlags::DO_READDIRPLUS,
        InitFlags::READDIRPLUS_AUTO,
        InitFlags::CACHE_SYMLINKS,
        InitFlags::SUBMOUNTS,
        InitFlags::DIRECT_IO_ALLOW_MMAP,
    ]);
    wanted(options) | own
}

fn wanted(options: &SessionOptions) -> InitFlags {
    let readdirplus = match options.readdirplus {
        Readdirplus::Never => InitFlags::NONE,
        Readdirplus::Auto => InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO,
        Readdirplus::Always => InitFlags::DO_READDIRPLUS,
    };
    [
        (options.cache_symlinks, InitFlags::CACHE_SYMLINKS),
        (options.submounts, InitFlags::SUBMOUNTS),
        (options.kill_set_id, InitFlags::HANDLE_KILLPRIV_V2),
        (options.security_label, InitFlags::SECURITY_CTX),
        (options.posix_acl != Wanted::No, InitFlags::POSIX_ACL),
        (options.posix_acl != Wanted::No, InitFlags::SETXATTR_EXT),
        (options.writeback, InitFlags::WRITEBACK_CACHE),
        (options.no_open, InitFlags::NO_OPEN_SUPPORT),
        (options.no_opendir, InitFlags::NO_OPENDIR_SUPPORT),
        (options.direct_io_mmap, InitFlags::DIRECT_IO_ALLOW_MMAP),
        (options.posix_locks, InitFlags::POSIX_LOCKS),
        (options.flock, InitFlags::FLOCK_LOCKS),
        (options.idmap, InitFlags::ALLOW_IDMAP),
    ]
    .into_iter()
    .filter(|(wanted, _)| *wanted)
    .fold(ALWAYS | readdirplus, |all, (_, flag)| all | flag)
}

const fn union(flags: &[InitFlags]) -> InitFlags {
    let mut all = InitFlags::NONE;
    let mut rest = flags;
    while let [flag, behind @ ..] = rest {
        all = all.with(*flag);
        rest = behind;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernels with these minor versions offer a virtio-fs server.
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
    fn the_smaller_minor_version_is_spoken() {
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
    fn no_flag_is_taken_that_was_not_offered() {
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
    fn an_old_kernel_gets_what_it_can() {
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
    fn the_second_half_of_the_flags_counts_only_where_the_first_says_so() {
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
    fn what_is_not_served_is_not_taken() {
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
    fn mapped_owners_are_taken_where_the_transport_allows() {
        for (idmap, minor, agreed_on) in [(true, 41, true), (false, 41, false), (true, 31, false)] {
            let options = SessionOptions {
                idmap,
                ..SessionOptions::default()
            };
            let flags = agreed(&offer(minor), &options).flags;
            assert_eq!(flags.contains(InitFlags::ALLOW_IDMAP), agreed_on);
            // A guest that goes by it can be taken over only where it is served.
            assert_eq!(served(&options).contains(InitFlags::ALLOW_IDMAP), idmap);
        }
    }

    #[test]
    fn truncation_is_never_left_to_open() {
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
    fn readdirplus_is_as_the_options_say() {
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
    fn options_out_of_bounds_are_brought_there() {
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
    fn a_newer_major_version_is_told_ours() {
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
    fn a_guest_that_is_too_old_is_told_what_it_needs() {
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
    fn the_log_line_names_what_counts() {
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
