//! Tests what the file system of a shared directory supports.
//!
//! What reading doesn't show is tested with files that have no name (`O_TMPFILE`), which vanish when
//! they are closed. The invariant: the directory is the same afterwards.

use std::fs::read_to_string;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, StatxFlags, XattrFlags};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::thread::CapabilitySet;

use super::report::Finding;
use crate::server;

/// The attribute that is read and, on a file without a name, set.
const NAME: &str = "ringfsd.check";

/// Tests the file system of the directory, or file, at `path`.
pub(super) fn test(path: &Path, writes: bool) -> Vec<Finding> {
    let flags = StatxFlags::MNT_ID | StatxFlags::TYPE;
    let stat = match rustix::fs::statx(CWD, path, AtFlags::empty(), flags) {
        Ok(stat) => stat,
        Err(error) => return vec![Finding::no("exists", error.to_string())],
    };
    let mounts = read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = Mount::find(&mounts, stat.stx_mnt_id);
    let mut findings = vec![file_system(mount.as_ref()), access(path, mount.as_ref())];
    let file = match writes {
        true => unnamed(path),
        false => Err(Unnamed::NotAllowed),
    };
    findings.push(unnamed_files(&file));
    let tested = file.as_ref().ok();
    findings.push(nowait(tested));
    findings.push(direct_io(path, tested));
    findings.push(reflink(path, tested));
    findings.push(user_attributes(path, tested));
    findings.push(acls(path));
    findings.push(trusted(path));
    findings.push(labels(path));
    findings.push(quota(path));
    findings
}

/// A mount, as `/proc/self/mountinfo` describes it.
#[derive(Debug, PartialEq, Eq)]
struct Mount<'a> {
    kind: &'a str,
    source: &'a str,
    readonly: bool,
}

impl<'a> Mount<'a> {
    /// The mount with the number `id`.
    fn find(mounts: &'a str, id: u64) -> Option<Self> {
        let id = id.to_string();
        mounts.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ');
            (fields.next()? == id).then_some(())?;
            let is_readonly = |options: &str| options.split(',').any(|option| option == "ro");
            let of_mount = is_readonly(fields.nth(4)?);
            let mut fields = file_system.split(' ');
            let (kind, source) = (fields.next()?, fields.next()?);
            let of_file_system = fields.next().is_some_and(is_readonly);
            Some(Self {
                kind,
                source,
                readonly: of_mount || of_file_system,
            })
        })
    }
}

/// File systems whose files other hosts may change.
const NETWORK: &[&str] = &[
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "coda",
    "gfs2",
    "glusterfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "smb3",
    "smbfs",
    "virtiofs",
];

fn file_system(mount: Option<&Mount<'_>>) -> Finding {
    let name = "file system";
    let Some(Mount { kind, source, .. }) = mount else {
        return Finding::unknown(name, "its mount isn't in /proc/self/mountinfo");
    };
    let detail = format!("{kind} ({source})");
    if NETWORK.contains(kind) {
        return Finding::note(name, format!("{detail}: a network file system")).advising(
            "other hosts' changes are seen when the guest's cache expires: --cache never or metadata \
             sees them sooner; --posix-locks and --flock lock among all hosts; a server of files that \
             maps root to nobody refuses what the guest's root may do; if the other host is away, \
             requests wait for it",
        );
    }
    if *kind == "fuse" || *kind == "fuseblk" || kind.starts_with("fuse.") {
        return Finding::note(
            name,
            format!("{detail}: a program serves it, maybe from a network"),
        )
        .advising(
            "if files change behind its back, --cache never or metadata sees that sooner; the \
                 guest waits as long as that program does; without its option allow_other only the \
                 user who has mounted it can enter, not even root",
        );
    }
    match *kind {
        "tmpfs" | "ramfs" => Finding::note(name, format!("{detail}: in memory"))
            .advising("what the guest writes counts as memory, and is lost when it is unmounted"),
        "overlay" => Finding::note(name, detail).advising(
            "the first write to a file of a lower layer gives it another inode: the guest sees that as \
             a replaced file",
        ),
        _ => Finding::note(name, detail),
    }
}

fn access(path: &Path, mount: Option<&Mount<'_>>) -> Finding {
    let may = |access| rustix::fs::accessat(CWD, path, access, AtFlags::EACCESS);
    let is_dir = path.is_dir();
    let read = if is_dir {
        Access::READ_OK | Access::EXEC_OK
    } else {
        Access::READ_OK
    };
    let readonly = mount.is_some_and(|mount| mount.readonly);
    match (may(read), may(Access::WRITE_OK)) {
        (Ok(()), Ok(())) => Finding::yes("access", "this user can read and write it"),
        (Ok(()), Err(_)) if readonly => Finding::note(
            "access",
            "the mount is read-only: the guest's changes fail with EROFS",
        ),
        (Ok(()), Err(error)) => {
            Finding::note("access", format!("this user can't write it: {error}"))
        }
        (Err(error), _) => Finding::no("access", format!("this user can't read it: {error}")),
    }
}

