//! The control socket: an operator's program asks a server what it does, and changes its settings.
//!
//! `docs/control.md` describes the protocol. This room has both ends of it: the thread that serves
//! clients, and the client. What a command does is up to the [`Handler`] that the thread gets. The
//! invariant: the thread waits for no client, so one that is stuck or hostile delays no other, and
//! no guest at all.

mod client;
mod connection;
mod protocol;
mod server;

pub(crate) use self::client::{CallError, Client};
pub(crate) use self::connection::MAX_CLIENTS;
pub use self::protocol::{COMMANDS, Code, Command, VERSION};
pub(crate) use self::protocol::{Call, Failure};
pub(crate) use self::server::{Handler, Sockets, serve_clients, start};
