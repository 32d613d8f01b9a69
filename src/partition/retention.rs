//! Retention: what to seal, upload, evict and delete. A pure function of configuration, segments and time.
//!
//! `retention.*` bound the whole log, `local.retention.*` what stays on disk after it is in the bucket (KIP-405).
//! Only whole segments go, and only from the front: what is kept is always one unbroken range. As in Kafka the oldest
//! goes by size only while what remains is still at least `retention.bytes`, the active segment counted.
//!
//! A plan that was carried out leaves nothing to plan: what lies below the log start counts for nothing any more, and so
//! cannot push out what lies above it.

use std::{ops::Range, time::Duration};

use crate::model::{Offset, TopicConfig};

/// Bytes of segments that are committed to the bucket at once, unless one alone has more.
const COMMIT_BYTES: u64 = 64 << 20;

/// Most segments that are committed to the bucket at once.
const COMMIT_SEGMENTS: usize = 64;

/// One segment as retention sees it, in either tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first offset.
    pub base: Offset,
    /// The offset after its last record.
    pub end: Offset,
    /// Its bytes.
    pub bytes: u64,
    /// The largest timestamp of its records; negative where they have none.
    pub max_timestamp_ms: i64,
    /// When its last batch was written, by the clock of the broker that wrote it, whatever its records say; `i64::MAX` where that is not
    /// known.
    pub written_ms: i64,
}

impl Segment {
    /// What `retention.ms` counts from: the largest timestamp of its records, unless they have none or it lies in the future.
    fn counts_from(&self, now_ms: i64) -> i64 {
        if (0..=now_ms).contains(&self.max_timestamp_ms) { self.max_timestamp_ms } else { self.written_ms }
    }

    /// Whether a record in it has a timestamp that is still to come.
    pub fn is_in_future(&self, now_ms: i64) -> bool {
        self.max_timestamp_ms > now_ms
    }
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
    /// How long ago the active segment took its first batch, by the monotonic clock; `None` while it is empty.
    pub active_age: Option<Duration>,
    /// The first segments in the bucket, in order, from `log_start`. Those after them matter only by their bytes: what
    /// they would add to this plan, a later one finds. Empty as well where the bucket cannot be asked: then its segments go
    /// together, or stay.
    pub tiered: &'a [Segment],
    /// Bytes of all segments in the bucket that reach above `log_start`.
    pub tiered_bytes: u64,
    /// Whether sealed segments are uploaded: the topic says so, there is a bucket, and this broker is a leader who knows what is
    /// committed.
    pub uploads: bool,
    /// Whether this broker leads. A follower moves no log start: it takes over its leader's.
    pub leads: bool,
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
    /// The sealed segments that begin in here are to be uploaded, in order, and committed at once: the next one, and what is small
    /// enough to go with it. The next plan names those after them.
    pub upload: Option<Range<Offset>>,
    /// Drop sealed segments that lie wholly below this from the disk: the bucket has them, or nobody may read them.
    pub evict_below: Option<Offset>,
}

/// Decides.
pub fn plan(input: &Input<'_>) -> Plan {
    let log_start = if input.leads { log_start(input) } else { None };
    let kept_from = log_start.unwrap_or(input.log_start);
    Plan { seal: seal(input), log_start, upload: upload(input, kept_from), evict_below: evict_below(input, kept_from) }
}

fn seal(input: &Input<'_>) -> bool {
    let Some(age) = input.active_age else { return false };
    let old_enough = age >= input.config.segment_age;
    let expired =
        input.config.retention.is_some_and(|limit| expired(input, input.active.counts_from(input.now_ms), limit));
    old_enough || expired || (input.hurry && input.uploads)
}

/// What of the log only the disk has. A segment that reaches into the bucket is one of these and weighs nothing: the
/// bucket's bytes count for a part of it, and how large the rest is nobody knows.
fn only_local<'a>(input: &Input<'a>) -> impl Iterator<Item = Segment> + use<'a> {
    let tiered_end = input.tiered_end;
    let held_from = tiered_end.max(input.log_start);
    let held = input.local.iter().filter(move |segment| segment.end > held_from);
    held.map(move |segment| Segment { bytes: if segment.base < tiered_end { 0 } else { segment.bytes }, ..*segment })
}

/// How many of the segments given hold records with timestamps that are still to come. One that is given in both tiers counts once.
pub fn in_future(input: &Input<'_>) -> u64 {
    let tiered = input.tiered.iter().filter(|segment| segment.end > input.log_start);
    let given_end = input.tiered.last().map_or(input.log_start, |last| last.end.max(input.log_start));
    let local = input.local.iter().filter(|segment| segment.end > given_end);
    let all = tiered.chain(local).chain([&input.active]);
    all.filter(|segment| segment.is_in_future(input.now_ms)).count() as u64
}

