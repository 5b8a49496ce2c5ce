//! Copying up: numbers, handles, holes, waiting, and several threads at once.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Barrier;

use rustix::io::Errno;

use super::{FileSystem, O_RDONLY, O_RDWR, ROOT, c, caller, new, with_overlay};
use crate::fs::{Changes, Handle, HandleKind, waiting};

#[test]
fn file_of_one_layer_is_its_own_file_of_the_host() {
    with_overlay(
        |lower| std::fs::write(lower.join("a"), "below").unwrap(),
        |rig| {
            let node = rig.node("a");
            let opened = rig.open(node, O_RDONLY);
            let file = rig.file(node, opened.handle);
            let number = rustix::fs::fstat(file.as_fd()).unwrap().st_ino;
            let below = std::fs::metadata(rig.path("lower/a")).unwrap();
            assert_eq!(number, below.ino());
            assert_eq!(rig.attributes(node).inode, below.ino());
            assert!(!rig.path("upper/a").exists());
        },
    );
}

#[test]
fn copied_up_file_keeps_its_number_and_an_open_one_shows_what_is_written() {
    with_overlay(
        |lower| std::fs::write(lower.join("a"), "below").unwrap(),
        |rig| {
            let node = rig.node("a");
            let number = rig.attributes(node).inode;
            let reading = rig.open(node, O_RDONLY);
            assert_eq!(rig.content(node, reading.handle), b"below");
            let writing = rig.open(node, O_RDWR);
            let file = rig.file(node, writing.handle);
            rustix::io::pwrite(&file, b"ABOVE", 0).unwrap();
            assert_eq!(rig.content(node, reading.handle), b"ABOVE");
            assert_eq!(rig.attributes(node).inode, number);
            let again = rig.find(ROOT, "a").unwrap();
            assert_eq!((again.node, again.attributes.inode), (node, number));
            let root = rig.fs.opendir(&caller(), ROOT, 0).unwrap().handle;
            let listed = rig.list(ROOT, root, 0);
            assert!(
                listed
                    .iter()
                    .any(|(name, shown, _)| name == "a" && *shown == number)
            );
            rig.fs.release(node, reading.handle).unwrap();
            rig.fs.release(node, writing.handle).unwrap();
            // A handle is released once.
            assert!(rig.fs.release(node, writing.handle).is_err());
            rig.fs.releasedir(ROOT, root).unwrap();
        },
    );
}

#[test]
fn handle_of_before_a_copy_up_is_opened_anew_once_and_released_with_the_first() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 20;
    let fill = |lower: &std::path::Path| {
        for file in 0..ROUNDS {
            std::fs::write(lower.join(file.to_string()), "below").unwrap();
        }
    };
    with_overlay(fill, |rig| {
        for round in 0..ROUNDS {
            let name = round.to_string();
            let before = rig.descriptors();
            let node = rig.node(&name);
            let reading = rig.open(node, O_RDONLY).handle;
            let writing = rig.open(node, O_RDWR).handle;
            rustix::io::pwrite(rig.file(node, writing), b"above", 0).unwrap();
            let barrier = Barrier::new(THREADS);
            let read = || {
                barrier.wait();
                assert_eq!(rig.content(node, reading), b"above");
                rig.file(node, reading).as_fd().as_raw_fd()
            };
            let descriptors: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(read)).collect();
                let threads = threads.into_iter();
                threads.map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(descriptors, [descriptors[0]; THREADS]);
            rig.fs.release(node, writing).unwrap();
            rig.fs.release(node, reading).unwrap();
            rig.fs.forget(node, 1);
            assert_eq!(rig.descriptors(), before, "round {round}");
        }
    });
}

