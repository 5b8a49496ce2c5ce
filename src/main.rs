//! The `ringfsd` program: parse, run, print the error chain, return the exit code.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ringfsd::cli::{self, LogLevel, Options, Syslog, Upgrade};
use ringfsd::config::Config;
use ringfsd::error_chain;
use ringfsd::recovery::{self, ExecHandover, Watched};
use ringfsd::sandbox::{self, Ending};
use ringfsd::server::{self, Exit, Server, Started};

fn main() -> ExitCode {
    if let Err(error) = server::raise_limits() {
        eprintln!("ringfsd: {error}");
        return ExitCode::FAILURE;
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    if cli::asks_for_capabilities(&arguments) {
        println!("{}", cli::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    if cli::asks_for_upgrade(&arguments) {
        return upgrade(&arguments);
    }
    if let Some(reason) = cli::refusal(&arguments) {
        let error = Options::command().error(ErrorKind::ArgumentConflict, reason);
        error.exit();
    }
    let options = Options::parse_from(cli::expand(arguments));
    let logging = &options.observability;
    let (level, syslog) = (logging.level(), logging.syslog);
    let config = match Config::try_from(options) {
        Ok(config) => config,
        Err(error) => Options::command()
            .error(ErrorKind::ValueValidation, error)
            .exit(),
    };
    match server::check_for_upgrade(&config) {
        None => {}
        Some(Ok(status)) => return ExitCode::from(status),
        Some(Err(reason)) => {
            eprintln!("ringfsd: {reason}");
            return ExitCode::FAILURE;
        }
    }
    let result = start_logging(level, syslog).and_then(|log| run(config, log.as_ref()));
    match result {
        Ok(code) => code,
        Err(error) => {
            let error = server::explain(error.as_ref());
            if syslog {
                log::error!("{error}");
            }
            eprintln!("ringfsd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Replaces a running server with this program.
fn upgrade(arguments: &[OsString]) -> ExitCode {
    let pid = Upgrade::parse_from(arguments.iter().skip(1)).pid;
    match recovery::ask(pid) {
        Ok(outcome) => {
            println!("{outcome}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ringfsd: {}", error_chain::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Starts logging; returns the connection to syslog if the log goes there.
fn start_logging(
    level: LogLevel,
    syslog: bool,
) -> Result<Option<Syslog>, Box<dyn std::error::Error>> {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level.into()).parse_env("RINGFSD_LOG");
    let mut log = None;
    if syslog {
        let syslog = Syslog::connect()
            .map_err(|error| format!("--syslog: can't connect to /dev/log: {error}"))?;
        log = Some(syslog.clone());
        // The process ID that the launcher knows, also in the serving process.
        let pid = std::process::id();
        builder
            .target(env_logger::Target::Pipe(Box::new(syslog)))
            .format(move |line, record| {
                let header = cli::syslog_header(record.level(), pid);
                writeln!(line, "{header}{}", record.args())
            });
    }
    builder.init();
    Ok(log)
}

/// Splits into two processes: one serves, and the one that the launcher started waits for it.
fn run(config: Config, log: Option<&Syslog>) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let handover = ExecHandover::take()?;
    sandbox::reset_inherited(handover.is_some())?;
    let log = log.map(AsFd::as_fd);
    let server = match Server::start(config, log, handover)? {
        Started::Serving(server) => server,
        Started::Guardian(parent) => match parent.watch(log)? {
            Watched::Serving(server) => server,
            Watched::Ended(ending) => {
                if matches!(ending, Ending::Signal(_)) {
                    log::error!("{ending}");
                }
                return Ok(ExitCode::from(ending.pass_on()));
            }
        },
    };
    serve(*server)
}

fn serve(mut server: Server) -> Result<ExitCode, Box<dyn std::error::Error>> {
    // From here on these signals only make `stop` readable.
    let (stop, signalled) = UnixStream::pair()?;
    let leave = Arc::new(AtomicBool::new(false));
    if server.is_supervised() {
        abort_on_panic();
        let hangup = signal_hook::consts::SIGHUP;
        // Handlers run in the order of registration: the flag is set before `stop` is readable.
        signal_hook::flag::register(hangup, Arc::clone(&leave))?;
        signal_hook::low_level::pipe::register(hangup, signalled.try_clone()?)?;
    }
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    server.release_signals()?;
    match server.run(stop.as_fd(), &leave)? {
        Exit::Ended => Ok(ExitCode::SUCCESS),
        Exit::Left => server.leave(),
    }
}

/// Makes a panic of this thread abort the process before destructors release anything, so that
/// another process can resume the session. Panics of workers are caught, each with its request.
fn abort_on_panic() {
    let main_thread = std::thread::current().id();
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if std::thread::current().id() == main_thread {
            std::process::abort();
        }
    }));
}