/// Why there is no file without a name.
enum Unnamed {
    NotAllowed,
    NotADirectory,
    Refused(Errno),
}

fn unnamed(path: &Path) -> Result<OwnedFd, Unnamed> {
    if !path.is_dir() {
        return Err(Unnamed::NotADirectory);
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(Unnamed::Refused)?;
    Ok(file)
}

fn unnamed_files(file: &Result<OwnedFd, Unnamed>) -> Finding {
    let name = "O_TMPFILE";
    match file {
        Ok(_) => Finding::yes(name, "files without a name can be created"),
        Err(Unnamed::NotAllowed) => Finding::unknown(name, "not tested (--no-write)"),
        Err(Unnamed::NotADirectory) => Finding::unknown(name, "not tested: it isn't a directory"),
        Err(Unnamed::Refused(Errno::OPNOTSUPP | Errno::ISDIR)) => Finding::no(
            name,
            "the file system doesn't support it, and the guest gets EOPNOTSUPP",
        ),
        Err(Unnamed::Refused(error)) => Finding::unknown(name, format!("not tested: {error}")),
    }
}

/// A finding for what only a file without a name shows.
fn untested(name: &'static str) -> Finding {
    Finding::unknown(
        name,
        "not tested, as there is no file without a name to test it with",
    )
}

fn nowait(file: Option<&OwnedFd>) -> Finding {
    let name = "RWF_NOWAIT";
    let Some(file) = file else {
        return untested(name);
    };
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    match rustix::io::preadv2(file, &mut buffers, 0, ReadWriteFlags::NOWAIT) {
        Ok(_) | Err(Errno::AGAIN) => Finding::yes(name, "cached data are read without a thread"),
        Err(error) => Finding::no(name, format!("the file system doesn't support it: {error}"))
            .advising("reads go through the ring or a thread, except on tmpfs, which never waits"),
    }
}

fn direct_io(path: &Path, file: Option<&OwnedFd>) -> Finding {
    let name = "O_DIRECT";
    let stat = match file {
        Some(file) => rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN),
        None if path.is_file() => {
            rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::DIOALIGN)
        }
        None => return untested(name),
    };
    let known = stat
        .ok()
        .filter(|stat| StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN));
    if let Some(stat) = known {
        let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        if memory == 0 || offset == 0 {
            return Finding::no(name, "the file system doesn't support it for this file");
        }
        let aligned = format!("memory aligned to {memory} bytes, offsets and lengths to {offset}");
        return Finding::yes(name, aligned)
            .advising("--allow-direct-io passes the guest's O_DIRECT on");
    }
    let Some(file) = file else {
        return Finding::unknown(name, "neither kernel nor file system tells the alignment");
    };
    let flags = rustix::fs::fcntl_getfl(file).unwrap_or(OFlags::empty());
    match rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT) {
        Ok(()) => {
            // The other tests use the same file.
            let _ = rustix::fs::fcntl_setfl(file, flags);
            Finding::yes(
                name,
                "supported; neither kernel nor file system tells the alignment",
            )
            .advising("--allow-direct-io passes the guest's O_DIRECT on")
        }
        Err(error) => Finding::no(name, format!("the file system doesn't support it: {error}"))
            .advising("with --allow-direct-io the guest's O_DIRECT fails with EINVAL"),
    }
}

fn reflink(path: &Path, file: Option<&OwnedFd>) -> Finding {
    let name = "reflink";
    let Some(file) = file else {
        return untested(name);
    };
    let cloned = || {
        // A block: file systems that store small files elsewhere clone none of them.
        rustix::io::pwrite(file, &[1; 4096], 0)?;
        let Ok(copy) = unnamed(path) else {
            return Err(Errno::OPNOTSUPP);
        };
        rustix::fs::ioctl_ficlone(&copy, file)
    };
    match cloned() {
        Ok(()) => Finding::yes(
            name,
            "the guest's copy_file_range shares the data with the original",
        ),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::XDEV | Errno::NOSYS) => {
            Finding::no(
                name,
                "the guest's copy_file_range copies the data, on the host",
            )
        }
        Err(error) => Finding::unknown(name, error.to_string()),
    }
}

