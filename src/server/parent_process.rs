//! The process that the launcher has started: it waits for the serving process, and with
//! `--supervise` starts another one when that one is killed.
//!
//! It owns the guardian or the supervisor. The invariant: it reads nothing that a guest or a VMM
//! sends.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::metrics_socket::MetricsSocket;
use super::pid_file::PidFile;
use super::temporary_cache::TemporaryCache;
use super::{Server, ServerError, ServerResources, Started};
use crate::recovery::{
    ExecHandover, Forked, RecoveryError, ServiceManager, Silence, Supervision, TableLocation,
    Watched,
};
use crate::sandbox::{self, Change, Ending, Guardian};
use crate::vhost_user::SocketFile;

/// The part that stays outside of the sandbox: the guardian, and the socket's file, which it
/// removes at the end.
#[derive(Debug)]
pub struct ParentProcess(Role);

#[derive(Debug)]
enum Role {
    Waiting {
        guardian: Guardian,
        _sockets: Vec<SocketFile>,
        _pid_file: Option<PidFile>,
        _caches: Vec<TemporaryCache>,
        manager: ServiceManager,
    },
    Supervising(Box<Supervision<ServerResources>>),
}

impl ParentProcess {
    pub(super) fn waiting(
        guardian: Guardian,
        sockets: [Option<SocketFile>; 3],
        pid_file: Option<PidFile>,
        manager: ServiceManager,
        caches: Vec<TemporaryCache>,
    ) -> Self {
        Self(Role::Waiting {
            guardian,
            _sockets: sockets.into_iter().flatten().collect(),
            _pid_file: pid_file,
            _caches: caches,
            manager,
        })
    }

    /// Splits the process into a supervisor and the first serving process.
    pub(super) fn supervise(
        resources: ServerResources,
        log: Option<BorrowedFd<'_>>,
    ) -> Result<Started, ServerError> {
        let sandbox = resources.config.sandbox.clone();
        Supervision::begin(resources, &sandbox, log).map(Started::of)
    }

    /// Takes over from the previous program in this process.
    pub(super) fn take_over(
        layer: super::Layer,
        config: crate::config::Config,
        log: Option<BorrowedFd<'_>>,
        handover: ExecHandover,
    ) -> Result<Started, ServerError> {
        let runtime = super::choose(&config)?;
        let (passed_on, fds) = handover.open().map_err(RecoveryError::ExecHandover)?;
        let sandbox = config.sandbox.clone();
        let control = match (fds.control, &config.control) {
            // A program that doesn't know the option has left no socket.
            (None, Some(path)) => Some(super::control_socket::bind(path)?),
            (left, _) => left,
        };
        let metrics = super::counters::take_over(&config, fds.metrics)?;
        let metrics_socket = match (&config.metrics, fds.metrics_socket) {
            (_, Some(passed)) => Some(MetricsSocket::left(passed)),
            // The previous program didn't have the option.
            (Some(address), None) => Some(MetricsSocket::bind(address)?),
            (None, None) => None,
        };
        let resources = ServerResources {
            control,
            started: Instant::now(),
            launched: super::launched(fds.user),
            config,
            metrics: Some(metrics),
            metrics_socket,
            runtime,
            listener: fds.listener,
            state: TableLocation::Shared(fds.state),
            manager: ServiceManager::from_environment(),
            layer,
            pid_file: fds.pid_file.map(PidFile::left),
            caches: Vec::new(),
        };
        Supervision::take_over(resources, &sandbox, log, passed_on).map(Started::of)
    }

    /// Waits until the server has ended, and removes its socket. With `--supervise`, returns
    /// [`Watched::Serving`] in each further process that serves.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call; in a further process, it can't serve.
    pub fn watch(self, log: Option<BorrowedFd<'_>>) -> Result<Watched<Server>, ServerError> {
        sandbox::forget_set_up();
        match self.0 {
            Role::Waiting {
                mut guardian,
                manager,
                ..
            } => {
                let ending = wait(&mut guardian, manager).map_err(RecoveryError::Watch)?;
                Ok(Watched::Ended {
                    ending,
                    asked_by: guardian.asked_by(),
                })
            }
            Role::Supervising(supervision) => supervision.watch(log),
        }
    }
}

/// Waits for the serving process to end, and keeps the service manager informed.
fn wait(guardian: &mut Guardian, mut manager: ServiceManager) -> std::io::Result<Ending> {
    loop {
        match guardian.next_change(manager.timeout())? {
            Some(Change::Ended(ending)) => return Ok(ending),
            Some(Change::Serving) => manager.serves(),
            Some(Change::Stopping) => manager.stops(),
            None => {
                if manager.check(Some(guardian.child())) == Silence::Hang {
                    log::error!("the serving process hangs: leaving it to the service manager");
                }
            }
        }
    }
}

impl Started {
    fn of(forked: Forked<ServerResources>) -> Self {
        match forked {
            Forked::Guardian(supervision) => {
                Self::Guardian(ParentProcess(Role::Supervising(supervision)))
            }
            Forked::Serving(server) => Self::Serving(server),
        }
    }
}
