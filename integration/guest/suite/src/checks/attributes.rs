//! Attributes that stat returns, and what changes them: times, modes, owners, counts, and the file
//! system's own numbers. Invariant: each check reads back by another method than it wrote.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::checks;
use crate::failure::{Outcome, ensure, ensure_eq};
use crate::fixture::{has_mode, read_write, size, space_of};

checks![
    times_are_kept_to_the_nanosecond,
    times_far_from_now_are_kept,
    times_are_omitted_or_set_to_now_on_request,
    times_of_a_link_are_its_own,
    write_moves_the_time_of_change,
    change_of_mode_moves_the_status_time_only,
    every_permission_bit_is_kept,
    mode_is_set_through_a_handle,
    owner_is_changed_and_partly_left,
    owner_of_a_link_is_its_own,
    stat_agrees_by_path_and_by_handle,
    inode_numbers_are_unique_and_stay,
    folder_counts_its_subfolders,
    statfs_is_plausible,
    statx_gives_what_was_asked_for,
];

fn time(seconds: i64, nanoseconds: i64) -> Timespec {
    Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    }
}

fn set_times(path: &Path, access: Timespec, change: Timespec, flags: AtFlags) -> Outcome {
    let times = Timestamps {
        last_access: access,
        last_modification: change,
    };
    Ok(utimensat(CWD, path, &times, flags)?)
}

fn times_are_kept_to_the_nanosecond(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    for target in [path.as_path(), dir] {
        let (access, change) = (
            time(1_000_000_001, 123_456_789),
            time(1_234_567_890, 987_654_321),
        );
        set_times(target, access, change, AtFlags::empty())?;
        let data = fs::metadata(target)?;
        ensure_eq!(
            (data.atime(), data.atime_nsec()),
            (1_000_000_001, 123_456_789)
        );
        ensure_eq!(
            (data.mtime(), data.mtime_nsec()),
            (1_234_567_890, 987_654_321)
        );
    }
    // Through a handle too.
    let when = SystemTime::UNIX_EPOCH + Duration::new(1_600_000_000, 1);
    File::options()
        .write(true)
        .open(&path)?
        .set_modified(when)?;
    let data = fs::metadata(&path)?;
    ensure_eq!((data.mtime(), data.mtime_nsec()), (1_600_000_000, 1));
    ensure_eq!(
        (data.atime(), data.atime_nsec()),
        (1_000_000_001, 123_456_789)
    );
    Ok(())
}

fn times_far_from_now_are_kept(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    // 1938, 1969, 2038 and 2200.
    for seconds in [-1_000_000_000, -1, (1 << 31) + 5, 7_258_118_400] {
        set_times(
            &path,
            time(seconds, 5),
            time(seconds, 999_999_999),
            AtFlags::empty(),
        )?;
        let data = fs::metadata(&path)?;
        ensure_eq!((data.atime(), data.atime_nsec()), (seconds, 5));
        ensure_eq!((data.mtime(), data.mtime_nsec()), (seconds, 999_999_999));
    }
    Ok(())
}

fn times_are_omitted_or_set_to_now_on_request(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    set_times(&path, time(1000, 1), time(2000, 2), AtFlags::empty())?;
    let (omit, now) = (
        time(0, rustix::fs::UTIME_OMIT),
        time(0, rustix::fs::UTIME_NOW),
    );
    set_times(&path, omit, time(3000, 3), AtFlags::empty())?;
    let data = fs::metadata(&path)?;
    ensure_eq!((data.atime(), data.mtime()), (1000, 3000));
    set_times(&path, now, omit, AtFlags::empty())?;
    let data = fs::metadata(&path)?;
    ensure_eq!((data.mtime(), data.mtime_nsec()), (3000, 3));
    // The clocks of a guest and its host may differ, though not by hours.
    let age = data.accessed()?.elapsed().unwrap_or_default();
    ensure!(age < Duration::from_secs(3600), "now was {age:?} ago");
    Ok(())
}

