//! The protocol as another program would speak it, and as `docs/control.md` describes it.

use std::collections::BTreeSet;

use ringfsd::internals::control::{COMMANDS, Code, VERSION};
use serde_json::Value;

use super::{ControlSocket, STATUS};

const PAGE: &str = include_str!("../../../docs/control.md");

#[test]
fn one_connection_takes_requests_one_after_the_other() {
    let place = ControlSocket::new();
    let _server = place.start(&[]);
    let mut client = place.connect();
    for id in ["1", "\"two\"", "null"] {
        let request = format!(r#"{{"version":1,"id":{id},"command":"status"}}"#);
        let reply = client.ask(&request);
        assert_eq!(reply["version"], VERSION);
        assert_eq!(reply["id"], serde_json::from_str::<Value>(id).unwrap());
        assert!(reply["result"]["version"].is_string());
    }
    // Several at once, in parts.
    client.send(format!("{STATUS}\n{STATUS}\n{}", &STATUS[..10]).as_bytes());
    assert!(client.receive().unwrap()["result"].is_object());
    assert!(client.receive().unwrap()["result"].is_object());
    client.send(format!("{}\n", &STATUS[10..]).as_bytes());
    assert!(client.receive().unwrap()["result"].is_object());
}

#[test]
fn requests_of_other_versions_and_commands_are_refused_and_the_connection_stays() {
    let place = ControlSocket::new();
    let _server = place.start(&[]);
    let mut client = place.connect();
    for (line, code) in [
        ("what?", "malformed"),
        (r#"{"version":2,"command":"status"}"#, "unsupported-version"),
        (r#"{"version":1,"command":"dance"}"#, "unknown-command"),
        (
            r#"{"version":1,"command":"inodes","arguments":{"limit":0}}"#,
            "invalid-argument",
        ),
        (
            r#"{"version":1,"command":"set-log-level"}"#,
            "invalid-argument",
        ),
    ] {
        let reply = client.ask(line);
        assert_eq!(reply["error"]["code"], code, "{line}");
        assert!(reply["error"]["message"].is_string());
    }
    assert!(client.ask(STATUS)["result"].is_object());
}

#[test]
fn client_that_sends_no_more_gets_its_replies() {
    let place = ControlSocket::new();
    let _server = place.start(&[]);
    let mut client = place.connect();
    client.send(format!("{STATUS}\n").repeat(20).as_bytes());
    client.send(&STATUS.as_bytes()[..10]);
    let stream = client.0.get_ref();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..20 {
        assert!(client.receive().unwrap()["result"].is_object());
    }
    // Half a line is no request.
    assert_eq!(client.receive(), None);
}

/// The first cells of the table below a heading.
fn rows(heading: &str) -> BTreeSet<String> {
    let section = PAGE.split(&format!("\n## {heading}\n")).nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.split('`').nth(1).unwrap().to_owned());
    cells.collect()
}

#[test]
fn page_describes_each_command_with_its_arguments_and_each_failure() {
    let commands = COMMANDS.iter().map(|command| command.name.to_owned());
    assert_eq!(rows("Commands"), commands.collect());
    let codes = Code::ALL.iter().map(|code| code.text().to_owned());
    assert_eq!(rows("Failures"), codes.collect());
    for command in COMMANDS {
        let start = format!("| `{}` | ", command.name);
        let row = PAGE.lines().find(|line| line.starts_with(&start)).unwrap();
        let arguments = row.split(" | ").nth(1).unwrap();
        let documented: BTreeSet<_> = arguments.split('`').skip(1).step_by(2).collect();
        assert_eq!(documented, command.arguments.iter().copied().collect());
    }
    assert!(PAGE.contains(&format!("\"version\":{VERSION}")));
}
