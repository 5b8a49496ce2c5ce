//! Calls into the image's crates, whose panics become errors.
//!
//! The invariant: whatever an image, a blob or a cache contains, a call returns.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls `call`. A panic is an error: the crates check some of what they read by assertions.
pub(super) fn guarded<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let message = match panic.downcast_ref::<&str>() {
            Some(text) => Some((*text).to_owned()),
            None => panic.downcast_ref::<String>().cloned(),
        };
        let message = message.unwrap_or_else(|| "a check failed".to_owned());
        Err(io::Error::new(io::ErrorKind::InvalidData, message))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::panic, reason = "the subject of the test")]
    fn panic_is_an_error() {
        let error = guarded::<()>(|| panic!("block {}", 7)).unwrap_err();
        assert_eq!(error.to_string(), "block 7");
        assert_eq!(guarded(|| Ok(1)).unwrap(), 1);
    }
}
