//! One of the guest's threads: an operation at a time, each with the only result that is right.
//!
//! The invariant: the expected result of an operation is known before it is sent.

use std::ffi::CString;

use vmm::Session;
use vmm::fuse::wire::{AttrOut, Dirent, EntryOut, LkOut, OpenOut, WriteOut};
use vmm::fuse::{Client, FuseError, Pending, ROOT, Reply};
use zerocopy::FromBytes;

use crate::act::Act;
use crate::model::{Key, Kind, Model, Name, Node, Open};
use crate::{Dice, Failure};

/// How many names each directory may have.
const NAMES: u64 = 10;

/// The longest file.
const LONGEST: usize = 96 << 10;

/// Flags of RENAME2.
const NOREPLACE: u32 = libc::RENAME_NOREPLACE;
const EXCHANGE: u32 = libc::RENAME_EXCHANGE;

/// Open files at the same time.
const OPEN: usize = 6;

/// How many files never lose their last name, although their names change: so some are older than what
/// a server considers young.
const LASTING: usize = 4;

/// An act whose request is in flight.
#[derive(Debug)]
struct InFlight {
    act: Act,
    /// The error that it must fail with; none if it must succeed.
    refused: Option<i32>,
    pending: Pending,
}

/// One of the guest's threads.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) model: Model,
    dice: Dice,
    /// Whether files may lose their last name while they are open.
    pub(crate) nameless: bool,
    in_flight: Option<InFlight>,
    /// Node ids that were forgotten and not requested since.
    forgotten: Vec<u64>,
    /// Files that keep a name to the end.
    lasting: Vec<Key>,
}

impl Guest {
    /// A thread with two directories of its own.
    pub(crate) fn new(
        fs: &mut Client<Session>,
        number: u32,
        seed: u64,
        nameless: bool,
    ) -> Result<Self, FuseError> {
        let mut model = Model::new(number);
        let places = model.dirs.iter_mut().zip(&mut model.listings);
        for (at, (dir, listing)) in places.enumerate() {
            let name = CString::new(directory(number, at)).unwrap_or_default();
            *dir = fs.mkdir(ROOT, &name, 0o755)?.nodeid;
            *listing = fs.opendir(*dir)?.fh;
        }
        Ok(Self {
            model,
            dice: Dice(seed),
            nameless,
            in_flight: None,
            forgotten: Vec::new(),
            lasting: Vec::new(),
        })
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.is_none()
    }

    pub(crate) fn waits_for(&self, pending: Pending) -> bool {
        self.in_flight
            .as_ref()
            .is_some_and(|it| it.pending == pending)
    }

    /// The request that it waits for, for messages.
    pub(crate) fn waiting(&self) -> Option<String> {
        let it = self.in_flight.as_ref()?;
        let unique = it.pending.unique();
        Some(format!(
            "{unique:#x} of guest {}: {}",
            self.model.guest,
            it.act.describe()
        ))
    }

    /// Sends the next request.
    pub(crate) fn submit(&mut self, fs: &mut Client<Session>) -> Result<(), FuseError> {
        let act = self.choose();
        let refused = self.refusal(&act);
        let pending = act.send(&self.model, fs)?;
        self.in_flight = Some(InFlight {
            act,
            refused,
            pending,
        });
        Ok(())
    }

    fn choose(&mut self) -> Act {
        if let Some(nodeid) = self.forgotten.pop() {
            return Act::Gone(nodeid);
        }
        if let Some(key) = self.model.forgettable() {
            return Act::Forget(key, self.dice.below(2) == 0);
        }
        loop {
            if let Some(act) = self.propose()
                && !self.takes_a_last_name(&act)
            {
                return act;
            }
        }
    }

    /// Whether the act would remove the last name of a file that must keep one: a lasting or an open one.
    fn takes_a_last_name(&self, act: &Act) -> bool {
        let name = match act {
            Act::Tmpfile(..) => return !self.nameless,
            Act::Unlink(name) | Act::Rename(_, name, _) => *name,
            _ => return false,
        };
        let is_open = |key| self.model.open.iter().any(|open| open.key == key);
        let needed = |key| self.lasting.contains(&key) || !self.nameless && is_open(key);
        let key = self.model.names.get(&name).copied();
        key.is_some_and(needed) && self.model.at(name).is_some_and(|node| node.links == 1)
    }

