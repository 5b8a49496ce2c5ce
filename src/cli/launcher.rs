//! What launchers say in older spellings, brought into the one that `Options` has.
//!
//! `-o` takes a list in which each item is a long option without its dashes. Its words become
//! arguments of their own before they are parsed, so that there is one place where an option
//! is understood. The invariant: what is not known here reaches the parser as it was typed, and
//! is an error there.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// What this server is, for libvirt and others who ask before they start it (QEMU's
/// `docs/interop/vhost-user.json`).
pub const CAPABILITIES: &str =
    "{\n  \"type\": \"fs\",\n  \"features\": [\n    \"migrate-precopy\"\n  ]\n}";

/// Whether somebody asks for [`CAPABILITIES`]; then nothing else counts.
#[must_use]
pub fn asks_for_capabilities(arguments: &[OsString]) -> bool {
    arguments
        .iter()
        .skip(1)
        .take_while(|argument| *argument != "--")
        .any(|argument| argument == "--print-capabilities")
}

/// Whether a running server is to be replaced: by the first word, which no option is.
#[must_use]
pub fn asks_for_upgrade(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|first| first == "upgrade")
}

/// The arguments with every `-o LIST` replaced by the options that it names.
#[must_use]
pub fn expand(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut expanded = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            expanded.push(argument);
            expanded.extend(arguments);
            break;
        }
        let attached = argument.as_bytes().strip_prefix(b"-o");
        let list = match attached {
            Some(b"") => arguments.next(),
            Some(list) => Some(OsStr::from_bytes(list).to_owned()),
            None => None,
        };
        match list {
            Some(list) => expanded.extend(items(&list).filter_map(long)),
            // An `-o` without a list is left to the parser, and so is everything else.
            None => expanded.push(argument),
        }
    }
    expanded
}

/// The items of a list, between its commas.
fn items(list: &OsStr) -> impl Iterator<Item = &[u8]> {
    let items = list.as_bytes().split(|byte| *byte == b',');
    items.filter(|item| !item.is_empty())
}

/// The long option that an item of `-o` names; `None` for what needs none.
fn long(item: &[u8]) -> Option<OsString> {
    let (name, value) = match item.iter().position(|byte| *byte == b'=') {
        Some(at) => item.split_at(at),
        None => (item, &b""[..]),
    };
    let dashed: Vec<u8> = name
        .iter()
        .map(|byte| if *byte == b'_' { b'-' } else { *byte })
        .collect();
    let name: &[u8] = match &dashed[..] {
        b"source" => b"shared-dir",
        b"ro" => b"readonly",
        b"posix-lock" => b"posix-locks",
        // What is so unless said otherwise.
        b"readdirplus"
        | b"no-writeback"
        | b"no-allow-direct-io"
        | b"no-killpriv-v2"
        | b"no-posix-acl"
        | b"no-posix-lock"
        | b"no-flock"
        | b"no-security-label" => return None,
        name => name,
    };
    Some(OsString::from_vec([b"--", name, value].concat()))
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
    fn a_list_becomes_long_options() {
        assert_eq!(
            expanded(&["p", "-o", "source=/a=b,cache=auto,no_xattr,ro", "-d"]),
            [
                "p",
                "--shared-dir=/a=b",
                "--cache=auto",
                "--no-xattr",
                "--readonly",
                "-d"
            ]
        );
        assert_eq!(
            expanded(&["p", "-oannounce_submounts"]),
            ["p", "--announce-submounts"]
        );
        assert_eq!(expanded(&["p", "-o", "no_flock,,once"]), ["p", "--once"]);
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
    fn what_is_no_list_stays() {
        for same in [
            &["p", "--once", "-f"][..],
            &["p", "-o"],
            &["p", "--", "-o", "ro"],
        ] {
            assert_eq!(expanded(same), same);
        }
    }

    #[test]
    fn capabilities_are_asked_for_by_their_option_alone() {
        let asks = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
            asks_for_capabilities(&arguments)
        };
        assert!(asks(&["p", "--print-capabilities"]));
        assert!(asks(&["p", "--fd=3", "--print-capabilities"]));
        assert!(!asks(&["--print-capabilities"]));
        assert!(!asks(&["p", "--", "--print-capabilities"]));
        let upgrade = ["p", "upgrade", "--pid=1"].map(OsString::from);
        assert!(asks_for_upgrade(&upgrade));
        assert!(!asks_for_upgrade(&upgrade[1..]));
    }
}
