//! `cargo xtask`: the tasks of a developer, each one command.
//!
//! A task runs commands that a developer could type, and prints each of them before it runs. The
//! invariant: the first command that fails ends the task with exit status 1.

mod command;
mod package;
mod tools;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use command::{Failed, Step, cargo};

/// A task: its name, its arguments, one line of help, and what it does.
struct Task {
    name: &'static str,
    arguments: &'static str,
    help: &'static str,
    run: fn(&Repository, &[String]) -> Result<(), Failed>,
}

const TASKS: &[Task] = &[
    Task {
        name: "check",
        arguments: "",
        help: "formatting, lints, unit tests, dependencies between rooms: run it before each commit",
        run: check,
    },
    Task {
        name: "test",
        arguments: "NAME [FILTER...]",
        help: "one file of tests/ or tests/suite/, `lib`, `loom`, a package of integration/, or tests by name",
        run: test,
    },
    Task {
        name: "guest",
        arguments: "SUITE [OPTION...]",
        help: "a suite in a real guest: suite, upgrade, migrate, others; or demo, run",
        run: guest,
    },
    Task {
        name: "bench",
        arguments: "[servers] [OPTION...]",
        help: "benchmarks of the hot code; with `servers`, compares whole servers",
        run: bench,
    },
    Task {
        name: "fuzz",
        arguments: "SECONDS [TARGET...]",
        help: "fuzzes each target, or those named; needs a nightly compiler",
        run: fuzz,
    },
    Task {
        name: "docs",
        arguments: "[--open]",
        help: "the documentation of the code, with warnings as errors",
        run: docs,
    },
    Task {
        name: "tools",
        arguments: "[NAME...]",
        help: "spelling, unused dependencies, licences and sources: typos, machete, deny",
        run: tools::run,
    },
    Task {
        name: "package",
        arguments: "[texts|check]",
        help: "the Debian package and the RPM; `check` installs and runs one; `texts` makes the man pages",
        run: package::run,
    },
    Task {
        name: "gate",
        arguments: "[STEP...]",
        help: "everything that must pass before a change goes in: integration/test.sh",
        run: gate,
    },
];

/// The repository's root.
struct Repository(PathBuf);

impl Repository {
    fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }

    fn cargo(&self, arguments: &[&str]) -> Step {
        cargo(&self.0).args(arguments)
    }

    fn script(&self, path: &str, arguments: &[String]) -> Step {
        Step::new(self.join(path), &self.0).args(arguments)
    }
}

