//! Segments that retention rolls, uploads, evicts and deletes: single cases, and properties for any input.

use proptest::prelude::*;

use super::*;
use crate::model::ConfigMap;

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

/// Returns a segment that was written at the time of its newest record.
fn segment(base: u64, end: u64, bytes: u64, newest_ms: i64) -> RetentionSegment {
    RetentionSegment { base: at(base), end: at(end), bytes, max_timestamp_ms: newest_ms, written_ms: newest_ms }
}

fn config(pairs: &[(&str, &str)]) -> TopicConfig {
    let set = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    TopicConfig::resolve(&ConfigMap::new(), &set).unwrap()
}

fn input<'a>(
    config: &'a TopicConfig,
    local: &'a [RetentionSegment],
    tiered: &'a [RetentionSegment],
) -> RetentionInput<'a> {
    let end = local.last().map_or(at(0), |last| last.end);
    RetentionInput {
        config,
        now_ms: 10_000,
        log_start: at(0),
        tiered_end: tiered.last().map_or(at(0), |last| last.end),
        high_watermark: end,
        local,
        active: segment(end.get(), end.get(), 0, 10_000),
        active_age: None,
        tiered,
        tiered_bytes: tiered.iter().map(|segment| segment.bytes).sum(),
        uploads: config.tiered,
        leads: true,
        urgent: false,
    }
}

#[test]
fn plan_without_work_is_empty() {
    let config = config(&[]);
    assert_eq!(plan(&input(&config, &[], &[])), RetentionPlan::default());
}

#[test]
fn size_retention_keeps_at_least_the_limit() {
    let config = config(&[("retention.bytes", "150"), ("remote.storage.enable", "false")]);
    let local = [segment(0, 10, 100, 9_000), segment(10, 20, 100, 9_000), segment(20, 30, 100, 9_000)];
    assert_eq!(plan(&input(&config, &local, &[])).log_start, Some(at(10)));
}

/// Regression: if the object store could not be read since the start of the broker, retention deleted nothing, and the
/// disk filled.
#[test]
fn retention_continues_with_unreadable_object_store() {
    const HOUR_MS: i64 = 3_600_000;
    let input = |config, local, now_ms| RetentionInput {
        now_ms,
        log_start: at(5),
        tiered_end: at(20),
        tiered_bytes: 200,
        ..input(config, local, &[])
    };
    let by_size = config(&[("retention.bytes", "250")]);
    let local = [segment(20, 30, 100, 9_000), segment(30, 40, 100, 9_000), segment(40, 50, 100, 9_000)];
    let full = input(&by_size, &local, 10_000);
    assert_eq!((plan(&full).log_start, removed_bytes(&full, at(20))), (Some(at(20)), 200));
    assert_eq!(removed_bytes(&full, at(19)), 0);
    assert_eq!(
        plan(&input(&by_size, &local[..2], 10_000)).log_start,
        None,
        "the remaining bytes would be below the limit"
    );

    let by_age = config(&[("retention.ms", "60000")]);
    let planned = |now_ms| plan(&input(&by_age, &local, now_ms)).log_start;
    assert_eq!(planned(9_000 + HOUR_MS + 60_000), None, "a record in the segment may be an hour younger");
    assert_eq!(planned(9_000 + HOUR_MS + 60_001), Some(at(50)));
    let without_limit = config(&[("retention.ms", "60000"), ("message.timestamp.after.max.ms", "-1")]);
    assert_eq!(plan(&input(&without_limit, &local, 9_000 + 10 * HOUR_MS)).log_start, None);
}

/// Regression: records below the log start still counted as part of the log's size, and so the next plan deleted the
/// rest of the log.
#[test]
fn deleted_segments_do_not_count_again() {
    let config = config(&[("retention.bytes", "50000"), ("remote.storage.enable", "false")]);
    let local: Vec<RetentionSegment> = (0..10).map(|n| segment(n * 60, n * 60 + 60, 15_000, 9_000)).collect();
    let mut input = input(&config, &local, &[]);
    let first = plan(&input);
    assert_eq!((first.log_start, first.evict_below), (Some(at(360)), Some(at(360))));
    input.log_start = at(360);
    assert_eq!(
        plan(&input),
        RetentionPlan { evict_below: Some(at(360)), ..RetentionPlan::default() },
        "files that a crash left are evicted"
    );
    input.local = &local[6..];
    assert_eq!(plan(&input), RetentionPlan::default());
}

