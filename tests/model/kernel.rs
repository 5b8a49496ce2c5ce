//! A guest's kernel: names and inodes that it caches, and the requests that it sends when a program
//! makes a system call, as Linux does (`fs/namei.c`, `fs/fuse/dir.c`).
//!
//! A name is used without a request for as long as the server said. A call that fails with `ESTALE`
//! walks its path once more, and then sends a request for each name; there is no third attempt.
//! Inodes that are no longer in use are forgotten. The invariant: no request is made while the
//! tables are locked, and an inode is not forgotten while a call, a name or an open file uses it.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use host_changes::{ATTRIBUTE, Programs, Reliance};
use vmm::fuse::wire::{EntryOut, SetattrIn, WriteIn, WriteOut, opcode, setattr};
use vmm::fuse::{Call, Client, FuseError, Handle, Lane, ROOT};
use zerocopy::IntoBytes;

/// For how long the server may take the directories above an inode to be where they were.
pub(crate) const DIRECTORIES_STAY: Duration = Duration::from_millis(30);

type Result<T> = std::result::Result<T, i32>;

/// How long after it got `ESTALE` a process may pass once to an inode that it has looked up
/// since, whatever has become of its name: else the second walk of a path could fail as the first
/// did.
const PASS: Duration = Duration::from_secs(2);

/// What all processes of a guest share.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    tables: Mutex<Tables>,
    /// Of directories, by node id: shared while a name in one is looked up, exclusive while one is
    /// changed. Taken before `tables`, and of two directories the lower number first.
    directories: Mutex<HashMap<u64, Arc<RwLock<()>>>>,
}

#[derive(Debug, Default)]
struct Tables {
    /// By the directory's node id and the name.
    names: HashMap<(u64, String), Name>,
    nodes: HashMap<u64, Node>,
    /// The server wants no OPEN.
    no_open: bool,
    retries: u64,
}

/// A name that is cached.
#[derive(Clone, Copy, Debug)]
struct Name {
    /// None where there was nothing.
    node: Option<u64>,
    expires: Instant,
}

/// An inode that the server counts lookups of.
#[derive(Clone, Copy, Debug)]
struct Node {
    lookups: u64,
    /// Names in the cache, calls in progress, and open files.
    users: u64,
    open: u64,
    /// How many times it has been opened, or is being opened.
    opens: u64,
    looked_up: Instant,
    attributes_expire: Instant,
}

/// How a path is walked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    /// By what is cached.
    Cached,
    /// Each name is asked for.
    Revalidate,
}

/// An open file.
#[derive(Debug)]
pub(crate) struct Open {
    node: u64,
    handle: Handle,
    flags: i32,
    /// Whether closing it needs a RELEASE.
    release: bool,
}

/// One process, with a queue of its own.
#[derive(Debug)]
pub(crate) struct Process {
    kernel: Arc<Kernel>,
    client: Client<Lane>,
    /// Inodes that the current call uses.
    used: Vec<u64>,
    /// When the second walk of a path began, which the server may rely on.
    walked_again: Option<Instant>,
    /// When this process last got `ESTALE`.
    refused: Option<Instant>,
    reliance: Option<Reliance>,
    /// The inode of `reliance`, and how many times it had been opened by then.
    relied_on: Option<(u64, u64)>,
}

/// Where a path leads.
struct Walked {
    parent: u64,
    name: String,
    node: Option<u64>,
}

impl Walked {
    fn existing(&self) -> Result<u64> {
        self.node.ok_or(libc::ENOENT)
    }
}

/// The error number. Anything else is no answer of a file system.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn errno(error: FuseError) -> i32 {
    error
        .errno()
        .unwrap_or_else(|| panic!("the server breaks the protocol: {error}"))
}

fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

fn until(seconds: u64, nanoseconds: u32) -> Instant {
    // As far as an Instant reaches.
    Instant::now() + Duration::new(seconds.min(1 << 30), nanoseconds)
}

