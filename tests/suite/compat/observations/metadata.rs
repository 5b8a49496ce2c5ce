//! Requests for extended attributes, attributes, new files and directories.

use vmm::fuse::wire::{EntryOut, SetattrIn, init, opcode, setattr};
use vmm::fuse::{Call, Handle};

use super::{Observer, USER};

impl Observer {
    pub(super) fn xattrs(&mut self) {
        let file = self.lookup(c"file");
        for name in [
            c"user.x",
            c"user.missing",
            c"user.y",
            c"trusted.x",
            c"security.capability",
            c"security.selinux",
            c"system.posix_acl_access",
            c"user.virtiofs.user.y",
        ] {
            let value = self.fs.getxattr(file, name);
            self.see(&format!("GETXATTR {name:?}"), value, |value| {
                format!("{value:?}")
            });
        }
        let size = self.fs.getxattr_size(file, c"user.x");
        self.see("GETXATTR of the size", size, |size| size.to_string());
        let names = self.fs.listxattr(file);
        self.see("LISTXATTR", names, |mut names| {
            names.sort();
            format!("{names:?}")
        });
        let size = self.fs.listxattr_size(file);
        self.see("LISTXATTR of the size", size, |size| size.to_string());
        for (what, name, flags) in [
            ("", c"user.z", 0),
            (" XATTR_CREATE", c"user.z", libc::XATTR_CREATE),
            (" XATTR_REPLACE", c"user.none", libc::XATTR_REPLACE),
            (" trusted", c"trusted.z", 0),
            (" of an ACL", c"system.posix_acl_access", 0),
            (" security", c"security.z", 0),
        ] {
            let set = self.fs.setxattr(file, name, b"two", flags);
            self.done(&format!("SETXATTR{what}"), set);
        }
        let small = self.fs.getxattr_into(file, c"user.z", 2);
        self.done("GETXATTR with little room", small);
        for name in [c"user.z", c"user.none"] {
            let removed = self.fs.removexattr(file, name);
            self.done(&format!("REMOVEXATTR {name:?}"), removed);
        }
    }

    /// What a user creates, and whose it is on the host.
    pub(super) fn created(&mut self) {
        for directory in [c"open", c"setgid"] {
            let parent = self.lookup(directory);
            self.fs.act_as(USER, 2000);
            let of = |what: &str| format!("{what} in {directory:?}");
            let made = self.fs.create(parent, c"created", 0o6777);
            let flags = made.as_ref().ok().map(|(_, handle)| handle.open_flags);
            self.see_entry(&of("CREATE"), made.map(|(entry, _)| entry));
            self.seen.push((of("CREATE: flags"), format!("{flags:x?}")));
            let made = self.fs.mkdir(parent, c"made", 0o777);
            self.see_entry(&of("MKDIR"), made);
            let made = self.fs.symlink(parent, c"link", c"target");
            self.see_entry(&of("SYMLINK"), made);
            for (kind, name, mode) in [
                ("file", c"node", libc::S_IFREG),
                ("fifo", c"fifo", libc::S_IFIFO),
                ("socket", c"socket", libc::S_IFSOCK),
                ("device", c"device", libc::S_IFCHR),
            ] {
                let made = self.fs.mknod(parent, name, mode | 0o666, 0x103);
                self.see_entry(&of(&format!("MKNOD of a {kind}")), made);
            }
            let made = self.fs.tmpfile(parent, 0o600);
            self.see_entry(&of("TMPFILE"), made.map(|(entry, _)| entry));
            self.fs.act_as(0, 0);
        }
        let full = self.lookup(c"full");
        let exclusive = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        for (what, flags) in [("", libc::O_RDWR | libc::O_CREAT), (" O_EXCL", exclusive)] {
            let made = self.fs.create_with(full, c"entry", 0o600, flags);
            let entry = made.map(|(entry, _)| entry);
            self.see_entry(&format!("CREATE of what exists{what}"), entry);
        }
        let device = self.fs.mknod(full, c"device", libc::S_IFCHR | 0o600, 0x103);
        self.see_entry("MKNOD of a device by root", device);
    }

