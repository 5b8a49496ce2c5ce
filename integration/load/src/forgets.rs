//! FORGET, over the high-priority queue, where no program waits for it.
//!
//! As in Linux's virtio-fs driver, each inode has a request of its own, which is sent and not waited
//! for. After a listing, its ten thousand inodes are forgotten in batches, so that the listing is what
//! is measured. [`Form`] overrides both. The invariant: a request's slot in guest memory is reused only
//! once its chain has been returned.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use vmm::Queue;
use vmm::fuse::wire::{BatchForgetIn, ForgetIn, ForgetOne, InHeader, opcode};
use vmm::fuse::{Call, Client, FuseError, Guest, Prepared};
use vmm::ring::RingError;
use zerocopy::IntoBytes;

/// Inodes in one BATCH_FORGET.
pub(crate) const BATCH: usize = 64;

/// Requests that can be in flight.
const SINGLES: usize = 256;
const BATCHES: usize = 32;

/// How long the server may take to return one.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Other requests' unique ids don't have this bit.
const MARK: u64 = 1 << 62;

/// `--forget`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// FORGET for each inode; BATCH_FORGET for the inodes of a listing.
    #[default]
    Case,
    /// FORGET for each inode, as Linux's virtio-fs driver sends it.
    Single,
    /// BATCH_FORGET for 64 inodes, as Linux sends it to a server behind /dev/fuse.
    Batch,
}

/// The high-priority queue and its requests. Threads share it.
#[derive(Debug)]
pub(crate) struct Forgets {
    form: Form,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    queue: Queue,
    requests: Vec<Prepared>,
    /// Numbers of requests that are not in flight.
    singles: Vec<usize>,
    batches: Vec<usize>,
    /// Inodes to be forgotten in the next batch.
    collected: [ForgetOne; BATCH],
    count: usize,
    sent: u64,
}

impl Forgets {
    /// Makes the requests. `queue` is the high-priority queue.
    pub(crate) fn new<G: Guest>(
        client: &mut Client<G>,
        mut queue: Queue,
        form: Form,
    ) -> Result<Self, FuseError> {
        queue.suppress_calls();
        let one = ForgetIn::default();
        let single = Call::new(opcode::FORGET, 0).arg(one.as_bytes());
        let head = BatchForgetIn {
            count: u32::try_from(BATCH).unwrap_or(0),
            dummy: 0,
        };
        let ones = [ForgetOne::default(); BATCH];
        let batch = Call::new(opcode::BATCH_FORGET, 0)
            .arg(head.as_bytes())
            .arg(ones.as_bytes());
        let mut requests = Vec::with_capacity(SINGLES + BATCHES);
        for _ in 0..SINGLES {
            requests.push(client.prepare(&single)?);
        }
        for _ in 0..BATCHES {
            requests.push(client.prepare(&batch)?);
        }
        Ok(Self {
            form,
            inner: Mutex::new(Inner {
                queue,
                requests,
                singles: (0..SINGLES).collect(),
                batches: (SINGLES..SINGLES + BATCHES).collect(),
                collected: [ForgetOne::default(); BATCH],
                count: 0,
                sent: 0,
            }),
        })
    }

    /// Forgets one lookup of an inode.
    pub(crate) fn one(&self, nodeid: u64) -> Result<(), FuseError> {
        self.lookups(nodeid, 1)
    }

    /// Forgets this number of lookups of an inode.
    pub(crate) fn lookups(&self, nodeid: u64, nlookup: u64) -> Result<(), FuseError> {
        let mut inner = self.lock();
        match self.form {
            Form::Batch => inner.collect_one(ForgetOne { nodeid, nlookup }),
            Form::Case | Form::Single => inner.single(nodeid, nlookup),
        }
    }