impl Tables {
    fn count(&mut self, entry: &EntryOut, asked: Instant) {
        let attributes_expire = until(entry.attr_valid, entry.attr_valid_nsec);
        let node = self.nodes.entry(entry.nodeid).or_insert(Node {
            lookups: 0,
            users: 0,
            open: 0,
            opens: 0,
            looked_up: asked,
            attributes_expire,
        });
        node.lookups += 1;
        // Answers may come in another order than they were asked for.
        node.looked_up = node.looked_up.max(asked);
        node.attributes_expire = attributes_expire;
    }

    fn add_user(&mut self, node: u64) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.users += 1;
        }
    }

    /// Ends one use. What has to be forgotten is added to `gone`.
    fn remove_user(&mut self, node: u64, gone: &mut Vec<(u64, u64)>) {
        let Some(found) = self.nodes.get_mut(&node) else {
            return;
        };
        found.users -= 1;
        if found.users == 0 {
            gone.push((node, found.lookups));
            self.nodes.remove(&node);
        }
    }

    fn set_name(&mut self, at: (u64, String), name: Name, gone: &mut Vec<(u64, u64)>) {
        if let Some(known) = self.names.get_mut(&at)
            && known.node == name.node
        {
            known.expires = name.expires;
            return;
        }
        if let Some(node) = name.node {
            self.add_user(node);
        }
        self.drop_name(&at, gone);
        self.names.insert(at, name);
    }

    /// Drops a name, and those that are only reached through it.
    fn drop_name(&mut self, at: &(u64, String), gone: &mut Vec<(u64, u64)>) {
        let Some(name) = self.names.remove(at) else {
            return;
        };
        let Some(node) = name.node else { return };
        if !self.names.values().any(|other| other.node == Some(node)) {
            let below = self.names.keys().filter(|key| key.0 == node);
            for key in below.cloned().collect::<Vec<_>>() {
                self.drop_name(&key, gone);
            }
        }
        self.remove_user(node, gone);
    }
}

impl Kernel {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap()
    }

    fn directory(&self, node: u64) -> Arc<RwLock<()>> {
        let mut directories = self.directories.lock().unwrap();
        Arc::clone(directories.entry(node).or_default())
    }

    /// How many second attempts there were.
    pub(crate) fn retries(&self) -> u64 {
        self.tables().retries
    }
}

impl Process {
    /// A process of the guest that has this kernel, and this number.
    pub(crate) fn new(kernel: &Arc<Kernel>, mut client: Client<Lane>, pid: u32) -> Self {
        client.set_pid(pid);
        Self {
            kernel: Arc::clone(kernel),
            client,
            used: Vec::new(),
            walked_again: None,
            refused: None,
            reliance: None,
            relied_on: None,
        }
    }

    /// Unmounts: everything is forgotten.
    pub(crate) fn unmount(mut self) -> Client<Lane> {
        self.drop_caches().unwrap();
        assert!(self.kernel.tables().nodes.is_empty());
        self.client
    }

    fn forget(&mut self, gone: &[(u64, u64)]) -> Result<()> {
        match gone {
            [] => Ok(()),
            [(node, lookups)] => self.client.forget(*node, *lookups).map_err(errno),
            several => several
                .chunks(16)
                .try_for_each(|some| self.client.batch_forget(some).map_err(errno)),
        }
    }

    /// Changes the tables, and forgets what that leaves unused.
    fn update<T>(
        &mut self,
        change: impl FnOnce(&mut Tables, &mut Vec<(u64, u64)>) -> T,
    ) -> Result<T> {
        let mut gone = Vec::new();
        let done = change(&mut self.kernel.tables(), &mut gone);
        self.forget(&gone)?;
        Ok(done)
    }