/// The oldest segments of the log: those in the bucket, then, where these are all, those that only the disk has.
fn oldest<'a>(input: &Input<'a>) -> impl Iterator<Item = Segment> + use<'a> {
    let log_start = input.log_start;
    let unnamed = unnamed(input);
    let all_named = input.tiered.last().map_or(log_start, |last| last.end) >= input.tiered_end || unnamed.is_some();
    let tiered = input.tiered.iter().filter(move |segment| segment.end > log_start);
    tiered.copied().chain(unnamed).chain(only_local(input).filter(move |_| all_named))
}

/// All segments in the bucket as one, where it cannot be asked for them. They were written before what only the disk has, and no record in
/// them may have been further ahead of that than the topic allows.
fn unnamed(input: &Input<'_>) -> Option<Segment> {
    if !input.tiered.is_empty() || input.tiered_end <= input.log_start {
        return None;
    }
    let first = only_local(input).next();
    let ahead_ms = input.config.timestamp_after.map(|ahead| i64::try_from(ahead.as_millis()).unwrap_or(i64::MAX));
    let latest_ms = first.zip(ahead_ms).map_or(i64::MAX, |(first, ahead_ms)| first.written_ms.saturating_add(ahead_ms));
    Some(Segment {
        base: input.log_start,
        end: input.tiered_end,
        bytes: input.tiered_bytes,
        max_timestamp_ms: latest_ms,
        written_ms: latest_ms,
    })
}

/// Bytes of the bucket's segments that lie wholly below `start`.
pub fn removed_bytes(input: &Input<'_>, start: Offset) -> u64 {
    let tiered = input.tiered.iter().copied().chain(unnamed(input));
    tiered.filter(|segment| segment.end <= start).map(|segment| segment.bytes).sum()
}

fn log_start(input: &Input<'_>) -> Option<Offset> {
    let tiered_bytes = if input.tiered_end > input.log_start { input.tiered_bytes } else { 0 };
    let local_bytes: u64 = only_local(input).map(|segment| segment.bytes).sum();
    let mut total = tiered_bytes.saturating_add(local_bytes).saturating_add(input.active.bytes);
    let mut start = None;
    for segment in oldest(input) {
        let too_old =
            input.config.retention.is_some_and(|limit| expired(input, segment.counts_from(input.now_ms), limit));
        let too_much = input.config.retention_bytes.is_some_and(|limit| total.saturating_sub(segment.bytes) >= limit);
        if !(too_old || too_much) || segment.end > input.high_watermark {
            break;
        }
        total = total.saturating_sub(segment.bytes);
        start = Some(segment.end);
    }
    start.filter(|start| *start > input.log_start)
}

fn upload(input: &Input<'_>, kept_from: Offset) -> Option<Range<Offset>> {
    if !input.uploads {
        return None;
    }
    let missing = input.local.iter().filter(|segment| segment.end > input.tiered_end.max(kept_from));
    let mut committed = missing.take_while(|segment| segment.end <= input.high_watermark).take(COMMIT_SEGMENTS);
    let first = committed.next()?;
    let mut bytes = first.bytes;
    let small = committed.take_while(|segment| {
        bytes = bytes.saturating_add(segment.bytes);
        bytes <= COMMIT_BYTES
    });
    let last = small.last().unwrap_or(first);
    Some(first.base..last.end)
}

/// Where the disk's copy may begin: behind what lies wholly below the log start, whatever the bucket has, and behind what the
/// bucket has and the local limits say.
fn evict_below(input: &Input<'_>, kept_from: Offset) -> Option<Offset> {
    let mut local: u64 = input.local.iter().map(|segment| segment.bytes).sum::<u64>() + input.active.bytes;
    let mut below = None;
    for segment in input.local {
        let deleted = segment.end <= kept_from;
        let too_old = input.config.local_retention.is_some_and(|limit| expired(input, segment.written_ms, limit));
        let too_much = input.config.local_retention_bytes.is_some_and(|limit| local - segment.bytes >= limit);
        if !(deleted || (segment.end <= input.tiered_end && (too_old || too_much))) {
            break;
        }
        local -= segment.bytes;
        below = Some(segment.end);
    }
    below
}

fn expired(input: &Input<'_>, since_ms: i64, limit: Duration) -> bool {
    age_ms(input.now_ms, since_ms) > u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)
}

/// How old something is; 0 where the clock went back.
fn age_ms(now_ms: i64, then_ms: i64) -> u64 {
    u64::try_from(now_ms.saturating_sub(then_ms)).unwrap_or(0)
}

#[cfg(test)]
mod tests;
