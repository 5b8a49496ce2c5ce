//! Rehearses the start of a server in a process of its own, and reads what it logs.
//!
//! The invariant: whatever the start does to its process (ids, namespaces, limits, the filter of
//! system calls), this one stays as it is.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use log::{Level, LevelFilter, Log, Metadata};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::WaitOptions;

use super::Record;
use crate::config::Config;
use crate::error_chain;
use crate::sandbox::{self, Ending};
use crate::server;
use crate::sys::process::{self, Fork};

/// How a rehearsal has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Why the server wouldn't start.
    pub(super) failure: Option<String>,
    /// What it would log.
    pub(super) log: Vec<Record>,
}

/// Rehearses the start.
pub(super) fn rehearse(config: Config) -> Outcome {
    let start = |log: BorrowedFd<'_>| {
        if let Err(error) = sandbox::reset_inherited(false) {
            return Err(error_chain::one_line(&error));
        }
        match server::rehearse(config, log) {
            Ok(Ending::Status(code)) => Ok(code.into()),
            Ok(ending) => Err(ending.to_string()),
            Err(error) => Err(server::explain(&error)),
        }
    };
    match in_own_process(start) {
        Ok((0, log)) => Outcome { failure: None, log },
        Ok((_, mut log)) => {
            // What failed is logged last.
            let last = log.iter().rposition(|record| record.level == "error");
            let failure = last.map(|at| log.remove(at).text);
            let unknown = || "it ended without saying why".to_owned();
            Outcome {
                failure: Some(failure.unwrap_or_else(unknown)),
                log,
            }
        }
        Err(error) => Outcome {
            failure: Some(format!("the start can't be rehearsed: {error}")),
            log: Vec::new(),
        },
    }
}

/// Calls `act` in a process of its own, with the descriptor that it logs to. Returns the status that
/// `act` returns, or 1 if it fails, and what was logged.
pub(super) fn in_own_process(
    act: impl FnOnce(BorrowedFd<'_>) -> Result<i32, String>,
) -> Result<(i32, Vec<Record>), Errno> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    match process::fork()? {
        Fork::Child => {
            drop(read);
            process::exit_now(log_to(write, act));
        }
        Fork::Parent(child) => {
            drop(write);
            let mut text = Vec::new();
            // The pipe ends with the last process that has it.
            let heard = File::from(read).read_to_end(&mut text);
            let status = loop {
                match rustix::process::waitpid(Some(child), WaitOptions::empty()) {
                    Err(Errno::INTR) | Ok(None) => {}
                    Ok(Some((_, status))) => break status,
                    Err(error) => return Err(error),
                }
            };
            heard.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            let text = String::from_utf8_lossy(&text);
            let records = text.lines().filter_map(Record::parse).collect();
            Ok((status.exit_status().unwrap_or(1), records))
        }
    }
}

/// Calls `act` with a log that goes to `write`.
fn log_to(write: OwnedFd, act: impl FnOnce(BorrowedFd<'_>) -> Result<i32, String>) -> i32 {
    // One descriptor for both, as all others are closed: the log of a process lives as long as it.
    let pipe: &'static PipeLog = Box::leak(Box::new(PipeLog(File::from(write))));
    if log::set_logger(pipe).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
    match act(pipe.0.as_fd()) {
        Ok(status) => status,
        Err(reason) => {
            log::error!("{reason}");
            1
        }
    }
}

/// A log of one line for each record, in a pipe.
struct PipeLog(File);

impl Log for PipeLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Info && metadata.target().starts_with(env!("CARGO_PKG_NAME"))
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            let text = record.args().to_string().replace('\n', " ");
            // If nobody reads any more, nobody wants to know.
            let _ = (&self.0).write_all(format!("{level} {text}\n").as_bytes());
        }
    }

    fn flush(&self) {}
}
