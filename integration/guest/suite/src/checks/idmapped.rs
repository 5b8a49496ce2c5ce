//! Mounts whose owners are mapped by a user namespace, as container runtimes make them for
//! containers that have one. Invariant: what is seen through such a mount is compared with what is
//! seen beside it.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, FileType, Mode, mknodat};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Failure, Outcome, ensure_eq, if_supported, refused};
use crate::fixture::{self, create_new, file_of, folder_of, has_mode, read_write};
use crate::namespace::{Mapped, Namespace, Range};
use crate::process::{User, as_user};

checks![
    mapped_mount_shows_mapped_owners,
    what_is_made_through_a_mapped_mount_has_mapped_owners,
    change_of_owner_through_a_mapped_mount_is_mapped,
    permissions_go_by_mapped_owners,
    set_id_bits_are_cleared_through_a_mapped_mount,
    root_keeps_the_set_id_bits_through_a_mapped_mount,
    root_of_a_container_uses_a_mapped_mount,
    root_of_a_container_that_is_another_user_keeps_set_group_id,
];

/// The ids of a container: 0 there is this one here.
const BASE: u32 = 100_000;

const ALL: Range = Range {
    inside: 0,
    outside: BASE,
    // A server of an ordinary user has a few more ids, of nobody in the container.
    count: 60_000,
};

/// User 1000 of the container.
const CONTAINED: User = User {
    uid: BASE + 1000,
    gid: BASE + 1000,
    groups: &[],
};

fn container() -> Result<Namespace, Failure> {
    Namespace::new(&[ALL], &[ALL])
}

/// The mount, or `None` where the kernel has none of this kind for the file system: of FUSE before
/// Linux 6.12.
fn mapped(namespace: &Namespace, dir: &Path) -> Result<Option<Mapped>, Failure> {
    const FUSE: i64 = 0x6573_5546;
    match namespace.mount(dir) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let fuse = i128::from(rustix::fs::statfs(dir)?.f_type) == i128::from(FUSE);
            if fuse && kernel()? >= (6, 12) {
                return Err(Failure::new(
                    "this kernel could map owners, but the server can't",
                ));
            }
            Ok(None)
        }
        mount => Ok(Some(mount?)),
    }
}

fn kernel() -> Result<(u32, u32), Failure> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    let mut number = || numbers.next().and_then(|number| number.parse().ok());
    number()
        .zip(number())
        .ok_or_else(|| Failure::new(format_args!("no release: {release}")))
}

fn owner(path: &Path) -> Result<(u32, u32), Failure> {
    let data = fs::symlink_metadata(path)?;
    Ok((data.uid(), data.gid()))
}

fn mapped_mount_shows_mapped_owners(dir: &Path) -> Outcome {
    let Some(mount) = mapped(&container()?, dir)? else {
        return Ok(());
    };
    for (name, uid, gid, shown) in [
        ("root", 0, 0, (BASE, BASE)),
        ("user", 1000, 2000, (BASE + 1000, BASE + 2000)),
        // Nobody in the container.
        ("other", 60_500, 61_000, (65_534, 65_534)),
    ] {
        file_of(&dir.join(name), b"x", 0o644, (uid, gid))?;
        ensure_eq!((name, owner(&mount.join(name))?), (name, shown));
        ensure_eq!((name, owner(&dir.join(name))?), (name, (uid, gid)));
        // Again by what is open, and in the list of the folder.
        let data = fs::File::open(mount.join(name))?.metadata()?;
        ensure_eq!((name, data.uid(), data.gid()), (name, shown.0, shown.1));
    }
    for entry in fs::read_dir(mount.join("."))? {
        let entry = entry?;
        let (beside, shown) = (owner(&dir.join(entry.file_name()))?, entry.metadata()?);
        ensure_eq!(beside.0 == 60_500, shown.uid() == 65_534);
    }
    Ok(())
}

