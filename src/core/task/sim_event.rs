//! Events that a simulated broker reports while it runs (feature `sim`). Without the feature, `sim_event!` expands to
//! nothing.
//!
//! The simulator checks most rules at the event that could break them: an append, a truncation, a new high watermark.
//! An event states what happened, not what is allowed. Each thread runs one simulation and has one observer. The
//! observer is called from within the broker, so it must not call broker code.

use std::cell::RefCell;

use super::process::SimProcess;
use crate::model::{BrokerId, LeaderEpoch, Offset, PartitionId, Watermarks};

/// An event in a simulated process.
#[derive(Clone, Copy, Debug)]
pub enum SimEvent<'a> {
    /// The metadata store changed or deleted a key. These events come in order of revisions, before any broker can see
    /// the change.
    Stored {
        /// The changed key.
        key: &'a str,
        /// The new value and the create revision of the key; `None` if the key was deleted.
        value: Option<(&'a [u8], u64)>,
        /// The revision of the change.
        revision: u64,
    },
    /// A replica was opened from disk.
    ReplicaOpened {
        /// The partition.
        partition: PartitionId,
        /// The epoch history: the start offset of each epoch.
        epochs: &'a [(LeaderEpoch, Offset)],
        /// The log end.
        end: Offset,
    },
    /// The partition applied a value of the metadata.
    MetadataApplied {
        /// The partition.
        partition: PartitionId,
        /// The revision of the value.
        revision: u64,
    },
    /// The replica became leader.
    LeadershipStarted {
        /// The partition.
        partition: PartitionId,
        /// The leader epoch.
        epoch: LeaderEpoch,
        /// The epoch start: the log end at that moment.
        start: Offset,
    },
    /// A leader or follower appended a batch.
    Appended {
        /// The partition.
        partition: PartitionId,
        /// The first offset.
        base: Offset,
        /// The offset after the last record.
        end: Offset,
        /// The leader epoch of the batch.
        epoch: LeaderEpoch,
        /// The epoch in which this replica leads; `None` on a follower.
        leads: Option<LeaderEpoch>,
        /// The checksum of the content, which no replica changes.
        crc: u32,
        /// The idempotent producer: its id, its epoch, and the sequence number of the first record.
        producer: Option<(i64, i16, i32)>,
    },
    /// A follower accepted a message of a leader and is about to append or truncate.
    LeaderMessageApplied {
        /// The partition.
        partition: PartitionId,
        /// The leader epoch of the message.
        epoch: LeaderEpoch,
    },
    /// The log was truncated.
    Truncated {
        /// The partition.
        partition: PartitionId,
        /// The epoch of the leader with whose log this log diverged.
        epoch: LeaderEpoch,
        /// The log end afterwards.
        to: Offset,
    },
    /// The log was reset.
    LogReset {
        /// The partition.
        partition: PartitionId,
        /// The offset at which the log restarts.
        at: Offset,
        /// The epoch history below that offset.
        epochs: &'a [(LeaderEpoch, Offset)],
        /// The ids of the producers with state from below that offset.
        producers: &'a [i64],
    },
    /// A follower is about to send its log position to subscribe.
    LogPositionSent {
        /// The partition.
        partition: PartitionId,
        /// The leader epoch that the follower follows.
        epoch: LeaderEpoch,
        /// The persisted end of the follower's log.
        persisted: Offset,
    },
    /// The partition is about to publish its watermarks.
    WatermarksPublished {
        /// The partition.
        partition: PartitionId,
        /// The watermarks.
        watermarks: Watermarks,
        /// The role of the replica.
        role: SimRole,
    },
    /// A leader compared a follower's log position with its own log. Earlier acknowledgements of that follower no
    /// longer count.
    FollowerSubscribed {
        /// The partition.
        partition: PartitionId,
        /// The epoch in which this replica leads.
        epoch: LeaderEpoch,
        /// The follower, which subscribed or must truncate.
        follower: BrokerId,
        /// The broker epoch of the follower, as its link stated it.
        registered: u64,
    },
    /// A leader counted a follower's acknowledgement.
    AckCounted {
        /// The partition.
        partition: PartitionId,
        /// The epoch in which this replica leads.
        epoch: LeaderEpoch,
        /// The follower that acknowledged.
        follower: BrokerId,
        /// The broker epoch of the follower, as its link stated it.
        registered: u64,
        /// The leader epoch in which the follower acknowledged.
        acknowledged: LeaderEpoch,
        /// The follower's log end.
        written: Offset,
        /// The follower's persisted end.
        persisted: Offset,
    },
    /// A leader proposed an ISR.
    IsrProposed {
        /// The partition.
        partition: PartitionId,
        /// The epoch in which this replica leads.
        epoch: LeaderEpoch,
        /// The revision of the value that the proposal replaces.
        expect: u64,
        /// The proposed ISR.
        isr: &'a [BrokerId],
        /// The added brokers, and the broker epoch that each must have.
        added: &'a [(BrokerId, u64)],
    },
    /// A leader acknowledged writes.
    WriteAcked {
        /// The partition.
        partition: PartitionId,
        /// The offset after the last acknowledged record.
        end: Offset,
        /// True if the acknowledgement counts other replicas or the object store: then every in-sync replica has the
        /// records.
        by_all: bool,
    },
    /// A reader with records to read obtained the readable end: the offset below which readers may read.
    ReadableEndMoved {
        /// The partition.
        partition: PartitionId,
        /// The readable end.
        end: Offset,
    },
    /// A read on a broker returned a batch.
    BatchServed {
        /// The partition.
        partition: PartitionId,
        /// The first offset.
        base: Offset,
        /// The offset after the last record.
        end: Offset,
        /// The leader epoch of the batch.
        epoch: LeaderEpoch,
        /// The checksum of the content.
        crc: u32,
    },
    /// A leader is about to return the latest offset to a client.
    LatestReturned {
        /// The partition.
        partition: PartitionId,
        /// The leader epoch.
        epoch: LeaderEpoch,
        /// The offset.
        offset: Offset,
    },
    /// Segments were evicted from the disk.
    Evicted {
        /// The partition.
        partition: PartitionId,
        /// The local start afterwards.
        start: Offset,
    },
    /// A log is about to be truncated, reset or deleted. The change is durable at [`Self::LogChangeCompleted`].
    LogChangeStarted {
        /// The partition.
        partition: PartitionId,
        /// The log end afterwards.
        to: Offset,
        /// True if the whole content is deleted.
        emptied: bool,
    },
    /// A truncation, reset or deletion is durable.
    LogChangeCompleted {
        /// The partition.
        partition: PartitionId,
    },
    /// An append entry of a log became durable in a journal file.
    EntryJournaled {
        /// The partition.
        partition: PartitionId,
        /// The serial number of the file.
        file: u64,
        /// The offset after the last batch.
        end: Offset,
    },
    /// A journal file may be reused.
    JournalFileFreed {
        /// The serial number of the file in the use that ends.
        file: u64,
    },
}

