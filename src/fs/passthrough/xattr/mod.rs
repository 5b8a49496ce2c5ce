//! Extended attributes: the mapping of their names.

pub(crate) mod map;
