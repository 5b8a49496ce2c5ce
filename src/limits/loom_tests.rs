//! Checks a bucket that threads share under all interleavings.

use std::num::NonZeroU64;

use loom::sync::Arc;
use loom::thread;

use super::bucket::Bucket;
use super::clock::{LONGEST, SECOND};
use super::settings::Rate;

const NOW: u64 = LONGEST + 1000 * SECOND;

fn bucket(burst: u64) -> Arc<Bucket> {
    let rate = Rate {
        per_second: NonZeroU64::new(10).unwrap(),
        burst: NonZeroU64::new(burst),
    };
    Arc::new(Bucket::new(rate, 0))
}

#[test]
fn threads_never_get_the_same_token() {
    loom::model(|| {
        let bucket = bucket(2);
        let others: Vec<_> = (0..2)
            .map(|_| {
                let bucket = Arc::clone(&bucket);
                thread::spawn(move || [bucket.take(1, NOW), bucket.take(1, NOW)])
            })
            .collect();
        let others = others.into_iter().flat_map(|other| other.join().unwrap());
        let mut dues: Vec<_> = others.collect();
        dues.sort_unstable();
        let tenth = SECOND / 10;
        assert_eq!(dues, [NOW - tenth, NOW, NOW + tenth, NOW + 2 * tenth]);
    });
}

#[test]
fn tokens_put_back_by_one_thread_are_not_lost_to_another() {
    loom::model(|| {
        let bucket = bucket(10);
        bucket.take(10, NOW);
        let other = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || bucket.put_back(3))
        };
        let due = bucket.take(1, NOW);
        bucket.take_late(1);
        other.join().unwrap();
        assert!(due <= NOW + SECOND / 10);
        // 10 + 1 + 1 − 3 of the 10 that there were.
        assert_eq!(bucket.take(1, NOW), NOW);
    });
}