    fn name(&mut self) -> Name {
        Name {
            dir: self.dice.index(2),
            number: self.dice.below(NAMES),
        }
    }

    /// One of the names of a file that has several.
    fn name_of_several(&mut self) -> Option<Name> {
        let several = |name: &&Name| self.model.at(**name).is_some_and(|node| node.links > 1);
        let names: Vec<_> = self.model.names.keys().filter(several).copied().collect();
        names.get(self.dice.index(names.len())).copied()
    }

    fn node(&mut self, good: impl Fn(&Node) -> bool) -> Option<Key> {
        let nodes = self.model.nodes.iter().filter(|(_, node)| good(node));
        let keys: Vec<_> = nodes.map(|(key, _)| *key).collect();
        keys.get(self.dice.index(keys.len())).copied()
    }

    fn open(&mut self) -> Option<Open> {
        let at = self.dice.index(self.model.open.len());
        self.model.open.get(at).copied()
    }

    /// A random act, if it is possible.
    fn propose(&mut self) -> Option<Act> {
        let is_file = |node: &Node| matches!(node.kind, Kind::File(_));
        let mode = 0o600 | u32::try_from(self.dice.below(0o100)).unwrap_or(0);
        let has_room = self.model.open.len() < OPEN;
        Some(match self.dice.below(36) {
            0..=2 if has_room => Act::Create(self.name(), mode, self.dice.below(2) == 0),
            3 => Act::Mkdir(self.name(), mode | 0o100),
            4 => {
                let target = format!("to/{}", self.dice.below(1 << 40));
                Act::Symlink(self.name(), target.into_bytes())
            }
            5 => Act::Link(
                self.node(|node| is_file(node) && node.links > 0)?,
                self.name(),
            ),
            6 | 7 => Act::Unlink(self.name()),
            8 => Act::Rmdir(self.name()),
            9 | 10 => {
                let from = self.name();
                let to = self.name();
                // Other tests replace files by directories and the like.
                let plain =
                    |kind: Option<&Node>| !matches!(kind, Some(n) if n.kind == Kind::Directory);
                if !plain(self.model.at(from)) || !plain(self.model.at(to)) || from == to {
                    return None;
                }
                Act::Rename(from, to, [0, NOREPLACE, EXCHANGE][self.dice.index(3)])
            }
            11 | 12 => Act::Lookup(self.name()),
            13 => Act::Getattr(self.node(|_| true)?),
            14 => Act::Chmod(self.node(is_file)?, mode),
            15 => Act::Truncate(self.node(is_file)?, self.dice.index(LONGEST)),
            16 => Act::Readlink(self.node(|node| matches!(node.kind, Kind::Link(_)))?),
            17 => Act::List(self.dice.index(2)),
            18 if has_room => {
                let append = self.dice.below(2) == 0;
                let key = self.node(|node| is_file(node) && node.links > 0)?;
                Act::Opened(key, append, self.dice.below(3) == 0)
            }
            19 => Act::Read(self.open()?, self.dice.index(LONGEST), 16 << 10),
            20..=22 => {
                let open = self.open()?;
                let len = 1 + self.dice.index(9000);
                let seed = self.dice.next();
                let bytes = (0..len).map(|at| seed.wrapping_mul(at as u64 | 1).to_le_bytes()[7]);
                let bytes: Vec<_> = bytes.collect();
                let end = self.content(open.key).len();
                let offset = if open.append {
                    end
                } else {
                    self.dice.index(LONGEST - bytes.len())
                };
                if offset + bytes.len() > LONGEST {
                    return Some(Act::Truncate(open.key, 0));
                }
                Act::Write(open, offset, bytes)
            }
            23 => {
                let open = self.open()?;
                let locked = self.model.nodes.get(&open.key)?.locked;
                if locked {
                    Act::Lock(open, false)
                } else {
                    Act::Release(open)
                }
            }
            24 => Act::ListPlus(self.dice.index(2)),
            25 => Act::Mknod(self.name(), mode),
            26 if has_room => Act::Tmpfile(self.dice.index(2), mode),
            27 => Act::Lock(self.open()?, self.dice.below(2) == 0),
            28 | 29 => {
                let at = self.dice.index(self.lasting.len());
                Act::Link(*self.lasting.get(at)?, self.name())
            }
            // A server knows a file by the name that was looked up last.
            30 | 31 => Act::Lookup(self.name_of_several()?),
            32 | 33 => Act::Unlink(self.name_of_several()?),
            _ => Act::TestLock(self.open()?),
        })
    }

