//! Releases memory that was allocated and freed.
//!
//! The invariant: what is allocated stays as it is.

/// Returns the free pages of the C library's heaps to the system. It does so by itself only with
/// those at the end of a heap, so what is freed in between stays resident.
pub(crate) fn release() {
    // SAFETY: it takes a number, and the locks of the heaps.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_heap_still_has_what_is_allocated() {
        let mut kept: Vec<_> = (0..1000_u32).map(|number| vec![number; 1000]).collect();
        let mut every_other = 0;
        kept.retain(|_| {
            every_other += 1;
            every_other % 2 == 0
        });
        release();
        assert!(
            (1..1000)
                .step_by(2)
                .zip(&kept)
                .all(|(number, one)| *one == vec![number; 1000])
        );
    }
}
