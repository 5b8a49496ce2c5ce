//! The files that each program makes: the PID file, and the socket in place of another file.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use testing::Server;
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

use super::Program;

fn is_locked(path: &Path) -> bool {
    let file = File::open(path).unwrap();
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// Checks the file of a running server, and what is left of it.
fn check(mut server: Server, path: &Path, program: &Program) {
    let text = std::fs::read_to_string(path).unwrap();
    assert_eq!(text, format!("{}\n", server.guardian()), "{program:?}");
    let mode = std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "{program:?}");
    assert!(is_locked(path), "{program:?}");
    server.signal(Signal::TERM);
    server.wait();
    assert!(path.exists() && !is_locked(path), "{program:?}");
}

#[test]
fn pid_file_is_virtiofsds() {
    let mut programs = vec![Program::persona()];
    programs.extend(Program::virtiofsd());
    for program in programs {
        for sandbox in ["--sandbox=namespace", "--sandbox=none"] {
            let server = program.serve(&[sandbox]);
            let path = server.socket().with_extension("pid");
            check(server, &path, &program);
        }
        let server = program.serve_inherited(&[]);
        assert!(!server.socket().with_extension("pid").exists());
    }
}

#[test]
fn pid_file_is_where_the_option_says() {
    let own = Program::own();
    let server = own.serve(&[]);
    assert!(!server.socket().with_extension("pid").exists());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pid");
    std::fs::write(&path, "a longer text than a number\n").unwrap();
    let option = format!("--pid-file={}", path.display());
    for args in [&[&option[..]][..], &[&option, "--supervise"]] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        check(own.serve(args), &path, &own);
    }
    check(own.serve_inherited(&[&option]), &path, &own);
}

#[test]
fn pid_file_stays_locked_when_a_supervised_server_is_replaced() {
    let mut server = Program::persona().serve(&["--supervise"]);
    let path = server.socket().with_extension("pid");
    let mut fs = server.session(Profile::Qemu, &Options::default());
    for round in 0..2 {
        if round == 0 {
            let serving = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
            kill_process(serving, Signal::KILL).unwrap();
            server.wait_for("serving again");
        } else {
            server.signal(Signal::HUP);
            server.wait_for("upgraded to");
        }
        fs.getattr(ROOT).unwrap();
        assert!(is_locked(&path), "{round}");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", server.guardian()));
    }
    drop(fs);
    assert_eq!(server.wait().code(), Some(0));
    assert!(!is_locked(&path));
}

#[test]
fn pid_file_of_a_running_server_is_an_error() {
    let persona = Program::persona();
    let mut server = persona.serve(&[]);
    let path = server.socket().with_extension("pid");
    // As if somebody had removed the socket.
    std::fs::remove_file(server.socket()).unwrap();
    let second = persona
        .command()
        .arg("--socket-path")
        .arg(server.socket())
        .arg("--shared-dir=/usr")
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("socket.pid is locked"), "{said}");
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, format!("{}\n", server.guardian()));
    assert!(!server.socket().exists(), "the second one's is removed");
    server.signal(Signal::TERM);
    server.wait();
}

#[test]
fn file_at_the_path_of_the_socket_is_replaced_as_virtiofsd_does() {
    let mut programs = vec![Program::persona()];
    programs.extend(Program::virtiofsd());
    for program in programs {
        let (command, dir) = program.command_in_place();
        std::fs::write(dir.path().join("socket"), "made by mktemp").unwrap();
        let mut server = Server::spawn(command, dir);
        server.wait_until_it_listens();
        drop(server.connect());
        assert_eq!(server.wait().code(), Some(0), "{program:?}");
    }
    let (mut command, dir) = Program::own().command_in_place();
    let path = dir.path().join("socket");
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(command.output().unwrap().status.code(), Some(1));
    assert_eq!(std::fs::read(path).unwrap(), b"precious");
}
