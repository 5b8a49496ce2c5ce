//! Options of the heading Limits: how much a guest may ask for, and how much it may store.

use std::num::NonZeroU64;

use clap::Args;

use super::size::size;
use crate::config::SpaceLimit;
use crate::limits::{Rate, Settings};

/// How much a guest may ask for, and how much it may store.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Maximum operations a second; may be repeated
    ///
    /// LIMIT is [KIND=]N[,burst=M]. KIND is all (default), read, write or metadata, and each may have
    /// a limit: a request meets that of its kind and that of all. Requests beyond it wait; none
    /// fails. After a pause up to M requests are served at once: by default as many as in 50 ms, and
    /// never fewer than in 5 ms. What releases files and inodes is never held back. N = 0 sets no
    /// limit.
    #[arg(long, value_name = "LIMIT", value_parser = operations)]
    pub limit_iops: Vec<OperationLimit>,

    /// Maximum bytes read and written a second; may be repeated
    ///
    /// LIMIT is [KIND=]BYTES[,burst=M], as for --limit-iops. KIND is all (default), read or write.
    /// BYTES and M may have a unit: K, M, G or T, as in 100M. A request that is larger than M is
    /// served when M bytes may be, and the next ones wait for the rest too. What a guest maps by DAX
    /// isn't counted.
    #[arg(long, value_name = "LIMIT", value_parser = bandwidth)]
    pub limit_bandwidth: Vec<BandwidthLimit>,

    /// Maximum space the directory may take
    ///
    /// LIMIT is BYTES[,inodes=N]. The directory gets a project quota of its file system, and the
    /// guest's file system has that size: `df` shows it. The file system needs project quotas (ext4:
    /// mkfs.ext4 -O quota,project, mount -o prjquota; XFS: mount -o prjquota), and the server
    /// CAP_SYS_ADMIN at its start. BYTES may have a unit: K, M, G or T. N limits the number of files
    /// and directories.
    #[arg(long, value_name = "LIMIT", value_parser = space)]
    pub limit_space: Option<SpaceLimit>,
}

/// What a limit of operations applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operations {
    All,
    Read,
    Write,
    Metadata,
}

/// What a limit of bytes applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    All,
    Read,
    Write,
}

/// One limit of operations a second; without a rate it lifts an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationLimit(Operations, Option<Rate>);

/// One limit of bytes a second; without a rate it lifts an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BandwidthLimit(Bytes, Option<Rate>);

impl Limits {
    /// The limits of what a guest may ask for. A later limit of the same kind replaces an earlier
    /// one.
    pub(super) fn settings(&self) -> Settings {
        settings(&self.limit_iops, &self.limit_bandwidth)
    }
}

/// The settings that options say. A later limit of the same kind replaces an earlier one.
pub(super) fn settings(
    of_operations: &[OperationLimit],
    of_bandwidth: &[BandwidthLimit],
) -> Settings {
    let mut settings = Settings::default();
    for OperationLimit(of, rate) in of_operations {
        *match of {
            Operations::All => &mut settings.operations,
            Operations::Read => &mut settings.reads,
            Operations::Write => &mut settings.writes,
            Operations::Metadata => &mut settings.metadata,
        } = *rate;
    }
    for BandwidthLimit(of, rate) in of_bandwidth {
        *match of {
            Bytes::All => &mut settings.bytes,
            Bytes::Read => &mut settings.bytes_read,
            Bytes::Write => &mut settings.bytes_written,
        } = *rate;
    }
    settings
}

/// Parses `[KIND=]N[,burst=M]`.
pub(super) fn operations(text: &str) -> Result<OperationLimit, String> {
    let (kind, rate) = rate(text, number)?;
    let of = match kind {
        None | Some("all") => Operations::All,
        Some("read") => Operations::Read,
        Some("write") => Operations::Write,
        Some("metadata") => Operations::Metadata,
        Some(kind) => return Err(format!("{kind:?} is not all, read, write or metadata")),
    };
    Ok(OperationLimit(of, rate))
}

/// Parses `[KIND=]BYTES[,burst=M]`.
pub(super) fn bandwidth(text: &str) -> Result<BandwidthLimit, String> {
    let (kind, rate) = rate(text, size)?;
    let of = match kind {
        None | Some("all") => Bytes::All,
        Some("read") => Bytes::Read,
        Some("write") => Bytes::Write,
        Some(kind) => return Err(format!("{kind:?} is not all, read or write")),
    };
    Ok(BandwidthLimit(of, rate))
}