    /// One system call: done a second time, and for the last, if the first attempt is `ESTALE`.
    fn call<T>(&mut self, attempt: impl Fn(&mut Self, Walk) -> Result<T>) -> Result<T> {
        let mut done = self.attempt(&attempt, Walk::Cached);
        if matches!(done, Err(libc::ESTALE)) {
            self.kernel.tables().retries += 1;
            self.refused = Some(Instant::now());
            done = self.attempt(&attempt, Walk::Revalidate);
        }
        done
    }

    fn attempt<T>(
        &mut self,
        attempt: impl Fn(&mut Self, Walk) -> Result<T>,
        walk: Walk,
    ) -> Result<T> {
        self.reliance = None;
        self.walked_again = (walk == Walk::Revalidate).then(Instant::now);
        let done = attempt(self, walk);
        self.note_opened_meanwhile();
        let used = std::mem::take(&mut self.used);
        self.update(|tables, gone| {
            for node in used {
                tables.remove_user(node, gone);
            }
        })?;
        done
    }

    /// Takes what the server answered for a name into the tables, in use by this call.
    /// The answer is about what was there when it was `asked` for, or later.
    fn take(&mut self, parent: u64, name: &str, entry: &EntryOut, asked: Instant) -> Result<u64> {
        let found = Name {
            node: Some(entry.nodeid),
            expires: until(entry.entry_valid, entry.entry_valid_nsec),
        };
        let node = entry.nodeid;
        self.update(|tables, gone| {
            tables.count(entry, asked);
            tables.add_user(node);
            tables.set_name((parent, name.to_owned()), found, gone);
        })?;
        self.used.push(node);
        Ok(node)
    }

    fn drop_name(&mut self, parent: u64, name: &str) -> Result<()> {
        let at = (parent, name.to_owned());
        self.update(|tables, gone| tables.drop_name(&at, gone))
    }

