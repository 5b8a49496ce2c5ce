//! The DAX window: what a guest maps is the host's file, whatever happens to the server.
//!
//! The VMM is `vmm::Window`, which maps what the server asks for.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod load;
mod recovery;

use std::ffi::CString;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use testing::{Server, TIMEOUT, each_runtime, errno, pattern};
use vmm::fuse::wire::{ATTR_DAX, init};
use vmm::fuse::{Client, FuseError, LINUX_OFFERS, ROOT};
use vmm::window::Behaviour;
use vmm::{Connection, Options, Profile, Session, Window};

type Guest = Client<Session>;

/// What a Linux guest maps at once.
const RANGE: u64 = 2 << 20;

/// The size of the window: 8 MiB.
const WINDOW: u64 = 4 * RANGE;

/// VMMs: one that replaces mappings, one that refuses to, and one of the older requests.
const VMMS: [(Profile, Behaviour); 3] = [
    (Profile::Crosvm, REPLACING),
    (Profile::Crosvm, STRICT),
    (Profile::Dragonball, FS_MAP),
];

const REPLACING: Behaviour = Behaviour {
    strict: false,
    fs_map: false,
};

const STRICT: Behaviour = Behaviour {
    strict: true,
    ..REPLACING
};

const FS_MAP: Behaviour = Behaviour {
    fs_map: true,
    ..REPLACING
};

const OFFERS: u64 = LINUX_OFFERS | init::MAP_ALIGNMENT | init::HAS_INODE_DAX;

/// A VMM and its guest.
struct Vm {
    guest: Guest,
    window: Arc<Window>,
    /// Answers the server's requests.
    device: Option<JoinHandle<Connection>>,
}

impl Vm {
    fn start(server: &Server) -> Self {
        Self::start_as(server, Profile::Crosvm, Behaviour::default())
    }

    fn start_as(server: &Server, profile: Profile, behaviour: Behaviour) -> Self {
        let options = Options::default().dax_window(true).queue_size(128);
        let mut session = profile.connect(server.connect(), &options).unwrap();
        // A VMM of the older form has its own setting for the size.
        let expected = if behaviour.fs_map {
            vec![]
        } else {
            vec![WINDOW]
        };
        assert_eq!(session.shared_memory, expected);
        let window = Window::new(WINDOW, behaviour).unwrap();
        let device = window.serve(session.backend.take().unwrap());
        let mut guest = Client::new(session);
        let agreed = guest.init_offering(OFFERS).unwrap();
        assert_eq!(
            u64::from(agreed.flags) & init::MAP_ALIGNMENT,
            init::MAP_ALIGNMENT
        );
        assert_eq!(1 << agreed.map_alignment, rustix::param::page_size());
        Self {
            guest,
            window,
            device: Some(device),
        }
    }

    fn node(&mut self, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        self.guest.lookup(ROOT, &name).unwrap().nodeid
    }

    /// Maps range number `range` of a file at slot number `slot` of the window. While a queue is being
    /// stopped, the server doesn't wait for the VMM, and Linux repeats the page fault.
    fn map(&mut self, node: u64, range: u64, slot: u64, writable: bool) {
        let (part, at) = ((range * RANGE, RANGE), slot * RANGE);
        repeat(|| self.guest.setup_mapping(node, part, at, writable));
    }

    /// The mappings: their slots, and whether the guest may write.
    fn mapped(&self) -> Vec<(u64, bool)> {
        let mappings = self.window.mappings().into_iter();
        mappings.map(|(at, it)| (at / RANGE, it.writable)).collect()
    }

    fn read(&self, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let n = self.window.read(at, &mut bytes)?;
        bytes.truncate(n);
        Ok(bytes)
    }
}

