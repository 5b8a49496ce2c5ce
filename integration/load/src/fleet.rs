//! Many servers on one host: how long they take to start, what they use while nothing happens, and
//! how fast a request is while most of them are idle.
//!
//! The invariant: every server that this starts is a child of this process, and has been told to end
//! and waited for when [`run`] returns.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmm::fuse::{Client, FuseError, LINUX_OFFERS, ROOT};
use vmm::session::SessionError;
use vmm::{Profile, Region, Session};

use crate::cli::Fleet;
use crate::drive::TIMEOUT;
use crate::histogram::Histogram;
use crate::process::{Counters, Process, ProcessError};

/// How long a server may take to listen.
const START: Duration = Duration::from_secs(30);

/// Why the measurement fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FleetError {
    /// A server could not be started.
    #[error("can't start server {number}")]
    Start {
        number: u32,
        #[source]
        source: io::Error,
    },
    /// A server doesn't listen.
    #[error("server {0} doesn't listen")]
    Silent(u32),
    /// No session with a server.
    #[error("there is no session with server {number}")]
    Session {
        number: u32,
        #[source]
        source: SessionError,
    },
    /// A server failed a request.
    #[error("a request failed")]
    Request(#[from] FuseError),
    /// A server's process can't be read.
    #[error("can't measure a server's process")]
    Process(#[from] ProcessError),
    /// A thread panicked.
    #[error("a thread of the generator panicked")]
    Panicked,
}

/// A server, and the session with it.
struct Server {
    child: Child,
    client: Option<Client<Session>>,
    process: Option<Process>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.client.take());
        if let Ok(pid) = i32::try_from(self.child.id())
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            // It may have ended when its client went.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

/// Starts the servers, and prints a line of what was measured.
pub(crate) fn run(options: &Fleet) -> Result<(), FleetError> {
    if options.heading {
        heading();
    }
    let mut servers = Vec::new();
    let (mut listening, mut answering) = (Histogram::new(), Histogram::new());
    for number in 0..options.count {
        let (server, listened, answered) = start(options, number)?;
        listening.record(nanoseconds(listened));
        answering.record(nanoseconds(answered));
        servers.push(server);
    }
    // What starting leaves to be done later is done, and polling has ended.
    std::thread::sleep(Duration::from_secs(1));

    let before = counters(&servers)?;
    let began = Instant::now();
    std::thread::sleep(options.seconds);
    let idle = began.elapsed();
    let (mut switches, mut cpu, mut memory, mut private, mut threads) = (0, 0, 0, 0, 0);
    for (server, before) in servers.iter().zip(&before) {
        if let Some(process) = &server.process {
            let used = process.since(before)?;
            switches += used.switches;
            cpu += used.cpu;
            memory += used.memory;
            private += used.private;
            threads += used.threads;
        }
    }
    let latencies = busy(&mut servers, options.seconds)?;
    let each = |sum: u64| number(sum) / f64::from(options.count);
    println!(
        "| {} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} | {:.0} | {:.1} | {:.2} | {:.3} | {:.0} | {:.0} | {} |",
        options.label,
        options.count,
        number(listening.quantile(500)) / 1e6,
        number(listening.quantile(990)) / 1e6,
        number(answering.quantile(500)) / 1e6,
        number(answering.quantile(990)) / 1e6,
        each(memory),
        each(private),
        each(threads),
        each(switches) / idle.as_secs_f64(),
        each(cpu) / 1e6 / idle.as_secs_f64(),
        number(latencies.quantile(500)) / 1e3,
        number(latencies.quantile(990)) / 1e3,
        latencies.count(),
    );
    Ok(())
}

/// The head of the table.
fn heading() {
    println!(
        "| server | number | ms to the socket, p50 | p99 | ms from connect to first reply, p50 | p99 \
         | KiB each (PSS) | private | threads | wake-ups/s each | CPU ms/s each \
         | busy: GETATTR µs p50 | p99 | requests |"
    );
    println!("{}", "| --- ".repeat(14) + "|");
}

/// Starts a server. Returns how long it took until there was a socket, and from the connection until
/// the first reply.
fn start(options: &Fleet, number: u32) -> Result<(Server, Duration, Duration), FleetError> {
    let failed = |source| FleetError::Start { number, source };
    let socket = options.dir.join(format!("s{number}"));
    // It is there if an earlier run ended badly.
    let _ = std::fs::remove_file(&socket);
    let line = options
        .command
        .replace("%SOCKET%", &socket.display().to_string());
    let began = Instant::now();
    let mut child = Command::new("/bin/sh");
    child.arg("-c").arg(format!("exec {line}"));
    let child = child.stdin(Stdio::null()).spawn().map_err(failed)?;
    let mut server = Server {
        child,
        client: None,
        process: None,
    };
    await_socket(&socket, number)?;
    let listened = began.elapsed();
    let began = Instant::now();
    let memory = [Region::new(0, 8 << 20), Region::new(4 << 30, 8 << 20)];
    let settings = vmm::Options::default().memory(&memory).timeout(TIMEOUT);
    let session = loop {
        match Profile::Simple.connect_path(&socket, &settings) {
            Ok(session) => break session,
            // It has bound the socket, and doesn't listen yet.
            Err(_) if began.elapsed() < Duration::from_secs(1) => std::thread::yield_now(),
            Err(source) => return Err(FleetError::Session { number, source }),
        }
    };
    let mut client = Client::new(session);
    client.set_timeout(TIMEOUT);
    client.init_offering(LINUX_OFFERS)?;
    client.getattr(ROOT)?;
    let answered = began.elapsed();
    server.client = Some(client);
    let pid = i32::try_from(server.child.id()).unwrap_or(0);
    server.process = Some(Process::new(pid)?);
    Ok((server, listened, answered))
}

fn await_socket(path: &Path, number: u32) -> Result<(), FleetError> {
    let deadline = Instant::now() + START;
    while !path.exists() {
        if Instant::now() >= deadline {
            return Err(FleetError::Silent(number));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

fn counters(servers: &[Server]) -> Result<Vec<Counters>, FleetError> {
    let processes = servers.iter().filter_map(|server| server.process.as_ref());
    processes
        .map(|process| process.counters().map_err(Into::into))
        .collect()
}

/// Keeps one request in flight on each of one server in a hundred, at least one, for this time.
fn busy(servers: &mut [Server], time: Duration) -> Result<Histogram, FleetError> {
    let count = servers.len().div_ceil(100);
    let clients = servers
        .iter_mut()
        .filter_map(|server| server.client.as_mut());
    std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .take(count)
            .map(|client| {
                scope.spawn(move || -> Result<Histogram, FuseError> {
                    let mut latencies = Histogram::new();
                    let end = Instant::now() + time;
                    while Instant::now() < end {
                        let began = Instant::now();
                        client.getattr(ROOT)?;
                        latencies.record(nanoseconds(began.elapsed()));
                    }
                    Ok(latencies)
                })
            })
            .collect();
        let mut all = Histogram::new();
        for thread in threads {
            let latencies = thread.join().map_err(|_panic| FleetError::Panicked)??;
            all.merge(&latencies);
        }
        Ok(all)
    })
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the sums are far below 2^53, and are shown with few digits"
)]
fn number(value: u64) -> f64 {
    value as f64
}