/// Parses a rate with numbers that `number` parses, and the kind before it.
fn rate(
    text: &str,
    number: impl Fn(&str) -> Result<u64, String>,
) -> Result<(Option<&str>, Option<Rate>), String> {
    let (first, burst) = match text.split_once(',') {
        Some((first, rest)) => {
            let burst = rest.strip_prefix("burst=");
            (
                first,
                Some(burst.ok_or("expected burst= behind the comma")?),
            )
        }
        None => (text, None),
    };
    let (kind, per_second) = match first.split_once('=') {
        Some((kind, per_second)) => (Some(kind), per_second),
        None => (None, first),
    };
    let per_second = number(per_second)?;
    let burst = burst.map(number).transpose()?;
    if burst == Some(0) {
        return Err("a burst of 0 would let nothing pass".to_owned());
    }
    let rate = NonZeroU64::new(per_second).map(|per_second| Rate {
        per_second,
        burst: burst.and_then(NonZeroU64::new),
    });
    Ok((kind, rate))
}

fn number(text: &str) -> Result<u64, String> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| is_number);
    number.ok_or_else(|| "expected a number, such as 1000".to_owned())
}

/// Parses `BYTES[,inodes=N]`.
fn space(text: &str) -> Result<SpaceLimit, String> {
    let (bytes, inodes) = match text.split_once(',') {
        Some((bytes, rest)) => {
            let inodes = rest.strip_prefix("inodes=");
            let inodes = number(inodes.ok_or("expected inodes= behind the comma")?)?;
            let inodes = NonZeroU64::new(inodes).ok_or("the directory itself is an inode")?;
            (bytes, Some(inodes))
        }
        None => (text, None),
    };
    let bytes = NonZeroU64::new(size(bytes)?).ok_or("a limit of 0 would let nothing be stored")?;
    Ok(SpaceLimit { bytes, inodes })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Options;

    fn limits(arguments: &[&str]) -> Result<Limits, clap::Error> {
        let required = ["ringfsd", "--fd=3", "--shared-dir=/d"];
        let options = Options::try_parse_from(required.iter().chain(arguments))?;
        Ok(options.limits)
    }

    fn rate(per_second: u64, burst: u64) -> Option<Rate> {
        Some(Rate {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst),
        })
    }

    #[test]
    fn limits_are_set_by_kind_and_the_last_one_wins() {
        let settings = limits(&[
            "--limit-iops=1000",
            "--limit-iops=read=5,burst=7",
            "--limit-iops=write=8",
            "--limit-iops=metadata=9,burst=1",
            "--limit-iops=write=0",
            "--limit-bandwidth=all=100M",
            "--limit-bandwidth",
            "read=1G,burst=64K",
            "--limit-bandwidth=write=1",
            "--limit-bandwidth=write=2k",
        ]);
        let expected = Settings {
            operations: rate(1000, 0),
            reads: rate(5, 7),
            writes: None,
            metadata: rate(9, 1),
            bytes: rate(100 << 20, 0),
            bytes_read: rate(1 << 30, 64 << 10),
            bytes_written: rate(2048, 0),
        };
        assert_eq!(settings.unwrap().settings(), expected);
        assert!(limits(&[]).unwrap().settings().is_empty());
    }

    #[test]
    fn space_is_bytes_and_inodes() {
        let space = |text| limits(&["--limit-space", text]).map(|limits| limits.limit_space);
        let expected = SpaceLimit {
            bytes: NonZeroU64::new(10 << 30).unwrap(),
            inodes: NonZeroU64::new(1000),
        };
        assert_eq!(space("10G,inodes=1000").unwrap(), Some(expected));
        assert_eq!(space("4096").unwrap().unwrap().inodes, None);
        for bad in ["", "0", "10G,", "10G,inodes=0", "10G,files=1", "ten"] {
            assert!(space(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn malformed_limits_are_refused() {
        for bad in [
            "--limit-iops=",
            "--limit-iops=10k",
            "--limit-iops=+1",
            "--limit-iops=bytes=1",
            "--limit-iops=1,2",
            "--limit-iops=1,burst=0",
            "--limit-bandwidth=metadata=1",
            "--limit-bandwidth=1,burst=",
            "--limit-bandwidth=1 M",
        ] {
            assert_eq!(limits(&[bad]).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
