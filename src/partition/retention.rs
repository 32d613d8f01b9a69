//! Retention: which segments to roll, upload, evict and delete. A pure function of configuration, segments and time.
//!
//! `retention.*` limits the whole log, `local.retention.*` the part of it that stays on disk after its upload
//! (KIP-405). Only whole segments are removed, and only the oldest ones: the log always remains one range without a
//! gap. As in Kafka, the oldest segment is deleted by size only if the remaining segments, including the active one,
//! still have at least `retention.bytes`. Records below the log start no longer count, and so cannot displace records
//! above it.

use std::{ops::Range, time::Duration};

use crate::model::{Offset, TopicConfig};

/// Maximum bytes of the segments in one tier commit. A segment with more bytes gets a commit of its own.
const MAX_COMMIT_BYTES: u64 = 64 << 20;

/// Maximum number of segments in one tier commit.
const MAX_SEGMENTS_PER_COMMIT: usize = 64;

/// Segment on disk or in the object store, as input of retention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetentionSegment {
    /// First offset.
    pub base: Offset,
    /// Offset after the last record.
    pub end: Offset,
    pub bytes: u64,
    /// Maximum timestamp of the segment's records; negative if they have none.
    pub max_timestamp_ms: i64,
    /// Time of the last append, by the clock of the broker that wrote the segment, not by the records' timestamps;
    /// `i64::MAX` if unknown.
    pub written_ms: i64,
}

impl RetentionSegment {
    /// Returns the time from which `retention.ms` counts. This is the maximum record timestamp, or the time of the last
    /// append if that timestamp is missing or in the future.
    fn counts_from(&self, now_ms: i64) -> i64 {
        if (0..=now_ms).contains(&self.max_timestamp_ms) { self.max_timestamp_ms } else { self.written_ms }
    }

    /// Returns true if a record in the segment has a timestamp in the future.
    pub fn is_in_future(&self, now_ms: i64) -> bool {
        self.max_timestamp_ms > now_ms
    }
}

/// Input of a plan.
#[derive(Clone, Copy, Debug)]
pub struct RetentionInput<'a> {
    pub config: &'a TopicConfig,
    /// Time by this broker's wall clock, in milliseconds since 1970.
    pub now_ms: i64,
    /// First offset that can be read.
    pub log_start: Offset,
    /// First offset not committed to the object store.
    pub tiered_end: Offset,
    /// First uncommitted offset.
    pub high_watermark: Offset,
    /// Sealed segments on disk, in order.
    pub local: &'a [RetentionSegment],
    /// Active segment.
    pub active: RetentionSegment,
    /// Time since the first batch in the active segment, by the monotonic clock; `None` while the segment is empty.
    pub active_age: Option<Duration>,
    /// First segments in the object store, in order, from `log_start` on; a plan reads a limited number. Later segments
    /// count only by their bytes, and a later plan lists them. Empty also if the object store was not read: all its
    /// segments are then deleted together, or all stay.
    pub tiered: &'a [RetentionSegment],
    /// Bytes of all segments in the object store that reach above `log_start`.
    pub tiered_bytes: u64,
    /// True if sealed segments are uploaded: the topic enables uploads, there is an object store, and this broker leads
    /// in a committed epoch.
    pub uploads: bool,
    /// True if this broker leads. A follower does not move the log start: it applies its leader's.
    pub leads: bool,
    /// True if a writer waits for an upload (`acks=tiered`), so that the active segment must be sealed.
    pub urgent: bool,
}

/// Planned actions. Maintenance evicts before it uploads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetentionPlan {
    /// Roll: seal the active segment and start the next one.
    pub roll: bool,
    /// Move the log start to this offset; segments wholly below it are then removed in both tiers.
    pub log_start: Option<Offset>,
    /// Upload the sealed segments that begin in this range, in order, and commit them together. The range holds at
    /// least one segment and at most as many as one commit may have. A later plan names the segments after it.
    pub upload: Option<Range<Offset>>,
    /// Evict the sealed segments that lie wholly below this offset. They are in the object store, or below the new log
    /// start.
    pub evict_below: Option<Offset>,
}

