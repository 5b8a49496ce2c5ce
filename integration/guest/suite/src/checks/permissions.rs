//! Permissions: users without privilege, their groups, masks and sticky folders. Invariant: what a
//! user does is done by a child that has become that user.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, accessat, mknodat};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure_eq, refused, refused_with_any};
use crate::fixture::{create_new, file_of, folder_of, has_mode, read_write, size};
use crate::process::{ALICE, BOB, Child, User, as_user, set_umask};

checks![
    user_is_refused_what_the_mode_forbids,
    user_s_class_is_the_first_that_matches,
    user_reads_by_a_supplementary_group,
    user_writes_by_a_supplementary_group,
    user_creates_where_only_a_supplementary_group_may,
    user_creates_what_the_user_owns,
    user_s_umask_is_honoured,
    folder_without_the_right_to_search_is_closed,
    folder_without_the_right_to_read_is_not_listed,
    folder_without_the_right_to_write_stays_as_it_is,
    sticky_folder_keeps_users_apart,
    user_changes_no_mode_and_no_owner_of_others,
    owner_may_give_a_file_to_an_own_group,
    user_sets_times_as_far_as_allowed,
    file_created_read_only_is_written_through_its_handle,
    handle_stays_good_when_the_mode_changes,
    handle_passed_to_another_user_stays_good,
    access_tells_what_open_would_do,
    program_without_the_right_to_execute_is_not_run,
    root_may_what_the_mode_forbids,
    users_at_the_same_time_are_not_mixed_up,
];

fn write(path: &Path) -> std::io::Result<()> {
    OpenOptions::new().append(true).open(path)?.write_all(b"x")
}

fn user_is_refused_what_the_mode_forbids(dir: &Path) -> Outcome {
    file_of(&dir.join("nothing"), b"x", 0o600, (0, 0))?;
    file_of(&dir.join("readable"), b"x", 0o644, (0, 0))?;
    file_of(&dir.join("writable"), b"x", 0o602, (0, 0))?;
    as_user(ALICE, || {
        refused(fs::read(dir.join("nothing")), Errno::ACCESS)?;
        refused(write(&dir.join("nothing")), Errno::ACCESS)?;
        ensure_eq!(fs::read(dir.join("readable"))?, b"x");
        refused(write(&dir.join("readable")), Errno::ACCESS)?;
        refused(fs::read(dir.join("writable")), Errno::ACCESS)?;
        write(&dir.join("writable"))?;
        refused(
            OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(dir.join("readable")),
            Errno::ACCESS,
        )
    })?;
    ensure_eq!(fs::read(dir.join("readable"))?, b"x");
    ensure_eq!(fs::read(dir.join("writable"))?, b"xx");
    Ok(())
}

fn user_s_class_is_the_first_that_matches(dir: &Path) -> Outcome {
    // The owner has less than the group, the group less than the others.
    file_of(&dir.join("owner"), b"x", 0o044, (1000, 0))?;
    file_of(&dir.join("group"), b"x", 0o604, (0, 1000))?;
    file_of(&dir.join("others"), b"x", 0o660, (0, 0))?;
    as_user(ALICE, || {
        for name in ["owner", "group", "others"] {
            refused(fs::read(dir.join(name)), Errno::ACCESS)?;
        }
        Ok(())
    })?;
    as_user(BOB, || {
        fs::read(dir.join("owner"))?;
        fs::read(dir.join("group"))?;
        refused(fs::read(dir.join("others")), Errno::ACCESS)
    })
}

const IN_GROUPS: User = User {
    uid: 1000,
    gid: 1000,
    groups: &[2000, 3000, 4000],
};

fn user_reads_by_a_supplementary_group(dir: &Path) -> Outcome {
    for group in [2000, 3000, 4000, 5000] {
        file_of(&dir.join(group.to_string()), b"x", 0o640, (0, group))?;
    }
    as_user(IN_GROUPS, || {
        for group in ["2000", "3000", "4000"] {
            ensure_eq!(fs::read(dir.join(group))?, b"x");
            refused(write(&dir.join(group)), Errno::ACCESS)?;
        }
        refused(fs::read(dir.join("5000")), Errno::ACCESS)
    })?;
    as_user(ALICE, || refused(fs::read(dir.join("2000")), Errno::ACCESS))
}

fn user_writes_by_a_supplementary_group(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"x", 0o660, (0, 3000))?;
    as_user(IN_GROUPS, || {
        write(&path)?;
        read_write(&path)?.write_all_at(b"y", 2)?;
        rustix::fs::ftruncate(read_write(&path)?, 10)?;
        Ok(())
    })?;
    ensure_eq!(fs::read(&path)?, b"xxy\0\0\0\0\0\0\0");
    Ok(())
}

