//! Bootstrap of a replica whose log is empty, or cannot become a prefix of the leader's local log by a truncation. The
//! replica gets a new start offset, and the *tables* of its leader's log before that start: the epoch history and the
//! producer state.
//!
//! If the object store holds the records before the start, the footer of its last segment has the tables. The replica
//! then copies only the tail. Otherwise those records were deleted, and the leader sends its own tables. Without the
//! epochs, the log could not be compared with another leader's. Without the producers, a retry would be appended twice.
//!
//! After an election that may have lost records, the new leader may reset its own log with tables of the object store.

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

/// First pause before another read of the tables that this broker needs from the object store to lead. It doubles each
/// time, up to [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Longest pause before another read of the tables.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Request for the tables at the end of the object store: the pending one, or the last one.
#[derive(Debug, Default)]
pub(super) struct BootstrapRequest {
    /// Number of the request; a response with another number is dropped. The number grows with each request and each
    /// [`Self::cancel`].
    id: u64,
    /// `Some` if this broker starts to lead with the tables: the pauses between repeated requests. `None` if a follower
    /// requested the tables, and after [`Self::cancel`].
    pending_leadership: Option<Box<Backoff>>,
}

impl BootstrapRequest {
    #[cfg(test)]
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Returns true if this broker starts to lead once the tables have arrived.
    pub(super) fn is_for_leadership(&self) -> bool {
        self.pending_leadership.is_some()
    }

    /// Cancels the pending request, if there is one: the task ignores the response.
    pub(super) fn cancel(&mut self) {
        self.id += 1;
        self.pending_leadership = None;
    }
}

/// Parsed tables of a log before an offset.
pub(in crate::partition) struct ParsedTables {
    /// End of the tables, at which the log of the replica starts.
    pub(super) start: Offset,
    pub(super) epochs: EpochHistory,
    pub(super) producers: ProducerTable,
}

/// Error of a bootstrap.
#[derive(Debug, thiserror::Error)]
pub(in crate::partition) enum BootstrapError {
    /// The object store did not respond, or its content is corrupt.
    #[error("cannot read the manifest or the footer of the last segment in the object store: {0}")]
    ObjectStore(#[from] tier::TierReadError),
    /// By this broker's metadata, the object store ends before the start.
    #[error(
        "the object store ends at {tiered_end} by this broker's metadata, below the start {start} of the replica: newer \
         metadata has not arrived yet"
    )]
    StaleMetadata {
        /// End of the object store.
        tiered_end: Offset,
        /// Start of the replica.
        start: Offset,
    },
    /// The tables are malformed.
    #[error("the epoch history or producer state before offset {start} is malformed")]
    Malformed {
        /// Start of the replica.
        start: Offset,
    },
    /// This broker has no object store.
    #[error(
        "the replica must bootstrap at the end of the object store, and this broker has none: set object_store.url"
    )]
    NoObjectStore,
}

impl ParsedTables {
    /// Returns empty tables, for a log that starts at `start`.
    fn empty(start: Offset) -> Self {
        Self { start, epochs: EpochHistory::new(), producers: ProducerTable::new() }
    }

    /// Parses the tables that the leader sent.
    pub(super) fn from_leader(tables: &BootstrapTables) -> Result<Self, BootstrapError> {
        Self::parse(tables.start, &tables.epochs, &tables.producers)
    }

    /// Parses the epochs and the encoded producer state before `start`. Epochs and their first offsets must ascend, and
    /// the offsets must lie below `start`. No bytes stand for an empty producer state.
    fn parse(start: Offset, epochs: &[(LeaderEpoch, Offset)], producers: &[u8]) -> Result<Self, BootstrapError> {
        let malformed = || BootstrapError::Malformed { start };
        let epochs = EpochHistory::from_starts(epochs.iter().copied()).ok_or_else(malformed)?;
        if epochs.last().is_some_and(|(_, epoch_start)| epoch_start >= start) {
            return Err(malformed());
        }
        let producers =
            if producers.is_empty() { Some(ProducerTable::new()) } else { ProducerTable::from_bytes(producers) };
        Ok(Self { start, epochs, producers: producers.ok_or_else(malformed)? })
    }

    /// Returns true if a log does not differ from the object store, which ends at `start` with these tables. The log
    /// has the epochs `history`, and holds the records `log_start..log_end`. Only the offsets that both have are
    /// compared; true if there are none. A footer has the epochs of its own segment only, and these suffice: logs that
    /// share an offset and its epoch are equal below it.
    fn agree_with(&self, history: &EpochHistory, log_start: Offset, log_end: Offset) -> bool {
        let end = self.start.min(log_end);
        let start = self.epochs.iter().next().map_or(log_start, |(_, epoch_start)| log_start.max(epoch_start));
        start >= end || self.epochs.between(start, end) == history.between(start, end)
    }
}

