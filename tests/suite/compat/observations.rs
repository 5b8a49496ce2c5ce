//! What a guest sees of a server: the same sequence of requests for every server, and each result as
//! text. The invariant: nothing that differs from run to run is recorded, such as inode numbers,
//! handles and times.

mod data;
mod metadata;

use std::ffi::CStr;
use std::path::Path;

use vmm::Session;
use vmm::fuse::wire::{Attr, AttrOut, EntryOut, InitOut, init};
use vmm::fuse::{Client, FuseError, LINUX_OFFERS, ROOT};

/// An ordinary user of the guest, to whom some files belong.
const USER: u32 = 1000;

/// A request, and what came of it.
pub(super) type Observation = (String, String);

/// Names of the flags of INIT.
const INIT_FLAGS: &[(&str, u64)] = &[
    ("ASYNC_READ", init::ASYNC_READ),
    ("POSIX_LOCKS", init::POSIX_LOCKS),
    ("ATOMIC_O_TRUNC", init::ATOMIC_O_TRUNC),
    ("EXPORT_SUPPORT", init::EXPORT_SUPPORT),
    ("BIG_WRITES", init::BIG_WRITES),
    ("DONT_MASK", init::DONT_MASK),
    ("SPLICE_WRITE", init::SPLICE_WRITE),
    ("SPLICE_MOVE", init::SPLICE_MOVE),
    ("SPLICE_READ", init::SPLICE_READ),
    ("FLOCK_LOCKS", init::FLOCK_LOCKS),
    ("HAS_IOCTL_DIR", init::HAS_IOCTL_DIR),
    ("AUTO_INVAL_DATA", init::AUTO_INVAL_DATA),
    ("DO_READDIRPLUS", init::DO_READDIRPLUS),
    ("READDIRPLUS_AUTO", init::READDIRPLUS_AUTO),
    ("ASYNC_DIO", init::ASYNC_DIO),
    ("WRITEBACK_CACHE", init::WRITEBACK_CACHE),
    ("NO_OPEN_SUPPORT", init::NO_OPEN_SUPPORT),
    ("PARALLEL_DIROPS", init::PARALLEL_DIROPS),
    ("HANDLE_KILLPRIV", init::HANDLE_KILLPRIV),
    ("POSIX_ACL", init::POSIX_ACL),
    ("ABORT_ERROR", init::ABORT_ERROR),
    ("MAX_PAGES", init::MAX_PAGES),
    ("CACHE_SYMLINKS", init::CACHE_SYMLINKS),
    ("NO_OPENDIR_SUPPORT", init::NO_OPENDIR_SUPPORT),
    ("EXPLICIT_INVAL_DATA", init::EXPLICIT_INVAL_DATA),
    ("MAP_ALIGNMENT", init::MAP_ALIGNMENT),
    ("SUBMOUNTS", init::SUBMOUNTS),
    ("HANDLE_KILLPRIV_V2", init::HANDLE_KILLPRIV_V2),
    ("SETXATTR_EXT", init::SETXATTR_EXT),
    ("INIT_EXT", init::INIT_EXT),
    ("SECURITY_CTX", init::SECURITY_CTX),
    ("HAS_INODE_DAX", init::HAS_INODE_DAX),
    ("CREATE_SUPP_GROUP", init::CREATE_SUPP_GROUP),
    ("HAS_EXPIRE_ONLY", init::HAS_EXPIRE_ONLY),
    ("DIRECT_IO_ALLOW_MMAP", init::DIRECT_IO_ALLOW_MMAP),
    ("PASSTHROUGH", init::PASSTHROUGH),
    ("NO_EXPORT_SUPPORT", init::NO_EXPORT_SUPPORT),
    ("HAS_RESEND", init::HAS_RESEND),
    ("ALLOW_IDMAP", init::ALLOW_IDMAP),
    ("REQUEST_TIMEOUT", init::REQUEST_TIMEOUT),
];

