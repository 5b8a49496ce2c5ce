//! Whole reads and writes, of the single operations that a ring performs.
//!
//! The invariant: a write is split only where the kernel takes no more pieces in one operation.

use std::future::Future;
use std::io;
use std::sync::Arc;

use super::{Transferred, thread_pool};
use crate::io::buffer::GuestBuffer;
use crate::io::descriptor::Descriptor;
use crate::io::vectored::{ok_if_any, one_operation};

/// Reads into the buffer after its first `filled` bytes, until it is full or the file ends.
/// `transfer` starts one operation on the buffer from a byte of it on; the buffer begins at the
/// offset that it gets.
pub(super) async fn read<'a, T: Future<Output = Transferred>>(
    transfer: impl Fn(&'a Arc<Descriptor>, GuestBuffer, usize, u64) -> T,
    descriptor: &'a Arc<Descriptor>,
    buffer: GuestBuffer,
    filled: usize,
    offset: u64,
) -> Transferred {
    let mut buffer = buffer;
    let mut filled = filled;
    while filled < buffer.len() {
        let result;
        (result, buffer) = transfer(descriptor, buffer, filled, offset).await;
        match result {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            // A ring fails on a descriptor with O_NONBLOCK where `preadv` would wait.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return thread_pool::read(descriptor, buffer, filled, offset).await;
            }
            Err(e) => return (Err(e), buffer),
        }
        let end = offset.saturating_add(filled as u64);
        if filled < buffer.len() && descriptor.is_direct_at_end(end) {
            break;
        }
    }
    (Ok(filled), buffer)
}

/// Writes the buffer by one operation, or by the fewest that hold all pieces. `transfer` is as for
/// [`read`].
pub(super) async fn write<'a, T: Future<Output = Transferred>>(
    transfer: impl Fn(&'a Arc<Descriptor>, GuestBuffer, usize, u64) -> T,
    descriptor: &'a Arc<Descriptor>,
    buffer: GuestBuffer,
    offset: u64,
) -> Transferred {
    let mut buffer = buffer;
    let mut done = 0;
    loop {
        let expected = one_operation(&buffer, done);
        let result;
        (result, buffer) = transfer(descriptor, buffer, done, offset).await;
        match result {
            Ok(n) => {
                done += n;
                if n < expected || done == buffer.len() {
                    return (Ok(done), buffer);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && done == 0 => {
                return thread_pool::write(descriptor, buffer, (0, offset), 0).await;
            }
            Err(e) => return (ok_if_any(done, e), buffer),
        }
    }
}
