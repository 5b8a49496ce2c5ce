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
use ringfsd::error_chain;
use ringfsd::internals::check;
use ringfsd::internals::cli::{
    self, Behaviour, Check, Ctl, Options, Persona, Syslog, Top, Upgrade,
};
use ringfsd::internals::config::Config;
use ringfsd::internals::ctl;
use ringfsd::internals::logging;
use ringfsd::internals::recovery::{self, ExecHandover, Watched};
use ringfsd::internals::sandbox::{self, Ending};
use ringfsd::internals::server::{self, Exit, Server, Started};
use ringfsd::internals::top;

fn main() -> ExitCode {
    if let Err(error) = server::raise_limits() {
        eprintln!("ringfsd: {error}");
        return ExitCode::FAILURE;
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    if cli::asks_for_capabilities(&arguments) {
        // Whoever closes the pipe early has read enough.
        let _ = writeln!(std::io::stdout(), "{}", cli::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    match cli::asks_for_command(&arguments) {
        None => {}
        Some("check") => return check(&arguments),
        Some("ctl") => return ctl(&arguments),
        Some("top") => return top(&arguments),
        Some(_) => return upgrade(&arguments),
    }
    let persona = Persona::of(&arguments);
    let behaviour = persona.behaviour();
    let program = behaviour.program;
    let options = match cli::parse(&arguments, persona) {
        Ok(options) => options,
        Err(error) => {
            // A failure can't be reported any more.
            let _ = error.print();
            return ExitCode::from(cli::status_of(&error, &arguments, behaviour));
        }
    };
    let logging = &options.observability;
    let (levels, syslog, format) = (logging.levels(), logging.syslog, logging.log_format);
    let notices = cli::notices(&options);
    let config = match Config::try_from(options) {
        Ok(config) => config,
        Err(error) => {
            let error = Options::command().error(ErrorKind::ValueValidation, error);
            // A failure can't be reported any more.
            let _ = error.print();
            return ExitCode::from(behaviour.conflict_status);
        }
    };
    match server::check_for_upgrade(&config) {
        None => {}
        Some(Ok(status)) => return ExitCode::from(status),
        Some(Err(reason)) => {
            eprintln!("{program}: {reason}");
            return ExitCode::FAILURE;
        }
    }
    let syslog = start_logging(behaviour, levels, syslog, format);
    for notice in notices {
        log::warn!("{notice}");
    }
    let ended = run(config, behaviour, syslog.as_ref());
    log::logger().flush();
    match ended {
        Ok(code) => code,
        Err(error) => {
            let error = server::explain(error.as_ref());
            if syslog.is_some() {
                log::error!("{error}");
            }
            eprintln!("{program}: {error}");
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

/// Reports what this host can do, and whether a server would start.
fn check(arguments: &[OsString]) -> ExitCode {
    let (check, config) = match Check::parse(arguments) {
        Ok(parsed) => parsed,
        Err(error) => {
            // A failure can't be reported any more.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let report = check::run(config, check.writes);
    // Whoever closes the pipe early has read enough.
    let _ = match check.json {
        true => writeln!(std::io::stdout(), "{}", report.json()),
        false => write!(std::io::stdout(), "{report}"),
    };
    match report.would_start() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Asks a running server for something.
fn ctl(arguments: &[OsString]) -> ExitCode {
    let ctl = Ctl::parse_from(arguments.iter().skip(1));
    match ctl::run(&ctl) {
        Ok(text) => {
            // Whoever closes the pipe early has read enough.
            let _ = writeln!(std::io::stdout(), "{text}");
            ExitCode::SUCCESS
        }
        Err(text) if ctl.json => {
            let _ = writeln!(std::io::stdout(), "{text}");
            ExitCode::FAILURE
        }
        Err(text) => {
            eprintln!("ringfsd: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Watches running servers.
fn top(arguments: &[OsString]) -> ExitCode {
    match top::run(&Top::parse_from(arguments.iter().skip(1))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfsd: {}", error_chain::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Starts logging; returns the connection to syslog if the log goes there.
fn start_logging(
    behaviour: &'static Behaviour,
    levels: logging::LevelList,
    syslog: bool,
    format: logging::Format,
) -> Option<Syslog> {
    let syslog = syslog.then(Syslog::connect);
    let has_syslog = matches!(syslog, Some(Ok(_)));
    let filters = cli::log_filters(behaviour, std::env::var_os, has_syslog);
    let output = syslog.as_ref().and_then(|syslog| syslog.as_ref().ok());
    let output = output.map(|syslog| {
        // The process ID that the launcher knows, also in the serving process.
        let pid = std::process::id();
        logging::Output {
            target: Box::new(syslog.clone()),
            header: Box::new(move |level| cli::syslog_header(behaviour, level, pid)),
        }
    });
    logging::start(levels, filters, output, format);
    match syslog {
        Some(Ok(syslog)) => Some(syslog),
        Some(Err(error)) => {
            log::warn!("--syslog: can't connect to /dev/log, logging to standard error: {error}");
            None
        }
        None => None,
    }
}

/// Splits into two processes: one serves, and the one that the launcher started waits for it.
fn run(
    config: Config,
    behaviour: &Behaviour,
    log: Option<&Syslog>,
) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let handover = ExecHandover::take()?;
    sandbox::reset_inherited(handover.is_some())?;
    let log = log.map(AsFd::as_fd);
    let server = match Server::start(config, log, handover)? {
        Started::Serving(server) => server,
        Started::Guardian(parent) => match parent.watch(log)? {
            Watched::Serving(server) => server,
            Watched::Ended { ending, asked_by } => {
                if matches!(ending, Ending::Signal(_)) {
                    log::error!("{ending}");
                }
                return Ok(ExitCode::from(pass_on(behaviour, ending, asked_by)));
            }
        },
    };
    serve(*server)
}

/// Ends as the serving process has ended, or returns the status to exit with.
fn pass_on(behaviour: &Behaviour, ending: Ending, asked_by: Option<i32>) -> u8 {
    use signal_hook::consts::{SIGHUP, SIGTERM};
    match (ending, asked_by) {
        (Ending::Status(0), Some(SIGTERM | SIGHUP)) if behaviour.signal_is_failure => 1,
        (Ending::Status(0), Some(signal)) if behaviour.signal_is_failure => {
            Ending::Signal(signal).pass_on()
        }
        (Ending::Signal(signal), _) if behaviour.kill_is_status => {
            u8::try_from(256 - signal).unwrap_or(1)
        }
        _ => ending.pass_on(),
    }
}

fn serve(mut server: Server) -> Result<ExitCode, Box<dyn std::error::Error>> {
    // From here on these signals only make `stop` readable.
    let (stop, signalled) = UnixStream::pair()?;
    let leave = Arc::new(AtomicBool::new(false));
    // Set before `stop` is readable, so that a request to report isn't taken for one to end.
    let ending = Arc::new(AtomicBool::new(false));
    let ending_signals = if server.is_supervised() {
        abort_on_panic();
        let hangup = signal_hook::consts::SIGHUP;
        // Handlers run in the order of registration: the flag is set before `stop` is readable.
        signal_hook::flag::register(hangup, Arc::clone(&leave))?;
        signal_hook::flag::register(hangup, Arc::clone(&ending))?;
        signal_hook::low_level::pipe::register(hangup, signalled.try_clone()?)?;
        let mut signals = sandbox::ending_signals()?;
        signals.retain(|signal| *signal != hangup);
        signals
    } else {
        sandbox::ending_signals()?
    };
    let report = signal_hook::consts::SIGUSR1;
    if server.is_controlled() {
        let (reports, asked) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(report, asked)?;
        server.reports_on(reports);
    } else {
        signal_hook::low_level::pipe::register(report, signalled.try_clone()?)?;
        server.reports_between(stop.try_clone()?, Arc::clone(&ending));
    }
    for signal in ending_signals {
        signal_hook::flag::register(signal, Arc::clone(&ending))?;
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    server.release_signals()?;
    match server.run(stop.as_fd(), &leave)? {
        Exit::Ended => Ok(ExitCode::SUCCESS),
        Exit::Left => {
            log::logger().flush();
            server.leave()
        }
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
