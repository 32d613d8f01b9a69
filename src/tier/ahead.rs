//! Which readers of a partition go forward, and how far ahead to fetch for each. Pure.

use std::collections::VecDeque;

use crate::model::Offset;

/// Most readers that are remembered for one partition.
const READERS: usize = 16;

/// Most chunks ahead of one reader.
const MOST_CHUNKS: u64 = 16;

/// A place in the partition's chunks: a segment by its base, and a chunk in it.
pub(super) type Place = (Offset, u64);

const NOWHERE: Place = (Offset::ZERO, 0);

/// A reader, known by where its last read ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    next: Offset,
    /// Chunks to keep ahead of it. Doubles with each read that goes on where the last ended.
    pub(super) window: u64,
    /// Chunks before this place were asked for already.
    pub(super) asked: Place,
    /// Chunks before this place were asked for before its last read: they have arrived, or are on their way.
    pub(super) settled: Place,
}

impl Reader {
    /// What was fetched for it was not there when it came: there are more readers than the cache's memory has room for, or the
    /// store fails. Less is fetched, and what lies from `place` on is asked for again.
    pub(super) fn crowded(&mut self, place: Place) {
        self.window /= 4;
        self.asked = place;
    }
}

/// The last readers of one partition.
#[derive(Debug, Default)]
pub(super) struct Readers {
    recent: VecDeque<Reader>,
}

impl Readers {
    /// The reader that reads at `from` now: one that goes on, with a wider window, or a new one, with none.
    pub(super) fn arrive(&mut self, from: Offset) -> Reader {
        let at = self.recent.iter().position(|reader| reader.next == from);
        match at.and_then(|at| self.recent.remove(at)) {
            Some(reader) => Reader { window: (reader.window * 2).clamp(1, MOST_CHUNKS), ..reader },
            None => Reader { next: from, window: 0, asked: NOWHERE, settled: NOWHERE },
        }
    }

    /// Remembers where it will go on.
    pub(super) fn leave(&mut self, reader: Reader, next: Offset) {
        if self.recent.len() == READERS {
            self.recent.pop_front();
        }
        self.recent.push_back(Reader { next, ..reader });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).unwrap()
    }

    #[test]
    fn a_window_grows_only_for_a_reader_that_goes_forward() {
        let mut readers = Readers::default();
        let mut windows = Vec::new();
        for step in 0..7 {
            let reader = readers.arrive(at(step * 10));
            windows.push(reader.window);
            readers.leave(reader, at(step * 10 + 10));
        }
        assert_eq!(windows, [0, 1, 2, 4, 8, 16, 16]);
        assert_eq!(readers.arrive(at(5)).window, 0, "a jump starts anew");
    }

    #[test]
    fn a_window_shrinks_while_the_memory_is_too_small_for_it() {
        let mut readers = Readers::default();
        let mut windows = Vec::new();
        for step in 0..9 {
            let mut reader = readers.arrive(at(step * 10));
            windows.push(reader.window);
            if step > 4 {
                reader.crowded(NOWHERE);
            }
            readers.leave(reader, at(step * 10 + 10));
        }
        assert_eq!(windows, [0, 1, 2, 4, 8, 16, 8, 4, 2]);
    }

    #[test]
    fn many_readers_are_forgotten_and_not_gathered() {
        let mut readers = Readers::default();
        for number in 0..1000 {
            let reader = readers.arrive(at(number * 1000));
            readers.leave(reader, at(number * 1000 + 1));
        }
        assert_eq!(readers.recent.len(), READERS);
    }
}
