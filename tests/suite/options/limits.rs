//! Options that limit what the server keeps for a guest: threads, descriptors, file handles.

use std::ffi::CString;
use std::path::Path;

use testing::Server;
use vmm::fuse::ROOT;

use super::session;

#[test]
fn workers_option_sets_thread_count() {
    let threads = |workers: &str| {
        let server = Server::start(&["--workers", workers]);
        let mut fs = session(&server);
        fs.getattr(ROOT).unwrap();
        server.holdings().threads
    };
    // Beside them one that accepts and one for the high-priority queue.
    assert_eq!((threads("1"), threads("6")), (1 + 2, 6 + 2));
}

#[test]
fn closed_file_cache_stays_within_limit() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only a server that may open whatever is there keeps closed files");
        return;
    }
    for most in [1, 10, 100] {
        let server = Server::start(&["--max-spare-files", &most.to_string()]);
        let mut fs = session(&server);
        let nodes: Vec<_> = (0..150)
            .map(|n| {
                let name = format!("file{n}");
                std::fs::write(server.share().join(&name), "").unwrap();
                fs.lookup(ROOT, &CString::new(name).unwrap())
                    .unwrap()
                    .nodeid
            })
            .collect();
        let known = server.descriptors_of("file");
        for node in nodes {
            let handle = fs.open(node, libc::O_RDONLY).unwrap();
            fs.release(node, handle).unwrap();
        }
        assert_eq!(server.descriptors_of("file") - known, most);
    }
}

#[test]
fn unsupported_file_handles_fall_back_or_fail() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: file handles need CAP_DAC_READ_SEARCH");
        return;
    }
    // /proc has none, and is on each host.
    let server = Server::start_sharing(Path::new("/proc"), &["--inode-file-handles=prefer"]);
    session(&server).lookup(ROOT, c"version").unwrap();

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut command = testing::command();
    command.arg("--socket").arg(&socket);
    command.args(["--shared-dir=/proc", "--inode-file-handles=mandatory"]);
    let mut refused = Server::spawn(command, dir);
    let said = refused.wait_for("ringfsd: ");
    assert!(said.contains("file handle"), "{said}");
    assert_eq!(refused.wait().code(), Some(1));
    assert!(!socket.exists());
}
