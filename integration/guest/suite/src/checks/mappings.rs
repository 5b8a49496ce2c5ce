//! Files mapped into memory: shared, private, truncated while mapped, run as a program. Invariant:
//! what must end in a signal is done by a child.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure, ensure_eq, refused};
use crate::fixture::{Noise, read_write};
use crate::process::{Baton, Child};
use crate::region::Region;

checks![
    shared_mapping_shows_what_the_file_has,
    write_through_a_shared_mapping_is_read_back,
    write_through_a_shared_mapping_is_there_after_reopening,
    write_by_call_is_seen_in_a_shared_mapping,
    private_mapping_leaves_the_file_as_it_was,
    two_processes_share_a_mapping,
    mapping_outlives_handle_and_name,
    read_only_handle_gives_no_writable_shared_mapping,
    access_beyond_the_end_is_a_bus_error,
    file_cut_short_while_mapped_is_a_bus_error_behind_the_cut,
    file_grown_while_mapped_shows_zeros,
    program_in_the_share_can_be_run,
];

const PAGE: usize = 4096;

fn shared_mapping_shows_what_the_file_has(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(1, 20 * PAGE + 123);
    fs::write(&path, &content)?;
    let region = Region::read_only(File::open(&path)?, content.len())?;
    ensure!(
        region.bytes(0, content.len()) == content,
        "other bytes than those written"
    );
    let last = Region::read_only(File::open(&path)?, 21 * PAGE)?;
    ensure!(
        last.bytes(20 * PAGE + 123, PAGE - 123)
            .iter()
            .all(|b| *b == 0),
        "no zeros at the end"
    );
    Ok(())
}

fn write_through_a_shared_mapping_is_read_back(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut content = Noise::bytes(2, 10 * PAGE);
    fs::write(&path, &content)?;
    let file = read_write(&path)?;
    let region = Region::shared(&file, content.len())?;
    for at in [0, 100, PAGE - 3, 5 * PAGE + 7, 10 * PAGE - 6] {
        region.write(at, b"mapped");
        content[at..at + 6].copy_from_slice(b"mapped");
    }
    region.sync()?;
    ensure!(
        fs::read(&path)? == content,
        "what was written by the mapping is not read"
    );
    Ok(())
}

fn write_through_a_shared_mapping_is_there_after_reopening(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(3, 6 * PAGE);
    let file = read_write(&path)?;
    rustix::fs::ftruncate(&file, u64::try_from(content.len())?)?;
    let region = Region::shared(&file, content.len())?;
    region.write(0, &content);
    // Without a sync: closing it all has to do.
    drop(region);
    drop(file);
    let file = File::open(&path)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut seen = vec![0; content.len()];
    file.read_exact_at(&mut seen, 0)?;
    ensure!(
        seen == content,
        "what was written by the mapping is not there"
    );
    Ok(())
}

fn write_by_call_is_seen_in_a_shared_mapping(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, vec![b'.'; 4 * PAGE])?;
    let file = read_write(&path)?;
    let region = Region::shared(&file, 4 * PAGE)?;
    for at in [0, PAGE - 2, 3 * PAGE] {
        ensure_eq!(region.byte(at), b'.');
        read_write(&path)?.write_all_at(b"call", u64::try_from(at)?)?;
        ensure_eq!(region.bytes(at, 4), b"call");
    }
    Ok(())
}

fn private_mapping_leaves_the_file_as_it_was(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(4, 3 * PAGE);
    fs::write(&path, &content)?;
    let region = Region::private(File::open(&path)?, content.len())?;
    region.write(PAGE - 3, b"mine only");
    ensure_eq!(region.bytes(PAGE - 3, 9), b"mine only");
    ensure!(
        region.bytes(2 * PAGE, PAGE) == content[2 * PAGE..],
        "other bytes in the mapping"
    );
    drop(region);
    ensure!(fs::read(&path)? == content, "the file was changed");
    Ok(())
}