/// Plans a step of maintenance: roll, log start, upload and eviction. A follower's plan never moves the log start.
pub fn plan(input: &RetentionInput<'_>) -> RetentionPlan {
    let log_start = if input.leads { log_start(input) } else { None };
    let new_log_start = log_start.unwrap_or(input.log_start);
    RetentionPlan {
        roll: is_roll_due(input),
        log_start,
        upload: upload(input, new_log_start),
        evict_below: evict_below(input, new_log_start),
    }
}

/// Returns true if the active segment holds records and is to be sealed. Either its first batch is at least
/// `segment.ms` old, its records have expired, or a write waits for its upload.
fn is_roll_due(input: &RetentionInput<'_>) -> bool {
    let Some(age) = input.active_age else { return false };
    let is_old = age >= input.config.segment_age;
    let has_expired =
        input.config.retention.is_some_and(|limit| is_expired(input, input.active.counts_from(input.now_ms), limit));
    is_old || has_expired || (input.urgent && input.uploads)
}

/// Returns the sealed segments with records at or above the log start that only the disk has. A segment across the
/// tiered end gets 0 bytes. The first part of the segment is included in the bytes of the object store, and the size of
/// the rest is unknown.
fn local_only_segments<'a>(input: &RetentionInput<'a>) -> impl Iterator<Item = RetentionSegment> + use<'a> {
    let tiered_end = input.tiered_end;
    let first_local_only = tiered_end.max(input.log_start);
    let segments = input.local.iter().filter(move |segment| segment.end > first_local_only);
    segments.map(move |segment| RetentionSegment {
        bytes: if segment.base < tiered_end { 0 } else { segment.bytes },
        ..*segment
    })
}

/// Returns the number of segments of the input, including the active one, with timestamps in the future. A segment that
/// both tiers have counts once.
pub fn count_future_segments(input: &RetentionInput<'_>) -> u64 {
    let tiered = input.tiered.iter().filter(|segment| segment.end > input.log_start);
    let tiered_input_end = input.tiered.last().map_or(input.log_start, |last| last.end.max(input.log_start));
    let local = input.local.iter().filter(|segment| segment.end > tiered_input_end);
    let segments = tiered.chain(local).chain([&input.active]);
    segments.filter(|segment| segment.is_in_future(input.now_ms)).count() as u64
}

/// Returns the oldest segments of the log without a gap: those in the object store, then the segments that only the
/// disk has. The segments of the disk are left out if the input lists only the first segments of the object store.
/// Otherwise there would be a gap before them. An object store that was not read gives one segment.
fn oldest_segments<'a>(input: &RetentionInput<'a>) -> impl Iterator<Item = RetentionSegment> + use<'a> {
    let log_start = input.log_start;
    let unread = unread_tiered_segments(input);
    let has_all_tiered = input.tiered.last().map_or(log_start, |last| last.end) >= input.tiered_end || unread.is_some();
    let tiered = input.tiered.iter().filter(move |segment| segment.end > log_start);
    tiered.copied().chain(unread).chain(local_only_segments(input).filter(move |_| has_all_tiered))
}

/// Returns all segments in the object store as one segment, if the input lists none of them because the object store
/// was not read. Otherwise returns `None`. The segment gets the latest time that its records can have. The records are
/// older than the last append to the first segment that only the disk has. The topic limits how far a timestamp may be
/// ahead of the clock. Without such a segment or such a limit, the segment never expires by time.
fn unread_tiered_segments(input: &RetentionInput<'_>) -> Option<RetentionSegment> {
    if !input.tiered.is_empty() || input.tiered_end <= input.log_start {
        return None;
    }
    let first_local = local_only_segments(input).next();
    let ahead_ms = input.config.timestamp_after.map(|ahead| i64::try_from(ahead.as_millis()).unwrap_or(i64::MAX));
    let latest_ms =
        first_local.zip(ahead_ms).map_or(i64::MAX, |(first, ahead_ms)| first.written_ms.saturating_add(ahead_ms));
    Some(RetentionSegment {
        base: input.log_start,
        end: input.tiered_end,
        bytes: input.tiered_bytes,
        max_timestamp_ms: latest_ms,
        written_ms: latest_ms,
    })
}