#[test]
fn handle_gives_access_to_its_own_node_only() {
    let fill = |lower: &std::path::Path| {
        std::fs::write(lower.join("a"), "of a").unwrap();
        std::fs::write(lower.join("b"), "of b").unwrap();
    };
    with_overlay(fill, |rig| {
        let (a, b) = (rig.node("a"), rig.node("b"));
        let (of_a, of_b) = (rig.open(a, O_RDONLY).handle, rig.open(b, O_RDWR).handle);
        let invented = Handle(of_a.0 + 1000);
        for (node, handle) in [(a, of_b), (b, of_a), (a, invented), (ROOT, of_a)] {
            let refused = [
                rig.fs.file(node, handle, HandleKind::File).err(),
                rig.fs.file_to_change(node, handle).err(),
                rig.fs.flush(&caller(), node, handle).err(),
                rig.fs.release(node, handle).err(),
            ];
            assert_eq!(refused, [Some(Errno::BADF); 4]);
        }
        assert_eq!(rig.content(a, of_a), b"of a");
        rig.fs.release(a, of_a).unwrap();
        assert_eq!(
            rig.fs.file(a, of_a, HandleKind::File).err(),
            Some(Errno::BADF)
        );
        assert_eq!(rig.content(b, of_b), b"of b");
    });
}

#[test]
fn copy_keeps_holes_times_and_attributes() {
    let fill = |lower: &std::path::Path| {
        let file = std::fs::File::create(lower.join("a")).unwrap();
        file.write_all_at(b"start", 0).unwrap();
        file.write_all_at(b"end", 50 << 20).unwrap();
        file.set_len(100 << 20).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        file.set_modified(old).unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::fsetxattr(&file, "user.name", b"value", flags).unwrap();
    };
    with_overlay(fill, |rig| {
        let node = rig.node("a");
        let changes = Changes {
            mode: Some(0o4711),
            ..Changes::default()
        };
        let before = rig.attributes(ROOT).modified;
        rig.fs.setattr(&caller(), node, None, &changes).unwrap();
        assert_eq!(rig.attributes(ROOT).modified, before);
        let above = std::fs::metadata(rig.path("upper/a")).unwrap();
        assert_eq!(above.len(), 100 << 20);
        assert!(above.blocks() * 512 < 1 << 20, "{} blocks", above.blocks());
        assert_eq!((above.mtime(), above.mode() & 0o7777), (1_000_000, 0o4711));
        let mut value = [0; 10];
        let len = rustix::fs::getxattr(rig.path("upper/a"), "user.name", &mut value).unwrap();
        assert_eq!(&value[..len], b"value");
        let file = std::fs::File::open(rig.path("upper/a")).unwrap();
        let mut bytes = [0; 3];
        file.read_exact_at(&mut bytes, 50 << 20).unwrap();
        assert_eq!(&bytes, b"end");
        assert_eq!(rig.leftovers(), 0);
    });
}

#[test]
fn copy_of_data_is_left_to_a_thread_that_may_wait() {
    let fill = |lower: &std::path::Path| {
        std::fs::write(lower.join("full"), "data").unwrap();
        std::fs::write(lower.join("empty"), "").unwrap();
        std::fs::create_dir(lower.join("dir")).unwrap();
    };
    with_overlay(fill, |rig| {
        let open = |name: &str, flags: u32| {
            let node = rig.node(name);
            waiting::forbid(|| rig.fs.open(&caller(), node, flags)).map(|_| ())
        };
        assert_eq!(open("full", O_RDWR), Err(waiting::MUST_WAIT));
        assert!(!rig.path("upper/full").exists());
        assert_eq!(open("full", O_RDONLY), Ok(()));
        assert_eq!(open("empty", O_RDWR), Ok(()));
        let truncating = libc::O_TRUNC.cast_unsigned() | O_RDWR;
        assert_eq!(open("full", truncating), Ok(()));
        assert_eq!(std::fs::metadata(rig.path("upper/full")).unwrap().len(), 0);
        // Neither a directory nor a name needs to wait.
        let dir = rig.node("dir");
        let made = waiting::forbid(|| rig.fs.mkdir(&caller(), dir, c"new", &new(0o755)));
        assert!(made.is_ok());
    });
}

