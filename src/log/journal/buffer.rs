//! Memory at block boundaries for direct I/O, without unsafe code. The allocation is slightly larger, and a slice of it
//! starts at the boundary.

use crate::log::disk::BLOCK;

/// Reusable memory that starts at a block boundary and grows on demand.
#[derive(Default)]
pub(in crate::log) struct AlignedBuffer {
    memory: Vec<u8>,
}

impl AlignedBuffer {
    /// Returns `len` bytes at a block boundary, with their previous content.
    pub(in crate::log) fn slice(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + BLOCK {
            self.memory = vec![0; len.next_power_of_two() + BLOCK];
        }
        let start = self.memory.as_ptr().align_offset(BLOCK);
        // In theory `align_offset` may return `usize::MAX`. The slice then starts off the boundary.
        let start = if start < BLOCK { start } else { 0 };
        &mut self.memory[start..start + len]
    }
}
