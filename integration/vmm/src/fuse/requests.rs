//! Any request, onto the ring and back: submitted one by one or many at once.

use std::collections::hash_map::Entry;

use zerocopy::{FromBytes, IntoBytes};

use super::layout::Placed;
use super::wire::{InHeader, OutHeader, Rename2In, init, opcode};
use super::{Client, Credentials, Errno, FuseError, Guest, Layout, NO_ID};

/// Bytes of a reply's header.
const OUT_HEADER: u32 = 16;

/// A request to be made.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    opcode: u32,
    nodeid: u64,
    args: Vec<&'a [u8]>,
    reply: Option<u32>,
    queue: Option<usize>,
    credentials: Option<Credentials>,
    unique: Option<u64>,
    claimed_len: Option<u32>,
    extension: u16,
}

impl<'a> Call<'a> {
    /// A request without arguments and without room for a reply.
    #[must_use]
    pub fn new(opcode: u32, nodeid: u64) -> Self {
        Self {
            opcode,
            nodeid,
            args: Vec::new(),
            reply: None,
            queue: None,
            credentials: None,
            unique: None,
            claimed_len: None,
            extension: 0,
        }
    }

    /// Adds an argument, in a descriptor of its own where the layout goes by fields.
    #[must_use]
    pub fn arg(mut self, bytes: &'a [u8]) -> Self {
        self.args.push(bytes);
        self
    }

    /// Adds a name with its NUL.
    #[must_use]
    pub fn name(self, name: &'a std::ffi::CStr) -> Self {
        self.arg(name.to_bytes_with_nul())
    }

    /// Adds extensions after the arguments, a multiple of 8 bytes, and says so in the header.
    #[must_use]
    pub fn extension(mut self, bytes: &'a [u8]) -> Self {
        self.extension = u16::try_from(bytes.len() / 8).unwrap_or(u16::MAX);
        self.arg(bytes)
    }

    /// Makes room for a reply with this many bytes after its header.
    #[must_use]
    pub fn reply(mut self, bytes: u32) -> Self {
        self.reply = Some(bytes);
        self
    }

    /// Makes room for a reply with this structure.
    #[must_use]
    pub fn reply_of<T>(self) -> Self {
        self.reply(u32::try_from(size_of::<T>()).unwrap_or(u32::MAX))
    }

    /// Over this queue, whatever queue the client uses.
    #[must_use]
    pub fn on_queue(mut self, queue: usize) -> Self {
        self.queue = Some(queue);
        self
    }

    /// In this user's name, whatever name the client uses.
    #[must_use]
    pub fn by(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// With this number instead of the client's next one. It must not be in flight.
    #[must_use]
    pub fn unique(mut self, unique: u64) -> Self {
        self.unique = Some(unique);
        self
    }

    pub(super) fn opcode(&self) -> u32 {
        self.opcode
    }

    /// With this length in its header, though it has another.
    #[must_use]
    pub fn claiming_len(mut self, len: u32) -> Self {
        self.claimed_len = Some(len);
        self
    }
}

/// A request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "a reply stays in the client until it is collected"]
pub struct Pending {
    unique: u64,
}

impl Pending {
    /// The request's number, for INTERRUPT.
    #[must_use]
    pub fn unique(self) -> u64 {
        self.unique
    }
}

/// A reply without error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's opcode.
    pub opcode: u32,
    /// The bytes after the header.
    pub bytes: Vec<u8>,
}

impl Reply {
    /// The reply as a structure.
    ///
    /// # Errors
    /// [`FuseError::BadReply`] if it is not exactly as long.
    pub fn value<T: FromBytes>(&self) -> Result<T, FuseError> {
        T::read_from_bytes(&self.bytes).map_err(|_size| self.bad_len(size_of::<T>()))
    }

    /// The reply as two structures.
    ///
    /// # Errors
    /// [`FuseError::BadReply`] if it is not exactly as long.
    pub fn values<T: FromBytes, U: FromBytes>(&self) -> Result<(T, U), FuseError> {
        let bad_len = || self.bad_len(size_of::<T>() + size_of::<U>());
        let (first, rest) = T::read_from_prefix(&self.bytes).map_err(|_size| bad_len())?;
        let second = U::read_from_bytes(rest).map_err(|_size| bad_len())?;
        Ok((first, second))
    }

    fn bad_len(&self, wanted: usize) -> FuseError {
        let what = format!("{} bytes instead of {wanted}", self.bytes.len());
        bad_reply(self.opcode, what)
    }
}

/// The client's record of a request in flight.
#[derive(Debug)]
pub(super) struct InFlight {
    opcode: u32,
    queue: usize,
    readable: Placed,
    writable: Placed,
    /// Bytes written, once it is back.
    used: Option<u32>,
}