    fn content(&self, key: Key) -> &[u8] {
        match self.model.nodes.get(&key).map(|node| &node.kind) {
            Some(Kind::File(content)) => content,
            _ => &[],
        }
    }

    /// The error that an act must fail with.
    fn refusal(&self, act: &Act) -> Option<i32> {
        let exists = |name: &Name| self.model.at(*name).is_some();
        let is_dir = |name: &Name| {
            let node = self.model.at(*name);
            node.is_some_and(|node| node.kind == Kind::Directory)
        };
        match act {
            Act::Create(name, ..)
            | Act::Mkdir(name, _)
            | Act::Mknod(name, _)
            | Act::Symlink(name, _)
            | Act::Link(_, name) => exists(name).then_some(libc::EEXIST),
            Act::Rename(from, to, NOREPLACE) if exists(from) && exists(to) => Some(libc::EEXIST),
            Act::Rename(_, to, EXCHANGE) if !exists(to) => Some(libc::ENOENT),
            Act::Unlink(name) if is_dir(name) => Some(libc::EISDIR),
            Act::Rmdir(name) if exists(name) && !is_dir(name) => Some(libc::ENOTDIR),
            Act::Unlink(name) | Act::Rmdir(name) | Act::Lookup(name) | Act::Rename(name, ..) => {
                (!exists(name)).then_some(libc::ENOENT)
            }
            _ => None,
        }
    }

    /// Takes a reply.
    pub(crate) fn finish(&mut self, reply: Result<Reply, FuseError>) -> Result<(), Failure> {
        let Some(it) = self.in_flight.take() else {
            return Ok(());
        };
        let unique = it.pending.unique();
        let noticed = |what: String| {
            let act = it.act.describe();
            let guest = self.model.guest;
            Failure::Noticed(format!(
                "request {unique:#x} of guest {guest}, {act}: {what}"
            ))
        };
        if matches!(it.act, Act::Gone(_)) {
            let errno = reply.as_ref().err().and_then(FuseError::errno);
            if !matches!(errno, Some(libc::ESTALE | libc::ENOENT | libc::EINVAL)) {
                return Err(noticed(format!("it is still known: {reply:?}")));
            }
            return Ok(());
        }
        let reply = match (reply, it.refused) {
            (Ok(reply), None) => reply,
            (Err(error), Some(errno)) if error.errno() == Some(errno) => return Ok(()),
            (reply, refused) => {
                let wanted = refused.map_or("success".to_owned(), |errno| {
                    std::io::Error::from_raw_os_error(errno).to_string()
                });
                let reply = reply.map(|_| "success");
                return Err(noticed(format!("{reply:?} instead of {wanted}")));
            }
        };
        let wrong = self.take_effect(&it.act, &reply);
        wrong.map_or(Ok(()), |what| {
            let act = it.act.describe();
            let guest = self.model.guest;
            let what = format!("request {unique:#x} of guest {guest}, {act}: {what}");
            Err(Failure::Noticed(what))
        })
    }

