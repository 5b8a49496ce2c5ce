//! What follows the names of a request that makes an inode: security label and group.
//!
//! Where the header counts extensions they are its last bytes; Linux before 6.3 doesn't count
//! a label. The invariant: of each sort there is at most one, in either order, and every
//! byte that is told is accounted for.

use zerocopy::FromBytes;

use super::Fault;
use super::arguments::{Arguments, id};
use crate::fs::Label;
use crate::fuse::abi::{
    EXT_GROUPS, EXT_UNIT, ExtHeader, MAX_SECURITY_CONTEXTS, Secctx, SuppGroups,
};

/// What a label's name begins with: what else is an extended attribute is none.
const NAMESPACE: &[u8] = b"security.";

/// Longest label, bytes: that of an extended attribute (`XATTR_SIZE_MAX`).
const LABEL_MAX: usize = 65_536;

/// Longest extensions of a request: a label with its name, a group, and what is around them.
pub(super) const EXTENSIONS_MAX: usize = LABEL_MAX + 1024;

/// What extensions say.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extensions<'a> {
    pub(super) label: Option<Label<'a>>,
    pub(super) group: Option<u32>,
}

impl<'a> Extensions<'a> {
    /// Takes `bytes` apart, one record after the other.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Fault> {
        let mut all = Self::default();
        let mut rest = bytes;
        let (mut labels, mut groups) = (false, false);
        while !rest.is_empty() {
            let (header, _) = ExtHeader::read_from_prefix(rest).or(Err(Fault::Extensions))?;
            let len = usize::try_from(header.size).or(Err(Fault::Extensions))?;
            let record = rest
                .get(size_of::<ExtHeader>()..len)
                .ok_or(Fault::Extensions)?;
            match header.kind {
                // The number of labels stands where other records have their sort.
                count @ 0..=MAX_SECURITY_CONTEXTS if !labels => {
                    all.label = label(count, record)?;
                    labels = true;
                }
                EXT_GROUPS if !groups => {
                    all.group = group(record)?;
                    groups = true;
                }
                _ => return Err(Fault::Extensions),
            }
            let padded = len.next_multiple_of(EXT_UNIT).min(rest.len());
            rest = rest.get(padded..).unwrap_or_default();
        }
        Ok(all)
    }
}

/// A guest's kernel has at most one label for an inode.
fn label(count: u32, record: &[u8]) -> Result<Option<Label<'_>>, Fault> {
    let mut record = Arguments(record);
    let label = match count {
        0 => None,
        1 => {
            let fixed: Secctx = take(&mut record)?;
            let name = record.xattr_name().or(Err(Fault::Extensions))?;
            if !name.to_bytes().starts_with(NAMESPACE) {
                return Err(Fault::Extensions);
            }
            let len = usize::try_from(fixed.size).unwrap_or(usize::MAX);
            if len > LABEL_MAX {
                return Err(Fault::Extensions);
            }
            let value = record.bytes(len).or(Err(Fault::Extensions))?;
            Some(Label { name, value })
        }
        _ => return Err(Fault::Extensions),
    };
    no_more(record)?;
    Ok(label)
}

/// It names at most one group: the directory's, if the caller is in that besides his own.
fn group(record: &[u8]) -> Result<Option<u32>, Fault> {
    let mut record = Arguments(record);
    let group = match take::<SuppGroups>(&mut record)?.nr_groups {
        0 => None,
        1 => Some(id(take(&mut record)?)?),
        _ => return Err(Fault::Extensions),
    };
    no_more(record)?;
    Ok(group)
}

fn take<T: FromBytes>(record: &mut Arguments<'_>) -> Result<T, Fault> {
    record.take().or(Err(Fault::Extensions))
}

/// Only what fills a record up may be left.
fn no_more(record: Arguments<'_>) -> Result<(), Fault> {
    if record.0.len() < EXT_UNIT {
        Ok(())
    } else {
        Err(Fault::Extensions)
    }
}