/// Returns the bytes of the object store's segments in the input that lie wholly below `start`.
pub fn removed_bytes(input: &RetentionInput<'_>, start: Offset) -> u64 {
    let tiered = input.tiered.iter().copied().chain(unread_tiered_segments(input));
    tiered.filter(|segment| segment.end <= start).map(|segment| segment.bytes).sum()
}

/// Returns the new log start; `None` if it does not move. It moves past the oldest segments, one after the other, while
/// each is older than `retention.ms`, or the log after it has at least `retention.bytes`. Segments with uncommitted
/// records and the active segment stay.
fn log_start(input: &RetentionInput<'_>) -> Option<Offset> {
    let tiered_bytes = if input.tiered_end > input.log_start { input.tiered_bytes } else { 0 };
    let local_bytes: u64 = local_only_segments(input).map(|segment| segment.bytes).sum();
    let mut total = tiered_bytes.saturating_add(local_bytes).saturating_add(input.active.bytes);
    let mut start = None;
    for segment in oldest_segments(input) {
        let too_old =
            input.config.retention.is_some_and(|limit| is_expired(input, segment.counts_from(input.now_ms), limit));
        let too_much = input.config.retention_bytes.is_some_and(|limit| total.saturating_sub(segment.bytes) >= limit);
        if !(too_old || too_much) || segment.end > input.high_watermark {
            break;
        }
        total = total.saturating_sub(segment.bytes);
        start = Some(segment.end);
    }
    start.filter(|start| *start > input.log_start)
}

/// Returns the range in which the sealed segments for the next tier commit begin; `None` if there is nothing to upload.
/// Only committed segments that end above the tiered end and the new log start are chosen, up to the limits of one
/// commit.
fn upload(input: &RetentionInput<'_>, new_log_start: Offset) -> Option<Range<Offset>> {
    if !input.uploads {
        return None;
    }
    let not_uploaded = input.local.iter().filter(|segment| segment.end > input.tiered_end.max(new_log_start));
    let mut committed =
        not_uploaded.take_while(|segment| segment.end <= input.high_watermark).take(MAX_SEGMENTS_PER_COMMIT);
    let first = committed.next()?;
    let mut commit_bytes = first.bytes;
    let further = committed.take_while(|segment| {
        commit_bytes = commit_bytes.saturating_add(segment.bytes);
        commit_bytes <= MAX_COMMIT_BYTES
    });
    let last = further.last().unwrap_or(first);
    Some(first.base..last.end)
}

/// Returns the offset below which sealed segments are evicted; `None` if all segments stay. A segment wholly below the
/// new log start is evicted, uploaded or not. Any other segment is evicted if it is uploaded and exceeds a limit of
/// `local.retention.*`. The first segment that stays ends the search.
fn evict_below(input: &RetentionInput<'_>, new_log_start: Offset) -> Option<Offset> {
    let mut local_bytes: u64 = input.local.iter().map(|segment| segment.bytes).sum::<u64>() + input.active.bytes;
    let mut below = None;
    for segment in input.local {
        let is_deleted = segment.end <= new_log_start;
        let too_old = input.config.local_retention.is_some_and(|limit| is_expired(input, segment.written_ms, limit));
        let too_much = input.config.local_retention_bytes.is_some_and(|limit| local_bytes - segment.bytes >= limit);
        if !(is_deleted || (segment.end <= input.tiered_end && (too_old || too_much))) {
            break;
        }
        local_bytes -= segment.bytes;
        below = Some(segment.end);
    }
    below
}

/// Returns true if more than `limit` has passed since `since_ms`.
fn is_expired(input: &RetentionInput<'_>, since_ms: i64, limit: Duration) -> bool {
    age_ms(input.now_ms, since_ms) > u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the milliseconds from `then_ms` to `now_ms`; 0 if `then_ms` is later.
fn age_ms(now_ms: i64, then_ms: i64) -> u64 {
    u64::try_from(now_ms.saturating_sub(then_ms)).unwrap_or(0)
}

#[cfg(test)]
mod tests;
