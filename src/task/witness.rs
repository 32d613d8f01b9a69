//! What a simulated broker does, told at the moment at which it does it. Only with the feature `sim`: elsewhere `saw!` is nothing and
//! what it names is not even computed.
//!
//! A judge that only looks at disks now and then sees harm after it was done, and only where it lasted. Most rules can be judged
//! where they are kept: at an append, a cut, a high watermark that moves. Events say what *is*, never what is allowed: that is the judge's.
//!
//! One witness for a thread, which is one simulated run. It is called in the middle of the broker's work, so it must call nothing of it.

use std::cell::RefCell;

use super::process::Process;
use crate::model::{BrokerId, LeaderEpoch, Offset, PartitionId, Watermarks};

/// Something that happened, in the process that [`saw`] names.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The metadata store has another value for a key, or none any more. Told in the order of revisions, before anybody else can know.
    Stored {
        /// The key.
        key: &'a str,
        /// Its value, and the revision that made the key.
        value: Option<(&'a [u8], u64)>,
        /// The revision that wrote or deleted it.
        revision: u64,
    },
    /// A replica was opened, with what was found on the disk.
    Opened {
        /// The partition.
        partition: PartitionId,
        /// Where each of its epochs begins.
        epochs: &'a [(LeaderEpoch, Offset)],
        /// Its log end.
        end: Offset,
    },
    /// This process goes by this value of the partition from now on.
    Placed {
        /// The partition.
        partition: PartitionId,
        /// The revision of the value.
        revision: u64,
    },
    /// This process leads from now on.
    Led {
        /// The partition.
        partition: PartitionId,
        /// Its epoch.
        epoch: LeaderEpoch,
        /// Its log end: the start of the epoch.
        start: Offset,
    },
    /// A batch was appended, by the leader or by a follower.
    Appended {
        /// The partition.
        partition: PartitionId,
        /// Its first offset.
        base: Offset,
        /// The offset after its last record.
        end: Offset,
        /// The epoch that it is stamped with.
        epoch: LeaderEpoch,
        /// The epoch in which this process leads; `None` when it copies.
        leads: Option<LeaderEpoch>,
        /// The checksum of its content, which no replica changes.
        crc: u32,
        /// The idempotent producer that wrote it: its id, its epoch, and the sequence number of the first record.
        producer: Option<(i64, i16, i32)>,
    },
    /// A follower goes by what the leader of an epoch sent it: it is about to append that, or to cut.
    Obeyed {
        /// The partition.
        partition: PartitionId,
        /// The epoch that the leader named.
        epoch: LeaderEpoch,
    },
    /// The log was cut.
    Cut {
        /// The partition.
        partition: PartitionId,
        /// The epoch whose leader has another log.
        epoch: LeaderEpoch,
        /// Its end now.
        to: Offset,
    },
    /// The log was thrown away and begins anew.
    Begun {
        /// The partition.
        partition: PartitionId,
        /// Its only offset.
        at: Offset,
        /// Where each epoch of what lies before begins.
        epochs: &'a [(LeaderEpoch, Offset)],
        /// The producers that are known from before.
        producers: &'a [i64],
    },
    /// A follower tells its leader how far its log reaches, and counts as joined when the leader agrees.
    Claimed {
        /// The partition.
        partition: PartitionId,
        /// The epoch that it follows.
        epoch: LeaderEpoch,
        /// How far its log is durable.
        persisted: Offset,
    },
    /// The partition's marks, about to be published.
    Marks {
        /// The partition.
        partition: PartitionId,
        /// Its marks.
        marks: Watermarks,
        /// What the process is in the partition.
        part: Part,
    },
    /// A leader has compared a follower's log with its own. What that follower acknowledged before counts no more.
    Joined {
        /// The partition.
        partition: PartitionId,
        /// The epoch in which it leads.
        epoch: LeaderEpoch,
        /// Who joined, or is told where to cut.
        follower: BrokerId,
        /// The revision of that broker's registration, by its link.
        registered: u64,
    },
    /// A leader takes into account what a follower acknowledged.
    Counted {
        /// The partition.
        partition: PartitionId,
        /// The epoch in which it leads.
        epoch: LeaderEpoch,
        /// Who acknowledged.
        follower: BrokerId,
        /// The revision of that broker's registration, by its link.
        registered: u64,
        /// The epoch in which that follower had joined when it did.
        acknowledged: LeaderEpoch,
        /// The follower's log end.
        written: Offset,
        /// How far the follower's log is durable.
        persisted: Offset,
    },
    /// A leader asks for another ISR.
    Proposed {
        /// The partition.
        partition: PartitionId,
        /// The epoch in which it leads.
        epoch: LeaderEpoch,
        /// The revision of the value that it is to replace.
        expect: u64,
        /// The ISR that is asked for.
        isr: &'a [BrokerId],
        /// Who is added, and the registration that each of them must have for it.
        added: &'a [(BrokerId, u64)],
    },
    /// Writers were told that their records are safe.
    Answered {
        /// The partition.
        partition: PartitionId,
        /// The offset after the last of them.
        end: Offset,
        /// On every in-sync replica, and not only here.
        by_all: bool,
    },
    /// Readers may have everything below.
    Readable {
        /// The partition.
        partition: PartitionId,
        /// Where that ends.
        end: Offset,
    },
    /// A reader is given a batch.
    Served {
        /// The partition.
        partition: PartitionId,
        /// Its first offset.
        base: Offset,
        /// The offset after its last record.
        end: Offset,
        /// The epoch that it is stamped with.
        epoch: LeaderEpoch,
        /// The checksum of its content.
        crc: u32,
    },
    /// A client was told the latest offset.
    Latest {
        /// The partition.
        partition: PartitionId,
        /// The epoch of the leader who says so.
        epoch: LeaderEpoch,
        /// The offset.
        offset: Offset,
    },
    /// Whole segments below this left the disk.
    Evicted {
        /// The partition.
        partition: PartitionId,
        /// The local start now.
        start: Offset,
    },
    /// A log is about to be cut, emptied or deleted. What becomes of it is durable with [`Self::Settled`], and not before.
    Changing {
        /// The partition.
        partition: PartitionId,
        /// Its end then.
        to: Offset,
        /// Whether what lies before goes too.
        emptied: bool,
    },
    /// What was to be cut, emptied or deleted is so for good.
    Settled {
        /// The partition.
        partition: PartitionId,
    },
    /// A journal's file holds batches of a log up to here.
    Journaled {
        /// The partition.
        partition: PartitionId,
        /// The number of this use of the file.
        file: u64,
        /// The offset after the last of them.
        end: Offset,
    },
    /// A journal's file may be used again.
    Freed {
        /// The number of its use until now.
        file: u64,
    },
}

/// What a process is in a partition.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// Neither of the two.
    Waiting,
    /// It follows, or is about to.
    Following(LeaderEpoch),
    /// It leads.
    Leading {
        /// In this epoch.
        epoch: LeaderEpoch,
        /// By the partition's value of this revision.
        revision: u64,
        /// `min.insync.replicas` as it knows it.
        min_insync: usize,
    },
}

/// Whoever watches. It is given the number of the process, 0 for none.
pub type Witness = Box<dyn FnMut(u32, Event<'_>)>;

thread_local! {
    static WITNESS: RefCell<Option<Witness>> = const { RefCell::new(None) };
}

/// Lets `witness` see what happens in this thread from now on; `None` ends that.
pub fn set(witness: Option<Witness>) {
    WITNESS.with_borrow_mut(|known| *known = witness);
}

/// Whether anybody watches.
pub fn is_set() -> bool {
    WITNESS.with_borrow(Option::is_some)
}

/// Tells the witness.
pub fn saw(event: Event<'_>) {
    let process = Process::current().map_or(0, |process| process.id());
    WITNESS.with_borrow_mut(|witness| {
        if let Some(witness) = witness {
            witness(process, event);
        }
    });
}
