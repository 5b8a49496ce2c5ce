//! How a request's bytes are laid out in guest memory and split into descriptors.

use crate::memory::{Buf, Gpa, Memory, MemoryError};

/// How one direction of a request is cut into descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cut {
    /// All of it in one.
    Whole,
    /// One for the header, one for each argument, one for the payload.
    #[default]
    Fields,
    /// As [`Cut::Fields`], with what is longer than this cut into pieces of this size: with 4096
    /// as Linux does it.
    Pages(u32),
    /// Pieces of these sizes whatever they cut through, then the rest in one.
    Sizes(Vec<u32>),
}

/// How requests are laid out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Buffers that the server reads.
    pub readable: Cut,
    /// Buffers that the server writes.
    pub writable: Cut,
    /// Bytes between buffers, and on either side of them. Where there are some, they are guarded:
    /// a server that writes there is found out.
    pub gap: u32,
}

impl Layout {
    /// As a Linux guest with pages of 4 KiB.
    #[must_use]
    pub fn linux() -> Self {
        Self {
            readable: Cut::Pages(4096),
            writable: Cut::Pages(4096),
            gap: 0,
        }
    }

    /// Both directions cut into these sizes, with guards of an odd length between.
    #[must_use]
    pub fn odd(sizes: &[u32]) -> Self {
        Self {
            readable: Cut::Sizes(sizes.to_vec()),
            writable: Cut::Sizes(sizes.to_vec()),
            gap: 13,
        }
    }
}

impl Cut {
    /// The sizes of the pieces of bytes that have these fields.
    fn pieces(&self, fields: &[u32]) -> Vec<u32> {
        let mut pieces = Vec::new();
        match self {
            Self::Whole => pieces.push(fields.iter().sum()),
            Self::Fields => pieces.extend_from_slice(fields),
            Self::Pages(page) => {
                for &field in fields {
                    cut(field, std::iter::repeat((*page).max(1)), &mut pieces);
                }
            }
            Self::Sizes(sizes) => {
                let whole = fields.iter().sum();
                cut(whole, sizes.iter().copied(), &mut pieces);
            }
        }
        pieces.retain(|&piece| piece > 0);
        pieces
    }

    /// Large buffers are page-aligned, as a guest's are.
    fn align(&self, piece: u32) -> u64 {
        match self {
            Self::Fields | Self::Pages(_) if piece >= 4096 => 4096,
            Self::Fields | Self::Pages(_) => 8,
            Self::Whole | Self::Sizes(_) => 1,
        }
    }
}

/// Splits `len` into `sizes`, and the rest into one.
fn cut(len: u32, sizes: impl Iterator<Item = u32>, pieces: &mut Vec<u32>) {
    let mut left = len;
    for size in sizes {
        if left == 0 {
            return;
        }
        let piece = size.min(left);
        pieces.push(piece);
        left -= piece;
    }
    pieces.push(left);
}

/// The value of guard bytes.
const GUARD: u8 = 0xa5;

/// The buffers of one direction of a request, in a block of guest memory.
#[derive(Debug, Default)]
pub(super) struct Placed {
    pub(super) bufs: Vec<Buf>,
    block: Option<Block>,
    guarded: bool,
}

impl Placed {
    /// Places bytes with these fields.
    pub(super) fn new(
        pool: &mut Pool,
        memory: &Memory,
        cut: &Cut,
        gap: u32,
        fields: &[u32],
    ) -> Result<Self, MemoryError> {
        let pieces = cut.pieces(fields);
        if pieces.is_empty() {
            return Ok(Self::default());
        }
        let gap = u64::from(gap);
        let mut end = gap;
        let mut offsets = Vec::with_capacity(pieces.len());
        for &piece in &pieces {
            let at = end.next_multiple_of(cut.align(piece));
            offsets.push(at);
            end = at + u64::from(piece) + gap;
        }
        let block = pool.take(memory, end)?;
        let pieces = offsets.iter().zip(&pieces);
        let placed = Self {
            bufs: pieces
                .map(|(&at, &len)| Buf::new(block.gpa.offset(at), len))
                .collect(),
            guarded: gap > 0,
            block: Some(block),
        };
        placed.guards(|at, len| memory.fill(at, len, GUARD))?;
        Ok(placed)
    }

    /// Writes bytes across the buffers, as far as they go.
    pub(super) fn write(&self, memory: &Memory, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut left = bytes;
        for buf in &self.bufs {
            let (now, later) = left.split_at(left.len().min(buf.len as usize));
            memory.write(buf.gpa, now)?;
            left = later;
        }
        Ok(())
    }

