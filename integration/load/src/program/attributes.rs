//! GETATTR, SETATTR and LOOKUP.

use std::mem::offset_of;
use std::sync::Arc;

use vmm::fuse::wire::{AttrOut, EntryOut, GetattrIn, SetattrIn, opcode, setattr};
use vmm::fuse::{Call, Errno, FuseError, Guest, Prepared};
use zerocopy::IntoBytes;

use super::{ARGUMENTS, Builder, Failure, NODEID, Program, Returned, Turns, read_u64};
use crate::forgets::Forgets;
use crate::random::Random;
use crate::share::{KNOWN_FILES, SMALL, name};

/// Bytes of a small file's name with its NUL.
const NAME: [u8; 7] = *b"f00000\0";

/// GETATTR of known files.
pub(crate) struct Getattr {
    request: Prepared,
    nodes: Arc<[u64]>,
    random: Random,
    verify: bool,
}

impl Getattr {
    pub(super) fn new<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let asked = GetattrIn::default();
        let call = Call::new(opcode::GETATTR, 0).arg(asked.as_bytes());
        Ok(Self {
            request: builder.prepare(&call.reply_of::<AttrOut>())?,
            nodes: Arc::clone(&builder.scene.known),
            random: Random::new(builder.slot()),
            verify: builder.manner.verify,
        })
    }
}

impl Getattr {
    /// SETATTR of the mode, whose reply is GETATTR's.
    pub(super) fn chmod<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let asked = SetattrIn {
            valid: setattr::MODE,
            mode: 0o644,
            ..SetattrIn::default()
        };
        let call = Call::new(opcode::SETATTR, 0).arg(asked.as_bytes());
        let request = builder.prepare(&call.reply_of::<AttrOut>())?;
        Ok(Self {
            request,
            ..Self::new(builder)?
        })
    }
}

impl Program for Getattr {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        let number = self.random.below(KNOWN_FILES) as usize;
        let nodeid = self.nodes.get(number).copied().unwrap_or(0);
        self.request.patch(NODEID, &nodeid)?;
        Ok(&self.request)
    }

    fn reply(
        &mut self,
        returned: Returned,
        _forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        self.request.check(returned.unique, returned.used)?;
        if self.verify {
            let at = offset_of!(AttrOut, attr) + offset_of!(vmm::fuse::wire::Attr, size);
            let size = read_u64(&self.request, at)?;
            if size != u64::from(SMALL) {
                return Err(Failure::Content { offset: size });
            }
        }
        Ok(None)
    }
}

/// LOOKUP.
pub(crate) struct Lookup {
    request: Prepared,
    of: Of,
    number: u32,
    verify: bool,
}

/// Which names are looked up.
enum Of {
    /// Names of known files, with these nodes.
    Known(Random, Arc<[u64]>),
    /// Names whose files are forgotten afterwards.
    New(Turns),
    /// Names that don't exist.
    Absent(Random),
}

impl Lookup {
    /// LOOKUP of names whose files are known.
    pub(super) fn known<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let nodes = Arc::clone(&builder.scene.known);
        let of = Of::Known(Random::new(builder.slot()), nodes);
        Self::in_folder(builder, builder.scene.known_folder, of)
    }

    /// LOOKUP of names whose files are not known.
    pub(super) fn new_names<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let of = Of::New(builder.turns());
        Self::in_folder(builder, builder.scene.cold_folder, of)
    }

    /// LOOKUP of names that don't exist.
    pub(super) fn absent<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let of = Of::Absent(Random::new(builder.slot()));
        Self::in_folder(builder, builder.scene.known_folder, of)
    }

    fn in_folder<G: Guest>(
        builder: &mut Builder<'_, G>,
        folder: u64,
        of: Of,
    ) -> Result<Self, Failure> {
        let call = Call::new(opcode::LOOKUP, folder).arg(&NAME);
        Ok(Self {
            request: builder.prepare(&call.reply_of::<EntryOut>())?,
            of,
            number: 0,
            verify: builder.manner.verify,
        })
    }
}

impl Program for Lookup {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        self.number = match &mut self.of {
            Of::Known(random, _) => random.below(KNOWN_FILES),
            Of::New(turns) => turns.next_file(),
            Of::Absent(random) => 90_000 + random.below(10_000),
        };
        self.request.patch(ARGUMENTS, &name(self.number))?;
        Ok(&self.request)
    }

    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        let wrong = |found, wanted| Failure::Node {
            number: self.number,
            found,
            wanted,
        };
        let checked = self.request.check(returned.unique, returned.used);
        if let Of::Absent(_) = self.of {
            return match checked {
                Err(FuseError::Refused {
                    errno: Errno(libc::ENOENT),
                    ..
                }) => Ok(None),
                Err(error) => Err(error.into()),
                // A node of 0 means the same, and that it may be cached.
                Ok(_) => match read_u64(&self.request, 0)? {
                    0 => Ok(None),
                    found => Err(wrong(found, 0)),
                },
            };
        }
        checked?;
        let found = read_u64(&self.request, offset_of!(EntryOut, nodeid))?;
        match &self.of {
            Of::Known(_, nodes) if self.verify => {
                let wanted = nodes.get(self.number as usize).copied().unwrap_or(0);
                if found != wanted {
                    return Err(wrong(found, wanted));
                }
            }
            Of::New(_) => forgets.one(found)?,
            _ => {}
        }
        Ok(None)
    }
}

/// Files of a slot that are looked up in turn, and how often each is before its inode goes.
const REVALIDATED: usize = 16;
const TIMES: u64 = 8;

/// LOOKUP of names that the guest knows and whose entries have timed out.
///
/// As in Linux, each time is one LOOKUP, whose count adds up; FORGET with the sum follows when the
/// inode goes.
pub(crate) struct Revalidate {
    request: Prepared,
    files: [(u32, u64); REVALIDATED],
    turns: Turns,
    /// The current file, and how often all files before it have been looked up.
    current: usize,
    round: u64,
}

impl Revalidate {
    pub(super) fn new<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let call = Call::new(opcode::LOOKUP, builder.scene.cold_folder).arg(&NAME);
        let turns = builder.turns();
        Ok(Self {
            request: builder.prepare(&call.reply_of::<EntryOut>())?,
            files: [(); REVALIDATED].map(|()| (turns.next_file(), 0)),
            turns,
            current: 0,
            round: 0,
        })
    }
}

impl Program for Revalidate {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        let number = self
            .files
            .get(self.current)
            .map_or(0, |(number, _)| *number);
        self.request.patch(ARGUMENTS, &name(number))?;
        Ok(&self.request)
    }

    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        self.request.check(returned.unique, returned.used)?;
        let found = read_u64(&self.request, offset_of!(EntryOut, nodeid))?;
        if let Some((number, wanted)) = self.files.get_mut(self.current) {
            if self.round == 0 {
                *wanted = found;
            } else if found != *wanted {
                // Linux would drop what it has.
                return Err(Failure::Node {
                    number: *number,
                    found,
                    wanted: *wanted,
                });
            }
            if self.round + 1 == TIMES {
                forgets.lookups(found, TIMES)?;
                *number = self.turns.next_file();
            }
        }
        self.current += 1;
        if self.current == REVALIDATED {
            self.current = 0;
            self.round = (self.round + 1) % TIMES;
        }
        Ok(None)
    }
}
