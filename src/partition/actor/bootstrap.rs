//! Bootstrap of an empty or useless replica, with the tables (epoch history, producer state) of the log before its
//! start.
//!
//! The records before the start are in the object store, whose last footer has the tables; the replica copies only the
//! tail. Without an object store those records were deleted, and the leader sends its own tables. Without the epochs
//! the log could not be compared with another leader's; without the producers a retry would be appended twice.

use std::time::Duration;

use super::{Actor, ControlMessage, RoleState, warnings::Condition};
use crate::{
    cluster::PartitionValue,
    log::{EpochHistory, ProducerTable},
    model::{LeaderEpoch, Offset},
    partition::leader::divergence::BootstrapTables,
    task::Backoff,
    tier::{self, PartitionTier},
};

/// First pause before another read of the tables that a leader needs from the object store. It doubles each time, up to
/// [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Longest pause before another read of the tables.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Last request for the tables at the end of the object store.
#[derive(Debug, Default)]
pub(super) struct BootstrapRequest {
    /// Number of the request; a response to another one is dropped. It grows with each request, change of role,
    /// subscription and disconnect.
    id: u64,
    /// `Some` if this broker leads after the response: the pauses before further requests.
    pending_leadership: Option<Box<Backoff>>,
}

impl BootstrapRequest {
    #[cfg(test)]
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Returns true if this broker leads after the response.
    pub(super) fn is_for_leadership(&self) -> bool {
        self.pending_leadership.is_some()
    }

    /// Drops the response to the pending request, if there is one.
    pub(super) fn cancel(&mut self) {
        self.id += 1;
        self.pending_leadership = None;
    }
}

/// Parsed tables of a log at the start of a replica.
pub(in crate::partition) struct ParsedTables {
    pub(super) start: Offset,
    pub(super) epochs: EpochHistory,
    pub(super) producers: ProducerTable,
}

/// Error of a bootstrap.
#[derive(Debug, thiserror::Error)]
pub(in crate::partition) enum BootstrapError {
    /// The object store did not respond, or its content is corrupt.
    #[error("cannot read the footer of the last segment in the object store: {0}")]
    ObjectStore(#[from] tier::TierReadError),
    /// By this broker's metadata, the object store ends before the start.
    #[error(
        "the object store ends at {end} by this broker's metadata, below the start {at} of the replica: newer \
         metadata has not arrived yet"
    )]
    Behind {
        /// Tiered end.
        end: Offset,
        /// Start of the replica.
        at: Offset,
    },
    /// The tables are malformed.
    #[error("the epoch history or producer state before offset {at} is malformed")]
    Malformed {
        /// Start of the replica.
        at: Offset,
    },
    /// This broker has no object store.
    #[error(
        "the replica must bootstrap at the end of the object store, and this broker has none: set object_store.url"
    )]
    NoObjectStore,
}

impl ParsedTables {
    /// Returns the tables of an empty log that starts at `at`.
    fn empty(at: Offset) -> Self {
        Self { start: at, epochs: EpochHistory::new(), producers: ProducerTable::new() }
    }

    /// Returns the tables that the leader sent.
    pub(super) fn sent(tables: &BootstrapTables) -> Result<Self, BootstrapError> {
        Self::checked(tables.start, &tables.epochs, &tables.producers)
    }

    fn checked(at: Offset, epochs: &[(LeaderEpoch, Offset)], producers: &[u8]) -> Result<Self, BootstrapError> {
        let malformed = || BootstrapError::Malformed { at };
        let epochs = EpochHistory::from_starts(epochs.iter().copied()).ok_or_else(malformed)?;
        if epochs.last().is_some_and(|(_, start)| start >= at) {
            return Err(malformed());
        }
        let producers =
            if producers.is_empty() { Some(ProducerTable::new()) } else { ProducerTable::from_bytes(producers) };
        Ok(Self { start: at, epochs, producers: producers.ok_or_else(malformed)? })
    }

    /// Returns true if a log with these epochs, valid from `start` on, equals the object store's up to the lower of
    /// both ends. A footer has the epochs of its own segment only. That is enough: logs that share an offset and its
    /// epoch are equal up to that offset.
    fn agree(&self, history: &EpochHistory, start: Offset, log_end: Offset) -> bool {
        let end = self.start.min(log_end);
        let start = self.epochs.iter().next().map_or(start, |(_, first)| start.max(first));
        start >= end || self.epochs.between(start, end) == history.between(start, end)
    }
}

