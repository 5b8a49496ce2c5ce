//! `status`, `dump`, and the summary that a signal asks for.
//!
//! The invariant: one source for each fact, which all three show.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Handlers, lists};
use crate::control::VERSION;
use crate::fuse::Negotiated;
use crate::logging;
use crate::metrics::{Snapshot, Usage};
use crate::server::live::LiveSession;
use crate::worker::{QueueReport, ThreadReport};

/// What doesn't change while the process serves.
#[derive(Clone, Debug)]
pub(in crate::server) struct Facts {
    /// The process that the launcher has started.
    pub(in crate::server) pid: u32,
    /// The user that it was started as.
    pub(in crate::server) user: u32,
    /// When the program was started.
    pub(in crate::server) started: Instant,
    /// When this process began to serve.
    pub(in crate::server) serving: Instant,
    /// Another process has served before this one.
    pub(in crate::server) restarted: bool,
    pub(in crate::server) supervised: bool,
    /// Where VMMs connect.
    pub(in crate::server) socket: String,
    /// What is served.
    pub(in crate::server) source: String,
    pub(in crate::server) source_option: &'static str,
    /// The engine, and why that one.
    pub(in crate::server) engine: String,
    pub(in crate::server) engine_reason: String,
    pub(in crate::server) workers: usize,
    pub(in crate::server) request_queues: u16,
    /// The options as resolved.
    pub(in crate::server) options: Value,
}

/// Seconds since then, as a number with milliseconds.
fn seconds_since(time: Instant) -> f64 {
    let elapsed = time.elapsed();
    let whole = Duration::from_millis(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
    whole.as_secs_f64()
}

impl Handlers {
    pub(super) fn status(&self) -> Value {
        let Facts {
            pid,
            user,
            started,
            serving,
            restarted,
            supervised,
            socket,
            source,
            source_option,
            engine,
            engine_reason,
            workers,
            request_queues,
            options,
        } = &self.facts;
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "protocol": VERSION,
            "process": pid,
            "user": user,
            "uptime_seconds": seconds_since(*started),
            "serving_seconds": seconds_since(*serving),
            "supervised": supervised,
            "resumed": restarted,
            "socket": socket,
            "source": { "option": source_option, "value": source },
            "mounts": self.mounts.as_ref().map(lists::mounts),
            "runtime": { "engine": engine, "reason": engine_reason },
            "workers": workers,
            "request_queues": request_queues,
            "connections": self.live.connections(),
            "vmm": self.live.session().map(|session| vmm(&session)),
            "usage": self.usage(),
            "limits": lists::limits(&self.limits.settings()),
            "log": log(),
            "options": options,
        })
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.fs.upgrade()?.usage())
    }

    /// The counters, unless the server is ending.
    pub(super) fn statistics(&self) -> Option<Snapshot> {
        Some(self.metrics.upgrade()?.snapshot())
    }

    pub(super) fn dump(&self) -> Value {
        let session = self.live.session();
        let threads = session.as_ref().map(|live| live.threads.threads());
        json!({
            "status": self.status(),
            "threads": threads.map(|threads| threads.iter().map(thread).collect::<Value>()),
            "statistics": self.statistics(),
        })
    }

    /// The state in a few lines.
    pub(super) fn summary(&self) -> Vec<String> {
        let facts = &self.facts;
        let mut lines = vec![format!(
            "ringfsd {}, process {}, {} {} for {:.0} s, runtime {}, {} workers",
            env!("CARGO_PKG_VERSION"),
            facts.pid,
            facts.source_option,
            facts.source,
            seconds_since(facts.serving),
            facts.engine,
            facts.workers,
        )];
        if let Some(usage) = self.usage() {
            let shown =
                |count: Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
            lines.push(format!(
                "{} inodes known, {} files and directories open, {} descriptors",
                shown(usage.inodes),
                shown(usage.handles),
                shown(usage.descriptors)
            ));
        }
        if let Some(statistics) = self.statistics() {
            lines.push(request_line(&statistics));
            lines.extend(latency_line(&statistics));
        }
        let Some(live) = self.live.session() else {
            lines.push("no VMM is connected".to_owned());
            return lines;
        };
        let session = live.session.upgrade();
        let negotiated = session.and_then(|session| session.negotiated());
        lines.push(format!(
            "a VMM is connected for {:.0} s: {}",
            seconds_since(live.since),
            negotiated.map_or_else(
                || "the guest has not mounted".to_owned(),
                |negotiated| negotiated.to_string()
            )
        ));
        for thread in live.threads.threads() {
            lines.push(thread_line(&thread));
        }
        lines
    }
}

