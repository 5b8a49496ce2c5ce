//! The descriptor limit: closed inodes are found again and are never another file.

use std::os::unix::fs::MetadataExt;

use super::*;

fn unlink(rig: &Rig, name: &str) {
    rig.fs.unlink(&SUPERUSER, ROOT, &c(name)).unwrap();
}

fn rename(rig: &Rig, from: (NodeId, &str), to: (NodeId, &str), flags: u32) {
    let (old, new) = (c(from.1), c(to.1));
    rig.fs
        .rename(&SUPERUSER, (from.0, &old), (to.0, &new), flags)
        .unwrap();
}

/// Uses other inodes until every descriptor that can be closed is closed.
fn evict_all(rig: &Rig) {
    for n in 0..3 {
        let name = format!("other{n}");
        if !rig.path(&name).exists() {
            rig.host_file(&name, "");
        }
        let node = rig.node(&name);
        rig.fs.forget(node, 1);
    }
}

fn number(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).unwrap().ino()
}

#[test]
fn descriptors_never_exceed_limit() {
    by_name(10, |rig| {
        let dirs: Vec<Entry> = (0..5)
            .map(|n| {
                let dir = rig.host_dir(&format!("dir{n}"));
                for n in 0..20 {
                    std::fs::write(dir.join(n.to_string()), "").unwrap();
                }
                rig.find(ROOT, &format!("dir{n}")).unwrap()
            })
            .collect();
        let mut nodes = Vec::new();
        for (n, dir) in dirs.iter().enumerate() {
            for file in 0..20 {
                let found = rig.find(dir.node, &file.to_string()).unwrap();
                nodes.push((found, rig.path(&format!("dir{n}/{file}"))));
                assert!(rig.fs.inode_descriptors() <= 10);
            }
        }
        for (entry, path) in &nodes {
            let attributes = rig.attributes(entry.node).unwrap();
            assert_eq!(attributes.inode, number(path));
            assert!(rig.descriptors() <= 11);
        }
        for (entry, _) in &nodes {
            rig.fs.forget(entry.node, 1);
        }
        for dir in &dirs {
            rig.fs.forget(dir.node, 1);
        }
        assert_eq!((rig.fs.known_inodes(), rig.fs.inode_descriptors()), (1, 1));
        assert_eq!(rig.descriptors(), 1);
    });
}

#[test]
fn open_files_count_towards_limit() {
    by_name(20, |rig| {
        for n in 0..20 {
            rig.host_file(&n.to_string(), "");
        }
        let nodes: Vec<_> = (0..20).map(|n| rig.node(&n.to_string())).collect();
        assert!(rig.fs.inode_descriptors() > 16);
        for node in &nodes {
            rig.fs.open(&SUPERUSER, *node, O_RDWR).unwrap();
        }
        assert_eq!(rig.fs.inode_descriptors(), 16);
        rig.fs.reset();
        assert_eq!(rig.fs.fds().files().handles().count(), 0);
    });
}

#[test]
fn closed_inode_is_found_after_rename() {
    in_each_mode(|rig| {
        let dir = rig.host_dir("dir");
        rig.host_dir("to");
        std::fs::create_dir(dir.join("deep")).unwrap();
        std::fs::write(dir.join("deep/file"), "content").unwrap();
        let (dir, to) = (rig.node("dir"), rig.node("to"));
        let deep = rig.find(dir, "deep").unwrap().node;
        let file = rig.find(deep, "file").unwrap();
        for turn in 0..5 {
            let (a, b) = (turn.to_string(), (turn + 1).to_string());
            let from = if turn == 0 { (ROOT, "dir") } else { (to, &*a) };
            rename(rig, from, (to, &b), 0);
            evict_all(rig);
            let attributes = rig.attributes(file.node).unwrap();
            assert_eq!(attributes.inode, file.attributes.inode);
            rename(rig, (deep, "file"), (to, "file"), 0);
            evict_all(rig);
            assert_eq!(rig.attributes(file.node).unwrap().size, 7);
            rename(rig, (to, "file"), (deep, "file"), 0);
        }
        rig.fs.forget(dir, 1);
        rig.fs.forget(to, 1);
        evict_all(rig);
        // A forgotten directory is still needed to reopen its child.
        assert_eq!(rig.attributes(file.node).unwrap().size, 7);
        rig.fs.forget(deep, 1);
        rig.fs.forget(file.node, 1);
        assert_eq!(rig.fs.known_inodes(), 1);
    });
}

