//! What a replica's writer, its readers, the journal and the syncing thread know together. The lock is held for moments,
//! never over a call to the disk.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    checkpoint::ReplicaRecord,
    core::Core,
    disk::PIECE_BYTES,
    epochs::EpochHistory,
    error::PersistError,
    index::Index,
    journal::entry::{EntryHead, Kind},
    producers::ProducerTable,
    segment::{Segment, SegmentFile, SegmentInfo, name},
    tail::PartitionTail,
};
use crate::{
    model::{Offset, PartitionId},
    task::clock,
};

pub(super) struct Shared {
    pub(super) id: PartitionId,
    pub(super) dir: PathBuf,
    pub(super) core: Arc<Core>,
    pub(super) tail: Arc<PartitionTail>,
    /// Why this replica takes no writes any more.
    pub(super) failed: OnceLock<String>,
    /// Whether somebody holds the writer's handle.
    pub(super) taken: AtomicBool,
    /// Whether it is on the list of what is to be synced.
    pub(super) dirty: AtomicBool,
    /// Bytes appended since it was last written out.
    pub(super) gathered: AtomicU64,
    /// Held while its files are being synced.
    pub(super) syncing: Mutex<()>,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    /// Never empty, each begins where the one before it ends; the last is active.
    pub(super) segments: Vec<Segment>,
    /// First offset that can be read at all; whoever leads the partition moves it.
    pub(super) log_start: Offset,
    /// First offset not known to be durable; the journal and the syncing thread advance it, a cut lowers it.
    pub(super) persisted_end: Offset,
    pub(super) epochs: Arc<EpochHistory>,
    pub(super) producers: Arc<ProducerTable>,
    /// After how much partition time a producer is forgotten; `None` until the topic's configuration is known.
    pub(super) producer_expiration_ms: Option<i64>,
    /// The active segment's index; `None` until it is needed.
    pub(super) index: Option<Index>,
    /// Grows with each cut and reset, so that what was begun before them is recognised.
    pub(super) generation: u64,
    /// Where a scan begins after a crash: all before it is synced in the segments.
    pub(super) recovery: Recovery,
    /// For each journal file that holds entries of this replica: where the last one ends, until that is synced.
    pub(super) unsynced: VecDeque<(u64, Offset)>,
    /// Bytes appended since the last sync was begun.
    pub(super) unsynced_bytes: u64,
    /// Whether names were made or removed since the directory was synced.
    pub(super) names_changed: bool,
    /// What was there before a reset, until its files are gone and those of the new beginning are synced: a checkpoint says no more before.
    pub(super) replaced: Option<Box<ReplicaRecord>>,
    /// How many hand-overs wait for a sync of the segments: later ones queue behind them.
    pub(super) syncing: u32,
}

/// A point up to which everything is synced, and what was known there.
#[derive(Clone)]
pub(super) struct Recovery {
    /// The segment that holds the point, as it was.
    pub(super) segment: SegmentInfo,
    pub(super) epochs: Arc<EpochHistory>,
    pub(super) producers: Arc<ProducerTable>,
}

impl State {
    pub(super) fn active(&self) -> &Segment {
        self.segments.last().expect("a log has an active segment")
    }

    pub(super) fn active_mut(&mut self) -> &mut Segment {
        self.segments.last_mut().expect("a log has an active segment")
    }

    pub(super) fn log_end(&self) -> Offset {
        self.active().info.end
    }

    pub(super) fn local_start(&self) -> Offset {
        self.segments.first().expect("a log has a segment").info.base
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.info.bytes).sum()
    }

    /// Forgets the epochs of what is neither here nor in the bucket, but for the one that wrote last before it: that is what a replica that
    /// begins here claims to hold.
    pub(super) fn forget_epochs(&mut self) {
        let first = self.log_start.min(self.local_start());
        if let Some(before) = first.get().checked_sub(1).and_then(Offset::new) {
            Arc::make_mut(&mut self.epochs).forget_below(before);
        }
    }

    /// Forgets producers by the topic's rule. Due wherever the log end moves or the table is replaced.
    pub(super) fn forget_expired_producers(&mut self) {
        if self.producers.has_expired(self.producer_expiration_ms) {
            Arc::make_mut(&mut self.producers).forget_expired(self.producer_expiration_ms);
        }
    }

    /// What is known at the log end.
    pub(super) fn point(&self) -> Recovery {
        Recovery { segment: self.active().info, epochs: self.epochs.clone(), producers: self.producers.clone() }
    }
}

