//! Rewrites the older spellings of launchers into the long options that `Options` parses.
//!
//! Each item of an `-o` list is a long option without its dashes. The items become arguments of
//! their own before parsing, so each option is interpreted in one place. The invariant: what this
//! module doesn't know reaches the parser unchanged, and is an error there.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use log::LevelFilter;

use super::Options;
use super::comma_list::items;

/// What this server supports, for libvirt and other launchers that ask before they start it (QEMU's
/// `docs/interop/vhost-user.json`).
pub const CAPABILITIES: &str = r#"{
  "type": "fs",
  "features": [
    "migrate-precopy",
    "posix-acl-negotiation-mode",
    "security-label-negotiation-mode",
    "separate-options"
  ]
}"#;

/// Whether the arguments ask for [`CAPABILITIES`]; all other arguments are then ignored.
#[must_use]
pub fn asks_for_capabilities(arguments: &[OsString]) -> bool {
    arguments
        .iter()
        .skip(1)
        .take_while(|argument| *argument != "--")
        .any(|argument| argument == "--print-capabilities")
}

/// The commands, which are the first argument.
const COMMANDS: [&str; 4] = ["upgrade", "ctl", "top", "check"];

/// The command that the arguments ask for, if they aren't those of a server.
#[must_use]
pub fn asks_for_command(arguments: &[OsString]) -> Option<&'static str> {
    let first = arguments.get(1)?;
    COMMANDS.into_iter().find(|command| first == command)
}

/// Returns the arguments with each `-o LIST` replaced by the options that it names, after all other
/// options, so that the lists win.
#[must_use]
pub(super) fn expand(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut expanded = Vec::new();
    let mut lists = Vec::new();
    let mut operands = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            operands.push(argument);
            operands.extend(arguments);
            break;
        }
        let Some((flags, attached)) = short_list(&argument) else {
            expanded.push(argument);
            continue;
        };
        if !flags.is_empty() {
            let flags = [b"-", flags].concat();
            expanded.push(OsString::from_vec(flags));
        }
        match attached {
            b"" => match arguments.next() {
                Some(list) => lists.push(list),
                // Left to the parser.
                None => expanded.push("-o".into()),
            },
            list => lists.push(OsStr::from_bytes(list).to_owned()),
        }
    }
    for item in lists.iter().flat_map(|list| items(list)) {
        match option_of(&item) {
            Item::Option(option) => expanded.push(option),
            Item::Without(option) => expanded.retain(|other| *other != *option),
            Item::Nothing => {}
        }
    }
    expanded.extend(operands);
    expanded
}

/// The flags before the `-o` of an argument, as in `-dfo`, and the list that is attached to it.
fn short_list(argument: &OsStr) -> Option<(&[u8], &[u8])> {
    let letters = argument.as_bytes().strip_prefix(b"-")?;
    let at = letters.iter().position(|letter| !b"df".contains(letter))?;
    let (flags, rest) = letters.split_at(at);
    let list = rest.strip_prefix(b"o")?;
    Some((flags, list.strip_prefix(b"=").unwrap_or(list)))
}

/// Options of `crosvm device fs` that this program doesn't have, and what to use instead.
const CROSVM_OPTIONS: &[(&str, &str)] = &[
    (
        "--cfg",
        "give each setting as an option (cache=P is --cache P, timeout=N is --attr-timeout N \
         --entry-timeout N, writeback is --writeback, posix_acl is --posix-acl)",
    ),
    (
        "--uid",
        "with --uid-map the server chooses its id in the namespace; omit --uid",
    ),
    (
        "--gid",
        "with --gid-map the server chooses its id in the namespace; omit --gid",
    ),
    (
        "--skip-pivot-root",
        "--sandbox namespace always changes the root directory; use --sandbox none to keep the \
         host's",
    ),
];

/// Returns why these arguments are refused before they are parsed: they have an option of crosvm, or
/// name two directories to share, unless the behaviour is `lenient` about that.
#[must_use]
pub(super) fn refusal(arguments: &[OsString], lenient: bool) -> Option<String> {
    let own = arguments.iter().skip(1);
    let own: Vec<_> = own.take_while(|argument| *argument != "--").collect();
    for argument in &own {
        let name = argument.as_bytes().split(|byte| *byte == b'=').next();
        let unsupported = CROSVM_OPTIONS
            .iter()
            .find(|(option, _)| name == Some(option.as_bytes()));
        if let Some((name, advice)) = unsupported {
            return Some(format!("crosvm's option {name} is not supported: {advice}"));
        }
    }
    if lenient {
        return None;
    }
    let mut sources = Vec::new();
    let mut directories = Vec::new();
    let mut own = own.into_iter();
    while let Some(argument) = own.next() {
        let bytes = argument.as_bytes();
        if let Some((_, list)) = short_list(argument) {
            let list = if list.is_empty() {
                own.next().map(|list| list.as_bytes())
            } else {
                Some(list)
            };
            let items = items(OsStr::from_bytes(list.unwrap_or_default()));
            sources.extend(items.filter_map(|item| {
                let path = item.strip_prefix(b"source=")?;
                Some(OsString::from_vec(path.to_vec()))
            }));
        } else if bytes == b"--shared-dir" {
            directories.extend(own.next().cloned());
        } else if let Some(path) = bytes.strip_prefix(b"--shared-dir=") {
            directories.push(OsStr::from_bytes(path).to_owned());
        }
    }
    // The last value of each option is the one that the parser uses.
    let (source, directory) = (sources.pop()?, directories.pop()?);
    (Path::new(&source) != Path::new(&directory)).then(|| {
        format!(
            "-o source={} and --shared-dir {} name two directories, but a server shares one: omit \
             one of them, or run a server for each",
            source.display(),
            directory.display()
        )
    })
}

