//! Whole lives of files: created, opened, read, closed, removed.

use std::mem::offset_of;
use std::sync::Arc;

use vmm::fuse::wire::{
    CreateIn, EntryOut, FlushIn, OpenIn, OpenOut, ReadIn, ReleaseIn, fopen, opcode,
};
use vmm::fuse::{Call, Errno, FuseError, Guest, Prepared};
use zerocopy::IntoBytes;

use super::{ARGUMENTS, BODY, Builder, Failure, NODEID, Program, Returned, Turns, read_u64};
use crate::forgets::Forgets;
use crate::pattern::Seed;
use crate::random::Random;
use crate::share::{KNOWN_FILES, SMALL, name};

/// Closes an open file: FLUSH if Linux would send it, then RELEASE.
struct Closing {
    flush: Option<Prepared>,
    release: Prepared,
}

impl Closing {
    fn new<G: Guest>(builder: &mut Builder<'_, G>, flags: i32) -> Result<Self, Failure> {
        let asked = FlushIn::default();
        let call = Call::new(opcode::FLUSH, 0).arg(asked.as_bytes()).reply(0);
        let flush = if builder.manner.flush {
            Some(builder.prepare(&call)?)
        } else {
            None
        };
        let asked = ReleaseIn {
            flags: flags.cast_unsigned(),
            ..ReleaseIn::default()
        };
        let call = Call::new(opcode::RELEASE, 0).arg(asked.as_bytes());
        let release = builder.prepare(&call.reply(0))?;
        Ok(Self { flush, release })
    }

    /// Starts to close the file with this handle. True if a FLUSH comes first.
    fn aim(&mut self, nodeid: u64, fh: u64, open_flags: u32) -> Result<bool, Failure> {
        self.release.patch(NODEID, &nodeid)?;
        let at = ARGUMENTS + offset_of!(ReleaseIn, fh);
        self.release.patch(at, &fh)?;
        match &self.flush {
            Some(flush) if open_flags & fopen::NOFLUSH == 0 => {
                flush.patch(NODEID, &nodeid)?;
                flush.patch(ARGUMENTS + offset_of!(FlushIn, fh), &fh)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Takes the reply to FLUSH: after ENOSYS it is not sent again.
    fn flushed(&mut self, returned: Returned) -> Result<(), Failure> {
        let Some(flush) = &self.flush else {
            return Ok(());
        };
        match flush.check(returned.unique, returned.used) {
            Err(FuseError::Refused {
                errno: Errno(libc::ENOSYS),
                ..
            }) => self.flush = None,
            other => {
                other?;
            }
        }
        Ok(())
    }

    fn first(&self, flush: bool) -> &Prepared {
        match &self.flush {
            Some(request) if flush => request,
            _ => &self.release,
        }
    }
}

/// CREATE, RELEASE, UNLINK, FORGET.
pub(crate) struct Create {
    create: Prepared,
    closing: Closing,
    unlink: Prepared,
    step: Making,
    nodeid: u64,
    /// The bytes of the name that identify the slot, and those that change.
    slot: u64,
    count: u64,
}

#[derive(Clone, Copy)]
enum Making {
    Create,
    Flush,
    Release,
    Unlink,
}

/// The name of a new file: the slot, then a number.
const NEW_NAME: [u8; 13] = *b"n00000000000\0";

impl Create {
    pub(super) fn new<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let asked = CreateIn {
            flags: flags.cast_unsigned(),
            mode: libc::S_IFREG | 0o644,
            umask: 0o022,
            open_flags: 0,
        };
        let folder = builder.scene.new_folder;
        let call = Call::new(opcode::CREATE, folder);
        let call = call.arg(asked.as_bytes()).arg(&NEW_NAME);
        let create = builder.prepare(&call.reply_of::<(EntryOut, OpenOut)>())?;
        let call = Call::new(opcode::UNLINK, folder).arg(&NEW_NAME);
        Ok(Self {
            create,
            closing: Closing::new(builder, libc::O_RDWR)?,
            unlink: builder.prepare(&call.reply(0))?,
            step: Making::Create,
            nodeid: 0,
            slot: builder.slot(),
            count: 0,
        })
    }

    fn new_name(&self) -> [u8; 12] {
        let mut name = *b"n00000000000";
        let mut left = self.slot * 10_000_000 + self.count % 10_000_000;
        for digit in name.iter_mut().skip(1).rev() {
            *digit = b'0' + u8::try_from(left % 10).unwrap_or(0);
            left /= 10;
        }
        name
    }
}

impl Program for Create {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        self.count += 1;
        let name = self.new_name();
        self.create
            .patch(ARGUMENTS + size_of::<CreateIn>(), &name)?;
        self.unlink.patch(ARGUMENTS, &name)?;
        self.step = Making::Create;
        Ok(&self.create)
    }

    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        match self.step {
            Making::Create => {
                self.create.check(returned.unique, returned.used)?;
                self.nodeid = read_u64(&self.create, 0)?;
                let (fh, open_flags) = opened(&self.create, size_of::<EntryOut>())?;
                let flush = self.closing.aim(self.nodeid, fh, open_flags)?;
                self.step = if flush {
                    Making::Flush
                } else {
                    Making::Release
                };
                Ok(Some(self.closing.first(flush)))
            }
            Making::Flush => {
                self.closing.flushed(returned)?;
                self.step = Making::Release;
                Ok(Some(&self.closing.release))
            }
            Making::Release => {
                self.closing.release.check(returned.unique, returned.used)?;
                self.step = Making::Unlink;
                Ok(Some(&self.unlink))
            }
            Making::Unlink => {
                self.unlink.check(returned.unique, returned.used)?;
                forgets.one(self.nodeid)?;
                Ok(None)
            }
        }
    }
}

