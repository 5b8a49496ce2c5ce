//! The metrics as a scraper reads them: what is counted, over which sockets, through kills and
//! upgrades, and beside readers that mean no good.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use testing::{Server, TIMEOUT, USER};
use vmm::fuse::{Client, ROOT};
use vmm::{Options, Profile, Session};

/// A reply of HTTP.
#[derive(Debug)]
struct Reply {
    status: String,
    headers: BTreeMap<String, String>,
    body: String,
}

/// The values by name and labels, in the order of the text.
type Samples = BTreeMap<String, f64>;

/// Reads one reply; a HEAD's has no body.
fn reply(stream: &mut impl Read, head_only: bool) -> Reply {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.trim_end().split("\r\n");
    let status = lines.next().unwrap().to_owned();
    let headers: BTreeMap<_, _> = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let len = headers["Content-Length"].parse().unwrap();
    let mut body = vec![0; if head_only { 0 } else { len }];
    stream.read_exact(&mut body).unwrap();
    Reply {
        status,
        headers,
        body: String::from_utf8(body).unwrap(),
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

fn exchange(path: &Path, request: &str) -> Reply {
    let mut stream = connect(path);
    stream.write_all(request.as_bytes()).unwrap();
    reply(&mut stream, request.starts_with("HEAD"))
}

pub(crate) fn text(path: &Path) -> String {
    let reply = exchange(path, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(reply.status, "HTTP/1.1 200 OK");
    reply.body
}

/// The samples without the label of the share.
fn samples(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let samples = lines.map(|line| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = name.split_once('{').unwrap();
        let labels = labels.strip_suffix('}').unwrap();
        let labels = labels.strip_prefix(r#"share="data""#).unwrap();
        let labels = labels.trim_start_matches(',');
        (format!("{name}{{{labels}}}"), value.parse().unwrap())
    });
    samples.collect()
}

fn scrape(path: &Path) -> Samples {
    samples(&text(path))
}

/// Starts a server with metrics, in the sandbox that the program has by itself.
fn start(user: Option<u32>, args: &[&str]) -> (Server, PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    if user.is_some() {
        std::os::unix::fs::chown(dir.path(), user, user).unwrap();
    }
    let path = dir.path().join("metrics");
    let address = format!("unix:{}", path.display());
    let args = [&["--metrics", &*address, "--tag", "data"], args].concat();
    let server = Server::start_as(user, &args);
    (server, path, dir)
}

fn session(server: &Server) -> Client<Session> {
    server.session(Profile::Qemu, &Options::default())
}

/// A file of 10 bytes that is written, read and looked for in vain.
fn work(fs: &mut Client<Session>, name: &std::ffi::CStr) {
    let (file, handle) = fs.create(ROOT, name, 0o644).unwrap();
    fs.write(file.nodeid, handle, 0, b"0123456789").unwrap();
    assert_eq!(fs.read(file.nodeid, handle, 2, 100).unwrap().len(), 8);
    fs.fsync(file.nodeid, handle, false).unwrap();
    assert!(fs.lookup(ROOT, c"missing").is_err());
    fs.release(file.nodeid, handle).unwrap();
}

/// The metrics that a text has, with their types.
pub(crate) fn types(text: &str) -> BTreeSet<(String, String)> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect()
}

/// The metrics of the page, those of mounts or the others.
pub(crate) fn documented(of_mounts: bool) -> BTreeSet<(String, String)> {
    let page = include_str!("../../docs/metrics.md");
    let rows = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `ringfsd_"))
        .filter(|row| row.starts_with("mount_") == of_mounts);
    rows.map(|row| {
        let mut cells = row.split(" | ");
        let name = cells.next().unwrap().trim_end_matches('`');
        (format!("ringfsd_{name}"), cells.next().unwrap().to_owned())
    })
    .collect()
}

/// Scrapes until `done`: a request is counted after its reply was sent.
fn scrape_until(path: &Path, done: impl Fn(&Samples) -> bool) -> Samples {
    let end = std::time::Instant::now() + TIMEOUT;
    loop {
        let samples = scrape(path);
        if done(&samples) {
            return samples;
        }
        assert!(std::time::Instant::now() < end, "{samples:#?}");
    }
}

/// The names of what never decreases.
fn is_counter(name: &str) -> bool {
    ["_total{", "_bucket{", "_count{", "_sum{"]
        .iter()
        .any(|part| name.contains(part))
}