impl Shared {
    /// A replica of which this is known.
    pub(super) fn new(core: &Arc<Core>, dir: PathBuf, record: ReplicaRecord) -> Arc<Self> {
        let segments = record.segments.iter().map(|info| {
            let file = SegmentFile::new(core.files.serial(), &dir, info.base);
            // Whoever made the record has synced it, or syncs all of it next.
            file.written_out.store(info.bytes, Ordering::Relaxed);
            Segment { info: *info, file: Arc::new(file) }
        });
        let segments: Vec<_> = segments.collect();
        let (epochs, producers) =
            (Arc::new(record.epochs), Arc::new(Arc::unwrap_or_clone(record.producers).charged(&core.producer_memory)));
        let segment = segments.last().expect("a record has a segment").info;
        Arc::new(Self {
            id: record.id,
            dir,
            core: core.clone(),
            tail: Arc::default(),
            failed: OnceLock::new(),
            taken: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            gathered: AtomicU64::new(0),
            syncing: Mutex::new(()),
            state: Mutex::new(State {
                log_start: record.log_start,
                persisted_end: record.persisted.max(segment.end),
                epochs: epochs.clone(),
                producers: producers.clone(),
                producer_expiration_ms: None,
                index: None,
                generation: record.generation,
                recovery: Recovery { segment, epochs, producers },
                segments,
                unsynced: VecDeque::new(),
                unsynced_bytes: 0,
                names_changed: false,
                replaced: None,
                syncing: 0,
            }),
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why nothing can be written here.
    pub(super) fn refusal(&self) -> Option<String> {
        self.failed.get().cloned().or_else(|| self.core.refusal())
    }

    /// Ends writing for good.
    pub(super) fn fail(&self, reason: String) {
        tracing::error!(partition = %self.id, reason, "this replica takes no more writes");
        drop(self.failed.set(reason));
    }

    /// Puts the replica on the list of what is to be synced, and of what is to be written out where there is a piece of it.
    pub(super) fn touch(self: &Arc<Self>, bytes: u64) {
        let listed = self.dirty.swap(true, Ordering::AcqRel);
        let gathered = self.gathered.fetch_add(bytes, Ordering::AcqRel);
        let (piece_bytes, after) = (self.core.piece_bytes.load(Ordering::Relaxed) as u64, gathered + bytes);
        // Looked at again with each small piece: the size of a piece changes.
        let is_piece = after >= piece_bytes && gathered / PIECE_BYTES as u64 != after / PIECE_BYTES as u64;
        let mut work = self.core.work();
        if is_piece {
            work.pieces.push(self.clone());
        }
        let was_due = self.core.sync_is_due(&work);
        if !listed {
            work.dirty.push(self.clone());
        }
        let first = work.since.is_none();
        if first {
            work.since = Some(clock::monotonic());
        }
        work.dirty_bytes += bytes;
        let due = self.core.sync_is_due(&work);
        drop(work);
        // By hand a step is a whole pass, which a piece alone is not worth.
        if first || (is_piece && !self.core.options.manual) || (due && !was_due) {
            self.core.wake_syncer();
        }
    }

    pub(super) fn head(&self, kind: Kind, generation: u64, base: Offset, end: Offset) -> EntryHead {
        EntryHead { kind, id: self.id, generation, base, end, segment: Offset::ZERO, position: 0, epoch: None }
    }

    /// An entry of this replica is durable, in the journal file of this use.
    pub(super) fn journaled(self: &Arc<Self>, head: &EntryHead, file: u64) {
        let mut state = self.state();
        if head.generation != state.generation {
            return;
        }
        let pinned = state.unsynced.len();
        if head.kind == Kind::Append {
            sim_event!(EntryJournaled { partition: self.id, file, end: head.end });
        }
        match head.kind {
            Kind::Append | Kind::Create => {
                if head.kind == Kind::Create || head.end > state.recovery.segment.end {
                    match state.unsynced.back_mut() {
                        Some((last, end)) if *last == file => *end = head.end,
                        _ => state.unsynced.push_back((file, head.end)),
                    }
                }
                state.persisted_end = state.persisted_end.max(head.end);
            }
            Kind::Synced => state.persisted_end = state.persisted_end.max(head.end),
            // No sync lets go of it, only the end of the reset.
            Kind::Reset => state.unsynced.push_back((file, Offset::MAX)),
            _ => {}
        }
        let pins = state.unsynced.len() > pinned;
        drop(state);
        if pins && !self.dirty.load(Ordering::Acquire) {
            // The pass of syncs that it asked for was faster. Only another one gives that file up again.
            self.touch(0);
        }
    }

    /// What whoever handed this entry over is told.
    pub(super) fn persisted_answer(&self, head: &EntryHead) -> Result<Offset, PersistError> {
        let state = self.state();
        if head.generation == state.generation { Ok(state.persisted_end) } else { Err(PersistError::Cut) }
    }

    /// What the checkpoint keeps of it.
    pub(super) fn record(&self) -> ReplicaRecord {
        let state = self.state();
        if let Some(replaced) = &state.replaced {
            return (**replaced).clone();
        }
        let recovery = &state.recovery;
        let sealed = state.segments.iter().map(|segment| segment.info);
        let mut segments: Vec<_> = sealed.take_while(|info| info.base < recovery.segment.base).collect();
        segments.push(recovery.segment);
        ReplicaRecord {
            id: self.id,
            generation: state.generation,
            log_start: state.log_start,
            persisted: state.persisted_end.max(recovery.segment.end),
            segments,
            epochs: (*recovery.epochs).clone(),
            producers: recovery.producers.clone(),
            lost: None,
        }
    }

    pub(super) fn path(&self, base: Offset, extension: &str) -> PathBuf {
        self.dir.join(name(base, extension))
    }
}

/// Where a replica's files lie.
pub(super) fn replica_dir(data: &Path, id: PartitionId) -> PathBuf {
    data.join(id.topic.to_string()).join(id.number.to_string())
}
