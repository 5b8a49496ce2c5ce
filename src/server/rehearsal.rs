//! Goes through the start of a server up to where it would serve, to find out whether it would.
//!
//! The steps are those of the start itself, with other resources: a socket without a file, a copy of
//! the state file in memory, temporary caches. The invariant: nothing is created or changed on the
//! host that is still there afterwards.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::error::ServerError;
use super::metrics_socket::MetricsSocket;
use super::pid_file::PidFile;
use super::temporary_cache::TemporaryCache;
use super::{Server, ServerResources, Started};
use crate::config::{Config, Listen, Prefetch, Source};
use crate::recovery::{ServiceManager, TableLocation, Watched};
use crate::sandbox::{self, Ending};
use crate::vhost_user::{ListenError, Listener};

/// Starts a server as configured, and ends it when it would serve. To be called in a process that has
/// one thread, and is made for this. The serving process keeps `log`.
///
/// Returns in the process that called it, and in serving processes if they can't serve.
///
/// # Errors
///
/// The server wouldn't start.
pub(crate) fn rehearse(config: Config, log: BorrowedFd<'_>) -> Result<Ending, ServerError> {
    match Server::split(ServerResources::for_rehearsal(config)?, Some(log))? {
        Started::Serving(server) => server.end_before_serving(),
        Started::Guardian(parent) => match parent.watch(Some(log))? {
            Watched::Serving(server) => server.end_before_serving(),
            Watched::Ended { ending, .. } => Ok(ending),
        },
    }
}

impl Server {
    fn end_before_serving(mut self: Box<Self>) -> Result<Ending, ServerError> {
        self.prepare()?;
        sandbox::leave(0)
    }
}

impl ServerResources {
    /// What [`new`](Self::new) makes, except for what would be left on the host.
    fn for_rehearsal(mut config: Config) -> Result<Self, ServerError> {
        super::limits::fit(&mut config);
        if let Listen::Path(path) = &config.listen {
            Listener::check(path, config.replaces_files, config.socket_group.as_deref())?;
        }
        let runtime = super::choose(&config)?;
        super::set_descriptor_limit(&config)?;
        super::file_system::check(&config)?;
        super::limits::check(&config, super::table_limits(&config).bytes())?;
        if let (Some(_), Source::Directory(path)) = (config.space, &config.source) {
            super::space::check(path)?;
        }
        let state = super::locate(&config, TableLocation::copy)?;
        let metrics = super::counters::create(&config)?;
        PidFile::check(&config)?;
        leave_unchanged(&mut config);
        let caches = TemporaryCache::make_for(&mut config.source)?;
        config
            .control
            .as_deref()
            .map_or(Ok(()), super::control_socket::check)?;
        config
            .metrics
            .as_ref()
            .map_or(Ok(()), MetricsSocket::check)?;
        Ok(Self {
            control: None,
            metrics_socket: None,
            started: Instant::now(),
            launched: super::launched(None),
            listener: Listener::without_file()?,
            config,
            runtime,
            state,
            pid_file: None,
            metrics,
            manager: ServiceManager::default(),
            layer: |shared| shared,
            caches,
        })
    }
}

/// Checks the descriptor of `--fd`. If the launcher hasn't left it open for this process too, says so.
/// To be called before any other descriptor is opened.
///
/// # Errors
///
/// It is open, and can't be listened on.
pub(crate) fn check_inherited(config: &Config) -> Result<Option<String>, ServerError> {
    let Listen::Inherited(fd @ 0..) = config.listen else {
        return Ok(None);
    };
    match Listener::inherited(fd) {
        Ok(socket) => {
            // It belongs to the processes that have it after this one.
            std::mem::forget(socket);
            Ok(None)
        }
        Err(ListenError::NotOpen { .. }) => Ok(Some(format!(
            "--fd {fd} isn't open here; the launcher has to pass it to the server"
        ))),
        Err(error) => Err(error.into()),
    }
}

/// Changes what is served so that the start writes nothing to it.
fn leave_unchanged(config: &mut Config) {
    let mut has_upper = false;
    let mut left = vec![&mut config.source];
    while let Some(source) = left.pop() {
        match source {
            Source::Directory(_) => {}
            Source::Vfs(mounts) => left.extend(mounts.iter_mut().map(|(_, source)| source)),
            Source::Overlay(overlay) => {
                has_upper |= overlay.upper.is_some();
                left.extend(&mut overlay.lower);
            }
            Source::Rafs(image) => {
                image.cache_dir = None;
                image.prefetch = Prefetch::None;
            }
        }
    }
    if has_upper && !config.share.file_system.readonly {
        log::info!(
            "the work directory isn't prepared, so whether the upper layer can be written isn't known"
        );
        config.share.file_system.readonly = true;
    }
}