#[test]
fn active_segment_counts_for_size_and_is_never_deleted() {
    let config = config(&[("retention.bytes", "100"), ("remote.storage.enable", "false")]);
    let local = [segment(0, 10, 100, 9_000)];
    let mut input = input(&config, &local, &[]);
    input.active = segment(10, 20, 99, 9_000);
    assert_eq!(plan(&input).log_start, None);
    input.active.bytes = 100;
    assert_eq!(plan(&input).log_start, Some(at(10)));
}

#[test]
fn only_segments_wholly_below_log_start_are_evicted() {
    let config = config(&[]);
    let local = [segment(0, 10, 100, 9_000), segment(10, 20, 100, 9_000)];
    let mut input = input(&config, &local, &[]);
    input.uploads = false;
    for (log_start, below) in [(9, None), (10, Some(at(10))), (15, Some(at(10))), (20, Some(at(20)))] {
        input.log_start = at(log_start);
        assert_eq!(plan(&input).evict_below, below, "log start {log_start}");
    }
}

/// If the object store cannot be read, its segments count as one segment, whose records may not have expired. Local
/// segments after that segment must not be deleted before it.
#[test]
fn local_segments_wait_for_unreadable_tiered_segments() {
    let config = config(&[("retention.ms", "1")]);
    let local = [segment(10, 20, 100, 0)];
    let mut input = input(&config, &local, &[]);
    (input.tiered_end, input.uploads) = (at(10), false);
    assert_eq!(plan(&input).log_start, None);
}

#[test]
fn segment_across_tiered_end_or_log_start_is_uploaded() {
    let config = config(&[("retention.ms", "-1")]);
    let (local, tiered) = ([segment(0, 10, 1, 0), segment(10, 20, 1, 0)], [segment(0, 15, 1, 0)]);
    assert_eq!(plan(&input(&config, &local, &tiered)).upload, Some(at(10)..at(20)));
    let mut after_log_start = input(&config, &local, &[]);
    after_log_start.log_start = at(5);
    assert_eq!(plan(&after_log_start).upload, Some(at(0)..at(20)));
}

#[test]
fn small_segments_share_a_commit_and_large_ones_do_not() {
    let config = config(&[("retention.ms", "-1")]);
    let upload = |bytes: &[u64], high_watermark| {
        let local: Vec<_> = (0..).zip(bytes).map(|(n, bytes)| segment(n * 10, n * 10 + 10, *bytes, 0)).collect();
        let mut input = input(&config, &local, &[]);
        input.high_watermark = at(high_watermark);
        plan(&input).upload
    };
    let mib = 1 << 20;
    assert_eq!(upload(&[1; 100], 1000), Some(at(0)..at(640)), "the number of segments is limited");
    assert_eq!(upload(&[10 * mib; 10], 100), Some(at(0)..at(60)), "the bytes of a commit are limited");
    assert_eq!(upload(&[1, 64 * mib, 1], 30), Some(at(0)..at(10)));
    assert_eq!(upload(&[100 * mib, 1], 20), Some(at(0)..at(10)), "a larger segment has its own commit");
    assert_eq!(upload(&[1; 3], 25), Some(at(0)..at(20)), "only committed segments are uploaded");
}

#[test]
fn time_retention_stops_at_the_first_young_segment() {
    let config = config(&[("retention.ms", "1000"), ("remote.storage.enable", "false")]);
    let local = [segment(0, 10, 1, 8_000), segment(10, 20, 1, 9_500), segment(20, 30, 1, 8_000)];
    assert_eq!(plan(&input(&config, &local, &[])).log_start, Some(at(10)));
}

