//! READ and WRITE of a large file, at random offsets or sequentially.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm::fuse::wire::{GetxattrIn, GetxattrOut, ReadIn, WriteIn, WriteOut, opcode};
use vmm::fuse::{Call, Errno, FuseError, Guest, Prepared};
use vmm::{Buf, Memory};
use zerocopy::IntoBytes;

use super::{ARGUMENTS, BODY, Builder, Failure, Program, Returned, Turns};
use crate::forgets::Forgets;
use crate::pattern::Seed;
use crate::random::Random;
use crate::spec::{Kind, PAGE, Transfer};

/// Which offset is next.
enum Places {
    Random(Random, u32),
    InOrder(Turns),
}

impl Places {
    fn new<G: Guest>(builder: &Builder<'_, G>, size: u32, sequential: bool) -> Self {
        let count = builder.scene.file_size / u64::from(size);
        if sequential {
            Self::InOrder(Turns {
                cursor: Arc::clone(&builder.cursor),
                count,
            })
        } else {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            Self::Random(Random::new(builder.slot()), count)
        }
    }

    fn next(&mut self, size: u32) -> u64 {
        let place = match self {
            Self::Random(random, count) => random.below(*count).into(),
            Self::InOrder(turns) => turns.next(),
        };
        place * u64::from(size)
    }
}

/// The pages that were written.
#[derive(Debug)]
pub(crate) struct Written(Box<[AtomicU64]>);

impl Written {
    pub(super) fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn insert(&self, offset: u64, size: u32) {
        let first = offset / u64::from(PAGE);
        for page in first..first + u64::from(size / PAGE) {
            if let Some(word) = self.word(page) {
                // Relaxed: it is read after the threads were joined.
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
    }

    /// Whether the page at this offset was written.
    pub(crate) fn contains(&self, offset: u64) -> bool {
        let page = offset / u64::from(PAGE);
        let word = self
            .word(page)
            .map_or(0, |word| word.load(Ordering::Relaxed));
        word >> (page % 64) & 1 != 0
    }

    fn word(&self, page: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(page / 64).ok()?)
    }
}

/// READ.
pub(crate) struct Read {
    request: Prepared,
    places: Places,
    size: u32,
    offset: u64,
    /// The buffer into which a reply is copied to be verified.
    scratch: Option<Box<[u8]>>,
}

impl Read {
    /// READ of the large file of this transfer.
    pub(super) fn new<G: Guest>(
        builder: &mut Builder<'_, G>,
        transfer: Transfer,
    ) -> Result<Self, Failure> {
        let size = builder.spec.size;
        let open = builder.scene.file(transfer);
        let asked = ReadIn {
            fh: open.fh,
            size,
            flags: open.flags,
            ..ReadIn::default()
        };
        let call = Call::new(opcode::READ, open.nodeid).arg(asked.as_bytes());
        let scratch = || vec![0; size as usize].into();
        Ok(Self {
            request: builder.prepare(&call.reply(size))?,
            places: Places::new(builder, size, transfer.sequential),
            size,
            offset: 0,
            scratch: builder.manner.verify.then(scratch),
        })
    }
}

impl Program for Read {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        self.offset = self.places.next(self.size);
        let at = ARGUMENTS + offset_of!(ReadIn, offset);
        self.request.patch(at, &self.offset)?;
        Ok(&self.request)
    }

    fn reply(
        &mut self,
        returned: Returned,
        _forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        let (offset, asked) = (self.offset, self.size);
        let done = self.request.check(returned.unique, returned.used)?;
        if done != asked {
            return Err(Failure::Short {
                offset,
                asked,
                done,
            });
        }
        if let Some(scratch) = &mut self.scratch {
            self.request
                .read_reply(BODY, scratch)
                .map_err(Failure::Request)?;
            if let Some(offset) = Seed::MADE.difference(offset, scratch) {
                return Err(Failure::Content { offset });
            }
        }
        Ok(None)
    }
}

/// WRITE, after GETXATTR of `security.capability` where Linux sends it.
pub(crate) struct Write {
    /// None if nobody asks, or after the server has replied that it has no extended attributes.
    getxattr: Option<Prepared>,
    asking: bool,
    request: Prepared,
    memory: Memory,
    places: Places,
    size: u32,
    offset: u64,
    seed: Seed,
    /// The buffer in which data to write are made, if they are verified.
    scratch: Option<Box<[u8]>>,
    written: Option<Arc<Written>>,
}