/// Makes the files that the requests need.
pub(super) fn populate(share: &Path) {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};
    let mode = |name: &str, mode| {
        std::fs::set_permissions(share.join(name), PermissionsExt::from_mode(mode)).unwrap();
    };
    for (name, content) in [("file", "hello"), ("program", "#!"), ("of-user", "mine")] {
        std::fs::write(share.join(name), content).unwrap();
        mode(name, 0o644);
    }
    for name in ["full", "open", "setgid"] {
        std::fs::create_dir(share.join(name)).unwrap();
        mode(name, 0o777);
    }
    std::fs::write(share.join("full/entry"), "").unwrap();
    mode("full/entry", 0o644);
    chown(share.join("setgid"), None, Some(USER)).unwrap();
    mode("setgid", 0o2777);
    chown(share.join("of-user"), Some(USER), Some(USER)).unwrap();
    mode("program", 0o6755);
    mode("", 0o755);
    symlink("file", share.join("link")).unwrap();
    let sparse = std::fs::File::create(share.join("sparse")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[1; 4096], 1 << 19).unwrap();
    mode("sparse", 0o666);
    let set = |name: &str| testing::set_on_host(&share.join("file"), name, b"1");
    // virtiofsd is measured on the same file system, so it is no matter if this one has none.
    let _ = (set("user.x"), set("trusted.x"), set("user.virtiofs.user.y"));
}

/// Makes the requests, and returns what came of each.
pub(super) struct Observer {
    pub(super) fs: Client<Session>,
    root: u64,
    seen: Vec<Observation>,
}

impl Observer {
    pub(super) fn new(session: Session) -> Self {
        Self {
            fs: Client::new(session),
            root: ROOT,
            seen: Vec::new(),
        }
    }

    /// All there is to see, of a share at this path below the server's root.
    pub(super) fn observe(&mut self, path: &Path) -> Vec<Observation> {
        self.init("old guest: ", init::INIT_EXT);
        self.init("guest with labels: ", LINUX_OFFERS | init::SECURITY_CTX);
        self.init("", LINUX_OFFERS);
        if self.seen.last().is_some_and(|(what, _)| what == "INIT") {
            // It is refused.
            return std::mem::take(&mut self.seen);
        }
        for name in path.components().skip(1) {
            let name = std::ffi::CString::new(name.as_os_str().as_encoded_bytes()).unwrap();
            self.root = self.fs.lookup(self.root, &name).unwrap().nodeid;
        }
        self.names();
        self.data();
        self.xattrs();
        self.created();
        self.attributes();
        self.directories();
        self.others();
        std::mem::take(&mut self.seen)
    }

    fn see<T>(&mut self, what: &str, result: Result<T, FuseError>, show: impl Fn(T) -> String) {
        let text = match result {
            Ok(value) => show(value),
            Err(FuseError::Refused { errno, .. }) => errno_name(errno.0),
            Err(error) => format!("broken: {error}"),
        };
        self.seen.push((what.to_owned(), text));
    }

    /// An entry's attributes, and how long they and the name are valid.
    fn see_entry(&mut self, what: &str, result: Result<EntryOut, FuseError>) {
        let times = result.as_ref().ok().map(|entry| {
            let valid = (entry.entry_valid, entry.entry_valid_nsec);
            let attr_valid = (entry.attr_valid, entry.attr_valid_nsec);
            format!("name {valid:?} attributes {attr_valid:?}")
        });
        self.see(what, result, |entry| attr(&entry.attr));
        self.see_times(what, times);
    }

    /// As [`see_entry`](Self::see_entry), of attributes without a name.
    fn see_attr(&mut self, what: &str, result: Result<AttrOut, FuseError>) {
        let times = result.as_ref().ok().map(|out| {
            let valid = (out.attr_valid, out.attr_valid_nsec);
            format!("attributes {valid:?}")
        });
        self.see(what, result, |out| attr(&out.attr));
        self.see_times(what, times);
    }

    fn see_times(&mut self, what: &str, times: Option<String>) {
        let times = times.unwrap_or_else(|| "none".to_owned());
        self.seen.push((format!("{what}: time-outs"), times));
    }

    /// Whether it succeeded.
    fn done<T>(&mut self, what: &str, result: Result<T, FuseError>) {
        self.see(what, result, |_| "done".to_owned());
    }