    /// One name of a path. `fresh` asks the server even where the name is cached.
    fn step(&mut self, parent: u64, name: &str, fresh: bool) -> Result<Option<u64>> {
        let at = (parent, name.to_owned());
        let directory = self.kernel.directory(parent);
        let _shared = directory.read().unwrap();
        let asked = Instant::now();
        let cached = {
            let mut tables = self.kernel.tables();
            let cached = tables.names.get(&at).copied();
            if let Some(node) = cached.and_then(|cached| cached.node) {
                tables.add_user(node);
                self.used.push(node);
            }
            cached
        };
        if let Some(cached) = cached {
            if !fresh && Instant::now() < cached.expires {
                return Ok(cached.node);
            }
            if let Some(node) = cached.node {
                match self.client.lookup(parent, &c(name)) {
                    Ok(entry) if entry.nodeid == node => {
                        return self.take(parent, name, &entry, asked).map(Some);
                    }
                    Ok(entry) if entry.nodeid != 0 => self.forget(&[(entry.nodeid, 1)])?,
                    Ok(_) | Err(_) => {}
                }
            }
            self.drop_name(parent, name)?;
        }
        match self.client.lookup(parent, &c(name)).map_err(errno) {
            Ok(entry) if entry.nodeid != 0 => self.take(parent, name, &entry, asked).map(Some),
            Ok(entry) => {
                let nothing = Name {
                    node: None,
                    expires: until(entry.entry_valid, entry.entry_valid_nsec),
                };
                self.update(|tables, gone| tables.set_name(at, nothing, gone))?;
                Ok(None)
            }
            Err(libc::ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// The directory and the name that a path ends with.
    fn walk_above<'p>(&mut self, path: &'p str, walk: Walk) -> Result<(u64, &'p str)> {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut parent = ROOT;
        for name in above.split('/').filter(|name| !name.is_empty()) {
            let found = self.step(parent, name, walk == Walk::Revalidate)?;
            parent = found.ok_or(libc::ENOENT)?;
        }
        Ok((parent, name))
    }

    /// `fresh`: the last name is asked for, as by a call that makes it or renames to it.
    fn walk_to(&mut self, path: &str, walk: Walk, fresh: bool) -> Result<Walked> {
        let (parent, name) = self.walk_above(path, walk)?;
        let node = self.step(parent, name, fresh || walk == Walk::Revalidate)?;
        Ok(Walked {
            parent,
            name: name.to_owned(),
            node,
        })
    }

    fn walk(&mut self, path: &str, walk: Walk) -> Result<Walked> {
        self.walk_to(path, walk, false)
    }

    /// Notes what a change that is about to be asked for relies on, for the first of a call.
    fn rely_on(&mut self, node: u64) {
        if self.reliance.is_some() {
            return;
        }
        let found = self.kernel.tables().nodes.get(&node).copied();
        let refused = self.refused.filter(|at| at.elapsed() < PASS);
        let looked_up = found.map(|node| node.looked_up);
        let passes = looked_up.filter(|at| refused.is_some_and(|refused| *at >= refused));
        let since = self.walked_again.unwrap_or_else(Instant::now);
        self.reliance = Some(Reliance {
            since,
            directories_since: since.checked_sub(DIRECTORIES_STAY).unwrap_or(since),
            may_pass: passes.is_some(),
            was_open: Some(found.is_some_and(|node| node.open > 0)),
        });
        self.relied_on = found.map(|found| (node, found.opens));
    }

    /// Notes whether another process has opened the inode since [`rely_on`](Self::rely_on): it may
    /// have had it open when the server looked, even if it has closed it by now.
    fn note_opened_meanwhile(&mut self) {
        if let Some(reliance) = &mut self.reliance
            && let Some((node, opens)) = self.relied_on
            && let Some(node) = self.kernel.tables().nodes.get(&node)
            && node.opens != opens
        {
            reliance.was_open = Some(true);
        }
    }

    fn opened(&mut self, node: u64, handle: Handle, flags: i32, release: bool) -> Open {
        let mut tables = self.kernel.tables();
        if let Some(node) = tables.nodes.get_mut(&node) {
            node.users += 1;
            node.open += 1;
        }
        Open {
            node,
            handle,
            flags,
            release,
        }
    }

    fn count_open(&self, node: u64, more: bool) {
        if let Some(node) = self.kernel.tables().nodes.get_mut(&node) {
            node.open = node.open + u64::from(more) - u64::from(!more);
            node.opens += u64::from(more);
        }
    }

    fn open_node(&mut self, node: u64, flags: i32) -> Result<Open> {
        let no_open = self.kernel.tables().no_open;
        if !no_open {
            let kept = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC);
            // The server has it open before the answer is here.
            self.count_open(node, true);
            let opened = self.client.open(node, kept).map_err(errno);
            let opened = opened.map(|handle| self.opened(node, handle, flags, true));
            self.count_open(node, false);
            match opened {
                Ok(file) => return Ok(file),
                Err(libc::ENOSYS) => self.kernel.tables().no_open = true,
                Err(errno) => return Err(errno),
            }
        }
        Ok(self.opened(node, Handle::raw(0), flags, false))
    }

    fn try_open(&mut self, path: &str, flags: i32, mode: u32, walk: Walk) -> Result<Open> {
        let creates = flags & libc::O_CREAT != 0;
        let excludes = flags & libc::O_EXCL != 0;
        let walked = self.walk_to(path, walk, creates && excludes)?;
        let is_writing = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let Some(node) = walked.node else {
            if !creates {
                return Err(libc::ENOENT);
            }
            self.rely_on(walked.parent);
            let directory = self.kernel.directory(walked.parent);
            let _exclusive = directory.write().unwrap();
            let asked = Instant::now();
            let made = self
                .client
                .create_with(walked.parent, &c(&walked.name), mode, flags);
            let (entry, handle) = match made.map_err(errno) {
                Err(libc::EEXIST) => {
                    self.drop_name(walked.parent, &walked.name)?;
                    return Err(libc::EEXIST);
                }
                made => made?,
            };
            let node = self.take(walked.parent, &walked.name, &entry, asked)?;
            let release = !self.kernel.tables().no_open;
            return Ok(self.opened(node, handle, flags, release));
        };
        if creates && excludes {
            return Err(libc::EEXIST);
        }
        if is_writing {
            self.rely_on(node);
        }
        let file = self.open_node(node, flags)?;
        if flags & libc::O_TRUNC != 0
            && let Err(errno) = self.set_length(node, 0)
        {
            self.close(file)?;
            return Err(errno);
        }
        Ok(file)
    }

    /// By an inode: Linux names no handle even where an `open` empties the file.
    fn set_length(&mut self, node: u64, length: u64) -> Result<()> {
        let asked = SetattrIn {
            valid: setattr::SIZE,
            size: length,
            ..SetattrIn::default()
        };
        self.client.setattr(node, &asked).map(drop).map_err(errno)
    }

    /// Reads a directory with what its names stand for, which are then cached.
    fn try_list(&mut self, path: &str, walk: Walk) -> Result<Vec<String>> {
        let node = self.walk(path, walk)?.existing()?;
        let directory = self.kernel.directory(node);
        let _shared = directory.read().unwrap();
        let asked = Instant::now();
        let handle = match self.client.opendir(node).map_err(errno) {
            Err(libc::ENOSYS) => None,
            handle => Some(handle?),
        };
        let read = self
            .client
            .readdirplus_all(node, handle.unwrap_or(Handle::raw(0)));
        if let Some(handle) = handle {
            self.client.releasedir(node, handle).map_err(errno)?;
        }
        let mut names = Vec::new();
        for found in read.map_err(errno)? {
            let name = found.entry.name.into_string().unwrap();
            let is_dot = name == "." || name == "..";
            if found.node.nodeid != 0 && !is_dot {
                self.take(node, &name, &found.node, asked)?;
            }
            names.push(name);
        }
        Ok(names)
    }

    fn try_rename(&mut self, from: &str, to: &str, walk: Walk) -> Result<()> {
        let old = self.walk(from, walk)?;
        let node = old.existing()?;
        // The name that is renamed to is asked for.
        let new = self.walk_to(to, walk, true)?;
        self.rely_on(new.parent);
        let first = self.kernel.directory(old.parent.min(new.parent));
        let last = self.kernel.directory(old.parent.max(new.parent));
        let _exclusive = first.write().unwrap();
        let _other = (old.parent != new.parent).then(|| last.write().unwrap());
        let renamed = self
            .client
            .rename2(old.parent, &c(&old.name), new.parent, &c(&new.name), 0);
        renamed.map_err(errno)?;
        self.update(|tables, gone| {
            let at = (old.parent, old.name.clone());
            let expires = tables.names.get(&at).map(|name| name.expires);
            tables.drop_name(&(new.parent, new.name.clone()), gone);
            if let Some(expires) = expires {
                let name = Name {
                    node: Some(node),
                    expires,
                };
                tables.set_name((new.parent, new.name), name, gone);
            }
            tables.drop_name(&at, gone);
        })
    }
}

impl Programs for Process {
    type File = Open;

