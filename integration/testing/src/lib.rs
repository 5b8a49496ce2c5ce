//! What the tests of several crates share: a server under test, tests that run on each runtime, a
//! counting allocator.
//!
//! The invariant: nothing here is part of the server, nor of the client it is tested with (`vmm`).

pub mod allocations;
mod image;
mod server;

pub use image::{in_mounted_image, make_image};
pub use macros::each_runtime;
pub use server::{
    Holdings, Server, TIMEOUT, child_of, command, command_as, copy_program, output, program,
};
use vmm::fuse::FuseError;

/// An ordinary user, for tests that run as root.
pub const USER: u32 = 65534;

/// The error number of what the file system refused; `None` if it succeeded.
///
/// # Panics
///
/// If it failed in another way, which is no reply of a file system.
pub fn errno<T>(result: Result<T, FuseError>) -> Option<i32> {
    let error = result.err()?;
    match error.errno() {
        Some(errno) => Some(errno),
        None => panic!("no reply of a file system: {error}"),
    }
}

/// Whether the tests run as root; if not, what the test prints says that it was skipped.
#[must_use]
pub fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("SKIPPED: needs root");
    }
    is_root
}

/// Sets an extended attribute on the host's side; `false` if the host doesn't allow it.
pub fn set_on_host(path: &std::path::Path, name: &str, value: &[u8]) -> bool {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).is_ok()
}

/// Bytes that differ from block to block.
#[must_use]
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}
