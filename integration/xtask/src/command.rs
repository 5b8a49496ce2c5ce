//! One command of a task.
//!
//! The invariant: each command is printed before it runs, so that a developer can repeat it alone.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why a task has failed.
#[derive(Debug)]
pub(crate) enum Failed {
    /// The task was called with arguments that it doesn't have.
    Usage(String),
    /// A command couldn't be started.
    Start(String, std::io::Error),
    /// A command ended with a status other than success.
    Status(String),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) => f.write_str(what),
            Self::Start(command, error) => write!(f, "can't run {command}: {error}"),
            Self::Status(command) => write!(f, "failed: {command}"),
        }
    }
}

/// A command that is run in the repository's root.
pub(crate) struct Step(Command);

/// The cargo that runs this program.
pub(crate) fn cargo(root: &Path) -> Step {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Step::new(PathBuf::from(cargo), root)
}

impl Step {
    pub(crate) fn new(program: PathBuf, root: &Path) -> Self {
        let mut command = Command::new(program);
        command.current_dir(root);
        Self(command)
    }

    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.0.arg(argument);
        self
    }

    pub(crate) fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, arguments: I) -> Self {
        self.0.args(arguments);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.0.env(name, value);
        self
    }

    /// Runs it to its end, and returns what it has written to its standard output.
    pub(crate) fn output(mut self) -> Result<String, Failed> {
        self.0.stdout(Stdio::piped());
        let line = self.to_string();
        eprintln!("$ {line}");
        match self.0.output() {
            Ok(output) if output.status.success() => {
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            }
            Ok(output) => {
                eprint!("{}", String::from_utf8_lossy(&output.stderr));
                Err(Failed::Status(line))
            }
            Err(error) => Err(Failed::Start(line, error)),
        }
    }

    /// Runs it to its end.
    pub(crate) fn run(mut self) -> Result<(), Failed> {
        let line = self.to_string();
        eprintln!("$ {line}");
        match self.0.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(_) => Err(Failed::Status(line)),
            Err(error) => Err(Failed::Start(line, error)),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.0.get_envs() {
            if let Some(value) = value {
                write!(f, "{}='{}' ", name.display(), value.display())?;
            }
        }
        let program = Path::new(self.0.get_program());
        let name = program.file_name().unwrap_or(program.as_os_str());
        write!(f, "{}", name.display())?;
        for argument in self.0.get_args() {
            write!(f, " {}", argument.display())?;
        }
        Ok(())
    }
}
