//! Retention: what to seal, upload, evict and delete. A pure function of configuration, segments and time.
//!
//! `retention.*` bound the whole log, `local.retention.*` what stays on disk after it is in the bucket (KIP-405).
//! Only whole segments go, and only from the front: what is kept is always one unbroken range.

use crate::model::{Offset, TopicConfig};

/// One segment as retention sees it, in either tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first offset.
    pub base: Offset,
    /// The offset after its last record.
    pub end: Offset,
    /// Its bytes.
    pub bytes: u64,
    /// The youngest timestamp in it; where its records have none, the time at which it was written.
    pub youngest_ms: i64,
}

/// Everything that the decision looks at.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The topic's configuration.
    pub config: &'a TopicConfig,
    /// The wall clock.
    pub now_ms: i64,
    /// First offset that can be read.
    pub log_start: Offset,
    /// First offset not committed to the bucket.
    pub tiered_end: Offset,
    /// First uncommitted offset.
    pub high_watermark: Offset,
    /// Sealed segments on disk, in order.
    pub local: &'a [Segment],
    /// The active segment.
    pub active: Segment,
    /// When the active segment took its first batch; `None` while it is empty.
    pub active_since_ms: Option<i64>,
    /// The first segments in the bucket, in order, from `log_start`. Those after them matter only by their bytes: what
    /// they would add to this plan, a later one finds.
    pub tiered: &'a [Segment],
    /// Bytes of all segments in the bucket.
    pub tiered_bytes: u64,
    /// Whether sealed segments are uploaded: the topic says so and there is a bucket.
    pub uploads: bool,
    /// Whether somebody waits for what is in the active segment to be in the bucket (`acks=tiered`).
    pub hurry: bool,
}

/// What is to be done, in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Seal the active segment.
    pub seal: bool,
    /// Move the log start here; then what lies wholly below it goes, in both tiers.
    pub log_start: Option<Offset>,
    /// The base of the next sealed segment to upload. One at a time: the next plan names the one after it.
    pub upload: Option<Offset>,
    /// Drop sealed segments that lie wholly below this from the disk: the bucket has them.
    pub evict_below: Option<Offset>,
}

/// Decides.
pub fn plan(input: &Input<'_>) -> Plan {
    let log_start = log_start(input);
    let kept_from = log_start.unwrap_or(input.log_start);
    Plan {
        seal: seal(input),
        log_start,
        upload: upload(input, kept_from),
        evict_below: evict_below(input).filter(|below| *below > kept_from),
    }
}

fn seal(input: &Input<'_>) -> bool {
    let Some(since_ms) = input.active_since_ms else { return false };
    let old_enough = age_ms(input.now_ms, since_ms) >= millis(input.config.segment_age);
    let expired = input.config.retention.is_some_and(|limit| expired(input, input.active.youngest_ms, limit));
    old_enough || expired || (input.hurry && input.uploads)
}

/// The oldest segments of the log: those in the bucket, then, where these are all, those that only the disk has.
fn oldest<'a>(input: &Input<'a>) -> impl Iterator<Item = &'a Segment> + use<'a> {
    let (log_start, tiered_end) = (input.log_start, input.tiered_end);
    let all_named = input.tiered.last().map_or(log_start, |last| last.end) >= tiered_end;
    let tiered = input.tiered.iter().filter(move |segment| segment.end > log_start);
    let local = input.local.iter().filter(move |segment| all_named && segment.base >= tiered_end);
    tiered.chain(local.filter(move |segment| segment.end > log_start))
}

fn log_start(input: &Input<'_>) -> Option<Offset> {
    let only_local = input.local.iter().filter(|segment| segment.base >= input.tiered_end);
    let mut total = input.tiered_bytes + only_local.map(|segment| segment.bytes).sum::<u64>() + input.active.bytes;
    let mut start = None;
    for segment in oldest(input) {
        let too_old = input.config.retention.is_some_and(|limit| expired(input, segment.youngest_ms, limit));
        let too_much = input.config.retention_bytes.is_some_and(|limit| total.saturating_sub(segment.bytes) >= limit);
        if !(too_old || too_much) || segment.end > input.high_watermark {
            break;
        }
        total = total.saturating_sub(segment.bytes);
        start = Some(segment.end);
    }
    start.filter(|start| *start > input.log_start)
}

fn upload(input: &Input<'_>, kept_from: Offset) -> Option<Offset> {
    if !input.uploads {
        return None;
    }
    let next = input.local.iter().find(|segment| segment.base >= input.tiered_end.max(kept_from))?;
    (next.end <= input.high_watermark).then_some(next.base)
}

fn evict_below(input: &Input<'_>) -> Option<Offset> {
    let mut local: u64 = input.local.iter().map(|segment| segment.bytes).sum::<u64>() + input.active.bytes;
    let mut below = None;
    for segment in input.local.iter().take_while(|segment| segment.end <= input.tiered_end) {
        let too_old = input.config.local_retention.is_some_and(|limit| expired(input, segment.youngest_ms, limit));
        let too_much = input.config.local_retention_bytes.is_some_and(|limit| local - segment.bytes >= limit);
        if !(too_old || too_much) {
            break;
        }
        local -= segment.bytes;
        below = Some(segment.end);
    }
    below
}

fn expired(input: &Input<'_>, youngest_ms: i64, limit: std::time::Duration) -> bool {
    age_ms(input.now_ms, youngest_ms) > millis(limit)
}

