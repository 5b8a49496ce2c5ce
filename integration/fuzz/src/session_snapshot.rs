//! The snapshot of a front end's session, as the next process reads it: any bytes.
//!
//! What must hold: decoding ends, and either refuses, or returns a snapshot that names each
//! descriptor once and is the same after it is written and read again.

use std::os::fd::RawFd;

use ringfsd::internals::vhost_user::{SessionSnapshot, VERSION};

use crate::count;

/// What a record begins with.
const HEAD: [u8; 8] = {
    let [a, b, c, d] = VERSION.to_le_bytes();
    [b'R', b'F', b'f', b'r', a, b, c, d]
};

/// One input: as it is, which is almost never a record; and as what follows the head of one, whole
/// and without its last bytes.
pub fn run(data: &[u8]) {
    one(data);
    let bytes = [&HEAD, data].concat();
    for cut in [0, 1, 4] {
        one(&bytes[..bytes.len().saturating_sub(cut)]);
    }
    count::add(4);
}

fn one(bytes: &[u8]) {
    let Ok(record) = SessionSnapshot::decode(bytes) else {
        return;
    };
    let mut fds = record.descriptors();
    let all = fds.len();
    fds.sort_unstable();
    fds.dedup();
    assert_eq!(fds.len(), all, "a descriptor has two owners");
    let first: Option<&RawFd> = fds.first();
    assert!(
        first.is_some_and(|fd| *fd > 2),
        "a descriptor that can't be"
    );
    assert_eq!(SessionSnapshot::decode(&record.encode()), Ok(record));
}
