//! The `ringfsd` program: parse, run, print the error chain, return the exit code.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ringfsd::cli::Options;
use ringfsd::config::Config;
use ringfsd::server::{Server, chain};

fn main() -> ExitCode {
    let options = Options::parse();
    let level = options.log_level.into();
    let config = match Config::try_from(options) {
        Ok(config) => config,
        Err(error) => Options::command()
            .error(ErrorKind::ValueValidation, error)
            .exit(),
    };
    env_logger::Builder::new()
        .filter_level(level)
        .parse_env("RINGFSD_LOG")
        .init();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfsd: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
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
