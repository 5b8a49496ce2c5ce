//! What clients of a control socket look at and change, without a sandbox and without a VMM.
//!
//! Fuzzing asks it for arbitrary commands. The invariant: the commands and the file system are
//! those of a server with the same configuration.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::error::ServerError;
use super::file_system::{Built, Entered};
use super::log_levels::LogLevels;
use super::mounts::Mounts;
use super::{Facts, Service, ServiceOptions, counters, facts, file_system, handlers, table_limits};
use crate::config::Config;
use crate::device::Device;
use crate::fs::FileSystem;
use crate::recovery::OpenedTable;
use crate::sandbox::{self, HostPaths};
use crate::state::Table;

/// A server that serves nobody.
#[derive(Debug)]
pub struct Controlled {
    service: Service,
    facts: Facts,
    mounts: Option<Mounts>,
}

impl Controlled {
    /// A server of this configuration.
    ///
    /// # Errors
    ///
    /// What is to be served can't be.
    pub fn new(config: Config) -> Result<Self, ServerError> {
        let runtime = crate::io::choose(config.runtime)?;
        let facts = facts(&config, &runtime, "none");
        let HostPaths {
            root,
            proc_fds,
            trees,
        } = sandbox::reach(&file_system::reach(&config))?;
        let entered = Entered {
            root,
            file: None,
            trees,
            proc_fds,
            file_handles: false,
            may_label: false,
        };
        let opened = OpenedTable {
            table: Table::for_this_process(&table_limits(&config))?,
            previous: None,
        };
        let Built { fs, table, mounts } = file_system::build(&config, entered, opened)?;
        let metrics = counters::open(&config, None, &runtime)?;
        let options = ServiceOptions {
            device: Device {
                tag: config.tag,
                request_queues: config.request_queues,
                dax_window: 0,
                dax_fs_map: false,
            },
            workers: config.workers,
            runtime: config.runtime,
            poll: config.poll,
            session: config.share.session,
            once: true,
        };
        Ok(Self {
            service: Service::over(fs, options, runtime, table, metrics),
            facts,
            mounts,
        })
    }

    /// What is served.
    #[must_use]
    pub fn file_system(&self) -> &Arc<dyn FileSystem> {
        self.service.file_system()
    }

    /// Does what these clients ask for, until the last of them has gone.
    ///
    /// # Errors
    ///
    /// The host has no descriptor or memory for it.
    pub fn serve(self, clients: Vec<UnixStream>) -> std::io::Result<()> {
        let log_levels = LogLevels::in_table(self.service.table(), false);
        let handlers = handlers(&self.service, self.facts, self.mounts, log_levels);
        crate::control::serve_clients(clients, Box::new(handlers))
    }
}
