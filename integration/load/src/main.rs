//! Puts load on a virtio-fs server through its socket, and measures what it does and what it costs.
//!
//! It parses the options, runs the command, and prints the chain of an error once.

mod bare;
mod ceiling;
mod cli;
mod drive;
mod fleet;
mod forgets;
mod histogram;
mod lane;
mod many;
mod pattern;
mod process;
mod program;
mod random;
mod report;
mod responder;
mod run;
mod scene;
mod share;
mod spec;
mod table;

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;

use cli::{Command, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    let result: Result<(), Box<dyn Error>> = match &options.command {
        Some(Command::Bare(bare)) => bare::run(bare).map_err(Into::into),
        Some(Command::Ceiling(ceiling)) => ceiling::run(ceiling).map_err(Into::into),
        Some(Command::Fleet(fleet)) => fleet::run(fleet).map_err(Into::into),
        Some(Command::Many(many)) => many::run(many).map_err(Into::into),
        Some(Command::Table(table)) => table::run(&table.files).map_err(Into::into),
        None if options.run.list => {
            list();
            Ok(())
        }
        None => run::run(&options.run).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {}", vmm::error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn list() {
    for (name, about, spec) in spec::list() {
        println!("{name:<17} {about} [{spec}]");
    }
}
