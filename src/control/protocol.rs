//! The messages of the control socket: one JSON object a line, in either direction.
//!
//! The invariant: what a [`Call`] has was checked against the table of commands, so a handler sees no
//! unknown command, and no argument that the command doesn't have.

use std::os::fd::OwnedFd;

use serde_json::{Map, Value, json};

use crate::limits::LIMITED;

/// The version of the protocol. A server answers requests of this version and refuses all others.
pub const VERSION: u64 = 1;

/// A command, as the documentation shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// The name.
    pub name: &'static str,
    /// The names of its arguments.
    pub arguments: &'static [&'static str],
    /// What it does.
    pub purpose: &'static str,
}

/// All commands.
pub const COMMANDS: &[Command] = &[
    Command {
        name: "status",
        arguments: &[],
        purpose: "What the server serves, how, and whether a VMM is connected",
    },
    Command {
        name: "statistics",
        arguments: &["durations"],
        purpose: "The counters of requests, and what is in use",
    },
    Command {
        name: "watch-files",
        arguments: &["limit"],
        purpose: "The files with the most requests",
    },
    Command {
        name: "set-log-level",
        arguments: &["level", "room"],
        purpose: "Sets the log level of the server, or of one of its rooms",
    },
    Command {
        name: "set-limits",
        arguments: &LIMITED,
        purpose: "Sets how much the guest may ask for in a second",
    },
    Command {
        name: "inodes",
        arguments: &["after", "limit"],
        purpose: "The inodes that the guest knows",
    },
    Command {
        name: "handles",
        arguments: &["after", "limit"],
        purpose: "The files and directories that the guest has open",
    },
    Command {
        name: "drop-caches",
        arguments: &[],
        purpose: "Closes what is open only because it may be needed again",
    },
    Command {
        name: "mount",
        arguments: &["point", "source", "readonly"],
        purpose: "Mounts the directory whose descriptor comes with the request",
    },
    Command {
        name: "unmount",
        arguments: &["point"],
        purpose: "Unmounts a file system",
    },
    Command {
        name: "upgrade",
        arguments: &[],
        purpose: "Says which process to ask for an upgrade",
    },
    Command {
        name: "dump",
        arguments: &[],
        purpose: "The state of threads, queues and requests in flight",
    },
];

/// The kind of a failure, which programs can rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The line is no request.
    Malformed,
    /// The request has a version that this server doesn't speak.
    UnsupportedVersion,
    /// There is no such command.
    UnknownCommand,
    /// An argument is missing, unknown or wrong.
    InvalidArgument,
    /// This server can't do that, because of what it serves or how it was started.
    NotPossible,
    /// It was tried, and has failed.
    Failed,
    /// The client may not use the socket.
    Denied,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Malformed,
        Self::UnsupportedVersion,
        Self::UnknownCommand,
        Self::InvalidArgument,
        Self::NotPossible,
        Self::Failed,
        Self::Denied,
    ];

    /// The text that stands for it in a reply.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::UnsupportedVersion => "unsupported-version",
            Self::UnknownCommand => "unknown-command",
            Self::InvalidArgument => "invalid-argument",
            Self::NotPossible => "not-possible",
            Self::Failed => "failed",
            Self::Denied => "denied",
        }
    }
}

/// Why a command wasn't carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// The kind.
    pub(crate) code: Code,
    /// What has failed.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
        }
    }

    /// The same, with what to do about it.
    #[must_use]
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// An argument that is missing or wrong.
    pub(crate) fn argument(name: &str, expected: &str) -> Self {
        Self::new(
            Code::InvalidArgument,
            format!("the argument {name} must be {expected}"),
        )
    }

    pub(crate) fn to_json(&self) -> Value {
        match &self.hint {
            Some(hint) => json!({
                "code": self.code.text(), "message": self.message, "hint": hint
            }),
            None => json!({ "code": self.code.text(), "message": self.message }),
        }
    }

    /// What the `error` of a reply says.
    pub(super) fn from_json(value: &Value) -> Self {
        let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        let code = text("code").unwrap_or_default();
        let code = Code::ALL.into_iter().find(|known| known.text() == code);
        Self {
            // A newer server may have others.
            code: code.unwrap_or(Code::Failed),
            message: text("message").unwrap_or_else(|| "the server gives no reason".to_owned()),
            hint: text("hint"),
        }
    }
}

/// A command that a client asks for.
#[derive(Debug)]
pub(crate) struct Call {
    /// One of [`COMMANDS`].
    pub(crate) command: &'static str,
    arguments: Map<String, Value>,
    /// The descriptor that came with the request.
    pub(crate) descriptor: Option<OwnedFd>,
}

impl Call {
    /// An argument that is a text, if it is given.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub(crate) fn optional_text(&self, name: &str) -> Result<Option<&str>, Failure> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(Failure::argument(name, "a text")),
        }
    }

    /// An argument that is a text.
    ///
    /// # Errors
    ///
    /// It isn't given, or is something else.
    pub(crate) fn text(&self, name: &str) -> Result<&str, Failure> {
        self.optional_text(name)?
            .ok_or_else(|| Failure::argument(name, "given"))
    }

    /// An argument that is a number, or what it is if it isn't given.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub(crate) fn number(&self, name: &str, otherwise: u64) -> Result<u64, Failure> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(otherwise),
            Some(value) => value
                .as_u64()
                .ok_or_else(|| Failure::argument(name, "a whole number")),
        }
    }

    /// Whether an argument is given as true.
    ///
    /// # Errors
    ///
    /// It is neither true nor false.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, Failure> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| Failure::argument(name, "true or false")),
        }
    }
}

