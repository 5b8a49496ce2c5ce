//! The server: started, killed, started again.
//!
//! The invariant: `kill` returns when the process is gone, not when the signal has been sent.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::{Cli, End, Mode, TIMEOUT};

/// Errors of the server process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    #[error("can't make a directory for the server")]
    Directory(#[source] io::Error),
    #[error("can't start {program}")]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the server doesn't listen; see {log}")]
    Silent { log: PathBuf },
    #[error("no process of the server serves; see {log}")]
    NoProcess { log: PathBuf },
    #[error("can't kill it")]
    Kill(#[source] rustix::io::Errno),
    #[error("can't run the upgrade")]
    Upgrade(#[source] io::Error),
    #[error("the server isn't upgraded: {said}")]
    NotUpgraded { said: String },
}

/// A server with a directory of its own.
pub(crate) struct Server {
    directory: tempfile::TempDir,
    program: PathBuf,
    arguments: Vec<String>,
    child: Child,
    /// The process that was killed last, which may still be listed.
    killed: Option<Pid>,
}

impl Server {
    pub(crate) fn start(cli: &Cli) -> Result<Self, ServerError> {
        let directory = tempfile::tempdir().map_err(ServerError::Directory)?;
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::create_dir(path("share")).map_err(ServerError::Directory)?;
        let mut arguments = vec![
            format!("--socket={}", path("socket")),
            format!("--shared-dir={}", path("share")),
            format!("--request-queues={}", cli.queues),
            "--posix-locks".to_owned(),
            "--log-level=info".to_owned(),
        ];
        match cli.mode {
            Mode::Supervised | Mode::Upgraded => arguments.push("--supervise".to_owned()),
            Mode::State => arguments.push(format!("--state={}", path("state"))),
            Mode::Never => (),
        }
        arguments.extend(cli.further.iter().cloned());
        let child = launch(&directory, &cli.server, &arguments)?;
        let server = Self {
            directory,
            program: cli.server.clone(),
            arguments,
            child,
            killed: None,
        };
        server.wait_until_it_listens()?;
        Ok(server)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// Keeps the directory; returns its path.
    pub(crate) fn keep(&mut self) -> String {
        self.directory.disable_cleanup(true);
        self.directory.path().display().to_string()
    }

    /// Kills the serving process. Without a guardian that starts another one, ends the whole server and
    /// starts another, which may not listen yet.
    pub(crate) fn kill(&mut self, mode: Mode, end: End) -> Result<(), ServerError> {
        let serving = self.serving()?;
        self.killed = Some(serving);
        let handle = rustix::process::pidfd_open(serving, PidfdFlags::empty());
        let handle = handle.map_err(ServerError::Kill)?;
        let serving = |signal| {
            let sent = rustix::process::pidfd_send_signal(&handle, signal);
            sent.map_err(ServerError::Kill)
        };
        let started = |signal| {
            let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or(ServerError::Kill(rustix::io::Errno::SRCH))?;
            rustix::process::kill_process(pid, signal).map_err(ServerError::Kill)
        };
        match end {
            _ if mode != Mode::State => serving(Signal::KILL)?,
            End::Kill => {
                serving(Signal::KILL)?;
                // It may have ended with the other process.
                let _ended = started(Signal::KILL);
            }
            End::Both => {
                started(Signal::TERM)?;
                // It may have ended already.
                let _ended = serving(Signal::TERM);
            }
            End::Term => started(Signal::TERM)?,
            End::Int => started(Signal::INT)?,
            End::Hup => started(Signal::HUP)?,
        }
        // A killed server may still be ending while the next one starts.
        let next = (mode == Mode::State && end == End::Kill)
            .then(|| launch(&self.directory, &self.program, &self.arguments))
            .transpose()?;
        let mut ends = [PollFd::new(&handle, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: i64::try_from(TIMEOUT.as_secs()).unwrap_or(1),
            tv_nsec: 0,
        };
        if poll(&mut ends, Some(&timeout)).map_err(ServerError::Kill)? == 0 {
            return Err(ServerError::Kill(rustix::io::Errno::TIMEDOUT));
        }
        if mode == Mode::State {
            let _status = self.child.wait();
            self.child = match next {
                Some(next) => next,
                None => launch(&self.directory, &self.program, &self.arguments)?,
            };
        }
        Ok(())
    }

    /// Upgrades the program to itself, and returns how long the guest has waited, as the program reports.
    pub(crate) fn upgrade(&self) -> Result<Duration, ServerError> {
        let pid = self.child.id().to_string();
        let output = Command::new(&self.program)
            .args(["upgrade", "--pid", &pid])
            .output()
            .map_err(ServerError::Upgrade)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = text(&output.stdout) + &text(&output.stderr);
        let after = said.split("waited for ").nth(1);
        let number = after.and_then(|after| after.split(' ').next()?.parse::<f64>().ok());
        match number {
            Some(milliseconds) if output.status.success() => {
                Ok(Duration::from_secs_f64(milliseconds / 1000.0))
            }
            _ => Err(ServerError::NotUpgraded { said }),
        }
    }

    /// The serving process: the guardian's child.
    fn serving(&self) -> Result<Pid, ServerError> {
        let end = Instant::now() + TIMEOUT;
        while Instant::now() < end {
            if let Some(pid) = self.child_of_guardian() {
                return Ok(pid);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let log = self.log();
        Err(ServerError::NoProcess { log })
    }

    fn child_of_guardian(&self) -> Option<Pid> {
        let guardian = self.child.id();
        let children = format!("/proc/{guardian}/task/{guardian}/children");
        let children = std::fs::read_to_string(children).ok()?;
        let pids = children.split_whitespace();
        pids.filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
            .find(|pid| Some(*pid) != self.killed)
    }

    fn wait_until_it_listens(&self) -> Result<(), ServerError> {
        let end = Instant::now() + TIMEOUT;
        let said = || std::fs::read_to_string(self.log()).unwrap_or_default();
        while !said().contains("Waiting for vhost-user socket connection") {
            if Instant::now() > end {
                let log = self.log();
                return Err(ServerError::Silent { log });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let serving = self.child_of_guardian();
        let _gone_already = self.child.kill();
        let _status = self.child.wait();
        if let Some(pid) = serving {
            let _gone_with_it = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

fn launch(
    directory: &tempfile::TempDir,
    program: &PathBuf,
    arguments: &[String],
) -> Result<Child, ServerError> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(directory.path().join("log"))
        .map_err(ServerError::Directory)?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(|source| ServerError::Start {
            program: program.clone(),
            source,
        })
}
