//! Rules that map the names of extended attributes between guest and host.
//!
//! The syntax is that of virtiofsd: `:type:scope:key:prepend:`. The first matching rule decides.
//! The invariant: a name that no rule lets through reaches neither the host nor the guest.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::str::FromStr;

use rustix::io::Errno;

use crate::fs::Result;

/// The longest name of an attribute, in bytes (`XATTR_NAME_MAX`).
const NAME_MAX: usize = 255;

/// Why the rules are invalid, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {rule}, at character {at} (`{here}`): {fault}")]
pub struct XattrMapError {
    /// Counted from 1.
    rule: usize,
    /// Counted from 1, in the whole text.
    at: usize,
    /// The text from that position, possibly shortened.
    here: String,
    fault: RuleFault,
}

/// Why a rule is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum RuleFault {
    #[error("there is no rule")]
    Empty,
    #[error("a rule starts with its separator, which can't be a letter, digit or `\\`")]
    Separator,
    #[error("the {0} has no end: no separator follows it")]
    Endless(&'static str),
    #[error("unknown type; expected prefix, ok, bad, unsupported or map")]
    Type,
    #[error("unknown scope; expected client, server or all")]
    Scope,
    #[error("prefix needs something to prepend")]
    NothingToPrepend,
    #[error("nothing may follow a map, which decides on every name")]
    BehindMap,
    #[error("it contains a NUL")]
    Nul,
}

/// What a rule does with a matching name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Add the prefix to the guest's name, and strip it from the host's.
    Prefix,
    /// Leave it unchanged.
    Ok,
    /// Fail with `EPERM` for the guest's names, hide the host's.
    Bad,
    /// Fail with `EOPNOTSUPP` for the guest's names, hide the host's.
    Unsupported,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    act: Act,
    /// Whether it matches names from the guest.
    client: bool,
    /// Whether it matches names from the host.
    server: bool,
    /// The prefix of the guest's names that match.
    key: String,
    /// The prefix of the host's names that match.
    prepend: String,
}

/// Rules for the names of extended attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XattrMap {
    rules: Vec<Rule>,
}

impl XattrMap {
    /// Maps the guest's `name` to the host's.
    ///
    /// # Errors
    ///
    /// `EPERM` or `EOPNOTSUPP` if a rule says so, `EPERM` if no rule matches, and `ERANGE` if the
    /// host's name would be too long.
    pub(super) fn to_host<'a>(&self, name: &'a CStr) -> Result<Cow<'a, CStr>> {
        let matches =
            |rule: &&Rule| rule.client && name.to_bytes().starts_with(rule.key.as_bytes());
        let rule = self.rules.iter().find(matches).ok_or(Errno::PERM)?;
        match rule.act {
            Act::Ok => Ok(Cow::Borrowed(name)),
            Act::Bad => Err(Errno::PERM),
            Act::Unsupported => Err(Errno::OPNOTSUPP),
            Act::Prefix => {
                let bytes = [rule.prepend.as_bytes(), name.to_bytes()].concat();
                if bytes.len() > NAME_MAX {
                    return Err(Errno::RANGE);
                }
                let name = CString::new(bytes).or(Err(Errno::INVAL))?;
                Ok(Cow::Owned(name))
            }
        }
    }

    /// Maps the host's `name` to the guest's. Returns `None` if it is hidden.
    pub(super) fn to_guest<'a>(&self, name: &'a [u8]) -> Option<&'a [u8]> {
        let (rule, rest) = self.rules.iter().find_map(|rule| {
            let rest = name.strip_prefix(rule.prepend.as_bytes())?;
            rule.server.then_some((rule, rest))
        })?;
        match rule.act {
            Act::Ok => Some(name),
            Act::Bad | Act::Unsupported => None,
            Act::Prefix => (!rest.is_empty()).then_some(rest),
        }
    }

    /// Maps the host's list of NUL-terminated names to the guest's.
    pub(super) fn list_for_guest(&self, names: &[u8]) -> Vec<u8> {
        let mut list = Vec::with_capacity(names.len());
        for name in names.split(|byte| *byte == 0) {
            if let Some(name) = self.to_guest(name).filter(|name| !name.is_empty()) {
                list.extend_from_slice(name);
                list.push(0);
            }
        }
        list
    }
}

impl FromStr for XattrMap {
    type Err = XattrMapError;