/// A request, as far as it can be understood.
#[derive(Debug)]
pub(super) struct Request {
    /// What the client has numbered it with, to be repeated in the reply.
    pub(super) id: Option<Value>,
    pub(super) call: Result<Call, Failure>,
}

impl Request {
    /// Reads a line.
    pub(super) fn parse(line: &[u8], descriptor: Option<OwnedFd>) -> Self {
        let malformed = |reason: String| Self {
            id: None,
            call: Err(Failure::new(Code::Malformed, reason)
                .hint("a request is one line, such as {\"version\":1,\"command\":\"status\"}")),
        };
        let mut object = match serde_json::from_slice(line) {
            Ok(Value::Object(object)) => object,
            Ok(_) => return malformed("the request is no JSON object".to_owned()),
            Err(error) => return malformed(format!("the request is no JSON: {error}")),
        };
        let id = object.remove("id");
        let call = call(object, descriptor);
        Self { id, call }
    }
}

fn call(mut object: Map<String, Value>, descriptor: Option<OwnedFd>) -> Result<Call, Failure> {
    let version = object.remove("version");
    if version.as_ref().and_then(Value::as_u64) != Some(VERSION) {
        let asked = version.map_or_else(|| "none".to_owned(), |version| version.to_string());
        return Err(Failure::new(
            Code::UnsupportedVersion,
            format!("the request has version {asked}, and this server speaks version {VERSION}"),
        ));
    }
    let Some(Value::String(name)) = object.remove("command") else {
        return Err(Failure::new(Code::Malformed, "the request has no command"));
    };
    let arguments = match object.remove("arguments") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(Failure::argument("arguments", "an object")),
    };
    if let Some(other) = object.keys().next() {
        return Err(Failure::new(
            Code::Malformed,
            format!("a request has no {other:?}"),
        ));
    }
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        let names: Vec<_> = COMMANDS.iter().map(|command| command.name).collect();
        return Err(Failure::new(
            Code::UnknownCommand,
            format!("there is no command {name:?}"),
        )
        .hint(format!("the commands are {}", names.join(", "))));
    };
    let unknown = arguments
        .keys()
        .find(|name| !command.arguments.contains(&name.as_str()));
    if let Some(unknown) = unknown {
        let name = command.name;
        let failure = Failure::new(
            Code::InvalidArgument,
            format!("{name} has no argument {unknown:?}"),
        );
        return Err(match command.arguments {
            [] => failure.hint(format!("{name} has no arguments")),
            known => failure.hint(format!("its arguments are {}", known.join(", "))),
        });
    }
    Ok(Call {
        command: command.name,
        arguments,
        descriptor,
    })
}

/// The line that answers a request.
pub(super) fn reply(id: Option<Value>, outcome: Result<Value, Failure>) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("version".to_owned(), VERSION.into());
    if let Some(id) = id {
        object.insert("id".to_owned(), id);
    }
    match outcome {
        Ok(result) => object.insert("result".to_owned(), result),
        Err(failure) => object.insert("error".to_owned(), failure.to_json()),
    };
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

/// The line that asks for a command.
pub(super) fn request(command: &str, arguments: &Map<String, Value>) -> Vec<u8> {
    let request = json!({ "version": VERSION, "command": command, "arguments": arguments });
    let mut line = request.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(line: &str) -> Result<&'static str, Code> {
        let call = Request::parse(line.as_bytes(), None).call;
        call.map(|call| call.command)
            .map_err(|failure| failure.code)
    }

    #[test]
    fn request_is_checked_against_table_of_commands() {
        assert_eq!(code(r#"{"version":1,"command":"status"}"#), Ok("status"));
        for (line, expected) in [
            ("", Code::Malformed),
            ("status", Code::Malformed),
            ("[1]", Code::Malformed),
            (r#"{"version":1}"#, Code::Malformed),
            (
                r#"{"version":1,"command":"status","more":1}"#,
                Code::Malformed,
            ),
            (r#"{"command":"status"}"#, Code::UnsupportedVersion),
            (
                r#"{"version":2,"command":"status"}"#,
                Code::UnsupportedVersion,
            ),
            (
                r#"{"version":"1","command":"status"}"#,
                Code::UnsupportedVersion,
            ),
            (r#"{"version":1,"command":"dance"}"#, Code::UnknownCommand),
            (
                r#"{"version":1,"command":"status","arguments":{"a":1}}"#,
                Code::InvalidArgument,
            ),
            (
                r#"{"version":1,"command":"status","arguments":[]}"#,
                Code::InvalidArgument,
            ),
        ] {
            assert_eq!(code(line), Err(expected), "{line}");
        }
    }

    #[test]
    fn arguments_have_their_types() {
        let line = br#"{"version":1,"command":"inodes","arguments":{"after":7,"limit":"x"}}"#;
        let call = Request::parse(line, None).call.unwrap();
        assert_eq!(call.number("after", 0), Ok(7));
        assert_eq!(call.number("absent", 3), Ok(3));
        let failed = call.number("limit", 0).unwrap_err();
        assert_eq!(failed.code, Code::InvalidArgument);
        assert!(call.text("after").is_err() && call.flag("after").is_err());
        assert_eq!(call.flag("absent"), Ok(false));
        assert!(call.text("absent").unwrap_err().message.contains("absent"));
    }

    #[test]
    fn failure_survives_its_reply() {
        let failure = Failure::new(Code::NotPossible, "no").hint("do");
        let line = reply(Some(json!("a")), Err(failure.clone()));
        let value: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(value["id"], "a");
        assert_eq!(Failure::from_json(&value["error"]), failure);
        let unknown = json!({ "code": "of-the-future" });
        assert_eq!(Failure::from_json(&unknown).code, Code::Failed);
    }
}
