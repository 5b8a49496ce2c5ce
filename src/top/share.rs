//! One watched server: a thread that asks it for its counters, and what it has last said.
//!
//! The invariant: the thread keeps trying. A server that goes away is shown as such, and so is its
//! return.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::rates::{Rates, count};
use crate::control::{CallError, Client};
use crate::ctl::printable;
use crate::error_chain;
use crate::metrics::{SessionState, Snapshot};

/// How long a server may take to answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How many files are asked for.
const FILES: u64 = 1000;

/// What is known of a server.
#[derive(Clone, Debug)]
pub(super) struct Share {
    /// What it serves, or its socket as long as that isn't known.
    pub(super) name: String,
    pub(super) state: State,
}

/// What a server does.
#[derive(Clone, Debug)]
pub(super) enum State {
    /// It wasn't asked yet, or only once.
    Starting,
    /// It answers.
    Serving {
        rates: Box<Rates>,
        session: SessionState,
        files: Option<Files>,
    },
    /// It doesn't answer.
    Gone {
        /// Since when.
        since: Instant,
        /// Why.
        reason: String,
    },
}

/// The busiest files, or why they can't be told.
pub(super) type Files = Result<Vec<FileRate>, String>;

/// What is done with one file, for each second.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FileRate {
    pub(super) path: String,
    pub(super) operations: f64,
    pub(super) bytes_read: f64,
    pub(super) bytes_written: f64,
}

/// A server that is watched.
#[derive(Debug)]
pub(super) struct Watched(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    latest: Mutex<Share>,
    /// How often there was something new.
    updates: AtomicU32,
    wants_files: AtomicBool,
}

impl Watched {
    /// Starts to ask the server at `socket`.
    pub(super) fn start(socket: PathBuf, interval: Duration) -> Self {
        let shared = Arc::new(Shared {
            latest: Mutex::new(Share {
                name: name_of(&socket),
                state: State::Starting,
            }),
            updates: AtomicU32::new(0),
            wants_files: AtomicBool::new(false),
        });
        let poller = Poller {
            socket,
            interval,
            client: None,
            before: None,
            files_before: None,
            shared: Arc::clone(&shared),
        };
        // It ends with the process.
        let started = std::thread::Builder::new()
            .name("ringfsd-top".to_owned())
            .spawn(move || poller.run());
        if let Err(error) = started {
            shared.latest().state = State::Gone {
                since: Instant::now(),
                reason: error.to_string(),
            };
        }
        Self(shared)
    }

    /// What the server has last said.
    pub(super) fn latest(&self) -> Share {
        self.0.latest().clone()
    }

    /// How often there was something new.
    pub(super) fn updates(&self) -> u32 {
        self.0.updates.load(Ordering::Relaxed)
    }

    /// Whether the server is to be asked for its busiest files.
    pub(super) fn watch_files(&self, wanted: bool) {
        self.0.wants_files.store(wanted, Ordering::Relaxed);
    }
}

impl Shared {
    fn latest(&self) -> MutexGuard<'_, Share> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name_of(socket: &Path) -> String {
    printable(&socket.display().to_string())
}

struct Poller {
    socket: PathBuf,
    interval: Duration,
    client: Option<Client>,
    before: Option<(Instant, Snapshot)>,
    files_before: Option<(Instant, Vec<FileCount>)>,
    shared: Arc<Shared>,
}

/// What was done with a file so far.
#[derive(Clone, Debug)]
struct FileCount {
    node: u64,
    path: String,
    requests: u64,
    bytes_read: u64,
    bytes_written: u64,
}

