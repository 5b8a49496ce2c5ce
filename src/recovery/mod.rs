//! Recovery: a session outlives the process, or the program, that serves it.
//!
//! `docs/recovery.md` describes it as a whole. This room has the part that concerns processes: the
//! supervisor, which starts another serving process when one was killed; the handover to another
//! program by `execve`; the `--state` file; the service manager that watches the server; and the
//! cleanup after a previous process.
//! The table of the session's state is `state`. What is replayed or resumed of a protocol is part
//! of that protocol: `vhost_user` has the snapshot of its session, `virtqueue` the requests in
//! flight, `fuse` and `fs` the replay of requests.
//!
//! The invariant: a serving process begins only when the previous one has ended.

mod error;
mod exec;
mod exec_handover;
mod leftovers;
mod predecessor;
mod service_manager;
mod state_file;
mod supervision;
mod supervisor;
mod upgrade;
mod upgrade_attempt;

pub use self::error::RecoveryError;
pub use self::exec::ask_for_upgrade;
pub(crate) use self::exec_handover::PassedSocket;
pub use self::exec_handover::{ExecHandover, ExecHandoverError};
pub(crate) use self::supervision::LEFT;
pub use self::supervision::Watched;
pub(crate) use self::upgrade::AskError;
pub use self::upgrade::ask;
pub(crate) use self::upgrade::check_for_upgrade;

pub(crate) use self::leftovers::sort_leftovers;
pub(crate) use self::predecessor::wait_while;
pub(crate) use self::service_manager::{ServiceManager, Silence, passed_listener};
pub(crate) use self::state_file::{OpenedTable, TableLocation, may_create};
pub(crate) use self::supervision::{Forked, Resources, Supervision};