/// Returns the tables at the end of the object store, which must be at `at` or later.
async fn read_from_object_store(tier: Option<&PartitionTier>, at: Offset) -> Result<ParsedTables, BootstrapError> {
    let tier = tier.ok_or(BootstrapError::NoObjectStore)?;
    let end = tier.state().tiered_end();
    match tier.last_footer().await? {
        Some(footer) if footer.end >= at => {
            let producers: &[u8] = if mutant!(BootstrapWithoutProducers) { &[] } else { &footer.producers };
            ParsedTables::checked(footer.end, &footer.epochs, producers)
        }
        Some(footer) => Err(BootstrapError::Behind { end: footer.end, at }),
        None => Err(BootstrapError::Behind { end, at }),
    }
}

impl Actor {
    /// Returns true if the object store must be read before this log can lead: only after an election that may have
    /// lost records.
    pub(super) fn needs_object_store(&self, value: &PartitionValue) -> bool {
        let committed = self.tiered_end.max(self.log_start);
        let reaches = self.log.log_end() >= committed;
        let unclean = value.unclean_epoch == Some(value.leader_epoch) && self.has_tiered_tables();
        !reaches || unclean
    }

    /// Returns true if the object store has a segment whose footer holds the tables of the tiered end.
    pub(super) fn has_tiered_tables(&self) -> bool {
        self.tiered_end > self.log_start
    }

