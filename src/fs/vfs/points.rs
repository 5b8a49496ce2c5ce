//! The directories that lead to the mount points.
//!
//! A point is a mount point or a directory above one. Where another file system is mounted above, a
//! point that isn't a mount point itself stands for that file system's directory of the same name, if
//! there is one. The invariant: every point but the root has a parent, and the number of a point is
//! never used again.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::mount_point::MountPoint;
use crate::fs::NodeId;

/// The root's number.
pub(super) const ROOT: u64 = NodeId::ROOT.0;

/// A mount point, or a directory above one.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub(super) number: u64,
    pub(super) parent: u64,
    /// The points directly below, by name.
    pub(super) children: BTreeMap<CString, u64>,
    /// What is mounted here.
    pub(super) mount: Option<u16>,
    /// The nearest mount above, unless this is a mount point itself.
    pub(super) within: Option<u16>,
    /// The directory of the mount above that this point stands for, as it was last looked up; 0 if
    /// it wasn't found. All versions of the table share the number.
    node: Arc<AtomicU64>,
}

impl Point {
    fn new(number: u64, parent: u64, within: Option<u16>) -> Self {
        Self {
            number,
            parent,
            children: BTreeMap::new(),
            mount: None,
            within,
            node: Arc::default(),
        }
    }

    /// The directory that a file system has here: the root of the mount, or the directory that the
    /// point stands for.
    pub(super) fn directory(&self) -> Option<(u16, NodeId)> {
        if let Some(mount) = self.mount {
            return Some((mount, NodeId::ROOT));
        }
        match self.node.load(Ordering::Relaxed) {
            0 => None,
            node => Some((self.within?, NodeId(node))),
        }
    }

    /// Makes the point stand for the directory `node` of the mount above, or for none.
    pub(super) fn stand_for(&self, node: Option<NodeId>) {
        let node = node.map_or(0, |node| node.0);
        self.node.store(node, Ordering::Relaxed);
    }
}

/// All points.
#[derive(Clone, Debug)]
pub(super) struct Points {
    all: HashMap<u64, Point>,
    /// For each mount, the points in it that have children.
    covering: HashMap<u16, Vec<u64>>,
    next: u64,
}

impl Points {
    pub(super) fn new() -> Self {
        Self {
            all: HashMap::from([(ROOT, Point::new(ROOT, ROOT, None))]),
            covering: HashMap::new(),
            next: ROOT + 1,
        }
    }

    pub(super) fn get(&self, number: u64) -> Option<&Point> {
        self.all.get(&number)
    }

    /// The point below `point` with this name.
    pub(super) fn child(&self, point: &Point, name: &CStr) -> Option<&Point> {
        self.get(*point.children.get(name)?)
    }

