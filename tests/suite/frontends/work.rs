//! A guest at work: directories, files, data, names, and all of it gone again.
//!
//! Included by the tests of each way in which the device is served.

use std::path::Path;

use testing::pattern;
use vmm::fuse::{Client, Guest, ROOT};

/// Lets the guest work in `share`, which it leaves as it was but for one file.
pub(crate) fn work(fs: &mut Client<impl Guest>, share: &Path) {
    std::fs::write(share.join("from the host"), "hello guest").unwrap();
    let there = fs.lookup(ROOT, c"from the host").unwrap();
    let handle = fs.open(there.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(
        fs.read(there.nodeid, handle, 0, 100).unwrap(),
        b"hello guest"
    );
    fs.release(there.nodeid, handle).unwrap();

    let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap();
    let (file, handle) = fs.create(dir.nodeid, c"file", 0o644).unwrap();
    let data = pattern(300_000, 7);
    assert_eq!(fs.write(file.nodeid, handle, 5, &data).unwrap(), 300_000);
    assert_eq!(fs.read(file.nodeid, handle, 5, 300_000).unwrap(), data);
    assert_eq!(fs.getattr(file.nodeid).unwrap().attr.size, 300_005);
    fs.flush(file.nodeid, handle).unwrap();
    fs.fsync(file.nodeid, handle, false).unwrap();
    fs.release(file.nodeid, handle).unwrap();
    let on_host = std::fs::read(share.join("dir/file")).unwrap();
    assert_eq!(on_host[..5], [0; 5]);
    assert_eq!(on_host[5..], data);

    let open = fs.opendir(dir.nodeid).unwrap();
    let names: Vec<_> = fs
        .readdirplus_all(dir.nodeid, open)
        .unwrap()
        .into_iter()
        .map(|found| found.entry.name.to_string_lossy().into_owned())
        .collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names.contains(&"file".to_owned()));
    fs.releasedir(dir.nodeid, open).unwrap();

    fs.unlink(dir.nodeid, c"file").unwrap();
    fs.rmdir(ROOT, c"dir").unwrap();
    assert!(!share.join("dir").exists());
    fs.forget(dir.nodeid, 1).unwrap();
}
