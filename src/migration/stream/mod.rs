//! The stream format of a session that is migrated to another server.
//!
//! Plain data and its encoding: a header with a version, records with their lengths, and a checksum
//! over all of it. Nothing here opens or knows files. All numbers are little-endian. The invariant:
//! [`decode`] returns what [`encode`] was given, or an error; whatever its input, it never panics
//! and takes no more memory than a few times the input's size.
//!
//! A later version of the program may append fields to a record without a new version of the
//! stream, because unknown bytes at the end of a record are skipped. A change that must not be
//! skipped needs a new version.

use std::fmt;

/// The version of the stream that is written, and the only one that is read.
pub(crate) const VERSION: u32 = 1;

/// Maximum length of a stream, bytes: enough for a few million inodes and the contents that
/// [`MAX_CONTENT`] allows.
pub(crate) const MAX_LEN: usize = 1 << 30;

/// Maximum total size of the contents of files without a name that are sent along, bytes.
pub(crate) const MAX_CONTENT: u64 = 256 << 20;

const MAGIC: [u8; 8] = *b"RINGFSDm";

/// Bytes before the first record.
const HEADER: usize = MAGIC.len() + 4 + 4;

/// Bytes behind the last record.
const CHECKSUM: usize = 8;

/// Why a stream can't be decoded. None of it has then been used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It is not a session of ringfsd.
    #[error("this is not a session of ringfsd: both sides must run ringfsd")]
    Foreign,
    /// The version is not supported.
    #[error(
        "the state has version {found}, but this server reads version {VERSION}: run the same version of \
         ringfsd on both sides"
    )]
    Version {
        /// The stream's version.
        found: u32,
    },
    /// The stream is truncated.
    #[error("the state is truncated: only {found} bytes were received")]
    Truncated {
        /// Bytes that were received.
        found: usize,
    },
    /// The checksum doesn't match.
    #[error("the state is damaged: its checksum doesn't match")]
    Checksum,
    /// The stream has an invalid value.
    #[error("the state is invalid: {what} at byte {at}")]
    Invalid {
        /// The invalid value.
        what: &'static str,
        /// Its position.
        at: usize,
    },
    /// Longer than `MAX_LEN`.
    #[error("the state is longer than the allowed {MAX_LEN} bytes")]
    TooLong,
}

/// Everything that a session holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The negotiated parameters; `None` before INIT.
    pub agreement: Option<Agreement>,
    /// The generation of the guest's file handles so far.
    pub generation: u64,
    /// The next unused node id.
    pub next_node: u64,
    /// The next unused handle.
    pub next_handle: u64,
    /// The shared directory.
    pub root: Root,
    /// Inodes, each after the inodes that it is found by.
    pub inodes: Vec<Inode>,
    /// Open files and directories.
    pub opens: Vec<Open>,
    /// Record locks.
    pub locks: Vec<Locks>,
}

/// The negotiated parameters that the guest depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Minor version of FUSE.
    pub minor: u32,
    /// All flags of INIT, both halves.
    pub flags: u64,
    /// Read-ahead, bytes.
    pub max_readahead: u32,
    /// Longest WRITE, bytes.
    pub max_write: u32,
    /// Most pages in one request.
    pub max_pages: u16,
    /// Most requests in the background.
    pub max_background: u16,
}

/// How the shared directory is recognised.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// Its file handle; empty where the file system has none.
    pub handle: Vec<u8>,
    /// Its inode number.
    pub number: u64,
    /// Creation time, nanoseconds since 1970.
    pub birth: Option<i64>,
}

/// An inode that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// The guest's number for it.
    pub node: u64,
    /// Lookups that the guest has not dropped.
    pub lookups: u64,
    /// File type, as in `st_mode`.
    pub kind: u32,
    /// Inode number at the source.
    pub number: u64,
    /// Creation time, nanoseconds since 1970, if known.
    pub birth: Option<i64>,
    /// File handle; empty if it is unknown or unreliable.
    pub handle: Vec<u8>,
    /// How the inode is found.
    pub find: Find,
}