/// Which records are logged.
pub(super) fn log() -> Value {
    let Some(levels) = logging::levels() else {
        return Value::Null;
    };
    let name = |level: log::LevelFilter| level.as_str().to_ascii_lowercase();
    let rooms = levels.rooms().into_iter();
    json!({
        "level": name(levels.level()),
        "filters": levels.filters(),
        "rooms": rooms.map(|(room, level)| (room, name(level))).collect::<std::collections::BTreeMap<_, _>>(),
    })
}

fn vmm(live: &LiveSession) -> Value {
    let negotiated = live.session.upgrade().and_then(|it| it.negotiated());
    json!({
        "connected_seconds": seconds_since(live.since),
        "session": negotiated.as_ref().map(session),
    })
}

fn session(negotiated: &Negotiated) -> Value {
    let flags = negotiated.flags.to_string();
    json!({
        "fuse": format!("7.{}", negotiated.minor),
        "max_write": negotiated.max_write,
        "max_readahead": negotiated.max_readahead,
        "max_background": negotiated.max_background,
        "flags": flags.split(' ').collect::<Vec<_>>(),
    })
}

/// The requests that a server has had, in a line.
fn request_line(statistics: &Snapshot) -> String {
    let mut operations: Vec<_> = statistics.operations.iter().collect();
    operations.sort_by_key(|stats| std::cmp::Reverse(stats.requests));
    let most: Vec<_> = operations
        .iter()
        .take(5)
        .map(|stats| format!("{} {}", stats.operation, stats.requests))
        .collect();
    let errors: u64 = operations.iter().map(|stats| stats.errors).sum();
    format!(
        "{} requests, {errors} errors, {} bytes read, {} written; most of all {}",
        statistics.requests(),
        statistics.bytes_read,
        statistics.bytes_written,
        if most.is_empty() {
            "nothing".to_owned()
        } else {
            most.join(", ")
        }
    )
}

/// How long requests took, if that is measured.
fn latency_line(statistics: &Snapshot) -> Option<String> {
    let latency = statistics.latency();
    let microseconds = |part| Some(latency.quantile(part)? / 1000.0);
    Some(format!(
        "half of the requests took at most {:.1} µs, 99 % at most {:.1} µs",
        microseconds(0.5)?,
        microseconds(0.99)?
    ))
}

fn thread(thread: &ThreadReport) -> Value {
    json!({
        "name": thread.name,
        "responds": thread.queues.is_some(),
        "queues": thread.queues.iter().flatten().map(queue).collect::<Value>(),
    })
}

fn queue(queue: &QueueReport) -> Value {
    json!({
        "queue": queue.index.0,
        "size": queue.size,
        "next_available": queue.next_available,
        "used": queue.used,
        "waiting": queue.waiting,
        "in_flight": queue.in_flight,
        "wants_kick": queue.wants_kick,
        "returned": queue.stats.chains,
        "dropped": queue.stats.dropped,
        "faulty": queue.stats.refused,
    })
}

fn thread_line(thread: &ThreadReport) -> String {
    let name = &thread.name;
    match &thread.queues {
        None => format!("{name} doesn't respond: it waits for the host, or serves a long batch"),
        Some(queues) if queues.is_empty() => format!("{name} has no queue"),
        Some(queues) => {
            let queues = queues.iter().map(|queue| {
                format!(
                    "queue {}: {} waiting, {} in flight, {} returned",
                    queue.index, queue.waiting, queue.in_flight, queue.stats.chains
                )
            });
            format!("{name}: {}", queues.collect::<Vec<_>>().join("; "))
        }
    }
}
