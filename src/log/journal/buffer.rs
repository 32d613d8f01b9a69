//! Memory at block boundaries, as direct I/O asks for, without unsafe code: a little more is allocated, and a slice of
//! it begins at the boundary.

use crate::log::disk::BLOCK;

/// Memory that begins at a block boundary; grows, and is used again.
#[derive(Default)]
pub(in crate::log) struct AlignedBuffer {
    memory: Vec<u8>,
}

impl AlignedBuffer {
    /// `len` bytes at a block boundary, with whatever was in them before.
    pub(in crate::log) fn slice(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + BLOCK {
            self.memory = vec![0; len.next_power_of_two() + BLOCK];
        }
        let start = self.memory.as_ptr().align_offset(BLOCK);
        // `align_offset` may decline to answer (usize::MAX), in theory only: then the file is written by copy.
        let start = if start < BLOCK { start } else { 0 };
        &mut self.memory[start..start + len]
    }
}
