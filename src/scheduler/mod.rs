//! Placement and spreading of work over workers; knows nothing of virtio.
//!
//! Who owns what, how much of a backlog is worth handing over, and the channel that carries it.
//! The invariant: what has been sent is received exactly once, and no receiver waits while there
//! is something for it.

mod channel;
mod placement;
mod sync;

pub use channel::{Receiver, Recv, SendError, Sender, channel};
pub use placement::{KEPT, Placement, WorkerId};
