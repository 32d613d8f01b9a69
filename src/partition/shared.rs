//! State of a partition that is read without a request to its task: watermarks, status and error, which the task publishes, and the
//! configuration.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{sync::Notify, time::Instant};

use super::{
    On, Ready, Role, Standing,
    lag::{Followers, Lag},
    leader::insync::Ends,
    listeners::{Listener, Listeners},
};
use crate::{
    model::{BrokerId, LeaderEpoch, Offset, TopicConfig, Watermarks},
    task::{Tasks, clock},
    telemetry::LogThrottle,
};

/// Published state of one partition. Only its task writes it, except the configuration: the broker sets that when it arrives.
#[derive(Debug)]
pub(super) struct Shared {
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
    behind: AtomicBool,
    standing: ArcSwap<Standing>,
    /// Notified when the status changed.
    stands: Notify,
    config: ArcSwap<TopicConfig>,
    fault: Mutex<Option<Arc<str>>>,
    /// Throttles log lines about reads that the local copy did not serve.
    unreadable: Mutex<LogThrottle>,
    /// Throttles log lines about reads for followers that the local copy did not serve.
    unsendable: Mutex<LogThrottle>,
    /// `None` while this broker does not lead.
    followers: Mutex<Option<Followers>>,
    /// True if a follower acknowledges: otherwise appends record no lag entry.
    followed: AtomicBool,
    committed: Listeners,
    written: Listeners,
    progress: Listeners,
    /// Tasks in which long lists of listeners are woken.
    tasks: Tasks,
}