/// Settles which of two options wins as virtiofsd does, whatever their order.
pub(super) fn apply_own_precedence(arguments: &[OsString], options: &mut Options) {
    let own = arguments.iter().skip(1);
    let mut own = own.take_while(|argument| *argument != "--");
    let mut announces = true;
    while let Some(argument) = own.next() {
        match argument.as_bytes() {
            b"--socket-path" => options.connection.socket = own.next().map(Into::into),
            b"--announce-submounts" => announces = true,
            b"--no-announce-submounts" => announces = false,
            bytes => {
                if let Some(path) = bytes.strip_prefix(b"--socket-path=") {
                    options.connection.socket = Some(OsStr::from_bytes(path).into());
                }
            }
        }
    }
    options.sharing.no_announce_submounts |= !announces;
    if options.observability.debug {
        options.observability.log_level = LevelFilter::Debug.into();
    }
}

/// Whether an error of the parser is one that virtiofsd finds after parsing: an empty path or map, a
/// wrong list of capabilities, or `-o` without a directory.
#[must_use]
pub(super) fn is_late_in_virtiofsd(error: &clap::Error, arguments: &[OsString]) -> bool {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        Some(ContextValue::Strings(texts)) if texts.len() == 1 => texts[0].as_str(),
        _ => "",
    };
    let argument = text(ContextKind::InvalidArg);
    let is_of = |options: &[&str]| {
        let name = argument.split([' ', '=']).next();
        options.iter().any(|option| name == Some(*option))
    };
    let own = arguments.iter().skip(1);
    let own = own.take_while(|argument| *argument != "--");
    match error.kind() {
        ErrorKind::MissingRequiredArgument => {
            is_of(&["--shared-dir"]) && own.clone().any(|other| short_list(other).is_some())
        }
        _ if is_of(&["--modcaps"]) => true,
        _ if is_of(&["--shared-dir", "--socket"]) => own.clone().any(|other| {
            ["", "--shared-dir=", "--socket=", "--socket-path="]
                .iter()
                .any(|empty| other == empty)
        }),
        _ if is_of(&["--uid-map", "--gid-map"]) => {
            // `:INSIDE:OUTSIDE:0:`
            let value = text(ContextKind::InvalidValue);
            let count = value.split(value.chars().next().unwrap_or(':')).nth(3);
            count.is_some_and(|count| count.parse() == Ok(0_u32))
        }
        _ => false,
    }
}

