//! How much memory the control groups of this process allow it, by what they say in their file systems.
//!
//! The invariant: what can't be read limits nothing.

use std::path::{Path, PathBuf};

/// Where control groups are mounted, and what the file is called in which the limit is: version 2, alone
/// or beside version 1, and that.
const MOUNTS: [(&str, &str); 3] = [
    ("/sys/fs/cgroup", "memory.max"),
    ("/sys/fs/cgroup/unified", "memory.max"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
];

/// Beyond this it is version 1's way of saying that there is no limit.
const NONE: u64 = 1 << 60;

/// The smallest limit of memory, and where it stands.
pub(super) fn memory() -> Option<(u64, PathBuf)> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = MOUNTS
        .iter()
        .filter_map(|(mount, file)| smallest(Path::new(mount), path_in(&groups, file)?, file));
    limits.min()
}

/// The group's path, from a line as `0::/path` or `4:memory:/path`.
fn path_in<'a>(groups: &'a str, file: &str) -> Option<&'a str> {
    let wanted = if file == "memory.max" { "" } else { "memory" };
    groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let found = controllers.split(',').any(|name| name == wanted);
        found.then_some(path)
    })
}

/// The smallest limit of the group at `path` and all above it. In a container the group itself may be
/// what is mounted, and its path lead nowhere.
fn smallest(mount: &Path, path: &str, file: &str) -> Option<(u64, PathBuf)> {
    let group = mount.join(path.trim_start_matches('/'));
    let groups = group
        .ancestors()
        .take_while(|group| group.starts_with(mount));
    let limits = groups.filter_map(|group| {
        let place = group.join(file);
        let text = std::fs::read_to_string(&place).ok()?;
        let limit = text.trim().parse().ok()?;
        (limit < NONE).then_some((limit, place))
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_is_found_by_its_version() {
        let groups = "9:pids:/a\n4:cpu,memory:/b\n0::/c/d\n";
        assert_eq!(path_in(groups, "memory.max"), Some("/c/d"));
        assert_eq!(path_in(groups, "memory.limit_in_bytes"), Some("/b"));
        assert_eq!(path_in("1:name=systemd:/\n", "memory.max"), None);
    }

    #[test]
    fn smallest_limit_above_a_group_counts() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("outer/inner");
        std::fs::create_dir_all(&inner).unwrap();
        let found = |path| smallest(dir.path(), path, "memory.max").map(|(limit, _)| limit);
        assert_eq!(found("/outer/inner"), None);
        std::fs::write(inner.join("memory.max"), "max\n").unwrap();
        std::fs::write(dir.path().join("outer/memory.max"), "4096\n").unwrap();
        assert_eq!(found("/outer/inner"), Some(4096));
        std::fs::write(inner.join("memory.max"), "1024\n").unwrap();
        assert_eq!(found("/outer/inner"), Some(1024));
        std::fs::write(dir.path().join("memory.max"), "9223372036854771712\n").unwrap();
        assert_eq!(found("/elsewhere"), None);
    }
}