/// Repeats a request while it fails with `EAGAIN`.
fn repeat(mut request: impl FnMut() -> Result<(), FuseError>) {
    loop {
        let result = request();
        match result {
            Err(FuseError::Refused { errno, .. }) if errno == libc::EAGAIN => {}
            result => return result.unwrap(),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.window.close();
        if let Some(device) = self.device.take() {
            let ended = device.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
    }
}

fn start(runtime: &str, more: &[&str]) -> Server {
    let own = ["--runtime", runtime, "--dax-window", "8M"];
    Server::start(&[&own, more].concat())
}

fn host_file(server: &Server, name: &str, content: &[u8]) {
    std::fs::write(server.share().join(name), content).unwrap();
}

fn open_on_host(server: &Server, name: &str) -> std::fs::File {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true);
    options.open(server.share().join(name)).unwrap()
}

#[each_runtime]
fn mapped_file_is_the_host_s_in_both_directions(runtime: &str) {
    let server = start(runtime, &["--dax-fs-map"]);
    let content = pattern(3 * RANGE as usize, 1);
    host_file(&server, "file", &content);
    let host = open_on_host(&server, "file");
    for (profile, behaviour) in VMMS {
        let mut vm = Vm::start_as(&server, profile, behaviour);
        let node = vm.node("file");
        vm.map(node, 0, 3, false);
        vm.map(node, 2, 0, true);
        assert_eq!(vm.mapped(), [(0, true), (3, behaviour.strict)]);
        let whole = vm.read(3 * RANGE, RANGE as usize).unwrap();
        assert_eq!(whole, content[..RANGE as usize]);
        // What the guest writes, the host and READ see at once, and the reverse.
        vm.window.write(RANGE - 10, b"from guest").unwrap();
        let mut seen = [0; 10];
        host.read_exact_at(&mut seen, 3 * RANGE - 10).unwrap();
        assert_eq!(&seen, b"from guest");
        let handle = vm.guest.open(node, libc::O_RDWR).unwrap();
        let read = vm.guest.read(node, handle, 3 * RANGE - 10, 10).unwrap();
        assert_eq!(read, b"from guest");
        host.write_all_at(b"from host", 5).unwrap();
        assert_eq!(vm.read(3 * RANGE + 5, 9).unwrap(), b"from host");
        vm.guest.write(node, handle, 5, b"by WRITE ").unwrap();
        assert_eq!(vm.read(3 * RANGE + 5, 9).unwrap(), b"by WRITE ");
        host.write_all_at(&content[..20], 0).unwrap();
        // It becomes writable where it is; a second request changes nothing.
        vm.map(node, 0, 3, true);
        let requests = vm.window.requests();
        vm.map(node, 0, 3, true);
        vm.map(node, 0, 3, false);
        assert_eq!(vm.window.requests(), requests);
        assert_eq!(vm.mapped(), [(0, true), (3, true)]);
        vm.guest.fsync(node, handle, false).unwrap();
        vm.guest
            .remove_mappings(node, &[(3 * RANGE, RANGE), (0, RANGE)])
            .unwrap();
        assert_eq!(vm.mapped(), []);
        let gone = vm.read(3 * RANGE, 1).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::EFAULT));
    }
}

