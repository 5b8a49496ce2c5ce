//! The extensions behind the names of a request that creates an inode: security label and group.
//!
//! If the header counts extensions, they are the last bytes of the request. Linux before 6.3
//! doesn't count a label. The invariant: there is at most one extension of each kind, in either
//! order, and every counted byte belongs to one.

use zerocopy::FromBytes;

use super::Fault;
use super::arguments::{Arguments, id};
use crate::fs::Label;
use crate::fuse::abi::{
    EXT_GROUPS, EXT_UNIT, ExtHeader, MAX_SECURITY_CONTEXTS, Secctx, SuppGroups,
};

/// The prefix of a label's name; other extended attributes are not labels.
const NAMESPACE: &[u8] = b"security.";

/// Maximum length of a label, bytes: that of an extended attribute (`XATTR_SIZE_MAX`).
const LABEL_MAX: usize = 65_536;

/// Maximum length of a request's extensions: a label with its name, a group, and their headers.
pub(super) const EXTENSIONS_MAX: usize = LABEL_MAX + 1024;

/// The contents of the extensions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extensions<'a> {
    pub(super) label: Option<Label<'a>>,
    pub(super) group: Option<u32>,
}

impl<'a> Extensions<'a> {
    /// Parses `bytes`, one record after the other.
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
                // The number of labels is in the field that holds the type of other records.
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

/// A guest's kernel sends at most one label for an inode.
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
    check_padding(record)?;
    Ok(label)
}

/// At most one group: the directory's, if the caller is in it besides its own.
fn group(record: &[u8]) -> Result<Option<u32>, Fault> {
    let mut record = Arguments(record);
    let group = match take::<SuppGroups>(&mut record)?.nr_groups {
        0 => None,
        1 => Some(id(take(&mut record)?)?),
        _ => return Err(Fault::Extensions),
    };
    check_padding(record)?;
    Ok(group)
}

fn take<T: FromBytes>(record: &mut Arguments<'_>) -> Result<T, Fault> {
    record.take().or(Err(Fault::Extensions))
}

/// Only padding may be left.
fn check_padding(record: Arguments<'_>) -> Result<(), Fault> {
    if record.0.len() < EXT_UNIT {
        Ok(())
    } else {
        Err(Fault::Extensions)
    }
}
