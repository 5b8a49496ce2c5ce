//! What a request needs of the transport: its queue, and the maximum size of its reply.
//!
//! It reads headers and arguments in guest memory and changes nothing. The invariant: the room for
//! a reply is what Linux's virtio-fs driver gives.

use vmm::fuse::wire::{
    AttrOut, EntryOut, GetxattrIn, GetxattrOut, InHeader, InitOut, IoctlIn, IoctlOut, Kstatfs,
    LkOut, LseekOut, OpenOut, OutHeader, PollOut, ReadIn, StatxOut, WriteOut, opcode,
};
use vmm::memory::MemoryError;
use vmm::{Gpa, Memory};

/// Bytes of a request's header.
pub(crate) const IN_HEADER: u32 = size(size_of::<InHeader>());
/// Bytes of a reply's header.
pub(crate) const OUT_HEADER: u32 = size(size_of::<OutHeader>());

/// Room for the reply to an unknown request.
const GENEROUS: u32 = 4096;

/// A request, as far as the transport is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    /// Its length in bytes.
    pub(crate) len: u32,
    /// Bytes of a reply after its header; none if there is no reply.
    pub(crate) reply: Option<u32>,
}

impl Request {
    /// Reads the request at `gpa`.
    pub(crate) fn parse(memory: &Memory, gpa: Gpa) -> Result<Self, MemoryError> {
        let header: InHeader = memory.read_obj(gpa)?;
        Ok(Self {
            opcode: header.opcode,
            unique: header.unique,
            len: header.len,
            reply: reply_room(memory, gpa.offset(IN_HEADER.into()), header.opcode)?,
        })
    }

    /// Whether it goes over the high-priority queue (virtio 1.2, 5.11.6).
    pub(crate) fn is_urgent(&self) -> bool {
        matches!(
            self.opcode,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
        )
    }
}

/// The most that can follow a reply's header; `arguments` are the request's.
fn reply_room(memory: &Memory, arguments: Gpa, opcode: u32) -> Result<Option<u32>, MemoryError> {
    let room = match opcode {
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::NOTIFY_REPLY => {
            return Ok(None);
        }
        opcode::LOOKUP | opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::LINK => {
            size(size_of::<EntryOut>())
        }
        opcode::GETATTR | opcode::SETATTR => size(size_of::<AttrOut>()),
        // One byte less than a page, as the kernel wants to add a NUL.
        opcode::READLINK => 4095,
        opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::RELEASE
        | opcode::RELEASEDIR
        | opcode::FSYNC
        | opcode::FSYNCDIR
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::FLUSH
        | opcode::SETLK
        | opcode::SETLKW
        | opcode::ACCESS
        | opcode::DESTROY
        | opcode::FALLOCATE
        | opcode::SYNCFS => 0,
        opcode::OPEN | opcode::OPENDIR => size(size_of::<OpenOut>()),
        opcode::CREATE | opcode::TMPFILE => size(size_of::<EntryOut>() + size_of::<OpenOut>()),
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS => {
            memory.read_obj::<ReadIn>(arguments)?.size
        }
        opcode::WRITE | opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => {
            size(size_of::<WriteOut>())
        }
        opcode::STATFS => size(size_of::<Kstatfs>()),
        opcode::GETXATTR | opcode::LISTXATTR => {
            match memory.read_obj::<GetxattrIn>(arguments)?.size {
                0 => size(size_of::<GetxattrOut>()),
                asked => asked,
            }
        }
        opcode::INIT => size(size_of::<InitOut>()),
        opcode::GETLK => size(size_of::<LkOut>()),
        opcode::IOCTL => {
            let asked = memory.read_obj::<IoctlIn>(arguments)?.out_size;
            asked.saturating_add(size(size_of::<IoctlOut>()))
        }
        opcode::POLL => size(size_of::<PollOut>()),
        opcode::LSEEK => size(size_of::<LseekOut>()),
        opcode::STATX => size(size_of::<StatxOut>()),
        _ => GENEROUS,
    };
    Ok(Some(room))
}

/// A structure's size as the protocol counts it.
#[expect(
    clippy::cast_possible_truncation,
    reason = "try_from is not const, and no structure is that large"
)]
const fn size(bytes: usize) -> u32 {
    bytes as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::Region;

    fn parsed(opcode: u32, arguments: &[u8]) -> Request {
        let memory = Memory::new(&[Region::new(0, 4096)]).unwrap();
        let header = InHeader {
            len: 80,
            opcode,
            unique: 7,
            ..InHeader::default()
        };
        memory.write_obj(Gpa(0), &header).unwrap();
        memory.write(Gpa(40), arguments).unwrap();
        Request::parse(&memory, Gpa(0)).unwrap()
    }

    #[test]
    fn what_has_no_reply_is_urgent() {
        for opcode in [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT] {
            let request = parsed(opcode, &[]);
            assert!(request.is_urgent());
            assert_eq!(request.reply, None);
        }
        assert!(!parsed(opcode::READ, &[]).is_urgent());
    }

    #[test]
    fn a_read_has_room_for_what_it_asks() {
        let mut arguments = [0; 40];
        arguments[16..20].copy_from_slice(&131_072_u32.to_ne_bytes());
        assert_eq!(parsed(opcode::READ, &arguments).reply, Some(131_072));
    }

    #[test]
    fn a_question_for_a_size_has_room_for_it() {
        assert_eq!(parsed(opcode::LISTXATTR, &[0; 8]).reply, Some(8));
        let asked = 5_u64.to_le_bytes();
        assert_eq!(parsed(opcode::LISTXATTR, &asked).reply, Some(5));
    }
}