fn what_is_made_through_a_mapped_mount_has_mapped_owners(dir: &Path) -> Outcome {
    let Some(mount) = mapped(&container()?, dir)? else {
        return Ok(());
    };
    folder_of(&dir.join("folder"), 0o777, (0, 0))?;
    folder_of(&dir.join("inherits"), 0o2777, (0, 3000))?;
    let names = ["file", "below", "link", "fifo", "renamed"];
    for (folder, gid) in [("folder", 1000), ("inherits", 3000)] {
        let through = mount.join(folder);
        as_user(CONTAINED, || {
            fs::write(through.join("file"), b"content")?;
            fs::create_dir(through.join("below"))?;
            symlink("file", through.join("link"))?;
            let mode = Mode::from_raw_mode(0o600);
            mknodat(CWD, through.join("fifo"), FileType::Fifo, mode, 0)?;
            fs::write(through.join("before"), b"content")?;
            fs::hard_link(through.join("before"), through.join("second"))?;
            fs::rename(through.join("before"), through.join("renamed"))?;
            fs::remove_file(through.join("second"))?;
            ensure_eq!(fs::read(through.join("link"))?, b"content");
            Ok(())
        })?;
        for name in names {
            let found = owner(&dir.join(folder).join(name))?;
            ensure_eq!((name, found), (name, (1000, gid)));
            let shown = owner(&through.join(name))?;
            ensure_eq!((name, shown), (name, (BASE + 1000, BASE + gid)));
        }
    }
    // Who has no id there makes nothing.
    refused(fs::write(mount.join("folder/roots"), b""), Errno::OVERFLOW)?;
    refused(fs::create_dir(mount.join("folder/roots")), Errno::OVERFLOW)?;
    // Beside it all is as ever.
    fs::write(dir.join("folder/roots"), b"")?;
    ensure_eq!(owner(&dir.join("folder/roots"))?, (0, 0));
    Ok(())
}

fn change_of_owner_through_a_mapped_mount_is_mapped(dir: &Path) -> Outcome {
    let Some(mount) = mapped(&container()?, dir)? else {
        return Ok(());
    };
    file_of(&dir.join("file"), b"x", 0o644, (0, 0))?;
    symlink("file", dir.join("link"))?;
    chown(mount.join("file"), Some(BASE + 5), Some(BASE + 6))?;
    ensure_eq!(owner(&dir.join("file"))?, (5, 6));
    lchown(mount.join("link"), Some(BASE + 7), None)?;
    ensure_eq!(owner(&dir.join("link"))?, (7, 0));
    refused(chown(mount.join("file"), Some(8), None), Errno::OVERFLOW)?;
    ensure_eq!(owner(&dir.join("file"))?, (5, 6));
    Ok(())
}

fn permissions_go_by_mapped_owners(dir: &Path) -> Outcome {
    let Some(mount) = mapped(&container()?, dir)? else {
        return Ok(());
    };
    file_of(&dir.join("own"), b"x", 0o600, (1000, 1000))?;
    file_of(&dir.join("group"), b"x", 0o060, (0, 1000))?;
    file_of(&dir.join("roots"), b"x", 0o600, (0, 0))?;
    as_user(CONTAINED, || {
        fs::write(mount.join("own"), b"mine")?;
        fs::set_permissions(mount.join("own"), fs::Permissions::from_mode(0o400))?;
        fs::write(mount.join("group"), b"ours")?;
        refused(fs::read(mount.join("roots")), Errno::ACCESS)?;
        refused(fs::read(dir.join("own")), Errno::ACCESS)
    })?;
    has_mode(&dir.join("own"), 0o400)?;
    let user = User {
        uid: 1000,
        gid: 1000,
        groups: &[],
    };
    as_user(user, || refused(fs::read(mount.join("own")), Errno::ACCESS))
}

