//! How each program ends: the exit status, and what it leaves.

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;

use rustix::process::{Pid, Signal, kill_process};
use testing::Server;
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile};

use super::Program;

/// How a program has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Status(i32),
    Killed(i32),
}

fn end(server: &mut Server) -> End {
    let status = server.wait();
    match status.code() {
        Some(code) => End::Status(code),
        None => End::Killed(status.signal().unwrap()),
    }
}

/// The persona, and virtiofsd if it is installed.
fn programs() -> Vec<Program> {
    let mut programs = vec![Program::persona()];
    programs.extend(Program::virtiofsd());
    programs
}

#[test]
fn persona_ends_as_virtiofsd_when_signalled() {
    for sandbox in ["--sandbox=namespace", "--sandbox=none"] {
        for (signal, expected) in [
            (Signal::TERM, End::Status(1)),
            (Signal::HUP, End::Status(1)),
            (Signal::INT, End::Killed(libc::SIGINT)),
            (Signal::QUIT, End::Killed(libc::SIGQUIT)),
        ] {
            for program in programs() {
                let mut server = program.serve(&[sandbox]);
                server.signal(signal);
                let ended = end(&mut server);
                assert_eq!(ended, expected, "{program:?} {sandbox} {signal:?}");
                let is_own = program.path == Program::own().path;
                assert!(!is_own || !server.socket().exists(), "{signal:?}");
            }
        }
    }
}

#[test]
fn persona_ends_as_virtiofsd_when_its_serving_process_is_killed() {
    for program in programs() {
        let mut server = program.serve(&[]);
        let serving = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
        kill_process(serving, Signal::KILL).unwrap();
        assert_eq!(end(&mut server), End::Status(247), "{program:?}");
    }
}

#[test]
fn ringfsd_ends_with_0_when_asked_and_as_its_serving_process_otherwise() {
    for args in [&[][..], &["--supervise"]] {
        for signal in [Signal::TERM, Signal::INT, Signal::QUIT, Signal::HUP] {
            if signal == Signal::HUP && !args.is_empty() {
                // Asks for an upgrade.
                continue;
            }
            let mut server = Program::own().serve(args);
            server.signal(signal);
            assert_eq!(end(&mut server), End::Status(0), "{signal:?}");
            assert!(!server.socket().exists());
        }
    }
    let mut server = Program::own().serve(&[]);
    let serving = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
    // To the serving process, as by `pkill`.
    kill_process(serving, Signal::HUP).unwrap();
    assert_eq!(end(&mut server), End::Status(0));
    let mut server = Program::own().serve(&[]);
    let serving = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
    kill_process(serving, Signal::KILL).unwrap();
    assert_eq!(end(&mut server), End::Killed(libc::SIGKILL));
}

#[test]
fn meaningless_signals_do_not_end_a_server() {
    for args in [&[][..], &["--supervise"]] {
        let mut server = Program::own().serve(args);
        let serving = server.pid();
        for signal in [
            Signal::USR1,
            Signal::USR2,
            Signal::ALARM,
            Signal::VTALARM,
            Signal::PROF,
            Signal::POWER,
            Signal::IO,
            Signal::PIPE,
        ] {
            server.signal(signal);
            let serving = Pid::from_raw(i32::try_from(serving).unwrap()).unwrap();
            kill_process(serving, signal).unwrap();
        }
        let mut fs = server.session(Profile::Qemu, &Options::default());
        fs.getattr(ROOT).unwrap();
        assert_eq!(server.pid(), serving);
        drop(fs);
        server.signal(Signal::TERM);
        assert_eq!(end(&mut server), End::Status(0), "{args:?}");
    }
}

#[test]
fn hangup_that_the_launcher_ignores_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let mut command = std::process::Command::new("bash");
    command
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\""])
        .arg(Program::own().path)
        .arg("--socket")
        .arg(dir.path().join("socket"))
        .arg("--shared-dir")
        .arg(share);
    let mut server = Server::spawn(command, dir);
    server.wait_until_it_listens();
    server.signal(Signal::HUP);
    let mut fs = server.session(Profile::Qemu, &Options::default());
    fs.getattr(ROOT).unwrap();
    server.signal(Signal::TERM);
    assert_eq!(end(&mut server), End::Status(0));
}

#[test]
fn server_for_one_vmm_ends_with_0_when_it_has_gone() {
    let mut programs = programs();
    programs.push(Program::own());
    for program in programs {
        let has_socket = program.name != "ringfsd";
        let mut servers = vec![program.serve_inherited(&[])];
        servers.extend(has_socket.then(|| program.serve(&[])));
        servers.extend(has_socket.then(|| program.serve(&["--sandbox=none"])));
        for mut server in servers {
            let session = Profile::Qemu.connect(server.connect(), &Options::default());
            let mut fs = Client::new(session.unwrap());
            fs.init().unwrap();
            fs.getattr(ROOT).unwrap();
            drop(fs);
            assert_eq!(end(&mut server), End::Status(0), "{program:?}");
        }
        // One that goes before it has said anything.
        let mut server = program.serve_inherited(&[]);
        drop(UnixStream::connect(server.socket()).unwrap());
        assert_eq!(end(&mut server), End::Status(0), "{program:?}");
        assert!(server.socket().exists(), "it is the launcher's");
    }
}

#[test]
fn server_waits_for_the_next_vmm_if_asked() {
    let state = tempfile::tempdir().unwrap();
    let state = format!("--state={}", state.path().join("state").display());
    for mut server in [
        Program::own().serve(&[]),
        Program::own().serve_inherited(&["--keep-listening"]),
        Program::own().serve_inherited(&[&state]),
        Program::persona().serve(&["--keep-listening"]),
        Program::persona().serve(&["--compat=ringfsd"]),
    ] {
        for _ in 0..2 {
            let mut fs = server.session(Profile::Qemu, &Options::default());
            fs.getattr(ROOT).unwrap();
            drop(fs);
            server.wait_for("ready for the next VMM");
        }
    }
}

#[test]
fn supervised_server_with_an_inherited_socket_survives_a_kill_and_ends_with_the_vmm() {
    let mut server = Program::own().serve_inherited(&["--supervise"]);
    let mut fs = server.session(Profile::Qemu, &Options::default());
    let serving = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
    kill_process(serving, Signal::KILL).unwrap();
    server.wait_for("serving again");
    fs.getattr(ROOT).unwrap();
    drop(fs);
    assert_eq!(end(&mut server), End::Status(0));
}