    fn from_str(text: &str) -> std::result::Result<Self, XattrMapError> {
        let mut parser = Parser {
            text,
            rest: text,
            rule: 0,
        };
        let mut rules = Vec::new();
        let mut closed = false;
        while parser.next_rule() {
            if closed {
                return Err(parser.error(parser.rest, RuleFault::BehindMap));
            }
            closed = parser.rule(&mut rules)?;
        }
        if rules.is_empty() {
            parser.rule = 1;
            return Err(parser.error(text, RuleFault::Empty));
        }
        Ok(Self { rules })
    }
}

/// The state of the parser.
struct Parser<'a> {
    text: &'a str,
    rest: &'a str,
    rule: usize,
}

impl<'a> Parser<'a> {
    /// Advances to the next rule. Returns `false` at the end.
    fn next_rule(&mut self) -> bool {
        self.rest = self.rest.trim_start();
        self.rule += 1;
        !self.rest.is_empty()
    }

    /// Parses a rule; a map yields several. Returns whether it was a map.
    fn rule(&mut self, rules: &mut Vec<Rule>) -> std::result::Result<bool, XattrMapError> {
        let start = self.rest;
        let separator = match start.chars().next() {
            Some(separator) if !separator.is_alphanumeric() && separator != '\\' => separator,
            _ => return Err(self.error(start, RuleFault::Separator)),
        };
        self.rest = start.get(separator.len_utf8()..).unwrap_or_default();
        let kind_at = self.rest;
        let act = match self.field(separator, "type")? {
            "prefix" => Act::Prefix,
            "ok" => Act::Ok,
            "bad" => Act::Bad,
            "unsupported" => Act::Unsupported,
            "map" => {
                let key = self.field(separator, "key")?;
                let prepend_at = self.rest;
                let prepend = self.field(separator, "prepend")?;
                if prepend.is_empty() {
                    return Err(self.error(prepend_at, RuleFault::NothingToPrepend));
                }
                map(key, prepend, rules);
                return Ok(true);
            }
            _ => return Err(self.error(kind_at, RuleFault::Type)),
        };
        let scope_at = self.rest;
        let (client, server) = match self.field(separator, "scope")? {
            "client" => (true, false),
            "server" => (false, true),
            "all" => (true, true),
            _ => return Err(self.error(scope_at, RuleFault::Scope)),
        };
        let key = self.field(separator, "key")?.to_owned();
        let prepend_at = self.rest;
        let prepend = self.field(separator, "prepend")?.to_owned();
        if act == Act::Prefix && prepend.is_empty() {
            return Err(self.error(prepend_at, RuleFault::NothingToPrepend));
        }
        rules.push(Rule {
            act,
            client,
            server,
            key,
            prepend,
        });
        Ok(false)
    }

    /// Parses up to the next separator.
    fn field(
        &mut self,
        separator: char,
        what: &'static str,
    ) -> std::result::Result<&'a str, XattrMapError> {
        let Some((field, rest)) = self.rest.split_once(separator) else {
            return Err(self.error(self.rest, RuleFault::Endless(what)));
        };
        if field.contains('\0') {
            return Err(self.error(self.rest, RuleFault::Nul));
        }
        self.rest = rest;
        Ok(field)
    }

    /// An error at `here`, which is a suffix of the text.
    fn error(&self, here: &str, fault: RuleFault) -> XattrMapError {
        let before = self.text.len() - here.len();
        let before = self.text.get(..before).unwrap_or_default();
        XattrMapError {
            rule: self.rule,
            at: before.chars().count() + 1,
            here: here.chars().take(24).collect(),
            fault,
        }
    }
}

