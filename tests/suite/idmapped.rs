//! Guests that allow mounts with mapped owners (idmapped mounts): Linux 6.12 and later. Their
//! kernel tells the caller's ids only in requests that create an inode.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::ffi::CStr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use testing::{Server, each_runtime, errno, is_root};
use vmm::fuse::wire::{
    CopyFileRangeIn, CreateIn, EntryOut, MkdirIn, MknodIn, OpenOut, Rename2In, SetattrIn, init,
    opcode,
};
use vmm::fuse::{Call, Client, Credentials, FuseError, LINUX_OFFERS, NO_ID, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

type Guest = Client<Session>;

fn start(runtime: &str, more: &[&str]) -> (Server, Guest) {
    let server = Server::start(&[&["--runtime", runtime], more].concat());
    let fs = server.session(Profile::Simple, &Options::default());
    assert!(fs.has(init::ALLOW_IDMAP));
    (server, fs)
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().mode() & 0o7777
}

/// A directory of the share with this group, where everybody may write and whose files inherit the
/// group.
fn inheriting(server: &Server, fs: &mut Guest, group: u32) -> u64 {
    let dir = server.share().join("dir");
    std::fs::create_dir(&dir).unwrap();
    chown(&dir, None, Some(group)).unwrap();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o2777)).unwrap();
    fs.lookup(ROOT, c"dir").unwrap().nodeid
}

/// Makes one of each kind in the names of these ids.
fn make(fs: &mut Guest, what: &str, uid: u32, gid: u32) -> Result<(), FuseError> {
    let create = CreateIn {
        flags: libc::O_RDWR.cast_unsigned(),
        mode: libc::S_IFREG | 0o644,
        ..CreateIn::default()
    };
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    let mknod = MknodIn {
        mode: libc::S_IFIFO | 0o644,
        ..MknodIn::default()
    };
    let rename = Rename2In {
        newdir: ROOT,
        flags: libc::RENAME_WHITEOUT,
        padding: 0,
    };
    let bytes = |size: usize| u32::try_from(size).unwrap();
    let entry = bytes(size_of::<EntryOut>());
    let opened = entry + bytes(size_of::<OpenOut>());
    let call = |opcode| Call::new(opcode, ROOT);
    let call = match what {
        "file" => call(opcode::CREATE)
            .arg(create.as_bytes())
            .name(c"file")
            .reply(opened),
        "nameless" => call(opcode::TMPFILE)
            .arg(create.as_bytes())
            .name(c"/")
            .reply(opened),
        "directory" => call(opcode::MKDIR)
            .arg(mkdir.as_bytes())
            .name(c"directory")
            .reply(entry),
        "pipe" => call(opcode::MKNOD)
            .arg(mknod.as_bytes())
            .name(c"pipe")
            .reply(entry),
        "link" => call(opcode::SYMLINK)
            .name(c"link")
            .name(c"target")
            .reply(entry),
        _ => call(opcode::RENAME2)
            .arg(rename.as_bytes())
            .name(c"whiteout")
            .name(c"moved")
            .reply(0),
    };
    let by = Credentials { uid, gid, pid: 1 };
    fs.request(call.by(by)).map(drop)
}

const KINDS: [&str; 6] = ["file", "nameless", "directory", "pipe", "link", "whiteout"];

#[each_runtime]
fn inode_created_by_mapped_user_belongs_to_that_user(runtime: &str) {
    if !is_root() {
        return;
    }
    let (server, mut fs) = start(runtime, &[]);
    std::fs::write(server.share().join("whiteout"), "").unwrap();
    for what in KINDS {
        match make(&mut fs, what, 1000, 100) {
            Err(error) if what == "whiteout" && error.errno() == Some(libc::EINVAL) => {
                println!("SKIPPED in part: this file system has no whiteouts");
                continue;
            }
            made => made.unwrap(),
        }
        if what != "nameless" {
            assert_eq!(owner(&server.share().join(what)), (1000, 100), "{what}");
        }
    }
}

