//! Rules of replication that a test may break on purpose, one at a time, to show that the checks find it. Only in test builds:
//! elsewhere `mutant!` is `false` and nothing of this is compiled.

use std::cell::Cell;

/// One broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
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
    /// A left-over ELR does not hold the high watermark.
    ElrIgnored,
    /// A proposal whose outcome is unknown is taken as done.
    UnknownIsDone,
}

thread_local! {
    static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Whether this rule is broken in this thread.
pub(crate) fn is_on(mutation: Mutation) -> bool {
    ON.get() == Some(mutation)
}

/// Runs `f` with this rule broken, in this thread only.
pub(crate) fn with<T>(mutation: Option<Mutation>, f: impl FnOnce() -> T) -> T {
    let before = ON.replace(mutation);
    let result = f();
    ON.set(before);
    result
}