/// How an inode is found at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Find {
    /// By its file handle.
    Handle,
    /// By a path relative to another inode: names with `/` between them.
    Path {
        /// The starting inode: the root, or an inode earlier in the list.
        from: u64,
        /// The path.
        path: Vec<u8>,
        /// Whether the file handle must match.
        verify: bool,
    },
    /// It has no name any more but is still in use. It is found by its handle if possible, and
    /// otherwise created anew.
    Nameless(Nameless),
    /// Not found, because it no longer exists: the guest gets errors, as it would have at the
    /// source.
    Gone,
    /// Not found, although it exists: the guest would get errors without a reason.
    Lost,
}

/// An inode without a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nameless {
    /// Permission bits.
    pub mode: u32,
    /// Owner on the host.
    pub uid: u32,
    /// Group on the host.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Times of the last access and the last change of the data: nanoseconds since 1970.
    pub times: [i64; 2],
    /// Contents as offset and bytes; zeros in between.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

/// An open file or directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The guest's number for it.
    pub handle: u64,
    /// The inode's node id.
    pub node: u64,
    /// The host's flags, as `open(2)` has them.
    pub flags: u32,
    /// Whether it is a directory.
    pub directory: bool,
    /// The lock on the whole file.
    pub flock: Flock,
}

/// A lock on a whole file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flock {
    /// None.
    #[default]
    None,
    /// A shared lock.
    Shared,
    /// An exclusive lock.
    Exclusive,
}

/// The record locks that an owner has on a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locks {
    /// The inode's node id.
    pub node: u64,
    /// The lock owner.
    pub owner: u64,
    /// The handle used for the last lock.
    pub handle: u64,
    /// The locked ranges.
    pub ranges: Vec<Range>,
}

/// A locked range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub start: u64,
    /// The last byte.
    pub end: u64,
    /// Whether the lock is exclusive.
    pub exclusive: bool,
}

mod tag {
    pub(super) const SESSION: u8 = 1;
    pub(super) const INODE: u8 = 2;
    pub(super) const OPEN: u8 = 3;
    pub(super) const LOCKS: u8 = 4;
    pub(super) const END: u8 = 0xff;
}

mod found_by {
    pub(super) const HANDLE: u8 = 1;
    pub(super) const PATH: u8 = 2;
    pub(super) const PATH_VERIFIED: u8 = 3;
    pub(super) const NAMELESS: u8 = 4;
    pub(super) const LOST: u8 = 5;
    pub(super) const GONE: u8 = 6;
}

/// Encodes `snapshot`.
///
/// # Errors
///
/// `StreamError::TooLong`.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, StreamError> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    // Reserved.
    out.extend([0; 4]);
    record(&mut out, tag::SESSION, |out| session(out, snapshot));
    for inode in &snapshot.inodes {
        record(&mut out, tag::INODE, |out| put_inode(out, inode));
        if out.len() > MAX_LEN {
            return Err(StreamError::TooLong);
        }
    }
    for open in &snapshot.opens {
        record(&mut out, tag::OPEN, |out| {
            word(out, open.handle);
            word(out, open.node);
            out.extend(open.flags.to_le_bytes());
            out.push(u8::from(open.directory));
            out.push(match open.flock {
                Flock::None => 0,
                Flock::Shared => 1,
                Flock::Exclusive => 2,
            });
        });
    }
    for locks in &snapshot.locks {
        record(&mut out, tag::LOCKS, |out| {
            word(out, locks.node);
            word(out, locks.owner);
            word(out, locks.handle);
            word(out, len(&locks.ranges));
            for range in &locks.ranges {
                word(out, range.start);
                word(out, range.end);
                out.push(u8::from(range.exclusive));
            }
        });
    }
    record(&mut out, tag::END, |_| {});
    let sum = checksum(&out);
    word(&mut out, sum);
    if out.len() > MAX_LEN {
        return Err(StreamError::TooLong);
    }
    Ok(out)
}

