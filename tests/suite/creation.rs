//! Labels and groups that the guest's kernel sends beside the name of a new inode.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::ffi::CStr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use testing::{Server, each_runtime, is_root};
use vmm::fuse::wire::{
    CreateIn, EntryOut, ExtHeader, MkdirIn, MknodIn, OpenOut, Secctx, SecctxHeader, init, opcode,
    request_flag,
};
use vmm::fuse::{Call, Client, FuseError, LINUX_OFFERS, ROOT, Reply};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

type Guest = Client<Session>;

const LABEL: &[u8] = b"system_u:object_r:tmp_t:s0\0";

fn start(runtime: &str, more: &[&str]) -> (Server, Guest) {
    let server = Server::start(&[&["--runtime", runtime], more].concat());
    let guest = Profile::Simple.connect(server.connect(), &Options::default());
    let mut fs = Client::new(guest.unwrap());
    fs.init_offering(LINUX_OFFERS | init::SECURITY_CTX).unwrap();
    (server, fs)
}

/// A label as Linux sends it.
fn label(name: &CStr, value: &[u8]) -> Vec<u8> {
    let body = [
        Secctx {
            size: value.len() as u32,
            padding: 0,
        }
        .as_bytes(),
        name.to_bytes_with_nul(),
        value,
    ]
    .concat();
    let mut bytes = SecctxHeader {
        size: (8 + body.len()).next_multiple_of(8) as u32,
        nr_secctx: 1,
    }
    .as_bytes()
    .to_vec();
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn group(id: u32) -> Vec<u8> {
    let header = ExtHeader {
        size: 16,
        r#type: request_flag::EXT_GROUPS,
    };
    [header.as_bytes(), 1u32.as_bytes(), id.as_bytes()].concat()
}

/// Makes one of each, named by its first letter.
fn make(fs: &mut Guest, what: &str, mode: u32, extension: &[u8]) -> Result<Reply, FuseError> {
    make_in(fs, ROOT, what, mode, extension)
}

fn make_in(
    fs: &mut Guest,
    parent: u64,
    what: &str,
    mode: u32,
    extension: &[u8],
) -> Result<Reply, FuseError> {
    let create = CreateIn {
        flags: libc::O_RDWR.cast_unsigned(),
        mode: libc::S_IFREG | mode,
        ..CreateIn::default()
    };
    let mkdir = MkdirIn { mode, umask: 0 };
    let mknod = MknodIn {
        mode: libc::S_IFIFO | mode,
        ..MknodIn::default()
    };
    let entry = size_of::<EntryOut>() as u32;
    let opened = entry + size_of::<OpenOut>() as u32;
    let call = match what {
        "file" => Call::new(opcode::CREATE, parent)
            .arg(create.as_bytes())
            .name(c"file")
            .reply(opened),
        "nameless" => Call::new(opcode::TMPFILE, parent)
            .arg(create.as_bytes())
            .name(c"/")
            .reply(opened),
        "directory" => Call::new(opcode::MKDIR, parent)
            .arg(mkdir.as_bytes())
            .name(c"directory")
            .reply(entry),
        "pipe" => Call::new(opcode::MKNOD, parent)
            .arg(mknod.as_bytes())
            .name(c"pipe")
            .reply(entry),
        _ => Call::new(opcode::SYMLINK, parent)
            .name(c"link")
            .name(c"file")
            .reply(entry),
    };
    fs.request(call.extension(extension))
}

const KINDS: [&str; 4] = ["file", "directory", "pipe", "link"];

fn on_host(server: &Server, file: &str, name: &str) -> Option<Vec<u8>> {
    let mut value = [0; 256];
    let path = server.share().join(file);
    let len = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    Some(value[..len].to_vec())
}

#[each_runtime]
fn new_inode_gets_its_security_label(runtime: &str) {
    if !is_root() {
        return;
    }
    let args = ["--security-label", "--modcaps=+sys_admin"];
    let (server, mut fs) = start(runtime, &args);
    assert!(fs.has(init::SECURITY_CTX));
    // The host's own SELinux would have a say in it.
    let extension = label(c"security.ringfsd", LABEL);
    for what in KINDS {
        make(&mut fs, what, 0o644, &extension).unwrap();
        let label = on_host(&server, what, "security.ringfsd");
        assert_eq!(label.as_deref(), Some(LABEL), "{what}");
    }
    let made = make(&mut fs, "nameless", 0o600, &extension).unwrap();
    let (entry, _) = made.values::<EntryOut, OpenOut>().unwrap();
    fs.link(entry.nodeid, ROOT, c"named").unwrap();
    let label = on_host(&server, "named", "security.ringfsd");
    assert_eq!(label.as_deref(), Some(LABEL));
    // What is there already keeps its own.
    std::fs::write(server.share().join("there"), "").unwrap();
    std::fs::remove_file(server.share().join("file")).unwrap();
    std::fs::rename(server.share().join("there"), server.share().join("file")).unwrap();
    make(&mut fs, "file", 0o644, &extension).unwrap();
    assert_eq!(on_host(&server, "file", "security.ringfsd"), None);
}

#[each_runtime]
fn selinux_label_on_host_without_selinux_is_set(runtime: &str) {
    if !is_root() || Path::new("/sys/fs/selinux/enforce").exists() {
        println!("SKIPPED: needs root, and a host without SELinux");
        return;
    }
    let (server, mut fs) = start(runtime, &["--security-label"]);
    make(&mut fs, "file", 0o644, &label(c"security.selinux", LABEL)).unwrap();
    let label = on_host(&server, "file", "security.selinux");
    assert_eq!(label.as_deref(), Some(LABEL));
}

#[each_runtime]
fn label_is_stored_under_mapped_attribute_name(runtime: &str) {
    let rules = ":map:security.:user.guest.:";
    let (server, mut fs) = start(runtime, &["--security-label", "--xattrmap", rules]);
    let extension = label(c"security.selinux", LABEL);
    for what in ["file", "directory"] {
        make(&mut fs, what, 0o644, &extension).unwrap();
        let label = on_host(&server, what, "user.guest.security.selinux");
        assert_eq!(label.as_deref(), Some(LABEL), "{what}");
    }
}

#[each_runtime]
fn inode_whose_label_is_refused_is_not_created(runtime: &str) {
    let rules = ":bad:client:security.:: :ok:all:::";
    let (server, mut fs) = start(runtime, &["--security-label", "--xattrmap", rules]);
    let extension = label(c"security.selinux", LABEL);
    for what in KINDS {
        let refused = make(&mut fs, what, 0o644, &extension).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::EPERM), "{what}");
    }
    // Links and pipes have no attributes of users: there it shows after they are made.
    let rules = ":map:security.:user.guest.:";
    let (mapped, mut fs) = start(runtime, &["--security-label", "--xattrmap", rules]);
    for what in ["link", "pipe"] {
        let refused = make(&mut fs, what, 0o644, &extension).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::EPERM), "{what}");
    }
    // So it does where the label is too long for the file system.
    let huge = label(c"security.selinux", &[b'x'; 60_000]);
    for what in ["file", "directory", "nameless"] {
        if let Err(refused) = make(&mut fs, what, 0o644, &huge) {
            let errno = refused.errno().unwrap();
            assert!([libc::ENOSPC, libc::E2BIG].contains(&errno), "{errno}");
        } else {
            println!("SKIPPED in part: this file system takes any attribute");
            let _there = std::fs::remove_file(mapped.share().join(what));
            let _there = std::fs::remove_dir(mapped.share().join(what));
        }
    }
    for server in [server, mapped] {
        let left = std::fs::read_dir(server.share()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[each_runtime]
fn malformed_extension_creates_nothing(runtime: &str) {
    let (server, mut fs) = start(runtime, &["--security-label"]);
    let mut short = label(c"security.selinux", LABEL);
    short[0] = 9;
    for extension in [short, vec![0; 8], label(c"user.x", b"value")] {
        for what in KINDS {
            let refused = make(&mut fs, what, 0o644, &extension).unwrap_err();
            assert_eq!(refused.errno(), Some(libc::EINVAL));
        }
    }
    assert_eq!(std::fs::read_dir(server.share()).unwrap().count(), 0);
}

#[each_runtime]
fn create_by_supplementary_group_member_keeps_set_group_id(runtime: &str) {
    if !is_root() {
        return;
    }
    let (server, mut fs) = start(runtime, &[]);
    // A later kernel looks to it itself, and nothing else does.
    fs.init_offering(LINUX_OFFERS & !init::ALLOW_IDMAP).unwrap();
    assert!(fs.has(init::CREATE_SUPP_GROUP) && !fs.has(init::SECURITY_CTX));
    let dir = server.share().join("dir");
    std::fs::create_dir(&dir).unwrap();
    chown(&dir, Some(0), Some(2000)).unwrap();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o2770)).unwrap();
    let parent = fs.lookup(ROOT, c"dir").unwrap().nodeid;
    fs.act_as(1000, 1000);
    for (extension, mode) in [
        (Vec::new(), 0o755),
        (group(3000), 0o755),
        (group(2000), 0o2755),
    ] {
        make_in(&mut fs, parent, "file", 0o2755, &extension).unwrap();
        let path = dir.join("file");
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!((made.uid(), made.gid()), (1000, 2000));
        assert_eq!(made.mode() & 0o7777, mode);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn labels_are_negotiated_only_with_option() {
    let (server, mut fs) = start("auto", &[]);
    assert!(!fs.has(init::SECURITY_CTX));
    // And then the server ignores them.
    make(&mut fs, "file", 0o644, &label(c"security.ringfsd", LABEL)).unwrap();
    assert_eq!(on_host(&server, "file", "security.ringfsd"), None);
    let refused = testing::output(&[
        "--socket=/nowhere/s",
        "--shared-dir=/",
        "--security-label",
        "--no-xattr",
    ]);
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn generations_differ_between_runs() {
    let generation = || {
        let server = Server::start(&[]);
        std::fs::write(server.share().join("file"), "").unwrap();
        std::fs::create_dir(server.share().join("dir")).unwrap();
        let mut fs = server.session(Profile::Simple, &Options::default());
        let file = fs.lookup(ROOT, c"file").unwrap();
        let dir = fs.lookup(ROOT, c"dir").unwrap();
        assert_eq!(file.generation, dir.generation);
        assert_eq!(
            fs.lookup(file.nodeid, c".").unwrap().generation,
            file.generation
        );
        // Linux has its root, and those of its submounts, with 0.
        let root = fs.lookup(dir.nodeid, c"..").unwrap();
        assert_eq!((root.nodeid, root.generation), (ROOT, 0));
        u32::try_from(file.generation).unwrap()
    };
    let generations: Vec<u32> = (0..4).map(|_| generation()).collect();
    assert!(!generations.contains(&0));
    assert!(generations.iter().any(|one| *one != generations[0]));

    let server = Server::start_sharing(Path::new("/"), &[]);
    let mut fs = server.session(Profile::Simple, &Options::default());
    assert_eq!(fs.lookup(ROOT, c"proc").unwrap().generation, 0);
    assert_ne!(fs.lookup(ROOT, c"usr").unwrap().generation, 0);
}