    /// The points that mounts are to be looked up through: in the order in which their directories
    /// can be found.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<_> = self.all.keys().copied().collect();
        // A parent is made before its children.
        numbers.sort_unstable();
        numbers
    }

    /// The point whose directory `node` of `mount` is, if something is mounted below it.
    pub(super) fn at(&self, mount: u16, node: NodeId) -> Option<&Point> {
        let numbers = self.covering.get(&mount)?;
        let points = numbers.iter().filter_map(|number| self.get(*number));
        points
            .into_iter()
            .find(|point| point.directory() == Some((mount, node)))
    }

    /// The point at `path`, made as needed.
    pub(super) fn make(&mut self, path: &MountPoint) -> u64 {
        let mut at = ROOT;
        for name in path.names() {
            at = match self.all.get(&at).and_then(|point| point.children.get(name)) {
                Some(child) => *child,
                None => {
                    let number = self.next;
                    self.next += 1;
                    if let Some(parent) = self.all.get_mut(&at) {
                        parent.children.insert(name.to_owned(), number);
                    }
                    self.all.insert(number, Point::new(number, at, None));
                    number
                }
            };
        }
        at
    }

    /// The point at `path`, if there is one.
    pub(super) fn find(&self, path: &MountPoint) -> Option<&Point> {
        let mut point = self.get(ROOT)?;
        for name in path.names() {
            point = self.child(point, name)?;
        }
        Some(point)
    }

    /// The path that leads to a point; empty for the root.
    pub(super) fn path_of(&self, number: u64) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = number;
        while at != ROOT
            && let Some(point) = self.all.get(&at)
        {
            let parent = self.all.get(&point.parent);
            let children = parent.into_iter().flat_map(|parent| &parent.children);
            let name = children.into_iter().find(|(_, child)| **child == at);
            names.extend(name.map(|(name, _)| name.as_c_str()));
            at = point.parent;
        }
        let mut path = Vec::new();
        for name in names.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name.to_bytes());
        }
        path
    }

    /// Changes what is mounted at a point.
    pub(super) fn set_mount(&mut self, number: u64, mount: Option<u16>) {
        if let Some(point) = self.all.get_mut(&number) {
            point.mount = mount;
        }
        self.find_mounts_above();
    }

    /// Drops a point that leads nowhere any more, and then those above it.
    pub(super) fn prune(&mut self, number: u64) {
        let mut at = number;
        while at != ROOT
            && let Some(point) = self.all.get(&at)
            && point.mount.is_none()
            && point.children.is_empty()
        {
            let parent = point.parent;
            self.all.remove(&at);
            if let Some(parent) = self.all.get_mut(&parent) {
                parent.children.retain(|_, child| *child != at);
            }
            at = parent;
        }
        self.find_mounts_above();
    }

    /// Works out again which mount each point lies in.
    fn find_mounts_above(&mut self) {
        self.covering.clear();
        for number in self.numbers() {
            let Some(point) = self.all.get(&number) else {
                continue;
            };
            let above = (number != ROOT)
                .then(|| self.all.get(&point.parent))
                .flatten();
            let within = above.and_then(|above| above.mount.or(above.within));
            let (own, has_children) = (point.mount.or(within), !point.children.is_empty());
            if let Some(point) = self.all.get_mut(&number) {
                let within = if point.mount.is_some() { None } else { within };
                if point.within != within {
                    point.within = within;
                    point.node = Arc::default();
                }
            }
            if let Some(mount) = own.filter(|_| has_children) {
                self.covering.entry(mount).or_default().push(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn path(text: &str) -> MountPoint {
        MountPoint::parse(OsStr::new(text)).unwrap()
    }

    fn mounted(mounts: &[(&str, u16)]) -> Points {
        let mut points = Points::new();
        for (text, mount) in mounts {
            let number = points.make(&path(text));
            points.set_mount(number, Some(*mount));
        }
        points
    }

    #[test]
    fn point_knows_the_nearest_mount_above() {
        let points = mounted(&[("/a/b/c", 2), ("/a", 1), ("/x/y", 3)]);
        let within = |text: &str| points.find(&path(text)).unwrap().within;
        assert_eq!(within("/"), None);
        assert_eq!(within("/a"), None);
        assert_eq!(within("/a/b"), Some(1));
        assert_eq!(within("/a/b/c"), None);
        assert_eq!(within("/x"), None);
        let root_of_first = points.at(1, NodeId::ROOT).unwrap();
        assert_eq!(
            root_of_first.number,
            points.find(&path("/a")).unwrap().number
        );
        assert!(points.at(2, NodeId::ROOT).is_none(), "nothing is below it");
    }

    #[test]
    fn point_stands_for_a_directory_until_its_mount_changes() {
        let mut points = mounted(&[("/a", 1), ("/a/b/c", 2)]);
        let between = points.find(&path("/a/b")).unwrap();
        between.stand_for(Some(NodeId(7)));
        assert_eq!(points.at(1, NodeId(7)).unwrap().number, between.number);
        let number = points.find(&path("/a")).unwrap().number;
        points.set_mount(number, None);
        assert_eq!(points.find(&path("/a/b")).unwrap().directory(), None);
        assert!(points.at(1, NodeId(7)).is_none());
    }

    #[test]
    fn pruned_points_are_those_that_lead_nowhere() {
        let mut points = mounted(&[("/a/b", 1), ("/a/c/d", 2)]);
        let number = points.find(&path("/a/c/d")).unwrap().number;
        points.set_mount(number, None);
        points.prune(number);
        assert!(points.find(&path("/a/c")).is_none());
        assert!(points.find(&path("/a/b")).is_some());
        assert_ne!(points.make(&path("/a/c")), number, "never the same number");
    }
}