#[each_runtime]
fn request_without_ids_that_creates_nothing_succeeds(runtime: &str) {
    let (server, mut fs) = start(runtime, &["--posix-locks"]);
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    let node = file.nodeid;
    // The client tells no ids from here on.
    fs.write(node, handle, 0, b"content").unwrap();
    fs.fallocate(node, handle, 0, 0..100).unwrap();
    fs.fsync(node, handle, false).unwrap();
    fs.flush(node, handle).unwrap();
    assert_eq!(fs.truncate(node, 7).unwrap().attr.size, 7);
    assert_eq!(fs.chmod(node, 0o600).unwrap().attr.mode & 0o7777, 0o600);
    assert_eq!(fs.lookup(ROOT, c"file").unwrap().nodeid, node);
    fs.link(node, ROOT, c"second").unwrap();
    fs.rename(ROOT, c"file", ROOT, c"renamed").unwrap();
    fs.unlink(ROOT, c"second").unwrap();
    fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    fs.rmdir(ROOT, c"dir").unwrap();
    let listing = fs.opendir(ROOT).unwrap();
    assert_eq!(fs.readdirplus_all(ROOT, listing).unwrap().len(), 3);
    fs.releasedir(ROOT, listing).unwrap();
    fs.statfs(ROOT).unwrap();
    fs.release(node, handle).unwrap();
    let handle = fs.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(fs.read(node, handle, 0, 100).unwrap(), b"content");
    let content = std::fs::read(server.share().join("renamed")).unwrap();
    assert_eq!(content, b"content");
}

#[each_runtime]
fn create_without_ids_is_eoverflow(runtime: &str) {
    let (server, mut fs) = start(runtime, &[]);
    std::fs::write(server.share().join("whiteout"), "").unwrap();
    let own = owner(&server.share().join("whiteout"));
    for (uid, gid) in [(NO_ID, NO_ID), (NO_ID, own.1), (own.0, NO_ID)] {
        for what in KINDS {
            let refused = make(&mut fs, what, uid, gid);
            assert_eq!(errno(refused), Some(libc::EOVERFLOW), "{what}");
        }
    }
    assert_eq!(std::fs::read_dir(server.share()).unwrap().count(), 1);
    // The worker creates as it should for who comes next.
    make(&mut fs, "directory", own.0, own.1).unwrap();
    assert_eq!(owner(&server.share().join("directory")), own);
}

#[each_runtime]
fn request_without_ids_unnegotiated_is_einval(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    let guest = Profile::Simple.connect(server.connect(), &Options::default());
    let mut fs = Client::new(guest.unwrap());
    fs.init_offering(LINUX_OFFERS & !init::ALLOW_IDMAP).unwrap();
    let mut ask = |uid, gid| {
        let by = Credentials { uid, gid, pid: 1 };
        let call = Call::new(opcode::MKDIR, ROOT).arg(&[0; 8]).name(c"dir");
        let made = errno(fs.request(call.reply_of::<EntryOut>().by(by)));
        let call = Call::new(opcode::STATFS, ROOT).reply(80);
        (made, errno(fs.request(call.by(by))))
    };
    let einval = Some(libc::EINVAL);
    assert_eq!(ask(NO_ID, 0), (einval, einval));
    assert_eq!(ask(0, NO_ID), (einval, einval));
    assert_eq!(std::fs::read_dir(server.share()).unwrap().count(), 0);
}

#[each_runtime]
fn without_ids_only_empty_setattr_clears_set_id_bits(runtime: &str) {
    for (args, left) in [(&["--no-killpriv-v2"][..], 0o6777), (&[], 0o777)] {
        let (server, mut fs) = start(runtime, args);
        let path = server.share().join("file");
        let (file, handle) = fs.create(ROOT, c"file", 0o755).unwrap();
        let node = file.nodeid;
        fs.write(node, handle, 0, b"data").unwrap();
        // This is what Linux sends before it allocates, copies or writes, if the caller may not keep
        // the bits; and only then.
        fs.chmod(node, 0o6777).unwrap();
        fs.setattr(node, &SetattrIn::default()).unwrap();
        assert_eq!(mode(&path), left, "{args:?}");
        fs.chmod(node, 0o6777).unwrap();
        fs.fallocate(node, handle, 0, 0..100).unwrap();
        assert_eq!(mode(&path), 0o6777, "{args:?}");
        let copy = CopyFileRangeIn {
            fh_in: handle.fh,
            nodeid_out: node,
            fh_out: handle.fh,
            off_out: 4,
            len: 4,
            ..CopyFileRangeIn::default()
        };
        assert_eq!(fs.copy_file_range(node, &copy).unwrap(), 4);
        fs.write(node, handle, 0, b"more").unwrap();
        fs.truncate(node, 5).unwrap();
        assert_eq!(mode(&path), 0o6777, "{args:?}");
    }
}

