//! Descriptors are limited, and an unprivileged server reopens what it has closed.
//!
//! `RINGFSD_TREE_FILES` makes the tree larger than the gate has time for.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use testing::{Server, USER, each_runtime};
use vmm::fuse::{Client, Handle, ROOT};
use vmm::{Options, Profile, Session};

/// Descriptors that the server's process may have.
const LIMIT: usize = 256;
/// Files of one directory.
const WIDTH: usize = 100;
/// Files that stay open all the time.
const OPEN: usize = 100;
/// Files that are unlinked, one half of them open.
const UNLINKED: usize = 20;
fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

/// A server of an ordinary user.
fn ordinary(runtime: &str) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    // Where the user gets at it, wherever this was built.
    let program = dir.path().join("ringfsd");
    testing::copy_program(testing::program(), &program);
    let mut command = Command::new("prlimit");
    command.arg(format!("--nofile={LIMIT}:{LIMIT}"));
    if rustix::process::geteuid().is_root() {
        for path in [dir.path(), &share] {
            chown(path, Some(USER), Some(USER)).unwrap();
        }
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let user = USER.to_string();
        let ids = ["--reuid", &user, "--regid", &user, "--clear-groups"];
        command.arg("setpriv").args(ids);
    }
    command
        .arg(program)
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--shared-dir")
        .arg(share)
        .args(["--log-level", "info", "--runtime", runtime])
        .args(["--max-open-inodes", "180"]);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    server
}

/// One file of the tree.
struct Planted {
    dir: usize,
    name: String,
    path: PathBuf,
    inode: u64,
}

impl Planted {
    fn content(&self) -> Vec<u8> {
        format!("{}/{} as it was", self.dir, self.name).into_bytes()
    }

    fn new_content(&self) -> Vec<u8> {
        format!("{}/{} rewritten by the guest", self.dir, self.name).into_bytes()
    }
}

