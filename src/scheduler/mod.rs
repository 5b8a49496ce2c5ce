//! Distributes work over workers; knows nothing of virtio.
//!
//! Decides which worker owns a queue and how much of a backlog is worth handing over, and provides
//! the channel for it. The invariant: each item that is sent is received exactly once, and no
//! receiver sleeps while an item is queued for it.

mod channel;
mod placement;
mod sync;

pub use channel::{Receiver, Recv, SendError, Sender, channel};
pub use placement::{MIN_OWN_SHARE, Placement, WorkerId};