fn session(out: &mut Vec<u8>, snapshot: &Snapshot) {
    word(out, snapshot.generation);
    word(out, snapshot.next_node);
    word(out, snapshot.next_handle);
    bytes(out, &snapshot.root.handle);
    word(out, snapshot.root.number);
    optional(out, snapshot.root.birth);
    out.push(u8::from(snapshot.agreement.is_some()));
    if let Some(agreed) = &snapshot.agreement {
        out.extend(agreed.minor.to_le_bytes());
        word(out, agreed.flags);
        out.extend(agreed.max_readahead.to_le_bytes());
        out.extend(agreed.max_write.to_le_bytes());
        out.extend(agreed.max_pages.to_le_bytes());
        out.extend(agreed.max_background.to_le_bytes());
    }
}

fn put_inode(out: &mut Vec<u8>, inode: &Inode) {
    word(out, inode.node);
    word(out, inode.lookups);
    out.extend(inode.kind.to_le_bytes());
    word(out, inode.number);
    optional(out, inode.birth);
    bytes(out, &inode.handle);
    match &inode.find {
        Find::Handle => out.push(found_by::HANDLE),
        Find::Path { from, path, verify } => {
            out.push(if *verify {
                found_by::PATH_VERIFIED
            } else {
                found_by::PATH
            });
            word(out, *from);
            bytes(out, path);
        }
        Find::Nameless(nameless) => {
            out.push(found_by::NAMELESS);
            out.extend(nameless.mode.to_le_bytes());
            out.extend(nameless.uid.to_le_bytes());
            out.extend(nameless.gid.to_le_bytes());
            word(out, nameless.size);
            for time in nameless.times {
                word(out, time.cast_unsigned());
            }
            word(out, len(&nameless.pieces));
            for (at, piece) in &nameless.pieces {
                word(out, *at);
                bytes(out, piece);
            }
        }
        Find::Lost => out.push(found_by::LOST),
        Find::Gone => out.push(found_by::GONE),
    }
}

/// Appends a record: tag, length and contents.
fn record(out: &mut Vec<u8>, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    let length = out.len();
    word(out, 0);
    let begin = out.len();
    body(out);
    let written = (out.len() - begin) as u64;
    out[length..begin].copy_from_slice(&written.to_le_bytes());
}

fn word(out: &mut Vec<u8>, word: u64) {
    out.extend(word.to_le_bytes());
}

fn optional(out: &mut Vec<u8>, number: Option<i64>) {
    out.push(u8::from(number.is_some()));
    word(out, number.unwrap_or(0).cast_unsigned());
}

fn bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    word(out, bytes.len() as u64);
    out.extend(bytes);
}

fn len<T>(of: &[T]) -> u64 {
    of.len() as u64
}

/// A checksum against accidental damage, not against manipulation.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = bytes.len() as u64;
    let mut mix = |word: u64| {
        let product = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum = product ^ product >> 32;
    };
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        mix(u64::from_le_bytes(*word));
    }
    for byte in rest {
        mix(u64::from(*byte));
    }
    sum
}

/// Appends the checksum to a stream without one.
#[must_use]
pub fn sealed(body: &[u8]) -> Vec<u8> {
    [body, &checksum(body).to_le_bytes()].concat()
}