#[each_runtime]
fn ids_of_mapped_guest_imply_no_privilege(runtime: &str) {
    if !is_root() {
        return;
    }
    let (server, mut fs) = start(runtime, &[]);
    let parent = inheriting(&server, &mut fs, 2000);
    let dir = server.share().join("dir");
    // The root of a container, say, that is user 1000 here: its kernel has left the bit there.
    fs.act_as(1000, 1000);
    let (_, handle) = fs.create(parent, c"program", 0o2755).unwrap();
    assert_ne!(handle.fh, u64::MAX);
    assert_eq!(owner(&dir.join("program")), (1000, 2000));
    assert_eq!(mode(&dir.join("program")), 0o2755);
    let (nameless, _) = fs.tmpfile(parent, 0o2755).unwrap();
    assert_eq!(nameless.attr.mode & 0o7777, 0o2755);
    // And user 0 here need not be user 0 there. The name is the host's, and its file is truncated.
    std::fs::write(dir.join("hosts"), "content").unwrap();
    std::fs::set_permissions(dir.join("hosts"), PermissionsExt::from_mode(0o6777)).unwrap();
    fs.act_as(0, 0);
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
    let (entry, _) = fs.create_with(parent, c"hosts", 0o755, flags).unwrap();
    assert_eq!(entry.attr.nlink, 1);
    assert_eq!(std::fs::read(dir.join("hosts")).unwrap(), b"");
    assert_eq!(mode(&dir.join("hosts")), 0o777);
}

#[each_runtime]
fn listxattr_without_ids_lists_trusted_attributes(runtime: &str) {
    let rules = ":map:trusted.:user.guest.:";
    let (server, mut fs) = start(runtime, &["--xattrmap", rules]);
    let (file, _) = fs.create(ROOT, c"file", 0o644).unwrap();
    let path = server.share().join("file");
    if !testing::set_on_host(&path, "user.guest.trusted.x", b"1") {
        println!("SKIPPED: the file system of the tests has no attributes");
        return;
    }
    let names: [&CStr; 1] = [c"trusted.x"];
    assert_eq!(fs.listxattr(file.nodeid).unwrap(), names);
    assert_eq!(fs.listxattr_size(file.nodeid).unwrap(), 10);
}

#[each_runtime]
fn translate_rules_apply_only_to_given_ids(runtime: &str) {
    if !is_root() {
        return;
    }
    let args = [
        "--translate-uid=forbid-guest:0:1000",
        "--translate-uid=map:1000:70000:1000",
        "--translate-gid=squash-guest:0:80000:4294967295",
    ];
    let (server, mut fs) = start(runtime, &args);
    fs.act_as(1005, 5);
    let (file, handle) = fs.create(ROOT, c"file", 0o644).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (1005, 80000));
    assert_eq!(owner(&server.share().join("file")), (70005, 80000));
    fs.write(file.nodeid, handle, 0, b"content").unwrap();
    fs.link(file.nodeid, ROOT, c"second").unwrap();
    for what in ["file", "directory"] {
        let refused = make(&mut fs, what, 0, 0);
        assert_eq!(errno(refused), Some(libc::EPERM));
        let refused = make(&mut fs, what, NO_ID, NO_ID);
        assert_eq!(errno(refused), Some(libc::EOVERFLOW));
    }
}

#[test]
fn idmap_flag_is_accepted_if_offered() {
    let server = Server::start(&[]);
    for offered in [LINUX_OFFERS, LINUX_OFFERS & !init::ALLOW_IDMAP] {
        let guest = Profile::Simple.connect(server.connect(), &Options::default());
        let mut fs = Client::new(guest.unwrap());
        fs.init_offering(offered).unwrap();
        assert_eq!(fs.has(init::ALLOW_IDMAP), offered & init::ALLOW_IDMAP != 0);
    }
}
