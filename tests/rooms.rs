//! The rooms of the crate use only those below them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::path::Path;

/// Upper rooms first, as in docs/architecture.md; each with the rooms that it may use.
const ROOMS: &[(&str, &[&str])] = &[
    ("cli", &["config", "device", "fuse", "fs", "io", "sandbox"]),
    (
        "server",
        &[
            "config",
            "front",
            "device",
            "worker",
            "virtqueue",
            "fuse",
            "fs",
            "sandbox",
            "state",
            "io",
        ],
    ),
    ("config", &["device", "fuse", "fs", "io", "sandbox"]),
    ("front", &["device", "virtqueue", "state", "sys"]),
    ("device", &[]),
    ("worker", &["scheduler", "virtqueue", "fuse", "fs", "io"]),
    ("virtqueue", &["io", "state", "sys"]),
    ("scheduler", &[]),
    ("fuse", &["fs", "io", "state"]),
    ("fs", &["io", "state", "sys"]),
    ("sandbox", &["io", "sys"]),
    ("state", &["sys"]),
    ("io", &["sys"]),
    ("sys", &[]),
];

#[test]
fn no_arrow_between_rooms_points_up() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut arrows = 0;
    for (room, below) in ROOMS {
        for (file, text) in sources(&src, room) {
            for other in uses(&text) {
                if other == *room {
                    continue;
                }
                arrows += 1;
                assert!(
                    below.contains(&other.as_str()),
                    "{file} uses `{other}`, which `{room}` may not"
                );
            }
        }
    }
    assert!(
        arrows > 30,
        "only {arrows} arrows were found: is the search still right?"
    );
}

#[test]
fn every_room_is_listed() {
    let lib = include_str!("../src/lib.rs");
    for line in lib.lines() {
        let Some(rest) = line
            .strip_prefix("pub mod ")
            .or(line.strip_prefix("pub(crate) mod "))
        else {
            continue;
        };
        let room = rest.trim_end_matches(';');
        assert!(ROOMS.iter().any(|(name, _)| *name == room), "{room}");
    }
}

/// The files of a room with their text.
fn sources(src: &Path, room: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut todo = vec![src.join(format!("{room}.rs")), src.join(room)];
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(
                std::fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if path.is_file() {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push((path.display().to_string(), text));
        }
    }
    assert!(!found.is_empty(), "there is no room `{room}`");
    found
}

/// The rooms named after `crate::` outside of comments.
fn uses(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .flat_map(|line| {
            line.split("crate::")
                .skip(1)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .map(|rest| {
            rest.chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect::<String>()
        })
        .filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
        .collect()
}
