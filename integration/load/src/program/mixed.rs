//! A mix of operations, chosen anew for each.
//!
//! The weights are a hundred's, or those of requests that were recorded from programs' work
//! (`vm-like.tsv`, made by `record.sh`). The invariant: a program is chosen as often as its weight says,
//! and each runs to its end before the next is chosen.

use vmm::fuse::{Guest, Prepared};

use super::{
    Builder, Create, Failure, Getattr, Listing, Lookup, Program, Read, Returned, Visit, Write,
};
use crate::forgets::Forgets;
use crate::random::Random;
use crate::spec::{PAGE, Transfer};

/// How many requests of each kind were recorded.
const RECORDED: &str = include_str!("../../vm-like.tsv");

/// Programs, and each one's share of all operations.
pub(crate) struct Mixed {
    programs: Vec<(u32, Box<dyn Program>)>,
    /// The sum of the weights.
    total: u32,
    current: usize,
    random: Random,
}

impl Mixed {
    /// The mix of the case `mixed`.
    pub(super) fn hundred<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let programs: Vec<(u32, Box<dyn Program>)> = vec![
            (50, Box::new(Read::new(builder, transfer(false))?)),
            (10, Box::new(Write::new(builder, transfer(true))?)),
            (20, Box::new(Getattr::new(builder)?)),
            (10, Box::new(Lookup::known(builder)?)),
            (8, Box::new(Visit::known(builder, libc::O_RDONLY)?)),
            (2, Box::new(Create::new(builder)?)),
        ];
        Ok(Self::of(programs, builder))
    }

    /// The mix that was recorded.
    ///
    /// An OPEN is played as OPEN, FLUSH and RELEASE, with a READ of 4 KiB between as often as there are
    /// such; a CREATE with UNLINK and FORGET; an OPENDIR as the listing of 12 entries. Other READs and
    /// WRITEs have the recorded sizes. The rest (about one request in thirty) is not played.
    pub(super) fn recorded<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let mut programs: Vec<(u32, Box<dyn Program>)> = Vec::new();
        let opens = count("open", 0);
        let read = opens.min(count("read", PAGE));
        programs.push((read, Box::new(Visit::known(builder, libc::O_RDONLY)?)));
        for (name, size, count) in rows() {
            let program: Box<dyn Program> = match name {
                "lookup-known" => Box::new(Lookup::known(builder)?),
                "lookup-new" => Box::new(Lookup::new_names(builder)?),
                "lookup-absent" => Box::new(Lookup::absent(builder)?),
                "getattr" => Box::new(Getattr::new(builder)?),
                "setattr" => Box::new(Getattr::chmod(builder)?),
                "open" => Box::new(Visit::unread(builder)?),
                "create" => Box::new(Create::new(builder)?),
                "opendir" => Box::new(Listing::few(builder)?),
                "read" | "write" => {
                    let usual = std::mem::replace(&mut builder.spec.size, size.max(PAGE));
                    let write = name == "write";
                    let made: Result<Box<dyn Program>, Failure> = if write {
                        Write::new(builder, transfer(true)).map(|it| Box::new(it) as _)
                    } else {
                        Read::new(builder, transfer(false)).map(|it| Box::new(it) as _)
                    };
                    builder.spec.size = usual;
                    made?
                }
                // A part of what is played for another request, or not played.
                _ => continue,
            };
            let weight = match (name, size) {
                ("open", _) | ("read", PAGE) => count.saturating_sub(read),
                _ => count,
            };
            programs.push((weight, program));
        }
        Ok(Self::of(programs, builder))
    }

    fn of<G: Guest>(programs: Vec<(u32, Box<dyn Program>)>, builder: &Builder<'_, G>) -> Self {
        Self {
            total: programs.iter().map(|(weight, _)| weight).sum(),
            programs,
            current: 0,
            random: Random::new(builder.slot() + 1000),
        }
    }

    fn current(&mut self) -> Result<&mut dyn Program, Failure> {
        match self.programs.get_mut(self.current) {
            Some((_, program)) => Ok(program.as_mut()),
            None => Err(Failure::Mix),
        }
    }
}

fn transfer(write: bool) -> Transfer {
    Transfer {
        write,
        sequential: false,
        direct: false,
    }
}

/// Name, size and count of each row.
fn rows() -> impl Iterator<Item = (&'static str, u32, u32)> {
    let lines = RECORDED.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| {
        let mut columns = line.split('\t');
        let name = columns.next()?;
        let size = columns.next()?.parse().ok()?;
        Some((name, size, columns.next()?.parse().ok()?))
    })
}

fn count(name: &str, size: u32) -> u32 {
    let mut rows = rows().filter(|row| row.0 == name && row.1 == size);
    rows.next().map_or(0, |row| row.2)
}

impl Program for Mixed {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        let mut chosen = self.random.below(self.total);
        let at = self.programs.iter().position(|(weight, _)| {
            let here = chosen < *weight;
            chosen = chosen.saturating_sub(*weight);
            here
        });
        self.current = at.unwrap_or(0);
        self.current()?.begin()
    }

    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        self.current()?.reply(returned, forgets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recorded_row_is_read_and_the_common_requests_are_there() {
        let lines = RECORDED.lines().filter(|line| !line.starts_with('#'));
        assert_eq!(rows().count(), lines.count());
        for name in ["lookup-new", "lookup-absent", "open", "create", "opendir"] {
            assert!(count(name, 0) > 0, "{name}");
        }
        for (name, size, _) in rows().filter(|row| matches!(row.0, "read" | "write")) {
            assert!(
                size.is_power_of_two() && (PAGE..=1 << 20).contains(&size),
                "{name} {size}"
            );
        }
    }
}
