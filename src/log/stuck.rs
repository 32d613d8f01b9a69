//! Detection of a journal whose ring has stalled. Writing to the directory then ends, so that other brokers take over.

use std::{io, time::Duration};

use super::{directory::Inner, error::is_full};
use crate::model::Offset;

/// Maximum time that a closing log waits for space in its journal.
const STOP_WAIT: Duration = Duration::from_secs(5);

/// Maximum time that writers wait for space in the journal while checkpoints fail.
const CHECKPOINT_WAIT: Duration = Duration::from_secs(10);

/// Maximum time, and maximum number of sync passes, that writers wait while passes do not help. A longer wait indicates
/// an error in this code.
const HELD_WAIT: Duration = Duration::from_secs(60);
const HELD_PASSES: u32 = 5;

impl Inner {
    /// Fails the journal if its ring has stalled. Otherwise all writers would wait, and no other broker would take
    /// over. A restart replays the content of the journal.
    pub(super) fn fail_if_stuck(&self) {
        if let Some(why) = self.why_stuck() {
            self.core.journal.fail(&io::Error::other(why));
        }
    }

    /// Returns the reason of a stall, if any.
    ///
    /// | stall | limit |
    /// | --- | --- |
    /// | a close waits for a free file | `STOP_WAIT` |
    /// | checkpoints fail for another reason than a full disk, which may get space again | `CHECKPOINT_WAIT` |
    /// | the oldest file holds acknowledged data that a replica cannot sync | none |
    /// | the oldest file holds data that no sync pass releases | `HELD_WAIT` and `HELD_PASSES` |
    fn why_stuck(&self) -> Option<String> {
        let oldest = self.ring().oldest()?;
        let journal = &self.core.journal;
        if journal.waits_closing() >= STOP_WAIT {
            return Some(format!("the log stops, and no file of the journal came free for {} s", STOP_WAIT.as_secs()));
        }
        let waited = journal.waits_for_room();
        if waited >= CHECKPOINT_WAIT
            && let Some((since, error)) = &*self.core.checkpoint_error()
            && since.elapsed() >= CHECKPOINT_WAIT
            && !is_full(error)
        {
            let seconds = CHECKPOINT_WAIT.as_secs();
            return Some(format!(
                "it has had no room for {seconds} s because the checkpoint cannot be written: {error}"
            ));
        }
        let holding = self.open_replicas().into_iter().filter_map(|replica| {
            let (file, end) = replica.state().unsynced.front().copied()?;
            (file <= oldest).then_some((replica, end))
        });
        let holding: Vec<_> = holding.collect();
        if let Some((replica, _)) = holding.iter().find(|(replica, _)| replica.failed.get().is_some()) {
            return Some(format!("its oldest file holds what partition {} cannot sync to its segments", replica.id));
        }
        let passes = self.core.work().fruitless;
        // A reset pins the file up to `Offset::MAX`. The reset of a long log takes time, but it ends.
        let (replica, _) = holding.iter().find(|(_, end)| *end != Offset::MAX)?;
        if waited < HELD_WAIT || passes < HELD_PASSES {
            return None;
        }
        let why = format!(
            "its oldest file holds what partition {} does not let go of in {passes} passes of syncs",
            replica.id
        );
        // A failing disk is repaired by its operator, but a violated invariant must be found.
        if cfg!(feature = "sim") {
            panic!("{why}");
        }
        Some(why)
    }
}
