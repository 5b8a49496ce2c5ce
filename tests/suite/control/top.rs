//! `ringfsd top`, by the text that `--batch` prints, and the counts by file.

use std::process::Command;

use testing::Server;
use vmm::fuse::ROOT;
use vmm::{Options, Profile};

use super::ControlSocket;

/// What `ringfsd top` prints of these sockets.
fn top(sockets: &[&ControlSocket], arguments: &[&str]) -> Vec<String> {
    let mut command: Command = testing::command();
    command.arg("top").arg("--interval=0.2");
    command.args(sockets.iter().map(|place| place.socket()));
    let output = command.args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Works until the text of `top` is there.
fn top_while_working(
    server: &Server,
    sockets: &[&ControlSocket],
    arguments: &[&str],
) -> Vec<String> {
    let mut guest = server.session(Profile::Qemu, &Options::default());
    let (file, handle) = guest.create(ROOT, c"busy", 0o644).unwrap();
    std::thread::scope(|scope| {
        let shown = scope.spawn(|| top(sockets, arguments));
        while !shown.is_finished() {
            guest.write(file.nodeid, handle, 0, &[7; 4096]).unwrap();
        }
        shown.join().unwrap()
    })
}

#[test]
fn top_shows_which_of_three_shares_is_busy_and_which_is_gone() {
    let places = [
        ControlSocket::new(),
        ControlSocket::new(),
        ControlSocket::new(),
    ];
    let servers = places.each_ref().map(|place| place.start(&[]));
    let [idle, busy, mut gone] = servers;
    gone.signal(rustix::process::Signal::TERM);
    gone.wait();
    let sockets = places.each_ref();
    let lines = top_while_working(&busy, &sockets, &["--batch=1"]);
    assert!(
        lines[0].contains("3 shares") && lines[0].contains("1 gone"),
        "{lines:#?}"
    );
    assert!(
        lines.iter().all(|line| line.chars().count() <= 80),
        "{lines:#?}"
    );
    // Names are paths, of which the end is shown.
    let end = |server: &Server| server.share().to_str().unwrap()[5..15].to_owned();
    assert!(lines[2].contains(&end(&busy)), "{lines:#?}");
    assert!(lines[3].contains(&end(&idle)), "{lines:#?}");
    assert!(lines[4].contains("gone"), "{lines:#?}");
    let row = |name: &str| lines.iter().position(|line| line.starts_with(name));
    assert!(
        row("Busiest operations").is_some() && row("write ").is_some(),
        "{lines:#?}"
    );
    // Durations are measured while somebody looks.
    assert!(lines[row("write ").unwrap()].contains('s'), "{lines:#?}");
}

#[test]
fn top_without_a_server_says_what_it_needs() {
    let output = testing::command()
        .args(["top", "--batch=1"])
        .env("XDG_RUNTIME_DIR", "/nonexistent")
        .output()
        .unwrap();
    // A server of this host might have its socket there.
    if !std::path::Path::new("/run/ringfsd").exists() {
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("--control"), "{said}");
    }
}

#[test]
fn files_are_counted_while_somebody_asks() {
    let place = ControlSocket::new();
    let server = place.start(&[]);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    let (busy, handle) = guest.create(ROOT, c"busy", 0o644).unwrap();
    let (calm, other) = guest.create(ROOT, c"calm", 0o644).unwrap();
    guest.write(calm.nodeid, other, 0, b"not counted").unwrap();
    assert!(
        place.ctl(&["watch-files"])["files"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    for _ in 0..5 {
        guest.write(busy.nodeid, handle, 0, b"text").unwrap();
    }
    guest.read(calm.nodeid, other, 0, 100).unwrap();
    let files = place.ctl(&["watch-files"]);
    let files = files["files"].as_array().unwrap();
    assert_eq!(files[0]["path"], "/busy", "{files:?}");
    assert_eq!(
        (&files[0]["requests"], &files[0]["bytes_written"]),
        (&5.into(), &20.into())
    );
    assert_eq!(
        (&files[1]["path"], &files[1]["bytes_read"]),
        (&"/calm".into(), &100.into())
    );
    assert_eq!(
        place.ctl(&["watch-files", "--limit=1"])["files"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn durations_are_measured_while_somebody_asks() {
    let place = ControlSocket::new();
    let server = place.start(&[]);
    let mut guest = server.session(Profile::Qemu, &Options::default());
    let durations = |arguments: &[&str], name: &str| {
        let statistics = place.ctl(&[&["statistics"], arguments].concat());
        let operations = statistics["operations"].as_array().unwrap().iter();
        let mut found = operations.filter(|it| it["operation"] == name);
        let latency = found.next().unwrap()["latency"]["buckets"].clone();
        let buckets = latency.as_array().unwrap().iter();
        buckets.filter_map(serde_json::Value::as_u64).sum::<u64>()
    };
    guest.mkdir(ROOT, c"before", 0o755).unwrap();
    assert_eq!(durations(&[], "mkdir"), 0);
    assert_eq!(durations(&["--durations"], "mkdir"), 0);
    guest.mkdir(ROOT, c"after", 0o755).unwrap();
    assert_eq!(durations(&[], "mkdir"), 1);
}
