//! FUSE operations: what each request does, in terms of the other rooms.

pub(crate) mod attributes;
pub(crate) mod extended_ops;
pub(crate) mod labels;
pub(crate) mod lookup;
pub(crate) mod names;
pub(crate) mod open;
pub(crate) mod path_checks;
pub(crate) mod readdir;
pub(crate) mod retries;
pub(crate) mod xattrs;