/// Reads an attribute that no file has: whether the file system has attributes of that kind.
fn read_attribute(path: &Path, name: &str) -> Result<bool, Errno> {
    let mut value = [0; 4096];
    match rustix::fs::getxattr(path, name, &mut value) {
        Ok(_) | Err(Errno::NODATA | Errno::RANGE) => Ok(true),
        Err(Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}

fn user_attributes(path: &Path, file: Option<&OwnedFd>) -> Finding {
    let name = "user.* attributes";
    let attribute = format!("user.{NAME}");
    let set = file.map(|file| rustix::fs::fsetxattr(file, &attribute, b"1", XattrFlags::empty()));
    let found = match (set, read_attribute(path, &attribute)) {
        (Some(Ok(())), _) => return Finding::yes(name, "can be set"),
        (Some(Err(Errno::OPNOTSUPP)), _) => Ok(false),
        (_, found) => found,
    };
    match found {
        Ok(true) => Finding::yes(name, "supported"),
        Ok(false) => Finding::no(name, "the file system doesn't support them").advising(
            "the guest gets EOPNOTSUPP; --no-xattr saves its requests; --xattrmap can't store other \
             attributes as user.*",
        ),
        Err(error) => Finding::unknown(name, error.to_string()),
    }
}

fn acls(path: &Path) -> Finding {
    match read_attribute(path, "system.posix_acl_access") {
        Ok(true) => Finding::yes("POSIX ACLs", "supported")
            .advising("--posix-acl lets the guest's kernel use them"),
        Ok(false) => Finding::no(
            "POSIX ACLs",
            "the file system, or its mount, doesn't support them",
        )
        .advising("--posix-acl has no use"),
        Err(error) => Finding::unknown("POSIX ACLs", error.to_string()),
    }
}

/// Whether this process has a capability on the host, not only in a user namespace.
fn has_on_host(capability: CapabilitySet) -> bool {
    let own = read_to_string("/proc/self/uid_map").unwrap_or_default();
    let is_host = own.split_whitespace().eq(["0", "0", "4294967295"]);
    is_host
        && rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

fn trusted(path: &Path) -> Finding {
    let name = "trusted.* attributes";
    match read_attribute(path, &format!("trusted.{NAME}")) {
        Ok(false) => Finding::no(name, "the file system doesn't support them"),
        Ok(true) if has_on_host(CapabilitySet::SYS_ADMIN) => {
            Finding::yes(name, "supported, and this user may use them")
                .advising("the server drops that privilege unless it has --modcaps=+sys_admin")
        }
        // The kernel says that there are none.
        Ok(true) => Finding::no(
            name,
            "need CAP_SYS_ADMIN on the host, which this process lacks",
        )
        .advising("--xattrmap stores the guest's under another name; --overlay needs xattr=user"),
        Err(error) => Finding::unknown(name, error.to_string()),
    }
}

fn labels(path: &Path) -> Finding {
    let name = "security.* attributes";
    match read_attribute(path, "security.ringfsd") {
        Ok(false) => Finding::no(name, "the file system doesn't support them"),
        Ok(true) if has_on_host(CapabilitySet::SYS_ADMIN) => {
            Finding::yes(name, "supported, and this user may set them")
                .advising("--security-label needs --modcaps=+sys_admin")
        }
        Ok(true) => Finding::note(
            name,
            "supported; setting them needs CAP_SYS_ADMIN on the host",
        )
        .advising("--security-label needs --xattrmap=:map:security.:user.guest.:"),
        Err(error) => Finding::unknown(name, error.to_string()),
    }
}

/// Whether the space that the directory takes can be limited.
fn quota(path: &Path) -> Finding {
    match server::check_space(path) {
        Ok(()) => Finding::yes("project quota", "can be set for it")
            .advising("--limit-space limits what the guest may store"),
        Err(error) => Finding::no("project quota", crate::error_chain::one_line(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_is_found_by_its_number() {
        let mounts = "21 1 0:20 / /a rw,nosuid shared:1 - nfs4 host:/x rw,vers=4.2\n\
                      22 1 0:21 / /b ro - ext4 /dev/a rw\n23 1 0:22 / /c rw - iso9660 /dev/b ro\n";
        let found = |id| Mount::find(mounts, id);
        assert_eq!(
            found(21),
            Some(Mount {
                kind: "nfs4",
                source: "host:/x",
                readonly: false
            })
        );
        assert!(found(22).unwrap().readonly && found(23).unwrap().readonly);
        assert_eq!(found(2), None);
    }

    #[test]
    fn network_file_systems_have_advice() {
        let kind = |kind| {
            file_system(Some(&Mount {
                kind,
                source: "s",
                readonly: false,
            }))
        };
        assert!(kind("nfs4").detail.contains("network file system"));
        assert!(kind("fuse.sshfs").detail.contains("maybe from a network"));
        assert!(kind("tmpfs").detail.contains("in memory"));
        assert_eq!(kind("ext4").advice, None);
    }
}
