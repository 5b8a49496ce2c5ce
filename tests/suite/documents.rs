//! Pages of `docs` compared with the code: `testing.md` says of each operation, message and heading of
//! the options where it is tested; all pages name files and tests that exist; `sandbox.md` names each
//! system call that is allowed.

use std::collections::BTreeSet;
use std::path::Path;

use clap::CommandFactory;
use ringfsd::internals::fuse::abi::Opcode;

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
    let options = ringfsd::internals::cli::Options::command();
    let headings = options.get_arguments().filter_map(|a| a.get_help_heading());
    let headings: BTreeSet<_> = headings.map(str::to_owned).collect();
    assert_eq!(rows("Options"), headings);
}

/// Whether a function of `text` is a test, and not only called by one.
fn is_test(text: &str, name: &str) -> bool {
    let before = text.split(&format!("fn {name}(")).next().unwrap();
    let attributes = before.rsplit("}\n").next().unwrap();
    before.len() < text.len()
        && ["#[test]", "#[each_runtime]"]
            .iter()
            .any(|attribute| attributes.contains(attribute))
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
        } else if words
            && name != "uring"
            && name != "tokio_uring"
            && name != "chroot"
            && name != "ptrace"
        {
            let parts: Vec<_> = name.split("::").collect();
            let module = suite.join(format!("{}.rs", parts.join("/")));
            let parent = suite.join(format!("{}.rs", parts[..parts.len() - 1].join("/")));
            let text = std::fs::read_to_string(parent).unwrap_or_default();
            let is_test = is_test(&text, parts[parts.len() - 1]);
            assert!(module.exists() || is_test, "there is no test {name}");
        } else {
            continue;
        }
        found += 1;
    }
    assert!(found > 100, "only {found} names: is the search right?");
}

/// All files below `dir`, except what builds leave.
fn files_below(dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            found.push(path.to_str().unwrap().to_owned());
        } else if !path.ends_with("target") {
            files_below(&path, found);
        }
    }
}

#[test]
fn pages_name_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src", "tests", "integration", "docs", ".cargo"] {
        files_below(&root.join(dir), &mut files);
    }
    files.push(root.join("README.md").to_str().unwrap().to_owned());
    let pages = files.iter().filter(|path| path.ends_with(".md"));
    let (mut named, mut missing) = (0, Vec::new());
    for page in pages {
        let text = std::fs::read_to_string(page).unwrap();
        // Code spans, and targets of links.
        // `quick-starts.md` names files of the launchers' sources.
        let spans = text.split('`').skip(1).step_by(2);
        let spans = spans.filter(|_| !page.ends_with("/quick-starts.md"));
        let links = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', '#']).next());
        for name in spans.chain(links) {
            let is_path = name.contains('/') && !name.contains([' ', '*', '<', ':', '\n']);
            let is_ours = [".rs", ".sh", ".md"].iter().any(|end| name.ends_with(end));
            let is_absolute = name.starts_with('/');
            let is_recipe = name.contains("NAME") || name.starts_with("name/");
            if !is_ours || is_absolute || is_recipe || !(is_path || name.ends_with(".md")) {
                continue;
            }
            named += 1;
            let end = format!("/{}", name.trim_start_matches("../"));
            if !files.iter().any(|file| file.ends_with(&end)) {
                missing.push(format!("{page}: {name}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(named > 100, "only {named} names: is the search right?");
}

#[test]
fn sandbox_page_names_each_allowed_system_call() {
    let list = include_str!("../../src/sandbox/syscall_allowlist.rs");
    let page = include_str!("../../docs/sandbox.md");
    let spans: BTreeSet<_> = page
        .split('`')
        .skip(1)
        .step_by(2)
        .flat_map(str::split_whitespace)
        .collect();
    let calls = list.split("libc::SYS_").skip(1);
    let calls: Vec<_> = calls
        .filter_map(|rest| {
            rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .next()
        })
        .collect();
    assert!(
        calls.len() > 80,
        "only {}: is the search right?",
        calls.len()
    );
    for call in calls {
        assert!(spans.contains(call), "docs/sandbox.md doesn't name {call}");
    }
}
