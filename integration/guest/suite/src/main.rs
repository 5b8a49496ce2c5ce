//! Checks of a file system, made to run in a guest on a virtio-fs mount and, to show that the
//! checks themselves are right, on any folder of a host. Here: the command line and nothing else.
//! Invariant: stdout carries results only, one a line; stderr carries everything else.

#![deny(unsafe_code)]

mod checks;
mod digest;
mod failure;
mod fixture;
mod load;
mod lock;
mod namespace;
mod process;
mod region;
mod runner;

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "\
usage: guest-suite [--quick] [--user-namespace] DIR [FILTER]
           run the checks whose names contain FILTER, each in a fresh folder below DIR; exit 1
           if one fails. With --quick each does less, and the folders are left behind; with
           --user-namespace the server is in one, where some of root's rights are missing
       guest-suite --list
           print the names of the checks
       guest-suite --load DIR STOP
           load the file system below DIR, and verify it all the time, until the file STOP is
           there; exit 1 if something was not as it had to be
       guest-suite --digest DIR
           print a line for each file below DIR: content, kind, mode, owner, size, time, so
           that two trees can be compared";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    while let Some(word @ (&"--quick" | &"--user-namespace")) = words.first() {
        match *word {
            "--quick" => fixture::be_quick(),
            _ => fixture::expect_user_namespace(),
        }
        words.remove(0);
    }
    let done = match words[..] {
        ["--list"] => {
            for check in checks::all() {
                println!("{}", check.name);
            }
            Ok(true)
        }
        ["--load", dir, stop] => load::run(Path::new(dir), Path::new(stop)),
        ["--digest", dir] => digest::print(Path::new(dir)).map(|()| true),
        [dir] if !dir.starts_with('-') => runner::run(Path::new(dir), ""),
        [dir, filter] if !dir.starts_with('-') => runner::run(Path::new(dir), filter),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("guest-suite: {failure}");
            ExitCode::from(2)
        }
    }
}
