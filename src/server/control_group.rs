//! Reads the memory limits of this process's control groups from the cgroup file systems.
//!
//! The invariant: a file that can't be read sets no limit.

use std::path::{Path, PathBuf};

/// Where control groups are mounted, and the name of the file with the limit: version 2 alone,
/// version 2 beside version 1, and version 1.
const MOUNTS: [(&str, &str); 3] = [
    ("/sys/fs/cgroup", "memory.max"),
    ("/sys/fs/cgroup/unified", "memory.max"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
];

/// From this value on, a limit is how version 1 writes "no limit".
const NO_LIMIT: u64 = 1 << 60;

/// The smallest memory limit, and the file that sets it.
pub(super) fn memory() -> Option<(u64, PathBuf)> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = MOUNTS
        .iter()
        .filter_map(|(mount, file)| smallest(Path::new(mount), path_in(&groups, file)?, file));
    limits.min()
}

/// The group's path, from a line such as `0::/path` or `4:memory:/path`.
fn path_in<'a>(groups: &'a str, file: &str) -> Option<&'a str> {
    let wanted = if file == "memory.max" { "" } else { "memory" };
    groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let found = controllers.split(',').any(|name| name == wanted);
        found.then_some(path)
    })
}

/// The smallest limit of the group at `path` and of its ancestors. In a container the mount's root
/// may be the group itself, and `path` may not exist below it.
fn smallest(mount: &Path, path: &str, file: &str) -> Option<(u64, PathBuf)> {
    let group = mount.join(path.trim_start_matches('/'));
    let groups = group
        .ancestors()
        .take_while(|group| group.starts_with(mount));
    let limits = groups.filter_map(|group| {
        let path = group.join(file);
        let text = std::fs::read_to_string(&path).ok()?;
        let limit = text.trim().parse().ok()?;
        (limit < NO_LIMIT).then_some((limit, path))
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
    fn smallest_limit_of_group_and_ancestors_counts() {
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