    pub(super) fn attributes(&mut self) {
        let root = self.root;
        let file = self.lookup(c"file");
        let of_user = self.lookup(c"of-user");
        let set = self.fs.chmod(file, 0o6750);
        self.see_attr("SETATTR of the mode", set);
        let set = self.fs.chown(file, USER, 2000);
        self.see_attr("SETATTR of the owners", set);
        let set = self.fs.truncate(file, 3);
        self.see_attr("SETATTR of the size", set);
        let killing = SetattrIn {
            valid: setattr::SIZE | setattr::KILL_SUIDGID,
            size: 2,
            ..SetattrIn::default()
        };
        let _ = self.fs.chmod(file, 0o6755);
        self.fs.act_as(USER, USER);
        let set = self.fs.setattr(file, &killing);
        self.see_attr("SETATTR of the size with KILL_SUIDGID", set);
        let set = self.fs.chown(of_user, 3000, 3000);
        self.see_attr("SETATTR of the owners by a user", set);
        self.fs.act_as(0, 0);
        let set = self.fs.truncate(root, 3);
        self.see_attr("SETATTR of a directory's size", set);
        for mask in [libc::R_OK, libc::W_OK, libc::X_OK] {
            self.fs.act_as(USER, USER);
            let allowed = self.fs.access(of_user, mask);
            self.done(&format!("ACCESS {mask}"), allowed);
            self.fs.act_as(0, 0);
        }
        let statx = self.fs.statx(file, 0x7ff);
        self.see("STATX", statx, |out| {
            format!("{:o} size {}", out.stat.mode, out.stat.size)
        });
        let statfs = self.fs.statfs(root);
        self.see("STATFS", statfs, |out| {
            format!(
                "bsize {} namelen {} frsize {}",
                out.bsize, out.namelen, out.frsize
            )
        });
        let synced = self.fs.syncfs(root);
        self.done("SYNCFS", synced);
    }

    pub(super) fn directories(&mut self) {
        let full = self.lookup(c"full");
        let handle = self.fs.opendir(full);
        let opened = handle.as_ref().ok().copied();
        self.see("OPENDIR", handle, |handle| {
            format!("flags {:#x}", handle.open_flags)
        });
        if let Some(handle) = opened {
            let entries = self.fs.readdir(full, handle, 0, 4096);
            self.see("READDIR", entries, |entries| {
                let mut all: Vec<_> = entries.iter().map(|e| (&e.name, e.kind)).collect();
                all.sort();
                format!("{all:?}")
            });
            let entries = self.fs.readdirplus(full, handle, 0, 4096);
            self.see("READDIRPLUS", entries, |entries| {
                let text = |node: EntryOut| match node.nodeid {
                    0 => "not looked up".to_owned(),
                    _ => format!("for {} {}", node.entry_valid, node.attr_valid),
                };
                let mut all: Vec<_> = entries
                    .iter()
                    .map(|plus| (&plus.entry.name, text(plus.node)))
                    .collect();
                all.sort();
                format!("{all:?}")
            });
            let little = self.fs.readdir(full, handle, 0, 8);
            self.see("READDIR with little room", little, |entries| {
                entries.len().to_string()
            });
            let synced = self.fs.fsyncdir(full, handle, false);
            self.done("FSYNCDIR", synced);
            let released = self.fs.releasedir(full, handle);
            self.done("RELEASEDIR", released);
        }
        let file = self.lookup(c"file");
        let handle = self.fs.opendir(file);
        self.done("OPENDIR of a file", handle);
        let entries = self.fs.readdir(full, Handle::raw(1 << 40), 0, 4096);
        self.see("READDIR without a handle", entries, |entries| {
            entries.len().to_string()
        });
    }

    pub(super) fn others(&mut self) {
        let root = self.root;
        let full = self.lookup(c"full");
        let file = self.lookup(c"file");
        let linked = self.fs.link(file, full, c"linked");
        self.see_entry("LINK", linked);
        let linked = self.fs.link(full, root, c"linked");
        self.see_entry("LINK of a directory", linked);
        for (what, flags) in [
            ("RENAME_NOREPLACE", libc::RENAME_NOREPLACE),
            ("RENAME_EXCHANGE", libc::RENAME_EXCHANGE),
            ("RENAME_WHITEOUT", libc::RENAME_WHITEOUT),
            ("of another kind", 1 << 20),
        ] {
            let renamed = self.fs.rename2(full, c"entry", full, c"linked", flags);
            self.done(&format!("RENAME2 {what}"), renamed);
        }
        let renamed = self.fs.rename(full, c"linked", full, c"renamed");
        self.done("RENAME", renamed);
        let removed = self.fs.unlink(full, c"missing");
        self.done("UNLINK of what is missing", removed);
        let removed = self.fs.unlink(root, c"full");
        self.done("UNLINK of a directory", removed);
        let removed = self.fs.rmdir(root, c"full");
        self.done("RMDIR of a full directory", removed);
        let removed = self.fs.unlink(full, c"renamed");
        self.done("UNLINK", removed);
        let forgotten = self.fs.forget(file, 1);
        self.done("FORGET", forgotten);
        for (what, number, room) in [
            ("BMAP", opcode::BMAP, 8),
            ("POLL", opcode::POLL, 8),
            ("SETUPMAPPING", opcode::SETUPMAPPING, 0),
            ("REMOVEMAPPING", opcode::REMOVEMAPPING, 0),
            ("a request of another kind", 3000, 64),
        ] {
            let call = Call::new(number, root).arg(&[0; 40]).reply(room);
            let result = self.fs.request(call);
            self.done(what, result);
        }
        if self.fs.has(init::INIT_EXT) {
            let destroyed = self.fs.destroy();
            self.done("DESTROY", destroyed);
        }
    }
}
