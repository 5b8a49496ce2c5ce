//! Generates the manual pages and the completions from the definition of the command line.
//!
//! They are committed in `integration/package/texts`, so that a package needs no generator. A test
//! compares them with the definition. The invariant: what is generated depends on nothing else.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Arg, Command, CommandFactory};
use clap_complete::Shell;
use ringfsd::internals::cli::{Ctl, Options, Top, Upgrade};

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
        // Commands of their own, which are recognized before options are parsed.
        (
            "ringfsd-upgrade.1",
            Upgrade::command().name("ringfsd-upgrade"),
        ),
        ("ringfsd-ctl.1", Ctl::command().name("ringfsd-ctl")),
        ("ringfsd-top.1", Top::command().name("ringfsd-top")),
    ];
    for (name, command) in pages {
        texts.insert(name, page(command)?);
    }
    Ok(texts)
}

/// A manual page. The commands of a command are on its page, instead of on pages of their own.
fn page(mut command: Command) -> std::io::Result<Vec<u8>> {
    command.build();
    let commands: Vec<_> = command.get_subcommands().cloned().collect();
    let mut text = Vec::new();
    let page = clap_mangen::Man::new(command).manual("ringfsd").date("");
    if commands.is_empty() {
        page.render(&mut text)?;
        return Ok(text);
    }
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    writeln!(text, ".SH COMMANDS")?;
    for command in commands {
        add_command(&mut text, command)?;
    }
    page.render_version_section(&mut text)?;
    Ok(text)
}

/// Adds a command of a command, with what it has beside the options of all.
fn add_command(text: &mut Vec<u8>, mut command: Command) -> std::io::Result<()> {
    let own = |argument: &&Arg| {
        !argument.is_global_set() && !["help", "version"].contains(&argument.get_id().as_str())
    };
    let arguments: Vec<_> = command.get_arguments().filter(own).cloned().collect();
    let names = arguments.iter().map(ToString::to_string);
    let usage: Vec<_> = [command.get_name().to_owned()]
        .into_iter()
        .chain(names)
        .collect();
    writeln!(text, ".SS {}", roff(&usage.join(" ")))?;
    let about = command.get_long_about().or(command.get_about());
    writeln!(
        text,
        "{}",
        roff(&about.map(ToString::to_string).unwrap_or_default())
    )?;
    command.build();
    for argument in arguments {
        let help = argument.get_long_help().or(argument.get_help());
        let help = help.map(ToString::to_string).unwrap_or_default();
        writeln!(
            text,
            ".TP\n\\fB{}\\fR\n{}",
            roff(&argument.to_string()),
            roff(&help)
        )?;
    }
    Ok(())
}

/// A text of paragraphs, as `man` takes it.
fn roff(text: &str) -> String {
    let lines = text
        .lines()
        .map(|line| match line.replace('\\', "\\e").replace('-', "\\-") {
            line if line.is_empty() => ".sp".to_owned(),
            line if line.starts_with(['.', '\'']) => format!("\\&{line}"),
            line => line,
        });
    lines.collect::<Vec<_>>().join("\n")
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
