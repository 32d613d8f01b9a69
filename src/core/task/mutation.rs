//! Mutations: a test breaks one rule of the server on purpose, to show that its checks detect the violation. The code
//! at a rule checks with `mutant!` whether the rule is broken, which is always `false` outside tests and the simulator.
//!
//! A mutation is active in one thread: a simulation and a model check each run in one thread.

use std::cell::Cell;

/// A rule that a test can break. Each variant describes the faulty behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A leader acknowledges writes before the sync.
    AcknowledgeBeforeSync,
    /// A journal file is reused before its batches are synced in their segments.
    ReuseJournalFileBeforeSync,
    /// Replay drops the last frame of the journal, torn or not.
    DropLastFrame,
    /// A truncation is not written to the journal, so the truncated batches may reappear after a crash.
    TruncateUnjournaled,
    /// A segment is evicted before its upload is committed.
    EvictBeforeCommit,
    /// A restarted broker continues to lead in the epochs of its last incarnation.
    KeepOldLeadership,
    /// A starting broker skips the verification of its data directory and its replicas.
    SkipStartupVerification,
    /// A broker treats an unclean shutdown as clean, and so lost page cache as present.
    TreatUncleanAsClean,
    /// A leader returns a latest offset before its epoch is committed.
    LatestBeforeEpochCommitted,
    /// Any live replica may be elected.
    ElectAnyReplica,
    /// A partition's metadata is updated without a compare.
    UpdateWithoutCas,
    /// A broker applies older metadata of a partition.
    ApplyOlderMetadata,
    /// A replica is admitted to the ISR without a compare of its broker epoch.
    AdmitStaleBrokerEpoch,
    /// A bootstrap from the object store drops the producer state.
    BootstrapWithoutProducers,
    /// A failed upload counts as done.
    TreatFailedPutAsDone,
    /// Garbage collection deletes objects that the manifest references.
    CollectReferenced,
    /// A deposed leader makes a tier commit.
    DeposedLeaderCommits,
    /// A leader adopts the tiered end of a later leader for its own log.
    AdoptNewerTieredEnd,
    /// A leader serves readers up to the log end.
    ReadUncommitted,
    /// Acknowledgements of an older leader epoch count, and a leader keeps the subscriptions of its followers in a new
    /// epoch.
    CountOlderEpochAcks,
    /// An acknowledgement of an older leader epoch counts.
    AcceptOlderLeaderEpochAck,
    /// An acknowledgement of an older broker epoch counts.
    AcceptOlderBrokerEpochAck,
    /// A follower truncates at its high watermark instead of by epochs.
    TruncateToHighWatermark,
    /// A leader admits a replica below the epoch start before its epoch is committed.
    AdmitBelowEpochStart,
    /// A leader admits no replica before its epoch is committed.
    AdmitAfterEpochCommitted,
    /// The high watermark is computed over the committed ISR instead of the maximal ISR.
    HighWatermarkOverCommittedIsr,
    /// The min ISR is compared with the maximal ISR, and the ELR is ignored.
    MinIsrOverMaximalIsr,
    /// A member that is removed from the ISR below the min ISR does not enter the ELR.
    DropElr,
    /// The high watermark advances although the ELR is not empty.
    IgnoreElr,
    /// An ISR proposal with an unknown outcome counts as committed.
    TreatUnknownAsDone,
    /// A follower accepts messages of a leader of an older epoch.
    ObeyOlderLeaderEpoch,
    /// A follower serves readers up to its log end.
    FollowerServesUncommitted,
}

thread_local! {
    static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Returns whether this mutation is active in this thread.
pub fn is_active(mutation: Mutation) -> bool {
    ACTIVE.get() == Some(mutation)
}

/// Returns whether any mutation is active in this thread.
pub fn is_any_active() -> bool {
    ACTIVE.get().is_some()
}

/// Runs `f` with this mutation active in this thread; `None` activates no mutation. Restores the previous mutation
/// afterwards, also after a panic.
pub fn with_mutation<T>(mutation: Option<Mutation>, f: impl FnOnce() -> T) -> T {
    let _restore = RestoreMutation(ACTIVE.replace(mutation));
    f()
}

/// Restores the previous mutation on drop.
struct RestoreMutation(Option<Mutation>);

impl Drop for RestoreMutation {
    fn drop(&mut self) {
        ACTIVE.set(self.0);
    }
}