/// How old something is; 0 where the clock went back.
fn age_ms(now_ms: i64, then_ms: i64) -> u64 {
    u64::try_from(now_ms.saturating_sub(then_ms)).unwrap_or(0)
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::ConfigMap;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).unwrap()
    }

    fn segment(base: u64, end: u64, bytes: u64, youngest_ms: i64) -> Segment {
        Segment { base: at(base), end: at(end), bytes, youngest_ms }
    }

    fn config(pairs: &[(&str, &str)]) -> TopicConfig {
        let set = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        TopicConfig::resolve(&ConfigMap::new(), &set).unwrap()
    }

    fn input<'a>(config: &'a TopicConfig, local: &'a [Segment], tiered: &'a [Segment]) -> Input<'a> {
        let end = local.last().map_or(at(0), |last| last.end);
        Input {
            config,
            now_ms: 10_000,
            log_start: at(0),
            tiered_end: tiered.last().map_or(at(0), |last| last.end),
            high_watermark: end,
            local,
            active: segment(end.get(), end.get(), 0, 10_000),
            active_since_ms: None,
            tiered,
            tiered_bytes: tiered.iter().map(|segment| segment.bytes).sum(),
            uploads: config.tiered,
            hurry: false,
        }
    }

    #[test]
    fn nothing_to_do_is_an_empty_plan() {
        let config = config(&[]);
        assert_eq!(plan(&input(&config, &[], &[])), Plan::default());
    }

    #[test]
    fn size_retention_keeps_at_least_the_limit() {
        let config = config(&[("retention.bytes", "150"), ("remote.storage.enable", "false")]);
        let local = [segment(0, 10, 100, 9_000), segment(10, 20, 100, 9_000), segment(20, 30, 100, 9_000)];
        assert_eq!(plan(&input(&config, &local, &[])).log_start, Some(at(10)));
    }

    #[test]
    fn time_retention_counts_from_the_youngest_record_and_stops_at_the_first_that_stays() {
        let config = config(&[("retention.ms", "1000"), ("remote.storage.enable", "false")]);
        let local = [segment(0, 10, 1, 8_000), segment(10, 20, 1, 9_500), segment(20, 30, 1, 8_000)];
        assert_eq!(plan(&input(&config, &local, &[])).log_start, Some(at(10)));
    }

    #[test]
    fn an_expired_active_segment_is_sealed_so_that_it_can_go() {
        let config = config(&[("retention.ms", "1000")]);
        let mut input = input(&config, &[], &[]);
        input.active = segment(0, 5, 10, 8_000);
        input.active_since_ms = Some(8_000);
        assert!(plan(&input).seal);
    }

    #[test]
    fn uncommitted_segments_are_neither_uploaded_nor_deleted() {
        let config = config(&[("retention.ms", "1")]);
        let local = [segment(0, 10, 1, 0)];
        let mut input = input(&config, &local, &[]);
        input.high_watermark = at(9);
        assert_eq!(plan(&input), Plan::default());
    }

    #[test]
    fn only_what_the_bucket_has_is_evicted() {
        let config = config(&[("local.retention.ms", "1")]);
        let local = [segment(0, 10, 1, 0), segment(10, 20, 1, 0)];
        let tiered = [segment(0, 10, 1, 0)];
        let plan = plan(&input(&config, &local, &tiered));
        assert_eq!((plan.evict_below, plan.upload), (Some(at(10)), Some(at(10))));
    }

    #[test]
    fn a_waiting_producer_hurries_the_seal() {
        let config = config(&[]);
        let mut input = input(&config, &[], &[]);
        input.active_since_ms = Some(9_999);
        assert!(!plan(&input).seal);
        input.hurry = true;
        assert!(plan(&input).seal);
    }

    proptest! {
        /// Whatever the figures: the log start never passes the high watermark and never falls, and nothing leaves the
        /// disk that is not in the bucket.
        #[test]
        fn plans_are_safe(
            sizes in prop::collection::vec((1u64..20, 0u64..200, 0i64..20_000), 0..12),
            tiered_count in 0usize..12,
            committed in 0u64..300,
            limits in (any::<Option<u16>>(), any::<Option<u16>>(), any::<Option<u16>>(), any::<Option<u16>>()),
        ) {
            let mut next = 0;
            let all: Vec<Segment> = sizes.iter().map(|&(records, bytes, youngest)| {
                let base = next;
                next += records;
                segment(base, next, bytes, youngest)
            }).collect();
            let tiered = &all[..tiered_count.min(all.len())];
            let tiered_end = tiered.last().map_or(0, |last| last.end.get());
            let time = |ms: Option<u16>| ms.map(|ms| std::time::Duration::from_millis(ms.into()));
            let config = TopicConfig {
                retention: time(limits.0),
                retention_bytes: limits.1.map(u64::from),
                local_retention: time(limits.2),
                local_retention_bytes: limits.3.map(u64::from),
                ..TopicConfig::default()
            };
            let mut input = input(&config, &all, tiered);
            input.high_watermark = at(committed.max(tiered_end));
            let plan = plan(&input);
            if let Some(start) = plan.log_start {
                prop_assert!(start > input.log_start && start <= input.high_watermark);
            }
            if let Some(below) = plan.evict_below {
                prop_assert!(below <= input.tiered_end);
            }
            if let Some(base) = plan.upload {
                let chosen = all.iter().find(|segment| segment.base == base).expect("a local segment");
                prop_assert!(chosen.end <= input.high_watermark && base >= input.tiered_end);
            }
        }
    }
}
