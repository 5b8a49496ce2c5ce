//! Threads and processes that use the same files and folders at the same time. Invariant: what is
//! checked holds in any order of events.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::checks;
use crate::failure::{Failure, Outcome, ensure, ensure_eq};
use crate::fixture::{Noise, create_new, read_write, size};
use crate::process::Child;

checks![
    appending_writers_lose_nothing,
    parallel_creates_in_one_folder_all_succeed,
    parallel_exclusive_creates_have_one_winner,
    parallel_folders_of_one_name_have_one_winner,
    parallel_writers_of_one_file_keep_to_their_places,
    parallel_readers_of_one_file_read_the_same,
    parallel_renames_to_one_name_leave_one_file,
    parallel_links_and_removals_keep_the_count,
    parallel_listing_sees_what_stays,
    replaced_file_can_always_be_opened,
    exchanged_names_are_never_missing,
    reader_sees_whole_writes_of_a_growing_file,
];

/// Runs the same act in several threads; each is told its number.
fn in_threads(count: usize, act: impl Fn(usize) -> Outcome + Sync) -> Outcome {
    let act = &act;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|index| scope.spawn(move || act(index)))
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .map_err(|_| Failure::new("a thread panicked"))?
        })
    })
}

fn appending_writers_lose_nothing(dir: &Path) -> Outcome {
    const RECORD: usize = 64;
    let path = dir.join("log");
    let rounds = size(100, 40);
    let mut children = Vec::new();
    for writer in 0..4 {
        let path = &path;
        children.push(Child::start(move || {
            let mut file = OpenOptions::new().append(true).create(true).open(path)?;
            for round in 0..rounds {
                let mut record = format!("{writer} {round} ");
                record.extend(std::iter::repeat_n('.', RECORD - 1 - record.len()));
                record.push('\n');
                file.write_all(record.as_bytes())?;
            }
            Ok(())
        })?);
    }
    for child in children {
        child.join()?;
    }
    let content = fs::read_to_string(&path)?;
    ensure_eq!(content.len(), 4 * rounds * RECORD);
    let mut next = [0; 4];
    for line in content.lines() {
        ensure_eq!(line.len(), RECORD - 1);
        let mut words = line.split(' ');
        let mut number = || words.next().unwrap_or_default().parse::<usize>();
        let (writer, round) = (number()?, number()?);
        ensure!(
            writer < 4 && next[writer] == round,
            "record {round} of {writer} out of order"
        );
        next[writer] += 1;
    }
    ensure_eq!(next, [rounds; 4]);
    Ok(())
}

fn parallel_creates_in_one_folder_all_succeed(dir: &Path) -> Outcome {
    let rounds = size(60, 12);
    in_threads(8, |thread| {
        for round in 0..rounds {
            let path = dir.join(format!("file-{thread}-{round}"));
            create_new(&path, 0o644)?.write_all(path.as_os_str().as_encoded_bytes())?;
        }
        Ok(())
    })?;
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        ensure_eq!(fs::read(&path)?, path.as_os_str().as_encoded_bytes());
        ensure!(names.insert(path), "a name is listed twice");
    }
    ensure_eq!(names.len(), 8 * rounds);
    Ok(())
}

