//! State of a partition that is read without a request to its task: watermarks, status and error, which the task
//! publishes, and the configuration.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::{
    lag::{FollowerLag, FollowerLagTracker},
    leader::member::ReplicaProgress,
    role::{ReplicaRole, ReplicaStatus, WatermarkKind},
    wake::{PartitionListeners, WakeSet},
};
use crate::{
    model::{BrokerId, LeaderEpoch, Offset, TopicConfig, Watermarks},
    task::{Tasks, clock},
    telemetry::LogThrottle,
};

/// Published state of one partition. Only its task writes it, except the configuration: the broker sets that when it
/// arrives.
#[derive(Debug)]
pub(super) struct PublishedState {
    log_start: AtomicU64,
    local_start: AtomicU64,
    tiered_end: AtomicU64,
    high_watermark: AtomicU64,
    persisted_end: AtomicU64,
    log_end: AtomicU64,
    local_bytes: AtomicU64,
    opened: Instant,
    /// Time of the first batch in the active segment, in ms from `opened` on; `i64::MAX` while the segment is empty.
    active_since_ms: AtomicI64,
    /// Number of segments with timestamps in the future, by the last plan of the leader.
    future_segments: AtomicU64,
    closed: AtomicBool,
    /// True if the task needs ticks: an ISR member is behind, or the metadata is late.
    wants_ticks: AtomicBool,
    status: ArcSwap<ReplicaStatus>,
    /// Notified when the status changed.
    status_changed: Notify,
    config: ArcSwap<TopicConfig>,
    /// Error that stopped writes; it is final.
    error: OnceLock<Arc<str>>,
    /// Throttles log lines about reads that the local copy did not serve.
    unreadable: Mutex<LogThrottle>,
    /// Throttles log lines about reads for followers that the local copy did not serve.
    unsendable: Mutex<LogThrottle>,
    /// `None` while this broker does not lead.
    followers: Mutex<Option<FollowerLagTracker>>,
    /// True if a follower acknowledges: otherwise appends record no lag entry.
    followed: AtomicBool,
    listeners: Arc<PartitionListeners>,
    /// Tasks in which long lists of listeners are woken.
    tasks: Tasks,
}

impl PublishedState {
    pub(super) fn new(config: Arc<TopicConfig>, tasks: Tasks) -> Self {
        Self {
            log_start: AtomicU64::new(0),
            local_start: AtomicU64::new(0),
            tiered_end: AtomicU64::new(0),
            high_watermark: AtomicU64::new(0),
            persisted_end: AtomicU64::new(0),
            log_end: AtomicU64::new(0),
            local_bytes: AtomicU64::new(0),
            opened: clock::monotonic(),
            active_since_ms: AtomicI64::new(i64::MAX),
            future_segments: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            wants_ticks: AtomicBool::new(false),
            status: ArcSwap::from_pointee(ReplicaStatus::UNKNOWN),
            status_changed: Notify::new(),
            config: ArcSwap::new(config),
            error: OnceLock::new(),
            unreadable: Mutex::default(),
            unsendable: Mutex::default(),
            followers: Mutex::new(None),
            followed: AtomicBool::new(false),
            listeners: Arc::default(),
            tasks,
        }
    }

    /// Counts a read that the local copy did not serve. Returns the number of such reads if a line is due.
    pub(super) fn count_unreadable(&self) -> Option<u64> {
        self.unreadable.lock().occur(clock::monotonic())
    }

    /// Counts a read for a follower, as [`Self::count_unreadable`] does.
    pub(super) fn count_unsendable(&self) -> Option<u64> {
        self.unsendable.lock().occur(clock::monotonic())
    }

    /// Publishes the watermarks and wakes the listeners of moved watermarks. The ends are stored before the high
    /// watermark, so that a reader that sees a high watermark finds everything below it.
    pub(super) fn publish(&self, watermarks: Watermarks, local_bytes: u64) {
        let before = self.log_end.swap(watermarks.log_end.get(), Ordering::SeqCst);
        let written = before != watermarks.log_end.get();
        if written && self.followed.load(Ordering::Relaxed) {
            self.record_append(before);
        }
        let persisted = self.persisted_end.swap(watermarks.persisted_end.get(), Ordering::SeqCst);
        let persisted = persisted != watermarks.persisted_end.get();
        self.tiered_end.store(watermarks.tiered_end.get(), Ordering::Release);
        self.local_start.store(watermarks.local_start.get(), Ordering::Release);
        self.log_start.store(watermarks.log_start.get(), Ordering::Release);
        self.local_bytes.store(local_bytes, Ordering::Relaxed);
        let before = self.high_watermark.swap(watermarks.high_watermark.get(), Ordering::SeqCst);
        if before != watermarks.high_watermark.get() {
            self.wake(WatermarkKind::HighWatermark);
        }
        if written {
            self.wake(WatermarkKind::LogEnd);
        }
        if written || persisted {
            self.wake(WatermarkKind::AnyEnd);
        }
    }

    pub(super) fn watermarks(&self) -> Watermarks {
        let load = |end: &AtomicU64| Offset::new(end.load(Ordering::Acquire)).expect("published offsets are valid");
        Watermarks {
            high_watermark: load(&self.high_watermark),
            log_start: load(&self.log_start),
            local_start: load(&self.local_start),
            tiered_end: load(&self.tiered_end),
            persisted_end: load(&self.persisted_end),
            log_end: load(&self.log_end),
        }
    }