    /// Requests the epoch history and the producer state at the tiered end. This replica cannot lead without them.
    pub(super) fn request_tables_to_lead(&mut self) {
        self.bootstrap_request.pending_leadership = Some(Box::new(Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY)));
        self.request_tables(self.tiered_end, Duration::ZERO);
    }

    /// Requests, after a pause, the tables at the end of the object store, which must not be before `at`.
    pub(super) fn request_tables(&mut self, at: Offset, pause: Duration) {
        self.bootstrap_request.id += 1;
        let request_id = self.bootstrap_request.id;
        let (tier, control, tasks) = (self.tier.clone(), self.control.clone(), self.tasks.clone());
        self.tasks.spawn("bootstrap", async move {
            let request = async {
                tokio::time::sleep(pause).await;
                read_from_object_store(tier.as_ref(), at).await
            };
            let Some(tables) = tasks.run_until_cancelled(request).await else {
                return;
            };
            if let Some(control) = control.upgrade() {
                let message = ControlMessage::BootstrapReady(request_id, tables.map(Box::new));
                tasks.run_until_cancelled(control.send(message)).await;
            }
        });
    }

    pub(super) async fn on_tables(&mut self, request_id: u64, tables: Result<Box<ParsedTables>, BootstrapError>) {
        if request_id != self.bootstrap_request.id {
            return;
        }
        if let Ok(tables) = &tables {
            // A committed manifest has this end, perhaps before the metadata arrived at this task.
            self.tiered_end = self.tiered_end.max(tables.start);
        }
        let tables = tables.map(|tables| *tables);
        if self.bootstrap_request.is_for_leadership() {
            self.start_leading_with_tables(tables).await;
        } else {
            self.bootstrap_with(tables).await;
        }
    }

    /// Continues the start of a leader after an election that may have lost records. The tables show which records
    /// certainly were committed.
    async fn start_leading_with_tables(&mut self, tables: Result<ParsedTables, BootstrapError>) {
        let committed = self.tiered_end.max(self.log_start);
        let tables = match tables {
            // Deletion overtook the object store, or the topic no longer has one: there are no tables of the records
            // before.
            Err(BootstrapError::NoObjectStore) => ParsedTables::empty(committed),
            Err(_) if !self.has_tiered_tables() => ParsedTables::empty(committed),
            Ok(tables) if tables.start < committed => ParsedTables::empty(committed),
            Ok(tables) => tables,
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotLead) {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %error, count,
                        "cannot lead before the object store is read; retrying"
                    );
                }
                return self.lead_later();
            }
        };
        let (start, log_end) = (self.log.local_start().max(self.log.log_start()), self.log.log_end());
        let agrees = tables.agree(&self.log.epochs(), start, log_end);
        if log_end < committed || !agrees {
            tracing::warn!(
                topic = %self.topic, partition = %self.id, %log_end, at = %tables.start,
                "the log of the unclean leader differs from the object store: resetting the log to the end of the \
                 object store"
            );
            if !self.reset(tables).await {
                return match self.published.error() {
                    Some(_) => self.ctx.isr_updater.resign(self.id, self.metadata.epoch()),
                    None => self.lead_later(),
                };
            }
        }
        self.start_leading();
    }

    /// Repeats the request to the object store, after a longer pause.
    fn lead_later(&mut self) {
        if let Some(backoff) = &mut self.bootstrap_request.pending_leadership {
            let pause = backoff.next_pause();
            self.request_tables(self.tiered_end, pause);
        }
    }

    /// Resets the log with these tables. Returns false if the disk failed or is full.
    pub(super) async fn reset(&mut self, tables: ParsedTables) -> bool {
        let ParsedTables { start: at, epochs, producers } = tables;
        #[cfg(feature = "sim")]
        let contents = (epochs.iter().collect::<Vec<_>>(), producers.ids().collect::<Vec<_>>());
        let done = self.change_log(move |replica| replica.reset_with(at, epochs, producers)).await;
        #[cfg(feature = "sim")]
        if done {
            sim_event!(LogReset { partition: self.id, at, epochs: &contents.0, producers: &contents.1 });
        }
        done
    }

    /// Resets the log to offset 0, without tables.
    pub(super) async fn empty(&mut self) -> bool {
        self.reset(ParsedTables::empty(Offset::ZERO)).await
    }

    /// Bootstraps with these tables.
    pub(super) async fn bootstrap_with(&mut self, tables: Result<ParsedTables, BootstrapError>) {
        if !matches!(self.role, RoleState::Following(_)) {
            return;
        }
        match tables {
            Ok(tables) => {
                let at = tables.start;
                let old_end = self.log.log_end();
                // The reset would change nothing, so the subscription is retried after a pause.
                let is_same = old_end == at && self.log.local_start() == at;
                let done = self.reset(tables).await;
                if let RoleState::Following(follower) = &mut self.role
                    && done
                {
                    tracing::info!(
                        topic = %self.topic, partition = %self.id, %at, log_end = %old_end,
                        "reset the log for a bootstrap; copying from its new start"
                    );
                    follower.on_reset(at);
                }
                self.subscribe_or_retry(done && !is_same);
            }
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotBootstrap) {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %error, count,
                        "cannot bootstrap the replica; retrying"
                    );
                }
                self.resubscribe_later();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).unwrap()
    }

    fn pairs(of: &[(u32, u64)]) -> Vec<(LeaderEpoch, Offset)> {
        of.iter().map(|(epoch, start)| (LeaderEpoch(*epoch), at(*start))).collect()
    }

    fn sent(epochs: &[(u32, u64)], producers: &'static [u8]) -> Result<ParsedTables, BootstrapError> {
        let producers = bytes::Bytes::from_static(producers);
        ParsedTables::sent(&BootstrapTables {
            start: at(10),
            from_object_store: false,
            epochs: pairs(epochs),
            producers,
        })
    }

    #[test]
    fn malformed_tables_are_rejected() {
        assert_eq!(sent(&[(1, 0), (3, 4)], b"").unwrap().epochs.last(), Some((LeaderEpoch(3), at(4))));
        let bad: [&[(u32, u64)]; 4] = [&[(3, 0), (1, 4)], &[(1, 4), (2, 4)], &[(1, 5), (2, 4)], &[(1, 0), (2, 10)]];
        for epochs in bad {
            assert!(matches!(sent(epochs, b""), Err(BootstrapError::Malformed { .. })), "{epochs:?}");
        }
        assert!(matches!(sent(&[(1, 0)], b"nonsense"), Err(BootstrapError::Malformed { .. })));
    }

    #[test]
    fn log_agrees_with_footer_of_equal_epochs() {
        let tables = sent(&[(1, 0), (3, 4)], b"").unwrap();
        let agrees = |history: &[(u32, u64)], local_start, log_end| {
            let history = EpochHistory::from_starts(pairs(history)).unwrap();
            tables.agree(&history, at(local_start), at(log_end))
        };
        assert!(agrees(&[(1, 0), (3, 4)], 0, 10));
        assert!(agrees(&[(1, 0), (3, 4), (5, 10)], 0, 20), "records after the footer are not compared");
        assert!(agrees(&[(1, 0)], 0, 3), "the log ends before the footer");
        assert!(agrees(&[(7, 12)], 12, 20), "the log starts after the footer");
        // The footer of a segment that is not the first one on the disk.
        let last = sent(&[(3, 6)], b"").unwrap();
        let history = EpochHistory::from_starts(pairs(&[(1, 0), (3, 4)])).unwrap();
        assert!(last.agree(&history, at(0), at(20)));
        assert!(!agrees(&[(1, 0), (5, 4)], 0, 10));
        assert!(!agrees(&[(1, 0), (3, 5)], 0, 10));
        assert!(!agrees(&[(1, 2), (5, 8)], 2, 20));
    }
}
