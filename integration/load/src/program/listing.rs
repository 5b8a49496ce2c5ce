//! OPENDIR, READDIRPLUS to the end, RELEASEDIR; LOOKUP of what was listed, if the case says so; and
//! FORGET of everything that was looked up.

use std::mem::offset_of;

use vmm::fuse::wire::{Dirent, EntryOut, ForgetOne, OpenIn, OpenOut, ReadIn, ReleaseIn, opcode};
use vmm::fuse::{Call, Errno, FuseError, Guest, Prepared};
use zerocopy::{FromBytes, IntoBytes};

use super::{ARGUMENTS, BODY, Builder, Failure, Program, Returned, read_u64};
use crate::forgets::{BATCH, Forgets};
use crate::share::{COLD_FILES, FEW_FILES, name};

/// A listing.
pub(crate) struct Listing {
    /// None after the server has replied that it needs no OPENDIR.
    opendir: Option<Prepared>,
    read: Prepared,
    releasedir: Prepared,
    /// LOOKUP of what was listed.
    lookup: Option<Prepared>,
    step: Step,
    size: u32,
    bytes: Box<[u8]>,
    found: Found,
}

#[derive(Clone, Copy)]
enum Step {
    Opendir,
    Read,
    /// Of the entry with this number.
    Lookup(usize),
    Releasedir,
}

/// What a listing has found so far.
struct Found {
    /// How many entries there are.
    wanted: u32,
    entries: u32,
    /// The entries with right names, each counted once.
    known: u32,
    /// Which names were seen, if that is verified.
    seen: Option<Box<[bool]>>,
    /// The offset of the next READDIRPLUS.
    offset: u64,
    /// Looked up and not yet forgotten.
    nodes: [ForgetOne; BATCH],
    count: usize,
    /// Names and nodes that are to be looked up; those are forgotten later.
    listed: Option<Vec<([u8; 6], u64)>>,
}

impl Listing {
    /// A listing of the unknown files.
    pub(super) fn new<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let folder = builder.scene.cold_folder;
        Self::of(builder, folder, COLD_FILES)
    }

    /// A listing of a directory of the size that directories mostly have.
    pub(super) fn few<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let folder = builder.scene.few_folder;
        Self::of(builder, folder, FEW_FILES)
    }

    /// A listing of the unknown files, each of which is looked up afterwards.
    pub(super) fn with_lookups<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let mut listing = Self::new(builder)?;
        let call = Call::new(opcode::LOOKUP, builder.scene.cold_folder).arg(b"f00000\0");
        listing.lookup = Some(builder.prepare(&call.reply_of::<EntryOut>())?);
        listing.found.listed = Some(Vec::with_capacity(COLD_FILES as usize));
        Ok(listing)
    }

    fn of<G: Guest>(
        builder: &mut Builder<'_, G>,
        folder: u64,
        wanted: u32,
    ) -> Result<Self, Failure> {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let asked = OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let call = Call::new(opcode::OPENDIR, folder).arg(asked.as_bytes());
        let opendir = builder.prepare(&call.reply_of::<OpenOut>())?;
        let size = builder.spec.size;
        let asked = ReadIn {
            size,
            flags: flags.cast_unsigned(),
            ..ReadIn::default()
        };
        let call = Call::new(opcode::READDIRPLUS, folder).arg(asked.as_bytes());
        let read = builder.prepare(&call.reply(size))?;
        let asked = ReleaseIn {
            flags: flags.cast_unsigned(),
            ..ReleaseIn::default()
        };
        let call = Call::new(opcode::RELEASEDIR, folder).arg(asked.as_bytes());
        let seen = || vec![false; wanted as usize].into();
        Ok(Self {
            opendir: Some(opendir),
            read,
            releasedir: builder.prepare(&call.reply(0))?,
            lookup: None,
            step: Step::Opendir,
            size,
            bytes: vec![0; size as usize].into(),
            found: Found {
                wanted,
                entries: 0,
                known: 0,
                seen: builder.manner.verify.then(seen),
                offset: 0,
                nodes: [ForgetOne::default(); BATCH],
                count: 0,
                listed: None,
            },
        })
    }

    fn read_on(&mut self) -> Result<&Prepared, Failure> {
        let at = ARGUMENTS + offset_of!(ReadIn, offset);
        self.read.patch(at, &self.found.offset)?;
        self.step = Step::Read;
        Ok(&self.read)
    }

    /// Looks up the listed entry with this number, or ends the listing.
    fn look_up(&mut self, number: usize, forgets: &Forgets) -> Result<Option<&Prepared>, Failure> {
        let listed = self.found.listed.as_ref();
        let entry = listed.and_then(|listed| listed.get(number));
        if let (Some(lookup), Some((name, _))) = (&self.lookup, entry) {
            lookup.patch(ARGUMENTS, name)?;
            self.step = Step::Lookup(number);
            return Ok(self.lookup.as_ref());
        }
        self.found.end(forgets)?;
        if self.opendir.is_none() {
            return Ok(None);
        }
        self.step = Step::Releasedir;
        Ok(Some(&self.releasedir))
    }
}

