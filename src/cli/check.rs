//! The command `ringfsd check` and its options, among which are those of the server.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches, value_parser};

use super::launcher::{apply_own_precedence, expand, refusal};
use super::{Options, Persona};
use crate::config::Config;

/// What the report is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// As JSON.
    pub json: bool,
    /// Files without a name may be created in the directories.
    pub writes: bool,
}

impl Check {
    /// The command line. Options of the server are accepted, and not shown in the help.
    #[must_use]
    pub fn command() -> Command {
        let command = Options::command()
            .name("ringfsd check")
            .bin_name("ringfsd check")
            .about("Find out whether a server would start, and what it could do on this host")
            .long_about(
                "Find out whether a server would start, and what it could do on this host\n\n\
                 Takes the options of the server, goes through the server's start, and ends it before \
                 it listens. Also tests what the host, the kernel, the user and the file systems of \
                 the shared directories support, with the reason and the option that follows. \
                 Nothing is changed: a few properties of a file system are tested with files that \
                 have no name (O_TMPFILE) and vanish with this command.\n\n\
                 The exit status is 0 if the server would start, 1 if not, and 2 for wrong usage.",
            )
            .override_usage("ringfsd check [--json] [--no-write] [OPTIONS OF THE SERVER] [DIR]")
            .after_help("The options of the server: ringfsd --help")
            .after_long_help(
                "For the options of the server see ringfsd --help. None is required. Examples:\n  \
                 ringfsd check /srv/vm1\n  \
                 ringfsd check --socket /run/vm1.sock --shared-dir /srv/vm1 --sandbox chroot",
            )
            .mut_args(|argument| argument.hide(true))
            .mut_group("listen", |group| group.required(false))
            // As for the server, but not required.
            .mut_arg("shared_dir", |_| {
                Arg::new("shared_dir")
                    .long("shared-dir")
                    .value_name("DIR")
                    .value_parser(value_parser!(PathBuf))
                    .conflicts_with_all(["vfs", "overlay", "rafs"])
                    .hide(true)
            });
        command
            .next_help_heading(None)
            .arg(
                Arg::new("dir")
                    .value_name("DIR")
                    .value_parser(value_parser!(PathBuf))
                    .conflicts_with_all(["shared_dir", "vfs", "overlay", "rafs"])
                    .help("Directory to share [default: the working directory]")
                    .long_help(
                        "Directory to share\n\nThe same as --shared-dir.\n\n\
                         [default: the working directory]",
                    ),
            )
            .arg(
                Arg::new("json")
                    .long("json")
                    .action(ArgAction::SetTrue)
                    .help("Print the report as JSON"),
            )
            .arg(
                Arg::new("no_write")
                    .long("no-write")
                    .action(ArgAction::SetTrue)
                    .help("Create no file, not even one without a name")
                    .long_help(
                        "Create no file, not even one without a name\n\nProperties that only such a \
                         file shows are reported as unknown.",
                    ),
            )
    }

    /// Parses the arguments of the program, of which the second is the command's name.
    ///
    /// # Errors
    ///
    /// They aren't such arguments, options exclude each other, or help or the version is asked for.
    pub fn parse(arguments: &[OsString]) -> Result<(Self, Config), clap::Error> {
        let error = |kind, message: String| Self::command().error(kind, message);
        let persona = Persona::of(arguments);
        let arguments = arguments.get(1..).unwrap_or_default();
        let behaviour = persona.behaviour();
        if let Some(reason) = refusal(arguments, behaviour.lenient) {
            return Err(error(ErrorKind::ArgumentConflict, reason));
        }
        let command = Self::command().version(behaviour.version);
        let matches = command.try_get_matches_from(expand(arguments.iter().cloned()))?;
        let mut options = Options::from_arg_matches(&matches)?;
        if behaviour.own_precedence {
            apply_own_precedence(arguments, &mut options);
        }
        options.connection.compat = Some(persona);
        let sharing = &mut options.sharing;
        let has_source = sharing.shared_dir.is_some()
            || !sharing.vfs.is_empty()
            || sharing.overlay.is_some()
            || sharing.rafs.is_some();
        if !has_source {
            let dir = matches.get_one::<PathBuf>("dir").cloned();
            sharing.shared_dir = Some(dir.unwrap_or_else(|| ".".into()));
        }
        let check = Self {
            json: matches.get_flag("json"),
            writes: !matches.get_flag("no_write"),
        };
        match Config::try_from(options) {
            Ok(config) => Ok((check, config)),
            Err(conflict) => Err(error(ErrorKind::ValueValidation, conflict.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Listen, Source};

    fn parse(arguments: &[&str]) -> Result<(Check, Config), clap::Error> {
        let arguments = ["ringfsd", "check"].iter().chain(arguments);
        Check::parse(&arguments.map(OsString::from).collect::<Vec<_>>())
    }

    fn source(arguments: &[&str]) -> Source {
        parse(arguments).unwrap().1.source
    }

    #[test]
    fn no_option_of_the_server_is_required() {
        Check::command().debug_assert();
        let (check, config) = parse(&[]).unwrap();
        assert_eq!(config.listen, Listen::Inherited(-1));
        assert_eq!(config.source, Source::Directory(".".into()));
        assert!(check.writes && !check.json);
    }

    #[test]
    fn directory_is_an_operand_or_the_option() {
        let expected = Source::Directory("/d".into());
        assert_eq!(source(&["--json", "/d"]), expected);
        assert_eq!(source(&["--shared-dir=/d", "--no-write"]), expected);
        assert_eq!(source(&["-o", "source=/d,cache=auto"]), expected);
        assert!(matches!(source(&["--vfs=/=/d"]), Source::Vfs(_)));
    }

    #[test]
    fn wrong_usage_has_status_2() {
        for wrong in [
            &["--shared-dir=/d", "/e"][..],
            &["--vfs=/=/d", "/e"],
            &["/d", "/e"],
            &["--sandbox", "castle"],
            &["--no-xattr", "--posix-acl"],
            &["--socket=/s", "--fd=3"],
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
        assert_eq!(parse(&["--help"]).unwrap_err().exit_code(), 0);
    }
}