fn user_creates_where_only_a_supplementary_group_may(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o770, (0, 3000))?;
    as_user(IN_GROUPS, || {
        fs::write(folder.join("file"), b"x")?;
        fs::create_dir(folder.join("below"))?;
        std::os::unix::fs::symlink("file", folder.join("link"))?;
        mknodat(
            CWD,
            folder.join("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )?;
        fs::hard_link(folder.join("file"), folder.join("second"))?;
        fs::rename(folder.join("file"), folder.join("renamed"))?;
        ensure_eq!(fs::read(folder.join("link")).is_err(), true);
        fs::remove_file(folder.join("second"))?;
        Ok(())
    })?;
    for name in ["renamed", "below", "link", "fifo"] {
        let data = fs::symlink_metadata(folder.join(name))?;
        ensure_eq!((name, data.uid(), data.gid()), (name, 1000, 1000));
    }
    as_user(ALICE, || {
        refused(fs::write(folder.join("other"), b""), Errno::ACCESS)
    })
}

fn user_creates_what_the_user_owns(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o777, (0, 0))?;
    for user in [
        ALICE,
        BOB,
        User {
            uid: 1000,
            gid: 7777,
            groups: &[],
        },
    ] {
        let name = |kind: &str| folder.join(format!("{kind}-{}-{}", user.uid, user.gid));
        as_user(user, || {
            fs::write(name("file"), b"x")?;
            fs::create_dir(name("folder"))?;
            std::os::unix::fs::symlink("x", name("link"))?;
            mknodat(
                CWD,
                name("fifo"),
                FileType::Fifo,
                Mode::from_raw_mode(0o600),
                0,
            )?;
            std::os::unix::net::UnixListener::bind(name("socket"))?;
            Ok(())
        })?;
        for kind in ["file", "folder", "link", "fifo", "socket"] {
            let data = fs::symlink_metadata(name(kind))?;
            ensure_eq!((kind, data.uid(), data.gid()), (kind, user.uid, user.gid));
        }
    }
    // Root again, right after.
    fs::write(folder.join("root"), b"")?;
    ensure_eq!(fs::metadata(folder.join("root"))?.uid(), 0);
    Ok(())
}

fn user_s_umask_is_honoured(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o777, (0, 0))?;
    as_user(ALICE, || {
        for mask in [0o000, 0o022, 0o027, 0o077, 0o777] {
            let name = |kind: &str| folder.join(format!("{kind}-{mask:o}"));
            set_umask(mask);
            create_new(&name("file"), 0o666)?;
            create_new(&name("program"), 0o777)?;
            fs::create_dir(name("folder"))?;
            mknodat(
                CWD,
                name("fifo"),
                FileType::Fifo,
                Mode::from_raw_mode(0o666),
                0,
            )?;
            has_mode(&name("file"), 0o666 & !mask)?;
            has_mode(&name("program"), 0o777 & !mask)?;
            has_mode(&name("folder"), 0o777 & !mask)?;
            has_mode(&name("fifo"), 0o666 & !mask)?;
        }
        Ok(())
    })
}

fn folder_without_the_right_to_search_is_closed(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o744, (0, 0))?;
    file_of(&folder.join("file"), b"x", 0o666, (0, 0))?;
    as_user(ALICE, || {
        refused(fs::metadata(folder.join("file")), Errno::ACCESS)?;
        refused(fs::read(folder.join("file")), Errno::ACCESS)?;
        refused(fs::metadata(folder.join("missing")), Errno::ACCESS)?;
        refused(std::env::set_current_dir(&folder), Errno::ACCESS)?;
        // Its names can be had, as it may be read.
        ensure_eq!(fs::read_dir(&folder)?.count(), 1);
        Ok(())
    })
}

fn folder_without_the_right_to_read_is_not_listed(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o711, (0, 0))?;
    file_of(&folder.join("file"), b"x", 0o644, (0, 0))?;
    as_user(ALICE, || {
        refused(fs::read_dir(&folder), Errno::ACCESS)?;
        ensure_eq!(fs::read(folder.join("file"))?, b"x");
        refused(fs::metadata(folder.join("missing")), Errno::NOENT)
    })
}

