//! The checks, by subject. A check is a function that gets a new folder, and its name is the
//! sentence that it proves. Invariant: no two checks have the same name.

use std::path::Path;

use crate::failure::Outcome;

mod attributes;
mod concurrency;
mod content;
mod directories;
mod idmapped;
mod links;
mod locks;
mod mappings;
mod names;
mod permissions;
mod renames;
mod set_id;
mod sizes;
mod special;
mod transfers;
mod unlinked;
mod xattrs;

/// One check.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) act: fn(&Path) -> Outcome,
}

/// Makes the list of a file's checks out of the functions' names.
macro_rules! checks {
    ($($name:ident),+ $(,)?) => {
        pub(super) const CHECKS: &[$crate::checks::Check] = &[
            $($crate::checks::Check { name: stringify!($name), act: $name }),+
        ];
    };
}
use checks;

/// All checks, in the order in which they run.
pub(crate) fn all() -> impl Iterator<Item = &'static Check> {
    [
        content::CHECKS,
        transfers::CHECKS,
        mappings::CHECKS,
        sizes::CHECKS,
        attributes::CHECKS,
        names::CHECKS,
        links::CHECKS,
        renames::CHECKS,
        directories::CHECKS,
        unlinked::CHECKS,
        xattrs::CHECKS,
        permissions::CHECKS,
        set_id::CHECKS,
        idmapped::CHECKS,
        locks::CHECKS,
        special::CHECKS,
        concurrency::CHECKS,
    ]
    .into_iter()
    .flatten()
}