#[test]
fn closed_inodes_are_found_after_exchange() {
    in_each_mode(|rig| {
        let (a, b) = (rig.host_file("a", "a"), rig.host_file("b", "bb"));
        let (a, b) = ((rig.node("a"), number(&a)), (rig.node("b"), number(&b)));
        evict_all(rig);
        rename(rig, (ROOT, "a"), (ROOT, "b"), libc::RENAME_EXCHANGE);
        evict_all(rig);
        assert_eq!(rig.attributes(a.0).unwrap().inode, a.1);
        assert_eq!(rig.attributes(b.0).unwrap().inode, b.1);
        assert_eq!((rig.node("a"), rig.node("b")), (b.0, a.0));
    });
}

#[test]
fn unlinked_inode_stays_usable() {
    in_each_mode(|rig| {
        let (removed, open) = rig.create(&SUPERUSER, "removed", O_RDWR, 0o644).unwrap();
        let (replaced, _) = rig.create(&SUPERUSER, "replaced", O_RDWR, 0o644).unwrap();
        rig.host_file("new", "");
        rig.node("new");
        evict_all(rig);
        unlink(rig, "removed");
        rename(rig, (ROOT, "new"), (ROOT, "replaced"), 0);
        // Other files take over the names.
        rig.host_file("removed", "another");
        for node in [removed.node, replaced.node] {
            evict_all(rig);
            let changes = Changes {
                size: Some(3),
                ..Changes::default()
            };
            rig.change(node, None, changes).unwrap();
            let attributes = rig.attributes(node).unwrap();
            assert_eq!((attributes.size, attributes.links), (3, 0));
            assert!(rig.fs.open(&SUPERUSER, node, O_RDONLY).is_ok());
        }
        rig.fs.release(removed.node, open.handle).unwrap();
    });
}

#[test]
fn inode_that_lost_one_name_is_found_by_other_name() {
    in_each_mode(|rig| {
        let path = rig.host_file("one", "");
        let node = rig.node("one");
        rig.fs.link(&SUPERUSER, node, ROOT, c"two").unwrap();
        let inode = number(&path);
        evict_all(rig);
        unlink(rig, "one");
        evict_all(rig);
        assert_eq!(rig.attributes(node).unwrap().inode, inode);
        rig.fs.link(&SUPERUSER, node, ROOT, c"three").unwrap();
        unlink(rig, "three");
        evict_all(rig);
        assert_eq!(rig.attributes(node).unwrap().inode, inode);
        assert_eq!(rig.node("two"), node);
        evict_all(rig);
        assert!(rig.attributes(node).is_ok());
        rig.fs.forget(node, 4);
        assert_eq!((rig.fs.known_inodes(), rig.fs.inode_descriptors()), (1, 1));
    });
}

#[test]
fn inode_replaced_on_host_is_stale() {
    by_name(1, |rig| {
        rig.host_file("file", "mine");
        let dir = rig.host_dir("dir");
        std::fs::write(dir.join("inside"), "").unwrap();
        let file = rig.find(ROOT, "file").unwrap();
        let dir_node = rig.node("dir");
        let inside = rig.find(dir_node, "inside").unwrap();
        evict_all(rig);
        std::fs::rename(rig.path("file"), rig.path("moved")).unwrap();
        rig.host_file("file", "another");
        std::fs::rename(&dir, rig.path("elsewhere")).unwrap();
        assert_eq!(rig.attributes(file.node).err(), Some(Errno::STALE));
        assert_eq!(rig.attributes(inside.node).err(), Some(Errno::STALE));
        let opened = rig.fs.open(&SUPERUSER, file.node, O_RDWR | O_TRUNC);
        assert_eq!(opened.err(), Some(Errno::STALE));
        assert_eq!(
            std::fs::read_to_string(rig.path("file")).unwrap(),
            "another"
        );
        // A lookup finds the same inode again.
        assert_ne!(rig.node("file"), file.node);
        assert_eq!(rig.node("moved"), file.node);
        assert_eq!(rig.node("elsewhere"), dir_node);
        evict_all(rig);
        assert_eq!(
            rig.attributes(inside.node).unwrap().inode,
            inside.attributes.inode
        );
        assert_eq!(rig.attributes(file.node).unwrap().size, 4);
    });
}

#[test]
fn young_inode_with_reused_number_is_stale() {
    by_name(1, |rig| {
        let mut reused = 0;
        for turn in 0..100 {
            let path = rig.host_file("file", "old");
            let old = rig.find(ROOT, "file").unwrap();
            evict_all(rig);
            std::fs::remove_file(&path).unwrap();
            rig.host_file("file", "newer");
            reused += i32::from(number(&path) == old.attributes.inode);
            match rig.attributes(old.node) {
                Ok(attributes) => assert_eq!(attributes.links, 0, "{turn}"),
                Err(error) => assert_eq!(error, Errno::STALE),
            }
            let new = rig.node("file");
            assert_ne!(new, old.node);
            assert_eq!(rig.attributes(new).unwrap().size, 5);
            rig.fs.forget(new, 1);
            rig.fs.forget(old.node, 1);
            std::fs::remove_file(&path).unwrap();
        }
        if reused == 0 {
            println!("SKIPPED in part: this file system reused no inode number");
        }
    });
}