    /// Reads the first `len` bytes of the buffers, as far as they go.
    pub(super) fn read(&self, memory: &Memory, len: usize) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; len];
        let mut left = bytes.as_mut_slice();
        for buf in &self.bufs {
            let (now, later) = left.split_at_mut(left.len().min(buf.len as usize));
            memory.read(buf.gpa, now)?;
            left = later;
        }
        Ok(bytes)
    }

    /// The first guard byte that has changed.
    pub(super) fn overrun(&self, memory: &Memory) -> Result<Option<Gpa>, MemoryError> {
        let mut found = None;
        self.guards(|at, len| {
            let bytes = memory.read_vec(at, len)?;
            if let (None, Some(bad)) = (found, bytes.iter().position(|&byte| byte != GUARD)) {
                found = Some(at.offset(bad as u64));
            }
            Ok(())
        })?;
        Ok(found)
    }

    pub(super) fn free(self, pool: &mut Pool) {
        if let Some(block) = self.block {
            pool.give(block);
        }
    }

    /// Visits what is between the buffers and on either side of them.
    fn guards(
        &self,
        mut visit: impl FnMut(Gpa, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let Some(block) = self.block.filter(|_| self.guarded) else {
            return Ok(());
        };
        let mut at = block.gpa;
        let end = Buf::new(block.gpa.offset(block.len()), 0);
        for buf in self.bufs.iter().chain([&end]) {
            let len = usize::try_from(buf.gpa.0 - at.0).unwrap_or(0);
            visit(at, len)?;
            at = buf.gpa.offset(buf.len.into());
        }
        Ok(())
    }
}

/// A block of guest memory: a power of two of bytes.
#[derive(Clone, Copy, Debug)]
struct Block {
    gpa: Gpa,
    class: u32,
}

impl Block {
    fn len(&self) -> u64 {
        1 << self.class
    }
}

/// Free blocks, by size.
#[derive(Debug)]
pub(super) struct Pool {
    free: Vec<Vec<Block>>,
}

impl Pool {
    const SMALLEST: u32 = 8;

    pub(super) fn new() -> Self {
        Self {
            free: vec![Vec::new(); 64],
        }
    }

    fn take(&mut self, memory: &Memory, len: u64) -> Result<Block, MemoryError> {
        let class = len.next_power_of_two().trailing_zeros().max(Self::SMALLEST);
        let block = self.free.get_mut(class as usize).and_then(Vec::pop);
        if let Some(block) = block {
            return Ok(block);
        }
        let gpa = memory.alloc(1 << class, 1 << class.min(12))?;
        Ok(Block { gpa, class })
    }

    fn give(&mut self, block: Block) {
        if let Some(free) = self.free.get_mut(block.class as usize) {
            free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    #[test]
    fn cuts_are_what_they_say() {
        let fields = [40, 40, 10_000];
        assert_eq!(Cut::Whole.pieces(&fields), [10_080]);
        assert_eq!(Cut::Fields.pieces(&fields), fields);
        let paged = Cut::Pages(4096).pieces(&fields);
        assert_eq!(paged, [40, 40, 4096, 4096, 1808]);
        let odd = Cut::Sizes(vec![1, 38, 7]).pieces(&fields);
        assert_eq!(odd, [1, 38, 7, 10_034]);
        assert_eq!(Cut::Fields.pieces(&[16, 0]), [16]);
        assert_eq!(Cut::Sizes(vec![16, 9]).pieces(&[16]), [16]);
    }

    #[test]
    fn bytes_come_back_through_any_layout_and_blocks_are_used_again() {
        let memory = Memory::new(&[Region::new(0, 1 << 20)]).unwrap();
        let mut pool = Pool::new();
        let bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
        for _ in 0..100 {
            for cut in [
                Cut::Whole,
                Cut::Fields,
                Cut::Pages(512),
                Cut::Sizes(vec![1, 2, 3]),
            ] {
                let placed = Placed::new(&mut pool, &memory, &cut, 7, &[40, 4960]).unwrap();
                placed.write(&memory, &bytes).unwrap();
                assert_eq!(placed.read(&memory, 5000).unwrap(), bytes);
                assert_eq!(placed.overrun(&memory).unwrap(), None);
                placed.free(&mut pool);
            }
        }
    }

    #[test]
    fn a_byte_outside_of_the_buffers_is_found() {
        let memory = Memory::new(&[Region::new(0, 1 << 20)]).unwrap();
        let mut pool = Pool::new();
        let cut = Cut::Sizes(vec![10]);
        let placed = Placed::new(&mut pool, &memory, &cut, 1, &[20]).unwrap();
        for outside in [placed.bufs[0].gpa.0 - 1, placed.bufs[1].gpa.0 + 10] {
            memory.write(Gpa(outside), b"x").unwrap();
            assert_eq!(placed.overrun(&memory).unwrap(), Some(Gpa(outside)));
            memory.write(Gpa(outside), &[GUARD]).unwrap();
        }
    }
}