/// What an item of `-o` asks for.
enum Item {
    /// This option.
    Option(OsString),
    /// That this option is not given.
    Without(&'static str),
    /// What is done in any case.
    Nothing,
}

fn option_of(item: &[u8]) -> Item {
    let (name, value) = match item.iter().position(|byte| *byte == b'=') {
        Some(at) => item.split_at(at),
        None => (item, &b""[..]),
    };
    let dashed: Vec<u8> = name
        .iter()
        .map(|byte| if *byte == b'_' { b'-' } else { *byte })
        .collect();
    let (name, value): (&[u8], &[u8]) = match (&dashed[..], value) {
        (b"source", path) => (b"shared-dir", path),
        (b"loglevel", level) => (b"log-level", level),
        (b"ro", b"") => (b"readonly", b""),
        (b"posix-lock", b"") => (b"posix-locks", b""),
        (b"no-posix-acl", b"") => (b"posix-acl", b"=never"),
        (b"no-security-label", b"") => (b"security-label", b"=never"),
        (b"readdirplus", b"") => return Item::Without("--no-readdirplus"),
        (b"no-writeback", b"") => return Item::Without("--writeback"),
        (b"no-allow-direct-io", b"") => return Item::Without("--allow-direct-io"),
        // Has no effect in virtiofsd either.
        (b"no-posix-lock" | b"no-flock", b"") => return Item::Nothing,
        (name, value) => (name, value),
    };
    Item::Option(OsString::from_vec([b"--", name, value].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(arguments: &[&str]) -> Vec<String> {
        expand(arguments.iter().map(OsString::from))
            .into_iter()
            .map(|argument| argument.into_string().unwrap())
            .collect()
    }

    #[test]
    fn list_becomes_long_options() {
        assert_eq!(
            expanded(&["p", "-o", "source=/a=b,cache=auto,no_xattr,ro", "-d"]),
            [
                "p",
                "-d",
                "--shared-dir=/a=b",
                "--cache=auto",
                "--no-xattr",
                "--readonly"
            ]
        );
        for attached in ["-oannounce_submounts", "-o=announce_submounts"] {
            assert_eq!(expanded(&["p", attached]), ["p", "--announce-submounts"]);
        }
        assert_eq!(
            expanded(&["p", "-dfo", "loglevel=err", "-fd"]),
            ["p", "-df", "-fd", "--log-level=err"]
        );
        assert_eq!(expanded(&["p", "-o", "no_flock,once,"]), ["p", "--once"]);
        assert_eq!(
            expanded(&["p", "-o", "posix_lock,flock"]),
            ["p", "--posix-locks", "--flock"]
        );
        assert_eq!(
            expanded(&["p", "-o", "unheard_of=1"]),
            ["p", "--unheard-of=1"]
        );
    }

    #[test]
    fn negation_in_a_list_undoes_an_option_outside() {
        assert_eq!(
            expanded(&[
                "p",
                "--writeback",
                "-o",
                "allow_direct_io,no_writeback,no_allow_direct_io,readdirplus",
                "--no-readdirplus",
                "--",
                "--writeback"
            ]),
            ["p", "--", "--writeback"]
        );
        assert_eq!(
            expanded(&["p", "-o", "no_posix_acl,no_security_label", "--posix-acl"]),
            [
                "p",
                "--posix-acl",
                "--posix-acl=never",
                "--security-label=never"
            ]
        );
    }

    #[test]
    fn doubled_comma_is_one_comma_of_the_path() {
        let expand_list = |list: &str| expanded(&["p", "-o", list]);
        assert_eq!(expand_list("source=/a,,b"), ["p", "--shared-dir=/a,b"]);
        assert_eq!(
            expand_list("source=/a,,,ro"),
            ["p", "--shared-dir=/a,", "--readonly"]
        );
        assert_eq!(expand_list("source=/,,,,a"), ["p", "--shared-dir=/,,a"]);
    }

    #[test]
    fn refusal_names_two_directories_and_options_of_crosvm() {
        let refused = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
            refusal(&arguments, false)
        };
        let two = refused(&["p", "-o", "source=/a", "--shared-dir", "/b"]).unwrap();
        assert!(
            two.contains("source=/a") && two.contains("--shared-dir /b"),
            "{two}"
        );
        assert!(refused(&["p", "--shared-dir=/b", "-oro,source=/a"]).is_some());
        assert!(refused(&["p", "--shared-dir=/b", "-do", "source=/a"]).is_some());
        for same in [
            &["p", "-o", "source=/a", "--shared-dir", "/a/"][..],
            &["p", "-o", "source=/a,,b", "--shared-dir=/a,b"],
            &["p", "-o", "ro", "--shared-dir", "/b"],
            &["p", "--shared-dir", "/a", "--shared-dir", "/b"],
            &["p", "--", "--cfg"],
        ] {
            assert_eq!(refused(same), None, "{same:?}");
        }
        let cfg = refused(&["p", "--cfg=cache=auto", "--tag", "t"]).unwrap();
        assert!(cfg.contains("--cfg") && cfg.contains("--cache"), "{cfg}");
        assert!(refused(&["p", "--uid", "0"]).is_some());
        assert!(refused(&["p", "--uid-map", ":0:1:1:"]).is_none());
    }

    #[test]
    fn arguments_without_list_are_unchanged() {
        for same in [
            &["p", "--once", "-f"][..],
            &["p", "-o"],
            &["p", "--", "-o", "ro"],
        ] {
            assert_eq!(expanded(same), same);
        }
    }

    #[test]
    fn capabilities_are_asked_for_by_their_option_only() {
        let asks = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
            asks_for_capabilities(&arguments)
        };
        assert!(asks(&["p", "--print-capabilities"]));
        assert!(asks(&["p", "--fd=3", "--print-capabilities"]));
        assert!(!asks(&["--print-capabilities"]));
        assert!(!asks(&["p", "--", "--print-capabilities"]));
        let upgrade = ["p", "upgrade", "--pid=1"].map(OsString::from);
        assert_eq!(asks_for_command(&upgrade), Some("upgrade"));
        assert_eq!(asks_for_command(&upgrade[1..]), None);
        let server = ["p", "--socket", "ctl"].map(OsString::from);
        assert_eq!(asks_for_command(&server), None);
    }
}