fn folder_without_the_right_to_write_stays_as_it_is(dir: &Path) -> Outcome {
    let (folder, open) = (dir.join("folder"), dir.join("open"));
    folder_of(&folder, 0o755, (0, 0))?;
    folder_of(&open, 0o777, (0, 0))?;
    file_of(&folder.join("file"), b"x", 0o666, (1000, 1000))?;
    folder_of(&folder.join("below"), 0o777, (1000, 1000))?;
    as_user(ALICE, || {
        let file = folder.join("file");
        refused(fs::write(folder.join("new"), b""), Errno::ACCESS)?;
        refused(fs::create_dir(folder.join("new")), Errno::ACCESS)?;
        refused(
            std::os::unix::fs::symlink("x", folder.join("new")),
            Errno::ACCESS,
        )?;
        refused(fs::remove_file(&file), Errno::ACCESS)?;
        refused(fs::remove_dir(folder.join("below")), Errno::ACCESS)?;
        refused(fs::rename(&file, folder.join("new")), Errno::ACCESS)?;
        refused(fs::rename(&file, open.join("new")), Errno::ACCESS)?;
        refused(fs::hard_link(&file, folder.join("new")), Errno::ACCESS)?;
        // The file itself is the user's.
        fs::write(&file, b"changed")?;
        Ok(())
    })?;
    ensure_eq!(fs::read_dir(&folder)?.count(), 2);
    ensure_eq!(fs::read_dir(&open)?.count(), 0);
    Ok(())
}

fn sticky_folder_keeps_users_apart(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o1777, (0, 0))?;
    let (own, others) = (folder.join("own"), folder.join("others"));
    file_of(&own, b"x", 0o666, (1000, 1000))?;
    file_of(&others, b"x", 0o666, (1001, 1001))?;
    as_user(ALICE, || {
        let refusals = [Errno::PERM, Errno::ACCESS];
        refused_with_any(fs::remove_file(&others), &refusals)?;
        refused_with_any(fs::rename(&others, folder.join("new")), &refusals)?;
        refused_with_any(fs::rename(&own, &others), &refusals)?;
        fs::rename(&own, folder.join("new"))?;
        Ok(fs::remove_file(folder.join("new"))?)
    })?;
    as_user(BOB, || Ok(fs::remove_file(&others)?))
}

fn user_changes_no_mode_and_no_owner_of_others(dir: &Path) -> Outcome {
    let (others, own) = (dir.join("others"), dir.join("own"));
    file_of(&others, b"x", 0o666, (1001, 1001))?;
    file_of(&own, b"x", 0o600, (1000, 1000))?;
    as_user(ALICE, || {
        let mode = |mode| fs::Permissions::from_mode(mode);
        refused(fs::set_permissions(&others, mode(0o600)), Errno::PERM)?;
        refused(chown(&others, Some(1000), None), Errno::PERM)?;
        refused(chown(&own, Some(1001), None), Errno::PERM)?;
        refused(chown(&own, None, Some(1001)), Errno::PERM)?;
        fs::set_permissions(&own, mode(0o640))?;
        has_mode(&own, 0o640)?;
        Ok(())
    })?;
    has_mode(&others, 0o666)?;
    ensure_eq!(fs::metadata(&others)?.uid(), 1001);
    Ok(())
}

fn owner_may_give_a_file_to_an_own_group(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"x", 0o640, (1000, 1000))?;
    as_user(IN_GROUPS, || {
        chown(&path, None, Some(3000))?;
        ensure_eq!(fs::metadata(&path)?.gid(), 3000);
        refused(chown(&path, None, Some(5000)), Errno::PERM)
    })
}

fn user_sets_times_as_far_as_allowed(dir: &Path) -> Outcome {
    use rustix::fs::{Timespec, Timestamps, UTIME_NOW, utimensat};
    let set = |path: &Path, nanoseconds| {
        let when = Timespec {
            tv_sec: 1000,
            tv_nsec: nanoseconds,
        };
        let times = Timestamps {
            last_access: when,
            last_modification: when,
        };
        utimensat(CWD, path, &times, AtFlags::empty())
    };
    let (writable, readable, own) = (dir.join("writable"), dir.join("readable"), dir.join("own"));
    file_of(&writable, b"x", 0o666, (0, 0))?;
    file_of(&readable, b"x", 0o644, (0, 0))?;
    file_of(&own, b"x", 0o400, (1000, 1000))?;
    set(&writable, 0)?;
    as_user(ALICE, || {
        // Who may write may say that it has just been written, and nothing else.
        set(&writable, UTIME_NOW)?;
        refused(set(&writable, 5), Errno::PERM)?;
        refused(set(&readable, UTIME_NOW), Errno::ACCESS)?;
        refused(set(&readable, 5), Errno::PERM)?;
        Ok(set(&own, 5)?)
    })?;
    ensure_eq!(fs::metadata(&own)?.mtime(), 1000);
    ensure_eq!(fs::metadata(&writable)?.mtime() > 1000, true);
    Ok(())
}

