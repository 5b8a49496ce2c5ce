//! Rooms use only rooms below them, as the table in `docs/architecture.md` says, and the files of a
//! crate don't use each other in circles. Retired names don't return.
//!
//! The table is read, not repeated, so table and code can't differ. The search is textual: it finds
//! paths that begin with `crate`, `super`, `self` or `ringfsd`, grouped or not, outside of
//! comments.
//!
//! A binary of its own: it uses nothing of the library, so `cargo xtask check` doesn't have to build
//! the other tests for it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Files of which each uses the others, to be emptied: no entry may be added.
const CIRCLES_TO_BE_OPENED: &[&[&str]] = &[];

/// The heading of the table of rooms, in `docs/architecture.md`.
const HEADING: &str = "| room | what it does | uses |";

/// The heading of the table of the rooms within the passthrough.
const INNER_HEADING: &str = "| inner room | what it does | uses |";

/// Words that were once names and say nothing to a reader who doesn't know their history. None may be
/// an identifier again.
const RETIRED_NAMES: &[&str] = &[
    "Alarm Begun Crew Doing Haven Held Inside Kept Leash Moment Nap Noted Outfit Over",
    "Parcel PATIENCE Patience Place Ticket Totals Trial Way Wear Wish afresh",
    "bequeathed conversation crew dismiss doings enlist every_order give_away",
    "give_back given_back hand_over lend lent nap obey on_demand portions successor",
    "take_back take_down twin untold",
];

/// The parts of a path.
type Names = Vec<String>;

/// Fails unless the code has the arrows of the table. An arrow is a room and a room it uses.
fn assert_same_arrows(code: &BTreeSet<(String, String)>, table: &BTreeSet<(String, String)>) {
    assert_eq!(
        (Vec::new(), Vec::new()),
        (
            code.difference(table).collect::<Vec<_>>(),
            table.difference(code).collect::<Vec<_>>()
        ),
        "(room, room it uses): in the code alone; in the table alone"
    );
}

#[test]
fn rooms_use_what_the_table_says_and_nothing_else() {
    let table = table(include_str!("../docs/architecture.md"), HEADING);
    let tree = Tree::read(&root().join("src"));
    let mut found = BTreeSet::new();
    for file in tree.files.values() {
        let room = file.room();
        // It hands on what the rooms have, and does nothing itself.
        if room == "lib" {
            continue;
        }
        for path in &file.paths {
            let Some(used) = tree.absolute(file, path).first().cloned() else {
                continue;
            };
            // What begins with `crate` and is no room is a name of the crate's own root.
            if used != room && tree.files.contains_key(&vec![used.clone()]) {
                found.insert((room.clone(), used));
            }
        }
    }
    let allowed: BTreeSet<_> = table
        .iter()
        .flat_map(|(room, uses)| uses.iter().map(|used| (room.clone(), used.clone())))
        .collect();
    assert!(found.len() > 30, "only {found:?}: is the search right?");
    assert_same_arrows(&found, &allowed);
}

#[test]
fn every_room_is_in_the_table_above_those_it_uses() {
    let table = table(include_str!("../docs/architecture.md"), HEADING);
    let names: Vec<_> = table.iter().map(|(room, _)| room.as_str()).collect();
    for (row, (room, uses)) in table.iter().enumerate() {
        for used in uses {
            assert!(
                names[row + 1..].contains(&used.as_str()),
                "`{room}` uses `{used}`, which is not below it"
            );
        }
    }
    let rooms: BTreeSet<_> = Tree::read(&root().join("src"))
        .files
        .into_values()
        .map(|file| file.room())
        .filter(|room| room != "lib")
        .collect();
    assert_eq!(rooms, names.iter().map(|name| (*name).to_owned()).collect());
}

