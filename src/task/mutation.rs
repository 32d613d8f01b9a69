//! Rules that a test may break on purpose, one at a time, to show that the checks find it. Only in tests and with the feature `sim`:
//! elsewhere `mutant!` is `false` and nothing of this is compiled.
//!
//! A rule is broken for one thread. A simulated run is one, and so is a search of the model check.

use std::cell::Cell;

/// One broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A leader takes for synced what it has only written.
    AcknowledgeBeforeSync,
    /// A journal's file is used again though what it holds is not synced in its segment.
    ReuseBeforeSync,
    /// Replay leaves the journal's last round out, torn or not.
    LastRoundTakenForTorn,
    /// A cut is not written to the journal: what was cut may come back after a crash.
    CutUnjournaled,
    /// A segment leaves the disk before its place in the bucket is committed.
    EvictBeforeCommit,
    /// A broker that starts goes on leading in the epochs that its last uptime led in.
    ResumeLeading,
    /// A broker that starts is taken at its word: neither its directory nor its replicas are looked at.
    SkipProof,
    /// A broker that was not stopped in order is taken to hold what was only in its page cache.
    LossTakenForClean,
    /// A leader that is not settled tells where it believes that the log ends.
    UnsettledTellsLatest,
    /// Any live replica may be elected.
    ElectAnyReplica,
    /// A partition is changed whatever became of it since it was read.
    ChangeUncompared,
    /// A broker goes by an older value of a partition than it did.
    PlacedByOlder,
    /// A replica is admitted to the ISR whatever became of its broker's registration.
    AdmitUnregistered,
    /// A replica that begins where the bucket ends knows nothing of the producers that wrote what is there.
    BeginWithoutProducers,
    /// A segment that the bucket did not take counts as uploaded.
    FailedPutIsDone,
    /// Garbage collection does not look at what the manifest names.
    CollectNamed,
    /// A leader that was replaced commits to the bucket.
    DeposedCommits,
    /// A leader takes for committed in its own log what a later leader has committed to the bucket.
    TakeLaterLeadersBucketEnd,
    /// Readers are served up to the log end.
    ReadUncommitted,
    /// What followers of an older leader epoch acknowledge counts, whether they joined in this one or not, and they may go on.
    VotesOfOlderEpochs,
    /// An acknowledgement of an older leader epoch counts.
    AckOfOlderLeaderEpoch,
    /// An acknowledgement of an older broker epoch counts.
    AckOfOlderBrokerEpoch,
    /// A follower cuts at its high watermark and not by epochs.
    CutToHighWatermark,
    /// A replica is admitted to the ISR below the epoch's start, by a leader that is not settled.
    AdmitBelowEpochStart,
    /// A leader that is not settled admits nobody.
    AdmitOnlySettled,
    /// The high watermark is taken over the committed ISR and not over the maximal one.
    CommittedIsrOnly,
    /// The minimum is counted on the maximal ISR, and the ELR is not looked at.
    MinimumOfMaximal,
    /// Who leaves the ISR below the minimum does not stay eligible.
    EligibleForgotten,
    /// A left-over ELR does not hold the high watermark.
    ElrIgnored,
    /// A proposal whose outcome is unknown is taken as done.
    UnknownIsDone,
    /// A follower does what a leader of an older epoch says.
    ObeyOlderLeaders,
    /// A follower serves readers up to its log end.
    FollowerServesUncommitted,
}

thread_local! {
    static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Whether this rule is broken in this thread.
pub fn is_on(mutation: Mutation) -> bool {
    ON.get() == Some(mutation)
}

/// Whether any rule is broken in this thread.
pub fn is_any_on() -> bool {
    ON.get().is_some()
}

/// Runs `f` with this rule broken, in this thread only. A panic of `f` mends the rule too.
pub fn with<T>(mutation: Option<Mutation>, f: impl FnOnce() -> T) -> T {
    let _before = Before(ON.replace(mutation));
    f()
}

/// What was broken before.
struct Before(Option<Mutation>);

impl Drop for Before {
    fn drop(&mut self) {
        ON.set(self.0);
    }
}
