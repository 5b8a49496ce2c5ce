//! Measures the DAX window of a server against its messages, and against copies that need no server.
//!
//! ```sh
//! head -c 1G /dev/urandom > /dev/shm/share/file
//! ringfsd --socket /tmp/fs.sock --shared-dir /dev/shm/share --dax-window 1G &
//! cargo run --release -p ringfsd-vmm --example dax -- /tmp/fs.sock /dev/shm/share/file
//! ```
//!
//! With `--hold mapped` or `--hold messages` as a third and fourth argument it reads the whole file, as a
//! guest that caches it does, and keeps it until its standard input ends: to look at what memory that
//! takes.
//!
//! The file's size and the window's must be multiples of 2 MiB. Everything is cached before anything is
//! measured. Each line has the median of five rounds.

#![allow(
    unsafe_code,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "maps the file itself for comparison; prints a table of rounded numbers"
)]

use std::collections::VecDeque;
use std::error::Error;
use std::ffi::CString;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags};
use vmm::fuse::wire::{ReadIn, init, opcode};
use vmm::fuse::{Call, Client, Handle, LINUX_OFFERS, ROOT};
use vmm::window::Behaviour;
use vmm::{Options, Profile, Session, Window};
use zerocopy::IntoBytes;

/// What a guest maps at once.
const RANGE: u64 = 2 << 20;

const ROUND: Duration = Duration::from_millis(400);

const ROUNDS: usize = 5;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }
}

/// Runs `act`, which does a number of operations at each call, and prints how long one takes.
fn measure(name: &str, bytes: u64, mut act: impl FnMut() -> Result<u64>) -> Result<f64> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let (began, mut count) = (Instant::now(), 0);
        while began.elapsed() < ROUND {
            count += act()?;
        }
        rounds.push(began.elapsed().as_secs_f64() / count as f64);
    }
    rounds.sort_by(f64::total_cmp);
    let median = rounds[ROUNDS / 2];
    let (low, high) = (rounds[0] * 1e6, rounds[ROUNDS - 1] * 1e6);
    let rate = bytes as f64 / median / 1e9;
    println!(
        "{name:<44} {:>9.3} µs  ({low:.3} to {high:.3})  {rate:>7.2} GB/s",
        median * 1e6
    );
    Ok(median)
}

/// A copy of 4 KiB.
type CopyPage<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<()>;

