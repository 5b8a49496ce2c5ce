//! The static probes that `docs/tuning.md` has a table of are in the program, with these arguments.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

const PAGE: &str = include_str!("../../docs/tuning.md");

/// What a note of a probe begins with: its owner, and before that the number of its type, which is
/// 3.
const OWNER: &[u8] = b"\x03\0\0\0stapsdt\0";

/// The addresses before the names: of the probe, of the note's base, and of a semaphore.
const ADDRESSES: usize = 3 * 8;

/// The probes in `program`, by provider and name, with the number of arguments; and their
/// addresses.
fn probes(program: &[u8]) -> Vec<((String, String, usize), [u8; 8])> {
    let starts = (0..program.len()).filter(|&at| program[at..].starts_with(OWNER));
    let probes = starts.map(|at| {
        let (addresses, texts) = program[at + OWNER.len()..].split_at(ADDRESSES);
        let mut texts = texts
            .split(|byte| *byte == 0)
            .map(|text| String::from_utf8(text.to_vec()).unwrap());
        let mut text = || texts.next().unwrap();
        let (provider, name, arguments) = (text(), text(), text());
        let arguments = arguments.split(' ').count();
        let address = addresses.first_chunk().unwrap();
        ((provider, name, arguments), *address)
    });
    probes.collect()
}

#[test]
fn program_has_the_probes_of_the_tuning_page() {
    let section = PAGE.split("\n### Probes\n").nth(1).unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let documented: BTreeSet<_> = rows
        .map(|row| {
            let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
            let name = cells[0].trim_matches('`').to_owned();
            ("ringfsd".to_owned(), name, cells[2].split(", ").count())
        })
        .collect();
    assert_eq!(documented.len(), 2);
    let program = std::fs::read(env!("CARGO_BIN_EXE_ringfsd")).unwrap();
    let probes = probes(&program);
    assert!(probes.iter().all(|(_, address)| *address != [0; 8]));
    let found: BTreeSet<_> = probes.into_iter().map(|(probe, _)| probe).collect();
    assert_eq!(found, documented);
}
