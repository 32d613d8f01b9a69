//! Large files that were removed and are still open. A thread frees their disk space in steps, one file after the
//! other. If they were closed at once, the file system would free all of it together and delay the journal's write.

use std::{collections::VecDeque, sync::Arc};

use super::file_cache::{OpenFile, REMOVED_FILES_SHARE};
use crate::{
    log::disk::File,
    task::lock::{Condvar, Mutex},
};

/// Queue of removed files that are still open.
pub(in crate::log) struct RemovedFiles {
    /// Maximum number of files that are kept, because handles are scarce.
    max: usize,
    state: Mutex<State>,
    /// Signalled when a file is added, and at a stop.
    wake: Condvar,
}

#[derive(Default)]
struct State {
    files: VecDeque<Arc<OpenFile>>,
    is_stopped: bool,
}

impl RemovedFiles {
    /// Returns a queue that keeps at most a quarter of `max_open_files` files open.
    pub(super) fn new(max_open_files: usize) -> Self {
        Self { max: max_open_files / REMOVED_FILES_SHARE, state: Mutex::default(), wake: Condvar::new() }
    }

    /// Keeps a file without a name open until its disk space is freed. A file beyond the maximum number, or after a
    /// stop, is closed at once.
    pub(super) fn keep(&self, file: Arc<OpenFile>) {
        let mut state = self.state.lock();
        if state.files.len() < self.max && !state.is_stopped {
            state.files.push_back(file);
            self.wake.notify_one();
        }
    }

    /// Keeps a file that is not in the file cache, as [`Self::keep`] does.
    pub(in crate::log) fn keep_file(&self, file: Arc<dyn File>) {
        self.keep(Arc::new(OpenFile { file, index: Mutex::default() }));
    }

    /// Frees the disk space of the queued files, oldest first, until [`Self::stop`]. Runs on a thread of its own.
    pub(in crate::log) fn run(&self) {
        while let Some(file) = self.next() {
            // The disk space of a file that another thread still reads is freed when its last reader closes it.
            let Some(mut file) = Arc::into_inner(file) else { continue };
            if Arc::get_mut(&mut file.file).is_none() {
                continue;
            }
            if !self.free_in_steps(&file) {
                // A stop leaves the file to `close`.
                self.state.lock().files.push_front(Arc::new(file));
            }
        }
    }

    /// Frees the disk space of a file in steps. Returns false if [`Self::stop`] was called before the last step.
    fn free_in_steps(&self, file: &OpenFile) -> bool {
        loop {
            let (is_stopped, queued) = {
                let state = self.state.lock();
                (state.is_stopped, state.files.len())
            };
            if is_stopped {
                return false;
            }
            // A file that is added to a full queue is closed at once, so the steps are larger while the queue is long.
            match file.file.free_step(queued > self.max / 2) {
                Ok(true) => {}
                Ok(false) => return true,
                Err(error) => {
                    tracing::debug!(%error, "cannot free the space of a removed file in steps: freeing it at once");
                    return true;
                }
            }
        }
    }

    /// Ends [`Self::run`] after the current step; no more files are kept.
    pub(in crate::log) fn stop(&self) {
        self.state.lock().is_stopped = true;
        self.wake.notify_one();
    }

    /// Closes the remaining files. The file system then frees the space of each file at once, which takes 0.5 to 4 ms
    /// per MiB.
    pub(in crate::log) fn close(&self) {
        let files = std::mem::take(&mut self.state.lock().files);
        drop(files);
    }

    /// Waits for the next file and takes it from the queue. Returns `None` at a stop.
    fn next(&self) -> Option<Arc<OpenFile>> {
        let is_idle = |state: &mut State| state.files.is_empty() && !state.is_stopped;
        let mut state = self.wake.wait_while(self.state.lock(), is_idle);
        if state.is_stopped { None } else { state.files.pop_front() }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;
    use crate::{
        log::{Disk as _, OpenMode, RealDisk},
        task,
    };

    /// Regression: a stop closed the remaining files before the checkpoint of a clean shutdown was written. For a
    /// deleted topic of 100 GB that took a minute, and then the process was killed.
    #[test]
    fn remaining_files_stay_open_from_stop_to_close() {
        const BYTES: u64 = 64 << 30;
        let folder = tempfile::tempdir().unwrap();
        let disk = RealDisk::default();
        disk.create_dir_all(folder.path()).unwrap();
        let removed = RemovedFiles::new(8 * REMOVED_FILES_SHARE);
        let mut handles = Vec::new();
        for name in ["first", "second"] {
            let path = folder.path().join(name);
            let file = disk.open(&path, OpenMode::Write).unwrap();
            // The file is sparse: it has this length and no disk space.
            file.truncate(BYTES).unwrap();
            handles.push(fs::File::open(&path).unwrap());
            fs::remove_file(&path).unwrap();
            removed.keep(Arc::new(OpenFile { file, index: Mutex::default() }));
        }
        let len = |index: usize| handles[index].metadata().unwrap().len();
        let removed = Arc::new(removed);
        let worker_files = Arc::clone(&removed);
        let worker = task::spawn_thread("removed-files", move || worker_files.run());
        while len(0) == BYTES {
            assert!(!worker.is_finished());
            thread::yield_now();
        }
        removed.stop();
        worker.join().unwrap();
        assert!(len(0) > BYTES / 2 && len(1) == BYTES, "{} and {} bytes", len(0), len(1));
        assert_eq!(removed.state.lock().files.len(), 2);
        removed.close();
        assert_eq!(removed.state.lock().files.len(), 0);
    }
}