/// A replica's role.
#[derive(Clone, Copy, Debug)]
pub enum SimRole {
    /// Neither follower nor leader.
    Idle,
    /// Follows a leader of this epoch, or is about to.
    Following(LeaderEpoch),
    /// Leads.
    Leading {
        /// The leader epoch.
        epoch: LeaderEpoch,
        /// The revision of the applied metadata value.
        revision: u64,
        /// `min.insync.replicas`.
        min_insync: usize,
    },
}

/// Receives the events of a thread, with the number of the process, or 0 outside of any process.
pub type SimObserver = Box<dyn FnMut(u32, SimEvent<'_>)>;

thread_local! {
    static OBSERVER: RefCell<Option<SimObserver>> = const { RefCell::new(None) };
}

/// Sets the observer of this thread, or removes it.
pub fn set_observer(observer: Option<SimObserver>) {
    OBSERVER.set(observer);
}

/// Returns whether this thread has an observer.
pub fn is_observed() -> bool {
    OBSERVER.with_borrow(Option::is_some)
}

/// Passes an event to the observer of this thread.
pub fn emit(event: SimEvent<'_>) {
    let process = SimProcess::current().map_or(0, |process| process.id());
    OBSERVER.with_borrow_mut(|observer| {
        if let Some(observer) = observer {
            observer(process, event);
        }
    });
}
