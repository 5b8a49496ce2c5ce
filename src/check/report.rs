//! The report of `ringfsd check`: its data, as text and as JSON.
//!
//! The invariant: both have the same content.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use serde::Serialize;

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub(super) would_start: bool,
    /// Why the server wouldn't start.
    pub(super) failure: Option<String>,
    /// What the server would log, and a rehearsal has.
    pub(super) log: Vec<Record>,
    pub(super) host: Vec<Finding>,
    pub(super) directories: Vec<Directory>,
}

/// A record of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Record {
    pub(super) level: String,
    pub(super) text: String,
}

/// What was found out about a directory.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) findings: Vec<Finding>,
}

/// Whether something is supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Support {
    Yes,
    No,
    /// There is something to know about it.
    Note,
    /// It can't be found out.
    Unknown,
}

/// Something that was tested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) name: &'static str,
    pub(super) support: Support,
    /// What was found, or the reason.
    pub(super) detail: String,
    /// What follows for the options of the server.
    pub(super) advice: Option<String>,
}

impl Record {
    /// Parses a line: the level, a space, the text.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (level, text) = line.split_once(' ')?;
        Some(Self {
            level: level.to_owned(),
            text: text.to_owned(),
        })
    }
}

impl Finding {
    pub(super) fn new(name: &'static str, support: Support, detail: impl Into<String>) -> Self {
        Self {
            name,
            support,
            detail: detail.into(),
            advice: None,
        }
    }

    pub(super) fn yes(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Support::Yes, detail)
    }

    pub(super) fn no(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Support::No, detail)
    }

    pub(super) fn note(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Support::Note, detail)
    }

    pub(super) fn unknown(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Support::Unknown, detail)
    }

    pub(super) fn advising(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

impl Report {
    /// Whether the server would start.
    #[must_use]
    pub fn would_start(&self) -> bool {
        self.would_start
    }

    /// The report as JSON.
    #[must_use]
    pub fn json(&self) -> String {
        // Paths that aren't UTF-8 have no representation.
        serde_json::to_string_pretty(self)
            .unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }).to_string())
    }
}

/// The columns of the text, of the names, and of the names with the support.
const WIDTH: usize = 100;
const NAMES: usize = 22;
const INDENT: usize = NAMES + 10;

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write_findings(f, "Host", &self.host)?;
        for Directory { path, findings } in &self.directories {
            writeln!(f)?;
            write_findings(f, &format!("Directory {}", path.display()), findings)?;
        }
        writeln!(f)?;
        if !self.log.is_empty() {
            writeln!(f, "The start would log")?;
            for Record { level, text } in &self.log {
                write!(f, "  {level:<6} ")?;
                write_wrapped(f, text, 9)?;
            }
            writeln!(f)?;
        }
        match &self.failure {
            None => writeln!(f, "The server would start."),
            Some(reason) => {
                writeln!(f, "The server would NOT start:")?;
                write!(f, "  ")?;
                write_wrapped(f, reason, 2)
            }
        }
    }
}

fn write_findings(f: &mut Formatter<'_>, heading: &str, findings: &[Finding]) -> fmt::Result {
    writeln!(f, "{heading}")?;
    for finding in findings {
        let support = match finding.support {
            Support::Yes => "yes",
            Support::No => "no",
            Support::Note => "note",
            Support::Unknown => "unknown",
        };
        write!(f, "  {:<width$}{support:<8}", finding.name, width = NAMES)?;
        write_wrapped(f, &finding.detail, INDENT)?;
        if let Some(advice) = &finding.advice {
            write!(f, "{:INDENT$}-> ", "")?;
            write_wrapped(f, advice, INDENT + 3)?;
        }
    }
    Ok(())
}

/// Writes words up to the width, the first of them where the line stands, which is at `indent`.
fn write_wrapped(f: &mut Formatter<'_>, text: &str, indent: usize) -> fmt::Result {
    let mut column = indent;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > indent && column + 1 + length > WIDTH {
            write!(f, "\n{:indent$}", "")?;
            column = indent;
        }
        if column > indent {
            write!(f, " ")?;
            column += 1;
        }
        write!(f, "{word}")?;
        column += length;
    }
    writeln!(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(failure: Option<&str>) -> Report {
        Report {
            would_start: failure.is_none(),
            failure: failure.map(str::to_owned),
            log: vec![Record::parse("warn it is late").unwrap()],
            host: vec![Finding::no("io_uring", "word ".repeat(40)).advising("--runtime tokio")],
            directories: Vec::new(),
        }
    }

    #[test]
    fn text_is_aligned_and_stays_within_its_width() {
        let text = report(None).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH));
        let (head, tail) = lines[1].split_at(INDENT);
        assert_eq!(head.trim_end(), "  io_uring              no");
        assert!(tail.starts_with("word"));
        assert!(lines[2].starts_with(&format!("{:INDENT$}word", "")));
        assert!(text.contains("-> --runtime tokio\n"));
        assert!(text.contains("  warn   it is late\n"));
        assert!(text.ends_with("The server would start.\n"));
    }

    #[test]
    fn json_has_reason_and_findings() {
        let json: serde_json::Value = serde_json::from_str(&report(Some("no")).json()).unwrap();
        assert_eq!(json["would_start"], false);
        assert_eq!(json["failure"], "no");
        assert_eq!(json["host"][0]["support"], "no");
        assert_eq!(json["host"][0]["advice"], "--runtime tokio");
    }
}