impl Program for Listing {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        self.found.begin();
        if self.opendir.is_none() {
            return self.read_on();
        }
        self.step = Step::Opendir;
        Ok(self.opendir.as_ref().unwrap_or(&self.read))
    }

    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        match self.step {
            Step::Opendir => {
                let mut fh = 0;
                if let Some(opendir) = &self.opendir {
                    match opendir.check(returned.unique, returned.used) {
                        Err(FuseError::Refused {
                            errno: Errno(libc::ENOSYS),
                            ..
                        }) => {
                            self.opendir = None;
                        }
                        other => {
                            other?;
                            fh = read_u64(opendir, offset_of!(OpenOut, fh))?;
                        }
                    }
                }
                self.read.patch(ARGUMENTS + offset_of!(ReadIn, fh), &fh)?;
                let at = ARGUMENTS + offset_of!(ReleaseIn, fh);
                self.releasedir.patch(at, &fh)?;
                self.read_on().map(Some)
            }
            Step::Read => {
                let done = self.read.check(returned.unique, returned.used)?;
                if done > 0 {
                    let bytes = self.bytes.get_mut(..done.min(self.size) as usize);
                    let bytes = bytes.unwrap_or_default();
                    self.read.read_reply(BODY, bytes)?;
                    self.found.take(bytes, forgets)?;
                    return self.read_on().map(Some);
                }
                self.look_up(0, forgets)
            }
            Step::Lookup(number) => {
                let mut found = 0;
                if let Some(lookup) = &self.lookup {
                    lookup.check(returned.unique, returned.used)?;
                    found = read_u64(lookup, offset_of!(EntryOut, nodeid))?;
                }
                self.found.looked_up(number, found, forgets)?;
                self.look_up(number + 1, forgets)
            }
            Step::Releasedir => {
                self.releasedir.check(returned.unique, returned.used)?;
                Ok(None)
            }
        }
    }
}

impl Found {
    fn begin(&mut self) {
        self.entries = 0;
        self.known = 0;
        self.offset = 0;
        if let Some(listed) = &mut self.listed {
            listed.clear();
        }
        if let Some(seen) = &mut self.seen {
            seen.fill(false);
        }
    }

    /// Takes a reply's entries.
    fn take(&mut self, mut bytes: &[u8], forgets: &Forgets) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let wrong = Failure::Entry(self.entries);
            let Ok((node, rest)) = EntryOut::read_from_prefix(bytes) else {
                return Err(wrong);
            };
            let Ok((entry, rest)) = Dirent::read_from_prefix(rest) else {
                return Err(wrong);
            };
            let len = entry.namelen as usize;
            let Some(name) = rest.get(..len) else {
                return Err(wrong);
            };
            let Some(next) = rest.get(len.next_multiple_of(8)..) else {
                return Err(wrong);
            };
            self.offset = entry.off;
            bytes = next;
            if node.nodeid != 0 && name != b"." && name != b".." {
                self.looked_up_by_listing(name, node.nodeid, forgets)?;
            }
            self.count_name(name);
        }
        Ok(())
    }

    fn count_name(&mut self, name: &[u8]) {
        if name == b"." || name == b".." {
            return;
        }
        self.entries += 1;
        if let Some(seen) = &mut self.seen {
            let number = number(name).and_then(|number| seen.get_mut(number));
            if let Some(seen) = number.filter(|seen| !**seen) {
                *seen = true;
                self.known += 1;
            }
        }
    }

    /// Forgets an entry's node, or remembers it if it is going to be looked up.
    fn looked_up_by_listing(
        &mut self,
        name: &[u8],
        nodeid: u64,
        forgets: &Forgets,
    ) -> Result<(), Failure> {
        let Some(listed) = &mut self.listed else {
            return self.forget(nodeid, 1, forgets);
        };
        let name = name
            .try_into()
            .map_err(|_len| Failure::Entry(self.entries))?;
        listed.push((name, nodeid));
        Ok(())
    }

    /// Takes the node that LOOKUP has found for a listed entry.
    fn looked_up(&mut self, number: usize, found: u64, forgets: &Forgets) -> Result<(), Failure> {
        let listed = self.listed.as_ref().and_then(|listed| listed.get(number));
        let wanted = listed.map_or(0, |(_, node)| *node);
        if found != wanted {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            return Err(Failure::Node {
                number,
                found,
                wanted,
            });
        }
        self.forget(found, 2, forgets)
    }

    /// Forgets a node together with others.
    fn forget(&mut self, nodeid: u64, nlookup: u64, forgets: &Forgets) -> Result<(), Failure> {
        if let Some(one) = self.nodes.get_mut(self.count) {
            *one = ForgetOne { nodeid, nlookup };
            self.count += 1;
        }
        if self.count == BATCH {
            forgets.batch(&self.nodes)?;
            self.count = 0;
        }
        Ok(())
    }

    /// Forgets the rest, and checks that the listing was complete.
    fn end(&mut self, forgets: &Forgets) -> Result<(), Failure> {
        for one in self.nodes.iter().take(self.count) {
            forgets.lookups(one.nodeid, one.nlookup)?;
        }
        self.count = 0;
        let (found, wanted, known) = (self.entries, self.wanted, self.known);
        if found != wanted || (self.seen.is_some() && known != wanted) {
            return Err(Failure::Listing {
                found,
                wanted,
                known,
            });
        }
        Ok(())
    }
}

/// The number in a small file's name.
fn number(text: &[u8]) -> Option<usize> {
    let digits = text.strip_prefix(b"f")?;
    let number = digits.iter().try_fold(0_u32, |number, digit| {
        let digit = digit.checked_sub(b'0').filter(|&digit| digit < 10)?;
        Some(number.checked_mul(10)? + u32::from(digit))
    })?;
    (name(number) == text).then_some(number as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_small_files_have_a_number() {
        assert_eq!(number(b"f00000"), Some(0));
        assert_eq!(number(b"f09999"), Some(9999));
        for other in [
            &b"f0"[..],
            b"g00000",
            b"f000000",
            b"f0000x",
            b"",
            b"f99999999999",
        ] {
            assert_eq!(number(other), None);
        }
    }
}
