//! User and group ids: their mapping between guest and host, and the owner of new files.

pub(crate) mod credentials;
pub(crate) mod id_map;
