//! The control socket through restarts and upgrades: it is the same socket, and what it shows is the
//! process that serves.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use testing::{Server, USER};
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

use super::{ControlSocket, STATUS};

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn setups() -> Vec<(&'static str, Option<u32>)> {
    match rustix::process::geteuid().is_root() {
        true => vec![
            ("namespace", None),
            ("none", None),
            ("namespace", Some(USER)),
        ],
        false => vec![("namespace", None)],
    }
}

#[test]
fn limits_change_while_the_server_runs_and_outlive_its_process() {
    let place = ControlSocket::new();
    let mut server = place.start(&["--supervise", "--limit-iops", "1000"]);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    assert_eq!(
        place.ctl(&["status"])["limits"],
        json!({ "operations": "1000" })
    );
    let set = json!({ "metadata": "20,burst=1", "bytes-read": "1048576" });
    let args = ["--iops", "metadata=20,burst=1", "--bandwidth", "read=1M"];
    let reply = place.ctl(&[&["set-limits"][..], &args].concat());
    assert_eq!(reply["limits"], set);
    // A bucket that was full lets one pass at once, and the others wait for 50 ms each.
    let began = Instant::now();
    for _ in 0..5 {
        guest.getattr(ROOT).unwrap();
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(190), "{took:?}");
    kill(server.pid());
    server.wait_for("serving again");
    assert_eq!(place.ctl(&["status"])["limits"], set);
    assert_eq!(place.ctl(&["set-limits"])["limits"], json!({}));
    guest.getattr(ROOT).unwrap();
    let many = r#"{"version":1,"command":"set-limits","arguments":{"reads":"many"}}"#;
    let error = place.connect().ask(many)["error"].clone();
    assert_eq!(error["code"], "invalid-argument", "{error}");
}

#[test]
fn log_levels_change_while_the_server_runs_and_outlive_its_process_and_program() {
    let place = ControlSocket::new();
    let mut server = place.start(&["--supervise", "--log-level=info,fs=warn,io=off"]);
    let log = || place.ctl(&["status"])["log"].clone();
    let first = json!({ "level": "info", "filters": null, "rooms": { "fs": "warn", "io": "off" } });
    assert_eq!(log(), first);
    place.ctl(&["set-log-level", "trace", "io"]);
    kill(server.pid());
    server.wait_for("serving again");
    // What was set at the start still applies beside it.
    assert_eq!(log()["rooms"], json!({ "fs": "warn", "io": "trace" }));
    place.ctl(&["set-log-level", "error"]);
    place.ctl(&["set-log-level", "debug", "control"]);
    let set = json!({ "level": "error", "filters": null, "rooms": { "control": "debug" } });
    assert_eq!(log(), set);
    kill(server.pid());
    server.wait_for("serving again");
    assert_eq!(log(), set);
    // The level is that of the log, and not only shown.
    server.wait_for("control: status");
    place.ctl(&["upgrade"]);
    server.wait_for("upgraded to");
    assert_eq!(log(), set);
    server.wait_for("control: status");
    // What the guest does at info isn't logged any more.
    let guest = server.session(Profile::Qemu, &Options::default());
    assert_eq!(log(), set);
    server.wait_for("control: status");
    drop(guest);
    let said = server.said();
    let upgraded = said.iter().position(|line| line.contains("upgraded to"));
    let after = &said[upgraded.unwrap()..];
    assert!(
        !after
            .iter()
            .any(|line| line.contains("a VMM has connected")),
        "{after:?}"
    );
}

#[test]
fn control_socket_survives_kills_and_upgrades() {
    for (sandbox, user) in setups() {
        println!("{sandbox} {user:?}");
        let place = ControlSocket::of(user);
        let arguments = ["--supervise", "--sandbox", sandbox, &place.option()];
        let mut server = Server::start_as(user, &arguments);
        let mut guest = server.session(Profile::Qemu, &Options::default());
        assert_eq!(place.ctl(&["status"])["resumed"], false);
        for round in 0..2 {
            let mut connected = place.connect();
            connected.ask(STATUS);
            kill(server.pid());
            server.wait_for("serving again");
            // The next process knows nothing of that client.
            assert_eq!(connected.receive(), None);
            let status = place.ctl(&["status"]);
            assert_eq!(status["resumed"], true);
            assert_eq!(status["process"], server.guardian());
            assert!(status["vmm"]["session"].is_object());
            let name = std::ffi::CString::new(format!("d{round}")).unwrap();
            guest.mkdir(ROOT, &name, 0o755).unwrap();
            let upgraded = place.ctl(&["upgrade"]);
            let outcome = upgraded["outcome"].as_str().unwrap();
            assert!(outcome.starts_with("upgraded to"), "{outcome}");
            server.wait_for("upgraded to");
            let status = place.ctl(&["status"]);
            assert_eq!(status["process"], server.guardian());
            let own = rustix::process::geteuid().as_raw();
            assert_eq!(status["user"], user.unwrap_or(own));
            server.signal(Signal::USR1);
            server.wait_for("report: ringfsd");
        }
        server.signal(Signal::TERM);
        server.wait();
        assert!(!place.socket().exists());
    }
}