impl Poller {
    fn run(mut self) {
        let mut next = Instant::now();
        loop {
            let outcome = self.poll();
            {
                let mut latest = self.shared.latest();
                match outcome {
                    Ok(Some(share)) => *latest = share,
                    Ok(None) if matches!(latest.state, State::Gone { .. }) => {
                        latest.state = State::Starting;
                    }
                    Ok(None) => {}
                    Err(error) => {
                        self.client = None;
                        self.before = None;
                        self.files_before = None;
                        let since = match latest.state {
                            State::Gone { since, .. } => since,
                            _ => Instant::now(),
                        };
                        let reason = printable(&reason(&error));
                        latest.state = State::Gone { since, reason };
                    }
                }
                if !matches!(latest.state, State::Starting) {
                    self.shared.updates.fetch_add(1, Ordering::Relaxed);
                }
            }
            next += self.interval;
            let now = Instant::now();
            next = next.max(now);
            std::thread::sleep(next - now);
        }
    }

    /// Asks once. Returns nothing the first time, as there is nothing to compare with.
    fn poll(&mut self) -> Result<Option<Share>, CallError> {
        let statistics = self.call("statistics", &json!({ "durations": true }))?;
        let now: Snapshot = serde_json::from_value(statistics)
            .map_err(|error| CallError::Reply(error.to_string()))?;
        let time = Instant::now();
        let files = match self.shared.wants_files.load(Ordering::Relaxed) {
            true => Some(self.files()?),
            false => None,
        };
        let before = self.before.replace((time, now.clone()));
        let Some((earlier, before)) = before else {
            return Ok(None);
        };
        Ok(Some(Share {
            name: printable(&now.share),
            state: State::Serving {
                rates: Box::new(Rates::between(&before, &now, time - earlier)),
                session: now.session,
                files,
            },
        }))
    }

    fn call(&mut self, command: &str, arguments: &Value) -> Result<Value, CallError> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(Client::connect_within(&self.socket, TIMEOUT)?),
        };
        let none = Map::new();
        client.call(command, arguments.as_object().unwrap_or(&none), None)
    }

    /// The busiest files.
    fn files(&mut self) -> Result<Files, CallError> {
        let reply = match self.call("watch-files", &json!({ "limit": FILES })) {
            Ok(reply) => reply,
            // This server can't, or is older.
            Err(CallError::Refused(failure)) => return Ok(Err(printable(&failure.message))),
            Err(error) => return Err(error),
        };
        let files = reply.get("files").and_then(Value::as_array);
        let files: Vec<_> = files.into_iter().flatten().map(file_count).collect();
        let now = Instant::now();
        let before = self.files_before.replace((now, files.clone()));
        let Some((earlier, before)) = before else {
            return Ok(Ok(Vec::new()));
        };
        let seconds = (now - earlier).as_secs_f64().max(0.001);
        let rate = |now: u64, before: u64| count(now.saturating_sub(before)) / seconds;
        let mut rates: Vec<_> = files
            .into_iter()
            .map(|file| {
                let before = before.iter().find(|it| it.node == file.node);
                let of = |get: fn(&FileCount) -> u64| rate(get(&file), before.map_or(0, get));
                FileRate {
                    operations: of(|file| file.requests),
                    bytes_read: of(|file| file.bytes_read),
                    bytes_written: of(|file| file.bytes_written),
                    path: file.path.clone(),
                }
            })
            .filter(|file| file.operations > 0.0)
            .collect();
        rates.sort_by(|one, other| other.operations.total_cmp(&one.operations));
        Ok(Ok(rates))
    }
}

fn file_count(file: &Value) -> FileCount {
    let number = |name: &str| file.get(name).and_then(Value::as_u64).unwrap_or_default();
    let path = file.get("path").and_then(Value::as_str);
    FileCount {
        node: number("node"),
        path: path.map_or_else(|| format!("node {}", number("node")), printable),
        requests: number("requests"),
        bytes_read: number("bytes_read"),
        bytes_written: number("bytes_written"),
    }
}

/// Why a server doesn't answer, in a few words.
fn reason(error: &CallError) -> String {
    match error {
        CallError::Connect { source, .. } => match source.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                "no server".to_owned()
            }
            _ => source.to_string(),
        },
        CallError::Closed => "the server has ended, or is being replaced".to_owned(),
        error => error_chain::one_line(error),
    }
}