/// OPEN, READ, RELEASE; with LOOKUP before and FORGET after, if the file is not known.
pub(crate) struct Visit {
    files: Files,
    lookup: Option<Prepared>,
    /// None after the server has replied that it needs no OPEN.
    open: Option<Prepared>,
    read: Prepared,
    closing: Closing,
    /// Whether the file is read.
    reads: bool,
    step: Visiting,
    number: u32,
    nodeid: u64,
    flush: bool,
    scratch: Option<Box<[u8]>>,
}

/// Which file is next.
enum Files {
    Known(Random, Arc<[u64]>),
    Cold(Turns),
}

#[derive(Clone, Copy)]
enum Visiting {
    Lookup,
    Open,
    Read,
    Flush,
    Release,
}

impl Visit {
    /// Known files, opened with these flags.
    pub(super) fn known<G: Guest>(
        builder: &mut Builder<'_, G>,
        flags: i32,
    ) -> Result<Self, Failure> {
        let nodes = Arc::clone(&builder.scene.known);
        let files = Files::Known(Random::new(builder.slot()), nodes);
        Self::new(builder, files, flags, None)
    }

    /// Known files, opened for reading and not read, as their content is cached.
    pub(super) fn unread<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let mut visit = Self::known(builder, libc::O_RDONLY)?;
        visit.reads = false;
        Ok(visit)
    }

    /// Unknown files, which are forgotten afterwards.
    pub(super) fn cold<G: Guest>(builder: &mut Builder<'_, G>) -> Result<Self, Failure> {
        let call = Call::new(opcode::LOOKUP, builder.scene.cold_folder).arg(b"f00000\0");
        let lookup = builder.prepare(&call.reply_of::<EntryOut>())?;
        let files = Files::Cold(builder.turns());
        Self::new(builder, files, libc::O_RDONLY, Some(lookup))
    }

    fn new<G: Guest>(
        builder: &mut Builder<'_, G>,
        files: Files,
        flags: i32,
        lookup: Option<Prepared>,
    ) -> Result<Self, Failure> {
        let asked = OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let call = Call::new(opcode::OPEN, 0).arg(asked.as_bytes());
        let open = builder.prepare(&call.reply_of::<OpenOut>())?;
        let asked = ReadIn {
            size: SMALL,
            ..ReadIn::default()
        };
        let call = Call::new(opcode::READ, 0).arg(asked.as_bytes());
        let read = builder.prepare(&call.reply(SMALL))?;
        let scratch = || vec![0; SMALL as usize].into();
        Ok(Self {
            files,
            lookup,
            open: Some(open),
            read,
            closing: Closing::new(builder, flags)?,
            reads: true,
            step: Visiting::Lookup,
            number: 0,
            nodeid: 0,
            flush: false,
            scratch: builder.manner.verify.then(scratch),
        })
    }

    /// The node is known: OPEN, or READ if that suffices.
    fn open(&mut self) -> Result<&Prepared, Failure> {
        self.read.patch(NODEID, &self.nodeid)?;
        match &self.open {
            Some(open) => {
                open.patch(NODEID, &self.nodeid)?;
                self.step = Visiting::Open;
                Ok(open)
            }
            None => {
                self.step = Visiting::Read;
                Ok(&self.read)
            }
        }
    }

    fn check_read(&mut self, returned: Returned) -> Result<(), Failure> {
        let done = self.read.check(returned.unique, returned.used)?;
        if done != SMALL {
            return Err(Failure::Short {
                offset: 0,
                asked: SMALL,
                done,
            });
        }
        if let Some(scratch) = &mut self.scratch {
            self.read.read_reply(BODY, scratch)?;
            if let Some(offset) = Seed::of_file(self.number).difference(0, scratch) {
                return Err(Failure::Content { offset });
            }
        }
        Ok(())
    }

    /// Closes the file, if it was opened.
    fn close(&mut self, forgets: &Forgets) -> Result<Option<&Prepared>, Failure> {
        if self.open.is_none() {
            return self.end(forgets);
        }
        self.step = if self.flush {
            Visiting::Flush
        } else {
            Visiting::Release
        };
        Ok(Some(self.closing.first(self.flush)))
    }

    fn end(&self, forgets: &Forgets) -> Result<Option<&Prepared>, Failure> {
        if self.lookup.is_some() {
            forgets.one(self.nodeid)?;
        }
        Ok(None)
    }
}