fn main() -> ExitCode {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let repository = Repository(repository.canonicalize().unwrap_or(repository));
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = arguments.split_first() else {
        print!("{}", usage());
        return ExitCode::SUCCESS;
    };
    if matches!(name.as_str(), "-h" | "--help" | "help") {
        print!("{}", usage());
        return ExitCode::SUCCESS;
    }
    let Some(task) = TASKS.iter().find(|task| task.name == name) else {
        eprint!("xtask: there is no task `{name}`\n\n{}", usage());
        return ExitCode::from(2);
    };
    match (task.run)(&repository, rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Usage(what)) => {
            eprintln!(
                "xtask: {what}\nusage: cargo xtask {name} {}",
                task.arguments
            );
            ExitCode::from(2)
        }
        Err(failed) => {
            eprintln!("xtask: {failed}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> String {
    let mut text = String::from("usage: cargo xtask TASK [ARGUMENT...]\n\n");
    let forms: Vec<_> = TASKS
        .iter()
        .map(|task| format!("{} {}", task.name, task.arguments))
        .collect();
    let width = forms.iter().map(String::len).max().unwrap_or(0);
    for (form, task) in forms.iter().zip(TASKS) {
        text += &format!("  {form:width$}  {}\n", task.help);
    }
    text
}

fn check(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    if !rest.is_empty() {
        return Err(Failed::Usage("check takes no arguments".into()));
    }
    repository.cargo(&["fmt", "--all", "--check"]).run()?;
    repository
        .cargo(&["clippy", "--workspace", "--all-targets", "--locked"])
        .args(["--", "-D", "warnings"])
        .run()?;
    repository
        .cargo(&["test", "--quiet", "--locked", "--lib", "--test", "rooms"])
        .run()
}

fn test(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    let Some((name, filter)) = rest.split_first() else {
        return Err(Failed::Usage("which test?".into()));
    };
    match name.as_str() {
        "lib" => repository
            .cargo(&["test", "--locked", "--lib", "--"])
            .args(filter)
            .run(),
        "loom" => loom(repository, filter),
        name if is_test_binary(repository, name) => repository
            .cargo(&["test", "--locked", "--test", name, "--"])
            .args(filter)
            .run(),
        name if is_module_of_suite(repository, name) => module_of_suite(repository, name, filter),
        name if repository
            .join("integration")
            .join(name)
            .join("Cargo.toml")
            .exists() =>
        {
            let manifest = repository.join("integration").join(name).join("Cargo.toml");
            repository
                .cargo(&["test", "--locked", "--manifest-path"])
                .arg(manifest)
                .arg("--")
                .args(filter)
                .run()
        }
        name => repository
            .cargo(&["test", "--workspace", "--locked", "--", name])
            .args(filter)
            .run(),
    }
}

/// Whether cargo finds a test of this name under `tests/`.
fn is_test_binary(repository: &Repository, name: &str) -> bool {
    let tests = repository.join("tests");
    tests.join(format!("{name}.rs")).is_file() || tests.join(name).join("main.rs").is_file()
}

/// Whether `tests/suite` has a module of this name.
fn is_module_of_suite(repository: &Repository, name: &str) -> bool {
    let module = repository.join("tests/suite").join(format!("{name}.rs"));
    name != "main" && module.is_file()
}

/// The tests of a module of `tests/suite`, those of them whose names contain any filter. The harness
/// runs what matches any of its own filters, so it is asked for the names first.
fn module_of_suite(repository: &Repository, name: &str, filter: &[String]) -> Result<(), Failed> {
    let suite = ["test", "--locked", "--test", "suite", "--"];
    if filter.is_empty() {
        return repository.cargo(&suite).arg(format!("{name}::")).run();
    }
    let listed = repository
        .cargo(&suite)
        .args([&format!("{name}::"), "--list", "--format", "terse"])
        .output()?;
    let tests: Vec<_> = listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|test| test.starts_with(&format!("{name}::")))
        .filter(|test| filter.iter().any(|part| test.contains(part.as_str())))
        .collect();
    if tests.is_empty() {
        let filter = filter.join("`, `");
        return Err(Failed::Usage(format!(
            "no test of `{name}` has `{filter}` in its name"
        )));
    }
    repository.cargo(&suite).arg("--exact").args(tests).run()
}

/// The module of the library's own loom models.
const LOOM_MODULE: &str = "loom_tests";

/// The loom models, in a build of their own where a warning is an error.
fn loom(repository: &Repository, filter: &[String]) -> Result<(), Failed> {
    for target in [["--test", "loom"].as_slice(), &["--lib", LOOM_MODULE]] {
        repository
            .cargo(&[
                "test",
                "--locked",
                "--release",
                "--target-dir",
                "target/loom",
            ])
            .args(target)
            .arg("--")
            .args(filter)
            .env("RUSTFLAGS", "--cfg ringfsd_loom -D warnings")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .run()?;
    }
    Ok(())
}

fn guest(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    const SUITES: [&str; 6] = ["suite", "upgrade", "migrate", "others", "demo", "run"];
    let Some((suite, options)) = rest.split_first() else {
        return Err(Failed::Usage("which suite?".into()));
    };
    if !SUITES.contains(&suite.as_str()) {
        return Err(Failed::Usage(format!(
            "there is no suite `{suite}`, only {}",
            SUITES.join(", ")
        )));
    }
    repository.script("integration/guest/setup.sh", &[]).run()?;
    repository
        .cargo(&["build", "--release", "--locked"])
        .run()?;
    repository
        .script(&format!("integration/guest/{suite}.sh"), options)
        .run()
}

fn bench(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    match rest.split_first() {
        Some((first, options)) if first == "servers" => repository
            .script("integration/load/compare.sh", options)
            .run(),
        _ => repository
            .cargo(&["bench", "--locked", "--bench", "hot_rooms", "--"])
            .args(rest)
            .run(),
    }
}

fn fuzz(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    if rest.is_empty() {
        return Err(Failed::Usage("for how many seconds?".into()));
    }
    repository.script("integration/fuzz/run.sh", rest).run()
}

fn docs(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    repository
        .cargo(&["doc", "--workspace", "--no-deps", "--locked"])
        .args(rest)
        .env("RUSTDOCFLAGS", "-D warnings")
        .run()
}

fn gate(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    repository.script("integration/test.sh", rest).run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_has_one_line_for_each_task() {
        let usage = usage();
        for task in TASKS {
            let lines = usage
                .lines()
                .filter(|line| line.trim_start().starts_with(&format!("{} ", task.name)));
            assert_eq!(lines.count(), 1, "{}", task.name);
        }
    }

    /// A filter that matches no test would pass.
    #[test]
    fn loom_module_exists() {
        let repository = Repository(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
        let parent = repository.join("src/virtqueue/used/mod.rs");
        let source = std::fs::read_to_string(parent).unwrap();
        assert!(source.contains(&format!("mod {LOOM_MODULE};")));
    }

    #[test]
    fn each_script_named_exists() {
        let repository = Repository(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
        let source = include_str!("main.rs");
        let scripts: Vec<_> = source
            .split('"')
            .filter(|text| text.starts_with("integration/") && text.ends_with(".sh"))
            .filter(|text| !text.contains('{'))
            .collect();
        assert!(scripts.len() >= 4, "{scripts:?}");
        for script in scripts {
            assert!(repository.join(script).is_file(), "{script}");
        }
    }
}
