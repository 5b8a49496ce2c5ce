//! The owner of new files, and that ids left on a thread don't remove any right.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Command;

use rustix::thread::{CapabilitySet, CapabilitySets};

use super::*;
use crate::sys::credentials::{fs_gid, fs_uid};

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// Drops capabilities of the calling thread for good.
fn drop_capabilities(which: CapabilitySet) {
    let sets = rustix::thread::capabilities(None).unwrap();
    let left = CapabilitySets {
        effective: sets.effective - which,
        permitted: sets.permitted - which,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, left).unwrap();
}

fn make_one_of_each(rig: &Rig, caller: &Caller) {
    let fs = &rig.fs;
    rig.create(caller, "file", O_RDWR, 0o644).unwrap();
    fs.mkdir(caller, ROOT, c"dir", &new(0o755)).unwrap();
    fs.symlink(caller, ROOT, c"link", c"target", None).unwrap();
    let fifo = new(libc::S_IFIFO | 0o644);
    fs.mknod(caller, ROOT, c"fifo", &fifo).unwrap();
}

const ONE_OF_EACH: [&str; 4] = ["file", "dir", "link", "fifo"];

#[test]
fn created_files_belong_to_caller() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        make_one_of_each(rig, &user(1000));
        for name in ONE_OF_EACH {
            assert_eq!(owner(&rig.path(name)), (1000, 1000), "{name}");
            assert_eq!(rig.find(ROOT, name).unwrap().attributes.uid, 1000);
        }
        rig.create(&SUPERUSER, "root's", O_RDWR, 0o644).unwrap();
        rig.create(&user(1001), "other's", O_RDWR, 0o644).unwrap();
        assert_eq!(owner(&rig.path("root's")), (0, 0));
        assert_eq!(owner(&rig.path("other's")), (1001, 1001));
    });
}

#[test]
fn creation_by_user_leaves_rights_of_server() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        // Owned by root and closed to everybody else.
        let private = rig.host_dir("private");
        std::fs::write(private.join("file"), "old").unwrap();
        set_mode(&private.join("file"), 0o400);
        set_mode(&private, 0o700);
        // A file in a sticky directory, owned by two other users.
        let sticky = rig.host_dir("sticky");
        std::fs::write(sticky.join("file"), "").unwrap();
        chown(sticky.join("file"), Some(2), Some(2)).unwrap();
        chown(&sticky, Some(3), Some(3)).unwrap();
        set_mode(&sticky, 0o1777);

        rig.create(&user(1000), "file", O_RDWR, 0o600).unwrap();
        assert_eq!((fs_uid().unwrap(), fs_gid().unwrap()), (1000, 1000));

        let fs = &rig.fs;
        let private = rig.node("private");
        let file = rig.find(private, "file").unwrap().node;
        let opened = fs.open(&SUPERUSER, file, O_RDWR | O_TRUNC).unwrap();
        fs.release(file, opened.handle).unwrap();
        fs.opendir(&SUPERUSER, private, 0).unwrap();
        let mode = Changes {
            mode: Some(0o4711),
            uid: Some(7),
            gid: Some(8),
            size: Some(10),
            accessed: Some(crate::fs::NewTime::Now),
            modified: Some(crate::fs::NewTime::At(crate::fs::Timestamp::default())),
        };
        let changed = rig.change(file, None, mode).unwrap();
        assert_eq!((changed.uid, changed.gid, changed.size), (7, 8, 10));
        assert_eq!(changed.mode & 0o7777, 0o4711);
        let flags = rustix::fs::XattrFlags::empty();
        fs.setxattr(&SUPERUSER, file, c"trusted.x", b"value", flags)
            .unwrap();
        let value = fs.getxattr(&SUPERUSER, file, c"trusted.x", 100).unwrap();
        assert_eq!(value, b"value");
        let sticky = rig.node("sticky");
        fs.unlink(&SUPERUSER, sticky, c"file").unwrap();
        fs.link(&SUPERUSER, file, private, c"second").unwrap();
        let (from, to) = ((private, c"second"), (sticky, c"third"));
        fs.rename(&SUPERUSER, from, to, 0).unwrap();
        let device = NewNode {
            mode: libc::S_IFCHR | 0o600,
            umask: 0,
            rdev: 0x103,
            label: None,
        };
        match fs.mknod(&user(1000), ROOT, c"null", &device) {
            Ok(entry) => assert_eq!(entry.attributes.rdev, 0x103),
            Err(error) => println!("SKIPPED in part: device nodes: {error}"),
        }
        assert_eq!(fs_uid().unwrap(), 1000);
    });
}