/// Regression: one record with a timestamp in the year 2100 kept all records after it, in both tiers. A timestamp that
/// is missing or in the future must neither prevent nor cause the deletion: the time of the append counts.
#[test]
fn future_timestamp_neither_blocks_nor_expires() {
    let config = config(&[("retention.ms", "1000")]);
    for max_timestamp_ms in [-1, 10_001, 1 << 62, i64::MAX] {
        let with_odd_timestamp =
            |base, end, written_ms| RetentionSegment { max_timestamp_ms, written_ms, ..segment(base, end, 1, 0) };
        let start = |written_ms| {
            let both = [with_odd_timestamp(0, 10, written_ms), segment(10, 20, 1, 8_000)];
            let in_object_store = plan(&input(&config, &both, &both)).log_start;
            let mut on_disk = input(&config, &both, &[]);
            on_disk.uploads = false;
            assert_eq!(plan(&on_disk).log_start, in_object_store);
            in_object_store
        };
        assert_eq!(start(8_999), Some(at(20)), "{max_timestamp_ms}");
        for young in [9_000, 10_000, 20_000, i64::MAX] {
            assert_eq!(start(young), None, "{max_timestamp_ms} written at {young}");
        }
        let mut open = input(&config, &[], &[]);
        (open.active, open.active_age) = (with_odd_timestamp(0, 5, 8_999), Some(Duration::from_millis(1)));
        assert!(plan(&open).roll, "{max_timestamp_ms}");
        open.active.written_ms = 9_000;
        assert!(!plan(&open).roll, "{max_timestamp_ms}");
    }
}

#[test]
fn segments_with_timestamps_in_the_future_are_counted_once() {
    let config = config(&[]);
    let (old, future) = (|base, end| segment(base, end, 1, 10_000), |base, end| segment(base, end, 1, 10_001));
    let both = [old(0, 10), future(10, 20), old(20, 30)];
    let mut input = input(&config, &both, &both[..2]);
    assert_eq!(count_future_segments(&input), 1);
    input.tiered = &[];
    assert_eq!(count_future_segments(&input), 1, "a segment that only the disk lists counts once");
    input.active = future(30, 40);
    assert_eq!(count_future_segments(&input), 2);
    input.log_start = at(20);
    assert_eq!(count_future_segments(&input), 1);
}

#[test]
fn expired_active_segment_is_sealed() {
    let config = config(&[("retention.ms", "1000")]);
    let mut input = input(&config, &[], &[]);
    input.active = segment(0, 5, 10, 8_000);
    input.active_age = Some(Duration::from_secs(2));
    assert!(plan(&input).roll);
}

#[test]
fn uncommitted_segments_are_neither_uploaded_nor_deleted() {
    let config = config(&[("retention.ms", "1")]);
    let local = [segment(0, 10, 1, 0)];
    let mut input = input(&config, &local, &[]);
    input.high_watermark = at(9);
    assert_eq!(plan(&input), RetentionPlan::default());
}

#[test]
fn only_segments_in_object_store_are_evicted() {
    let config = config(&[("local.retention.ms", "1")]);
    let local = [segment(0, 10, 1, 0), segment(10, 20, 1, 0)];
    let tiered = [segment(0, 10, 1, 0)];
    let plan = plan(&input(&config, &local, &tiered));
    assert_eq!((plan.evict_below, plan.upload), (Some(at(10)), Some(at(10)..at(20))));
}

/// Regression: a record with a timestamp in the future kept its segment and all later ones on the disk. Segments with
/// old timestamps were evicted right after their upload. Local retention must count from the time of the append.
#[test]
fn local_retention_counts_from_time_of_append() {
    let config = config(&[("local.retention.ms", "1000"), ("retention.ms", "-1")]);
    for max_timestamp_ms in [-1, 0, 9_900, 1 << 62, i64::MAX] {
        let written = |written_ms| RetentionSegment { written_ms, ..segment(0, 10, 1, max_timestamp_ms) };
        let below = |local: RetentionSegment| plan(&input(&config, &[local], &[local])).evict_below;
        assert_eq!(below(written(8_999)), Some(at(10)), "{max_timestamp_ms}");
        assert_eq!(below(written(9_000)), None, "{max_timestamp_ms}");
    }
}

