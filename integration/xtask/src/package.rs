//! The packages, and the texts that they contain.
//!
//! The invariant: what is packaged is the release build, less its debug information.

use std::path::PathBuf;

use crate::Repository;
use crate::command::{Failed, Step};
use crate::tools;

pub(crate) fn run(repository: &Repository, rest: &[String]) -> Result<(), Failed> {
    let rest: Vec<_> = rest.iter().map(String::as_str).collect();
    match rest[..] {
        [] => build(repository),
        ["texts"] => repository
            .cargo(&["run", "--quiet", "--package", "ringfsd-package"])
            .run(),
        ["check"] => {
            build(repository)?;
            repository
                .cargo(&["build", "--locked", "--package", "ringfsd-vmm"])
                .args(["--example", "session"])
                .run()?;
            repository.script("integration/package/check.sh", &[]).run()
        }
        _ => Err(Failed::Usage("only `texts` and `check` are known".into())),
    }
}

fn build(repository: &Repository) -> Result<(), Failed> {
    repository
        .cargo(&["build", "--release", "--locked"])
        .run()?;
    let system = |program: &str| Step::new(PathBuf::from(program), &repository.0);
    system("mkdir").args(["-p", "target/package"]).run()?;
    system("strip")
        .args(["--strip-debug", "-o", "target/package/ringfsd"])
        .arg("target/release/ringfsd")
        .run()?;
    tools::build_packages(repository)
}