    /// Forgets these lookups.
    pub(crate) fn batch(&self, ones: &[ForgetOne; BATCH]) -> Result<(), FuseError> {
        let mut inner = self.lock();
        match self.form {
            Form::Case | Form::Batch => inner.batch(ones),
            Form::Single => ones
                .iter()
                .try_for_each(|one| inner.single(one.nodeid, one.nlookup)),
        }
    }

    /// Kicks the server if it wants a kick.
    pub(crate) fn kick(&self) -> Result<(), FuseError> {
        self.lock().queue.kick()?;
        Ok(())
    }

    /// Waits until the server has returned everything, and returns the queue.
    pub(crate) fn finish(self) -> (Queue, Result<(), FuseError>) {
        let inner = self.inner.into_inner();
        let mut inner = inner.unwrap_or_else(PoisonError::into_inner);
        let mut result = inner.send_collected();
        while result.is_ok() && inner.queue.in_flight() > 0 {
            result = inner.wait();
        }
        (inner.queue, result)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn single(&mut self, nodeid: u64, nlookup: u64) -> Result<(), FuseError> {
        let number = self.take(|inner| inner.singles.pop())?;
        let nodeid_at = std::mem::offset_of!(InHeader, nodeid);
        self.send(number, |request| {
            request.patch(nodeid_at, &nodeid)?;
            request.patch(Prepared::ARGUMENTS, &ForgetIn { nlookup })
        })
    }

    fn batch(&mut self, ones: &[ForgetOne; BATCH]) -> Result<(), FuseError> {
        let number = self.take(|inner| inner.batches.pop())?;
        let ones_at = Prepared::ARGUMENTS + size_of::<BatchForgetIn>();
        self.send(number, |request| request.patch(ones_at, ones))
    }

    fn collect_one(&mut self, one: ForgetOne) -> Result<(), FuseError> {
        if let Some(place) = self.collected.get_mut(self.count) {
            *place = one;
            self.count += 1;
        }
        if self.count == BATCH {
            self.count = 0;
            let ones = self.collected;
            self.batch(&ones)?;
        }
        Ok(())
    }

    /// Sends what is not a whole batch, one by one.
    fn send_collected(&mut self) -> Result<(), FuseError> {
        let (ones, count) = (self.collected, std::mem::take(&mut self.count));
        ones.iter()
            .take(count)
            .try_for_each(|one| self.single(one.nodeid, one.nlookup))
    }

    /// Takes the number of a request that is not in flight; waits for one if necessary.
    fn take(
        &mut self,
        mut pick: impl FnMut(&mut Self) -> Option<usize>,
    ) -> Result<usize, FuseError> {
        loop {
            if let Some(number) = pick(self) {
                return Ok(number);
            }
            if self.collect()? == 0 {
                self.wait()?;
            }
        }
    }

    fn send(
        &mut self,
        number: usize,
        patch: impl FnOnce(&Prepared) -> Result<(), FuseError>,
    ) -> Result<(), FuseError> {
        let Some(request) = self.requests.get(number) else {
            return Err(FuseError::Stray(number as u64));
        };
        patch(request)?;
        self.sent += 1;
        let unique = MARK | self.sent << 16 | (number as u64) << 1;
        request.stage(&mut self.queue, unique)
    }

    /// Takes the returned requests. Returns how many.
    fn collect(&mut self) -> Result<usize, FuseError> {
        let mut count = 0;
        while let Some(used) = self.queue.pop()? {
            let number = usize::try_from((used.token & 0xffff) >> 1).unwrap_or(usize::MAX);
            if number < SINGLES {
                self.singles.push(number);
            } else {
                self.batches.push(number);
            }
            count += 1;
        }
        Ok(count)
    }

    /// Waits until a request has been returned.
    fn wait(&mut self) -> Result<(), FuseError> {
        self.queue.kick()?;
        let deadline = Instant::now() + TIMEOUT;
        while self.collect()? == 0 {
            if Instant::now() >= deadline {
                let in_flight = self.queue.in_flight();
                return Err(FuseError::Ring(RingError::TimedOut { in_flight }));
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}