/// The rules that a map stands for: names with the prefix `key` get `prepend` on the host, host
/// names that would look like those are hidden, and all others stay.
fn map(key: &str, prepend: &str, rules: &mut Vec<Rule>) {
    let rule = |act, client, server, key: &str, prepend: &str| Rule {
        act,
        client,
        server,
        key: key.to_owned(),
        prepend: prepend.to_owned(),
    };
    rules.push(rule(Act::Prefix, true, true, key, prepend));
    if key.is_empty() {
        rules.push(rule(Act::Bad, true, true, "", ""));
    } else {
        rules.push(rule(Act::Bad, false, true, "", key));
        rules.push(rule(Act::Bad, true, false, prepend, ""));
        rules.push(rule(Act::Ok, true, true, "", ""));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> XattrMap {
        text.parse().unwrap()
    }

    fn to_host(map: &XattrMap, name: &CStr) -> Result<String> {
        let name = map.to_host(name)?;
        Ok(name.to_str().unwrap().to_owned())
    }

    fn to_guest<'a>(map: &XattrMap, name: &'a str) -> Option<&'a str> {
        map.to_guest(name.as_bytes())
            .map(|name| std::str::from_utf8(name).unwrap())
    }

    #[test]
    fn prefix_rule_adds_and_strips_prefix() {
        let map = parse(":prefix:all::user.guest.::bad:all:::");
        assert_eq!(to_host(&map, c"trusted.x").unwrap(), "user.guest.trusted.x");
        assert_eq!(to_guest(&map, "user.guest.trusted.x"), Some("trusted.x"));
        assert_eq!(to_guest(&map, "user.other"), None);
        assert_eq!(to_guest(&map, "user.guest."), None);
    }

    #[test]
    fn first_matching_rule_decides() {
        let map = parse(
            "/ok/client/user.keep//  /unsupported/client/user.un//\n/bad/client/user.//\n \
             /ok/server//user.k/ /bad/server//user./ /ok/all///",
        );
        assert_eq!(to_host(&map, c"user.keep").unwrap(), "user.keep");
        assert_eq!(to_host(&map, c"user.un1"), Err(Errno::OPNOTSUPP));
        assert_eq!(to_host(&map, c"user.x"), Err(Errno::PERM));
        assert_eq!(to_host(&map, c"trusted.x").unwrap(), "trusted.x");
        assert_eq!(to_guest(&map, "user.keep"), Some("user.keep"));
        assert_eq!(to_guest(&map, "user.x"), None);
        assert_eq!(to_guest(&map, "trusted.x"), Some("trusted.x"));
    }

    #[test]
    fn name_without_matching_rule_is_hidden_and_refused() {
        let map = parse(":ok:client:user.::");
        assert_eq!(to_host(&map, c"trusted.x"), Err(Errno::PERM));
        assert_eq!(to_guest(&map, "user.x"), None);
    }

    #[test]
    fn map_rule_expands_to_its_rules() {
        for (map, rules) in [
            (
                ":map::user.virtiofs.:",
                ":prefix:all::user.virtiofs.::bad:all:::",
            ),
            (
                "!map!trusted.!user.virtiofs.!",
                "/prefix/all/trusted./user.virtiofs./ /bad/server//trusted./ \
                 /bad/client/user.virtiofs.// /ok/all///",
            ),
        ] {
            assert_eq!(parse(map), parse(rules), "{map}");
        }
        let map = parse(":map:trusted.:user.v.:");
        assert_eq!(to_host(&map, c"trusted.x").unwrap(), "user.v.trusted.x");
        assert_eq!(to_host(&map, c"user.x").unwrap(), "user.x");
        assert_eq!(to_host(&map, c"user.v.trusted.x"), Err(Errno::PERM));
        assert_eq!(to_guest(&map, "user.v.trusted.x"), Some("trusted.x"));
        assert_eq!(to_guest(&map, "trusted.x"), None);
    }

    #[test]
    fn list_for_guest_keeps_format() {
        let map = parse(":map:trusted.:user.v.:");
        assert_eq!(
            map.list_for_guest(b"user.a\0trusted.b\0user.v.trusted.c\0"),
            b"user.a\0trusted.c\0"
        );
        assert_eq!(map.list_for_guest(b""), b"");
    }

    #[test]
    fn name_too_long_after_mapping_is_refused() {
        let map = parse(":map::user.virtiofs.:");
        let long = CString::new([b'a'; 250]).unwrap();
        assert_eq!(map.to_host(&long), Err(Errno::RANGE));
    }

    #[test]
    fn parse_errors_name_rule_and_position() {
        for (text, message) in [
            ("", "rule 1, at character 1 (``): there is no rule"),
            (
                ":ok:all::: :nope:all:::",
                "rule 2, at character 13 (`nope:all:::`): unknown type; expected prefix, ok, \
                 bad, unsupported or map",
            ),
            (
                ":ok:both:::",
                "rule 1, at character 5 (`both:::`): unknown scope; expected client, server \
                 or all",
            ),
            (
                ":ok:all::",
                "rule 1, at character 10 (``): the prepend has no end: no separator follows \
                 it",
            ),
            (
                ":prefix:all:user.::",
                "rule 1, at character 19 (`:`): prefix needs something to prepend",
            ),
            (
                "ok:all:::",
                "rule 1, at character 1 (`ok:all:::`): a rule starts with its separator, which \
                 can't be a letter, digit or `\\`",
            ),
            (
                ":map::user.v.::ok:all:::",
                "rule 2, at character 15 (`:ok:all:::`): nothing may follow a map, which decides \
                 on every name",
            ),
        ] {
            let error = XattrMap::from_str(text).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }
}
