//! The command `ringfsd ctl`: asks a server for one command, and prints the reply.
//!
//! It opens directories that a server in its sandbox can't, and asks the supervisor for an upgrade,
//! which the serving process may not. The invariant: what a guest can name is printed without control
//! characters.

mod sockets;
mod statistics;
mod text;

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::Errno;
use serde_json::{Map, Value, json};

use crate::cli::{Ctl, CtlCommand, PageArgs};
use crate::control::{CallError, Client};
use crate::error_chain;
use crate::limits::LIMITED;
use crate::{recovery, sandbox};

pub(crate) use self::sockets::{socket, sockets};
pub(crate) use self::text::{printable, render};

/// How many entries of a long list are asked for at once.
const PAGE: u64 = 10_000;

/// Why a command has failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    /// The server can't be asked, or refuses.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The directory to mount can't be opened.
    #[error("opening the directory {path}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Errno,
    },
    /// It can't be told which process to upgrade.
    #[error("finding the process that serves")]
    Process(#[source] std::io::Error),
    /// The server isn't upgraded.
    #[error(transparent)]
    Upgrade(#[from] recovery::AskError),
}

/// Carries out a command. Returns the text to print.
///
/// # Errors
///
/// The text to print for a command that has failed.
pub fn run(ctl: &Ctl) -> Result<String, String> {
    match ask(ctl) {
        Ok(reply) if ctl.json => Ok(reply.to_string()),
        Ok(reply) => Ok(render(&statistics::readable(reply))),
        Err(error) if ctl.json => Err(json!({ "error": to_json(&error) }).to_string()),
        Err(error) => Err(message(&error)),
    }
}

fn ask(ctl: &Ctl) -> Result<Value, CtlError> {
    let mut client = Client::connect(&socket(&ctl.socket))?;
    let mut call = |command: &str, arguments: Value, fd: Option<OwnedFd>| {
        let arguments = match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        };
        client.call(command, &arguments, fd.as_ref().map(AsFd::as_fd))
    };
    let none = json!({});
    Ok(match &ctl.command {
        CtlCommand::Status => call("status", none, None)?,
        CtlCommand::Statistics { durations } => {
            call("statistics", json!({ "durations": durations }), None)?
        }
        CtlCommand::WatchFiles { limit } => call("watch-files", json!({ "limit": limit }), None)?,
        CtlCommand::SetLogLevel { level, room } => {
            let level = level.as_str().to_ascii_lowercase();
            call(
                "set-log-level",
                json!({ "level": level, "room": room }),
                None,
            )?
        }
        CtlCommand::SetLimits(limits) => {
            let rates = LIMITED.into_iter().zip(limits.settings().rates());
            let arguments = rates.filter_map(|(name, rate)| {
                rate.map(|rate| (name.to_owned(), Value::from(rate.to_string())))
            });
            call("set-limits", Value::Object(arguments.collect()), None)?
        }
        CtlCommand::Inodes(page) => list(page, |arguments| call("inodes", arguments, None))?,
        CtlCommand::Handles(page) => list(page, |arguments| call("handles", arguments, None))?,
        CtlCommand::DropCaches => call("drop-caches", none, None)?,
        CtlCommand::Mount {
            point,
            directory,
            readonly,
        } => {
            let failed = |source| CtlError::Open {
                path: directory.clone(),
                source,
            };
            let source = std::path::absolute(directory).unwrap_or_else(|_| directory.clone());
            let fd = sandbox::detached(directory, *readonly).map_err(failed)?;
            let arguments = json!({
                "point": point,
                "source": source.display().to_string(),
                "readonly": readonly,
            });
            call("mount", arguments, Some(fd))?
        }
        CtlCommand::Unmount { point } => call("unmount", json!({ "point": point }), None)?,
        CtlCommand::Upgrade => {
            call("upgrade", none, None)?;
            // By the kernel's account, which a server that was taken over can't change.
            let pid = client.server().map_err(CtlError::Process)?;
            json!({ "outcome": recovery::ask(pid)? })
        }
        CtlCommand::Dump => call("dump", none, None)?,
    })
}

/// Asks for a page of a list, or for all of it.
fn list(
    page: &PageArgs,
    mut call: impl FnMut(Value) -> Result<Value, CallError>,
) -> Result<Value, CallError> {
    if !page.all {
        return call(json!({ "after": page.after, "limit": page.limit }));
    }
    let mut whole = call(json!({ "limit": PAGE }))?;
    while let Some(next) = whole.get("next").and_then(Value::as_u64) {
        let more = call(json!({ "after": next, "limit": PAGE }))?;
        let (Value::Object(all), Value::Object(more)) = (&mut whole, more) else {
            break;
        };
        for (name, value) in more {
            match (all.get_mut(&name), value) {
                (Some(Value::Array(entries)), Value::Array(more)) => entries.extend(more),
                (_, value) => {
                    all.insert(name, value);
                }
            }
        }
    }
    Ok(whole)
}

fn to_json(error: &CtlError) -> Value {
    match error {
        CtlError::Call(CallError::Refused(failure)) => failure.to_json(),
        error => json!({ "code": "failed", "message": error_chain::one_line(error) }),
    }
}

fn message(error: &CtlError) -> String {
    let text = printable(&error_chain::one_line(error));
    match error {
        CtlError::Call(CallError::Refused(failure)) => match &failure.hint {
            Some(hint) => format!("{text}\nhint: {}", printable(hint)),
            None => text,
        },
        _ => text,
    }
}