/// Decodes `stream`.
///
/// # Errors
///
/// See `StreamError`.
pub fn decode(stream: &[u8]) -> Result<Snapshot, StreamError> {
    if stream.len() > MAX_LEN {
        return Err(StreamError::TooLong);
    }
    let cut = StreamError::Truncated {
        found: stream.len(),
    };
    let (magic, rest) = stream.split_first_chunk::<8>().ok_or(cut)?;
    if *magic != MAGIC {
        return Err(StreamError::Foreign);
    }
    let (version, _) = rest.split_first_chunk::<4>().ok_or(cut)?;
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        return Err(StreamError::Version { found });
    }
    let (body, sum) = stream.split_last_chunk::<CHECKSUM>().ok_or(cut)?;
    if body.len() < HEADER {
        return Err(cut);
    }
    if checksum(body) != u64::from_le_bytes(*sum) {
        // Missing bytes and wrong bytes can be told apart only by whether the end is there.
        return Err(if is_complete(stream) {
            StreamError::Checksum
        } else {
            cut
        });
    }
    Reader {
        bytes: body,
        at: HEADER,
        end: body.len(),
    }
    .snapshot()
}

/// Whether the records end where the stream ends.
fn is_complete(stream: &[u8]) -> bool {
    let mut at = HEADER;
    loop {
        let Some((tag, rest)) = stream.get(at..).and_then(<[u8]>::split_first) else {
            return false;
        };
        let Some((length, rest)) = rest.split_first_chunk::<8>() else {
            return false;
        };
        if *tag == tag::END {
            return rest.len() == CHECKSUM;
        }
        let Some(next) = usize::try_from(u64::from_le_bytes(*length))
            .ok()
            .filter(|length| *length <= rest.len())
            .and_then(|length| at.checked_add(9)?.checked_add(length))
        else {
            return false;
        };
        at = next;
    }
}

/// The unread part of a stream, or of one record.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
}

type Read<T> = Result<T, StreamError>;

impl<'a> Reader<'a> {
    fn snapshot(&mut self) -> Read<Snapshot> {
        let mut snapshot = Snapshot::default();
        let mut has_session = false;
        loop {
            let at = self.at;
            let tag = self.byte()?;
            let mut record = self.record()?;
            if !has_session && tag != tag::SESSION {
                return Err(wrong("no session to begin with", at));
            }
            match tag {
                tag::SESSION if has_session => return Err(wrong("a second session", at)),
                tag::SESSION => {
                    record.session(&mut snapshot)?;
                    has_session = true;
                }
                tag::INODE => snapshot.inodes.push(record.inode()?),
                tag::OPEN => snapshot.opens.push(record.open()?),
                tag::LOCKS => snapshot.locks.push(record.locks()?),
                tag::END if self.at == self.end => return Ok(snapshot),
                tag::END => return Err(wrong("data behind the end", self.at)),
                _ => return Err(wrong("a record of an unknown kind", at)),
            }
        }
    }

    /// A reader for the next record.
    fn record(&mut self) -> Read<Self> {
        let at = self.at;
        let length = self.length()?;
        let begin = self.at;
        self.at = begin.checked_add(length).ok_or(wrong("a length", at))?;
        Ok(Self {
            bytes: self.bytes,
            at: begin,
            end: self.at,
        })
    }

    fn session(&mut self, into: &mut Snapshot) -> Read<()> {
        into.generation = self.word()?;
        into.next_node = self.word()?;
        into.next_handle = self.word()?;
        into.root = Root {
            handle: self.byte_string()?,
            number: self.word()?,
            birth: self.optional()?,
        };
        if self.flag()? {
            into.agreement = Some(Agreement {
                minor: self.half()?,
                flags: self.word()?,
                max_readahead: self.half()?,
                max_write: self.half()?,
                max_pages: u16::from_le_bytes(self.array()?),
                max_background: u16::from_le_bytes(self.array()?),
            });
        }
        Ok(())
    }

    fn inode(&mut self) -> Read<Inode> {
        Ok(Inode {
            node: self.word()?,
            lookups: self.word()?,
            kind: self.half()?,
            number: self.word()?,
            birth: self.optional()?,
            handle: self.byte_string()?,
            find: self.find()?,
        })
    }

