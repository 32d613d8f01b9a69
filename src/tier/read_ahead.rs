//! Detects the sequential readers of a partition, and decides how far to fetch ahead of each. Pure.

use std::collections::VecDeque;

use crate::model::Offset;

/// Maximum number of readers that are tracked per partition.
const MAX_READERS: usize = 16;

/// Maximum number of chunks that are fetched ahead of one reader.
const MAX_CHUNKS: u64 = 16;

/// A position in the partition's chunks: the base offset of a segment, and the index of a chunk in it.
pub(super) type ReadPosition = (Offset, u64);

const NO_POSITION: ReadPosition = (Offset::ZERO, 0);

/// A reader, identified by the offset at which its last read ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct SequentialReader {
    next: Offset,
    /// Number of chunks to fetch ahead of the reader. The window doubles with each read that continues where the last
    /// one ended.
    pub(super) window: u64,
    /// Chunks before this position were requested already.
    pub(super) requested: ReadPosition,
    /// Chunks before this position were requested before the reader's last read. They should have arrived or be in
    /// flight.
    pub(super) requested_before: ReadPosition,
}

impl SequentialReader {
    /// Quarters the window. Called if a prefetched chunk was missing when its reader needed it. Either the memory of
    /// the cache is too small for all readers, or the store fails. The chunks from `position` on are requested again.
    pub(super) fn shrink_window(&mut self, position: ReadPosition) {
        self.window /= 4;
        self.requested = position;
    }
}

/// The most recent readers of one partition.
#[derive(Debug, Default)]
pub(super) struct ReadAheadTracker {
    recent: VecDeque<SequentialReader>,
}

impl ReadAheadTracker {
    /// Returns the reader that now reads at `from`, and removes it until [`ReadAheadTracker::leave`]. This is the one
    /// whose last read ended at `from`, with a wider window, or a new one with an empty window.
    pub(super) fn arrive(&mut self, from: Offset) -> SequentialReader {
        let index = self.recent.iter().position(|reader| reader.next == from);
        match index.and_then(|index| self.recent.remove(index)) {
            Some(reader) => SequentialReader { window: (reader.window * 2).clamp(1, MAX_CHUNKS), ..reader },
            None => SequentialReader { next: from, window: 0, requested: NO_POSITION, requested_before: NO_POSITION },
        }
    }

    /// Stores a reader whose read ended at `next`. If too many readers are stored, removes the oldest one.
    pub(super) fn leave(&mut self, reader: SequentialReader, next: Offset) {
        if self.recent.len() == MAX_READERS {
            self.recent.pop_front();
        }
        self.recent.push_back(SequentialReader { next, ..reader });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).unwrap()
    }

    #[test]
    fn window_grows_only_for_sequential_reader() {
        let mut readers = ReadAheadTracker::default();
        let mut windows = Vec::new();
        for step in 0..7 {
            let reader = readers.arrive(at(step * 10));
            windows.push(reader.window);
            readers.leave(reader, at(step * 10 + 10));
        }
        assert_eq!(windows, [0, 1, 2, 4, 8, 16, 16]);
        assert_eq!(readers.arrive(at(5)).window, 0, "a jump resets the window");
    }

    #[test]
    fn window_shrinks_while_memory_is_too_small() {
        let mut readers = ReadAheadTracker::default();
        let mut windows = Vec::new();
        for step in 0..9 {
            let mut reader = readers.arrive(at(step * 10));
            windows.push(reader.window);
            if step > 4 {
                reader.shrink_window(NO_POSITION);
            }
            readers.leave(reader, at(step * 10 + 10));
        }
        assert_eq!(windows, [0, 1, 2, 4, 8, 16, 8, 4, 2]);
    }

    #[test]
    fn number_of_tracked_readers_is_bounded() {
        let mut readers = ReadAheadTracker::default();
        for number in 0..1000 {
            let reader = readers.arrive(at(number * 1000));
            readers.leave(reader, at(number * 1000 + 1));
        }
        assert_eq!(readers.recent.len(), MAX_READERS);
    }
}