impl Write {
    /// WRITE to the large file of this transfer.
    pub(super) fn new<G: Guest>(
        builder: &mut Builder<'_, G>,
        transfer: Transfer,
    ) -> Result<Self, Failure> {
        let size = builder.spec.size;
        let open = builder.scene.file(transfer);
        let asked = WriteIn {
            fh: open.fh,
            size,
            flags: open.flags,
            ..WriteIn::default()
        };
        // Mixes write what their reads expect.
        let seed = match builder.spec.kind {
            Kind::Mixed | Kind::VmLike => Seed::MADE,
            _ => Seed::WRITTEN,
        };
        let mut payload = vec![0; size as usize];
        seed.fill(0, &mut payload);
        let getxattr = if builder.manner.capabilities {
            let length = GetxattrIn::default();
            let call = Call::new(opcode::GETXATTR, open.nodeid)
                .arg(length.as_bytes())
                .name(c"security.capability");
            Some(builder.prepare(&call.reply_of::<GetxattrOut>())?)
        } else {
            None
        };
        let call = Call::new(opcode::WRITE, open.nodeid)
            .arg(asked.as_bytes())
            .arg(&payload);
        Ok(Self {
            getxattr,
            asking: false,
            request: builder.prepare(&call.reply_of::<WriteOut>())?,
            memory: builder.memory.clone(),
            places: Places::new(builder, size, transfer.sequential),
            size,
            offset: 0,
            seed,
            scratch: builder.manner.verify.then(|| payload.into()),
            written: builder.written.clone(),
        })
    }

    /// Takes the reply to GETXATTR.
    fn answered(&mut self, returned: Returned) -> Result<(), Failure> {
        self.asking = false;
        let Some(getxattr) = &self.getxattr else {
            return Ok(());
        };
        match getxattr.check(returned.unique, returned.used) {
            Err(FuseError::Refused { errno, .. }) => match errno {
                Errno(libc::ENOSYS) => self.getxattr = None,
                Errno(libc::ENODATA | libc::EOPNOTSUPP) => {}
                _ => {
                    return Err(FuseError::Refused {
                        opcode: opcode::GETXATTR,
                        errno,
                    }
                    .into());
                }
            },
            other => {
                other?;
            }
        }
        Ok(())
    }

    /// The buffers of the data to write, after the header and the arguments.
    fn payload(&self) -> impl Iterator<Item = Buf> {
        let mut skip = ARGUMENTS + size_of::<WriteIn>();
        self.request.readable().iter().filter_map(move |buf| {
            let len = buf.len as usize;
            let from = skip.min(len);
            skip -= from;
            let left = u32::try_from(len - from).ok().filter(|&left| left > 0)?;
            Some(Buf::new(buf.gpa.offset(from as u64), left))
        })
    }
}

impl Program for Write {
    fn begin(&mut self) -> Result<&Prepared, Failure> {
        self.offset = self.places.next(self.size);
        let at = ARGUMENTS + offset_of!(WriteIn, offset);
        self.request.patch(at, &self.offset)?;
        if let Some(mut scratch) = self.scratch.take() {
            self.seed.fill(self.offset, &mut scratch);
            let mut left = &scratch[..];
            for buf in self.payload() {
                let (now, later) = left.split_at(left.len().min(buf.len as usize));
                let copied = self.memory.write(buf.gpa, now);
                copied.map_err(|error| Failure::Request(error.into()))?;
                left = later;
            }
            self.scratch = Some(scratch);
        }
        self.asking = self.getxattr.is_some();
        Ok(self.getxattr.as_ref().unwrap_or(&self.request))
    }

    fn reply(
        &mut self,
        returned: Returned,
        _forgets: &Forgets,
    ) -> Result<Option<&Prepared>, Failure> {
        if self.asking {
            self.answered(returned)?;
            return Ok(Some(&self.request));
        }
        self.request.check(returned.unique, returned.used)?;
        let mut done = [0; 4];
        self.request
            .read_reply(BODY, &mut done)
            .map_err(Failure::Request)?;
        let done = u32::from_le_bytes(done);
        let (offset, asked) = (self.offset, self.size);
        if done != asked {
            return Err(Failure::Short {
                offset,
                asked,
                done,
            });
        }
        if let Some(written) = &self.written {
            written.insert(offset, asked);
        }
        Ok(None)
    }
}
