//! READ and WRITE transfer the right bytes for every layout of buffers, and copy none of them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::collections::HashSet;
use std::os::unix::fs::FileExt;

use testing::{Server, each_runtime, pattern};
use vmm::fuse::wire::{WriteIn, WriteOut, opcode};
use vmm::fuse::{Call, Client, Cut, Handle, Layout, ROOT};
use vmm::{Options, Profile, Session};
use zerocopy::IntoBytes;

/// A server and a guest that has a file of this content open, with its nodeid.
fn with_file(runtime: &str, content: &[u8]) -> (Server, Client<Session>, u64, Handle) {
    let server = Server::start(&["--runtime", runtime]);
    std::fs::write(server.share().join("file"), content).unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    let file = fs.lookup(ROOT, c"file").unwrap();
    let handle = fs.open(file.nodeid, libc::O_RDWR).unwrap();
    (server, fs, file.nodeid, handle)
}

/// Drops a file's pages from the host's cache, so that reading it must wait for the disk.
fn make_cold(server: &Server) {
    let file = std::fs::File::open(server.share().join("file")).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

fn layouts() -> Vec<Layout> {
    vec![
        Layout::default(),
        Layout::linux(),
        Layout::odd(&[1, 3, 7, 11, 100, 2, 4097, 1]),
        Layout {
            readable: Cut::Whole,
            writable: Cut::Pages(512),
            gap: 3,
        },
    ]
}

#[each_runtime]
fn read_with_any_layout_returns_file_content(runtime: &str) {
    let content = pattern(700_001, 11);
    let (server, mut fs, node, handle) = with_file(runtime, &content);
    for cold in [false, true] {
        for layout in layouts() {
            fs.set_layout(layout.clone());
            for (offset, size) in [
                (0, 1),
                (0, 4096),
                (4095, 2),
                (77, 100_000),
                (600_000, 100_001),
            ] {
                if cold {
                    make_cold(&server);
                }
                let got = fs.read(node, handle, offset as u64, size).unwrap();
                let end = offset + size as usize;
                assert!(
                    got == content[offset..end],
                    "{layout:?} {offset} {size} cold: {cold}"
                );
            }
        }
    }
}

#[each_runtime]
fn read_past_end_is_short(runtime: &str) {
    let content = pattern(10_000, 5);
    let (server, mut fs, node, handle) = with_file(runtime, &content);
    for cold in [false, true] {
        if cold {
            make_cold(&server);
        }
        assert_eq!(
            fs.read(node, handle, 9_000, 4096).unwrap(),
            content[9_000..]
        );
        assert!(fs.read(node, handle, 10_000, 4096).unwrap().is_empty());
        assert!(fs.read(node, handle, 1 << 40, 4096).unwrap().is_empty());
    }
}

#[each_runtime]
fn write_with_any_layout_changes_file_content(runtime: &str) {
    let (server, mut fs, node, handle) = with_file(runtime, b"");
    let mut expected = Vec::new();
    for (i, layout) in layouts().into_iter().enumerate() {
        fs.set_layout(layout);
        for (offset, size) in [(0, 1), (4095, 4098), (3, 100_000), (250_000, 65_537)] {
            let data = pattern(size, 31 + i as u64);
            let written = fs.write(node, handle, offset as u64, &data).unwrap();
            assert_eq!(written as usize, size);
            expected.resize(expected.len().max(offset + size), 0);
            expected[offset..offset + size].copy_from_slice(&data);
        }
    }
    assert!(std::fs::read(server.share().join("file")).unwrap() == expected);
}

#[each_runtime]
fn request_of_one_mebibyte_succeeds(runtime: &str) {
    let (server, mut fs, node, handle) = with_file(runtime, b"");
    assert_eq!(fs.max_write(), 1 << 20);
    fs.set_layout(Layout::linux());
    let data = pattern(1 << 20, 9);
    assert_eq!(fs.write(node, handle, 123, &data).unwrap(), 1 << 20);
    make_cold(&server);
    assert!(fs.read(node, handle, 123, 1 << 20).unwrap() == data);
}

#[each_runtime]
fn request_of_1500_segments_succeeds(runtime: &str) {
    let server = Server::start(&["--runtime", runtime]);
    std::fs::write(server.share().join("file"), b"").unwrap();
    let options = Options::default().indirect_capacity(4000);
    let mut fs = server.session(Profile::Simple, &options);
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    let handle = fs.open(node, libc::O_RDWR).unwrap();
    let pieces = Layout {
        readable: Cut::Pages(17),
        writable: Cut::Pages(17),
        gap: 5,
    };
    let data = pattern(17 * 1500, 21);
    fs.set_layout(pieces);
    assert_eq!(
        fs.write(node, handle, 0, &data).unwrap() as usize,
        data.len()
    );
    assert!(std::fs::read(server.share().join("file")).unwrap() == data);
    let size = u32::try_from(data.len()).unwrap();
    for cold in [false, true] {
        if cold {
            make_cold(&server);
        }
        assert!(
            fs.read(node, handle, 0, size).unwrap() == data,
            "cold: {cold}"
        );
    }
}

#[each_runtime]
fn concurrent_reads_and_writes_transfer_their_own_bytes(runtime: &str) {
    let content = pattern(4 << 20, 77);
    let (server, mut fs, node, handle) = with_file(runtime, &content);
    fs.set_layout(Layout::linux());
    let mut state = 1u64;
    let mut expected = content;
    for round in 0..20 {
        if round % 4 == 0 {
            make_cold(&server);
        }
        let mut reads = Vec::new();
        let mut writes = Vec::new();
        for slot in 0..32usize {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let within = usize::try_from(state >> 40).unwrap() % 60_000;
            let offset = slot * 131_072 + within;
            if slot % 4 == 3 {
                let data = pattern(70_000, state);
                writes.push((
                    fs.submit_write(node, handle, offset as u64, &data).unwrap(),
                    offset,
                    data,
                ));
            } else {
                reads.push((
                    fs.submit_read(node, handle, offset as u64, 70_000).unwrap(),
                    offset,
                ));
            }
        }
        for (pending, offset) in reads {
            let got = fs.collect(pending).unwrap().bytes;
            assert!(
                got == expected[offset..offset + 70_000],
                "round {round} at {offset}"
            );
        }
        for (pending, offset, data) in writes {
            fs.collect(pending).unwrap();
            expected[offset..offset + data.len()].copy_from_slice(&data);
        }
    }
    assert!(std::fs::read(server.share().join("file")).unwrap() == expected);
}

/// A WRITE by who has the file open with these flags of `open(2)` by now.
fn write_as(fs: &mut Client<Session>, node: u64, handle: Handle, flags: i32, data: &[u8]) {
    let asked = WriteIn {
        fh: handle.fh,
        offset: 1,
        size: data.len() as u32,
        flags: flags.cast_unsigned(),
        ..WriteIn::default()
    };
    let call = Call::new(opcode::WRITE, node).arg(asked.as_bytes());
    let written = fs.request(call.arg(data).reply_of::<WriteOut>()).unwrap();
    let written: WriteOut = written.value().unwrap();
    assert_eq!(written.size as usize, data.len());
}

#[each_runtime]
fn append_ignores_offset(runtime: &str) {
    let (server, mut fs, node, _) = with_file(runtime, b"begin");
    let content = || std::fs::read_to_string(server.share().join("file")).unwrap();
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let handle = fs.open(node, flags).unwrap();
    write_as(&mut fs, node, handle, flags, b" end");
    assert_eq!(content(), "begin end");
    // Durable ones are written elsewhere in the server.
    write_as(&mut fs, node, handle, flags | libc::O_DSYNC, b"!");
    assert_eq!(content(), "begin end!");
    // The guest has taken the flag away by fcntl, or writes mapped pages back.
    write_as(&mut fs, node, handle, libc::O_WRONLY, b"E");
    write_as(&mut fs, node, handle, libc::O_WRONLY | libc::O_SYNC, b"EG");
    assert_eq!(content(), "bEGin end!");
}

#[each_runtime]
fn append_with_writeback_uses_guests_offset(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--writeback"]);
    std::fs::write(server.share().join("file"), "begin").unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let handle = fs.open(node, flags).unwrap();
    write_as(&mut fs, node, handle, flags, b"E");
    let content = std::fs::read(server.share().join("file")).unwrap();
    assert_eq!(content, b"bEgin");
}

#[each_runtime]
fn append_only_file_accepts_appends(runtime: &str) {
    let (server, mut fs, node, _) = with_file(runtime, b"log");
    let path = server.share().join("file");
    let append_only = |on| {
        let file = std::fs::File::open(&path).unwrap();
        let mut flags = rustix::fs::ioctl_getflags(&file)?;
        flags.set(rustix::fs::IFlags::APPEND, on);
        rustix::fs::ioctl_setflags(&file, flags)
    };
    if let Err(error) = append_only(true) {
        println!("SKIPPED: can't mark a file as for appending only: {error}");
        return;
    }
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let refused = fs.open(node, libc::O_WRONLY).unwrap_err().errno();
    let handle = fs.open(node, flags).unwrap();
    write_as(&mut fs, node, handle, flags, b"ged");
    append_only(false).unwrap();
    assert_eq!(refused, Some(libc::EPERM));
    assert_eq!(std::fs::read(&path).unwrap(), b"logged");
}

/// Whatever has no bytes is refused by how the file was opened, as the host refuses it, and takes
/// nothing away from the file.
#[each_runtime]
fn empty_operation_without_access_fails_with_host_errno(runtime: &str) {
    let server = Server::start(&["--runtime", runtime, "--allow-direct-io"]);
    let path = server.share().join("file");
    std::fs::write(&path, "content").unwrap();
    let set_id = std::os::unix::fs::PermissionsExt::from_mode(0o6777);
    std::fs::set_permissions(&path, set_id).unwrap();
    let mut fs = server.session(Profile::Simple, &Options::default());
    let node = fs.lookup(ROOT, c"file").unwrap().nodeid;
    // Not the superuser, who may keep set-ID bits.
    fs.act_as(1000, 1000);
    let modes = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR];
    for extra in [0, libc::O_DIRECT, libc::O_SYNC] {
        for mode in modes {
            let handle = fs.open(node, mode | extra).unwrap();
            let host = std::os::unix::fs::OpenOptionsExt::custom_flags(
                std::fs::OpenOptions::new()
                    .read(mode != libc::O_WRONLY)
                    .write(mode != libc::O_RDONLY),
                extra,
            )
            .open(&path)
            .unwrap();
            let on_host = |done: rustix::io::Result<usize>| done.map_err(|e| e.raw_os_error());
            let by_guest = |done: Result<usize, vmm::fuse::FuseError>| {
                done.map_err(|error| error.errno().unwrap())
            };

            let read = fs.read(node, handle, 0, 0).map(|bytes| bytes.len());
            let expected = rustix::io::pread(&host, &mut Vec::<u8>::new()[..], 0);
            assert_eq!(by_guest(read), on_host(expected), "READ: {mode} {extra:#o}");

            let asked = WriteIn {
                fh: handle.fh,
                write_flags: vmm::fuse::wire::request_flag::WRITE_KILL_SUIDGID,
                ..WriteIn::default()
            };
            let call = Call::new(opcode::WRITE, node).arg(asked.as_bytes());
            let written = fs.request(call.reply_of::<WriteOut>());
            let written = written.map(|reply| reply.value::<WriteOut>().unwrap().size as usize);
            let expected = rustix::io::pwrite(&host, &[], 0);
            assert_eq!(
                by_guest(written),
                on_host(expected),
                "WRITE: {mode} {extra:#o}"
            );

            let reserved = fs.fallocate(node, handle, 0, 0..0).map(|()| 0);
            let flags = rustix::fs::FallocateFlags::empty();
            let expected = rustix::fs::fallocate(&host, flags, 0, 0).map(|()| 0);
            assert_eq!(
                by_guest(reserved),
                on_host(expected),
                "FALLOCATE: {mode} {extra:#o}"
            );

            let asked = vmm::fuse::wire::CopyFileRangeIn {
                fh_in: handle.fh,
                nodeid_out: node,
                fh_out: handle.fh,
                off_out: 100,
                ..Default::default()
            };
            let copied = fs.copy_file_range(node, &asked).map(|n| n as usize);
            let expected =
                rustix::fs::copy_file_range(&host, Some(&mut 0), &host, Some(&mut 100), 0);
            assert_eq!(
                by_guest(copied),
                on_host(expected),
                "COPY_FILE_RANGE: {mode} {extra:#o}"
            );
            fs.release(node, handle).unwrap();
        }
    }
    // What the host refuses before it changes anything takes no set-ID bits.
    let handle = fs.open(node, libc::O_RDONLY).unwrap();
    let asked = WriteIn {
        fh: handle.fh,
        size: 1,
        write_flags: vmm::fuse::wire::request_flag::WRITE_KILL_SUIDGID,
        ..WriteIn::default()
    };
    let call = Call::new(opcode::WRITE, node)
        .arg(asked.as_bytes())
        .arg(b"x");
    let refused = fs.request(call.reply_of::<WriteOut>()).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EBADF));
    let refused = fs.fallocate(node, handle, 0, 0..1).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EBADF));
    let mode = std::fs::metadata(&path).unwrap().permissions();
    let mode = std::os::unix::fs::PermissionsExt::mode(&mode);
    assert_eq!(mode & 0o7777, 0o6777);
}