#[test]
fn directories_with_cyclic_links_are_stale_and_can_be_forgotten() {
    by_name(1, |rig| {
        let (a, b) = (rig.host_dir("a"), rig.host_dir("b"));
        let (in_a, in_b) = (a.join("b"), b.join("a"));
        std::fs::rename(&b, &in_a).unwrap();
        let node_a = rig.node("a");
        let node_b = rig.find(node_a, "b").unwrap().node;
        let handle = rig.fs.opendir(&SUPERUSER, node_b, 0).unwrap();
        std::fs::rename(&in_a, &b).unwrap();
        std::fs::rename(&a, &in_b).unwrap();
        // The name of `b` doesn't lead to it now. If it did, `a` would be found in it.
        let _ = rig.find(node_b, "a");
        rig.node("b");
        evict_all(rig);
        assert_eq!(rig.find(node_b, "a").unwrap().node, node_a);
        evict_all(rig);
        assert!(rig.attributes(node_a).is_ok());
        rig.fs.releasedir(node_b, handle.handle).unwrap();
        rig.fs.forget(node_a, 10);
        rig.fs.forget(node_b, 10);
        assert_eq!(rig.fs.known_inodes(), 1);
    });
}

#[test]
fn directory_at_any_depth_is_reopened() {
    by_name(1, |rig| {
        let mut at = ROOT;
        let mut nodes = Vec::new();
        for _ in 0..2000 {
            at = rig
                .fs
                .mkdir(&SUPERUSER, at, c"d", &new(0o755))
                .unwrap()
                .node;
            nodes.push(at);
        }
        evict_all(rig);
        assert!(rig.attributes(at).is_ok());
        assert!(rig.fs.inode_descriptors() < 10);
        // All but the deepest, as each is kept by its child.
        for node in &nodes[..nodes.len() - 1] {
            rig.fs.forget(*node, 1);
        }
        evict_all(rig);
        assert!(rig.attributes(at).is_ok());
        assert_eq!(rig.attributes(nodes[7]).err(), Some(Errno::STALE));
        rig.fs.forget(at, 1);
        assert_eq!(rig.fs.known_inodes(), 1);
        remove_deep(&rig.path("d"));
    });
}

/// Removes a chain of directories too deep for a path.
fn remove_deep(top: &Path) {
    std::process::Command::new("rm")
        .arg("-rf")
        .arg(top)
        .status()
        .unwrap();
}

#[test]
fn racing_operations_and_evictions_leave_nothing_behind() {
    by_name(20, |rig| {
        for n in 0..4 {
            let dir = rig.host_dir(&format!("dir{n}"));
            for file in 0..30 {
                std::fs::write(dir.join(format!("{n}-{file}")), vec![0; file]).unwrap();
            }
        }
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                scope.spawn(move || race(rig, thread));
            }
            // The directories are renamed all the time, and their contents are still found.
            scope.spawn(|| {
                for turn in 0..500 {
                    let name = format!("dir{}", turn % 4);
                    rename(rig, (ROOT, &name), (ROOT, "away"), 0);
                    rename(rig, (ROOT, "away"), (ROOT, &name), 0);
                }
            });
        });
        assert_eq!((rig.fs.known_inodes(), rig.fs.inode_descriptors()), (1, 1));
        assert_eq!(rig.descriptors(), 1);
    });
}

#[test]
fn inode_can_be_opened_during_renames_and_lookups() {
    by_name(1, |rig| {
        let dir = rig.host_dir("dir");
        std::fs::write(dir.join("x"), "content").unwrap();
        let top = rig.node("dir");
        let file = rig.find(top, "x").unwrap().node;
        let done = std::sync::atomic::AtomicBool::new(false);
        let running = || !done.load(std::sync::atomic::Ordering::Relaxed);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while running() {
                        assert_eq!(rig.attributes(file).unwrap().size, 7);
                    }
                });
            }
            scope.spawn(|| {
                while running() {
                    for name in ["x", "y"] {
                        if let Ok(found) = rig.find(top, name) {
                            assert_eq!(found.node, file);
                            rig.fs.forget(file, 1);
                        }
                        for node in [file, top] {
                            let inode = rig.fs.fds().inodes().get(node).unwrap();
                            inode.slot().second_chance();
                            rig.fs.fds().close(&inode);
                        }
                    }
                }
            });
            for turn in 0..2000 {
                rename(rig, (top, "x"), (top, "y"), 0);
                rename(rig, (top, "y"), (top, "x"), 0);
                if turn % 2 == 0 {
                    rename(rig, (ROOT, "dir"), (ROOT, "moved"), 0);
                    rename(rig, (ROOT, "moved"), (ROOT, "dir"), 0);
                }
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(rig.attributes(file).unwrap().size, 7);
    });
}