fn give(path: &Path) {
    if rustix::process::geteuid().is_root() {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
}

/// Makes a tree of `count` files.
fn plant(share: &Path, count: usize) -> Vec<Planted> {
    let mut planted = Vec::new();
    for dir in 0..count / WIDTH {
        let at = share.join(format!("dir{dir}"));
        std::fs::create_dir(&at).unwrap();
        for n in 0..WIDTH {
            let name = format!("file{n}");
            let mut file = Planted {
                dir,
                path: at.join(&name),
                name,
                inode: 0,
            };
            std::fs::write(&file.path, file.content()).unwrap();
            give(&file.path);
            file.inode = std::fs::metadata(&file.path).unwrap().ino();
            planted.push(file);
        }
        give(&at);
    }
    planted
}

/// What a guest knows and has open.
struct Guest {
    fs: Client<Session>,
    /// How often each node was looked up.
    lookups: HashMap<u64, u64>,
    largest: usize,
}

impl Guest {
    fn lookup(&mut self, parent: u64, name: &CStr) -> vmm::fuse::wire::EntryOut {
        let entry = self.fs.lookup(parent, name).unwrap();
        *self.lookups.entry(entry.nodeid).or_default() += 1;
        entry
    }

    fn create(&mut self, name: &str) -> (u64, Handle) {
        let (entry, handle) = self.fs.create(ROOT, &c(name), 0o644).unwrap();
        *self.lookups.entry(entry.nodeid).or_default() += 1;
        (entry.nodeid, handle)
    }

    /// Node ids of the names in a directory, by number.
    fn walk(&mut self, dir: u64) -> HashMap<u64, u64> {
        let handle = self.fs.opendir(dir).unwrap();
        let listed = self.fs.readdirplus_all(dir, handle).unwrap();
        self.fs.releasedir(dir, handle).unwrap();
        let mut found = HashMap::new();
        for one in listed.iter().filter(|one| one.node.nodeid != 0) {
            *self.lookups.entry(one.node.nodeid).or_default() += 1;
            found.insert(one.node.attr.ino, one.node.nodeid);
        }
        found
    }

    fn read(&mut self, node: u64, handle: Handle) -> Vec<u8> {
        self.fs.read(node, handle, 0, 4096).unwrap()
    }

    fn sample(&mut self, server: &Server) {
        self.largest = self.largest.max(server.holdings().descriptors);
    }

    fn forget_all(&mut self) {
        let forgets: Vec<(u64, u64)> = self.lookups.drain().collect();
        for some in forgets.chunks(500) {
            self.fs.batch_forget(some).unwrap();
        }
    }
}

#[each_runtime]
fn unprivileged_server_with_few_descriptors_serves_large_tree(runtime: &str) {
    let count = std::env::var("RINGFSD_TREE_FILES").map_or(5000, |count| count.parse().unwrap());
    let server = ordinary(runtime);
    let planted = plant(&server.share(), count);
    let mut guest = Guest {
        fs: server.session(Profile::Simple, &Options::default()),
        lookups: HashMap::new(),
        largest: 0,
    };
    let before = server.holdings().descriptors;
    let begin = Instant::now();

    let unlinked: Vec<(u64, Handle)> = (0..UNLINKED)
        .map(|n| {
            let name = format!("unlinked{n}");
            let (node, handle) = guest.create(&name);
            guest.fs.write(node, handle, 0, name.as_bytes()).unwrap();
            if n % 2 == 0 {
                guest.fs.release(node, handle).unwrap();
            }
            guest.fs.unlink(ROOT, &c(&name)).unwrap();
            (node, handle)
        })
        .collect();

    // Walked: all are known from here on.
    let dirs: Vec<u64> = (0..count / WIDTH)
        .map(|n| guest.lookup(ROOT, &c(&format!("dir{n}"))).nodeid)
        .collect();
    let mut nodes = Vec::new();
    for (n, files) in planted.chunks(WIDTH).enumerate() {
        let found = guest.walk(dirs[n]);
        nodes.extend(files.iter().map(|file| found[&file.inode]));
        guest.sample(&server);
    }
    println!("{runtime}: walked after {:?}", begin.elapsed());

    let open: Vec<(usize, Handle)> = (0..OPEN)
        .map(|n| {
            let at = n * (count / OPEN);
            (at, guest.fs.open(nodes[at], libc::O_RDWR).unwrap())
        })
        .collect();

    // Each directory moves, and moves again below another: its files are found all the same.
    for (n, dir) in dirs.iter().enumerate().skip(1) {
        let (old, new) = (c(&format!("dir{n}")), c(&format!("moved{n}")));
        guest.fs.rename(ROOT, &old, dirs[0], &new).unwrap();
        assert_eq!(guest.lookup(dirs[0], &new).nodeid, *dir);
    }
    for (file, node) in planted.iter().zip(&nodes) {
        let attr = guest.fs.getattr(*node).unwrap().attr;
        assert_eq!(attr.ino, file.inode);
    }
    guest.sample(&server);
    println!(
        "{runtime}: moved, and looked at, after {:?}",
        begin.elapsed()
    );

    for (n, (file, node)) in planted.iter().zip(&nodes).enumerate() {
        let handle = guest.fs.open(*node, libc::O_RDWR).unwrap();
        assert_eq!(guest.read(*node, handle), file.content());
        guest
            .fs
            .write(*node, handle, 0, &file.new_content())
            .unwrap();
        guest.fs.release(*node, handle).unwrap();
        if n % WIDTH == 0 {
            guest.sample(&server);
        }
    }
    println!("{runtime}: rewritten after {:?}", begin.elapsed());

    for (at, handle) in open {
        assert_eq!(guest.read(nodes[at], handle), planted[at].new_content());
        guest.fs.release(nodes[at], handle).unwrap();
    }
    for (n, (node, handle)) in unlinked.iter().enumerate() {
        let name = format!("unlinked{n}");
        let attr = guest.fs.getattr(*node).unwrap().attr;
        assert_eq!((attr.size, attr.nlink), (name.len() as u64, 0));
        let again = guest.fs.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(*node, again), name.as_bytes());
        guest.fs.release(*node, again).unwrap();
        if n % 2 == 1 {
            guest.fs.release(*node, *handle).unwrap();
        }
    }
    for file in &planted {
        let below = match file.dir {
            0 => file.path.clone(),
            n => server.share().join(format!("dir0/moved{n}/{}", file.name)),
        };
        assert_eq!(std::fs::read(below).unwrap(), file.new_content());
    }

    assert!(
        guest.largest <= LIMIT && guest.largest > 150,
        "{}",
        guest.largest
    );
    guest.forget_all();
    assert!(server.holdings().descriptors <= before);
    println!(
        "{runtime}: {count} files, at most {} descriptors, {:?}",
        guest.largest,
        begin.elapsed()
    );
}