impl Shared {
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
            behind: AtomicBool::new(false),
            standing: ArcSwap::from_pointee(Standing::UNKNOWN),
            stands: Notify::new(),
            config: ArcSwap::new(config),
            fault: Mutex::new(None),
            unreadable: Mutex::default(),
            unsendable: Mutex::default(),
            followers: Mutex::new(None),
            followed: AtomicBool::new(false),
            committed: Listeners::default(),
            written: Listeners::default(),
            progress: Listeners::default(),
            tasks,
        }
    }

    /// Counts a read that the local copy did not serve. Returns the number of such reads if a line is due.
    pub(super) fn count_unreadable(&self) -> Option<u64> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).occur(clock::monotonic())
    }

    /// Counts a read for a follower, as [`Self::count_unreadable`] does.
    pub(super) fn count_unsendable(&self) -> Option<u64> {
        self.unsendable.lock().unwrap_or_else(PoisonError::into_inner).occur(clock::monotonic())
    }

    /// Publishes the watermarks and wakes the listeners of those that moved. The ends are stored before the high watermark, so that a
    /// reader that sees a high watermark finds everything below it.
    pub(super) fn publish(&self, marks: Watermarks, local_bytes: u64) {
        let before = self.log_end.swap(marks.log_end.get(), Ordering::SeqCst);
        let written = before != marks.log_end.get();
        if written && self.followed.load(Ordering::Relaxed) {
            self.note_append(before);
        }
        let persisted = self.persisted_end.swap(marks.persisted_end.get(), Ordering::SeqCst);
        let persisted = persisted != marks.persisted_end.get();
        self.tiered_end.store(marks.tiered_end.get(), Ordering::Release);
        self.local_start.store(marks.local_start.get(), Ordering::Release);
        self.log_start.store(marks.log_start.get(), Ordering::Release);
        self.local_bytes.store(local_bytes, Ordering::Relaxed);
        let before = self.high_watermark.swap(marks.high_watermark.get(), Ordering::SeqCst);
        if before != marks.high_watermark.get() {
            self.wake(On::Committed);
        }
        if written {
            self.wake(On::Written);
        }
        if written || persisted {
            self.wake(On::Progress);
        }
    }

    pub(super) fn marks(&self) -> Watermarks {
        let load = |mark: &AtomicU64| Offset::new(mark.load(Ordering::Acquire)).expect("a published offset");
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
    pub(super) fn ends(&self) -> Ends {
        // The persisted end first: it is never above a log end that is read after it.
        let load = |mark: &AtomicU64| Offset::new(mark.load(Ordering::Acquire)).expect("a published offset");
        let persisted = load(&self.persisted_end);
        let written = load(&self.log_end);
        Ends { written, persisted: persisted.min(written) }
    }

    pub(super) fn standing(&self) -> Standing {
        **self.standing.load()
    }

    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.standing().epoch
    }

    /// Publishes the replica status and wakes all listeners: their wait may be over.
    pub(super) fn stand(&self, standing: Standing) {
        self.standing.store(Arc::new(standing));
        self.stands.notify_waiters();
        self.wake_all();
    }

    /// Waits until this broker leads in `epoch`, has received a newer epoch, or has closed the partition.
    pub(super) async fn until_led(&self, epoch: LeaderEpoch) {
        loop {
            let changed = self.stands.notified();
            let standing = self.standing();
            let over = standing.epoch > epoch || self.is_closed();
            if over || standing.epoch == epoch && matches!(standing.role, Role::Leader { .. }) {
                return;
            }
            changed.await;
        }
    }

    fn note_append(&self, before: u64) {
        if let (Some(followers), Some(before)) = (&mut *self.followers(), Offset::new(before)) {
            followers.appended(before, clock::monotonic());
        }
    }

    /// Records that this broker leads from now on, or does not lead.
    pub(super) fn leads(&self, leads: bool) {
        self.followed.store(false, Ordering::Relaxed);
        *self.followers() = leads.then(|| Followers::new(clock::monotonic()));
    }

    /// Records an acknowledgement: a follower has everything below `end`.
    pub(super) fn acknowledged(&self, broker: BrokerId, end: Offset) {
        if let Some(followers) = &mut *self.followers() {
            followers.acknowledged(broker, end);
            self.followed.store(true, Ordering::Relaxed);
        }
    }

    /// Calls `tell` with the lag of each of these brokers; makes no call while this broker does not lead.
    pub(super) fn lags(&self, replicas: &[BrokerId], now: Instant, mut tell: impl FnMut(BrokerId, Lag)) {
        let marks = self.marks();
        let mut followers = self.followers();
        let Some(followers) = &mut *followers else { return };
        followers.keep(replicas);
        for id in replicas {
            tell(*id, followers.lag(*id, marks.tiered_end.max(marks.log_start), marks.log_end, now));
        }
    }

    fn followers(&self) -> MutexGuard<'_, Option<Followers>> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_behind(&self) -> bool {
        self.behind.load(Ordering::Relaxed)
    }

    pub(super) fn set_behind(&self, behind: bool) {
        self.behind.store(behind, Ordering::Relaxed);
    }

    pub(super) fn config(&self) -> Arc<TopicConfig> {
        self.config.load_full()
    }

    pub(super) fn configure(&self, config: Arc<TopicConfig>) {
        self.config.store(config);
    }

    pub(super) fn fault(&self) -> Option<Arc<str>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_fault(&self, why: &str) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.into());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Closes the partition for its readers: each one is woken and finds it closed.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.stands.notify_waiters();
        self.wake_all();
    }

    /// Marks `index` in `ready` from now on whenever that watermark moves, and once at first.
    pub(super) fn follow(self: &Arc<Self>, ready: &Arc<Ready>, index: usize, on: On) {
        ready.listen(index, Listener::new(ready, index, self, on));
        ready.mark(index);
    }

    /// Wakes the listeners of this watermark, whether it moved or not.
    pub(super) fn wake(&self, on: On) {
        self.listeners(on).wake(&self.tasks);
    }

    pub(super) fn listeners(&self, on: On) -> &Listeners {
        match on {
            On::Committed => &self.committed,
            On::Written => &self.written,
            On::Progress => &self.progress,
        }
    }

    fn wake_all(&self) {
        [On::Committed, On::Written, On::Progress].into_iter().for_each(|on| self.wake(on));
    }
}