#[test]
fn many_threads_copy_up_one_file_once() {
    const THREADS: usize = 4;
    const FILES: usize = 20;
    let fill = |lower: &std::path::Path| {
        std::fs::create_dir_all(lower.join("a/b")).unwrap();
        for file in 0..FILES {
            std::fs::write(lower.join(format!("a/b/{file}")), vec![7; 100_000]).unwrap();
        }
    };
    with_overlay(fill, |rig| {
        let a = rig.node("a");
        let b = rig.find(a, "b").unwrap().node;
        let barrier = Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let barrier = &barrier;
                scope.spawn(move || {
                    for file in 0..FILES {
                        let node = rig.find(b, &file.to_string()).unwrap().node;
                        barrier.wait();
                        let opened = rig.open(node, O_RDWR);
                        let byte = u8::try_from(thread).unwrap();
                        let at = u64::from(byte);
                        let open = rig.file(node, opened.handle);
                        rustix::io::pwrite(open, &[byte], at).unwrap();
                        rig.fs.release(node, opened.handle).unwrap();
                        rig.fs.forget(node, 1);
                    }
                });
            }
        });
        for file in 0..FILES {
            let content = std::fs::read(rig.path(&format!("upper/a/b/{file}"))).unwrap();
            assert_eq!(content.len(), 100_000);
            assert_eq!(&content[..5], [0, 1, 2, 3, 7], "file {file}");
        }
        assert_eq!(rig.leftovers(), 0);
    });
}

#[test]
fn names_change_while_their_files_are_copied_up() {
    let fill = |lower: &std::path::Path| {
        for file in 0..40 {
            std::fs::write(lower.join(file.to_string()), vec![1; 300_000]).unwrap();
        }
    };
    with_overlay(fill, |rig| {
        std::thread::scope(|scope| {
            for file in 0..40 {
                let name = file.to_string();
                let node = rig.node(&name);
                let opening = scope.spawn(move || rig.fs.open(&caller(), node, O_RDWR).is_ok());
                let from = (ROOT, &*c(&name));
                match file % 3 {
                    0 => rig.fs.unlink(&caller(), ROOT, from.1).unwrap(),
                    1 => {
                        let to = c(&format!("new{file}"));
                        rig.fs.rename(&caller(), from, (ROOT, &to), 0).unwrap();
                    }
                    _ => drop(rig.find(ROOT, &name)),
                }
                assert!(opening.join().unwrap(), "file {file}");
            }
        });
        for file in 0..40 {
            let name = file.to_string();
            let found = rig.find(ROOT, &name).map(|entry| entry.attributes.size);
            let moved = rig.find(ROOT, &format!("new{file}"));
            match file % 3 {
                0 => assert_eq!(found, Err(Errno::NOENT)),
                1 => {
                    assert_eq!(found, Err(Errno::NOENT));
                    assert_eq!(moved.unwrap().attributes.size, 300_000);
                }
                _ => assert_eq!(found, Ok(300_000)),
            }
        }
        assert_eq!(rig.leftovers(), 0);
    });
}

#[test]
fn unlinked_file_is_copied_up_without_a_name() {
    with_overlay(
        |lower| std::fs::write(lower.join("a"), "below").unwrap(),
        |rig| {
            let node = rig.node("a");
            let reading = rig.open(node, O_RDONLY);
            rig.fs.unlink(&caller(), ROOT, c"a").unwrap();
            assert_eq!(rig.attributes(node).links, 0);
            let changes = Changes {
                size: Some(3),
                ..Changes::default()
            };
            rig.fs.setattr(&caller(), node, None, &changes).unwrap();
            assert_eq!(rig.content(node, reading.handle), b"bel");
            assert_eq!(rig.find(ROOT, "a").err(), Some(Errno::NOENT));
            assert_eq!(rig.leftovers(), 0);
        },
    );
}
