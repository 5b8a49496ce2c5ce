//! Options of the heading Caching that concern DAX: the window, and which files are mapped.

use clap::{Args, ValueEnum};

use super::size::size;
use crate::dax::{NamePattern, RANGE};

/// The files that are marked for DAX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum MarkedFiles {
    /// All regular files.
    Always,
    /// Those that are large enough.
    #[default]
    Inode,
    /// None.
    Never,
}

/// The DAX window.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Caching")]
pub struct Dax {
    /// Size of the window in which the guest maps files (DAX)
    ///
    /// The guest then reads and writes the host's page cache without requests and without a copy of
    /// its own. A number of bytes, or with K, M, G or T; a multiple of 2M. The VMM must support the
    /// vhost-user protocol feature SHMEM, and the guest's kernel DAX. Without this option there is
    /// no window.
    #[arg(long, value_name = "SIZE", value_parser = window)]
    pub dax_window: Option<u64>,

    /// What the guest maps: always, inode or never
    ///
    /// A guest that mounts with -o dax=always maps all files, and one that mounts with -o dax=never
    /// none. Any other follows this option:
    ///
    /// - always: all regular files
    /// - inode: those of --dax-min-size and more
    /// - never: none
    #[arg(
        long,
        value_name = "WHICH",
        value_enum,
        ignore_case = true,
        default_value_t,
        hide_possible_values = true,
        requires = "dax_window",
        verbatim_doc_comment
    )]
    pub dax: MarkedFiles,

    /// Size from which a file is mapped with --dax inode
    ///
    /// A Linux guest uses 2M of the window even for a small file, so mapping pays off for files that
    /// are not much smaller.
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = size,
        default_value = "1M",
        requires = "dax_window"
    )]
    pub dax_min_size: u64,

    /// Names of files that are mapped; repeatable
    ///
    /// With --dax always or inode only files are mapped whose name, without its directory, matches
    /// one of these patterns, for example '*.{gguf,safetensors}'. A pattern has * for any characters,
    /// ? for one, [...] for one of these, and {...,...} for alternatives. By default all names match.
    #[arg(long, value_name = "PATTERN", requires = "dax_window")]
    pub dax_include: Vec<NamePattern>,

    /// Names of files that are not mapped; repeatable
    ///
    /// Takes precedence over --dax-include.
    #[arg(long, value_name = "PATTERN", requires = "dax_window")]
    pub dax_exclude: Vec<NamePattern>,

    /// Map by FS_MAP under a VMM without SHMEM
    ///
    /// VMMs had these requests before vhost-user got SHMEM. Their numbers now mean other requests, so
    /// they are sent only with this option, and only to a VMM that hasn't accepted SHMEM. Such a VMM
    /// has its own setting for the size of the window: set both to the same.
    #[arg(long, requires = "dax_window")]
    pub dax_fs_map: bool,
}

impl Dax {
    /// The smallest size of files that are marked.
    pub(super) fn marked_from(&self) -> u64 {
        match self.dax {
            MarkedFiles::Always => 0,
            MarkedFiles::Inode => self.dax_min_size,
            MarkedFiles::Never => u64::MAX,
        }
    }
}

/// Parses the size of the window.
fn window(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err("the window can't be empty".to_owned()),
        // More than processors have addresses.
        size if size > 1 << 46 => Err("the window can't be larger than 64T".to_owned()),
        size if !size.is_multiple_of(RANGE) => Err("expected a multiple of 2M".to_owned()),
        size => Ok(size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_has_whole_ranges() {
        assert_eq!(window("8G"), Ok(8 << 30));
        assert_eq!(window("2097152"), Ok(RANGE));
        for bad in ["0", "1M", "3M", "65T", "-2M", "window"] {
            assert!(window(bad).is_err(), "{bad}");
        }
    }
}