#[test]
fn create_in_directory_writable_by_supplementary_group_succeeds() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        let shared = rig.host_dir("shared");
        chown(&shared, Some(0), Some(2000)).unwrap();
        set_mode(&shared, 0o770);
        let parent = rig.node("shared");
        let fs = &rig.fs;
        // Only the guest's kernel knows that the caller is in group 2000.
        fs.create(&user(1000), parent, c"file", O_RDWR, &new(0o644))
            .unwrap();
        fs.mkdir(&user(1000), parent, c"dir", &new(0o755)).unwrap();
        assert_eq!(owner(&shared.join("file")), (1000, 1000));
        assert_eq!(owner(&shared.join("dir")), (1000, 1000));
    });
}

#[test]
fn umask_applies_to_created_files() {
    in_each_mode(|rig| {
        for (umask, left) in [(0o022, 0o755), (0o077, 0o700), (0, 0o777), (0o027, 0o750)] {
            let new = NewNode {
                mode: 0o777,
                umask,
                rdev: 0,
                label: None,
            };
            let name = format!("{umask:o}");
            rig.fs
                .create(&SUPERUSER, ROOT, &c(&name), O_RDWR, &new)
                .unwrap();
            assert_eq!(mode(&rig.path(&name)), left);
            let name = format!("{umask:o}.dir");
            let made = rig.fs.mkdir(&SUPERUSER, ROOT, &c(&name), &new).unwrap();
            assert_eq!(made.attributes.mode & 0o7777, left);
        }
    });
}

#[test]
fn default_acl_replaces_umask() {
    in_each_mode(|rig| {
        let dir = rig.host_dir("dir");
        let acl = "d:u::rwx,d:g::rwx,d:o::r-x";
        let set = Command::new("setfacl").args(["-m", acl]).arg(&dir).status();
        if !set.is_ok_and(|status| status.success()) {
            println!("SKIPPED: needs setfacl and a file system with ACLs");
            return;
        }
        let new = NewNode {
            mode: 0o666,
            umask: 0o077,
            rdev: 0,
            label: None,
        };
        let parent = rig.node("dir");
        rig.fs
            .create(&SUPERUSER, parent, c"file", O_RDWR, &new)
            .unwrap();
        assert_eq!(mode(&dir.join("file")), 0o664);
        rig.fs
            .create(&SUPERUSER, ROOT, c"file", O_RDWR, &new)
            .unwrap();
        assert_eq!(mode(&rig.path("file")), 0o600);
    });
}

#[test]
fn create_in_set_group_id_directory_inherits_group_without_set_group_id() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        let dir = rig.host_dir("dir");
        chown(&dir, Some(0), Some(2000)).unwrap();
        set_mode(&dir, 0o2777);
        let parent = rig.node("dir");
        let fs = &rig.fs;
        let program = new(0o2755);
        fs.create(&user(1000), parent, c"file", O_RDWR, &program)
            .unwrap();
        fs.mkdir(&user(1000), parent, c"dir", &new(0o755)).unwrap();
        assert_eq!(owner(&dir.join("file")), (1000, 2000));
        assert_eq!(mode(&dir.join("file")), 0o755);
        assert_eq!(owner(&dir.join("dir")), (1000, 2000));
        assert_eq!(mode(&dir.join("dir")), 0o2755);
        let member = Caller {
            gid: Some(2000),
            ..user(1000)
        };
        fs.create(&member, parent, c"member's", O_RDWR, &program)
            .unwrap();
        assert_eq!(mode(&dir.join("member's")), 0o2755);
        let member = Caller {
            group: Some(2000),
            ..user(1000)
        };
        fs.create(&member, parent, c"another's", O_RDWR, &program)
            .unwrap();
        assert_eq!(mode(&dir.join("another's")), 0o2755);
        assert_eq!(owner(&dir.join("another's")), (1000, 2000));
    });
}

#[test]
fn create_by_supplementary_group_member_succeeds_where_ids_decide() {
    with(Options::default(), |rig| {
        if !is_root() {
            return;
        }
        let shared = rig.host_dir("shared");
        chown(&shared, Some(0), Some(2000)).unwrap();
        set_mode(&shared, 0o2770);
        set_mode(rig.dir.path(), 0o777);
        let parent = rig.node("shared");
        drop_capabilities(CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH);
        let own = rustix::process::getgroups().unwrap();
        let fs = &rig.fs;
        let refused = fs.mkdir(&user(1000), parent, c"dir", &new(0o755));
        assert_eq!(refused.err(), Some(Errno::ACCESS));
        let member = Caller {
            group: Some(2000),
            ..user(1000)
        };
        fs.mkdir(&member, parent, c"dir", &new(0o755)).unwrap();
        assert_eq!(owner(&shared.join("dir")), (1000, 2000));
        assert_eq!((fs_uid().unwrap(), fs_gid().unwrap()), (0, 0));
        assert_eq!(rustix::process::getgroups().unwrap(), own);
    });
}

