//! What must be there: names, nodes, open files, locks of one guest thread.
//!
//! Plain state, updated by the replies. The invariant: while no request of this guest is in flight,
//! the host's directory and the server's tables are exactly this.

use std::collections::BTreeMap;
use std::ffi::CString;

/// A name within one of the guest's two directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name {
    pub(crate) dir: usize,
    pub(crate) number: u64,
}

impl Name {
    pub(crate) fn text(self) -> String {
        format!("n{}", self.number)
    }

    pub(crate) fn c(self) -> CString {
        CString::new(self.text()).unwrap_or_default()
    }
}

/// Which node of the model.
pub(crate) type Key = u64;

/// A node's type and content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File(Vec<u8>),
    Link(Vec<u8>),
    Directory,
    Pipe,
}

/// An inode.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) nodeid: u64,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    /// Its names.
    pub(crate) links: u32,
    /// How many replies had an entry of it.
    pub(crate) lookups: u64,
    /// The guest's lock on the whole file.
    pub(crate) locked: bool,
}

/// An open file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    pub(crate) key: Key,
    pub(crate) fh: u64,
    pub(crate) append: bool,
}

/// The state of one guest thread.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// The thread's number.
    pub(crate) guest: u32,
    /// Node ids of the two directories.
    pub(crate) dirs: [u64; 2],
    /// Their handles, open from the beginning to the end.
    pub(crate) listings: [u64; 2],
    pub(crate) names: BTreeMap<Name, Key>,
    pub(crate) nodes: BTreeMap<Key, Node>,
    pub(crate) open: Vec<Open>,
    next: Key,
}

impl Model {
    /// The state of a thread that has no directories yet.
    pub(crate) fn new(guest: u32) -> Self {
        Self {
            guest,
            ..Self::default()
        }
    }

    /// Adds a node that was created as `name`.
    pub(crate) fn made(&mut self, name: Name, nodeid: u64, kind: Kind, mode: u32) -> Key {
        let key = self.next;
        self.next += 1;
        let node = Node {
            nodeid,
            kind,
            mode,
            links: 1,
            lookups: 1,
            locked: false,
        };
        self.nodes.insert(key, node);
        self.names.insert(name, key);
        key
    }

    /// Removes a name.
    pub(crate) fn unnamed(&mut self, name: Name) {
        if let Some(key) = self.names.remove(&name)
            && let Some(node) = self.nodes.get_mut(&key)
        {
            node.links -= 1;
        }
    }

    pub(crate) fn at(&self, name: Name) -> Option<&Node> {
        self.nodes.get(self.names.get(&name)?)
    }

    /// Nodes without a name that nothing has open, which the guest's kernel forgets.
    pub(crate) fn forgettable(&self) -> Option<Key> {
        let of_no_use = |(key, node): &(&Key, &Node)| {
            node.links == 0 && !self.open.iter().any(|open| open.key == **key)
        };
        self.nodes.iter().find(of_no_use).map(|(key, _)| *key)
    }

    /// The names in one directory.
    pub(crate) fn listed(&self, dir: usize) -> Vec<String> {
        let names = self.names.keys().filter(|name| name.dir == dir);
        let mut texts: Vec<_> = names.map(|name| name.text()).collect();
        texts.sort();
        texts
    }

    /// The node id of a node, 0 if it is gone.
    pub(crate) fn nodeid(&self, key: Key) -> u64 {
        self.nodes.get(&key).map_or(0, |node| node.nodeid)
    }

    /// The node id of the directory that a name is in.
    pub(crate) fn dir(&self, name: Name) -> u64 {
        self.dirs.get(name.dir).copied().unwrap_or(0)
    }

    /// The owner of its locks.
    pub(crate) fn owner(&self) -> u64 {
        0x1000 + u64::from(self.guest)
    }
}
