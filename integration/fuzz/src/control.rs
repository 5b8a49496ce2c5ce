//! Clients of the control socket: any bytes in any parts, with any descriptors, to the commands of
//! a server that serves a directory, or several that clients mount and unmount.
//!
//! What must hold: each line has one reply, and it is one of the protocol; a client that comes
//! after all others is served; nothing outside of the directories is reached.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Once;

use ringfsd::fs::{Caller, NodeId};
use ringfsd::internals::config::Config;
use ringfsd::internals::control::Code;
use ringfsd::internals::server::Controlled;
use ringfsd::internals::{cli, logging};
use serde_json::Value;

use crate::count;
use crate::share::Share;
use crate::source::Source;
use crate::vhost_user::send;

/// Clients that an input has at most.
const CLIENTS: usize = 3;

/// The names of the commands, which an input has as numbers so that it meets them soon.
const COMMANDS: &[ringfsd::internals::control::Command] = ringfsd::internals::control::COMMANDS;

/// What the last client asks for.
const STATUS: &[u8] = b"{\"version\":1,\"command\":\"status\"}\n";

/// Arguments that a command may have, or not.
const ARGUMENTS: [&str; 10] = [
    r#""point":"/two""#,
    r#""point":"/one""#,
    r#""point":"/one/f/../d""#,
    r#""source":"two""#,
    r#""readonly":true"#,
    r#""level":"trace""#,
    r#""room":"fs""#,
    r#""limit":2"#,
    r#""after":2"#,
    r#""operations":"1,burst=18446744073709551615""#,
];

/// A server of this configuration.
fn controlled(arguments: &[&str]) -> Controlled {
    static LOG: Once = Once::new();
    LOG.call_once(|| {
        let nowhere = logging::Output {
            target: Box::new(std::io::sink()),
            header: Box::new(|_| String::new()),
        };
        let levels = logging::LevelList::default();
        logging::start(levels, None, Some(nowhere), logging::Format::Text);
    });
    let fixed = [
        "ringfsd",
        "--socket=/s",
        "--control=unix:/c",
        "--sandbox=none",
        "--workers=1",
    ];
    let all = fixed.iter().chain(arguments).map(OsString::from);
    let all: Vec<_> = all.collect();
    let options = cli::parse(&all, cli::Persona::Ringfsd).expect("options");
    let config = Config::try_from(options).expect("a configuration");
    Controlled::new(config).expect("a server")
}

/// The bytes that a client sends next, and whether a descriptor comes with them.
fn part(source: &mut Source<'_>) -> (Vec<u8>, u8) {
    let how = source.u8();
    let with = how >> 6;
    if how & 0x20 == 0 {
        let len = usize::from(how & 0x1f);
        return (source.bytes(len).to_vec(), with);
    }
    let command = COMMANDS[usize::from(how & 0x1f) % COMMANDS.len()].name;
    let which = source.u16();
    let arguments: Vec<_> = ARGUMENTS
        .iter()
        .enumerate()
        .filter(|(number, _)| which >> number & 1 == 1)
        .map(|(_, text)| *text)
        .collect();
    let mut line = format!(
        r#"{{"version":1,"command":"{command}","arguments":{{{}}}}}"#,
        arguments.join(",")
    )
    .into_bytes();
    // Now and then one byte is another.
    if which >> 15 == 1 {
        let at = usize::from(source.u8()) % line.len();
        line[at] = source.u8();
    }
    line.push(b'\n');
    (line, with)
}

/// Reads the replies of a client. Returns how many there were.
fn replies(mut client: UnixStream) -> usize {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).expect("replies");
    let lines = bytes.split(|byte| *byte == b'\n');
    let mut lines: Vec<_> = lines.collect();
    assert_eq!(lines.pop(), Some(&[][..]), "a reply is not complete");
    for line in &lines {
        let reply: Value = serde_json::from_slice(line).expect("JSON");
        assert_eq!(reply["version"], 1);
        assert!(reply.get("result").is_some() != reply.get("error").is_some());
        if let Some(error) = reply.get("error") {
            let code = error["code"].as_str().expect("a code");
            assert!(Code::ALL.iter().any(|known| known.text() == code), "{code}");
        }
    }
    lines.len()
}

/// What is shared between inputs.
struct Scene {
    share: Share,
    vfs: String,
    directory: String,
}

impl Scene {
    fn new() -> Self {
        let share = Share::new();
        let path = share.path();
        for name in ["one", "one/d", "two", "two/d"] {
            std::fs::create_dir(path.join(name)).expect("a directory");
        }
        for name in ["one/f", "one/\u{1b}[2J", "two/f"] {
            std::fs::write(path.join(name), "file").expect("a file");
        }
        let one = path.join("one").display().to_string();
        Self {
            vfs: format!("--vfs=/one={one}"),
            directory: format!("--shared-dir={one}"),
            share,
        }
    }
}

/// One input.
pub fn run(data: &[u8]) {
    thread_local! {
        static SCENE: Scene = Scene::new();
    }
    SCENE.with(|scene| scene.run(data));
}

impl Scene {
    fn run(&self, data: &[u8]) {
        let mut source = Source::new(data);
        let first = source.u8();
        let serves_several = first & 1 == 1;
        let server = match serves_several {
            true => controlled(&[&self.vfs]),
            false => controlled(&[&self.directory]),
        };
        let fs = server.file_system();
        let caller = Caller::default();
        let mut root = NodeId::ROOT;
        if serves_several {
            root = fs.lookup(&caller, root, c"one").expect("a mount").node;
        }
        for name in [c"f", c"d", c"\x1b[2J"] {
            let entry = fs.lookup(&caller, root, name).expect("a file");
            let _any = fs.open(&caller, entry.node, 0);
        }
        let (ours, mut theirs): (Vec<_>, Vec<_>) = (0..CLIENTS)
            .map(|_| UnixStream::pair().expect("sockets"))
            .unzip();
        let mut sent = vec![Vec::new(); CLIENTS];
        let two = File::open(self.share.path().join("two")).expect("a directory");
        let file = File::open(self.share.path().join("two/f")).expect("a file");
        while !source.is_empty() {
            let client = usize::from(source.u8()) % CLIENTS;
            let (bytes, with) = part(&mut source);
            let fds = match with {
                1 => vec![two.as_fd()],
                2 => vec![file.as_fd()],
                3 => vec![two.as_fd(), file.as_fd(), two.as_fd()],
                _ => Vec::new(),
            };
            // More than a socket holds isn't sent, as nobody reads yet.
            if bytes.is_empty() || sent[client].len() > 32 << 10 {
                continue;
            }
            assert!(send(&ours[client], &bytes, &fds));
            sent[client].extend(bytes);
        }
        let (mut last, end) = UnixStream::pair().expect("sockets");
        std::io::Write::write_all(&mut last, STATUS).expect("room");
        theirs.push(end);
        std::thread::scope(|scope| {
            let server = scope.spawn(|| server.serve(theirs).expect("an end"));
            for client in ours.iter().chain([&last]) {
                client.shutdown(std::net::Shutdown::Write).expect("an end");
            }
            let readers: Vec<_> = ours
                .into_iter()
                .map(|client| scope.spawn(move || replies(client)))
                .collect();
            for (reader, sent) in readers.into_iter().zip(sent) {
                let lines = sent.iter().filter(|byte| **byte == b'\n').count();
                count::add(lines);
                assert_eq!(reader.join().expect("no panic"), lines);
            }
            assert_eq!(replies(last), 1);
            // Joined, so that nothing of the thread is left.
            server.join().expect("no panic");
        });
        self.share.check_outside();
    }
}
