//! `docs/testing.md` says of each operation, message and heading of the options where it is tested, by
//! names that exist.

use std::collections::BTreeSet;
use std::path::Path;

use clap::CommandFactory;
use ringfsd::fuse::abi::Opcode;

const PAGE: &str = include_str!("../../docs/testing.md");

/// The first cells of the table below a heading.
fn rows(heading: &str) -> BTreeSet<String> {
    let section = PAGE.split(&format!("\n## {heading}\n")).nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    let cells = rows.flat_map(|row| row.split('|').nth(1).unwrap().split(", "));
    cells.map(|cell| cell.trim().to_owned()).collect()
}

#[test]
fn testing_page_has_a_row_for_each_operation() {
    let plain = |name: String| name.replace('_', "").to_uppercase();
    let documented: BTreeSet<_> = rows("Operations of FUSE").into_iter().map(plain).collect();
    let opcodes = Opcode::ALL
        .iter()
        .map(|opcode| plain(format!("{opcode:?}")));
    assert_eq!(documented, opcodes.collect());
}

#[test]
fn testing_page_has_a_row_for_each_message() {
    let source = include_str!("../../integration/vmm/src/connection/message.rs");
    let requests = source.split("pub mod request {").nth(1).unwrap();
    let requests = requests.split("\n}").next().unwrap();
    let names = requests.lines().filter_map(|line| {
        let constant = line.trim().strip_prefix("pub const ")?;
        Some(constant.split(':').next()?.to_owned())
    });
    assert_eq!(rows("Messages of vhost-user"), names.collect());
}

#[test]
fn testing_page_has_a_row_for_each_heading_of_options() {
    let options = ringfsd::cli::Options::command();
    let headings = options.get_arguments().filter_map(|a| a.get_help_heading());
    let headings: BTreeSet<_> = headings.map(str::to_owned).collect();
    assert_eq!(rows("Options"), headings);
}

#[test]
fn testing_page_names_tests_and_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let suite = root.join("tests/suite");
    let mut found = 0;
    for name in PAGE.split('`').skip(1).step_by(2) {
        let words = name.split("::").all(|part| {
            !part.is_empty()
                && part
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || "_0123456789".contains(c))
        });
        if name.starts_with("tests/")
            || name.starts_with("integration/")
            || name.starts_with("src/")
        {
            let exists = name.contains('*') || root.join(name).exists();
            assert!(exists, "there is no {name}");
        } else if words && name != "uring" && name != "chroot" && name != "ptrace" {
            let parts: Vec<_> = name.split("::").collect();
            let module = suite.join(format!("{}.rs", parts.join("/")));
            let parent = suite.join(format!("{}.rs", parts[..parts.len() - 1].join("/")));
            let is_test = std::fs::read_to_string(parent)
                .is_ok_and(|text| text.contains(&format!("fn {}(", parts[parts.len() - 1])));
            assert!(module.exists() || is_test, "there is no test {name}");
        } else {
            continue;
        }
        found += 1;
    }
    assert!(found > 100, "only {found} names: is the search right?");
}