/// Reads the tables at the end of the object store. Fails with [`BootstrapError::StaleMetadata`] if the object store
/// ends below `start`, or has no segment.
async fn read_from_object_store(tier: Option<&PartitionTier>, start: Offset) -> Result<ParsedTables, BootstrapError> {
    let tier = tier.ok_or(BootstrapError::NoObjectStore)?;
    let tiered_end = tier.state().tiered_end();
    match tier.last_footer().await? {
        Some(footer) if footer.end >= start => {
            let producers: &[u8] = if mutant!(BootstrapWithoutProducers) { &[] } else { &footer.producers };
            ParsedTables::parse(footer.end, &footer.epochs, producers)
        }
        Some(footer) => Err(BootstrapError::StaleMetadata { tiered_end: footer.end, start }),
        None => Err(BootstrapError::StaleMetadata { tiered_end, start }),
    }
}

impl Actor {
    /// Returns true if the tables in the object store must be read before this broker can lead. Either its log ends
    /// below the tiered end or the log start. Or the election of this epoch was unclean and the object store has
    /// tables. Both happen only after an election that may have lost records.
    pub(super) fn needs_object_store(&self, value: &PartitionValue) -> bool {
        let committed_end = self.tiered_end.max(self.log_start);
        let lacks_committed = self.log.log_end() < committed_end;
        let is_unclean = value.unclean_epoch == Some(value.leader_epoch) && self.has_tiered_tables();
        lacks_committed || is_unclean
    }

    /// Returns true if the object store has a segment whose footer holds the tables of the tiered end.
    pub(super) fn has_tiered_tables(&self) -> bool {
        self.tiered_end > self.log_start
    }

