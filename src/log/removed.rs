//! Large files that were removed, still open. A thread gives their room back in steps, one file after the other: if they were closed at once,
//! the file system would give back all of it together and keep the journal's write waiting.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::files::OpenFile;

/// The part of the log's open files that removed ones are at most, as a divisor.
pub(super) const OPEN_FILES_SHARE: usize = 4;

pub(super) struct RemovedFiles {
    /// How many are kept at most: handles are few.
    max: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    files: VecDeque<Arc<OpenFile>>,
    is_stopped: bool,
}

impl RemovedFiles {
    /// Keeps a share of `open_files`.
    pub(super) fn new(open_files: usize) -> Self {
        Self { max: open_files / OPEN_FILES_SHARE, state: Mutex::default(), wake: Condvar::new() }
    }

    /// Keeps a file without a name open until its room was given back. Where too many are kept it is closed at once.
    pub(super) fn keep(&self, file: Arc<OpenFile>) {
        let mut state = self.lock();
        if state.files.len() < self.max && !state.is_stopped {
            state.files.push_back(file);
            self.wake.notify_one();
        }
    }

    /// Gives room back until [`Self::stop`].
    pub(super) fn run(&self) {
        while let Some(file) = self.next() {
            // A file that somebody still reads goes with its last reader.
            let Some(mut file) = Arc::into_inner(file) else { continue };
            if Arc::get_mut(&mut file.file).is_none() {
                continue;
            }
            if !self.give_back(&file) {
                self.lock().files.push_front(Arc::new(file));
            }
        }
    }

    /// False when this was stopped before the file's end.
    fn give_back(&self, file: &OpenFile) -> bool {
        loop {
            let (is_stopped, waiting) = {
                let state = self.lock();
                (state.is_stopped, state.files.len())
            };
            if is_stopped {
                return false;
            }
            // A file that comes while too many wait is closed at once.
            match file.file.give_back_step(waiting > self.max / 2) {
                Ok(true) => {}
                Ok(false) => return true,
                Err(error) => {
                    tracing::debug!(%error, "the room of a removed file is given back at once");
                    return true;
                }
            }
        }
    }

    /// Ends [`Self::run`] after the step in hand, and keeps no more files.
    pub(super) fn stop(&self) {
        self.lock().is_stopped = true;
        self.wake.notify_one();
    }

    /// Closes the files that are left. The file system gives back the room of each then, which takes it 0.5 to 4 ms for
    /// each MiB.
    pub(super) fn close(&self) {
        let files = std::mem::take(&mut self.lock().files);
        drop(files);
    }

    fn next(&self) -> Option<Arc<OpenFile>> {
        let idle = |state: &mut State| state.files.is_empty() && !state.is_stopped;
        let mut state = self.wake.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if state.is_stopped { None } else { state.files.pop_front() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;
    use crate::{
        log::{Disk as _, Mode, RealDisk},
        task,
    };

    /// A stop closed what was left before the log was clean: a minute for a deleted topic of 100 GB, and then it was killed.
    #[test]
    fn files_that_are_left_at_a_stop_stay_open_until_they_are_closed() {
        const BYTES: u64 = 64 << 30;
        let folder = tempfile::tempdir().unwrap();
        let disk = RealDisk::default();
        disk.create_dir_all(folder.path()).unwrap();
        let removed = RemovedFiles::new(8 * OPEN_FILES_SHARE);
        let mut held = Vec::new();
        for name in ["first", "second"] {
            let path = folder.path().join(name);
            let file = disk.open(&path, Mode::Write).unwrap();
            // Nothing is written: it has this length and takes no room.
            file.truncate(BYTES).unwrap();
            held.push(fs::File::open(&path).unwrap());
            fs::remove_file(&path).unwrap();
            removed.keep(Arc::new(OpenFile { file, index: Mutex::default() }));
        }
        let len = |at: usize| held[at].metadata().unwrap().len();
        let removed = Arc::new(removed);
        let runs = Arc::clone(&removed);
        let running = task::spawn_thread("removed-files", move || runs.run());
        while len(0) == BYTES {
            assert!(!running.is_finished());
            thread::yield_now();
        }
        removed.stop();
        running.join().unwrap();
        assert!(len(0) > BYTES / 2 && len(1) == BYTES, "{} and {} bytes", len(0), len(1));
        assert_eq!(removed.lock().files.len(), 2);
        removed.close();
        assert_eq!(removed.lock().files.len(), 0);
    }
}
