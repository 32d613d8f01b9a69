//! When the journal's ring cannot be expected to go round again: writing to the directory ends then, so that others take over.

use std::{io, time::Duration};

use super::{directory::Inner, error::is_full};
use crate::model::Offset;

/// How long a log that is to be closed waits until its journal has room again.
const STOP_WAIT: Duration = Duration::from_secs(5);

/// How long writers wait where the journal has no room because checkpoints fail.
const CHECKPOINT_WAIT: Duration = Duration::from_secs(10);

/// How long they wait, and for how many passes of syncs, where those do not help: then something is wrong with what is done here.
const HELD_WAIT: Duration = Duration::from_secs(60);
const HELD_PASSES: u32 = 5;

impl Inner {
    /// Ends writing to the directory where the journal's ring cannot be expected to go round again. Everybody would wait for it, and nobody
    /// take over; a restart replays what it holds.
    pub(super) fn fail_if_stuck(&self) {
        if let Some(why) = self.why_stuck() {
            self.core.journal.fail(&io::Error::other(why));
        }
    }

    /// A stop has waited long enough; or checkpoints fail, and not for want of room, which may come; or its oldest file holds what a
    /// replica acknowledged and cannot sync, or what no pass of syncs lets go of.
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
        // A new beginning of a long log takes its time, and ends.
        let (replica, _) = holding.iter().find(|(_, end)| *end != Offset::MAX)?;
        if waited < HELD_WAIT || passes < HELD_PASSES {
            return None;
        }
        let why = format!(
            "its oldest file holds what partition {} does not let go of in {passes} passes of syncs",
            replica.id
        );
        // A disk that fails is mended, a broken rule is found.
        if cfg!(feature = "sim") {
            panic!("{why}");
        }
        Some(why)
    }
}