#[test]
fn passthrough_rooms_use_what_the_table_says_and_nothing_else() {
    let table = table(include_str!("../docs/architecture.md"), INNER_HEADING);
    // The first row has several files, which make up the root.
    let root_files: Vec<_> = table[0]
        .0
        .split(", ")
        .map(|it| it.trim_matches('`'))
        .collect();
    let inner = |module: &Names| {
        let room = match module.as_slice() {
            [fs, passthrough, room @ ..] if fs == "fs" && passthrough == "passthrough" => {
                room.first().map_or("mod", String::as_str).to_owned()
            }
            _ => return None,
        };
        let is_root = root_files.contains(&room.as_str());
        Some(if is_root { "mod".to_owned() } else { room })
    };
    let tree = Tree::read(&root().join("src"));
    let mut found = BTreeSet::new();
    let mut rooms = BTreeSet::new();
    for file in tree.files.values() {
        let Some(room) = inner(&file.module) else {
            continue;
        };
        rooms.insert(room.clone());
        let used = file.paths.iter().filter_map(|path| {
            let used = tree.defined_in(&tree.absolute(file, path), 4)?;
            inner(&used.module)
        });
        found.extend(
            used.filter(|used| *used != room)
                .map(|used| (room.clone(), used)),
        );
    }
    let below = table[1..].iter().map(|(room, _)| room.clone());
    let names: Vec<_> = ["mod".to_owned()].into_iter().chain(below).collect();
    assert_eq!(rooms, names.iter().cloned().collect());
    let mut allowed = BTreeSet::new();
    for (row, (_, uses)) in table.iter().enumerate() {
        for used in uses {
            let is_below = names[row + 1..].contains(used);
            assert!(
                is_below,
                "`{}` uses `{used}`, which is not below it",
                names[row]
            );
            allowed.insert((names[row].clone(), used.clone()));
        }
    }
    assert!(found.len() > 15, "only {found:?}: is the search right?");
    assert_same_arrows(&found, &allowed);
}

#[test]
fn files_within_a_crate_use_each_other_one_way() {
    let crates = [
        "src",
        "integration/bridge/src",
        "integration/fuzz/src",
        "integration/guest/suite/src",
        "integration/host-changes/src",
        "integration/load/src",
        "integration/recovery/src",
        "integration/testing/src",
        "integration/vmm/src",
        "integration/xtask/src",
    ];
    let mut circles = BTreeSet::new();
    for folder in crates {
        let tree = Tree::read(&root().join(folder));
        assert!(!tree.files.is_empty(), "{folder}");
        for circle in tree.circles() {
            circles.insert(
                circle
                    .iter()
                    .map(|file| format!("{folder}/{file}"))
                    .collect::<Vec<_>>(),
            );
        }
    }
    let listed: BTreeSet<Vec<String>> = CIRCLES_TO_BE_OPENED
        .iter()
        .map(|circle| circle.iter().map(|&file| file.to_owned()).collect())
        .collect();
    assert_eq!(circles, listed, "circles found; circles listed");
}

#[test]
fn retired_names_are_no_identifiers() {
    let retired: BTreeSet<_> = RETIRED_NAMES
        .iter()
        .flat_map(|line| line.split(' '))
        .collect();
    let (mut found, mut files) = (Vec::new(), 0);
    let mut todo = ["src", "tests", "integration"]
        .map(|dir| root().join(dir))
        .to_vec();
    while let Some(path) = todo.pop() {
        if path.is_dir() && !path.ends_with("target") {
            let entries = std::fs::read_dir(&path).unwrap();
            todo.extend(entries.map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files += 1;
            let text = std::fs::read_to_string(&path).unwrap();
            let code = without_comments_and_strings(&text);
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            let words = words.filter(|word| retired.contains(word));
            found.extend(words.map(|word| format!("{}: {word}", path.display())));
        }
    }
    assert!(files > 300, "only {files} files: is the search right?");
    assert_eq!(found, [""; 0]);
}

#[test]
fn paths_are_found_in_every_form() {
    let text = "//! crate::comment\npub(crate) use crate::{a, b::{self, c as d}};\n\
                fn f() { crate::e::g(\"crate::text\"); super::h::<u8>(); } // self::i\n\
                #[cfg(test)]\nmod tests {\n use super::j;\n}\n";
    let paths: Vec<_> = paths(text).into_iter().map(|p| p.join("::")).collect();
    assert_eq!(
        paths,
        [
            "crate::a",
            "crate::b",
            "crate::b::c",
            "crate::e::g",
            "super::h"
        ]
    );
}

#[test]
fn circles_are_found_through_reexports() {
    let tree = Tree::of(&[
        ("lib.rs", "mod a;"),
        (
            "a.rs",
            "mod b; mod c; mod d; pub use b::B; pub use c::{C as E};",
        ),
        ("a/b.rs", "use super::E;"),
        ("a/c.rs", "use super::{B, d::D};"),
        ("a/d.rs", "use super::super::a; pub struct D;"),
    ]);
    assert_eq!(tree.circles(), [vec!["a/b.rs", "a/c.rs"]]);
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Each room of the table, upper ones first, with the rooms that it uses.
fn table(text: &str, heading: &str) -> Vec<(String, Vec<String>)> {
    let rows = text.split(heading).nth(1).expect("the table of rooms");
    rows.lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let room = cells[1].trim_matches('`').trim_end_matches(".rs");
            let uses = cells[3].split(", ").filter(|used| *used != "–");
            (room.to_owned(), uses.map(str::to_owned).collect())
        })
        .collect()
}

