//! Reads of a partition without a request to its task, and the memory that reads and decompression take.

mod decompressor;
mod memory_budget;
mod reader;
mod tail_reader;

pub use self::{
    decompressor::{DecompressPurpose, Decompressor, INLINE_BYTES},
    memory_budget::{Charge, MemoryBudget},
    reader::{FetchedBatches, PartitionReader, ReadError, ReadSource},
    tail_reader::TailReader,
};