    fn init(&mut self, guest: &str, offered: u64) {
        let answer = match self.fs.init_offering(offered) {
            Ok(answer) => answer,
            Err(error) => return self.done::<()>(&format!("{guest}INIT"), Err(error)),
        };
        let flags = u64::from(answer.flags) | u64::from(answer.flags2) << 32;
        for (name, bit) in INIT_FLAGS {
            let text = if flags & bit == 0 { "off" } else { "on" };
            self.seen.push((format!("{guest}INIT {name}"), text.into()));
        }
        let InitOut {
            minor,
            max_readahead,
            max_background,
            congestion_threshold,
            max_write,
            time_gran,
            max_pages,
            map_alignment,
            max_stack_depth,
            request_timeout,
            ..
        } = answer;
        for (name, value) in [
            ("minor", minor),
            ("max_readahead", max_readahead),
            ("max_background", max_background.into()),
            ("congestion_threshold", congestion_threshold.into()),
            ("max_write", max_write),
            ("time_gran", time_gran),
            ("max_pages", max_pages.into()),
            ("map_alignment", map_alignment.into()),
            ("max_stack_depth", max_stack_depth),
            ("request_timeout", request_timeout.into()),
        ] {
            let what = format!("{guest}INIT {name}");
            self.seen.push((what, value.to_string()));
        }
        if !guest.is_empty() {
            let destroyed = self.fs.destroy();
            self.done(&format!("{guest}DESTROY"), destroyed);
        }
    }

    fn lookup(&mut self, name: &CStr) -> u64 {
        self.fs.lookup(self.root, name).unwrap().nodeid
    }

    fn names(&mut self) {
        let root = self.root;
        for name in [c"file", c"link", c"program", c"setgid", c"of-user"] {
            let entry = self.fs.lookup(root, name);
            self.see_entry(&format!("LOOKUP {name:?}"), entry);
        }
        let long = std::ffi::CString::new(vec![b'n'; 256]).unwrap();
        for (what, name) in [
            ("of what is missing", c"missing"),
            ("of a path", c"full/entry"),
            ("of a long name", &long),
        ] {
            let entry = self.fs.lookup(root, name);
            self.see_entry(&format!("LOOKUP {what}"), entry);
        }
        if root == ROOT {
            let entry = self.fs.lookup(root, c"..");
            self.see_entry("LOOKUP of ..", entry);
        }
        let file = self.lookup(c"file");
        let below = self.fs.lookup(file, c"x");
        self.see_entry("LOOKUP in a file", below);
        let attributes = self.fs.getattr(file);
        self.see_attr("GETATTR", attributes);
        let unknown = self.fs.getattr(1 << 40);
        self.see_attr("GETATTR of no inode", unknown);
        let link = self.lookup(c"link");
        let target = self.fs.readlink(link);
        self.see("READLINK", target, |target| format!("{target:?}"));
        let target = self.fs.readlink(file);
        self.see("READLINK of a file", target, |target| format!("{target:?}"));
    }
}

/// An error number by its name, as far as it has a common one.
fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EBADF => "EBADF",
        libc::EACCES => "EACCES",
        libc::EEXIST => "EEXIST",
        libc::ENODEV => "ENODEV",
        libc::ENOTDIR => "ENOTDIR",
        libc::EISDIR => "EISDIR",
        libc::EINVAL => "EINVAL",
        libc::ENOTTY => "ENOTTY",
        libc::EROFS => "EROFS",
        libc::ENXIO => "ENXIO",
        libc::ERANGE => "ERANGE",
        libc::ENAMETOOLONG => "ENAMETOOLONG",
        libc::ENOSYS => "ENOSYS",
        libc::ENOTEMPTY => "ENOTEMPTY",
        libc::ELOOP => "ELOOP",
        libc::ENODATA => "ENODATA",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ESTALE => "ESTALE",
        libc::E2BIG => "E2BIG",
        _ => return format!("errno {errno}"),
    };
    name.to_owned()
}

fn attr(attr: &Attr) -> String {
    let Attr {
        mode,
        nlink,
        uid,
        gid,
        size,
        rdev,
        flags,
        ..
    } = attr;
    format!("{mode:o} {uid}:{gid} nlink {nlink} size {size} rdev {rdev} flags {flags}")
}
