//! The `ringfsd` program: parse, run, print the error chain, return the exit code.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::Parser;
use ringfsd::cli::Options;
use ringfsd::server::{Server, chain};

fn main() -> ExitCode {
    let options = Options::parse();
    let level = options.log_level.into();
    env_logger::Builder::new()
        .filter_level(level)
        .parse_env("RINGFSD_LOG")
        .init();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfsd: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    // From here on SIGTERM and SIGINT only make `stop` readable.
    let (stop, signalled) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    Server::new(options.into())?.run(stop.as_fd())?;
    Ok(())
}