fn two_processes_share_a_mapping(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, vec![0; 2 * PAGE])?;
    let (there, back) = (Baton::new()?, Baton::new()?);
    let child = Child::start(|| {
        let region = Region::shared(read_write(&path)?, 2 * PAGE)?;
        for round in 1..=50 {
            there.wait()?;
            ensure_eq!(region.byte(PAGE), round);
            region.write(7, &[round]);
            back.pass()?;
        }
        Ok(())
    })?;
    let region = Region::shared(read_write(&path)?, 2 * PAGE)?;
    for round in 1..=50 {
        region.write(PAGE, &[round]);
        there.pass()?;
        back.wait()?;
        ensure_eq!(region.byte(7), round);
    }
    child.join()
}

fn mapping_outlives_handle_and_name(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(5, 8 * PAGE);
    fs::write(&path, &content)?;
    let file = read_write(&path)?;
    let region = Region::shared(&file, content.len())?;
    drop(file);
    fs::remove_file(&path)?;
    ensure!(
        region.bytes(0, content.len()) == content,
        "other bytes than those written"
    );
    region.write(3 * PAGE, b"still");
    region.sync()?;
    ensure_eq!(region.bytes(3 * PAGE, 5), b"still");
    Ok(())
}

fn read_only_handle_gives_no_writable_shared_mapping(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, vec![1; PAGE])?;
    refused(Region::shared(File::open(&path)?, PAGE), Errno::ACCESS)?;
    let write_only = OpenOptions::new().write(true).open(&path)?;
    refused(Region::read_only(write_only, PAGE), Errno::ACCESS)
}

fn access_beyond_the_end_is_a_bus_error(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, vec![1; PAGE + 1])?;
    let child = Child::start(|| {
        let region = Region::read_only(File::open(&path)?, 4 * PAGE)?;
        ensure_eq!(region.byte(PAGE), 1);
        ensure_eq!(region.byte(2 * PAGE), 0);
        Ok(())
    })?;
    ensure_eq!(child.signal()?, Some(libc::SIGBUS));
    Ok(())
}

fn file_cut_short_while_mapped_is_a_bus_error_behind_the_cut(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, vec![1; 4 * PAGE])?;
    let file = read_write(&path)?;
    let region = Region::shared(&file, 4 * PAGE)?;
    ensure_eq!(region.byte(3 * PAGE), 1);
    region.write(PAGE + 200, b"behind");
    rustix::fs::ftruncate(&file, 4096 + 100)?;
    ensure_eq!(region.byte(PAGE + 99), 1);
    ensure_eq!(region.bytes(PAGE + 100, 200), [0; 200]);
    let child = Child::start(|| {
        ensure_eq!(region.byte(3 * PAGE), 1);
        Ok(())
    })?;
    ensure_eq!(child.signal()?, Some(libc::SIGBUS));
    // Grown again, it has zeros where it was cut.
    rustix::fs::ftruncate(&file, 4 * 4096)?;
    ensure_eq!(region.byte(3 * PAGE), 0);
    let content = fs::read(&path)?;
    ensure!(
        content[PAGE + 100..].iter().all(|b| *b == 0),
        "old bytes behind the cut"
    );
    Ok(())
}

fn file_grown_while_mapped_shows_zeros(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, vec![1; PAGE])?;
    let file = read_write(&path)?;
    let region = Region::shared(&file, 8 * PAGE)?;
    rustix::fs::ftruncate(&file, 8 * 4096)?;
    ensure!(
        region.bytes(PAGE, 7 * PAGE).iter().all(|b| *b == 0),
        "no zeros"
    );
    region.write(6 * PAGE, b"new");
    region.sync()?;
    ensure_eq!(fs::read(&path)?[6 * PAGE..6 * PAGE + 3], *b"new");
    Ok(())
}

fn program_in_the_share_can_be_run(dir: &Path) -> Outcome {
    let path = dir.join("program");
    fs::copy("/proc/self/exe", &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let output = Command::new(&path).arg("--list").output()?;
    ensure!(output.status.success(), "it ended with {}", output.status);
    let listed = String::from_utf8(output.stdout)?;
    ensure_eq!(listed.lines().count(), super::all().count());
    // While it may be mapped by a process, another one replaces it.
    fs::write(dir.join("new"), b"#!/proc/self/exe\n")?;
    fs::rename(dir.join("new"), &path)?;
    ensure_eq!(fs::metadata(&path)?.len(), 17);
    Ok(())
}