    /// Requests the tables at the tiered end. This broker starts to lead with the result
    /// ([`Self::start_leading_with_tables`]).
    pub(super) fn request_tables_to_lead(&mut self) {
        self.bootstrap_request.pending_leadership = Some(Box::new(Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY)));
        self.request_tables(self.tiered_end, Duration::ZERO);
    }

    /// Starts a task that reads the tables at the end of the object store after a pause. The end must not be below
    /// `start`. The result arrives as [`ControlMessage::BootstrapReady`].
    pub(super) fn request_tables(&mut self, start: Offset, pause: Duration) {
        self.bootstrap_request.id += 1;
        let request_id = self.bootstrap_request.id;
        let (tier, control, tasks) = (self.tier.clone(), self.control.clone(), self.tasks.clone());
        self.tasks.spawn("bootstrap", async move {
            let request = async {
                tokio::time::sleep(pause).await;
                read_from_object_store(tier.as_ref(), start).await
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

    /// Handles the result of [`Self::request_tables`]: starts to lead, or bootstraps the follower. Raises the tiered
    /// end to that of the tables. Drops the result of an earlier request.
    pub(super) async fn on_tables_read(&mut self, request_id: u64, tables: Result<Box<ParsedTables>, BootstrapError>) {
        if request_id != self.bootstrap_request.id {
            return;
        }
        if let Ok(tables) = &tables {
            // The manifest with this end is committed, although the metadata may not have reached this task.
            self.tiered_end = self.tiered_end.max(tables.start);
        }
        let tables = tables.map(|tables| *tables);
        if self.bootstrap_request.is_for_leadership() {
            self.start_leading_with_tables(tables).await;
        } else {
            self.bootstrap_with(tables).await;
        }
    }

    /// Starts to lead after an election that may have lost records. The log is reset first if it differs from the
    /// object store, or if it ends below the committed end. The committed end is the later of tiered end and log start.
    /// If the tables cannot be read or the disk is full, the task requests the tables again after a pause. If the disk
    /// fails, this broker resigns.
    async fn start_leading_with_tables(&mut self, tables: Result<ParsedTables, BootstrapError>) {
        let committed_end = self.tiered_end.max(self.log_start);
        let tables = match tables {
            // No footer holds tables for the committed end. Either this broker has no object store, or the records at
            // the end of the object store were deleted.
            Err(BootstrapError::NoObjectStore) => ParsedTables::empty(committed_end),
            Err(_) if !self.has_tiered_tables() => ParsedTables::empty(committed_end),
            Ok(tables) if tables.start < committed_end => ParsedTables::empty(committed_end),
            Ok(tables) => tables,
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotLead) {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %error, count,
                        "cannot lead before the object store is read; retrying"
                    );
                }
                return self.retry_request_to_lead();
            }
        };
        let (start, log_end) = (self.log.local_start().max(self.log.log_start()), self.log.log_end());
        let agrees = tables.agree_with(&self.log.epochs(), start, log_end);
        if log_end < committed_end || !agrees {
            tracing::warn!(
                topic = %self.topic, partition = %self.id, %log_end, at = %tables.start,
                "the log of the unclean leader differs from the object store: resetting the log to the end of the \
                 object store"
            );
            if !self.reset(tables).await {
                return match self.published.error() {
                    // The disk failed: another replica has to lead.
                    Some(_) => self.ctx.isr_updater.resign(self.id, self.metadata.epoch()),
                    // The disk is full.
                    None => self.retry_request_to_lead(),
                };
            }
        }
        self.start_leading();
    }

    /// Repeats [`Self::request_tables_to_lead`] after a longer pause.
    fn retry_request_to_lead(&mut self) {
        if let Some(backoff) = &mut self.bootstrap_request.pending_leadership {
            let pause = backoff.next_pause();
            self.request_tables(self.tiered_end, pause);
        }
    }

    /// Resets the log with these tables. Returns false if the disk failed or is full.
    pub(super) async fn reset(&mut self, tables: ParsedTables) -> bool {
        let ParsedTables { start, epochs, producers } = tables;
        #[cfg(feature = "sim")]
        let contents = (epochs.iter().collect::<Vec<_>>(), producers.ids().collect::<Vec<_>>());
        let is_reset = self.change_log(move |replica| replica.reset_with(start, epochs, producers)).await;
        #[cfg(feature = "sim")]
        if is_reset {
            sim_event!(LogReset { partition: self.id, at: start, epochs: &contents.0, producers: &contents.1 });
        }
        is_reset
    }

    /// Resets the log to offset 0, without tables. Returns false if the disk failed or is full.
    pub(super) async fn reset_to_zero(&mut self) -> bool {
        self.reset(ParsedTables::empty(Offset::ZERO)).await
    }

    /// Bootstraps a follower: resets its log to the start of these tables, and subscribes there. The follower
    /// subscribes after a pause instead if the tables could not be read or the disk is full. The follower does so too
    /// if the log was already empty at that start. If the disk fails, the role ends. Does nothing in another role.
    pub(super) async fn bootstrap_with(&mut self, tables: Result<ParsedTables, BootstrapError>) {
        if !matches!(self.role, RoleState::Following(_)) {
            return;
        }
        match tables {
            Ok(tables) => {
                let start = tables.start;
                let old_end = self.log.log_end();
                // The log is empty and starts at `start` already: the leader would respond again with the same
                // bootstrap.
                let is_same = old_end == start && self.log.local_start() == start;
                let is_reset = self.reset(tables).await;
                if let RoleState::Following(follower) = &mut self.role
                    && is_reset
                {
                    tracing::info!(
                        topic = %self.topic, partition = %self.id, at = %start, log_end = %old_end,
                        "reset the log for a bootstrap; copying from its new start"
                    );
                    follower.on_reset(start);
                }
                self.subscribe_or_retry(is_reset && !is_same);
            }
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotBootstrap) {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %error, count,
                        "this replica cannot start to copy from its leader, and stays out of sync; retrying"
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

    fn epoch_starts(starts: &[(u32, u64)]) -> Vec<(LeaderEpoch, Offset)> {
        starts.iter().map(|(epoch, start)| (LeaderEpoch(*epoch), at(*start))).collect()
    }

    /// Parses tables for a log that starts at offset 10.
    fn parse(epochs: &[(u32, u64)], producers: &'static [u8]) -> Result<ParsedTables, BootstrapError> {
        let producers = bytes::Bytes::from_static(producers);
        ParsedTables::from_leader(&BootstrapTables {
            start: at(10),
            from_object_store: false,
            epochs: epoch_starts(epochs),
            producers,
        })
    }

    #[test]
    fn malformed_tables_are_rejected() {
        assert_eq!(parse(&[(1, 0), (3, 4)], b"").unwrap().epochs.last(), Some((LeaderEpoch(3), at(4))));
        let bad: [&[(u32, u64)]; 4] = [&[(3, 0), (1, 4)], &[(1, 4), (2, 4)], &[(1, 5), (2, 4)], &[(1, 0), (2, 10)]];
        for epochs in bad {
            assert!(matches!(parse(epochs, b""), Err(BootstrapError::Malformed { .. })), "{epochs:?}");
        }
        assert!(matches!(parse(&[(1, 0)], b"nonsense"), Err(BootstrapError::Malformed { .. })));
    }

    #[test]
    fn log_agrees_with_footer_of_equal_epochs() {
        let tables = parse(&[(1, 0), (3, 4)], b"").unwrap();
        let agrees = |history: &[(u32, u64)], local_start, log_end| {
            let history = EpochHistory::from_starts(epoch_starts(history)).unwrap();
            tables.agree_with(&history, at(local_start), at(log_end))
        };
        assert!(agrees(&[(1, 0), (3, 4)], 0, 10));
        assert!(agrees(&[(1, 0), (3, 4), (5, 10)], 0, 20), "records after the footer are not compared");
        assert!(agrees(&[(1, 0)], 0, 3), "the log ends before the footer");
        assert!(agrees(&[(7, 12)], 12, 20), "the log starts after the footer");
        // The footer is of a later segment, so its epochs begin above the start of the log.
        let last = parse(&[(3, 6)], b"").unwrap();
        let history = EpochHistory::from_starts(epoch_starts(&[(1, 0), (3, 4)])).unwrap();
        assert!(last.agree_with(&history, at(0), at(20)));
        assert!(!agrees(&[(1, 0), (5, 4)], 0, 10));
        assert!(!agrees(&[(1, 0), (3, 5)], 0, 10));
        assert!(!agrees(&[(1, 2), (5, 8)], 2, 20));
    }
}