    /// Updates the model by the reply; returns what is wrong with it.
    fn take_effect(&mut self, act: &Act, reply: &Reply) -> Option<String> {
        let model = &mut self.model;
        match act {
            Act::Create(name, mode, append) => {
                let Ok((entry, open)) = reply.values::<EntryOut, OpenOut>() else {
                    return Some("not an entry and a handle".to_owned());
                };
                let key = model.made(*name, entry.nodeid, Kind::File(Vec::new()), *mode);
                model.open.push(Open {
                    key,
                    fh: open.fh,
                    append: *append,
                });
                if self.lasting.len() < LASTING {
                    self.lasting.push(key);
                }
                self.is_as(key, entry.nodeid, &entry.attr)
            }
            Act::Mkdir(name, mode) => {
                let entry = reply.value::<EntryOut>().unwrap_or_default();
                model.made(*name, entry.nodeid, Kind::Directory, *mode);
                None
            }
            Act::Mknod(name, mode) => {
                let entry = reply.value::<EntryOut>().unwrap_or_default();
                let key = model.made(*name, entry.nodeid, Kind::Pipe, *mode);
                self.is_as(key, entry.nodeid, &entry.attr)
            }
            Act::Tmpfile(dir, mode) => {
                let Ok((entry, open)) = reply.values::<EntryOut, OpenOut>() else {
                    return Some("not an entry and a handle".to_owned());
                };
                // As if it had had a name and lost it.
                let name = Name {
                    dir: *dir,
                    number: u64::MAX,
                };
                let key = model.made(name, entry.nodeid, Kind::File(Vec::new()), *mode);
                model.unnamed(name);
                model.open.push(Open {
                    key,
                    fh: open.fh,
                    append: false,
                });
                self.is_as(key, entry.nodeid, &entry.attr)
            }
            Act::Symlink(name, target) => {
                let entry = reply.value::<EntryOut>().unwrap_or_default();
                model.made(*name, entry.nodeid, Kind::Link(target.clone()), 0o777);
                None
            }
            Act::Link(key, name) => {
                let entry = reply.value::<EntryOut>().unwrap_or_default();
                model.names.insert(*name, *key);
                if let Some(node) = model.nodes.get_mut(key) {
                    node.links += 1;
                    node.lookups += 1;
                }
                self.is_as(*key, entry.nodeid, &entry.attr)
            }
            Act::Unlink(name) | Act::Rmdir(name) => {
                model.unnamed(*name);
                None
            }
            Act::Rename(from, to, EXCHANGE) => {
                let (one, other) = (model.names.remove(from), model.names.remove(to));
                model.names.extend(one.map(|key| (*to, key)));
                model.names.extend(other.map(|key| (*from, key)));
                None
            }
            Act::Rename(from, to, _) => {
                let key = model.names.get(from).copied();
                // Two names of one file: rename(2) does nothing then.
                if model.names.get(to).copied() != key {
                    model.unnamed(*to);
                    if let Some(key) = model.names.remove(from) {
                        model.names.insert(*to, key);
                    }
                }
                None
            }
            Act::Lookup(name) => {
                let entry = reply.value::<EntryOut>().unwrap_or_default();
                let key = model.names.get(name).copied()?;
                if let Some(node) = model.nodes.get_mut(&key) {
                    node.lookups += 1;
                }
                self.is_as(key, entry.nodeid, &entry.attr)
            }
            Act::Getattr(key) => {
                let out = reply.value::<AttrOut>().unwrap_or_default();
                self.is_as(*key, self.model.nodeid(*key), &out.attr)
            }
            Act::Chmod(key, mode) => {
                let out = reply.value::<AttrOut>().unwrap_or_default();
                if let Some(node) = model.nodes.get_mut(key) {
                    node.mode = *mode;
                }
                self.is_as(*key, self.model.nodeid(*key), &out.attr)
            }
            Act::Truncate(key, size) => {
                let out = reply.value::<AttrOut>().unwrap_or_default();
                if let Some(Node {
                    kind: Kind::File(content),
                    ..
                }) = model.nodes.get_mut(key)
                {
                    content.resize(*size, 0);
                }
                self.is_as(*key, self.model.nodeid(*key), &out.attr)
            }
            Act::Readlink(key) => {
                let node = model.nodes.get(key)?;
                let wrong = node.kind != Kind::Link(reply.bytes.clone());
                wrong.then(|| "it leads elsewhere".to_owned())
            }
            Act::List(dir) => {
                let found = listed(&reply.bytes);
                let wanted = model.listed(*dir);
                (found != wanted).then(|| format!("{found:?} instead of {wanted:?}"))
            }
            Act::ListPlus(dir) => self.listed_plus(*dir, &reply.bytes),
            Act::Opened(key, append, truncate) => {
                let open = reply.value::<OpenOut>().unwrap_or_default();
                if *truncate && let Some(node) = model.nodes.get_mut(key) {
                    node.kind = Kind::File(Vec::new());
                }
                model.open.push(Open {
                    key: *key,
                    fh: open.fh,
                    append: *append,
                });
                None
            }
            Act::Read(open, offset, size) => {
                let content = self.content(open.key);
                let end = content.len().min(*offset + *size as usize);
                let wanted = content.get(*offset..end).unwrap_or_default();
                (reply.bytes != wanted).then(|| differs(&reply.bytes, wanted))
            }
            Act::Write(open, offset, bytes) => {
                let out = reply.value::<WriteOut>().unwrap_or_default();
                if out.size as usize != bytes.len() {
                    return Some(format!("{} bytes written", out.size));
                }
                if let Some(Node {
                    kind: Kind::File(content),
                    ..
                }) = model.nodes.get_mut(&open.key)
                {
                    let end = offset + bytes.len();
                    content.resize(content.len().max(end), 0);
                    if let Some(place) = content.get_mut(*offset..end) {
                        place.copy_from_slice(bytes);
                    }
                }
                None
            }
            Act::Release(open) => {
                model.open.retain(|other| other.fh != open.fh);
                None
            }
            Act::Lock(open, locks) => {
                if let Some(node) = model.nodes.get_mut(&open.key) {
                    node.locked = *locks;
                }
                None
            }
            Act::TestLock(open) => {
                let out = reply.value::<LkOut>().unwrap_or_default();
                let locked = out.lk.r#type != libc::F_UNLCK.cast_unsigned();
                let wanted = model.nodes.get(&open.key)?.locked;
                (locked != wanted).then(|| format!("locked: {locked}"))
            }
            Act::Forget(key, _) => {
                self.forgotten
                    .extend(model.nodes.remove(key).map(|node| node.nodeid));
                None
            }
            Act::Gone(_) => None,
        }
    }