fn set_id_bits_are_cleared_through_a_mapped_mount(dir: &Path) -> Outcome {
    let Some(mount) = mapped(&container()?, dir)? else {
        return Ok(());
    };
    type Act = fn(&Path) -> Outcome;
    let acts: [(&str, Act); 4] = [
        ("write", |path| Ok(read_write(path)?.write_all_at(b"P", 0)?)),
        ("truncate", |path| {
            Ok(rustix::fs::ftruncate(read_write(path)?, 3)?)
        }),
        ("empty", |path| Ok(fs::write(path, b"")?)),
        ("allocate", |path| {
            let plain = FallocateFlags::empty();
            let done = rustix::fs::fallocate(read_write(path)?, plain, 0, 100);
            if if_supported(done)?.is_none() {
                // Nothing has happened then; a write is to.
                read_write(path)?.write_all_at(b"P", 0)?;
            }
            Ok(())
        }),
    ];
    for (name, act) in acts {
        let path = dir.join(name);
        file_of(&path, b"program", 0o6777, (0, 0))?;
        as_user(CONTAINED, || act(&mount.join(name)))?;
        has_mode(&path, 0o777)?;
    }
    // A change of owner clears them too, for every user.
    file_of(&dir.join("given"), b"program", 0o6777, (0, 0))?;
    chown(mount.join("given"), Some(BASE + 1000), None)?;
    has_mode(&dir.join("given"), 0o777)
}

fn root_keeps_the_set_id_bits_through_a_mapped_mount(dir: &Path) -> Outcome {
    let Some(mount) = mapped(&container()?, dir)? else {
        return Ok(());
    };
    file_of(&dir.join("file"), b"program", 0o6777, (0, 0))?;
    read_write(&mount.join("file"))?.write_all_at(b"P", 0)?;
    let kept = if fixture::in_user_namespace() {
        0o777
    } else {
        0o6777
    };
    has_mode(&dir.join("file"), kept)
}

fn root_of_a_container_uses_a_mapped_mount(dir: &Path) -> Outcome {
    let container = container()?;
    let Some(mount) = mapped(&container, dir)? else {
        return Ok(());
    };
    folder_of(&dir.join("folder"), 0o755, (0, 0))?;
    file_of(&dir.join("set-id"), b"program", 0o6755, (0, 0))?;
    let folder = mount.join("folder");
    container.as_root(|| {
        fs::write(folder.join("file"), b"content")?;
        fs::create_dir(folder.join("below"))?;
        ensure_eq!(owner(&folder.join("file"))?, (0, 0));
        chown(folder.join("file"), Some(1000), Some(2000))?;
        ensure_eq!(owner(&folder.join("file"))?, (1000, 2000));
        refused(chown(folder.join("file"), Some(60_500), None), Errno::INVAL)?;
        let mode = fs::Permissions::from_mode(0o4755);
        fs::set_permissions(folder.join("file"), mode)?;
        // It is no superuser of the machine.
        read_write(&mount.join("set-id"))?.write_all_at(b"P", 0)?;
        Ok(())
    })?;
    ensure_eq!(owner(&dir.join("folder/file"))?, (1000, 2000));
    ensure_eq!(owner(&dir.join("folder/below"))?, (0, 0));
    has_mode(&dir.join("folder/file"), 0o4755)?;
    has_mode(&dir.join("set-id"), 0o755)
}

fn root_of_a_container_that_is_another_user_keeps_set_group_id(dir: &Path) -> Outcome {
    let one = |inside, outside| Range {
        inside,
        outside,
        count: 1,
    };
    let groups = [one(1000, BASE), one(3000, BASE + 3000)];
    let mapping = Namespace::new(&[one(1000, BASE)], &groups)?;
    let Some(mount) = mapped(&mapping, dir)? else {
        return Ok(());
    };
    folder_of(&dir.join("folder"), 0o2777, (1000, 3000))?;
    container()?.as_root(|| {
        create_new(&mount.join("folder/program"), 0o2755)?;
        Ok(())
    })?;
    let made = dir.join("folder/program");
    ensure_eq!(owner(&made)?, (1000, 3000));
    has_mode(&made, 0o2755)?;
    // An ordinary user who isn't in the group may not have it so.
    let stranger = User {
        uid: BASE,
        gid: BASE,
        groups: &[],
    };
    as_user(stranger, || {
        create_new(&mount.join("folder/another"), 0o2755)?;
        Ok(())
    })?;
    ensure_eq!(owner(&dir.join("folder/another"))?, (1000, 3000));
    has_mode(&dir.join("folder/another"), 0o755)
}