#[each_runtime]
fn payload_is_never_copied(runtime: &str) {
    let content = pattern(1 << 20, 3);
    let (mut server, mut fs, node, handle) = with_file(runtime, &content);
    fs.set_layout(Layout::linux());
    // Only the data requests below go over the second queue period: what came before is
    // counted in the first.
    let bases = fs.guest().stop().unwrap();
    server.wait_for("queue 1: ");
    fs.guest().restart(&bases).unwrap();
    let mut requests = 0u64;
    for cold in [false, true] {
        for size in [1, 4096, 70_000, 1 << 20] {
            if cold {
                make_cold(&server);
            }
            let got = fs.read(node, handle, 0, size).unwrap();
            assert!(got == content[..size as usize]);
            fs.write(node, handle, 0, &content[..size as usize])
                .unwrap();
            requests += 2;
        }
    }
    fs.guest().stop().unwrap();
    let line = server.wait_for("queue 1: ");
    let (chains, copied) = totals(&line);
    assert_eq!(chains, requests);
    // A READ: header 40, arguments 40, reply header 16. A WRITE: 40, 40, and 16 + 8.
    let bytes = requests / 2 * (40 + 40 + 16) + requests / 2 * (40 + 40 + 24);
    assert_eq!(copied, bytes, "{line}");
}

