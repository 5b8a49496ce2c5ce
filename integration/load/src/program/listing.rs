//! OPENDIR, READDIRPLUS to the end, RELEASEDIR; and FORGET of everything that was looked up.

use std::mem::offset_of;

use vmm::fuse::wire::{Dirent, EntryOut, ForgetOne, OpenIn, OpenOut, ReadIn, ReleaseIn, opcode};
use vmm::fuse::{Call, Errno, FuseError, Guest, Prepared};
use zerocopy::{FromBytes, IntoBytes};

use super::{ARGUMENTS, BODY, Builder, Failure, Program, Returned, read_u64};
use crate::forgets::{BATCH, Forgets};
use crate::share::{COLD_FILES, name};

/// A listing of the unknown files.
pub(crate) struct Listing {
    /// None after the server has replied that it needs no OPENDIR.
    opendir: Option<Prepared>,
    read: Prepared,
    releasedir: Prepared,
    step: Step,
    size: u32,
    bytes: Box<[u8]>,
    found: Found,
}

#[derive(Clone, Copy)]
enum Step {
    Opendir,
    Read,
    Releasedir,
}

/// What a listing has found so far.
struct Found {
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
}

impl Listing {
    pub(super) fn new<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let folder = builder.scene.cold_folder;
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
        let seen = || vec![false; COLD_FILES as usize].into();
        Ok(Self {
            opendir: Some(opendir),
            read,
            releasedir: builder.prepare(&call.reply(0))?,
            step: Step::Opendir,
            size,
            bytes: vec![0; size as usize].into(),
            found: Found {
                entries: 0,
                known: 0,
                seen: builder.manner.verify.then(seen),
                offset: 0,
                nodes: [ForgetOne::default(); BATCH],
                count: 0,
            },
        })
    }

    fn read_on(&mut self) -> Result<&Prepared, Failure> {
        let at = ARGUMENTS + offset_of!(ReadIn, offset);
        self.read.patch(at, &self.found.offset)?;
        self.step = Step::Read;
        Ok(&self.read)
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
                self.found.end(forgets)?;
                if self.opendir.is_none() {
                    return Ok(None);
                }
                self.step = Step::Releasedir;
                Ok(Some(&self.releasedir))
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
                self.forget(node.nodeid, forgets)?;
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

    /// Forgets a node together with others.
    fn forget(&mut self, nodeid: u64, forgets: &Forgets) -> Result<(), Failure> {
        if let Some(one) = self.nodes.get_mut(self.count) {
            *one = ForgetOne { nodeid, nlookup: 1 };
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
            forgets.one(one.nodeid)?;
        }
        self.count = 0;
        let (found, wanted, known) = (self.entries, COLD_FILES, self.known);
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
