//! Checks by tools that don't come with Rust, which are installed into `target/tools` if missing.
//!
//! The invariant: each tool has a fixed version here, so a newer one can't fail an unrelated change.

use crate::command::{Failed, Step};
use crate::{Repository, cargo};

/// A tool: the crate that contains it, and how it is run.
struct Tool {
    name: &'static str,
    package: &'static str,
    version: &'static str,
    program: &'static str,
    arguments: &'static [&'static str],
}

const TOOLS: &[Tool] = &[
    Tool {
        name: "typos",
        package: "typos-cli",
        version: "1.52.0",
        program: "typos",
        arguments: &["--config", ".typos.toml"],
    },
    Tool {
        name: "machete",
        package: "cargo-machete",
        version: "0.9.2",
        program: "cargo-machete",
        arguments: &["--with-metadata", "."],
    },
    Tool {
        name: "deny",
        package: "cargo-deny",
        version: "0.20.2",
        program: "cargo-deny",
        // Advisories are in a repository that a machine without a network can't fetch.
        arguments: &[
            "--workspace",
            "--locked",
            "--config",
            ".cargo/deny.toml",
            "check",
            "bans",
            "licenses",
            "sources",
        ],
    },
];

/// Tools that build packages.
const PACKAGERS: &[Tool] = &[
    Tool {
        name: "deb",
        package: "cargo-deb",
        version: "3.8.0",
        program: "cargo-deb",
        arguments: &[
            "--no-build",
            "--no-strip",
            "--output",
            "target/package/ringfsd.deb",
        ],
    },
    Tool {
        name: "rpm",
        package: "cargo-generate-rpm",
        version: "0.21.1",
        program: "cargo-generate-rpm",
        arguments: &["--output", "target/package/ringfsd.rpm"],
    },
];

/// Builds packages of what has been compiled.
pub(crate) fn build_packages(repository: &Repository) -> Result<(), Failed> {
    PACKAGERS
        .iter()
        .try_for_each(|tool| run_tool(repository, tool))
}

fn run_tool(repository: &Repository, tool: &Tool) -> Result<(), Failed> {
    install(repository, tool)?;
    let program = repository.join("target/tools/bin").join(tool.program);
    Step::new(program, &repository.0).args(tool.arguments).run()
}

pub(crate) fn run(repository: &Repository, names: &[String]) -> Result<(), Failed> {
    if let Some(unknown) = names
        .iter()
        .find(|name| TOOLS.iter().all(|tool| tool.name != *name))
    {
        return Err(Failed::Usage(format!("there is no tool `{unknown}`")));
    }
    for tool in TOOLS {
        if names.is_empty() || names.iter().any(|name| name == tool.name) {
            run_tool(repository, tool)?;
        }
    }
    Ok(())
}

/// Installs a tool unless this version of it is installed; to find that out takes no network. It is
/// built without optimization: that halves the time, and the tools are run once.
fn install(repository: &Repository, tool: &Tool) -> Result<(), Failed> {
    let Tool {
        package, version, ..
    } = tool;
    cargo(&repository.0)
        .args(["install", "--quiet", "--locked", "--debug"])
        .args([
            "--root",
            "target/tools",
            "--version",
            &format!("={version}"),
        ])
        .arg(package)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .run()
}