/// Chains returned and bytes copied, from the line that the server logs as a queue stops.
fn totals(line: &str) -> (u64, u64) {
    let number = |before: &str| {
        let words: Vec<_> = line
            .split(before)
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        words.last().unwrap().parse().unwrap()
    };
    (number(" chains returned"), number(" bytes copied"))
}

#[each_runtime]
fn read_marks_buffers_and_used_ring_dirty(runtime: &str) {
    let content = pattern(300_000, 3);
    let words: HashSet<&[u8]> = content.windows(8).collect();
    let (server, mut fs, node, handle) = with_file(runtime, &content);
    fs.set_layout(Layout::linux());
    for cold in [false, true] {
        if cold {
            make_cold(&server);
        }
        let log = fs.guest().start_log().unwrap();
        assert!(fs.read(node, handle, 0, 300_000).unwrap() == content);
        let used = fs.guest().queues[1].addresses().used;
        fs.guest().stop_log().unwrap();
        assert!(log.is_dirty(used), "the used ring was written to");
        let mut pages = 0;
        for (gpa, page) in memory_of(&mut fs) {
            if page.chunks(8).filter(|word| words.contains(word)).count() > 100 {
                pages += 1;
                assert!(
                    log.is_dirty(vmm::Gpa(gpa)),
                    "page {gpa:#x} was read into unnoticed"
                );
            }
        }
        assert!(pages >= 73, "only {pages} pages hold what was read");
        let dirty = log.take().unwrap().len();
        assert!(
            dirty < pages + 10,
            "{dirty} pages are said to be dirty, {pages} are"
        );
    }
}

