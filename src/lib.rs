//! A virtio-fs server: shares a directory of the host with a virtual machine.
//!
//! The crate is a library with a thin binary. What the library offers:
//!
//! | for | use |
//! | --- | --- |
//! | a VMM, or a daemon, with the device in its process | [`embed`] |
//! | a file system of one's own, served over vhost-user | [`fs::FileSystem`], [`service`] |
//! | asynchronous files and guest buffers, over io_uring and tokio | [`io`], [`scheduler`], [`Threads`] |
//! | what errors are made of | [`errors`], [`error_chain`] |
//!
//! `integration/examples` of the repository has a program for each. Nothing else is public.
//!
//! Of what the crate is made inside, and which part may use which, `docs/architecture.md` says.

mod check;
mod cli;
mod config;
mod control;
mod ctl;
mod dax;
mod device;
pub mod embed;
pub mod error_chain;
pub mod fs;
mod fuse;
mod guest_memory;
pub mod io;
mod limits;
mod logging;
pub mod metrics;
mod migration;
mod recovery;
mod sandbox;
pub mod scheduler;
mod server;
mod state;
mod top;
mod vhost_user;
mod virtqueue;
mod worker;

pub(crate) mod sys;

pub use worker::{Threads, ThreadsError, Worker};

/// A server of one file system over vhost-user.
///
/// `integration/examples/memory_tree` serves a tree in memory with it. It has the process as it is: no
/// sandbox, no recovery.
pub mod service {
    pub use crate::dax::{DaxOptions, NamePattern, NamePatternError, NamePatterns};
    pub use crate::device::{Device, Tag, TagError};
    pub use crate::fuse::{Readdirplus, SessionOptions, Wanted};
    pub use crate::server::{Exit, ServerError, Service, ServiceOptions};
    pub use crate::vhost_user::{ListenError, Listener, Stop};
}

/// The causes within [`service::ServerError`] and [`embed::DeviceError`].
///
/// An error says all that an operator needs to know; these are for programs that tell causes apart.
pub mod errors {
    pub use crate::recovery::{ExecHandoverError, RecoveryError};
    pub use crate::sandbox::{FilterError, MapError, SandboxError};
    pub use crate::server::{LimitError, SpaceError};
    pub use crate::state::StateError;
    pub use crate::virtqueue::{InflightError, QueueError};
    pub use crate::worker::WorkerPoolError;
}

/// What the program and this repository's tests use. It is no part of the interface, and changes
/// without notice.
///
/// It is left out (`--cfg ringfsd_surface`) to see what the interface is made of without it.
#[doc(hidden)]
#[cfg(not(ringfsd_surface))]
pub mod internals {
    pub mod check {
        pub use crate::check::{Report, run};
    }

    pub mod cli {
        pub use crate::cli::{
            Behaviour, CAPABILITIES, Check, Ctl, DIFFERENCES, Difference, Options, Persona, Syslog,
            Top, Upgrade, asks_for_capabilities, asks_for_command, log_filters, notices, parse,
            status_of, syslog_header,
        };
    }

    pub mod config {
        pub use crate::config::Config;
    }

    pub mod control {
        pub use crate::control::{COMMANDS, Code, Command, VERSION};
    }

    pub mod ctl {
        pub use crate::ctl::run;
    }

    pub mod dax {
        pub use crate::dax::{
            DaxOptions, MapRequest, NamePattern, NamePatterns, OpenToMap, RANGE, REGION, Window,
            page_size,
        };
    }

    pub mod device {
        pub use crate::device::{
            BackChannel, BackChannelError, BackendRequest, Device, SharedMapping,
        };
    }

    pub mod fuse {
        pub use crate::fuse::{OUT_HEADER_LEN, Outcome, Session, SessionOptions, Transport};

        pub mod abi {
            pub use crate::fuse::abi::{GetattrIn, InHeader, InitFlags, Opcode, ReadIn};
        }

        pub mod request {
            pub use crate::fuse::request::{
                HEADER_LEN, Operation, bytes_wanted, decode, decode_as,
            };
        }
    }

    pub mod guest_memory {
        pub use crate::guest_memory::{Memory, MemoryLostEvent, Region, RegionDescription};

        use crate::guest_memory::MemoryError;

        /// The memory that consists of these regions.
        ///
        /// # Errors
        ///
        /// See [`MemoryError`].
        pub fn of_regions(regions: Vec<Region>) -> Result<Memory, MemoryError> {
            Memory::new(regions, None)
        }
    }

    pub mod logging {
        pub use crate::logging::{Format, LevelError, LevelList, Output, start};
    }

    pub mod limits {
        pub use crate::limits::{Limits, Rate, Settings};
    }

    pub mod migration {
        pub use crate::migration::{Cause, DeviceState};

        pub mod stream {
            pub use crate::migration::stream::{
                Agreement, Find, Flock, Inode, Locks, Nameless, Open, Range, Snapshot, decode,
                encode, sealed,
            };
        }
    }

    pub mod passthrough {
        use std::sync::Arc;

        use crate::fs::passthrough::{
            Options, Passthrough, PassthroughError, PreviousProcess, Restored, Shared,
        };
        use crate::state::Table;

        /// Shares `shared` with the guest's state in `table`: as a new session, or resuming the
        /// session described by `past`.
        ///
        /// # Errors
        ///
        /// See [`PassthroughError`].
        pub fn with_table(
            shared: Shared,
            options: Options,
            table: &Arc<Table>,
            past: Option<&PreviousProcess>,
        ) -> Result<(Passthrough, Restored), PassthroughError> {
            Passthrough::with_table(shared, options, table, past)
        }

        /// The table of the guest's state.
        #[must_use]
        pub fn table(fs: &Passthrough) -> &Arc<Table> {
            fs.table()
        }
    }

    pub mod recovery {
        pub use crate::recovery::{ExecHandover, Watched, ask, ask_for_upgrade};
    }

    pub mod sandbox {
        pub use crate::sandbox::{
            Ending, Filter, ForkResult, HostAccess, Kind, Needs, Options, Reach, Seccomp, Serving,
            Tree, begin, ending_signals, reset_inherited,
        };
    }

    pub mod server {
        pub use crate::server::{
            Controlled, Exit, Server, Started, check_for_upgrade, explain, raise_limits,
        };
    }

    pub mod state {
        pub use crate::state::{Limits, Table};
    }

    pub mod top {
        pub use crate::top::run;
    }

    pub mod vhost_user {
        pub use crate::vhost_user::{Listener, Runner, SessionSnapshot, Stop, VERSION, serve};
    }

    pub mod virtqueue {
        pub use crate::virtqueue::{
            Call, Chain, Features, InflightPart, Journal, Queue, QueueIndex, RingAddresses, Setup,
            Tracking, unanswered_requests,
        };
    }

    pub mod worker {
        pub use crate::worker::WorkerPool;
    }
}