/// A source file that is no test.
struct File {
    name: String,
    module: Names,
    /// As they stand there, from `crate`, `super`, `self` or `ringfsd` on.
    paths: Vec<Names>,
    /// What `use` makes known in this file under which name.
    names: BTreeMap<String, Names>,
}

impl File {
    fn new(name: &str, text: &str) -> Self {
        let module = name.trim_end_matches(".rs").split('/');
        let mut module: Names = module.map(str::to_owned).collect();
        if module.len() > 1 && module.last().is_some_and(|last| last == "mod") {
            module.pop();
        }
        let mut names = BTreeMap::new();
        for (path, name) in uses(&code(text)) {
            names.insert(name, path);
        }
        Self {
            name: name.to_owned(),
            module,
            paths: paths(text),
            names,
        }
    }

    fn room(&self) -> String {
        self.module[0].clone()
    }

    fn is_root(&self) -> bool {
        self.module == ["lib"] || self.module == ["main"]
    }
}

/// The files of one crate by their modules.
struct Tree {
    files: BTreeMap<Names, File>,
}

impl Tree {
    fn read(folder: &Path) -> Self {
        let mut files = Vec::new();
        let mut todo = vec![folder.to_owned()];
        while let Some(path) = todo.pop() {
            if path.is_dir() {
                let entries = std::fs::read_dir(&path).unwrap();
                todo.extend(entries.map(|entry| entry.unwrap().path()));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap();
                files.push((name.to_owned(), std::fs::read_to_string(&path).unwrap()));
            }
        }
        let files: Vec<_> = files
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        Self::of(&files)
    }

    fn of(files: &[(&str, &str)]) -> Self {
        let files = files
            .iter()
            .filter(|(name, _)| !name.split(['/', '.']).any(|part| part == "tests"))
            .map(|(name, text)| File::new(name, text))
            .map(|file| (file.module.clone(), file))
            .collect();
        Self { files }
    }

    /// A path of a file from the crate's root on, without `crate`.
    fn absolute(&self, file: &File, path: &[String]) -> Names {
        let (first, rest) = path.split_first().expect("a path has a part");
        let own = if file.is_root() {
            Vec::new()
        } else {
            file.module.clone()
        };
        let mut from = match first.as_str() {
            "crate" | "ringfsd" => Vec::new(),
            "super" => own[..own.len().saturating_sub(1)].to_vec(),
            "self" => own,
            _ => {
                let mut child = own;
                child.push(first.clone());
                child
            }
        };
        for part in rest {
            // The library's hidden module has the rooms by their names.
            if part == "internals" && from.is_empty() {
                continue;
            }
            if part == "super" {
                from.pop();
            } else {
                from.push(part.clone());
            }
        }
        from
    }

    /// The file that defines what a path names, also where a module above it hands it on.
    fn defined_in(&self, path: &[String], depth: usize) -> Option<&File> {
        let (module, file) = (1..=path.len())
            .rev()
            .find_map(|len| Some((len, self.files.get(&path[..len])?)))
            .or_else(|| {
                let root = ["lib", "main"].map(|root| self.files.get([root.to_owned()].as_slice()));
                Some((0, root.into_iter().flatten().next()?))
            })?;
        let handed_on = path.get(module).and_then(|name| file.names.get(name));
        match handed_on {
            Some(path) if depth > 0 => {
                let path = self.absolute(file, path);
                if path.first().is_some_and(|first| self.is_top(first)) {
                    return self.defined_in(&path, depth - 1);
                }
                None
            }
            _ => Some(file),
        }
    }

    fn is_top(&self, name: &str) -> bool {
        self.files.keys().any(|module| module[0] == name)
    }