fn file_created_read_only_is_written_through_its_handle(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o777, (0, 0))?;
    as_user(ALICE, || {
        for mode in [0o444, 0o400, 0o000] {
            let path = folder.join(format!("file-{mode:o}"));
            let mut file = create_new(&path, mode)?;
            file.write_all(b"written")?;
            let mut seen = [0; 7];
            file.read_exact_at(&mut seen, 0)?;
            ensure_eq!(seen, *b"written");
            rustix::fs::ftruncate(&file, 3)?;
            refused(OpenOptions::new().write(true).open(&path), Errno::ACCESS)?;
            has_mode(&path, mode)?;
        }
        Ok(())
    })
}

fn handle_stays_good_when_the_mode_changes(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"before", 0o600, (1000, 1000))?;
    as_user(ALICE, || {
        let mut file = read_write(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000))?;
        let mut seen = String::new();
        file.read_to_string(&mut seen)?;
        ensure_eq!(seen, "before");
        file.write_all(b" and after")?;
        rustix::fs::ftruncate(&file, 10)?;
        file.sync_all()?;
        refused(File::open(&path), Errno::ACCESS)
    })?;
    ensure_eq!(fs::read(&path)?, b"before and");
    Ok(())
}

fn handle_passed_to_another_user_stays_good(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"secret", 0o600, (0, 0))?;
    let file = read_write(&path)?;
    as_user(ALICE, || {
        refused(File::open(&path), Errno::ACCESS)?;
        let mut seen = [0; 6];
        file.read_exact_at(&mut seen, 0)?;
        ensure_eq!(seen, *b"secret");
        file.write_all_at(b"S", 0)?;
        Ok(rustix::fs::ftruncate(&file, 3)?)
    })?;
    ensure_eq!(fs::read(&path)?, b"Sec");
    Ok(())
}

fn access_tells_what_open_would_do(dir: &Path) -> Outcome {
    file_of(&dir.join("readable"), b"x", 0o644, (0, 0))?;
    file_of(&dir.join("group"), b"x", 0o640, (0, 3000))?;
    file_of(&dir.join("program"), b"x", 0o711, (0, 0))?;
    let access = |name: &str, wanted| accessat(CWD, dir.join(name), wanted, AtFlags::empty());
    as_user(IN_GROUPS, || {
        access("readable", Access::READ_OK)?;
        refused(access("readable", Access::WRITE_OK), Errno::ACCESS)?;
        refused(access("readable", Access::EXEC_OK), Errno::ACCESS)?;
        access("group", Access::READ_OK)?;
        access("program", Access::EXEC_OK)?;
        refused(access("program", Access::READ_OK), Errno::ACCESS)?;
        access("program", Access::EXISTS)?;
        refused(access("missing", Access::EXISTS), Errno::NOENT)
    })
}

fn program_without_the_right_to_execute_is_not_run(dir: &Path) -> Outcome {
    use std::process::Command;
    let path = dir.join("program");
    fs::copy("/proc/self/exe", &path)?;
    chown(&path, Some(1000), Some(1000))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    // Not even by root, if no execute bit is set.
    refused(Command::new(&path).arg("--list").output(), Errno::ACCESS)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o744))?;
    as_user(ALICE, || {
        ensure_eq!(
            Command::new(&path).arg("--list").output()?.status.success(),
            true
        );
        Ok(())
    })?;
    as_user(BOB, || {
        refused(Command::new(&path).arg("--list").output(), Errno::ACCESS)
    })
}

fn root_may_what_the_mode_forbids(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o000, (1000, 1000))?;
    let path = folder.join("file");
    file_of(&path, b"x", 0o000, (1000, 1000))?;
    ensure_eq!(fs::read(&path)?, b"x");
    write(&path)?;
    fs::write(folder.join("new"), b"")?;
    ensure_eq!(fs::metadata(folder.join("new"))?.uid(), 0);
    ensure_eq!(fs::read_dir(&folder)?.count(), 2);
    Ok(())
}

fn users_at_the_same_time_are_not_mixed_up(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o777, (0, 0))?;
    let rounds = size(50, 12);
    let mut children = Vec::new();
    for index in 0..4 {
        let user = User {
            uid: 1000 + index,
            gid: 2000 + index,
            groups: &[],
        };
        let folder = &folder;
        children.push(Child::start_as(user, move || {
            for round in 0..rounds {
                let path = folder.join(format!("file-{index}-{round}"));
                create_new(&path, 0o600)?.write_all(b"mine")?;
                let data = fs::metadata(&path)?;
                ensure_eq!((data.uid(), data.gid()), (user.uid, user.gid));
                ensure_eq!(fs::read(&path)?, b"mine");
                let others = folder.join(format!("file-{}-{round}", (index + 1) % 4));
                refused_with_any(File::open(&others), &[Errno::ACCESS, Errno::NOENT])?;
            }
            Ok(())
        })?);
    }
    for child in children {
        child.join()?;
    }
    ensure_eq!(fs::read_dir(&folder)?.count(), 4 * rounds);
    Ok(())
}