impl Program for Visit {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        match &mut self.files {
            Files::Known(random, nodes) => {
                self.number = random.below(KNOWN_FILES);
                self.nodeid = nodes.get(self.number as usize).copied().unwrap_or(0);
                return self.open();
            }
            Files::Cold(turns) => self.number = turns.next_file(),
        }
        self.step = Visiting::Lookup;
        match &self.lookup {
            Some(lookup) => {
                lookup.patch(ARGUMENTS, &name(self.number))?;
                Ok(lookup)
            }
            None => Ok(&self.read),
        }
    }

    fn reply(
        &mut self,
        returned: Returned,
        forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        match self.step {
            Visiting::Lookup => {
                if let Some(lookup) = &self.lookup {
                    lookup.check(returned.unique, returned.used)?;
                    self.nodeid = read_u64(lookup, 0)?;
                }
                self.open().map(Some)
            }
            Visiting::Open => {
                let (mut fh, mut open_flags) = (0, 0);
                if let Some(open) = &self.open {
                    match open.check(returned.unique, returned.used) {
                        Err(FuseError::Refused {
                            errno: Errno(libc::ENOSYS),
                            ..
                        }) => {
                            self.open = None;
                        }
                        other => {
                            other?;
                            (fh, open_flags) = opened(open, 0)?;
                        }
                    }
                }
                self.read.patch(ARGUMENTS + offset_of!(ReadIn, fh), &fh)?;
                self.flush = self.closing.aim(self.nodeid, fh, open_flags)?;
                if !self.reads {
                    return self.close(forgets);
                }
                self.step = Visiting::Read;
                Ok(Some(&self.read))
            }
            Visiting::Read => {
                self.check_read(returned)?;
                self.close(forgets)
            }
            Visiting::Flush => {
                self.closing.flushed(returned)?;
                self.step = Visiting::Release;
                Ok(Some(&self.closing.release))
            }
            Visiting::Release => {
                self.closing.release.check(returned.unique, returned.used)?;
                self.end(forgets)
            }
        }
    }
}

/// The handle and the flags in a reply's OpenOut, `at` bytes after its header.
fn opened(request: &Prepared, at: usize) -> Result<(u64, u32), FuseError> {
    let fh = read_u64(request, at + offset_of!(OpenOut, fh))?;
    let mut flags = [0; 4];
    let flags_at = BODY + at + offset_of!(OpenOut, open_flags);
    request.read_reply(flags_at, &mut flags)?;
    Ok((fh, u32::from_le_bytes(flags)))
}