#[test]
fn create_of_existing_file_in_sticky_directory_opens_it() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        // `fs.protected_regular` would refuse this even to root.
        let sticky = rig.host_dir("sticky");
        set_mode(&sticky, 0o1777);
        std::fs::write(sticky.join("file"), "content").unwrap();
        chown(sticky.join("file"), Some(1001), Some(1001)).unwrap();
        let parent = rig.node("sticky");
        let (entry, _) = rig
            .fs
            .create(&user(1000), parent, c"file", O_RDWR, &new(0o644))
            .unwrap();
        assert_eq!((entry.attributes.uid, entry.attributes.size), (1001, 7));
    });
}

#[test]
fn create_with_invalid_ids_is_refused_and_leaves_nothing() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        let created = rig.create(&user(u32::MAX), "file", O_RDWR, 0o644);
        assert_eq!(created.err(), Some(Errno::PERM));
        assert!(!rig.path("file").exists());
        rig.create(&SUPERUSER, "file", O_RDWR, 0o644).unwrap();
        assert_eq!(owner(&rig.path("file")), (0, 0));
    });
}

#[test]
fn capabilities_are_restored_without_right_to_set_securebits() {
    by_descriptor_and_by_handle(|rig| {
        if !is_root() {
            return;
        }
        drop_capabilities(CapabilitySet::SETPCAP);
        rig.fs.prepare_thread().unwrap();
        let before = rustix::thread::capabilities(None).unwrap().effective;
        let closed = rig.host_dir("closed");
        set_mode(&closed, 0o700);
        let parent = rig.node("closed");
        for uid in [1000, 0, 1001, 1002] {
            let name = c(&uid.to_string());
            let made = rig
                .fs
                .create(&user(uid), parent, &name, O_RDWR, &new(0o644));
            assert_eq!(made.unwrap().0.attributes.uid, uid);
            let now = rustix::thread::capabilities(None).unwrap().effective;
            assert_eq!(now, before);
        }
        assert_eq!(fs_uid().unwrap(), 1002);
    });
}

#[test]
fn server_without_override_capabilities_restores_ids_each_time() {
    in_each_mode(|rig| {
        if !is_root() {
            return;
        }
        set_mode(rig.dir.path(), 0o777);
        drop_capabilities(CapabilitySet::DAC_OVERRIDE);
        make_one_of_each(rig, &user(1000));
        for name in ONE_OF_EACH {
            assert_eq!(owner(&rig.path(name)), (1000, 1000), "{name}");
        }
        assert_eq!((fs_uid().unwrap(), fs_gid().unwrap()), (0, 0));
    });
}

#[test]
fn server_without_privileges_creates_as_itself() {
    with(Options::default(), |rig| {
        if is_root() {
            chown(rig.dir.path(), Some(1000), Some(1000)).unwrap();
            let (uid, gid) = (
                rustix::fs::Uid::from_raw(1000),
                rustix::fs::Gid::from_raw(1000),
            );
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        }
        let own = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        make_one_of_each(rig, &user(1234));
        for name in ONE_OF_EACH {
            assert_eq!(owner(&rig.path(name)), own, "{name}");
            let node = rig.node(name);
            assert!(rig.attributes(node).is_ok());
        }
        let node = rig.node("file");
        let linked = rig.fs.link(&SUPERUSER, node, ROOT, c"second").unwrap();
        assert_eq!(linked.node, node);
        let flags = rustix::fs::XattrFlags::empty();
        let set = rig.fs.setxattr(&SUPERUSER, node, c"user.x", b"x", flags);
        assert_eq!(set, Ok(()));
        let mode = Changes {
            mode: Some(0o600),
            size: Some(5),
            ..Changes::default()
        };
        let changed = rig.change(node, None, mode).unwrap();
        assert_eq!((changed.mode & 0o777, changed.size), (0o600, 5));
        let owner = Changes {
            uid: Some(0),
            ..Changes::default()
        };
        if own.0 != 0 {
            assert_eq!(rig.change(node, None, owner).err(), Some(Errno::PERM));
        }
    });
}

#[test]
fn new_file_is_writable_through_its_handle_with_any_mode() {
    in_each_mode(|rig| {
        let (entry, opened) = rig.create(&user(1000), "file", O_RDWR, 0).unwrap();
        let size = Changes {
            size: Some(100),
            ..Changes::default()
        };
        rig.change(entry.node, Some(opened.handle), size).unwrap();
        assert_eq!(std::fs::metadata(rig.path("file")).unwrap().size(), 100);
    });
}