impl<G: Guest> Client<G> {
    /// Makes a request and waits for its reply.
    ///
    /// # Errors
    /// [`FuseError`].
    pub fn request(&mut self, call: Call<'_>) -> Result<Reply, FuseError> {
        let pending = self.submit(call)?;
        self.collect(pending)
    }

    /// Makes a request and does not wait.
    ///
    /// # Errors
    /// [`FuseError::Ring`] if the ring is full, [`FuseError::Memory`], [`FuseError::NoQueue`].
    pub fn submit(&mut self, call: Call<'_>) -> Result<Pending, FuseError> {
        let pending = self.stage(call)?;
        self.kick_all()?;
        Ok(pending)
    }

    /// Prepares a request that the server does not see before [`Client::kick_all`] or the next
    /// [`Client::submit`].
    ///
    /// # Errors
    /// As [`Client::submit`].
    #[expect(
        clippy::needless_pass_by_value,
        reason = "a call is built where it is made"
    )]
    pub fn stage(&mut self, call: Call<'_>) -> Result<Pending, FuseError> {
        let unique = self.next_unique(&call);
        let index = self.route(&call);
        let (readable, writable) = self.place(&call, unique)?;
        let queues = self.guest.queues();
        let queue = queues.get_mut(index).ok_or(FuseError::NoQueue(index))?;
        if let Err(error) = queue.stage(&readable.bufs, &writable.bufs, unique) {
            readable.free(&mut self.pool);
            writable.free(&mut self.pool);
            return Err(error.into());
        }
        let in_flight = InFlight {
            opcode: call.opcode,
            queue: index,
            readable,
            writable,
            used: None,
        };
        self.in_flight.insert(unique, in_flight);
        Ok(Pending { unique })
    }

    /// Puts a request into guest memory, and makes room for its reply.
    pub(super) fn place(
        &mut self,
        call: &Call<'_>,
        unique: u64,
    ) -> Result<(Placed, Placed), FuseError> {
        let (fields, input) = self.encode(call, unique);
        let output = call.reply.map(|reply| [OUT_HEADER, reply]);
        let output = output.as_ref().map_or(&[][..], |fields| fields);
        let memory = self.guest.memory();
        let Layout {
            readable,
            writable,
            gap,
        } = &self.layout;
        let readable = Placed::new(&mut self.pool, memory, readable, *gap, &fields)?;
        readable.write(memory, &input)?;
        let writable = Placed::new(&mut self.pool, memory, writable, *gap, output)?;
        Ok((readable, writable))
    }

    /// Makes staged requests available, and kicks the server if it wants a kick.
    ///
    /// # Errors
    /// [`FuseError::Ring`].
    pub fn kick_all(&mut self) -> Result<(), FuseError> {
        for queue in self.guest.queues() {
            queue.kick()?;
        }
        Ok(())
    }

    /// Waits for a request's reply.
    ///
    /// # Errors
    /// [`FuseError::Refused`] where the file system says no; [`FuseError::Ring`] if nothing
    /// comes in time, after which it can be tried again; the others where the server breaks the
    /// protocol.
    pub fn collect(&mut self, pending: Pending) -> Result<Reply, FuseError> {
        let unique = pending.unique;
        loop {
            let Entry::Occupied(entry) = self.in_flight.entry(unique) else {
                return Err(FuseError::NotInFlight(unique));
            };
            if let Some(used) = entry.get().used {
                let in_flight = entry.remove();
                return self.finish(unique, in_flight, used);
            }
            let index = entry.get().queue;
            let queues = self.guest.queues();
            let queue = queues.get_mut(index).ok_or(FuseError::NoQueue(index))?;
            queue.wait(self.timeout)?;
            self.pop_all(index)?;
        }
    }

    /// The requests that are back and not yet collected, without waiting, in no order.
    ///
    /// # Errors
    /// [`FuseError::Ring`], [`FuseError::Stray`].
    pub fn returned(&mut self) -> Result<Vec<Pending>, FuseError> {
        for index in 0..self.guest.queues().len() {
            self.pop_all(index)?;
        }
        let back = self.in_flight.iter().filter(|(_, one)| one.used.is_some());
        Ok(back.map(|(&unique, _)| Pending { unique }).collect())
    }

    /// The number of requests in flight or not yet collected.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn pop_all(&mut self, index: usize) -> Result<(), FuseError> {
        let queues = self.guest.queues();
        let queue = queues.get_mut(index).ok_or(FuseError::NoQueue(index))?;
        while let Some(used) = queue.pop()? {
            match self.in_flight.get_mut(&used.token) {
                Some(one) if one.used.is_none() => one.used = Some(used.len),
                _ => return Err(FuseError::Stray(used.token)),
            }
        }
        Ok(())
    }

    /// Numbers go up by 2, as the kernel's do.
    fn next_unique(&mut self, call: &Call<'_>) -> u64 {
        call.unique.unwrap_or_else(|| {
            self.last_unique += 2;
            self.last_unique
        })
    }

    fn route(&mut self, call: &Call<'_>) -> usize {
        let urgent = matches!(
            call.opcode,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
        );
        call.queue.unwrap_or(if urgent { 0 } else { self.queue })
    }

    /// The request's bytes, and the lengths of its header and arguments.
    fn encode(&self, call: &Call<'_>, unique: u64) -> (Vec<u32>, Vec<u8>) {
        let mut fields = vec![u32::try_from(size_of::<InHeader>()).unwrap_or(0)];
        let lens = call.args.iter().map(|arg| u32::try_from(arg.len()));
        fields.extend(lens.map(|len| len.unwrap_or(u32::MAX)));
        let credentials = call
            .credentials
            .unwrap_or_else(|| self.credentials_for(call));
        let header = InHeader {
            len: call.claimed_len.unwrap_or_else(|| fields.iter().sum()),
            opcode: call.opcode,
            unique,
            nodeid: call.nodeid,
            uid: credentials.uid,
            gid: credentials.gid,
            pid: credentials.pid,
            total_extlen: call.extension,
            padding: 0,
        };
        let mut bytes = header.as_bytes().to_vec();
        for arg in &call.args {
            bytes.extend_from_slice(arg);
        }
        (fields, bytes)
    }

    /// The caller that Linux names in this request: with mapped owners it names none, unless
    /// something is created.
    fn credentials_for(&self, call: &Call<'_>) -> Credentials {
        let creates = match call.opcode {
            opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::CREATE | opcode::TMPFILE => {
                true
            }
            opcode::RENAME2 => call
                .args
                .first()
                .and_then(|arg| Rename2In::read_from_bytes(arg).ok())
                .is_some_and(|asked| asked.flags & libc::RENAME_WHITEOUT != 0),
            _ => false,
        };
        if creates || !self.has(init::ALLOW_IDMAP) {
            return self.credentials;
        }
        Credentials {
            uid: NO_ID,
            gid: NO_ID,
            ..self.credentials
        }
    }

    /// Checks the reply, and frees the buffers.
    fn finish(&mut self, unique: u64, in_flight: InFlight, used: u32) -> Result<Reply, FuseError> {
        let memory = self.guest.memory();
        let opcode = in_flight.opcode;
        let overrun = in_flight.readable.overrun(memory)?;
        let overrun = overrun.or(in_flight.writable.overrun(memory)?);
        let room: u32 = in_flight.writable.bufs.iter().map(|buf| buf.len).sum();
        let bytes = in_flight.writable.read(memory, used.min(room) as usize)?;
        in_flight.readable.free(&mut self.pool);
        in_flight.writable.free(&mut self.pool);
        if let Some(gpa) = overrun {
            return Err(FuseError::Overrun { opcode, gpa: gpa.0 });
        }
        if used > room {
            let what = format!("{used} bytes used of {room}");
            return Err(bad_reply(opcode, what));
        }
        if room == 0 {
            return Ok(Reply { opcode, bytes });
        }
        if used == 0 {
            return Err(FuseError::Empty { opcode });
        }
        check(opcode, unique, bytes)
    }
}

/// Removes a reply's header, if it follows the protocol.
fn check(opcode: u32, unique: u64, mut bytes: Vec<u8>) -> Result<Reply, FuseError> {
    let Ok((header, _)) = OutHeader::read_from_prefix(&bytes) else {
        let what = format!("{} bytes used, and no header fits", bytes.len());
        return Err(bad_reply(opcode, what));
    };
    if header.unique != unique {
        let what = format!("it answers request {:#x}, not {unique:#x}", header.unique);
        return Err(bad_reply(opcode, what));
    }
    if header.len as usize != bytes.len() {
        let what = format!("its length is {}, and {} used", header.len, bytes.len());
        return Err(bad_reply(opcode, what));
    }
    let body = bytes.split_off(size_of::<OutHeader>());
    match header.error {
        0 => Ok(Reply {
            opcode,
            bytes: body,
        }),
        -4095..=-1 if body.is_empty() => Err(FuseError::Refused {
            opcode,
            errno: Errno(-header.error),
        }),
        error => {
            let what = format!("error {error} with {} bytes more", body.len());
            Err(bad_reply(opcode, what))
        }
    }
}

pub(super) fn bad_reply(opcode: u32, what: String) -> FuseError {
    FuseError::BadReply { opcode, what }
}
