//! The set-user-ID and set-group-ID bits: when they must be cleared, and what they mean on a
//! folder. Invariant: what a user does is done by a child that has become that user.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use super::checks;
use crate::failure::{Outcome, ensure_eq};
use crate::fixture::{self, create_new, file_of, folder_of, has_mode, read_write};
use crate::process::{ALICE, User, as_user};

checks![
    write_by_a_user_clears_the_set_id_bits,
    truncation_by_a_user_clears_the_set_id_bits,
    allocation_by_a_user_clears_the_set_id_bits,
    write_by_root_keeps_the_set_id_bits,
    change_of_owner_clears_the_set_id_bits,
    group_bit_without_execute_is_no_set_id_bit,
    set_group_id_folder_hands_on_its_group,
    set_group_id_is_dropped_for_a_group_that_is_not_one_s_own,
    set_group_id_file_of_another_group_is_not_created,
];

const BITS: u32 = 0o6777;

fn write_by_a_user_clears_the_set_id_bits(dir: &Path) -> Outcome {
    for (name, mode, left) in [
        ("both", BITS, 0o777),
        ("user", 0o4777, 0o777),
        ("group", 0o2777, 0o777),
        ("sticky", 0o1777, 0o1777),
    ] {
        let path = dir.join(name);
        file_of(&path, b"program", mode, (0, 0))?;
        as_user(ALICE, || {
            let file = read_write(&path)?;
            has_mode(&path, mode)?;
            file.write_all_at(b"P", 0)?;
            has_mode(&path, left)?;
            Ok(())
        })?;
        has_mode(&path, left)?;
    }
    // The owner is no exception.
    let own = dir.join("own");
    file_of(&own, b"program", 0o4755, (1000, 1000))?;
    as_user(ALICE, || Ok(read_write(&own)?.write_all_at(b"P", 0)?))?;
    has_mode(&own, 0o755)?;
    Ok(())
}

fn truncation_by_a_user_clears_the_set_id_bits(dir: &Path) -> Outcome {
    let (by_handle, by_open) = (dir.join("handle"), dir.join("open"));
    file_of(&by_handle, b"program", BITS, (0, 0))?;
    file_of(&by_open, b"program", BITS, (0, 0))?;
    as_user(ALICE, || {
        rustix::fs::ftruncate(read_write(&by_handle)?, 3)?;
        Ok(fs::write(&by_open, b"")?)
    })?;
    has_mode(&by_handle, 0o777)?;
    has_mode(&by_open, 0o777)?;
    Ok(())
}

fn allocation_by_a_user_clears_the_set_id_bits(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"program", BITS, (0, 0))?;
    let plain = rustix::fs::FallocateFlags::empty();
    as_user(ALICE, || {
        let done = rustix::fs::fallocate(read_write(&path)?, plain, 0, 100);
        crate::failure::if_supported(done).map(drop)
    })?;
    // Where it is not supported nothing has happened.
    if fs::metadata(&path)?.len() > 7 {
        has_mode(&path, 0o777)?;
    }
    Ok(())
}

fn write_by_root_keeps_the_set_id_bits(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"program", BITS, (0, 0))?;
    read_write(&path)?.write_all_at(b"P", 0)?;
    let kept = if fixture::in_user_namespace() {
        0o777
    } else {
        BITS
    };
    has_mode(&path, kept)?;
    Ok(())
}

fn change_of_owner_clears_the_set_id_bits(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"program", BITS, (0, 0))?;
    chown(&path, Some(1000), None)?;
    has_mode(&path, 0o777)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(BITS))?;
    chown(&path, None, Some(1000))?;
    has_mode(&path, 0o777)?;
    // A folder's bits stay.
    let folder = dir.join("folder");
    folder_of(&folder, 0o2777, (0, 0))?;
    chown(&folder, Some(1000), Some(1000))?;
    has_mode(&folder, 0o2777)?;
    Ok(())
}

fn group_bit_without_execute_is_no_set_id_bit(dir: &Path) -> Outcome {
    let path = dir.join("file");
    file_of(&path, b"data", 0o2666, (1000, 1000))?;
    as_user(ALICE, || Ok(read_write(&path)?.write_all_at(b"D", 0)?))?;
    has_mode(&path, 0o2666)?;
    // Nor is it for who is in the file's group, by whatever membership.
    let others = dir.join("others");
    file_of(&others, b"data", 0o2666, (0, 3000))?;
    let member = User {
        groups: &[3000],
        ..ALICE
    };
    for (user, path) in [(ALICE, &path), (member, &others)] {
        as_user(user, || Ok(fs::write(path, b"")?))?;
        has_mode(path, 0o2666)?;
    }
    Ok(())
}

fn set_group_id_folder_hands_on_its_group(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o2777, (0, 3000))?;
    as_user(ALICE, || {
        fs::write(folder.join("file"), b"")?;
        fs::create_dir(folder.join("below"))?;
        fs::write(folder.join("below/file"), b"")?;
        std::os::unix::fs::symlink("x", folder.join("link"))?;
        Ok(())
    })?;
    for name in ["file", "below", "below/file", "link"] {
        let data = fs::symlink_metadata(folder.join(name))?;
        ensure_eq!((name, data.uid(), data.gid()), (name, 1000, 3000));
    }
    has_mode(&folder.join("below"), 0o2755)?;
    has_mode(&folder.join("file"), 0o644)?;
    Ok(())
}

fn set_group_id_is_dropped_for_a_group_that_is_not_one_s_own(dir: &Path) -> Outcome {
    let (others, own) = (dir.join("others"), dir.join("own"));
    file_of(&others, b"x", 0o755, (1000, 3000))?;
    file_of(&own, b"x", 0o755, (1000, 1000))?;
    as_user(ALICE, || {
        fs::set_permissions(&others, fs::Permissions::from_mode(0o2755))?;
        has_mode(&others, 0o755)?;
        fs::set_permissions(&own, fs::Permissions::from_mode(0o2755))?;
        has_mode(&own, 0o2755)?;
        Ok(())
    })?;
    let member = User {
        groups: &[3000],
        ..ALICE
    };
    as_user(member, || {
        fs::set_permissions(&others, fs::Permissions::from_mode(0o2755))?;
        has_mode(&others, 0o2755)?;
        Ok(())
    })
}

fn set_group_id_file_of_another_group_is_not_created(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    folder_of(&folder, 0o2777, (0, 3000))?;
    as_user(ALICE, || {
        create_new(&folder.join("program"), 0o2755)?;
        let data = fs::metadata(folder.join("program"))?;
        ensure_eq!((data.gid(), data.mode() & 0o7777), (3000, 0o755));
        Ok(())
    })
}
