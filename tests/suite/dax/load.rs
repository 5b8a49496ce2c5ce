//! Random work through a window of a tenth of the files' size, verified byte by byte.
//!
//! The guest behaves as Linux does: it maps ranges of 2 MiB when it needs them, makes one writable when
//! it writes, and removes the one that it used least recently when the window is full. A copy of every
//! file is kept in memory, and compared with what the guest and the host read.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use testing::{Server, each_runtime, pattern};
use vmm::Profile;
use vmm::window::Behaviour;

use super::{
    FS_MAP, RANGE, REPLACING, STRICT, VMMS, Vm, WINDOW, host_file, open_on_host, recovery, repeat,
    start,
};

/// Ten files, with as many bytes together as ten windows.
const FILES: u64 = 10;

/// Bytes of a file.
const LEN: u64 = WINDOW;

/// How long a load runs: a moment, or as long as the environment says.
fn duration() -> Duration {
    let seconds = std::env::var("RINGFSD_DAX_SECONDS");
    Duration::from_secs_f64(seconds.map_or(1.5, |text| text.parse().unwrap()))
}

/// What the files contain at first.
fn contents() -> &'static [Vec<u8>] {
    static CONTENTS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    CONTENTS.get_or_init(|| {
        // A page of one place is that of no other.
        let page = 4096;
        let bytes = pattern(1 << 16, 1);
        let content = |file: u64| {
            let pages = (0..LEN / page as u64).flat_map(|at| {
                let number = file * LEN + at;
                let start = (number * 24) as usize % (bytes.len() - page);
                [&bytes[start..start + page - 8], &[0; 8]]
            });
            let mut content = pages.collect::<Vec<_>>().concat();
            for (at, page) in content.chunks_exact_mut(page).enumerate() {
                let number = (file << 32 | at as u64).to_le_bytes();
                page[4088..].copy_from_slice(&number);
            }
            content
        };
        (0..FILES).map(content).collect()
    })
}

/// A small generator: the work is the same for the same seed, as far as the server's speed allows.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }
}

/// A file, and what it must contain.
struct Model {
    node: u64,
    content: Vec<u8>,
    host: File,
}

/// What a slot of the window has.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Slot {
    file: usize,
    range: u64,
    writable: bool,
}

/// The guest's kernel.
struct Kernel {
    vm: Vm,
    files: Vec<Model>,
    slots: Vec<Option<Slot>>,
    /// The slots, the least recently used first.
    order: VecDeque<usize>,
    random: Random,
    set_up: u64,
    removed: u64,
}

impl Kernel {
    fn start(server: &Server, profile: Profile, behaviour: Behaviour) -> Self {
        for (number, content) in contents().iter().enumerate() {
            host_file(server, &format!("file{number}"), content);
        }
        let mut vm = Vm::start_as(server, profile, behaviour);
        let files = contents().iter().enumerate().map(|(number, content)| {
            let name = format!("file{number}");
            Model {
                node: vm.node(&name),
                content: content.clone(),
                host: open_on_host(server, &name),
            }
        });
        let slots = (WINDOW / RANGE) as usize;
        Self {
            files: files.collect(),
            vm,
            slots: vec![None; slots],
            order: (0..slots).collect(),
            random: Random(0x9e37_79b9_7f4a_7c15),
            set_up: 0,
            removed: 0,
        }
    }

    /// Where the range is in the window, after it was mapped if it had to be.
    fn fault(&mut self, file: usize, range: u64, writable: bool) -> u64 {
        let has = |slot: &Option<Slot>| slot.is_some_and(|it| (it.file, it.range) == (file, range));
        let at = match self.slots.iter().position(has) {
            Some(at) => at,
            None => {
                let at = self.order[0];
                if let Some(old) = self.slots[at].take() {
                    let node = self.files[old.file].node;
                    let range = (at as u64 * RANGE, RANGE);
                    let guest = &mut self.vm.guest;
                    repeat(|| guest.remove_mappings(node, &[range]));
                    self.removed += 1;
                }
                at
            }
        };
        self.order.retain(|it| *it != at);
        self.order.push_back(at);
        let mapped = self.slots[at];
        if mapped.is_none_or(|it| writable && !it.writable) {
            self.vm
                .map(self.files[file].node, range, at as u64, writable);
            self.slots[at] = Some(Slot {
                file,
                range,
                writable,
            });
            self.set_up += 1;
        }
        at as u64 * RANGE
    }

    /// One access: by the guest through the window, or by the host, and each checks the other.
    fn step(&mut self) {
        let file = self.random.below(FILES) as usize;
        let len = 1 + self.random.below(16 * 1024) as usize;
        let range = self.random.below(LEN / RANGE);
        let within = self.random.below(RANGE - len as u64);
        let at = (range * RANGE + within) as usize;
        let bytes = pattern(len, self.random.below(u64::MAX));
        match self.random.below(8) {
            0..4 => {
                let window = self.fault(file, range, false) + within;
                let read = self.vm.read(window, len).unwrap();
                assert_eq!(read, self.files[file].content[at..at + len], "{file} {at}");
            }
            4..6 => {
                let window = self.fault(file, range, true) + within;
                let n = self.vm.window.write(window, &bytes).unwrap();
                assert_eq!(n, len);
                let model = &mut self.files[file];
                model.content[at..at + len].copy_from_slice(&bytes);
                let mut seen = vec![0; len];
                model.host.read_exact_at(&mut seen, at as u64).unwrap();
                assert_eq!(seen, bytes, "{file} {at}");
            }
            6 => {
                let window = self.fault(file, range, false) + within;
                let model = &mut self.files[file];
                model.host.write_all_at(&bytes, at as u64).unwrap();
                model.content[at..at + len].copy_from_slice(&bytes);
                assert_eq!(self.vm.read(window, len).unwrap(), bytes, "{file} {at}");
            }
            _ => {
                // By messages, as a guest does that opens the file with O_DIRECT.
                let node = self.files[file].node;
                let handle = self.vm.guest.open(node, libc::O_RDWR).unwrap();
                self.vm
                    .guest
                    .write(node, handle, at as u64, &bytes)
                    .unwrap();
                self.files[file].content[at..at + len].copy_from_slice(&bytes);
                let read = self.vm.guest.read(node, handle, at as u64, len as u32);
                assert_eq!(read.unwrap(), bytes, "{file} {at}");
                self.vm.guest.release(node, handle).unwrap();
            }
        }
    }

