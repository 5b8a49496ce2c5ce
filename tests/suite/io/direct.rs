//! Files that bypass the page cache.

use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use ringfsd::io::{Attempt, File};
use testing::each_runtime;

use super::memory::Arena;
use super::{bytes_of, file_of, pattern, read_write, run, scratch};

/// Opens with `O_DIRECT`, or says that the file system has none.
pub(crate) async fn open_direct(path: &Path) -> Option<File> {
    let options = read_write().custom_flags(libc::O_DIRECT).clone();
    match File::open(path, &options).await {
        Ok(file) => Some(file),
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
            eprintln!("skipped: no O_DIRECT on the build directory's file system");
            None
        }
    }
}

#[each_runtime(run)]
async fn direct_files_read_and_write() {
    let dir = scratch();
    let path = dir.path().join("f");
    let Some(file) = open_direct(&path).await else {
        return;
    };
    let arena = Arena::new(64 << 10);
    let pieces = [0..4096, 8192..16_384, 20_480..28_672];
    arena.fill(&pattern(0..64 << 10), 0);
    let whole = arena.bytes();
    let expected: Vec<u8> = pieces
        .iter()
        .flat_map(|p| whole[p.clone()].to_vec())
        .collect();

    let buffer = arena.buffer(&pieces, Arc::new(()));
    assert_eq!(file.try_write_at(&buffer, 0).unwrap(), Attempt::WouldBlock);
    let (result, mut buffer) = file.write_at(buffer, 0).await;
    assert_eq!(result.unwrap(), expected.len());
    assert!(std::fs::read(&path).unwrap() == expected);

    arena.fill(&vec![0; 64 << 10], 0);
    assert_eq!(
        file.try_read_at(&mut buffer, 0).unwrap(),
        Attempt::WouldBlock
    );
    let (result, buffer) = file.read_at(buffer, 0).await;
    assert_eq!(result.unwrap(), expected.len());
    assert!(bytes_of(&buffer) == expected);
}

#[each_runtime(run)]
async fn a_direct_read_over_an_unaligned_end_is_short() {
    let dir = scratch();
    for len in [1000, 4096 + 512, 8192] {
        let path = file_of(&dir, "f", &pattern(0..len));
        let Some(file) = open_direct(&path).await else {
            return;
        };
        let arena = Arena::new(32 << 10);
        let pieces = [0..4096, 8192..20_480];
        let (result, buffer) = file.read_at(arena.buffer(&pieces, Arc::new(())), 0).await;
        assert_eq!(result.unwrap(), len);
        assert!(bytes_of(&buffer)[..len] == pattern(0..len));
    }
}
