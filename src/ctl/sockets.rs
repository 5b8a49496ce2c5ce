//! Where control sockets are that are named by their share, or not at all.
//!
//! The invariant: what is a path, or exists, is taken as it is.

use std::path::{Path, PathBuf};

/// Where the units of systemd make them.
const DIRECTORIES: [&str; 2] = ["/run/ringfsd", "/run/ringfsd-user"];

/// What their names end with.
const EXTENSION: &str = "ctl";

/// The directories of this host's servers and of this user's.
fn directories() -> impl Iterator<Item = PathBuf> {
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| Path::new(&dir).join("ringfsd"));
    DIRECTORIES.into_iter().map(PathBuf::from).chain(own)
}

/// All control sockets in these directories.
pub(crate) fn sockets() -> Vec<PathBuf> {
    let mut sockets: Vec<_> = directories()
        .filter_map(|directory| std::fs::read_dir(directory).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|it| it == EXTENSION))
        .collect();
    sockets.sort();
    sockets
}

/// The socket that is called `name`: a path, or what one in these directories is called without its
/// extension.
pub(crate) fn socket(name: &Path) -> PathBuf {
    find(name, directories()).unwrap_or_else(|| name.to_owned())
}

fn find(name: &Path, directories: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    let is_path = name.as_os_str().as_encoded_bytes().contains(&b'/');
    if is_path || name.exists() {
        return None;
    }
    let mut file = name.as_os_str().to_owned();
    file.push(".");
    file.push(EXTENSION);
    let mut paths = directories.map(|directory| directory.join(&file));
    paths.find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_names_its_socket_unless_that_is_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vm1.0.ctl");
        std::fs::write(&socket, "").unwrap();
        let found = |name: &str| {
            let directories = ["/nonexistent".into(), dir.path().to_owned()];
            find(Path::new(name), directories.into_iter())
        };
        assert_eq!(found("vm1.0"), Some(socket));
        for path in ["vm1", "vm1.0.ctl", "./vm1.0", "/vm1.0", "src"] {
            assert_eq!(found(path), None, "{path}");
        }
    }
}
