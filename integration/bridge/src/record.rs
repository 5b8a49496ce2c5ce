//! Records the requests of a mount in a file: a line for each, without names and contents.
//!
//! A line has these columns, separated by tabs: microseconds since the start; microseconds until the
//! reply; opcode; node; bytes of a READ, WRITE or listing, lookups of a FORGET, inodes of a
//! BATCH_FORGET; offset; length of the name; error number; node of the entry in the reply. What a
//! request doesn't have is 0. The invariant: a line is written whole, whichever lane writes it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use vmm::fuse::wire::{
    BatchForgetIn, CreateIn, ForgetIn, GetxattrIn, InHeader, MkdirIn, MknodIn, OutHeader, ReadIn,
    opcode,
};
use vmm::memory::MemoryError;
use vmm::{Gpa, Memory};

use crate::request::{IN_HEADER, OUT_HEADER, Request};

/// The file that requests are recorded in.
#[derive(Debug)]
pub(crate) struct Recorder {
    began: Instant,
    file: Mutex<BufWriter<File>>,
}

/// A request whose reply has not arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recorded {
    at: u128,
    opcode: u32,
    node: u64,
    size: u64,
    offset: u64,
    name: u32,
}

impl Recorder {
    /// Makes the file.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            began: Instant::now(),
            file: Mutex::new(BufWriter::new(File::create(path)?)),
        })
    }

    /// Reads what is recorded of the request at `gpa`.
    pub(crate) fn request(
        &self,
        memory: &Memory,
        gpa: Gpa,
        request: &Request,
    ) -> Result<Recorded, MemoryError> {
        let header: InHeader = memory.read_obj(gpa)?;
        let arguments = gpa.offset(IN_HEADER.into());
        let (mut size, mut offset) = (0, 0);
        match request.opcode {
            // WRITE's first fields are READ's.
            opcode::READ | opcode::WRITE | opcode::READDIR | opcode::READDIRPLUS => {
                let asked: ReadIn = memory.read_obj(arguments)?;
                (size, offset) = (asked.size.into(), asked.offset);
            }
            opcode::FORGET => size = memory.read_obj::<ForgetIn>(arguments)?.nlookup,
            opcode::BATCH_FORGET => {
                size = memory.read_obj::<BatchForgetIn>(arguments)?.count.into();
            }
            _ => {}
        }
        let before_name = match request.opcode {
            opcode::LOOKUP | opcode::UNLINK | opcode::RMDIR => Some(0),
            opcode::MKDIR => Some(size_of::<MkdirIn>()),
            opcode::MKNOD => Some(size_of::<MknodIn>()),
            opcode::CREATE => Some(size_of::<CreateIn>()),
            opcode::GETXATTR => Some(size_of::<GetxattrIn>()),
            _ => None,
        };
        let name = before_name.map_or(0, |before| {
            let before = u32::try_from(before).unwrap_or(u32::MAX);
            request.len.saturating_sub(IN_HEADER + before + 1)
        });
        Ok(Recorded {
            at: self.began.elapsed().as_micros(),
            opcode: request.opcode,
            node: header.nodeid,
            size,
            offset,
            name,
        })
    }

    /// Records a request that has no reply.
    pub(crate) fn unanswered(&self, recorded: &Recorded) {
        self.line(recorded, 0, 0);
    }

    /// Records a request whose reply is at `gpa`.
    pub(crate) fn answered(
        &self,
        memory: &Memory,
        gpa: Gpa,
        recorded: &Recorded,
    ) -> Result<(), MemoryError> {
        let header: OutHeader = memory.read_obj(gpa)?;
        let has_entry = matches!(
            recorded.opcode,
            opcode::LOOKUP | opcode::MKDIR | opcode::MKNOD | opcode::CREATE | opcode::SYMLINK
        );
        let mut node = 0;
        if header.error == 0 && has_entry {
            node = memory.read_obj(gpa.offset(OUT_HEADER.into()))?;
        }
        self.line(recorded, header.error.saturating_neg(), node);
        Ok(())
    }

    fn line(&self, recorded: &Recorded, error: i32, found: u64) {
        let took = self.began.elapsed().as_micros().saturating_sub(recorded.at);
        let Recorded {
            at,
            opcode,
            node,
            size,
            offset,
            name,
        } = recorded;
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // An error is reported by `finish`, whose write fails as well.
        let _ = writeln!(
            file,
            "{at}\t{took}\t{opcode}\t{node}\t{size}\t{offset}\t{name}\t{error}\t{found}"
        );
    }

    /// Writes what is still buffered.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.file
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::Region;
    use zerocopy::IntoBytes;

    #[test]
    fn a_read_and_a_lookup_are_recorded_with_what_they_have() {
        let path = std::env::temp_dir().join(format!("bridge-record-{}", std::process::id()));
        let recorder = Recorder::new(&path).unwrap();
        let memory = Memory::new(&[Region::new(0, 8192)]).unwrap();
        let header = |opcode, len| InHeader {
            len,
            opcode,
            nodeid: 7,
            ..InHeader::default()
        };
        let asked = ReadIn {
            size: 8192,
            offset: 4096,
            ..ReadIn::default()
        };
        memory.write_obj(Gpa(0), &header(opcode::READ, 80)).unwrap();
        memory.write(Gpa(40), asked.as_bytes()).unwrap();
        let request = Request::parse(&memory, Gpa(0)).unwrap();
        let recorded = recorder.request(&memory, Gpa(0), &request).unwrap();
        recorder.unanswered(&recorded);

        memory
            .write_obj(Gpa(0), &header(opcode::LOOKUP, 45))
            .unwrap();
        let request = Request::parse(&memory, Gpa(0)).unwrap();
        let recorded = recorder.request(&memory, Gpa(0), &request).unwrap();
        memory.write_obj(Gpa(4096), &OutHeader::default()).unwrap();
        memory.write_obj(Gpa(4096 + 16), &99_u64).unwrap();
        recorder.answered(&memory, Gpa(4096), &recorded).unwrap();
        recorder.finish().unwrap();

        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split('\t').skip(2).collect())
            .collect();
        assert_eq!(lines[0], ["15", "7", "8192", "4096", "0", "0", "0"]);
        assert_eq!(lines[1], ["1", "7", "0", "0", "4", "0", "99"]);
    }
}