fn times_of_a_link_are_its_own(dir: &Path) -> Outcome {
    let (path, link) = (dir.join("file"), dir.join("link"));
    fs::write(&path, b"x")?;
    std::os::unix::fs::symlink("file", &link)?;
    set_times(&path, time(1000, 0), time(1000, 0), AtFlags::empty())?;
    set_times(
        &link,
        time(2000, 7),
        time(2000, 8),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    ensure_eq!(fs::metadata(&link)?.mtime(), 1000);
    let data = fs::symlink_metadata(&link)?;
    ensure_eq!((data.mtime(), data.mtime_nsec()), (2000, 8));
    Ok(())
}

fn write_moves_the_time_of_change(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let old = time(1000, 0);
    fs::write(&path, b"x")?;
    set_times(&path, old, old, AtFlags::empty())?;
    let file = read_write(&path)?;
    ensure_eq!(file.metadata()?.mtime(), 1000);
    file.write_all_at(b"y", 0)?;
    ensure!(
        fs::metadata(&path)?.mtime() > 1000,
        "a write left the time as it was"
    );
    set_times(&path, old, old, AtFlags::empty())?;
    rustix::fs::ftruncate(&file, 0)?;
    ensure!(
        fs::metadata(&path)?.mtime() > 1000,
        "a truncation left the time as it was"
    );
    // The folder's too, when a name is added.
    set_times(dir, old, old, AtFlags::empty())?;
    fs::write(dir.join("second"), b"")?;
    ensure!(
        fs::metadata(dir)?.mtime() > 1000,
        "a new name left the folder's time as it was"
    );
    set_times(dir, old, old, AtFlags::empty())?;
    fs::remove_file(dir.join("second"))?;
    ensure!(
        fs::metadata(dir)?.mtime() > 1000,
        "a removal left the folder's time as it was"
    );
    Ok(())
}

fn change_of_mode_moves_the_status_time_only(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    set_times(&path, time(1000, 0), time(1000, 0), AtFlags::empty())?;
    let before = fs::metadata(&path)?;
    ensure!(before.ctime() > 1000, "the status time could be set");
    std::thread::sleep(Duration::from_millis(20));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let after = fs::metadata(&path)?;
    ensure_eq!(after.mtime(), 1000);
    let moved = (after.ctime(), after.ctime_nsec()) > (before.ctime(), before.ctime_nsec());
    ensure!(moved, "a change of mode left the status time as it was");
    Ok(())
}

fn every_permission_bit_is_kept(dir: &Path) -> Outcome {
    let (path, folder) = (dir.join("file"), dir.join("folder"));
    fs::write(&path, b"x")?;
    fs::create_dir(&folder)?;
    let single = (0..12).map(|bit| 1 << bit);
    for mode in single.chain([0, 0o7777, 0o4755, 0o2755, 0o1777, 0o644]) {
        for target in [&path, &folder] {
            fs::set_permissions(target, fs::Permissions::from_mode(mode))?;
            has_mode(target, mode)?;
        }
    }
    ensure!(
        fs::metadata(&folder)?.is_dir(),
        "the folder is none any more"
    );
    Ok(())
}

fn mode_is_set_through_a_handle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    file.set_permissions(fs::Permissions::from_mode(0o604))?;
    has_mode(&path, 0o604)?;
    let folder = crate::fixture::open_folder(dir)?;
    folder.set_permissions(fs::Permissions::from_mode(0o751))?;
    has_mode(dir, 0o751)?;
    Ok(())
}

fn owner_is_changed_and_partly_left(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    let owner = |path: &Path| fs::metadata(path).map(|data| (data.uid(), data.gid()));
    chown(&path, Some(1000), Some(2000))?;
    ensure_eq!(owner(&path)?, (1000, 2000));
    chown(&path, None, Some(3000))?;
    ensure_eq!(owner(&path)?, (1000, 3000));
    chown(&path, Some(4000), None)?;
    ensure_eq!(owner(&path)?, (4000, 3000));
    std::os::unix::fs::fchown(read_write(&path)?, Some(0), Some(0))?;
    ensure_eq!(owner(&path)?, (0, 0));
    chown(dir, Some(5000), Some(5001))?;
    ensure_eq!(owner(dir)?, (5000, 5001));
    Ok(())
}

fn owner_of_a_link_is_its_own(dir: &Path) -> Outcome {
    let (path, link) = (dir.join("file"), dir.join("link"));
    fs::write(&path, b"x")?;
    std::os::unix::fs::symlink("file", &link)?;
    lchown(&link, Some(1000), Some(2000))?;
    let (link_data, data) = (fs::symlink_metadata(&link)?, fs::metadata(&path)?);
    ensure_eq!((link_data.uid(), link_data.gid()), (1000, 2000));
    ensure_eq!((data.uid(), data.gid()), (0, 0));
    chown(&link, Some(3000), None)?;
    ensure_eq!(fs::metadata(&path)?.uid(), 3000);
    ensure_eq!(fs::symlink_metadata(&link)?.uid(), 1000);
    Ok(())
}