fn one_winner(rounds: usize, act: impl Fn(usize) -> std::io::Result<()> + Sync) -> Outcome {
    let winners: Vec<AtomicUsize> = (0..rounds).map(|_| AtomicUsize::new(0)).collect();
    in_threads(4, |_| {
        for (round, won) in winners.iter().enumerate() {
            match act(round) {
                Ok(()) => drop(won.fetch_add(1, Ordering::Relaxed)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })?;
    for (round, won) in winners.iter().enumerate() {
        let won = won.load(Ordering::Relaxed);
        ensure!(won == 1, "{won} succeeded in round {round}");
    }
    Ok(())
}

fn parallel_exclusive_creates_have_one_winner(dir: &Path) -> Outcome {
    one_winner(size(50, 20), |round| {
        create_new(&dir.join(format!("file-{round}")), 0o644).map(drop)
    })
}

fn parallel_folders_of_one_name_have_one_winner(dir: &Path) -> Outcome {
    one_winner(size(50, 20), |round| {
        fs::create_dir(dir.join(format!("folder-{round}")))
    })
}

fn parallel_writers_of_one_file_keep_to_their_places(dir: &Path) -> Outcome {
    const PIECE: usize = 3001;
    let path = dir.join("file");
    let content = Noise::bytes(1, 200 * PIECE);
    File::create(&path)?;
    in_threads(4, |thread| {
        let file = read_write(&path)?;
        for piece in (thread..200).step_by(4) {
            let at = piece * PIECE;
            file.write_all_at(&content[at..at + PIECE], u64::try_from(at)?)?;
        }
        Ok(())
    })?;
    ensure!(
        fs::read(&path)? == content,
        "other bytes than those written"
    );
    Ok(())
}

fn parallel_readers_of_one_file_read_the_same(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(2, 3 << 20);
    fs::write(&path, &content)?;
    rustix::fs::fadvise(File::open(&path)?, 0, None, rustix::fs::Advice::DontNeed)?;
    in_threads(4, |thread| {
        let mut file = File::open(&path)?;
        let mut seen = Vec::new();
        let mut buffer = vec![0; 10_000 + thread * 7777];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                length => seen.extend_from_slice(&buffer[..length]),
            }
        }
        ensure!(seen == content, "thread {thread} read other bytes");
        Ok(())
    })
}

fn parallel_renames_to_one_name_leave_one_file(dir: &Path) -> Outcome {
    let target = dir.join("target");
    in_threads(4, |thread| {
        for round in 0..size(40, 15) {
            let path = dir.join(format!("file-{thread}-{round}"));
            fs::write(&path, format!("{thread}"))?;
            fs::rename(&path, &target)?;
        }
        Ok(())
    })?;
    ensure_eq!(fs::read_dir(dir)?.count(), 1);
    ensure!(
        fs::read_to_string(&target)?.parse::<u8>()? < 4,
        "a file that nobody wrote"
    );
    Ok(())
}

fn parallel_links_and_removals_keep_the_count(dir: &Path) -> Outcome {
    use std::os::unix::fs::MetadataExt;
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    let rounds = size(40, 16);
    in_threads(4, |thread| {
        for round in 0..rounds {
            let link = dir.join(format!("link-{thread}-{round}"));
            fs::hard_link(&path, &link)?;
            if round % 2 == 0 {
                fs::remove_file(&link)?;
            }
        }
        Ok(())
    })?;
    ensure_eq!(
        fs::metadata(&path)?.nlink(),
        u64::try_from(4 * (rounds / 2))? + 1
    );
    ensure_eq!(fs::read_dir(dir)?.count(), 4 * (rounds / 2) + 1);
    Ok(())
}

fn parallel_listing_sees_what_stays(dir: &Path) -> Outcome {
    let staying = size(100, 40);
    for index in 0..staying {
        fs::write(dir.join(format!("stays-{index}")), b"")?;
    }
    let done = AtomicBool::new(false);
    in_threads(3, |thread| {
        if thread > 0 {
            while !done.load(Ordering::Relaxed) {
                let mut stays = 0;
                for entry in fs::read_dir(dir)? {
                    let name = entry?.file_name();
                    stays += usize::from(name.as_encoded_bytes().starts_with(b"stays"));
                }
                ensure_eq!(stays, staying);
            }
            return Ok(());
        }
        let change = || {
            for round in 0..size(150, 40) {
                let path = dir.join(format!("comes-{round}"));
                fs::write(&path, b"")?;
                if round % 3 != 0 {
                    fs::remove_file(&path)?;
                }
            }
            Ok(())
        };
        let changed = change();
        done.store(true, Ordering::Relaxed);
        changed
    })
}

/// One thread changes, another looks meanwhile, until the change is done.
fn while_changing(
    change: impl Fn(usize) -> Outcome + Sync,
    look: impl Fn() -> Outcome + Sync,
) -> Outcome {
    let done = AtomicBool::new(false);
    in_threads(2, |thread| {
        if thread == 1 {
            while !done.load(Ordering::Relaxed) {
                look()?;
            }
            return Ok(());
        }
        let changed = (0..size(150, 80)).try_for_each(&change);
        done.store(true, Ordering::Relaxed);
        changed
    })
}

fn replaced_file_can_always_be_opened(dir: &Path) -> Outcome {
    let (path, new) = (dir.join("file"), dir.join("new"));
    fs::write(&path, b"0")?;
    // As editors and package managers save: a new file, renamed over the old one.
    while_changing(
        |round| {
            fs::write(&new, round.to_string())?;
            Ok(fs::rename(&new, &path)?)
        },
        || {
            let seen = fs::read_to_string(&path)?;
            ensure!(seen.parse::<usize>().is_ok(), "a file of {seen:?}");
            Ok(())
        },
    )
}

fn exchanged_names_are_never_missing(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"1")?;
    fs::write(&second, b"2")?;
    while_changing(
        |_| {
            Ok(renameat_with(
                CWD,
                &first,
                CWD,
                &second,
                RenameFlags::EXCHANGE,
            )?)
        },
        || {
            for path in [&first, &second] {
                ensure_eq!(fs::metadata(path)?.len(), 1);
            }
            Ok(())
        },
    )
}

fn reader_sees_whole_writes_of_a_growing_file(dir: &Path) -> Outcome {
    const RECORD: usize = 1000;
    let path = dir.join("file");
    let writer = read_write(&path)?;
    while_changing(
        |round| {
            let byte = u8::try_from(round % 250)? + 1;
            Ok(writer.write_all_at(&[byte; RECORD], u64::try_from(round * RECORD)?)?)
        },
        || {
            let seen = fs::read(&path)?;
            // What is there is what was written, and no zeros are before the end.
            for (round, record) in seen.chunks(RECORD).enumerate() {
                let byte = u8::try_from(round % 250)? + 1;
                ensure!(
                    record.iter().all(|b| *b == byte),
                    "record {round} is not as written"
                );
            }
            Ok(())
        },
    )
}
