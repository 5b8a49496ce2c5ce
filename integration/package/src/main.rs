//! Generates the manual pages and the completions from the definition of the command line.
//!
//! They are committed in `integration/package/texts`, so that a package needs no generator. A test
//! compares them with the definition. The invariant: what is generated depends on nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use ringfsd::internals::cli::{Check, Options, Upgrade};

/// The files, by name.
type Texts = BTreeMap<&'static str, Vec<u8>>;

fn main() -> ExitCode {
    match texts().and_then(|texts| write(&directory(), &texts)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfsd-package: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Where the files are.
fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("texts")
}

fn write(directory: &Path, texts: &Texts) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    for (name, text) in texts {
        std::fs::write(directory.join(name), text)?;
    }
    Ok(())
}

fn texts() -> std::io::Result<Texts> {
    let shells = [
        ("ringfsd.bash", Shell::Bash),
        ("_ringfsd", Shell::Zsh),
        ("ringfsd.fish", Shell::Fish),
    ];
    let mut texts = Texts::new();
    for (name, shell) in shells {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut Options::command(), "ringfsd", &mut text);
        texts.insert(name, text);
    }
    let pages = [
        ("ringfsd.1", Options::command()),
        // A command of its own, which is recognized before options are parsed.
        (
            "ringfsd-upgrade.1",
            Upgrade::command().name("ringfsd-upgrade"),
        ),
        ("ringfsd-check.1", Check::command().name("ringfsd-check")),
    ];
    for (name, command) in pages {
        let mut text = Vec::new();
        clap_mangen::Man::new(command)
            .manual("ringfsd")
            .date("")
            .render(&mut text)?;
        texts.insert(name, text);
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_texts_are_those_of_the_definition() {
        for (name, text) in texts().unwrap() {
            let committed = std::fs::read(directory().join(name)).unwrap_or_default();
            assert!(
                committed == text,
                "{name} is not what the command line is now: run `cargo xtask package texts`"
            );
        }
    }
}
