//! The control socket through restarts and upgrades: it is the same socket, and what it shows is the
//! process that serves.

use rustix::process::{Pid, Signal, kill_process};
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
