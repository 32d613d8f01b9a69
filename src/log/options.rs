//! Options of a data directory, for all layers of the log.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{limits, telemetry::Metrics};

/// Options of a data directory.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Size of all journal files together, in bytes. The files are created on demand.
    pub journal_bytes: u64,
    /// Directory of the journal, possibly on another device. `None` places the journal in the data directory.
    pub journal_dir: Option<PathBuf>,
    /// True to open a directory whose journal is missing after an unclean stop. Data that was only in that journal is
    /// lost.
    pub accept_journal_loss: bool,
    /// Maximum payload of a journal frame in bytes; at most a third of a journal file. Each frame takes one write and
    /// one sync.
    pub max_frame_bytes: usize,
    /// Maximum bytes of one persist call that go to the journal. Above the limit the segments are synced instead, which
    /// avoids writing the bytes twice.
    pub max_journaled_bytes: usize,
    /// Size of the tail cache of all partitions, in bytes.
    pub tail_bytes: usize,
    /// Bytes of producer state of all replicas above which tables with many producers refuse new producers.
    pub producer_bytes: usize,
    /// Unsynced bytes of all segments after which a background sync starts; at most an eighth of the journal's ring.
    /// Many replicas with unsynced data raise the threshold, to at most a quarter of the ring. The value is large
    /// because each sync is a commit of the file system, for which the journal's write waits. The bytes themselves are
    /// written out earlier, in pieces.
    pub sync_bytes: u64,
    /// Approximate maximum time that a segment stays unsynced.
    pub sync_after: Duration,
    /// Disk bytes that appends leave free. Checkpoints, indexes, and the metadata store beside the log need them: these
    /// files are written before a segment can be deleted.
    pub reserve_bytes: u64,
    /// Metrics of the journal's frames.
    pub metrics: Metrics,
    /// True to run without threads. The caller does their work by
    /// [`DataDir::journal_step`](super::DataDir::journal_step) and [`DataDir::sync_step`](super::DataDir::sync_step).
    /// Used by the simulator.
    pub step_mode: bool,
    /// In step mode: callback that signals possible work for a step. `None` if nothing has to be signalled.
    pub sim_hook: Option<SimHook>,
}

/// Callback that signals possible work in the journal or the segments when no threads run.
#[derive(Clone)]
pub struct SimHook(Arc<dyn Fn() + Send + Sync>);

impl SimHook {
    /// Creates the callback. `wake` is called from any thread, possibly with locks held, so it must only wake the
    /// driver of the steps.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }

    /// Signals possible work.
    pub(super) fn wake(&self) {
        (self.0)();
    }
}

impl fmt::Debug for SimHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimHook")
    }
}

impl LogOptions {
    /// Returns the directory of the journal for the data directory `dir`.
    pub(super) fn journal_in(&self, dir: &Path) -> PathBuf {
        self.journal_dir.clone().unwrap_or_else(|| dir.join("journal"))
    }
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            journal_bytes: 512 << 20,
            journal_dir: None,
            accept_journal_loss: false,
            max_frame_bytes: 4 << 20,
            max_journaled_bytes: 8 << 20,
            tail_bytes: 128 << 20,
            producer_bytes: 64 << 20,
            sync_bytes: 64 << 20,
            sync_after: Duration::from_secs(10),
            reserve_bytes: limits::MIN_FREE_DISK_BYTES,
            metrics: Metrics::new(),
            step_mode: false,
            sim_hook: None,
        }
    }
}