/// A migration begins while the disk is waited for: what comes later is marked, by whichever thread
/// or ring it is completed.
#[each_runtime]
fn dirty_log_started_during_reads_has_later_reads(runtime: &str) {
    const HALF: usize = 512 * 1024;
    const PIECE: usize = 64 * 1024;
    let content = pattern(2 * HALF, 3);
    let later: HashSet<&[u8]> = content[HALF..].windows(8).collect();
    let (server, mut fs, node, handle) = with_file(runtime, &content);
    fs.set_layout(Layout::linux());
    make_cold(&server);
    let submit = |fs: &mut Client<Session>, from: usize| -> Vec<_> {
        (from..from + HALF)
            .step_by(PIECE)
            .map(|at| {
                let read = fs.submit_read(node, handle, at as u64, PIECE as u32);
                (at, read.unwrap())
            })
            .collect()
    };
    let mut pending = submit(&mut fs, 0);
    let log = fs.guest().start_log().unwrap();
    pending.extend(submit(&mut fs, HALF));
    for (at, read) in pending {
        let read = fs.collect(read).unwrap().bytes;
        assert!(read == content[at..at + PIECE], "other bytes at {at}");
    }
    fs.guest().stop_log().unwrap();
    let mut pages = 0;
    for (gpa, page) in memory_of(&mut fs) {
        if page.chunks(8).filter(|word| later.contains(word)).count() > 100 {
            pages += 1;
            assert!(
                log.is_dirty(vmm::Gpa(gpa)),
                "page {gpa:#x} was read into unnoticed"
            );
        }
    }
    assert!(
        pages >= HALF / 4096,
        "only {pages} pages hold what was read"
    );
}

/// The pages of the guest's memory that are used at all, with what is in them.
fn memory_of(fs: &mut Client<Session>) -> Vec<(u64, Vec<u8>)> {
    let memory = &fs.guest().memory;
    let mut pages = Vec::new();
    for region in memory.regions() {
        let file = std::fs::File::from(region.fd().try_clone_to_owned().unwrap());
        let mut offset = 0;
        while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(offset)) {
            let mut page = vec![0; 4096];
            file.read_exact_at(&mut page, data).unwrap();
            pages.push((region.gpa() + data - region.file_offset(), page));
            offset = data + 4096;
        }
    }
    pages
}
