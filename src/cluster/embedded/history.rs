//! The recent changes of the store: one bounded history, from which each watch reads at a cursor of its own.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use tokio::sync::watch;

use super::EmbeddedInner;
use crate::cluster::store::{MetaStoreError, Revision, WatchBatch, WatchEvent};

/// Maximum number of revisions in the history. A watch that lags further fails. The limit is lower in tests, so that
/// they can exceed it.
pub(super) const MAX_REVISIONS: usize = if cfg!(test) { 500 } else { 10_000 };

/// Maximum number of key and value bytes in the history.
const MAX_BYTES: usize = 16 << 20;

/// Number of events at which one result of a watch ends, with the revision that reaches it. The next result continues.
const MAX_RESULT_EVENTS: usize = 1000;

/// The changes of the last revisions, in order and without gaps.
pub(super) struct ChangeHistory {
    /// One element per revision, from `oldest` on.
    changes: VecDeque<Arc<WatchBatch>>,
    /// Key and value bytes of `changes`.
    bytes: usize,
    /// First revision at which a watch can start: that of the first change, or the next revision if there is none.
    oldest: Revision,
}

impl ChangeHistory {
    /// Returns an empty history that starts after this revision.
    pub(super) fn after(revision: Revision) -> Self {
        Self { changes: VecDeque::new(), bytes: 0, oldest: revision.next() }
    }

    /// Appends the next revisions, and drops the oldest ones while a limit is exceeded.
    pub(super) fn append(&mut self, changes: Vec<Arc<WatchBatch>>) {
        for change in changes {
            assert_eq!(change.revision.0, self.oldest.0 + self.changes.len() as u64, "revisions have no gaps");
            self.bytes += key_value_bytes(&change);
            self.changes.push_back(change);
        }
        while self.changes.len() > MAX_REVISIONS || self.bytes > MAX_BYTES {
            let Some(dropped) = self.changes.pop_front() else { break };
            self.bytes -= key_value_bytes(&dropped);
            self.oldest = dropped.revision.next();
        }
    }

    /// Returns `Compacted` if a watch from this revision would need dropped changes.
    pub(super) fn check(&self, from: Revision) -> Result<(), MetaStoreError> {
        if from < self.oldest { Err(MetaStoreError::Compacted { from, oldest: self.oldest }) } else { Ok(()) }
    }

    /// Returns the changes of one revision; `None` if the revision does not exist yet. Fails with `Compacted` if the
    /// changes were dropped.
    fn at(&self, revision: Revision) -> Result<Option<Arc<WatchBatch>>, MetaStoreError> {
        self.check(revision)?;
        let index = usize::try_from(revision.0 - self.oldest.0).ok();
        Ok(index.and_then(|index| self.changes.get(index)).cloned())
    }
}

fn key_value_bytes(changes: &WatchBatch) -> usize {
    let event_bytes = |event: &WatchEvent| match event {
        WatchEvent::Put(entry) => entry.key.len() + entry.value.len(),
        WatchEvent::Delete { key, .. } => key.len(),
    };
    changes.events.iter().map(event_bytes).sum()
}

/// Position of one watch in the history.
pub(super) struct WatchCursor {
    /// Weak, so that a watch does not keep the file open. The watch ends when the last clone of the store is dropped.
    inner: Weak<EmbeddedInner>,
    /// Newest committed revision. The watch waits until this value changes.
    newest: watch::Receiver<Revision>,
    prefix: String,
    /// First revision that the watch has not returned.
    next: Revision,
}

impl WatchCursor {
    /// Returns the cursor of a watch of the keys under a prefix, from a revision on.
    pub(super) fn new(inner: &Arc<EmbeddedInner>, prefix: &str, from: Revision) -> Self {
        Self { inner: Arc::downgrade(inner), newest: inner.newest.subscribe(), prefix: prefix.to_owned(), next: from }
    }

    /// Returns the next changes under the prefix and advances the cursor. One result has at most one revision beyond
    /// `MAX_RESULT_EVENTS` events; the next call continues. An empty list of events with a newer revision is a valid
    /// result. Returns `None` if there is no new revision, or if the store is closed.
    ///
    /// # Errors
    /// `Compacted`: the history no longer contains the next revision.
    fn read(&mut self) -> Result<Option<WatchBatch>, MetaStoreError> {
        let Some(inner) = self.inner.upgrade() else { return Ok(None) };
        let history = inner.history.lock();
        let start = self.next;
        let mut events = Vec::new();
        while events.len() < MAX_RESULT_EVENTS
            && let Some(changes) = history.at(self.next)?
        {
            events.extend(changes.events.iter().filter(|event| event.key().starts_with(&self.prefix)).cloned());
            self.next = self.next.next();
        }
        Ok((self.next > start).then(|| WatchBatch { revision: Revision(self.next.0 - 1), events }))
    }
}

/// Returns the next item of a watch's stream, for `futures::stream::unfold`. The stream ends when the store is closed,
/// and after an error, which leaves no cursor.
pub(super) async fn step(
    cursor: Option<WatchCursor>,
) -> Option<(Result<WatchBatch, MetaStoreError>, Option<WatchCursor>)> {
    let mut cursor = cursor?;
    loop {
        // Marked before the read, so that a revision that is published during the read ends the wait below.
        cursor.newest.mark_unchanged();
        match cursor.read() {
            Ok(Some(changes)) => return Some((Ok(changes), Some(cursor))),
            // The wait fails when the store is closed.
            Ok(None) => cursor.newest.changed().await.ok()?,
            Err(error) => return Some((Err(error), None)),
        }
    }
}
