//! Large files that were removed, still open. Were they closed at once, the file system would give all their room back together and keep the
//! journal's write waiting. A thread gives it back in steps, one file after the other.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::files::OpenFile;

/// The part of the log's open files that removed ones are at most, as a divisor.
pub(super) const SHARE: usize = 4;

pub(super) struct RemovedFiles {
    /// How many are kept at most: handles are few.
    most: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    files: VecDeque<Arc<OpenFile>>,
    is_closed: bool,
}

impl RemovedFiles {
    /// Keeps a share of `open_files`.
    pub(super) fn new(open_files: usize) -> Self {
        Self { most: open_files / SHARE, state: Mutex::default(), wake: Condvar::new() }
    }

    /// Keeps a file without a name open until its room was given back. Where too many are kept it is closed at once.
    pub(super) fn keep(&self, file: Arc<OpenFile>) {
        let mut state = self.lock();
        if state.files.len() < self.most && !state.is_closed {
            state.files.push_back(file);
            self.wake.notify_one();
        }
    }

    /// Gives room back until [`Self::close`].
    pub(super) fn run(&self) {
        while let Some(file) = self.next() {
            // A file that somebody still reads goes with its last reader.
            let Some(mut file) = Arc::into_inner(file) else { continue };
            if Arc::get_mut(&mut file.file).is_some()
                && let Err(error) = file.file.give_back()
            {
                tracing::debug!(%error, "the room of a removed file is given back at once");
            }
        }
    }

    /// Closes all of them at once, and keeps none any longer.
    pub(super) fn close(&self) {
        let files = {
            let mut state = self.lock();
            state.is_closed = true;
            std::mem::take(&mut state.files)
        };
        self.wake.notify_one();
        drop(files);
    }

    fn next(&self) -> Option<Arc<OpenFile>> {
        let idle = |state: &mut State| state.files.is_empty() && !state.is_closed;
        let mut state = self.wake.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        state.files.pop_front()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