    /// Compares all of all files, through the window and on the host, and what is mapped.
    fn check(&mut self) {
        for file in 0..self.files.len() {
            for range in 0..LEN / RANGE {
                let window = self.fault(file, range, false);
                let read = self.vm.read(window, RANGE as usize).unwrap();
                let at = (range * RANGE) as usize;
                let expected = &self.files[file].content[at..at + RANGE as usize];
                assert!(read == expected, "file {file}, range {range}");
                let mut host = vec![0; RANGE as usize];
                self.files[file]
                    .host
                    .read_exact_at(&mut host, at as u64)
                    .unwrap();
                assert!(host == expected, "file {file}, range {range} on the host");
            }
        }
        let expected = self.slots.iter().enumerate().filter_map(|(at, slot)| {
            let slot = slot.as_ref()?;
            Some((at as u64 * RANGE, slot.range * RANGE))
        });
        let mapped = self.vm.window.mappings();
        let mapped = mapped.iter().map(|(at, it)| (*at, it.file_offset));
        assert!(mapped.eq(expected));
    }
}

#[each_runtime]
fn random_work_in_a_small_window_is_right(runtime: &str) {
    for (profile, behaviour) in [
        (Profile::Crosvm, REPLACING),
        (Profile::Simple, STRICT),
        (Profile::Dragonball, FS_MAP),
    ] {
        let server = start(runtime, &["--dax-fs-map"]);
        let mut kernel = Kernel::start(&server, profile, behaviour);
        let end = Instant::now() + duration();
        let mut steps = 0_u64;
        while Instant::now() < end {
            kernel.step();
            steps += 1;
        }
        kernel.check();
        println!(
            "{profile:?}: {steps} accesses, {} mappings made, {} removed, {} requests to the VMM",
            kernel.set_up,
            kernel.removed,
            kernel.vm.window.requests()
        );
        assert!(kernel.removed > 0);
    }
}

#[each_runtime]
fn random_work_survives_kills_and_upgrades(runtime: &str) {
    for (profile, behaviour) in VMMS {
        let mut server = start(runtime, &["--supervise", "--dax-fs-map"]);
        let mut kernel = Kernel::start(&server, profile, behaviour);
        let end = Instant::now() + duration();
        let mut kills = 0_u32;
        while Instant::now() < end || kills < 6 {
            // The process is killed while the guest works, or upgraded.
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    match kills % 4 {
                        1 => recovery::upgrade_and_crash(&mut server),
                        3 => recovery::upgrade(&mut server),
                        _ => recovery::crash(&mut server),
                    }
                    done.store(true, Ordering::Release);
                });
                while !done.load(Ordering::Acquire) {
                    kernel.step();
                }
            });
            kills += 1;
        }
        kernel.check();
        println!(
            "{kills} kills and upgrades, {} mappings made, {} removed, {} requests to the VMM",
            kernel.set_up,
            kernel.removed,
            kernel.vm.window.requests()
        );
    }
}

#[each_runtime]
fn files_truncated_meanwhile_end_where_they_end(runtime: &str) {
    let server = start(runtime, &[]);
    let mut kernel = Kernel::start(&server, Profile::Crosvm, Behaviour::default());
    // The host truncates files and lets them grow again, while the guest reads and writes them.
    let others: Vec<_> = (0..FILES)
        .map(|number| open_on_host(&server, &format!("file{number}")))
        .collect();
    let end = Instant::now() + duration();
    let (mut whole, mut cut) = (0_u64, 0_u64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(7);
            while Instant::now() < end {
                let file = &others[random.below(FILES) as usize];
                file.set_len(random.below(LEN)).unwrap();
                file.set_len(LEN).unwrap();
            }
        });
        while Instant::now() < end {
            let file = kernel.random.below(FILES) as usize;
            let range = kernel.random.below(LEN / RANGE);
            let within = kernel.random.below(RANGE - 4096);
            let writes = kernel.random.below(2) == 0;
            let at = kernel.fault(file, range, writes) + within;
            let content = &kernel.files[file].content[(range * RANGE + within) as usize..][..4096];
            let result = match writes {
                true => kernel.vm.window.write(at, content),
                false => kernel.vm.read(at, 4096).map(|read| {
                    // What was truncated reads as zeros afterwards.
                    let is_right = |(read, was): (&u8, &u8)| *read == *was || *read == 0;
                    assert!(read.iter().zip(content).all(is_right));
                    read.len()
                }),
            };
            match result {
                Ok(4096) => whole += 1,
                // A processor would be interrupted here: the page is behind the end.
                Ok(_) => cut += 1,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                    cut += 1;
                }
            }
        }
    });
    println!("{whole} whole accesses, {cut} cut by a truncation");
    assert!(whole > 0);
    let node = kernel.files[0].node;
    kernel.vm.guest.getattr(node).unwrap();
}
