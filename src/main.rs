//! The `ringfsd` program: parse, run, print the error chain, return the exit code.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ringfsd::cli::{self, LogLevel, Options, Syslog};
use ringfsd::config::Config;
use ringfsd::server::{Server, chain};

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
    let logging = begin_to_log(level, syslog);
    match logging.and_then(|()| run(config)) {
        Ok(()) => ExitCode::SUCCESS,
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

fn begin_to_log(level: LogLevel, syslog: bool) -> Result<(), Box<dyn std::error::Error>> {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level.into()).parse_env("RINGFSD_LOG");
    if syslog {
        let syslog = Syslog::connect()
            .map_err(|error| format!("--syslog: nobody listens on /dev/log: {error}"))?;
        builder
            .target(env_logger::Target::Pipe(Box::new(syslog)))
            .format(|line, record| {
                let head = cli::syslog_head(record.level());
                writeln!(line, "{head}{}", record.args())
            });
    }
    builder.init();
    Ok(())
}

fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    // From here on SIGTERM and SIGINT only make `stop` readable.
    let (stop, signalled) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    Server::new(config)?.run(stop.as_fd())?;
    Ok(())
}
