//! The command line: options as typed, and their help.
//!
//! There is one module for each heading of `--help`. `expand` rewrites the older spellings of
//! launchers, and [`Options`] converts into a [`Config`](crate::config::Config). The invariant:
//! nothing here looks at the host; whether it supports an option is found out when the server starts.

mod caching;
mod comma_list;
mod conflict;
mod connection;
mod ctl;
mod dax;
mod extended_attributes;
mod isolation;
mod launcher;
mod limits;
mod migration;
mod observability;
mod ownership;
mod persona;
mod recovery;
mod resolve;
mod seconds;
mod sharing;
mod size;
mod source_options;
mod sources;
mod syslog;
mod top;
mod upgrade;
mod values;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser};

use self::launcher::{apply_own_precedence, expand, is_late_in_virtiofsd, refusal};

pub(crate) use self::caching::Caching;
pub(crate) use self::connection::Connection;
pub use self::ctl::Ctl;
pub(crate) use self::ctl::{CtlCommand, PageArgs};
pub(crate) use self::dax::Dax;
pub(crate) use self::extended_attributes::ExtendedAttributes;
pub(crate) use self::isolation::Isolation;
pub use self::launcher::{CAPABILITIES, asks_for_capabilities, asks_for_command};
pub(crate) use self::limits::Limits;
pub(crate) use self::migration::Migration;
pub(crate) use self::observability::Observability;
pub use self::observability::log_filters;
pub(crate) use self::ownership::Ownership;
pub use self::persona::{Behaviour, DIFFERENCES, Difference, Persona};
pub(crate) use self::recovery::Recovery;
pub use self::resolve::notices;
pub(crate) use self::sharing::Sharing;
pub use self::syslog::{Syslog, header as syslog_header};
pub use self::top::Top;
pub use self::upgrade::Upgrade;

/// Share a directory of this host with a virtual machine over virtio-fs.
///
/// The server listens on a Unix socket. The VMM connects to it as the vhost-user front end and
/// shares the guest's memory. In the guest, `mount -t virtiofs TAG /mnt` mounts the directory.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ringfsd",
    version,
    args_override_self = true,
    after_help = "Replace a running server with this program: ringfsd upgrade --help\n\
        Look into a running server, or change its settings: ringfsd ctl --help\n\
        Watch what running servers do: ringfsd top --help",
    after_long_help = "To replace a running server with this program, see ringfsd upgrade --help. \
        To look into a running server, or change its settings, see ringfsd ctl --help; \
        to watch what servers do, see ringfsd top --help.\n\n\
        Example with QEMU (the guest's memory must be shared):\n  \
        ringfsd --socket /run/vm1.sock --shared-dir /srv/vm1 &\n  \
        qemu-system-x86_64 … -m 4G \\\n    \
        -object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem \\\n    \
        -chardev socket,id=fs,path=/run/vm1.sock \\\n    \
        -device vhost-user-fs-pci,chardev=fs,tag=shared\n  \
        guest# mount -t virtiofs shared /mnt"
)]
pub struct Options {
    /// How the VMM connects, and the threads that serve it.
    #[command(flatten)]
    pub connection: Connection,

    /// The directory, and what the guest may do with it.
    #[command(flatten)]
    pub sharing: Sharing,

    /// How much the guest may ask for, and how much it may store.
    #[command(flatten)]
    pub limits: Limits,

    /// What the guest may cache.
    #[command(flatten)]
    pub caching: Caching,

    /// Files that the guest maps.
    #[command(flatten)]
    pub dax: Dax,

    /// User and group ids.
    #[command(flatten)]
    pub ownership: Ownership,

    /// Extended attributes, ACLs and labels.
    #[command(flatten)]
    pub extended_attributes: ExtendedAttributes,

    /// The sandbox.
    #[command(flatten)]
    pub isolation: Isolation,

    /// Live migration.
    #[command(flatten)]
    pub migration: Migration,

    /// What survives the server's end.
    #[command(flatten)]
    pub recovery: Recovery,

    /// Logging and introspection.
    #[command(flatten)]
    pub observability: Observability,
}

/// Parses the arguments of a server, for a persona.
///
/// # Errors
///
/// They aren't such arguments, or ask for help or the version.
pub fn parse(arguments: &[OsString], persona: Persona) -> Result<Options, clap::Error> {
    let behaviour = persona.behaviour();
    if let Some(reason) = refusal(arguments, behaviour.lenient) {
        return Err(Options::command().error(ErrorKind::ArgumentConflict, reason));
    }
    let command = Options::command()
        .name(behaviour.program)
        .version(behaviour.version);
    let matches = command.try_get_matches_from(expand(arguments.iter().cloned()))?;
    let mut options = Options::from_arg_matches(&matches)?;
    if behaviour.own_precedence {
        apply_own_precedence(arguments, &mut options);
    }
    options.connection.compat = Some(persona);
    Ok(options)
}

/// The status to exit with after an error of [`parse`] with these arguments.
#[must_use]
pub fn status_of(error: &clap::Error, arguments: &[OsString], behaviour: &Behaviour) -> u8 {
    if is_late_in_virtiofsd(error, arguments) {
        behaviour.conflict_status
    } else {
        u8::try_from(error.exit_code()).unwrap_or(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of `-h` from the first option on.
    fn short_help_lines(columns: usize) -> Vec<String> {
        let mut command = Options::command().term_width(columns);
        let help = command.render_help().to_string();
        let options = help.split_once("\n\nConnection:\n").unwrap().1;
        options.lines().map(str::to_owned).collect()
    }

    #[test]
    fn options_are_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn every_option_has_heading_short_help_and_details() {
        let headings = [
            "Connection",
            "Sharing",
            "Limits",
            "Caching",
            "Ownership",
            "Extended attributes",
            "Isolation",
            "Migration",
            "Recovery",
            "Observability",
        ];
        let mut seen = Vec::new();
        let mut command = Options::command();
        command.build();
        for argument in command.get_arguments() {
            let name = argument.to_string();
            // clap's own, which it lists first.
            if ["--help", "--version"].contains(&name.as_str()) {
                continue;
            }
            let heading = argument.get_help_heading().unwrap_or_default();
            assert!(headings.contains(&heading), "{name}: heading {heading:?}");
            if seen.last() != Some(&heading) {
                seen.push(heading);
            }
            let short = argument.get_help().unwrap_or_default().to_string();
            let long = argument.get_long_help().unwrap_or_default().to_string();
            let columns = short.chars().count();
            assert!((1..=80).contains(&columns), "{name}: {columns} columns");
            assert!(
                !short.contains('\n') && !short.ends_with('.'),
                "{name}: {short}"
            );
            let details = long.strip_prefix(&short).map(str::trim);
            assert!(
                details.is_some_and(|details| !details.is_empty()),
                "{name}: {long}"
            );
        }
        assert_eq!(seen, headings);
    }

    #[test]
    fn short_help_has_one_line_for_each_option() {
        for line in short_help_lines(100) {
            let option = line.trim_start().starts_with('-');
            let heading = line.ends_with(':') && !line.starts_with(' ');
            let last = ["Replace a running", "Look into a running", "Watch what"];
            let last = last.iter().any(|start| line.starts_with(start));
            assert!(option || heading || last || line.is_empty(), "{line:?}");
            // If help doesn't fit, clap puts it below the name, for the whole heading.
            assert!(!option || line.trim().contains("  "), "{line:?}");
        }
    }
}
