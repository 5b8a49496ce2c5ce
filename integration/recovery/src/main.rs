//! Kills a server in the middle of its work, again and again, and checks whether a guest notices.
//!
//! Several guest threads send requests all the time, each in directories of its own, and each knows
//! what must be there: what an operation returns, which names exist, what files contain, which node
//! is which, what is open, what is locked. The serving process gets SIGKILL at random moments, and
//! another takes over. No request may be lost, none may take effect twice, and nothing may be
//! forgotten. The guest's waiting times are measured. The invariant: the first failure ends the
//! run, and is reported with everything that is needed to repeat it.

mod act;
mod check;
mod guest;
mod model;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use vmm::fuse::{Client, FuseError, ROOT};
use vmm::{Options, Profile, Session};

use guest::Guest;
use server::{Server, ServerError};

/// How long a request may take, restarts included.
const TIMEOUT: Duration = Duration::from_secs(20);

/// How long to sleep for completions of one queue before the others are checked.
const NAP: Duration = Duration::from_micros(200);

#[derive(Debug, Parser)]
#[command(about = "Kills a server in the middle of its work, and looks whether a guest notices")]
struct Cli {
    /// The server's program.
    #[arg(long, default_value = "target/release/ringfsd")]
    server: PathBuf,
    /// How the next server starts.
    #[arg(long, value_enum, default_value = "supervised")]
    mode: Mode,
    /// How the whole server is ended, with `--mode state`.
    #[arg(long, value_enum, default_value = "kill")]
    end: End,
    /// The number of kills.
    #[arg(long, default_value_t = 30)]
    kills: u32,
    /// Guest threads that send requests.
    #[arg(long, default_value_t = 8)]
    guests: u32,
    /// Request queues.
    #[arg(long, default_value_t = 2)]
    queues: u16,
    /// The maximum number of replies between two kills.
    #[arg(long, default_value_t = 400)]
    between: u64,
    /// The seed of the random numbers (default: the time).
    #[arg(long)]
    seed: Option<u64>,
    /// Further options of the server.
    #[arg(last = true)]
    further: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// `--supervise`: the guardian starts it, and the front end notices nothing.
    Supervised,
    /// `--state`: the whole server is killed, another one is started by hand, and the front end
    /// reconnects as Cloud Hypervisor does.
    State,
    /// `--supervise`: instead of a kill, the program is upgraded to itself.
    Upgraded,
    /// The server is never killed: tests the model.
    Never,
}

/// How the whole server is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum End {
    /// SIGKILL to both processes; the next server is started while they are still ending.
    Kill,
    /// SIGTERM to the one that was started.
    Term,
    /// SIGTERM to both, as systemd stops a control group.
    Both,
    /// SIGINT to the one that was started.
    Int,
    /// SIGHUP to the one that was started.
    Hup,
}