    fn find(&mut self) -> Read<Find> {
        let at = self.at;
        Ok(match self.byte()? {
            found_by::HANDLE => Find::Handle,
            by @ (found_by::PATH | found_by::PATH_VERIFIED) => Find::Path {
                from: self.word()?,
                path: self.byte_string()?,
                verify: by == found_by::PATH_VERIFIED,
            },
            found_by::NAMELESS => Find::Nameless(Nameless {
                mode: self.half()?,
                uid: self.half()?,
                gid: self.half()?,
                size: self.word()?,
                times: [self.word()?.cast_signed(), self.word()?.cast_signed()],
                pieces: self.list(16, |piece| Ok((piece.word()?, piece.byte_string()?)))?,
            }),
            found_by::LOST => Find::Lost,
            found_by::GONE => Find::Gone,
            _ => return Err(wrong("an unknown method to find an inode", at)),
        })
    }

    fn open(&mut self) -> Read<Open> {
        Ok(Open {
            handle: self.word()?,
            node: self.word()?,
            flags: self.half()?,
            directory: self.flag()?,
            flock: {
                let at = self.at;
                match self.byte()? {
                    0 => Flock::None,
                    1 => Flock::Shared,
                    2 => Flock::Exclusive,
                    _ => return Err(wrong("an unknown lock", at)),
                }
            },
        })
    }

    fn locks(&mut self) -> Read<Locks> {
        Ok(Locks {
            node: self.word()?,
            owner: self.word()?,
            handle: self.word()?,
            ranges: self.list(17, |range| {
                Ok(Range {
                    start: range.word()?,
                    end: range.word()?,
                    exclusive: range.flag()?,
                })
            })?,
        })
    }

    /// A list whose elements take at least `min_len` bytes each.
    fn list<T>(
        &mut self,
        min_len: usize,
        mut read_element: impl FnMut(&mut Self) -> Read<T>,
    ) -> Read<Vec<T>> {
        let at = self.at;
        let count = self.word()?;
        let room = self.end.saturating_sub(self.at) / min_len.max(1);
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= room)
            .ok_or(wrong("a list longer than its record", at))?;
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(read_element(self)?);
        }
        Ok(list)
    }

    fn byte_string(&mut self) -> Read<Vec<u8>> {
        let length = self.length()?;
        Ok(self.take(length)?.to_vec())
    }

    /// A length, which must not exceed what is left.
    fn length(&mut self) -> Read<usize> {
        let at = self.at;
        let length = self.word()?;
        usize::try_from(length)
            .ok()
            .filter(|length| *length <= self.end.saturating_sub(self.at))
            .ok_or(wrong("a length beyond the end", at))
    }

    fn take(&mut self, length: usize) -> Read<&'a [u8]> {
        let at = self.at;
        let end = at
            .checked_add(length)
            .filter(|end| *end <= self.end)
            .ok_or(wrong("an end", at))?;
        self.at = end;
        self.bytes.get(at..end).ok_or(wrong("an end", at))
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let at = self.at;
        let taken = self.take(N)?.first_chunk();
        taken.copied().ok_or(wrong("an end", at))
    }

    fn byte(&mut self) -> Read<u8> {
        self.array().map(|[byte]| byte)
    }

    fn flag(&mut self) -> Read<bool> {
        let at = self.at;
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(wrong("an invalid boolean", at)),
        }
    }

    fn half(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn word(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn optional(&mut self) -> Read<Option<i64>> {
        let is_some = self.flag()?;
        let number = self.word()?.cast_signed();
        Ok(is_some.then_some(number))
    }
}

fn wrong(what: &'static str, at: usize) -> StreamError {
    StreamError::Invalid { what, at }
}

impl fmt::Display for Find {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handle => f.write_str("by its file handle"),
            Self::Path { from, path, .. } => {
                write!(f, "as {} from node {from}", path.escape_ascii())
            }
            Self::Nameless(_) => f.write_str("without a name"),
            Self::Lost | Self::Gone => f.write_str("not at all"),
        }
    }
}

#[cfg(test)]
mod tests;
