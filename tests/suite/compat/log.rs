//! What each program logs where: `RUST_LOG`, `--log-level`, `--syslog` without a syslog.

use testing::Server;

use super::Program;

const LISTENING: &str = "Waiting for vhost-user socket connection";

/// Whether the program logs that it listens, with this variable and these arguments.
fn logs(program: &Program, variable: Option<&str>, args: &[&str]) -> bool {
    let (mut command, dir) = program.command_in_place();
    command.args(args);
    if let Some(value) = variable {
        command.env("RUST_LOG", value);
    }
    let mut server = Server::spawn(command, dir);
    // A server that logs nothing shows by its socket that it listens; it serves this VMM, which goes
    // at once, and has logged the line before.
    let end = std::time::Instant::now() + testing::TIMEOUT;
    while std::os::unix::net::UnixStream::connect(server.socket()).is_err() {
        assert!(std::time::Instant::now() < end, "{program:?} {args:?}");
        std::thread::yield_now();
    }
    assert_eq!(server.wait().code(), Some(0), "{:?}", server.said());
    server.said().iter().any(|line| line.contains(LISTENING))
}

#[test]
fn rust_log_wins_over_the_log_level_as_in_virtiofsd() {
    let mut programs = vec![Program::persona()];
    programs.extend(Program::virtiofsd());
    for program in programs {
        for (variable, args, expected) in [
            (None, &[][..], true),
            (None, &["--log-level=warn"][..], false),
            (None, &["--log-level=ERROR"], false),
            (Some("ERROR"), &[], false),
            (Some("error"), &["--log-level=debug"], false),
            (Some("error"), &["-d"], false),
            (Some("info"), &["--log-level=off"], true),
            (Some("INFO"), &["-o", "loglevel=err"], true),
            (Some("virtiofsd=debug"), &["--log-level=off"], true),
            (Some("virtiofsd"), &[], true),
            (Some("virtiofsd=warn"), &[], false),
            (Some("other=debug"), &[], false),
            (Some(""), &[], false),
            (Some("a=b=c"), &["--log-level=info"], false),
            (Some("virtiofsd=loud,info"), &["--log-level=off"], true),
        ] {
            let logged = logs(&program, variable, args);
            assert_eq!(logged, expected, "{program:?} {variable:?} {args:?}");
        }
    }
}

#[test]
fn ringfsd_under_its_own_name_does_not_look_at_rust_log() {
    let (mut command, dir) = Program::own().command_in_place();
    command.env("RUST_LOG", "off");
    let mut server = Server::spawn(command, dir);
    server.wait_for(LISTENING);
}

#[test]
fn server_without_a_syslog_warns_and_logs_to_standard_error() {
    if std::path::Path::new("/dev/log").exists() {
        println!("SKIPPED: this host has a syslog, which is not to be written to");
        return;
    }
    // virtiofsd sends its log to the UDP port of a syslog then, and nobody sees it.
    for program in [Program::own(), Program::persona()] {
        let server = program.serve(&["--syslog"]);
        let said = server.said().join("\n");
        assert!(said.contains("WARN") && said.contains("syslog"), "{said}");
    }
}