/// Why a run ends early.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the server")]
    Server(#[from] ServerError),
    #[error("the vhost-user session")]
    Session(#[from] vmm::session::SessionError),
    #[error("a request")]
    Fuse(#[from] FuseError),
    /// The guest noticed a wrong reply.
    #[error("{0}")]
    Noticed(String),
    /// A request got no reply.
    #[error("{0} requests are not answered: {1}")]
    Unanswered(usize, String),
    #[error("checking on the host")]
    Host(#[from] std::io::Error),
}

/// Pseudo-random numbers (splitmix64).
#[derive(Clone, Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }
}

/// A run.
struct Run {
    server: Server,
    fs: Client<Session>,
    guests: Vec<Guest>,
    queues: usize,
    end: End,
    dice: Dice,
    answered: u64,
    pauses: Vec<Duration>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let by_clock = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| u64::from(now.subsec_nanos()) ^ now.as_secs())
    };
    let seed = cli.seed.unwrap_or_else(by_clock);
    println!("kill: seed {seed}");
    match run(&cli, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kill: seed {seed}: {}", vmm::error_chain(&failure));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli, seed: u64) -> Result<(), Failure> {
    let server = Server::start(cli)?;
    let options = Options::default()
        .request_queues(cli.queues)
        .queue_size(128)
        .memory(&[vmm::Region::new(0, 64 << 20)]);
    let session = Profile::CloudHypervisor.connect_path(server.socket(), &options)?;
    let mut fs = Client::new(session);
    fs.set_timeout(TIMEOUT);
    fs.set_umask(0);
    fs.init()?;
    let mut dice = Dice(seed);
    let mut guests = Vec::new();
    for number in 0..cli.guests {
        // A server that is started by hand can't reopen files without a name.
        let nameless = cli.mode != Mode::State;
        guests.push(Guest::new(&mut fs, number, dice.next(), nameless)?);
    }
    let queues = usize::from(cli.queues);
    let mut run = Run {
        server,
        fs,
        guests,
        queues,
        end: cli.end,
        dice,
        answered: 0,
        pauses: Vec::new(),
    };
    let begun = Instant::now();
    for round in 0..cli.kills {
        let count = run.dice.below(cli.between);
        let result = run
            .work(count)
            .and_then(|()| run.kill(cli.mode))
            .and_then(|()| run.rest())
            .and_then(|()| run.check());
        if let Err(failure) = result {
            eprintln!(
                "kill: after {round} kills, in directory {}",
                run.server.keep()
            );
            return Err(failure);
        }
    }
    let took = begun.elapsed();
    run.end()?;
    run.report(cli, took);
    Ok(())
}

impl Run {
    /// Waits for `count` replies.
    fn work(&mut self, count: u64) -> Result<(), Failure> {
        let end = self.answered + count;
        let mut since = Instant::now();
        while self.answered < end {
            self.submit()?;
            if self.collect()? != 0 {
                since = Instant::now();
            } else if since.elapsed() > TIMEOUT {
                return Err(self.unanswered());
            }
        }
        Ok(())
    }

    /// Kills the server, and measures how long the guest waits for the next reply.
    fn kill(&mut self, mode: Mode) -> Result<(), Failure> {
        if mode == Mode::Never {
            return Ok(());
        }
        self.submit()?;
        if mode == Mode::Upgraded {
            // The new program is checked before, while the old one serves: the server reports the pause.
            let pause = self.server.upgrade()?;
            self.pauses.push(pause);
            return Ok(());
        }
        let killed = Instant::now();
        self.server.kill(mode, self.end)?;
        // What has arrived until now is from the killed process.
        self.take_replies()?;
        self.submit()?;
        if mode == Mode::State {
            let socket = self.server.socket();
            self.fs.guest().reconnect_path(socket)?;
        }
        while self.collect()? == 0 {
            if killed.elapsed() > TIMEOUT {
                return Err(self.unanswered());
            }
        }
        self.pauses.push(killed.elapsed());
        Ok(())
    }

    /// Waits for everything in flight.
    fn rest(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        while self.guests.iter().any(|guest| !guest.is_idle()) {
            self.collect()?;
            if begun.elapsed() > TIMEOUT {
                return Err(self.unanswered());
            }
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), Failure> {
        let share = self.server.share();
        for guest in &mut self.guests {
            check::guest(&mut self.fs, guest, &share)?;
        }
        Ok(())
    }

    /// Releases everything, and checks that it is gone.
    fn end(&mut self) -> Result<(), Failure> {
        self.rest()?;
        for guest in &mut self.guests {
            check::forget(&mut self.fs, guest)?;
        }
        self.fs.getattr(ROOT)?;
        Ok(())
    }

    fn submit(&mut self) -> Result<(), Failure> {
        for (at, guest) in self.guests.iter_mut().enumerate() {
            if guest.is_idle() {
                self.fs.use_queue(1 + at % self.queues);
                guest.submit(&mut self.fs)?;
            }
        }
        Ok(())
    }

    /// Takes the replies that have arrived, without waiting.
    fn take_replies(&mut self) -> Result<u64, Failure> {
        let mut count = 0;
        for pending in self.fs.returned()? {
            let guest = self
                .guests
                .iter_mut()
                .find(|guest| guest.waits_for(pending));
            let Some(guest) = guest else {
                let what = format!("an unknown request {:#x} came back", pending.unique());
                return Err(Failure::Noticed(what));
            };
            let reply = self.fs.collect(pending);
            guest.finish(reply)?;
            count += 1;
        }
        self.answered += count;
        Ok(count)
    }

    /// Takes the replies that have arrived; waits for a moment if there are none.
    fn collect(&mut self) -> Result<u64, Failure> {
        let count = self.take_replies()?;
        if count == 0 {
            let queues = &mut self.fs.guest().queues;
            let at = 1 + self.dice.index(self.queues);
            if let Some(queue) = queues.get_mut(at) {
                match queue.wait(NAP) {
                    Ok(()) | Err(vmm::ring::RingError::TimedOut { .. }) => (),
                    Err(error) => return Err(FuseError::from(error).into()),
                }
            }
        }
        Ok(count)
    }

    fn unanswered(&self) -> Failure {
        let waiting: Vec<_> = self.guests.iter().filter_map(Guest::waiting).collect();
        Failure::Unanswered(waiting.len(), waiting.join("; "))
    }

    fn report(&mut self, cli: &Cli, took: Duration) {
        println!(
            "kill: {} kills, {} requests in {:.1} s, none lost, none done twice, nothing forgotten",
            cli.kills,
            self.answered,
            took.as_secs_f64()
        );
        self.pauses.sort_unstable();
        let most = self.pauses.len().saturating_sub(1);
        let at = |percent: usize| {
            let pause = self.pauses.get(most * percent / 100);
            pause.map_or(0.0, |pause| pause.as_secs_f64() * 1e3)
        };
        if self.pauses.is_empty() {
            return;
        }
        println!(
            "kill: from the kill to the next reply: p50 {:.2} ms, p99 {:.2} ms, at most {:.2} ms",
            at(50),
            at(99),
            at(100)
        );
    }
}