#[each_runtime]
fn guest_maps_only_what_it_may_open(runtime: &str) {
    let server = start(runtime, &["--readonly"]);
    host_file(&server, "file", b"content");
    std::fs::create_dir(server.share().join("dir")).unwrap();
    std::os::unix::fs::symlink("file", server.share().join("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        server.share().join("fifo"),
        rustix::fs::FileType::Fifo,
        0o644.into(),
        0,
    )
    .unwrap();
    let mut vm = Vm::start(&server);
    let node = vm.node("file");
    vm.map(node, 0, 0, false);
    let write = vm.guest.setup_mapping(node, (0, RANGE), RANGE, true);
    assert_eq!(errno(write), Some(libc::EROFS));
    let upgrade = vm.guest.setup_mapping(node, (0, RANGE), 0, true);
    assert_eq!(errno(upgrade), Some(libc::EROFS));
    assert_eq!(vm.mapped(), [(0, false)]);
    // The VMM got a descriptor that gives no more either: it can't be mapped for writing.
    assert!(vm.window.write(0, b"x").is_err());
    for (name, expected) in [
        ("dir", libc::EISDIR),
        ("link", libc::ELOOP),
        ("fifo", libc::ENXIO),
    ] {
        let node = vm.node(name);
        let result = vm.guest.setup_mapping(node, (0, RANGE), RANGE, false);
        assert_eq!(errno(result), Some(expected), "{name}");
    }
    let unknown = vm.guest.setup_mapping(99, (0, RANGE), RANGE, false);
    assert_eq!(errno(unknown), Some(libc::ESTALE));
    assert_eq!(vm.mapped(), [(0, false)]);
}

#[each_runtime]
fn invalid_ranges_change_nothing(runtime: &str) {
    let server = start(runtime, &[]);
    host_file(&server, "file", &[1; 8192]);
    let mut vm = Vm::start(&server);
    let node = vm.node("file");
    vm.map(node, 0, 1, true);
    let requests = vm.window.requests();
    for ((offset, len), at) in [
        ((0, 0), 0),
        ((0, 4095), 0),
        ((1, RANGE), 0),
        ((0, RANGE), 1),
        ((0, RANGE), WINDOW),
        ((0, 2 * WINDOW), 0),
        ((0, RANGE), u64::MAX - 4095),
        ((u64::MAX - 4095, 8192), 0),
        ((i64::MAX as u64 - 4095, 8192), 0),
        // Part of what is mapped.
        ((0, 4096), RANGE),
        ((0, RANGE), RANGE + 4096),
    ] {
        let result = vm.guest.setup_mapping(node, (offset, len), at, true);
        assert_eq!(
            errno(result),
            Some(libc::EINVAL),
            "{offset:#x} {len:#x} {at:#x}"
        );
    }
    for range in [
        (0, 0),
        (1, RANGE),
        (0, WINDOW + RANGE),
        (RANGE, 4096),
        (u64::MAX, 2),
    ] {
        let result = vm.guest.remove_mappings(node, &[(RANGE, RANGE), range]);
        assert_eq!(errno(result), Some(libc::EINVAL), "{range:?}");
    }
    assert_eq!(vm.window.requests(), requests);
    assert_eq!(vm.mapped(), [(1, true)]);
    vm.guest.remove_mappings(node, &[]).unwrap();
    vm.guest.remove_mappings(node, &[(0, WINDOW)]).unwrap();
    assert_eq!(vm.mapped(), []);
}

#[each_runtime]
fn truncation_under_a_mapping_is_the_guest_s_fault_only(runtime: &str) {
    let server = start(runtime, &[]);
    let content = pattern(RANGE as usize, 2);
    host_file(&server, "file", &content);
    let mut vm = Vm::start(&server);
    let node = vm.node("file");
    vm.map(node, 0, 0, true);
    assert_eq!(vm.read(0, 4096).unwrap(), content[..4096]);
    vm.guest.truncate(node, 100).unwrap();
    // The page in which the file ends is there, and has zeros behind the end.
    let page = vm.read(0, 4096).unwrap();
    assert_eq!(
        (&page[..100], &page[100..]),
        (&content[..100], &[0; 3996][..])
    );
    // A processor that goes on gets SIGBUS, for which the kernel says EFAULT here.
    assert_eq!(
        vm.read(8192, 1).unwrap_err().raw_os_error(),
        Some(libc::EFAULT)
    );
    assert!(vm.window.write(8192, b"x").is_err());
    // The file grows under the mapping.
    vm.guest.truncate(node, RANGE).unwrap();
    assert_eq!(vm.read(8192, 4096).unwrap(), [0; 4096]);
    vm.window.write(8192, b"hole").unwrap();
    let host = open_on_host(&server, "file");
    let mut seen = [0; 4];
    host.read_exact_at(&mut seen, 8192).unwrap();
    assert_eq!(&seen, b"hole");
    // Without a name, as long as it is mapped.
    vm.guest.unlink(ROOT, c"file").unwrap();
    assert_eq!(vm.read(8192, 4).unwrap(), b"hole");
    vm.guest.getattr(node).unwrap();
}

#[each_runtime]
fn refusal_of_the_vmm_is_an_errno(runtime: &str) {
    let server = start(runtime, &[]);
    host_file(&server, "file", &[1; 4096]);
    let mut vm = Vm::start(&server);
    let node = vm.node("file");
    for (code, expected) in [
        ((-12_i64).cast_unsigned(), libc::ENOMEM),
        (1, libc::EIO),
        // It would have the guest try again for ever.
        ((-11_i64).cast_unsigned(), libc::EIO),
    ] {
        vm.window.refuse_next(code);
        let result = vm.guest.setup_mapping(node, (0, RANGE), 0, true);
        assert_eq!(errno(result), Some(expected), "{code}");
        assert_eq!(vm.mapped(), []);
    }
    vm.map(node, 0, 0, true);
    vm.window.refuse_next(1);
    let removal = vm.guest.remove_mappings(node, &[(0, RANGE)]);
    assert_eq!(errno(removal), Some(libc::EIO));
    vm.guest.remove_mappings(node, &[(0, RANGE)]).unwrap();
    assert_eq!(vm.mapped(), []);
}

#[each_runtime]
fn files_are_marked_by_size_where_the_guest_decides_by_it(runtime: &str) {
    for (args, small, large) in [
        (&[][..], false, true),
        (&["--dax", "always"], true, true),
        (&["--dax", "never"], false, false),
        (&["--dax-min-size", "4K"], true, true),
        (&["--dax-min-size", "8M"], false, false),
    ] {
        let server = start(runtime, args);
        host_file(&server, "small", &[1; 4096]);
        host_file(&server, "large", &[1; 1 << 20]);
        std::fs::create_dir(server.share().join("dir")).unwrap();
        let mut vm = Vm::start(&server);
        for (name, expected) in [(c"small", small), (c"large", large), (c"dir", false)] {
            let entry = vm.guest.lookup(ROOT, name).unwrap();
            let attributes = vm.guest.getattr(entry.nodeid).unwrap().attr;
            for flags in [entry.attr.flags, attributes.flags] {
                assert_eq!(flags & ATTR_DAX != 0, expected, "{args:?} {name:?}");
            }
        }
        // A guest that hasn't negotiated the flag gets none.
        let options = Options::default();
        drop(vm);
        let server = start(runtime, args);
        host_file(&server, "large", &[1; 1 << 20]);
        let mut guest = server.session(Profile::Qemu, &options);
        let entry = guest.lookup(ROOT, c"large").unwrap();
        assert_eq!(entry.attr.flags & ATTR_DAX, 0);
        let refused = guest.setup_mapping(entry.nodeid, (0, RANGE), 0, false);
        assert_eq!(errno(refused), Some(libc::EOPNOTSUPP));
    }
}

#[each_runtime]
fn files_are_marked_by_their_first_name(runtime: &str) {
    let args = ["--dax-include=*.{gguf,img}", "--dax-exclude=old*"];
    let server = start(runtime, &args);
    for name in ["a.gguf", "b.img", "c.iso", "old.img"] {
        host_file(&server, name, &[1; 1 << 20]);
    }
    host_file(&server, "small.img", &[1; 4096]);
    std::fs::create_dir(server.share().join("dir.img")).unwrap();
    let mut vm = Vm::start(&server);
    let has = |flags: u32| flags & ATTR_DAX != 0;
    for (name, expected) in [
        (c"a.gguf", true),
        (c"b.img", true),
        (c"c.iso", false),
        (c"old.img", false),
        (c"small.img", false),
        (c"dir.img", false),
    ] {
        let entry = vm.guest.lookup(ROOT, name).unwrap();
        let attributes = vm.guest.getattr(entry.nodeid).unwrap().attr;
        let marks = [entry.attr.flags, attributes.flags].map(has);
        assert_eq!(marks, [expected; 2], "{name:?}");
    }
    // Under another name it stays what it is, as long as the guest knows it.
    let marked = vm.guest.lookup(ROOT, c"a.gguf").unwrap().nodeid;
    let unmarked = vm.guest.lookup(ROOT, c"c.iso").unwrap().nodeid;
    vm.guest.rename(ROOT, c"a.gguf", ROOT, c"a.iso").unwrap();
    let link = vm.guest.link(unmarked, ROOT, c"c.img").unwrap();
    assert_eq!((link.nodeid, has(link.attr.flags)), (unmarked, false));
    for (name, node, expected, lookups) in
        [(c"a.iso", marked, true, 3), (c"c.img", unmarked, false, 4)]
    {
        let entry = vm.guest.lookup(ROOT, name).unwrap();
        assert_eq!((entry.nodeid, has(entry.attr.flags)), (node, expected));
        assert_eq!(has(vm.guest.getattr(node).unwrap().attr.flags), expected);
        // The guest forgets it: each lookup, and the link.
        vm.guest.forget(node, lookups).unwrap();
        let entry = vm.guest.lookup(ROOT, name).unwrap();
        assert_eq!(has(entry.attr.flags), !expected, "{name:?}");
    }
    // What the guest creates has a name, too, and may grow.
    let (entry, handle) = vm.guest.create(ROOT, c"new.img", 0o644).unwrap();
    assert!(!has(entry.attr.flags));
    vm.guest.truncate(entry.nodeid, 1 << 20).unwrap();
    let attributes = vm.guest.getattr(entry.nodeid).unwrap().attr;
    assert!(has(attributes.flags));
    vm.guest.release(entry.nodeid, handle).unwrap();
    let directory = vm.guest.opendir(ROOT).unwrap();
    let mut listed = vm.guest.readdirplus_all(ROOT, directory).unwrap();
    listed.retain(|it| has(it.node.attr.flags));
    let mut marked: Vec<_> = listed.iter().map(|it| &it.entry.name).collect();
    marked.sort();
    // The inode of `c.img` has another name.
    assert_eq!(marked, ["b.img", "c.img", "c.iso", "new.img"]);
}

#[test]
fn without_the_option_there_is_no_window() {
    let server = Server::start(&[]);
    host_file(&server, "file", &[1; 1 << 20]);
    let mut session = Profile::Crosvm
        .connect(server.connect(), &Options::default())
        .unwrap();
    assert_eq!(session.shared_memory, Vec::<u64>::new());
    assert!(session.connection.get_shmem_config().is_err());
    let server = Server::start(&[]);
    host_file(&server, "file", &[1; 1 << 20]);
    let session = Profile::Crosvm
        .connect(server.connect(), &Options::default())
        .unwrap();
    let mut guest = Client::new(session);
    let agreed = guest.init_offering(OFFERS).unwrap();
    assert_eq!(u64::from(agreed.flags) & init::MAP_ALIGNMENT, 0);
    let entry = guest.lookup(ROOT, c"file").unwrap();
    assert_eq!(entry.attr.flags & ATTR_DAX, 0);
    let mapping = guest.setup_mapping(entry.nodeid, (0, RANGE), 0, false);
    assert_eq!(errno(mapping), Some(libc::ENOSYS));
}

#[test]
fn vmm_without_shmem_is_asked_for_nothing_unless_that_is_wanted() {
    let server = start("auto", &[]);
    host_file(&server, "file", &[1; 4096]);
    let mut vm = Vm::start_as(&server, Profile::Dragonball, FS_MAP);
    let node = vm.node("file");
    let refused = vm.guest.setup_mapping(node, (0, RANGE), 0, false);
    assert_eq!(errno(refused), Some(libc::EOPNOTSUPP));
    assert_eq!(vm.window.requests(), 0);
}

#[each_runtime]
fn end_of_the_guest_s_session_removes_its_mappings(runtime: &str) {
    let server = start(runtime, &["--keep-listening"]);
    host_file(&server, "file", &[1; 4096]);
    let mut vm = Vm::start_as(&server, Profile::Simple, Behaviour::default());
    for _ in 0..3 {
        let node = vm.node("file");
        for slot in 0..4 {
            vm.map(node, slot, slot, slot % 2 == 0);
        }
        // The guest unmounts, or restarts without that.
        vm.guest.destroy().unwrap();
        vm.guest.init_offering(OFFERS).unwrap();
        // They are removed soon; what is mapped next waits for none of that.
        let node = vm.node("file");
        vm.map(node, 0, 0, true);
        let end = std::time::Instant::now() + TIMEOUT;
        while vm.mapped() != [(0, true)] {
            assert!(std::time::Instant::now() < end, "{:?}", vm.mapped());
            std::thread::yield_now();
        }
        vm.guest.remove_mappings(node, &[(0, RANGE)]).unwrap();
    }
    // The next VMM has a window of its own.
    let node = vm.node("file");
    vm.map(node, 0, 0, true);
    drop(vm);
    let mut vm = Vm::start_as(&server, Profile::Simple, Behaviour::default());
    let node = vm.node("file");
    assert_eq!(vm.mapped(), []);
    vm.map(node, 0, 0, false);
    assert_eq!(vm.mapped(), [(0, false)]);
}

#[each_runtime]
fn vmm_that_does_not_answer_delays_nobody_else(runtime: &str) {
    let server = start(runtime, &[]);
    host_file(&server, "file", &[1; 4096]);
    let mut vm = Vm::start(&server);
    let node = vm.node("file");
    vm.window.set_silent(true);
    let pending = vm.guest.submit_mapping(node, (0, RANGE), 0, true).unwrap();
    // Other requests and messages are answered meanwhile.
    vm.guest.getattr(node).unwrap();
    vm.guest.guest().connection.get_features().unwrap();
    // A queue is stopped soon, though the VMM doesn't answer; the guest is told to try again.
    let bases = vm.guest.guest().stop().unwrap();
    vm.guest.guest().restart(&bases).unwrap();
    let reply = vm.guest.collect(pending).map(|_reply| ());
    assert_eq!(errno(reply), Some(libc::EAGAIN));
}

#[test]
fn migration_is_refused_while_something_is_mapped() {
    let server = start("auto", &[]);
    host_file(&server, "file", &[1; 4096]);
    let mut vm = Vm::start(&server);
    let node = vm.node("file");
    vm.map(node, 0, 0, true);
    let bases = vm.guest.guest().stop().unwrap();
    assert!(vm.guest.guest().save_state(TIMEOUT).is_err());
    vm.guest.guest().restart(&bases).unwrap();
    assert_eq!(vm.read(0, 1).unwrap(), [1]);
    vm.guest.remove_mappings(node, &[(0, RANGE)]).unwrap();
    vm.guest.guest().stop().unwrap();
    let state = vm.guest.guest().save_state(TIMEOUT).unwrap();
    // A server without a window has nothing for this guest.
    for (args, accepted) in [(&["--dax-window=8M"][..], true), (&[], false)] {
        let other = Server::start_sharing(&server.share(), args);
        let options = Options::default().queue_size(128);
        let mut session = Profile::Crosvm.prepare(other.connect(), &options).unwrap();
        assert_eq!(session.load_state(&state).is_ok(), accepted, "{args:?}");
    }
}

#[test]
fn files_of_several_file_systems_are_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = testing::command();
    command.args(["--dax-window", "8M", "--socket"]);
    command.arg(dir.path().join("socket"));
    for name in ["one", "two"] {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("file"), pattern(1 << 20, name.len() as u64)).unwrap();
        std::fs::write(path.join("name"), name).unwrap();
        command.arg(format!("--vfs=/{name}={}", path.display()));
    }
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    let mut vm = Vm::start(&server);
    for (slot, name) in [(0, "one"), (1, "two")] {
        let top = vm.node(name);
        let entry = vm.guest.lookup(top, c"file").unwrap();
        assert_ne!(entry.attr.flags & ATTR_DAX, 0);
        let node = vm.guest.lookup(top, c"name").unwrap().nodeid;
        vm.map(node, 0, slot, true);
        assert_eq!(vm.read(slot * RANGE, 3).unwrap(), name.as_bytes());
    }
    let result = vm.guest.setup_mapping(ROOT, (0, RANGE), 2 * RANGE, false);
    assert_eq!(errno(result), Some(libc::EISDIR));
}