    /// What is wrong with a reply to READDIRPLUS; each entry counts as a lookup.
    fn listed_plus(&mut self, dir: usize, bytes: &[u8]) -> Option<String> {
        let mut found = 0;
        let mut rest = bytes;
        while let Ok((entry, after)) = EntryOut::read_from_prefix(rest) {
            let (dirent, after) = Dirent::read_from_prefix(after).ok()?;
            let len = dirent.namelen as usize;
            let text = String::from_utf8_lossy(after.get(..len).unwrap_or_default()).into_owned();
            rest = after.get(len.next_multiple_of(8)..).unwrap_or_default();
            if text == "." || text == ".." {
                continue;
            }
            found += 1;
            let number = text
                .strip_prefix('n')
                .and_then(|number| number.parse().ok());
            let name = number.map(|number| Name { dir, number });
            let key = name.and_then(|name| self.model.names.get(&name).copied());
            let Some(key) = key else {
                return Some(format!("there is no {text}"));
            };
            // No node id: the entry is a name that was not looked up.
            if entry.nodeid != 0 {
                if let Some(node) = self.model.nodes.get_mut(&key) {
                    node.lookups += 1;
                }
                if let Some(wrong) = self.is_as(key, entry.nodeid, &entry.attr) {
                    return Some(format!("{text}: {wrong}"));
                }
            }
        }
        let wanted = self.model.listed(dir).len();
        (found != wanted).then(|| format!("{found} names instead of {wanted}"))
    }

    /// What is wrong with a node's attributes.
    pub(crate) fn is_as(
        &self,
        key: Key,
        nodeid: u64,
        attr: &vmm::fuse::wire::Attr,
    ) -> Option<String> {
        let node = self.model.nodes.get(&key)?;
        if node.nodeid != nodeid {
            return Some(format!("it is node {nodeid}, and was node {}", node.nodeid));
        }
        if node.kind == Kind::Directory {
            return None;
        }
        let size = match &node.kind {
            Kind::File(content) => content.len() as u64,
            Kind::Link(target) => target.len() as u64,
            Kind::Directory | Kind::Pipe => 0,
        };
        let found = (attr.size, attr.mode & 0o7777, attr.nlink);
        let wanted = (size, node.mode, node.links);
        (found != wanted).then(|| format!("size, mode, links {found:?} instead of {wanted:?}"))
    }
}

/// The name of one of a guest's directories.
pub(crate) fn directory(guest: u32, dir: usize) -> String {
    format!("guest{guest}-{dir}")
}

/// The names in a reply to READDIR.
fn listed(bytes: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = bytes;
    while let Ok((entry, after)) = Dirent::read_from_prefix(rest) {
        let len = entry.namelen as usize;
        let name = String::from_utf8_lossy(after.get(..len).unwrap_or_default()).into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
        rest = after.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    names.sort();
    names
}

/// Where the bytes differ, if they do.
pub(crate) fn differs(found: &[u8], wanted: &[u8]) -> String {
    let at = found
        .iter()
        .zip(wanted)
        .position(|(one, other)| one != other);
    let (found, wanted) = (found.len(), wanted.len());
    match at {
        Some(at) => format!("other bytes from {at} on, of {found} and {wanted}"),
        None => format!("{found} bytes instead of {wanted}"),
    }
}