fn stat_agrees_by_path_and_by_handle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut file = read_write(&path)?;
    file.write_all(&[5; 10_000])?;
    file.sync_all()?;
    let (by_path, by_handle) = (fs::metadata(&path)?, file.metadata()?);
    for data in [&by_path, &by_handle] {
        ensure!(data.is_file(), "no regular file");
        ensure_eq!(data.len(), 10_000);
        ensure_eq!(data.nlink(), 1);
        ensure!(data.blksize() >= 512, "a block size of {}", data.blksize());
    }
    ensure!(space_of(&file)? >= 10_000, "less space than bytes");
    ensure_eq!(by_path.ino(), by_handle.ino());
    ensure_eq!(by_path.dev(), by_handle.dev());
    ensure_eq!(by_path.dev(), fs::metadata(dir)?.dev());
    ensure_eq!(by_path.mtime_nsec(), by_handle.mtime_nsec());
    Ok(())
}

fn inode_numbers_are_unique_and_stay(dir: &Path) -> Outcome {
    let mut numbers = Vec::new();
    let count = size(200, 40);
    for index in 0..count {
        let path = dir.join(format!("file-{index}"));
        fs::write(&path, b"")?;
        numbers.push(fs::metadata(&path)?.ino());
    }
    let unique: HashSet<u64> = numbers.iter().copied().collect();
    ensure_eq!(unique.len(), count);
    for (index, number) in numbers.iter().enumerate() {
        let path = dir.join(format!("file-{index}"));
        ensure_eq!(fs::metadata(&path)?.ino(), *number);
        OpenOptions::new()
            .append(true)
            .open(&path)?
            .write_all(b"x")?;
        ensure_eq!(fs::metadata(&path)?.ino(), *number);
    }
    Ok(())
}

fn folder_counts_its_subfolders(dir: &Path) -> Outcome {
    // A file system that does not count says one.
    let counts = fs::metadata(dir)?.nlink() != 1;
    for made in 1..=5 {
        fs::create_dir(dir.join(format!("folder-{made}")))?;
        fs::write(dir.join(format!("file-{made}")), b"")?;
        ensure_eq!(
            fs::metadata(dir)?.nlink(),
            if counts { 2 + made } else { 1 }
        );
    }
    fs::remove_dir(dir.join("folder-1"))?;
    ensure_eq!(fs::metadata(dir)?.nlink(), if counts { 6 } else { 1 });
    Ok(())
}

fn statfs_is_plausible(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    let by_path = rustix::fs::statvfs(&path)?;
    let by_handle = rustix::fs::fstatvfs(File::open(dir)?)?;
    ensure_eq!(by_path.f_blocks, by_handle.f_blocks);
    ensure!(
        by_path.f_blocks > 0 && by_path.f_bsize >= 512,
        "no blocks, or none of a size"
    );
    ensure!(
        by_path.f_bfree <= by_path.f_blocks,
        "more blocks free than there are"
    );
    ensure!(
        by_path.f_bavail <= by_path.f_bfree,
        "more blocks to be had than free"
    );
    ensure!(
        by_path.f_ffree <= by_path.f_files,
        "more files free than there are"
    );
    ensure_eq!(by_path.f_namemax, 255);
    Ok(())
}

fn statx_gives_what_was_asked_for(dir: &Path) -> Outcome {
    use rustix::fs::{StatxFlags, statx};
    let path = dir.join("file");
    fs::write(&path, b"12345")?;
    let wanted = StatxFlags::BASIC_STATS;
    for flags in [
        AtFlags::empty(),
        AtFlags::STATX_FORCE_SYNC,
        AtFlags::STATX_DONT_SYNC,
    ] {
        let data = statx(CWD, &path, flags, wanted)?;
        let given = StatxFlags::from_bits_retain(data.stx_mask);
        ensure!(
            given.contains(wanted),
            "not all that was asked for: {given:?}"
        );
        ensure_eq!(data.stx_size, 5);
        ensure_eq!(data.stx_ino, fs::metadata(&path)?.ino());
        ensure_eq!(u32::from(data.stx_mode), fs::metadata(&path)?.mode());
        if given.contains(StatxFlags::BTIME) {
            ensure!(
                data.stx_btime.tv_sec <= data.stx_ctime.tv_sec + 1,
                "born after its change"
            );
        }
    }
    Ok(())
}
