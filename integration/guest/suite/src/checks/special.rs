//! Inodes other than plain files and folders, and calls that a file system may decline: these may
//! be refused, and must never do half of what was requested. Invariant: none.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, linkat, makedev, mknodat};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure, ensure_eq, if_supported, refused};
use crate::fixture::{self, path_of_descriptor};
use crate::process::{ALICE, Child, as_user};

checks![
    fifo_connects_two_processes,
    socket_is_bound_and_connected_to,
    device_nodes_have_their_numbers_and_work,
    node_of_every_kind_is_made,
    device_node_is_not_made_by_a_user,
    unnamed_file_works_or_is_refused,
    inode_flags_are_told_or_refused,
    clone_of_a_file_is_whole_or_refused,
    changes_are_seen_by_inotify,
];

fn node(path: &Path, kind: FileType, device: u64) -> rustix::io::Result<()> {
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o666), device)
}

fn fifo_connects_two_processes(dir: &Path) -> Outcome {
    let path = dir.join("fifo");
    node(&path, FileType::Fifo, 0)?;
    ensure!(fs::metadata(&path)?.file_type().is_fifo(), "no fifo");
    let writer = Child::start(|| {
        let mut fifo = OpenOptions::new().write(true).open(&path)?;
        for round in 0..100 {
            writeln!(fifo, "line {round}")?;
        }
        Ok(())
    })?;
    let mut said = String::new();
    File::open(&path)?.read_to_string(&mut said)?;
    writer.join()?;
    ensure_eq!(said.lines().count(), 100);
    ensure_eq!(said.lines().last(), Some("line 99"));
    let reading = OFlags::WRONLY | OFlags::NONBLOCK;
    refused(rustix::fs::open(&path, reading, Mode::empty()), Errno::NXIO)
}

fn socket_is_bound_and_connected_to(dir: &Path) -> Outcome {
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path)?;
    ensure!(fs::metadata(&path)?.file_type().is_socket(), "no socket");
    refused(UnixListener::bind(&path), Errno::ADDRINUSE)?;
    let client = Child::start(|| Ok(UnixStream::connect(&path)?.write_all(b"hello")?))?;
    let mut said = String::new();
    listener.accept()?.0.read_to_string(&mut said)?;
    client.join()?;
    ensure_eq!(said, "hello");
    refused(File::open(&path), Errno::NXIO)?;
    drop(listener);
    refused(UnixStream::connect(&path), Errno::CONNREFUSED)
}

fn device_nodes_have_their_numbers_and_work(dir: &Path) -> Outcome {
    let (null, zero, disk) = (dir.join("null"), dir.join("zero"), dir.join("disk"));
    if fixture::in_user_namespace() {
        refused(
            node(&null, FileType::CharacterDevice, makedev(1, 3)),
            Errno::PERM,
        )?;
        ensure_eq!(fs::read_dir(dir)?.count(), 0);
        return Ok(());
    }
    node(&null, FileType::CharacterDevice, makedev(1, 3))?;
    node(&zero, FileType::CharacterDevice, makedev(1, 5))?;
    node(&disk, FileType::BlockDevice, makedev(0x123, 0x4_5678))?;
    ensure_eq!(fs::metadata(&null)?.rdev(), makedev(1, 3));
    ensure_eq!(fs::metadata(&disk)?.rdev(), makedev(0x123, 0x4_5678));
    ensure!(
        fs::metadata(&disk)?.file_type().is_block_device(),
        "no block device"
    );
    // It is this machine's device that opens, unless the mount forbids it.
    match File::open(&zero) {
        Ok(file) => {
            let mut bytes = [1; 16];
            ensure_eq!((&file).read(&mut bytes)?, 16);
            ensure_eq!(bytes, [0; 16]);
            OpenOptions::new()
                .write(true)
                .open(&null)?
                .write_all(b"gone")?;
        }
        refusal => refused(refusal, Errno::ACCESS)?,
    }
    ensure_eq!(fs::metadata(&null)?.len(), 0);
    Ok(())
}