/// Compares two ways to copy 4 KiB, in turns of a fraction of a millisecond, so that what else the
/// machine does disturbs both. Prints the medians, and the median of the turns' ratios.
fn compare(names: [&str; 2], first: CopyPage<'_>, second: CopyPage<'_>) -> Result<f64> {
    const COPIES: u32 = 500;
    let mut page = vec![0; 4096];
    let mut turn = |copy: &mut dyn FnMut(&mut [u8]) -> Result<()>| -> Result<f64> {
        let began = Instant::now();
        for _ in 0..COPIES {
            copy(&mut page)?;
            black_box(&page);
        }
        Ok(began.elapsed().as_secs_f64() / f64::from(COPIES))
    };
    let (mut ones, mut others, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let began = Instant::now();
    while began.elapsed() < ROUND * 5 {
        let (one, other) = (turn(first)?, turn(second)?);
        ones.push(one);
        others.push(other);
        ratios.push(one / other);
    }
    let median = |numbers: &mut Vec<f64>| {
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    for (name, times) in [(names[0], &mut ones), (names[1], &mut others)] {
        let (median, least) = (median(times) * 1e6, times[0] * 1e6);
        println!("{name:<44} {median:>9.3} µs  (from {least:.3})");
    }
    let name = format!("the first takes, of {} turns", ratios.len());
    println!(
        "{name:<44} {:>9.2} of the second's time",
        median(&mut ratios)
    );
    Ok(median(&mut others))
}

/// A guest with a window.
struct Vm {
    guest: Client<Session>,
    window: std::sync::Arc<Window>,
    node: u64,
    handle: Handle,
    len: u64,
}

impl Vm {
    fn connect(socket: &Path, name: &str) -> Result<Self> {
        let options = Options::default().dax_window(true).queue_size(128);
        let stream = std::os::unix::net::UnixStream::connect(socket)?;
        let mut session = Profile::Crosvm.connect(stream, &options)?;
        let len = *session
            .shared_memory
            .first()
            .ok_or("the server has no window")?;
        let window = Window::new(len, Behaviour::default())?;
        let backend = session.backend.take().ok_or("no back channel")?;
        // It ends with the program.
        drop(window.serve(backend));
        let mut guest = Client::new(session);
        guest.init_offering(LINUX_OFFERS | init::MAP_ALIGNMENT | init::HAS_INODE_DAX)?;
        let node = guest.lookup(ROOT, &CString::new(name)?)?.nodeid;
        let handle = guest.open(node, libc::O_RDWR)?;
        Ok(Self {
            guest,
            window,
            node,
            handle,
            len,
        })
    }

    fn map_all(&mut self, writable: bool) -> Result<()> {
        for at in (0..self.len).step_by(RANGE as usize) {
            self.guest
                .setup_mapping(self.node, (at, RANGE), at, writable)?;
        }
        Ok(())
    }

    fn unmap_all(&mut self) -> Result<()> {
        Ok(self.guest.remove_mappings(self.node, &[(0, self.len)])?)
    }

    /// Reads everything, and keeps it until nobody needs it any more.
    fn hold(&mut self, len: usize, mapped: bool) -> Result<()> {
        let mut cache = Vec::new();
        let mut page = vec![0; 4096];
        if mapped {
            for at in (0..len as u64).step_by(RANGE as usize) {
                self.guest
                    .setup_mapping(self.node, (at, RANGE), at, false)?;
            }
            let view = self.window.view(0, len, false)?;
            for at in (0..len).step_by(4096) {
                view.read(at, &mut page)?;
            }
        } else {
            for at in (0..len as u64).step_by(1 << 20) {
                cache.push(self.guest.read(self.node, self.handle, at, 1 << 20)?);
            }
        }
        println!("ready");
        std::io::stdin().read_line(&mut String::new())?;
        drop(cache);
        Ok(())
    }

    fn read_call(&self, offset: u64, len: u32) -> ReadIn {
        ReadIn {
            fh: self.handle.fh,
            offset,
            size: len,
            read_flags: 0,
            lock_owner: 0,
            flags: 0,
            padding: 0,
        }
    }
}

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let (socket, path, hold) = match &arguments[..] {
        [socket, path] => (Path::new(socket), Path::new(path), None),
        [socket, path, option, how] if option == "--hold" => {
            (Path::new(socket), Path::new(path), Some(how == "mapped"))
        }
        _ => return Err("usage: dax SOCKET FILE [--hold mapped|messages]".into()),
    };
    let file = File::options().read(true).write(true).open(path)?;
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or("no name")?;
    let file_len = file.metadata()?.len();
    let mut vm = Vm::connect(socket, name)?;
    let len = vm.len.min(file_len) as usize;
    if let Some(mapped) = hold {
        return vm.hold(len, mapped);
    }
    // SAFETY: the kernel chooses the address, so no existing mapping is replaced; it is never unmapped.
    let bare = unsafe {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        rustix::mm::mmap(ptr::null_mut(), len, access, MapFlags::SHARED, &file, 0)?
    };
    let bare = bare.cast::<u8>().cast_const();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut page = vec![0; 4096];
    let mut large = vec![0; 1 << 20];
    let pages = (len / 4096) as u64;
    let copy = |at: usize, to: &mut [u8]| {
        // SAFETY: the callers stay within the mapping, which is not part of `to`.
        unsafe { ptr::copy_nonoverlapping(bare.wrapping_add(at), to.as_mut_ptr(), to.len()) };
    };
    for at in (0..len).step_by(1 << 20) {
        copy(at, &mut large);
        file.read_exact_at(&mut large, at as u64)?;
    }
    println!(
        "file of {} MiB, window of {} MiB",
        file_len >> 20,
        vm.len >> 20
    );

    println!("\nSETUPMAPPING");
    let mut slot = 0;
    let one = measure("map 2 MiB", 0, || {
        slot = (slot + 1) % (vm.len / RANGE);
        if slot == 0 {
            vm.unmap_all()?;
        }
        let part = (slot * RANGE % file_len, RANGE);
        vm.guest.setup_mapping(vm.node, part, slot * RANGE, false)?;
        Ok(1)
    })?;
    vm.unmap_all()?;
    measure("map and remove 2 MiB", 0, || {
        vm.guest.setup_mapping(vm.node, (0, RANGE), 0, false)?;
        vm.guest.remove_mappings(vm.node, &[(0, RANGE)])?;
        Ok(1)
    })?;
    measure("map, make writable, remove 2 MiB", 0, || {
        vm.guest.setup_mapping(vm.node, (0, RANGE), 0, false)?;
        vm.guest.setup_mapping(vm.node, (0, RANGE), 0, true)?;
        vm.guest.remove_mappings(vm.node, &[(0, RANGE)])?;
        Ok(1)
    })?;
    measure("GETATTR, for comparison", 0, || {
        vm.guest.getattr(vm.node)?;
        Ok(1)
    })?;

    println!("\n4 KiB at random places, all mapped and accessed before");
    vm.map_all(true)?;
    let view = vm.window.view(0, len, true)?;
    for at in (0..len).step_by(4096) {
        view.read(at, &mut page)?;
    }
    let mut other = Random(0x2545_f491_4f6c_dd1d);
    let mapped = compare(
        [
            "bare copy from a mapping of the file",
            "mapped read through the window",
        ],
        &mut |page| {
            copy(other.below(pages) as usize * 4096, page);
            Ok(())
        },
        &mut |page| Ok(view.read(random.below(pages) as usize * 4096, page)?),
    )?;
    measure("mapped write through the window", 4096, || {
        for _ in 0..1000 {
            view.write(random.below(pages) as usize * 4096, &page)?;
        }
        Ok(1000)
    })?;
    measure("pread(2) on the host", 4096, || {
        for _ in 0..100 {
            file.read_exact_at(&mut page, random.below(pages) * 4096)?;
        }
        Ok(100)
    })?;
    drop(view);
    measure("READ, 1 in flight", 4096, || {
        let at = random.below(pages) * 4096;
        vm.guest.read(vm.node, vm.handle, at, 4096)?;
        Ok(1)
    })?;
    measure("READ, 32 in flight", 4096, || {
        let mut pending = Vec::new();
        for _ in 0..32 {
            let asked = vm.read_call(random.below(pages) * 4096, 4096);
            let call = Call::new(opcode::READ, vm.node).arg(asked.as_bytes());
            pending.push(vm.guest.stage(call.reply(4096))?);
        }
        vm.guest.kick_all()?;
        for pending in pending {
            vm.guest.collect(pending)?;
        }
        Ok(32)
    })?;

    println!("\n1 MiB, one after the other");
    let mut at = 0;
    let mut next = || {
        at = (at + (1 << 20)) % len;
        at
    };
    measure("bare copy from a mapping of the file", 1 << 20, || {
        copy(next(), &mut large);
        black_box(&large);
        Ok(1)
    })?;
    let view = vm.window.view(0, len, false)?;
    measure("mapped read through the window", 1 << 20, || {
        view.read(next(), &mut large)?;
        black_box(&large);
        Ok(1)
    })?;
    drop(view);
    measure("READ, 1 in flight", 1 << 20, || {
        vm.guest.read(vm.node, vm.handle, next() as u64, 1 << 20)?;
        Ok(1)
    })?;

    println!("\n4 KiB at random places of a working set, in a window of 64 MiB");
    vm.unmap_all()?;
    for working_set in [32_u64 << 20, 64 << 20, 128 << 20, 640 << 20] {
        if working_set > file_len {
            continue;
        }
        let slots = 32;
        let mut mapped: Vec<Option<u64>> = vec![None; slots];
        let mut order: VecDeque<usize> = (0..slots).collect();
        let name = format!("working set of {} MiB", working_set >> 20);
        measure(&name, 4096, || {
            let place = random.below(working_set / 4096) * 4096;
            let range = place / RANGE;
            let slot = match mapped.iter().position(|it| *it == Some(range)) {
                Some(slot) => slot,
                None => {
                    let slot = order[0];
                    let at = slot as u64 * RANGE;
                    if mapped[slot].take().is_some() {
                        vm.guest.remove_mappings(vm.node, &[(at, RANGE)])?;
                    }
                    vm.guest
                        .setup_mapping(vm.node, (range * RANGE, RANGE), at, false)?;
                    mapped[slot] = Some(range);
                    slot
                }
            };
            order.retain(|it| *it != slot);
            order.push_back(slot);
            let at = slot as u64 * RANGE + place % RANGE;
            vm.window.view(at, 4096, false)?.read(0, &mut page)?;
            Ok(1)
        })?;
        vm.unmap_all()?;
    }
    println!(
        "\none mapping costs as much as {:.0} mapped reads of 4 KiB",
        one / mapped
    );
    Ok(())
}