    fn open(&mut self, path: &str, flags: i32, mode: u32) -> Result<Open> {
        self.call(|this, walk| this.try_open(path, flags, mode, walk))
    }

    fn write(&mut self, file: &mut Open, bytes: &[u8]) -> Result<()> {
        let asked = WriteIn {
            fh: file.handle.fh,
            size: u32::try_from(bytes.len()).unwrap(),
            flags: file.flags.cast_unsigned(),
            ..WriteIn::default()
        };
        let call = Call::new(opcode::WRITE, file.node).arg(asked.as_bytes());
        let reply = self.client.request(call.arg(bytes).reply_of::<WriteOut>());
        let written = reply.and_then(|reply| reply.value::<WriteOut>());
        assert_eq!(written.map_err(errno)?.size, asked.size);
        Ok(())
    }

    fn sync(&mut self, file: &mut Open) -> Result<()> {
        let synced = self.client.fsync(file.node, file.handle, false);
        synced.map_err(errno)
    }

    fn close(&mut self, file: Open) -> Result<()> {
        let mut flushed = Ok(());
        if file.release {
            flushed = match self.client.flush(file.node, file.handle).map_err(errno) {
                Err(libc::ENOSYS) => Ok(()),
                flushed => flushed,
            };
            let released = self.client.release(file.node, file.handle);
            released.map_err(errno)?;
        }
        self.update(|tables, gone| {
            if let Some(node) = tables.nodes.get_mut(&file.node) {
                node.open -= 1;
            }
            tables.remove_user(file.node, gone);
        })?;
        flushed
    }

    fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        let file = self.call(|this, walk| this.try_open(path, libc::O_RDONLY, 0, walk))?;
        let read = self.client.read(file.node, file.handle, 0, 64 << 10);
        self.close(file)?;
        read.map_err(errno)
    }

    fn stat(&mut self, path: &str) -> Result<()> {
        self.call(|this, walk| {
            let node = this.walk(path, walk)?.existing()?;
            let known = this.kernel.tables().nodes.get(&node).copied();
            if known.is_some_and(|node| Instant::now() < node.attributes_expire) {
                return Ok(());
            }
            this.client.getattr(node).map(drop).map_err(errno)
        })
    }

    fn list(&mut self, path: &str) -> Result<Vec<String>> {
        self.call(|this, walk| this.try_list(path, walk))
    }

    fn truncate(&mut self, path: &str, length: u64) -> Result<()> {
        self.call(|this, walk| {
            let node = this.walk(path, walk)?.existing()?;
            this.rely_on(node);
            this.set_length(node, length)
        })
    }

    fn chmod(&mut self, path: &str, mode: u32) -> Result<()> {
        self.call(|this, walk| {
            let node = this.walk(path, walk)?.existing()?;
            this.rely_on(node);
            this.client.chmod(node, mode).map(drop).map_err(errno)
        })
    }

    fn set_attribute(&mut self, path: &str, value: &str) -> Result<()> {
        self.call(|this, walk| {
            let node = this.walk(path, walk)?.existing()?;
            this.rely_on(node);
            let set = this.client.setxattr(node, ATTRIBUTE, value.as_bytes(), 0);
            set.map_err(errno)
        })
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        self.call(|this, walk| this.try_rename(from, to, walk))
    }

    fn unlink(&mut self, path: &str) -> Result<()> {
        self.call(|this, walk| {
            let walked = this.walk(path, walk)?;
            walked.existing()?;
            this.rely_on(walked.parent);
            let directory = this.kernel.directory(walked.parent);
            let _exclusive = directory.write().unwrap();
            let done = this.client.unlink(walked.parent, &c(&walked.name));
            let done = done.map_err(errno);
            if matches!(done, Ok(()) | Err(libc::ENOENT)) {
                this.drop_name(walked.parent, &walked.name)?;
            }
            done
        })
    }

    fn mkdir(&mut self, path: &str) -> Result<()> {
        self.call(|this, walk| {
            let walked = this.walk_to(path, walk, true)?;
            if walked.node.is_some() {
                return Err(libc::EEXIST);
            }
            this.rely_on(walked.parent);
            let directory = this.kernel.directory(walked.parent);
            let _exclusive = directory.write().unwrap();
            let asked = Instant::now();
            let made = this.client.mkdir(walked.parent, &c(&walked.name), 0o755);
            let entry = made.map_err(errno)?;
            this.take(walked.parent, &walked.name, &entry, asked)
                .map(drop)
        })
    }

    fn drop_caches(&mut self) -> Result<()> {
        self.update(|tables, gone| {
            let names: Vec<_> = tables.names.keys().cloned().collect();
            for name in names {
                tables.drop_name(&name, gone);
            }
        })
    }

    fn reliance(&self, began: Instant) -> Reliance {
        self.reliance.unwrap_or(Reliance {
            since: began,
            directories_since: began,
            may_pass: false,
            was_open: None,
        })
    }
}
