//! State of a partition that is read without a request to its task.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{sync::Notify, time::Instant};

use super::{
    lag::{FollowerLag, FollowerLagTracker},
    leader::member::ReplicaProgress,
    role::{ReplicaRole, ReplicaStatus, WatermarkKind},
    wake::{PartitionListeners, WakeSet},
};
use crate::{
    model::{BrokerId, LeaderEpoch, Offset, TopicConfig, Watermarks},
    task::{Tasks, clock, lock::Mutex},
    telemetry::LogThrottle,
};

/// Published state of one partition. The partition's task writes this state, with these exceptions: the handle writes
/// the configuration, and maintenance the number of future segments. The handle also stores acknowledgements of
/// followers, and readers count their errors.
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
    /// Time of the first batch in the active segment, in milliseconds after `opened`, negative if before it; `i64::MAX`
    /// while the segment is empty.
    active_since_ms: AtomicI64,
    /// Number of segments with timestamps in the future, by the last retention plan; 0 if this broker did not lead at
    /// that time.
    future_segments: AtomicU64,
    closed: AtomicBool,
    /// True if the task needs ticks. Either it leads, and an ISR member is behind or the next ISR proposal waits for
    /// metadata or a tick. Or it is idle because its metadata is late.
    wants_ticks: AtomicBool,
    status: ArcSwap<ReplicaStatus>,
    /// Notified when the status changed or the partition was closed.
    status_changed: Notify,
    config: ArcSwap<TopicConfig>,
    /// Error that stopped writes; it is final.
    error: OnceLock<Arc<str>>,
    /// Throttles log lines about failed local reads for clients.
    client_read_errors: Mutex<LogThrottle>,
    /// Throttles log lines about failed local reads for followers.
    follower_read_errors: Mutex<LogThrottle>,
    /// Tracks the lag of the followers; `None` while this broker does not lead.
    lag_tracker: Mutex<Option<FollowerLagTracker>>,
    /// True from the first acknowledgement of a follower in the current leadership on. Before, appends add no entry to
    /// the lag tracker.
    has_acknowledgements: AtomicBool,
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
            client_read_errors: Mutex::default(),
            follower_read_errors: Mutex::default(),
            lag_tracker: Mutex::new(None),
            has_acknowledgements: AtomicBool::new(false),
            listeners: Arc::default(),
            tasks,
        }
    }

    /// Counts a failed local read for a client. Returns the number of failed reads for clients since the last log line
    /// if the caller must log the failure; otherwise `None`.
    pub(super) fn count_client_read_error(&self) -> Option<u64> {
        self.client_read_errors.lock().occur(clock::monotonic())
    }

    /// Counts a failed local read for a follower, as [`Self::count_client_read_error`] does for a client.
    pub(super) fn count_follower_read_error(&self) -> Option<u64> {
        self.follower_read_errors.lock().occur(clock::monotonic())
    }

    /// Publishes the watermarks and the bytes on disk, and wakes the listeners of watermarks that moved. If the log end
    /// moved, also adds an entry to the lag tracker, once a follower has acknowledged. The log end is stored before the
    /// high watermark. So a reader that loads the high watermark first gets no log end below it, except after a
    /// truncation.
    pub(super) fn publish(&self, watermarks: Watermarks, local_bytes: u64) {
        let previous_end = self.log_end.swap(watermarks.log_end.get(), Ordering::SeqCst);
        let end_moved = previous_end != watermarks.log_end.get();
        if end_moved && self.has_acknowledgements.load(Ordering::Relaxed) {
            self.add_lag_entry(previous_end);
        }
        let previous_persisted_end = self.persisted_end.swap(watermarks.persisted_end.get(), Ordering::SeqCst);
        let persisted_end_moved = previous_persisted_end != watermarks.persisted_end.get();
        self.tiered_end.store(watermarks.tiered_end.get(), Ordering::Release);
        self.local_start.store(watermarks.local_start.get(), Ordering::Release);
        self.log_start.store(watermarks.log_start.get(), Ordering::Release);
        self.local_bytes.store(local_bytes, Ordering::Relaxed);
        let previous_high_watermark = self.high_watermark.swap(watermarks.high_watermark.get(), Ordering::SeqCst);
        if previous_high_watermark != watermarks.high_watermark.get() {
            self.wake(WatermarkKind::HighWatermark);
        }
        if end_moved {
            self.wake(WatermarkKind::LogEnd);
        }
        if end_moved || persisted_end_moved {
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

    /// Publishes the time of the first batch in the active segment; `None` if the segment is empty. The time may be
    /// before the partition was opened.
    pub(super) fn set_active_since(&self, since: Option<Instant>) {
        let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX - 1);
        let since_ms = since.map_or(i64::MAX, |since| match since.checked_duration_since(self.opened) {
            Some(after_open) => ms(after_open),
            None => -ms(self.opened.duration_since(since)),
        });
        self.active_since_ms.store(since_ms, Ordering::Relaxed);
    }

    /// Returns the time since the first batch in the active segment; `None` while the segment is empty.
    pub(super) fn active_age(&self, now: Instant) -> Option<Duration> {
        let since_ms = self.active_since_ms.load(Ordering::Relaxed);
        let now_ms = i64::try_from(now.saturating_duration_since(self.opened).as_millis()).unwrap_or(i64::MAX);
        let age_ms = u64::try_from(now_ms.saturating_sub(since_ms)).unwrap_or(0);
        (since_ms != i64::MAX).then(|| Duration::from_millis(age_ms))
    }

    pub(super) fn set_future_segments(&self, count: u64) {
        self.future_segments.store(count, Ordering::Relaxed);
    }

    pub(super) fn future_segments(&self) -> u64 {
        self.future_segments.load(Ordering::Relaxed)
    }

    /// Returns the log end and the persisted end; the latter is never above the former.
    pub(super) fn progress(&self) -> ReplicaProgress {
        // The persisted end is loaded first: it is never above a log end that is loaded later, unless the log was
        // truncated in between.
        let load = |end: &AtomicU64| Offset::new(end.load(Ordering::Acquire)).expect("published offsets are valid");
        let persisted_end = load(&self.persisted_end);
        let log_end = load(&self.log_end);
        ReplicaProgress { log_end, persisted_end: persisted_end.min(log_end) }
    }

    pub(super) fn status(&self) -> ReplicaStatus {
        **self.status.load()
    }

    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.status().epoch
    }

    /// Publishes the replica status. Wakes all listeners, because their reads may have another result in the new role,
    /// and the callers of [`Self::wait_until_leading`].
    pub(super) fn publish_status(&self, status: ReplicaStatus) {
        self.status.store(Arc::new(status));
        self.status_changed.notify_waiters();
        self.listeners.wake_all(&self.tasks);
    }

    /// Waits until this broker leads in `epoch`, has received a newer epoch, or has closed the partition.
    pub(super) async fn wait_until_leading(&self, epoch: LeaderEpoch) {
        loop {
            // Created before the status is loaded, so that no change between the load and the wait is missed.
            let changed = self.status_changed.notified();
            let status = self.status();
            let is_leading = status.epoch == epoch && matches!(status.role, ReplicaRole::Leader { .. });
            if is_leading || status.epoch > epoch || self.is_closed() {
                return;
            }
            changed.await;
        }
    }

    /// Adds an entry for an append to the lag tracker, if this broker leads. The log ended at `previous_end` before the
    /// append.
    fn add_lag_entry(&self, previous_end: u64) {
        if let (Some(tracker), Some(previous_end)) = (&mut *self.lag_tracker.lock(), Offset::new(previous_end)) {
            tracker.appended(previous_end, clock::monotonic());
        }
    }

    /// Starts to track the lag of followers if `leads`, else stops it. Called when this broker starts to lead, and when
    /// its leadership ends.
    pub(super) fn set_leading(&self, leads: bool) {
        self.has_acknowledgements.store(false, Ordering::Relaxed);
        *self.lag_tracker.lock() = leads.then(|| FollowerLagTracker::new(clock::monotonic()));
    }

    /// Updates the lag of follower `broker`, which has acknowledged all records below `end`. No effect while this
    /// broker does not lead.
    pub(super) fn acknowledged(&self, broker: BrokerId, end: Offset) {
        if let Some(tracker) = &mut *self.lag_tracker.lock() {
            tracker.acknowledged(broker, end);
            self.has_acknowledgements.store(true, Ordering::Relaxed);
        }
    }

    /// Calls `report` with the lag of each of these brokers, and drops the acknowledgements of all other brokers. Makes
    /// no call while this broker does not lead.
    pub(super) fn for_each_lag(
        &self,
        replicas: &[BrokerId],
        now: Instant,
        mut report: impl FnMut(BrokerId, FollowerLag),
    ) {
        let watermarks = self.watermarks();
        let first_missing = watermarks.tiered_end.max(watermarks.log_start);
        let mut tracker = self.lag_tracker.lock();
        let Some(tracker) = &mut *tracker else { return };
        tracker.keep(replicas);
        for id in replicas {
            report(*id, tracker.lag(*id, first_missing, watermarks.log_end, now));
        }
    }

    /// Returns true if the task needs ticks at intervals. The ticks serve to check for lagging ISR members, to propose
    /// an ISR change again, or to read the store because its metadata is late.
    pub(super) fn wants_ticks(&self) -> bool {
        self.wants_ticks.load(Ordering::Relaxed)
    }

    pub(super) fn set_wants_ticks(&self, wants_ticks: bool) {
        self.wants_ticks.store(wants_ticks, Ordering::Relaxed);
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

    /// Publishes the error that stopped writes. Ignores every error after the first.
    pub(super) fn set_error(&self, reason: &str) {
        let _already_set = self.error.set(reason.into());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Closes the partition for its readers, and wakes all waiting callers. The next read of each reader fails.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.status_changed.notify_waiters();
        self.listeners.wake_all(&self.tasks);
    }

    /// Marks `index` in `wake_set` now, and whenever that watermark moves, the replica status changes or the partition
    /// is closed.
    pub(super) fn add_listener(&self, wake_set: &Arc<WakeSet>, index: usize, watermark: WatermarkKind) {
        self.listeners.add(wake_set, index, watermark);
    }

    /// Wakes the listeners of this watermark, whether it moved or not.
    pub(super) fn wake(&self, watermark: WatermarkKind) {
        self.listeners.wake(watermark, &self.tasks);
    }
}