    pub(super) fn local_bytes(&self) -> u64 {
        self.local_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn set_active_since(&self, since: Option<Instant>) {
        let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX - 1);
        let since = since.map_or(i64::MAX, |since| match since.checked_duration_since(self.opened) {
            Some(after) => ms(after),
            None => -ms(self.opened.duration_since(since)),
        });
        self.active_since_ms.store(since, Ordering::Relaxed);
    }

    /// Returns the time since the first batch in the active segment; `None` while the segment is empty.
    pub(super) fn active_age(&self, now: Instant) -> Option<Duration> {
        let since = self.active_since_ms.load(Ordering::Relaxed);
        let now = i64::try_from(now.saturating_duration_since(self.opened).as_millis()).unwrap_or(i64::MAX);
        let age = u64::try_from(now.saturating_sub(since)).unwrap_or(0);
        (since != i64::MAX).then(|| Duration::from_millis(age))
    }

    pub(super) fn set_future_segments(&self, count: u64) {
        self.future_segments.store(count, Ordering::Relaxed);
    }

    pub(super) fn future_segments(&self) -> u64 {
        self.future_segments.load(Ordering::Relaxed)
    }

    /// Returns the progress of the log.
    pub(super) fn progress(&self) -> ReplicaProgress {
        // The persisted end first: it is never above a log end that is read after it.
        let load = |end: &AtomicU64| Offset::new(end.load(Ordering::Acquire)).expect("published offsets are valid");
        let persisted = load(&self.persisted_end);
        let written = load(&self.log_end);
        ReplicaProgress { log_end: written, persisted_end: persisted.min(written) }
    }

    pub(super) fn status(&self) -> ReplicaStatus {
        **self.status.load()
    }

    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.status().epoch
    }

    /// Publishes the replica status and wakes all listeners: their wait may be over.
    pub(super) fn publish_status(&self, status: ReplicaStatus) {
        self.status.store(Arc::new(status));
        self.status_changed.notify_waiters();
        self.listeners.wake_all(&self.tasks);
    }

    /// Waits until this broker leads in `epoch`, has received a newer epoch, or has closed the partition.
    pub(super) async fn until_led(&self, epoch: LeaderEpoch) {
        loop {
            let changed = self.status_changed.notified();
            let status = self.status();
            let is_over = status.epoch > epoch || self.is_closed();
            if is_over || status.epoch == epoch && matches!(status.role, ReplicaRole::Leader { .. }) {
                return;
            }
            changed.await;
        }
    }

    fn record_append(&self, before: u64) {
        if let (Some(followers), Some(before)) = (&mut *self.followers.lock(), Offset::new(before)) {
            followers.appended(before, clock::monotonic());
        }
    }

    /// Records that this broker leads from now on, or does not lead.
    pub(super) fn set_leading(&self, leads: bool) {
        self.followed.store(false, Ordering::Relaxed);
        *self.followers.lock() = leads.then(|| FollowerLagTracker::new(clock::monotonic()));
    }

    /// Records an acknowledgement: a follower has everything below `end`.
    pub(super) fn acknowledged(&self, broker: BrokerId, end: Offset) {
        if let Some(followers) = &mut *self.followers.lock() {
            followers.acknowledged(broker, end);
            self.followed.store(true, Ordering::Relaxed);
        }
    }

    /// Calls `report` with the lag of each of these brokers; makes no call while this broker does not lead.
    pub(super) fn for_each_lag(
        &self,
        replicas: &[BrokerId],
        now: Instant,
        mut report: impl FnMut(BrokerId, FollowerLag),
    ) {
        let watermarks = self.watermarks();
        let mut followers = self.followers.lock();
        let Some(followers) = &mut *followers else { return };
        followers.keep(replicas);
        for id in replicas {
            report(*id, followers.lag(*id, watermarks.tiered_end.max(watermarks.log_start), watermarks.log_end, now));
        }
    }

    pub(super) fn wants_ticks(&self) -> bool {
        self.wants_ticks.load(Ordering::Relaxed)
    }

    pub(super) fn set_wants_ticks(&self, behind: bool) {
        self.wants_ticks.store(behind, Ordering::Relaxed);
    }

    pub(super) fn config(&self) -> Arc<TopicConfig> {
        self.config.load_full()
    }

    pub(super) fn configure(&self, config: Arc<TopicConfig>) {
        self.config.store(config);
    }

    pub(super) fn error(&self) -> Option<Arc<str>> {
        self.error.get().cloned()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.error.get().is_some()
    }

    pub(super) fn set_error(&self, reason: &str) {
        let _first = self.error.set(reason.into());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Closes the partition for its readers: each one is woken and finds it closed.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.status_changed.notify_waiters();
        self.listeners.wake_all(&self.tasks);
    }

    /// Marks `index` in `ready` from now on whenever that watermark moves, and once at first.
    pub(super) fn add_listener(&self, ready: &Arc<WakeSet>, index: usize, on: WatermarkKind) {
        self.listeners.add(ready, index, on);
    }

    /// Wakes the listeners of this watermark, whether it moved or not.
    pub(super) fn wake(&self, on: WatermarkKind) {
        self.listeners.wake(on, &self.tasks);
    }
}
