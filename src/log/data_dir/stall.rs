//! Detection of a journal whose ring has stalled. Writing to the directory then ends, so that other brokers take over.

use std::time::Duration;

use super::DataDirInner;
use crate::{log::error::is_full, model::Offset};

/// Maximum time that a closing log waits for space in its journal.
const CLOSE_STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time that writers wait for space in the journal while checkpoints fail.
const CHECKPOINT_STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time that writers wait while sync passes release no file. A longer wait, during at least
/// [`STALL_SYNC_PASSES`] passes, indicates an error in this code.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Number of sync passes without a released file that is required for a stall, in addition to [`STALL_TIMEOUT`].
const STALL_SYNC_PASSES: u32 = 5;

impl DataDirInner {
    /// Returns the reason why no sync pass will release a file of the ring. Returns `None` while a file is free, and
    /// while a sync pass may still release one.
    ///
    /// | stall | limit |
    /// | --- | --- |
    /// | a close waits for a free file | `CLOSE_STALL_TIMEOUT` |
    /// | checkpoints fail for another reason than a full disk, which may get space again | `CHECKPOINT_STALL_TIMEOUT` |
    /// | the oldest file holds acknowledged data that a replica cannot sync | none |
    /// | the oldest file holds data that no sync pass releases | `STALL_TIMEOUT` and `STALL_SYNC_PASSES` |
    pub(super) fn stall_reason(&self) -> Option<String> {
        let oldest = self.ctx.journal.oldest_file()?;
        let journal = &self.ctx.journal;
        if journal.closing_wait() >= CLOSE_STALL_TIMEOUT {
            let seconds = CLOSE_STALL_TIMEOUT.as_secs();
            return Some(format!("the log is closing, and no journal file was released for {seconds} s"));
        }
        let waited = journal.space_wait();
        if waited >= CHECKPOINT_STALL_TIMEOUT
            && let Some(error) = self.checkpoint_failures.lock().lasting(CHECKPOINT_STALL_TIMEOUT)
            && !is_full(error)
        {
            let seconds = CHECKPOINT_STALL_TIMEOUT.as_secs();
            return Some(format!("no journal space for {seconds} s because the checkpoint cannot be written: {error}"));
        }
        let replicas = self.registry.lock().open_replicas();
        // Replicas that keep the oldest file from being released, each with the offset up to which a sync would release
        // the file.
        let pinning = replicas.iter().filter_map(|replica| {
            let (file, end) = replica.oldest_pin()?;
            (file <= oldest).then_some((replica, end))
        });
        let pinning: Vec<_> = pinning.collect();
        if let Some((replica, _)) = pinning.iter().find(|(replica, _)| replica.failure().is_some()) {
            let id = replica.id();
            return Some(format!("partition {id} cannot sync the data of the oldest journal file to its segments"));
        }
        let passes = self.ctx.sync_queue.passes_without_progress();
        // A reset keeps its journal file in use until it is complete, with `Offset::MAX` as the end. The reset of a
        // long log takes time, but it ends.
        let (replica, _) = pinning.iter().find(|(_, end)| *end != Offset::MAX)?;
        if waited < STALL_TIMEOUT || passes < STALL_SYNC_PASSES {
            return None;
        }
        let reason = format!(
            "partition {} has unsynced data in the oldest journal file after {passes} sync passes",
            replica.id()
        );
        // The simulator must find this violated invariant. All stalls above have causes outside this code.
        if cfg!(feature = "sim") {
            panic!("{reason}");
        }
        Some(reason)
    }
}
