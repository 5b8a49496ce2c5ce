//! What the guest closes: whether it sends FLUSH, and files that the next OPEN reuses.

use super::*;
use crate::fs::{HandleKind, OpenFile};

/// Opens the file and closes it again. Returns the number of cached files.
fn open_and_close(rig: &Rig, node: NodeId, flags: u32) -> usize {
    let opened = rig.fs.open(&SUPERUSER, node, flags).unwrap();
    rig.fs.release(node, opened.handle).unwrap();
    rig.fs.fds().files().closed().count()
}

/// Runs `test` with at most this many cached files.
fn with_cached_files(max: usize, test: impl Fn(&Rig) + Sync) {
    let options = Options {
        max_closed_files: max,
        ..Options::default()
    };
    if is_root() {
        with(options, test);
    }
}

#[test]
fn released_read_only_file_is_reused_by_next_open() {
    with_cached_files(64, |rig| {
        let path = rig.host_file("file", "before");
        let node = rig.node("file");
        let known = rig.descriptors();
        assert_eq!(open_and_close(rig, node, O_RDONLY), 1);
        assert_eq!(rig.descriptors(), known + 1);

        let again = rig.fs.open(&SUPERUSER, node, O_RDONLY).unwrap();
        assert_eq!(
            (rig.fs.fds().files().closed().count(), rig.descriptors()),
            (0, known + 1)
        );
        std::fs::write(path, "after").unwrap();
        let file = rig
            .fs
            .file(node, again.handle, HandleKind::File)
            .and_then(OpenFile::host)
            .unwrap();
        assert_eq!(file.metadata().unwrap().stx_size, 5);
        let other = rig.fs.open(&SUPERUSER, node, O_RDONLY).unwrap();
        assert_ne!(again.handle, other.handle);
        assert_eq!(rig.descriptors(), known + 2);
    });
}

#[test]
fn cached_file_is_closed_by_forget() {
    with_cached_files(64, |rig| {
        rig.host_file("file", "");
        let before = rig.descriptors();
        for end in [
            |rig: &Rig, node| rig.fs.forget(node, 1),
            |rig: &Rig, _| rig.fs.reset(),
        ] {
            let node = rig.node("file");
            assert_eq!(open_and_close(rig, node, O_RDONLY), 1);
            end(rig, node);
            assert_eq!(
                (rig.fs.fds().files().closed().count(), rig.descriptors()),
                (0, before)
            );
        }
    });
}

#[test]
fn file_opened_for_more_than_reading_is_not_cached() {
    with_cached_files(64, |rig| {
        rig.host_file("file", "");
        let node = rig.node("file");
        for flags in [O_RDWR, O_WRONLY, O_RDWR | O_TRUNC] {
            assert_eq!(open_and_close(rig, node, flags), 0, "{flags:#o}");
        }
        let sync = libc::O_SYNC.cast_unsigned();
        assert_eq!(open_and_close(rig, node, sync), 0);
        // A cached file is not used for an OPEN that asks for more.
        assert_eq!(open_and_close(rig, node, O_RDONLY), 1);
        let opened = rig.fs.open(&SUPERUSER, node, O_RDWR).unwrap();
        assert_eq!(rig.fs.fds().files().closed().count(), 1);
        rig.fs.release(node, opened.handle).unwrap();
    });
}

#[test]
fn cached_files_never_exceed_limit() {
    let check = |max: usize, kept: usize| {
        with_cached_files(max, |rig| {
            for n in 0..300 {
                rig.host_file(&n.to_string(), "");
                open_and_close(rig, rig.node(&n.to_string()), O_RDONLY);
            }
            assert_eq!(rig.fs.fds().files().closed().count(), kept);
        });
    };
    check(0, 0);
    check(1, 1);
    check(100, 100);
    check(64, 64);
    check(128, 128);
}

#[test]
fn cached_files_are_closed_when_descriptors_are_short() {
    if !is_root() {
        return;
    }
    by_name(40, |rig| {
        for n in 0..30 {
            rig.host_file(&n.to_string(), "");
            let node = rig.node(&n.to_string());
            open_and_close(rig, node, O_RDONLY);
            assert!(rig.descriptors() <= 41, "{}", rig.descriptors());
        }
    });
}

#[test]
fn only_files_open_for_both_need_flush() {
    in_each_mode(|rig| {
        // A mapping can be written to only if the file is open for reading and writing.
        rig.host_file("file", "");
        let node = rig.node("file");
        let is_local = rig.fs.fds().files().local().exists();
        let excepted = [(O_RDONLY, is_local), (O_WRONLY, is_local), (O_RDWR, false)];
        for (flags, no_flush) in excepted {
            let opened = rig.fs.open(&SUPERUSER, node, flags).unwrap();
            assert_eq!(opened.no_flush, no_flush, "{flags:#o}");
            rig.fs.release(node, opened.handle).unwrap();
            let name = format!("new-{flags:o}");
            let (new, opened) = rig.create(&SUPERUSER, &name, flags, 0o644).unwrap();
            assert_eq!(opened.no_flush, no_flush, "{flags:#o}");
            rig.fs.flush(&SUPERUSER, new.node, opened.handle).unwrap();
            rig.fs.release(new.node, opened.handle).unwrap();
            let flushed = rig.fs.flush(&SUPERUSER, new.node, opened.handle);
            assert_eq!(flushed, Err(Errno::BADF));
        }
    });
}