#[test]
fn active_segment_is_sealed_by_monotonic_age() {
    let config = config(&[("segment.ms", "1000"), ("retention.ms", "-1")]);
    for now_ms in [i64::MIN, 0, 10_000, i64::MAX] {
        let seals = |age_ms| {
            let mut input = input(&config, &[], &[]);
            (input.now_ms, input.active_age) = (now_ms, Some(Duration::from_millis(age_ms)));
            plan(&input).roll
        };
        assert!(!seals(999) && seals(1000), "{now_ms}");
    }
}

#[test]
fn waiting_tiered_write_seals_the_active_segment() {
    let config = config(&[]);
    let mut input = input(&config, &[], &[]);
    input.active_age = Some(Duration::from_millis(1));
    assert!(!plan(&input).roll);
    input.urgent = true;
    assert!(plan(&input).roll);
}

/// A log in two tiers, from which plans are made and to which plans are applied.
#[derive(Clone, Debug)]
struct RetentionState {
    config: TopicConfig,
    log_start: Offset,
    high_watermark: Offset,
    local: Vec<RetentionSegment>,
    tiered: Vec<RetentionSegment>,
    tiered_end: Offset,
    active: RetentionSegment,
}

impl RetentionState {
    fn plan(&self) -> RetentionPlan {
        plan(&RetentionInput {
            config: &self.config,
            now_ms: 20_000,
            log_start: self.log_start,
            tiered_end: self.tiered_end,
            high_watermark: self.high_watermark,
            local: &self.local,
            active: self.active,
            active_age: None,
            tiered: &self.tiered,
            tiered_bytes: self.tiered.iter().map(|segment| segment.bytes).sum(),
            uploads: false,
            leads: true,
            urgent: false,
        })
    }

    fn apply(&mut self, plan: &RetentionPlan) {
        if let Some(start) = plan.log_start {
            assert!(start > self.log_start && start <= self.high_watermark, "{start} in {self:?}");
            self.log_start = start;
            self.tiered.retain(|segment| segment.end > start);
        }
        if let Some(below) = plan.evict_below {
            assert!(below <= self.log_start.max(self.tiered_end), "{below} in {self:?}");
            self.local.retain(|segment| segment.end > below);
        }
    }

    /// Returns a lower bound of the bytes that can be read. A segment partly below the log start counts as 0. So does a
    /// local segment that begins below the tiered end, because the object store has its first records.
    fn readable(&self) -> u64 {
        let whole = |segment: &&RetentionSegment| segment.base >= self.log_start;
        let tiered: u64 = self.tiered.iter().filter(whole).map(|segment| segment.bytes).sum();
        let local = self.local.iter().filter(|segment| segment.base >= self.tiered_end);
        tiered + local.filter(whole).map(|segment| segment.bytes).sum::<u64>() + self.active.bytes
    }
}

/// Generates maximum timestamps of segments: missing (-1), past or future.
fn times() -> impl Strategy<Value = i64> {
    prop_oneof![8 => 0i64..20_000, 1 => Just(-1), 1 => 20_001i64..=i64::MAX]
}

/// Generates size limits: none, or a small one.
fn limit() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![Just(None), (0u64..1500).prop_map(Some)]
}

