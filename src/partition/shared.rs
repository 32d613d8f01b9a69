//! State of a partition that others read without asking its task: marks, standing and fault, which the task publishes, and the configuration.

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

/// The published state of one partition. Only its task writes, but for the configuration: the broker sets that as it learns of it.
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
    /// When the active segment took its first batch, in ms from `opened` on; `i64::MAX` while it is empty.
    active_since_ms: AtomicI64,
    /// Segments with timestamps that are still to come, as the last plan of its leader found them.
    future_segments: AtomicU64,
    closed: AtomicBool,
    /// Whether a member of the ISR is behind, so that the clock is to be asked.
    behind: AtomicBool,
    standing: ArcSwap<Standing>,
    /// Told when the standing changed.
    stands: Notify,
    config: ArcSwap<TopicConfig>,
    fault: Mutex<Option<Arc<str>>>,
    /// Reads that the local copy did not serve.
    unreadable: Mutex<LogThrottle>,
    /// Reads for followers that it did not serve.
    unsendable: Mutex<LogThrottle>,
    /// While it leads.
    followers: Mutex<Option<Followers>>,
    /// Whether somebody follows: else appends note nothing.
    followed: AtomicBool,
    committed: Listeners,
    written: Listeners,
    progress: Listeners,
    /// Where many listeners are woken.
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

    /// Counts a read that the local copy did not serve: `Some` with how many there were, where a line is due.
    pub(super) fn count_unreadable(&self) -> Option<u64> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).occur(clock::monotonic())
    }

    /// As [`Self::count_unreadable`], for followers.
    pub(super) fn count_unsendable(&self) -> Option<u64> {
        self.unsendable.lock().unwrap_or_else(PoisonError::into_inner).occur(clock::monotonic())
    }

    /// Publishes the marks. The ends are stored before the high watermark, so that who sees a high watermark finds
    /// everything below it. Whoever waits for a mark is woken when it moved.
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

    /// How long ago the active segment took its first batch; `None` while it is empty.
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

    /// How far the log reaches.
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

    /// Publishes what this broker is now, and wakes all who wait for anything: it may be over.
    pub(super) fn stand(&self, standing: Standing) {
        self.standing.store(Arc::new(standing));
        self.stands.notify_waiters();
        self.wake_all();
    }

    /// Waits until this broker leads in `epoch`, or has heard of a newer one, or does not serve the partition any more.
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

    /// From now on it leads, or does not.
    pub(super) fn leads(&self, leads: bool) {
        self.followed.store(false, Ordering::Relaxed);
        *self.followers() = leads.then(|| Followers::new(clock::monotonic()));
    }

    /// A follower has everything below `end`.
    pub(super) fn acknowledged(&self, broker: BrokerId, end: Offset) {
        if let Some(followers) = &mut *self.followers() {
            followers.acknowledged(broker, end);
            self.followed.store(true, Ordering::Relaxed);
        }
    }

    /// How far each of these brokers is behind; nothing while this one does not lead.
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

    /// Ends the partition for its readers: each is woken and finds it closed.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.stands.notify_waiters();
        self.wake_all();
    }

    /// Marks `index` in `ready` from now on whenever that mark moves, and once at first.
    pub(super) fn follow(self: &Arc<Self>, ready: &Arc<Ready>, index: usize, on: On) {
        ready.listen(index, Listener::new(ready, index, self, on));
        ready.mark(index);
    }

    /// Wakes who waits for this mark, though it did not move.
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
