//! The `ringfsd` program: parse, run, print the error chain, return the exit code.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ringfsd::cli::{self, LogLevel, Options, Syslog};
use ringfsd::config::Config;
use ringfsd::sandbox::Ending;
use ringfsd::server::{Server, Started, chain};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if cli::asks_for_capabilities(&arguments) {
        println!("{}", cli::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let options = Options::parse_from(cli::expand(arguments));
    let (level, syslog) = (options.level(), options.syslog);
    let config = match Config::try_from(options) {
        Ok(config) => config,
        Err(error) => Options::command()
            .error(ErrorKind::ValueValidation, error)
            .exit(),
    };
    let told = begin_to_log(level, syslog).and_then(|log| run(config, log.as_ref()));
    match told {
        Ok(code) => code,
        Err(error) => {
            let error = chain(error.as_ref());
            if syslog {
                log::error!("{error}");
            }
            eprintln!("ringfsd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Answers what the log is written to, if it isn't standard error.
fn begin_to_log(
    level: LogLevel,
    syslog: bool,
) -> Result<Option<Syslog>, Box<dyn std::error::Error>> {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level.into()).parse_env("RINGFSD_LOG");
    let mut log = None;
    if syslog {
        let syslog = Syslog::connect()
            .map_err(|error| format!("--syslog: nobody listens on /dev/log: {error}"))?;
        log = Some(syslog.clone());
        // The number that the launcher knows, in whichever process.
        let pid = std::process::id();
        builder
            .target(env_logger::Target::Pipe(Box::new(syslog)))
            .format(move |line, record| {
                let head = cli::syslog_head(record.level(), pid);
                writeln!(line, "{head}{}", record.args())
            });
    }
    builder.init();
    Ok(log)
}

/// Goes on as two processes: one serves, and the one that the launcher has started waits for it.
fn run(config: Config, log: Option<&Syslog>) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let server = match Server::start(config, log.map(AsFd::as_fd))? {
        Started::Inside(server) => server,
        Started::Outside(outside) => {
            let ending = outside.watch()?;
            if matches!(ending, Ending::Signal(_)) {
                log::error!("{ending}");
            }
            return Ok(ExitCode::from(ending.pass_on()));
        }
    };
    // From here on SIGTERM and SIGINT only make `stop` readable.
    let (stop, signalled) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    server.release_signals()?;
    server.run(stop.as_fd())?;
    Ok(ExitCode::SUCCESS)
}
