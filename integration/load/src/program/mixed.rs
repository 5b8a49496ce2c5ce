//! A mix of operations, chosen anew for each.

use vmm::fuse::{Guest, Prepared};

use super::{Builder, Create, Failure, Getattr, Lookup, Program, Read, Returned, Visit, Write};
use crate::forgets::Forgets;
use crate::random::Random;
use crate::spec::Transfer;

/// Programs, and each one's share of a hundred operations.
pub(crate) struct Mixed {
    programs: [(u32, Box<dyn Program>); 6],
    current: usize,
    random: Random,
}

impl Mixed {
    pub(super) fn new<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let transfer = |write| Transfer {
            write,
            sequential: false,
            direct: false,
        };
        Ok(Self {
            programs: [
                (50, Box::new(Read::new(builder, transfer(false))?)),
                (10, Box::new(Write::new(builder, transfer(true))?)),
                (20, Box::new(Getattr::new(builder)?)),
                (10, Box::new(Lookup::known(builder)?)),
                (8, Box::new(Visit::known(builder, libc::O_RDONLY)?)),
                (2, Box::new(Create::new(builder)?)),
            ],
            current: 0,
            random: Random::new(builder.slot() + 1000),
        })
    }

    fn current(&mut self) -> &mut dyn Program {
        let current = self.current;
        let [(_, first), rest @ ..] = &mut self.programs;
        match current.checked_sub(1).and_then(|index| rest.get_mut(index)) {
            Some((_, program)) => program.as_mut(),
            None => first.as_mut(),
        }
    }
}

impl Program for Mixed {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        let mut chosen = self.random.below(100);
        let at = self.programs.iter().position(|(weight, _)| {
            let here = chosen < *weight;
            chosen = chosen.saturating_sub(*weight);
            here
        });
        self.current = at.unwrap_or(0);
        self.current().begin()
    }

    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        self.current().reply(returned, forgets)
    }
}