#[test]
fn everything_that_a_guest_does_is_counted() {
    let (server, path, _dir) = start(None, &[]);
    let before = scrape(&path);
    assert_eq!(before[r#"ringfsd_session_state{state="waiting"}"#], 1.0);
    let mut fs = session(&server);
    work(&mut fs, c"file");
    let after = scrape_until(&path, |samples| {
        samples.contains_key(r#"ringfsd_requests_total{operation="release"}"#)
            && samples["ringfsd_requests_in_flight{}"] == 0.0
    });
    for (name, expected) in [
        (r#"ringfsd_session_state{state="mounted"}"#, 1.0),
        (r#"ringfsd_requests_total{operation="init"}"#, 1.0),
        (r#"ringfsd_requests_total{operation="write"}"#, 1.0),
        (r#"ringfsd_requests_total{operation="fsync"}"#, 1.0),
        (
            r#"ringfsd_errors_total{operation="lookup",errno="ENOENT"}"#,
            1.0,
        ),
        (
            r#"ringfsd_request_duration_seconds_count{operation="fsync"}"#,
            1.0,
        ),
        (
            r#"ringfsd_request_duration_seconds_bucket{le="+Inf",operation="read"}"#,
            1.0,
        ),
        ("ringfsd_read_bytes_total{}", 8.0),
        ("ringfsd_written_bytes_total{}", 10.0),
        ("ringfsd_connections_total{}", 1.0),
        ("ringfsd_requests_in_flight{}", 0.0),
        ("ringfsd_handles{}", 0.0),
        ("ringfsd_inodes{}", 2.0),
    ] {
        assert_eq!(after.get(name), Some(&expected), "{name} in {after:#?}");
    }
    let durations = after[r#"ringfsd_request_duration_seconds_sum{operation="fsync"}"#];
    assert!(
        durations > 0.0 && durations < TIMEOUT.as_secs_f64(),
        "{durations}"
    );
    let of = |name: &str| {
        let named = after.iter().filter(|(key, _)| key.starts_with(name));
        named.map(|(_, value)| value).sum::<f64>()
    };
    let all = of("ringfsd_requests_total{");
    assert_eq!(of("ringfsd_request_duration_seconds_count{"), all);
    assert_eq!(of("ringfsd_queue_request_duration_seconds_count{"), all);
    assert!(of("ringfsd_kicks_total{") >= 1.0 && of("ringfsd_calls_total{") >= 1.0);
    assert!(of("ringfsd_batch_chains_sum{") >= all, "{after:#?}");
}

#[test]
fn failures_and_faults_are_counted() {
    let (server, path, _dir) = start(None, &[]);
    let mut fs = session(&server);
    // No guest's kernel looks such a name up.
    assert!(fs.lookup(ROOT, c"a/b").is_err());
    fs.getattr(ROOT).unwrap();
    let name = r#"ringfsd_guest_faults_total{kind="malformed_request"}"#;
    let samples = scrape_until(&path, |samples| samples[name] == 1.0);
    assert_eq!(samples["ringfsd_dropped_requests_total{}"], 0.0);
    assert_eq!(
        samples[r#"ringfsd_errors_total{operation="lookup",errno="EINVAL"}"#],
        1.0
    );
}

#[test]
fn counters_survive_kills_and_upgrades() {
    let root = rustix::process::geteuid().is_root();
    for user in if root {
        vec![None, Some(USER)]
    } else {
        vec![None]
    } {
        let (mut server, path, _dir) = start(user, &["--supervise"]);
        let mut fs = session(&server);
        let mut last = scrape(&path);
        let count = |samples: &Samples, reason: &str| {
            samples[&format!(r#"ringfsd_restarts_total{{reason="{reason}"}}"#)]
        };
        for round in 0..4_u8 {
            let name = std::ffi::CString::new(format!("file{round}")).unwrap();
            work(&mut fs, &name);
            if round % 2 == 0 {
                let pid = Pid::from_raw(server.pid().cast_signed()).unwrap();
                kill_process(pid, Signal::KILL).unwrap();
                server.wait_for("serving again");
            } else {
                let pid = server.guardian().to_string();
                let upgraded = Command::new(testing::program())
                    .args(["upgrade", "--pid", &pid])
                    .output()
                    .unwrap();
                assert!(upgraded.status.success(), "{upgraded:?}");
                server.wait_for("upgraded to");
            }
            let now = scrape(&path);
            for (name, before) in last.iter().filter(|(name, _)| is_counter(name)) {
                assert!(
                    now[name] >= *before,
                    "{name} went from {before} to {}",
                    now[name]
                );
            }
            let expected = (f64::from(round / 2 + 1), f64::from(round.div_ceil(2)));
            assert_eq!((count(&now, "killed"), count(&now, "upgrade")), expected);
            assert_eq!(
                now["ringfsd_resumed_sessions_total{}"],
                f64::from(round + 1)
            );
            assert_eq!(now["ringfsd_connections_total{}"], 1.0);
            last = now;
        }
        work(&mut fs, c"last");
        let writes = r#"ringfsd_requests_total{operation="write"}"#;
        scrape_until(&path, |samples| samples[writes] == 5.0);
        let pauses = last[r#"ringfsd_pause_duration_seconds_count{reason="killed"}"#];
        assert_eq!(pauses, 2.0);
        server.signal(Signal::TERM);
        assert!(server.wait().success());
        assert!(!path.exists());
    }
}

#[test]
fn counters_go_on_from_one_vmm_to_the_next() {
    let (mut server, path, _dir) = start(None, &[]);
    for round in 1..=3_u8 {
        let mut fs = session(&server);
        fs.getattr(ROOT).unwrap();
        drop(fs);
        server.wait_until_it_listens();
        let round = f64::from(round);
        // A text is used again for a moment.
        let samples = scrape_until(&path, |samples| {
            samples["ringfsd_connections_total{}"] == round
                && samples[r#"ringfsd_session_state{state="waiting"}"#] == 1.0
        });
        assert_eq!(
            samples[r#"ringfsd_requests_total{operation="getattr"}"#],
            round
        );
    }
}

#[test]
fn one_resource_is_served_and_others_are_refused() {
    let (_server, path, _dir) = start(None, &[]);
    let whole = exchange(&path, "GET /metrics HTTP/1.1\r\n\r\n");
    let media_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(whole.headers["Content-Type"], media_type);
    assert!(whole.body.ends_with("# EOF\n"), "{}", whole.body);
    let head = exchange(&path, "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert_eq!(head.status, "HTTP/1.1 200 OK");
    assert!(head.headers["Content-Length"].parse::<usize>().unwrap() > 100);
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (
            "POST /metrics HTTP/1.1\r\nContent-Length: 2\r\n\r\nab",
            "405 Method Not Allowed",
        ),
        ("\r\n\x01\x02\r\n\r\n", "400 Bad Request"),
    ] {
        assert_eq!(
            exchange(&path, request).status,
            format!("HTTP/1.1 {status}")
        );
    }
    // Several on one connection, also at once.
    let mut stream = connect(&path);
    for _ in 0..3 {
        stream
            .write_all(&b"GET /metrics HTTP/1.1\r\n\r\n".repeat(2))
            .unwrap();
        for _ in 0..2 {
            assert_eq!(reply(&mut stream, false).status, "HTTP/1.1 200 OK");
        }
    }
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    reply(&mut stream, false);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn readers_that_send_or_take_nothing_hold_up_nobody() {
    let (server, path, _dir) = start(None, &[]);
    let mut fs = session(&server);
    work(&mut fs, c"file");
    // More than there may be connections: some say nothing, some half a request, some take no reply.
    let request = b"GET /metrics HTTP/1.1\r\n\r\n";
    let readers: Vec<_> = (0..100)
        .map(|n| {
            let mut reader = connect(&path);
            reader.set_nonblocking(true).unwrap();
            for _ in 0..2000 {
                let bytes = match n % 3 {
                    0 => break,
                    1 => &request[..9],
                    _ => &request[..],
                };
                if reader.write(bytes).is_err() || n % 3 == 1 {
                    break;
                }
            }
            reader
        })
        .collect();
    for _ in 0..10 {
        fs.getattr(ROOT).unwrap();
        text(&path);
    }
    let descriptors = server.holdings().descriptors;
    assert!(descriptors < 100, "{descriptors}");
    drop(readers);
}

#[test]
fn port_of_this_host_is_served_from_within_the_sandbox() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        if address.starts_with('[') && std::net::TcpListener::bind(address).is_err() {
            println!("SKIPPED: no IPv6");
            continue;
        }
        let mut server = Server::start_as(None, &["--metrics", address, "--supervise"]);
        let said = server.said().iter().find(|line| line.contains("http://"));
        let url = said.unwrap().rsplit_once("http://").unwrap().1;
        let address = url.strip_suffix("/metrics").unwrap().to_owned();
        let read = || {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
            reply(&mut stream, false).body
        };
        assert!(read().contains("ringfsd_build_info"));
        let pid = Pid::from_raw(server.pid().cast_signed()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        server.wait_for("serving again");
        let killed = r#"reason="killed"} 1"#;
        assert!(read().contains(killed), "{}", read());
    }
}

#[test]
fn socket_is_the_owners_and_that_of_a_dead_server_is_replaced() {
    let (mut server, path, _dir) = start(None, &[]);
    let file = std::fs::symlink_metadata(&path).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(file.mode() & 0o077, 0, "{:o}", file.mode());
    let address = format!("unix:{}", path.display());
    let second = testing::output(&[
        "--socket",
        &format!("{}2", server.socket().display()),
        "--shared-dir",
        "/tmp",
        "--metrics",
        &address,
    ]);
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("--metrics: another server listens"), "{said}");
    server.signal(Signal::KILL);
    server.wait();
    assert!(path.exists());
    server.start_again(&["--metrics", &address, "--tag", "data"]);
    assert_eq!(scrape(&path)["ringfsd_connections_total{}"], 0.0);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    assert!(!path.exists());
}

#[test]
fn address_that_other_hosts_reach_is_refused() {
    let refused = testing::output(&[
        "--socket",
        "/nowhere/socket",
        "--shared-dir",
        "/tmp",
        "--metrics",
        "0.0.0.0:9100",
    ]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("can be reached from other hosts"), "{said}");
}

#[test]
fn page_has_a_row_for_each_metric() {
    let (server, path, _dir) = start(None, &[]);
    let mut fs = session(&server);
    work(&mut fs, c"file");
    assert_eq!(types(&text(&path)), documented(false));
}