fn node_of_every_kind_is_made(dir: &Path) -> Outcome {
    for (name, kind) in [
        ("file", FileType::RegularFile),
        ("fifo", FileType::Fifo),
        ("socket", FileType::Socket),
    ] {
        let path = dir.join(name);
        node(&path, kind, 0)?;
        let mode = rustix::fs::lstat(&path)?.st_mode;
        ensure_eq!((name, FileType::from_raw_mode(mode)), (name, kind));
        ensure_eq!((name, mode & 0o7777), (name, 0o644));
        refused(node(&path, kind, 0), Errno::EXIST)?;
    }
    fs::write(dir.join("file"), b"a plain file")?;
    ensure_eq!(fs::read(dir.join("file"))?, b"a plain file");
    Ok(())
}

fn device_node_is_not_made_by_a_user(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    fixture::folder_of(&folder, 0o777, (0, 0))?;
    as_user(ALICE, || {
        let made = node(
            &folder.join("null"),
            FileType::CharacterDevice,
            makedev(1, 3),
        );
        refused(made, Errno::PERM)?;
        Ok(node(&folder.join("fifo"), FileType::Fifo, 0)?)
    })?;
    ensure_eq!(fs::read_dir(&folder)?.count(), 1);
    Ok(())
}

fn unnamed_file_works_or_is_refused(dir: &Path) -> Outcome {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let opened = rustix::fs::open(dir, flags, Mode::from_raw_mode(0o600));
    ensure_eq!(fs::read_dir(dir)?.count(), 0);
    // A kernel that knows nothing of it opens the folder for writing, and that is an error too.
    if opened.as_ref().is_err_and(|error| *error == Errno::ISDIR) {
        return Ok(());
    }
    let Some(file) = if_supported(opened)? else {
        return Ok(());
    };
    let file = File::from(file);
    file.write_all_at(b"unnamed", 0)?;
    ensure_eq!(file.metadata()?.nlink(), 0);
    let mut seen = [0; 7];
    file.read_exact_at(&mut seen, 0)?;
    ensure_eq!(seen, *b"unnamed");
    ensure_eq!(fs::read_dir(dir)?.count(), 0);
    let (descriptor, name) = (path_of_descriptor(&file), dir.join("named"));
    linkat(CWD, &descriptor, CWD, &name, AtFlags::SYMLINK_FOLLOW)?;
    ensure_eq!(fs::read(&name)?, b"unnamed");
    ensure_eq!(file.metadata()?.nlink(), 1);
    Ok(())
}

fn inode_flags_are_told_or_refused(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    let file = File::open(&path)?;
    if let Some(flags) = if_supported(rustix::fs::ioctl_getflags(&file))? {
        ensure!(
            !flags.contains(rustix::fs::IFlags::IMMUTABLE),
            "a new file can't be changed"
        );
    }
    Ok(fs::write(&path, b"y")?)
}

fn clone_of_a_file_is_whole_or_refused(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("to"));
    let content = fixture::Noise::bytes(1, 100_000);
    fs::write(&from, &content)?;
    let target = fixture::read_write(&to)?;
    match rustix::fs::ioctl_ficlone(&target, File::open(&from)?) {
        Ok(()) => ensure!(
            fs::read(&to)? == content,
            "other bytes than those of the source"
        ),
        Err(error) => {
            let honest = [
                Errno::OPNOTSUPP,
                Errno::NOTTY,
                Errno::NOSYS,
                Errno::INVAL,
                Errno::XDEV,
            ];
            ensure!(honest.contains(&error), "refused with {error}");
            ensure_eq!(fs::metadata(&to)?.len(), 0);
        }
    }
    // What cp does then.
    fs::copy(&from, &to)?;
    ensure!(
        fs::read(&to)? == content,
        "other bytes than those of the source"
    );
    Ok(())
}

fn changes_are_seen_by_inotify(dir: &Path) -> Outcome {
    use rustix::fs::inotify;
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK)?;
    let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::DELETE;
    inotify::add_watch(&watch, dir, events | inotify::WatchFlags::CLOSE_WRITE)?;
    fs::write(dir.join("file"), b"x")?;
    fs::remove_file(dir.join("file"))?;
    let mut buffer = [std::mem::MaybeUninit::uninit(); 1024];
    let mut reader = inotify::Reader::new(&watch, &mut buffer);
    for wanted in [
        inotify::ReadFlags::CREATE,
        inotify::ReadFlags::CLOSE_WRITE,
        inotify::ReadFlags::DELETE,
    ] {
        let event = reader.next()?;
        ensure_eq!(event.events(), wanted);
        ensure_eq!(event.file_name(), Some(c"file"));
    }
    Ok(())
}