    /// Sets of files of which each reaches each other; a module and what lies within it are
    /// together, so what one of them uses of the other makes no circle.
    fn circles(&self) -> Vec<Vec<&str>> {
        let mut arrows: BTreeMap<&Names, BTreeSet<&Names>> = BTreeMap::new();
        for file in self.files.values().filter(|file| !file.is_root()) {
            for path in &file.paths {
                let Some(used) = self.defined_in(&self.absolute(file, path), 4) else {
                    continue;
                };
                let together = used.module.starts_with(&file.module)
                    || file.module.starts_with(&used.module)
                    || used.is_root();
                if !together {
                    arrows.entry(&file.module).or_default().insert(&used.module);
                }
            }
        }
        let reach = |from: &Names| {
            let mut reached = BTreeSet::new();
            let mut todo = vec![from];
            while let Some(module) = todo.pop() {
                for &next in arrows.get(module).into_iter().flatten() {
                    if reached.insert(next) {
                        todo.push(next);
                    }
                }
            }
            reached
        };
        let reached: BTreeMap<_, _> = arrows.keys().map(|&from| (from, reach(from))).collect();
        let mut circles = BTreeSet::new();
        for (from, to) in &reached {
            let circle: BTreeSet<_> = to
                .iter()
                .filter(|other| reached.get(**other).is_some_and(|back| back.contains(from)))
                .map(|other| self.files[*other].name.as_str())
                .collect();
            if circle.len() > 1 {
                circles.insert(circle.into_iter().collect::<Vec<_>>());
            }
        }
        circles.into_iter().collect()
    }
}

/// A text without comments, strings and its tests, which stand at its end.
fn code(text: &str) -> String {
    without_comments_and_strings(text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(""))
}

fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::new();
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or("");
        let parts = line.split('"').step_by(2);
        code.extend(parts.flat_map(|part| [part, " "]));
        code.push('\n');
    }
    code
}

/// The paths of a text that lead into its own crate, in the order in which they stand there.
fn paths(text: &str) -> Vec<Names> {
    let code = code(text);
    let mut found: Vec<Names> = uses(&code).into_iter().map(|(path, _)| path).collect();
    found.retain(|path| matches!(path[0].as_str(), "crate" | "super" | "self" | "ringfsd"));
    for (_, rest) in statements(&code) {
        for start in ["crate::", "super::", "ringfsd::"] {
            for (at, _) in rest.match_indices(start) {
                let before = rest[..at].chars().next_back();
                if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                    continue;
                }
                let path = rest[at..]
                    .split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':')
                    .next()
                    .unwrap_or("");
                let parts = path.split("::").filter(|part| !part.is_empty());
                found.push(parts.map(str::to_owned).collect());
            }
        }
    }
    found
}

/// A code's pieces: what `use` has up to its semicolon, and what stands after that up to the next.
fn statements(code: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let mut rest = code;
    let mut tree = "";
    loop {
        let next = rest
            .match_indices("use ")
            .map(|(at, _)| at)
            .find(|&at| at == 0 || rest[..at].ends_with(['\n', ' ', '{', ';']));
        let Some(at) = next else {
            found.push((tree, rest));
            return found;
        };
        found.push((tree, &rest[..at]));
        let end = rest[at..].find(';').map_or(rest.len(), |len| at + len);
        tree = &rest[at + "use ".len()..end];
        rest = &rest[end..];
    }
}

/// What each `use` of a code names, and under which name.
fn uses(code: &str) -> Vec<(Names, String)> {
    let mut found = Vec::new();
    for (tree, _) in statements(code) {
        if !tree.is_empty() {
            expand(&Vec::new(), tree, &mut found);
        }
    }
    found
}

fn expand(before: &Names, tree: &str, found: &mut Vec<(Names, String)>) {
    let tree = tree.trim();
    if let Some((head, group)) = tree.split_once('{') {
        let mut path = before.clone();
        path.extend(
            head.split("::")
                .map(|part| part.trim().to_owned())
                .filter(|part| !part.is_empty()),
        );
        let group = group.rsplit_once('}').map_or("", |(group, _)| group);
        let (mut depth, mut start) = (0, 0);
        for (at, c) in group.char_indices().chain([(group.len(), ',')]) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    if !group[start..at].trim().is_empty() {
                        expand(&path, &group[start..at], found);
                    }
                    start = at + 1;
                }
                _ => {}
            }
        }
        return;
    }
    let (leaf, alias) = tree.split_once(" as ").unwrap_or((tree, ""));
    let mut path = before.clone();
    path.extend(leaf.split("::").map(|part| part.trim().to_owned()));
    if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    let name = if alias.is_empty() {
        path.last().cloned().unwrap_or_default()
    } else {
        alias.trim().to_owned()
    };
    if !path.is_empty() && !path[0].is_empty() {
        found.push((path, name));
    }
}