#[test]
fn file_found_while_it_is_replaced_can_be_opened() {
    by_name(1, |rig| {
        rig.host_file("name", "content");
        let done = std::sync::atomic::AtomicBool::new(false);
        let running = || !done.load(std::sync::atomic::Ordering::Relaxed);
        // A guest's kernel changes one name of a directory at a time, but looks names up meanwhile.
        let directory = &std::sync::Mutex::new(());
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while running() {
                        let found = rig.find(ROOT, "name").unwrap().node;
                        let opened = rig.fs.open(&SUPERUSER, found, O_RDONLY);
                        rig.fs.release(found, opened.unwrap().handle).unwrap();
                        rig.fs.forget(found, 1);
                    }
                });
            }
            let replacing = ["one", "two"].map(|own| {
                scope.spawn(move || {
                    for _ in 0..2000 {
                        let name = c(own);
                        let new = new(0o644);
                        let made = rig.fs.create(&SUPERUSER, ROOT, &name, O_RDWR, &new);
                        let (made, opened) = made.unwrap();
                        rig.fs.release(made.node, opened.handle).unwrap();
                        let changes = directory.lock().unwrap();
                        rename(rig, (ROOT, own), (ROOT, "name"), 0);
                        drop(changes);
                        rig.fs.forget(made.node, 1);
                    }
                })
            });
            for thread in replacing {
                thread.join().unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!((rig.fs.known_inodes(), rig.fs.inode_descriptors()), (1, 1));
    });
}

/// In directory `thread`, does what only this thread does there, and looks into the others.
fn race(rig: &Rig, thread: u64) {
    let find_dir = |n: u64| loop {
        match rig.find(ROOT, &format!("dir{n}")) {
            Ok(found) => return found.node,
            Err(error) => assert_eq!(error, Errno::NOENT),
        }
    };
    let dirs: Vec<NodeId> = (0..4).map(find_dir).collect();
    let own = dirs[usize::try_from(thread).unwrap()];
    let mut seed = thread + 1;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let mut known: Vec<(NodeId, u64)> = Vec::new();
    for turn in 0..3000 {
        let file = random(30);
        let name = format!("{thread}-{file}");
        let found = rig.find(own, &name).unwrap();
        assert_eq!(found.attributes.size, file);
        known.push((found.node, file));
        match random(6) {
            0 => {
                let away = format!("away{turn}");
                rename(rig, (own, &name), (own, &away), 0);
                assert_eq!(rig.attributes(found.node).unwrap().size, file);
                rename(rig, (own, &away), (own, &name), 0);
            }
            1 => {
                rig.fs.unlink(&SUPERUSER, own, &c(&name)).unwrap();
                assert_eq!(rig.attributes(found.node).unwrap().size, file);
                let made = rig
                    .fs
                    .create(&SUPERUSER, own, &c(&name), O_RDWR, &new(0o644))
                    .unwrap();
                let changes = Changes {
                    size: Some(file),
                    ..Changes::default()
                };
                rig.change(made.0.node, None, changes).unwrap();
                rig.fs.release(made.0.node, made.1.handle).unwrap();
                known.push((made.0.node, file));
            }
            2 => {
                let other = random(4);
                let name = format!("{other}-{file}");
                let dir = dirs[usize::try_from(other).unwrap()];
                // Its owner may just have removed it.
                if let Ok(found) = rig.find(dir, &name) {
                    rig.fs.forget(found.node, 1);
                }
            }
            3 => {
                let opened = rig.fs.open(&SUPERUSER, found.node, O_RDWR).unwrap();
                rig.fs.release(found.node, opened.handle).unwrap();
            }
            _ => {}
        }
        for (node, size) in &known {
            assert_eq!(rig.attributes(*node).unwrap().size, *size);
        }
        if known.len() > 10 {
            for (node, _) in known.drain(..) {
                rig.fs.forget(node, 1);
            }
        }
    }
    for (node, _) in known {
        rig.fs.forget(node, 1);
    }
    for dir in dirs {
        rig.fs.forget(dir, 1);
    }
}