prop_compose! {
    /// Generates a log in two tiers, whose segments may have different boundaries.
    fn retention_states()(
        local in prop::collection::vec((1u64..20, 0u64..200, times(), 0i64..20_000), 0..12),
        tiered in prop::collection::vec((1u64..20, 0u64..200, times(), 0i64..20_000), 0..12),
        evicted in 0usize..4,
        start in 0u64..60,
        committed in 0u64..300,
        active in 0u64..200,
        bytes in (limit(), limit()),
        times in (any::<Option<u16>>(), any::<Option<u16>>()),
    ) -> RetentionState {
        let chain = |sizes: &[(u64, u64, i64, i64)]| {
            let mut next = 0;
            let segments = sizes.iter().map(|&(records, bytes, newest, written_ms)| {
                next += records;
                RetentionSegment { written_ms, ..segment(next - records, next, bytes, newest) }
            });
            segments.collect::<Vec<_>>()
        };
        let (mut local, mut tiered) = (chain(&local), chain(&tiered));
        let end = local.last().map_or(0, |last| last.end.get());
        tiered.retain(|segment| segment.end.get() <= end);
        let tiered_end = tiered.last().map_or(at(0), |last| last.end);
        local.drain(..evicted.min(local.iter().filter(|segment| segment.end <= tiered_end).count()));
        let high_watermark = at(committed.min(end)).max(tiered_end);
        let log_start = at(start).min(high_watermark);
        tiered.retain(|segment| segment.end > log_start);
        let time = |ms: Option<u16>| ms.map(|ms| std::time::Duration::from_millis(ms.into()));
        let config = TopicConfig {
            retention: time(times.0),
            retention_bytes: bytes.0,
            local_retention: time(times.1),
            local_retention_bytes: bytes.1,
            ..TopicConfig::default()
        };
        let active = segment(end, end + active, active, 20_000);
        RetentionState { config, log_start, high_watermark, local, tiered, tiered_end, active }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Without uploads, the plan after an applied plan is empty, and no local segment lies wholly below the log start.
    #[test]
    fn applied_plan_leaves_no_work(state in retention_states()) {
        let mut after = state.clone();
        after.apply(&state.plan());
        prop_assert_eq!(after.plan(), RetentionPlan::default());
        prop_assert!(after.local.iter().all(|segment| segment.end > after.log_start));
    }

    /// Without a time limit, a plan leaves at least `retention.bytes` readable, or all readable bytes if there were
    /// fewer. It keeps no segment too many: without the oldest whole segment, less than the limit would remain.
    #[test]
    fn size_retention_keeps_no_surplus_segment(state in retention_states()) {
        let mut state = state;
        state.config.retention = None;
        let before = state.readable();
        let mut after = state.clone();
        after.apply(&state.plan());
        let limit = state.config.retention_bytes.unwrap_or(u64::MAX);
        prop_assert!(after.readable() >= limit.min(before), "{} of {before} in {after:?}", after.readable());
        let first = after.tiered.first().or(after.local.iter().find(|segment| segment.base >= after.tiered_end));
        if let Some(first) = first.filter(|first| first.base >= after.log_start && first.end <= after.high_watermark) {
            prop_assert!(after.readable() - first.bytes < limit, "{first:?} could be deleted in {after:?}");
        }
    }
}

proptest! {
    /// For any input, a new log start is above the old one and not above the high watermark. No readable record is
    /// evicted unless it is in the object store. Uploads consist of whole committed segments at or above the tiered
    /// end.
    #[test]
    fn plans_are_safe(
        sizes in prop::collection::vec((1u64..20, 0u64..200, 0i64..20_000), 0..12),
        tiered_count in 0usize..12,
        committed in 0u64..300,
        limits in (any::<Option<u16>>(), any::<Option<u16>>(), any::<Option<u16>>(), any::<Option<u16>>()),
    ) {
        let mut next = 0;
        let segments: Vec<RetentionSegment> = sizes.iter().map(|&(records, bytes, newest)| {
            let base = next;
            next += records;
            segment(base, next, bytes, newest)
        }).collect();
        let tiered = &segments[..tiered_count.min(segments.len())];
        let tiered_end = tiered.last().map_or(0, |last| last.end.get());
        let time = |ms: Option<u16>| ms.map(|ms| std::time::Duration::from_millis(ms.into()));
        let config = TopicConfig {
            retention: time(limits.0),
            retention_bytes: limits.1.map(u64::from),
            local_retention: time(limits.2),
            local_retention_bytes: limits.3.map(u64::from),
            ..TopicConfig::default()
        };
        let mut input = input(&config, &segments, tiered);
        input.high_watermark = at(committed.max(tiered_end));
        let plan = plan(&input);
        if let Some(start) = plan.log_start {
            prop_assert!(start > input.log_start && start <= input.high_watermark);
        }
        if let Some(below) = plan.evict_below {
            prop_assert!(below <= input.tiered_end.max(plan.log_start.unwrap_or(input.log_start)));
        }
        if let Some(upload) = plan.upload {
            let chosen: Vec<_> = segments.iter().filter(|segment| upload.contains(&segment.base)).collect();
            prop_assert_eq!(chosen.first().map(|first| first.base), Some(upload.start));
            prop_assert_eq!(chosen.last().map(|last| last.end), Some(upload.end));
            prop_assert!(upload.end <= input.high_watermark && upload.start >= input.tiered_end);
        }
    }
}
