//! Finds the segments of a lost manifest by the footers of the segment objects. `PartitionTier::stage_rebuilt` then
//! writes the manifest.
//!
//! # Overview
//!
//! The committed [`TierState`] describes the lost manifest: log start, tiered end, bytes.
//! [`PartitionTier::survey`] lists the partition's folder and reads the footer of every segment object that ends above
//! the log start and not above the tiered end. It searches for a chain of objects that covers the committed range. The
//! folder may also contain objects of crashed uploads and of deposed leaders. These properties of a chain exclude them:
//!
//! - A chain has no gap and no overlap, begins at or below the log start, and ends at the tiered end.
//! - Adjacent objects agree on the leader epochs of the offsets that both footers cover. After an unclean election, two
//!   objects may hold different records at the same offsets.
//! - No object has a newer epoch than the committed state.
//! - The chain has as many bytes as were committed.
//!
//! Objects with the same range, the same bytes and the same epochs hold the same records, so any of them can be used.
//! If exactly one chain remains, the verdict is [`SurveyVerdict::Committed`], and a broker commits the manifest without
//! an operator. In every other case an operator decides about the chain that the verdict describes.
//!
//! The choice of the chain is a pure function.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt as _, stream};

use super::{
    error::{TierReadError, TierStoreError},
    footer::{Footer, TRAILER_BYTES, Trailer, epoch_of},
    manifest::SegmentEntry,
    name::{ObjectId, partition_folder},
    partition::PartitionTier,
    state::TierState,
    store::ObjectInfo,
    upload::UploadError,
};
use crate::model::{LeaderEpoch, Offset};

/// Maximum number of footers that are read at the same time.
const MAX_CONCURRENT_READS: usize = 8;

/// Size of the first read at an object's end. Most footers are shorter.
const TAIL_BYTES: u64 = 64 << 10;

/// Maximum number of chains that are compared per start offset. If an offset has that many, the verdict is never
/// `Committed`.
const MAX_CHAINS: usize = 32;

/// A segment object as its footer describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SegmentCandidate {
    entry: SegmentEntry,
    data_crc: u32,
    /// Epoch and start offset of each leader up to the object's end.
    epochs: Vec<(LeaderEpoch, Offset)>,
}

/// Comparison of the chain with the committed state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SurveyVerdict {
    /// The chain covers the committed range with as many bytes, and no other chain does.
    Committed,
    /// The chain covers the committed range, but has another number of bytes.
    OtherBytes,
    /// Several chains of different records cover the committed range with as many bytes, or there are too many chains
    /// to compare. The survey contains one with the lowest start offset, and of those one whose first object has the
    /// newest epoch.
    Ambiguous,
    /// No chain covers the committed range. The survey contains the longest chain that ends at the tiered end, which
    /// begins above the log start or is empty.
    Incomplete,
}

/// Remains of a partition's history in the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Committed state.
    pub state: TierState,
    /// Comparison of `chain` with `state`.
    pub verdict: SurveyVerdict,
    /// Segments without gap, oldest first, up to the tiered end. Empty if no object ends there.
    pub chain: Vec<SegmentEntry>,
    /// Log start with this chain: the committed one or the start of the chain, whichever is higher. At most the tiered
    /// end, and the tiered end if the chain is empty.
    pub log_start: Offset,
    /// Ranges between the committed log start and the tiered end that no object with a readable footer covers.
    pub missing: Vec<(Offset, Offset)>,
    /// Objects that cannot be used, each with the reason.
    pub unusable: Vec<(String, String)>,
    /// Number of objects with a readable footer outside the chain: orphan objects, duplicates and objects of other
    /// records.
    pub unused: usize,
}

impl Survey {
    /// Returns the bytes of batches in the chain.
    pub fn bytes(&self) -> u64 {
        self.chain.iter().map(|entry| entry.data_bytes).sum()
    }

    /// Describes the difference between the chain and the committed state, for people. Returns `None` if the chain is
    /// the committed one.
    pub fn obstacle(&self) -> Option<String> {
        let (start, end) = (self.state.log_start.min(self.state.tiered_end), self.state.tiered_end);
        match self.verdict {
            SurveyVerdict::Committed => None,
            SurveyVerdict::OtherBytes => Some(format!(
                "the objects that cover {start}..{end} have {} bytes, and {} were committed",
                self.bytes(),
                self.state.bytes
            )),
            SurveyVerdict::Ambiguous => {
                Some(format!("several chains of objects with different records cover {start}..{end}"))
            }
            SurveyVerdict::Incomplete if self.missing.is_empty() => {
                Some(format!("the objects that cover {start}..{end} do not form a chain"))
            }
            SurveyVerdict::Incomplete => {
                let ranges = self.missing.iter().map(|(from, to)| format!("{from}..{to}")).collect::<Vec<_>>();
                Some(format!("no object covers {} of {start}..{end}", ranges.join(" ")))
            }
        }
    }
}

impl PartitionTier {
    /// Checks that the current manifest and its pages can be read now. Sends requests to the store, regardless of the
    /// cache.
    ///
    /// # Errors
    /// An object of the manifest is missing or corrupt, or the store does not respond.
    pub async fn check_manifest(&self) -> Result<(), TierReadError> {
        let root = self.load_root(&self.state()).await?;
        for entry in root.pages() {
            self.load_page(entry).await?;
        }
        Ok(())
    }

    /// Reads the footers of the segment objects in the committed range, and searches for the committed chain. Changes
    /// nothing.
    ///
    /// # Errors
    /// The store does not respond, or the prefix does not belong to this cluster.
    pub async fn survey(&self) -> Result<Survey, UploadError> {
        let (store, id, state) = (self.store(), self.id(), self.state());
        // The list of an unmounted folder is empty, so the owner of the prefix is checked first.
        store.bind().await?;
        let folder = format!("{}/", partition_folder(id));
        let listed = store.list(folder.trim_end_matches('/')).await?;
        let named = listed.into_iter().filter_map(|object| {
            let stamp = ObjectId::from_segment(object.object.strip_prefix(&folder)?).ok()?;
            Some((stamp, object))
        });
        let (log_start, tiered_end) = (state.log_start, state.tiered_end);
        let in_range = named.filter(|(stamp, _)| stamp.end > log_start && stamp.end <= tiered_end);
        let reads = in_range.map(|(stamp, object)| async move {
            let name = object.object.clone();
            (name, self.read_candidate(stamp, object).await)
        });
        let mut reads = stream::iter(reads).buffer_unordered(MAX_CONCURRENT_READS);
        let (mut candidates, mut unusable) = (Vec::new(), Vec::new());
        while let Some((name, read)) = reads.next().await {
            match read {
                Ok(candidate) => candidates.push(candidate),
                Err(error @ (TierReadError::Missing { .. } | TierReadError::Corrupt { .. })) => {
                    unusable.push((name, error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        unusable.sort();
        Ok(choose(state, candidates, unusable))
    }

    /// Reads the footer of one object, and checks it against the name and the length of the object.
    async fn read_candidate(&self, stamp: ObjectId, object: ObjectInfo) -> Result<SegmentCandidate, TierReadError> {
        let corrupt = |reason: String| TierReadError::Corrupt { object: object.object.clone(), reason };
        let tail = self.read_tail(&object, TAIL_BYTES).await?;
        let trailer = Trailer::parse(&tail).map_err(|error| corrupt(error.to_string()))?;
        let footer_bytes = trailer.footer_bytes();
        let tail = if footer_bytes > tail.len() as u64 { self.read_tail(&object, footer_bytes).await? } else { tail };
        let start = usize::try_from(footer_bytes).ok().and_then(|bytes| tail.len().checked_sub(bytes));
        let start = start.ok_or_else(|| corrupt("the object is shorter than its footer".to_owned()))?;
        let footer = Footer::parse(&tail).map_err(|error| corrupt(error.to_string()))?;
        let matches_name = (footer.partition, footer.base, footer.end, footer.writer_epoch)
            == (self.id(), stamp.base, stamp.end, stamp.epoch);
        if !matches_name || footer.data_bytes + footer_bytes != object.bytes {
            return Err(corrupt("the footer does not match the name and the length of the object".to_owned()));
        }
        let entry = SegmentEntry {
            stamp,
            data_bytes: footer.data_bytes,
            footer_bytes: u32::try_from(footer_bytes).map_err(|error| corrupt(error.to_string()))?,
            crc: crc32c::crc32c_append(footer.data_crc, &tail[start..]),
            max_timestamp_ms: footer.max_timestamp_ms,
            // Only the lost manifest contained the write time of the segment. The object was modified later than that,
            // so no segment expires too early.
            created_ms: object.modified_ms,
        };
        Ok(SegmentCandidate { entry, data_crc: footer.data_crc, epochs: footer.epochs })
    }

    /// Returns the last `bytes` bytes of an object, or all of a shorter one. Returns no bytes if not even a trailer
    /// fits.
    async fn read_tail(&self, object: &ObjectInfo, bytes: u64) -> Result<Bytes, TierStoreError> {
        if object.bytes < TRAILER_BYTES as u64 {
            return Ok(Bytes::new());
        }
        self.store().get_range(&object.object, object.bytes.saturating_sub(bytes)..object.bytes).await
    }
}

/// Compares the chains with the committed state. Returns a survey with the verdict, and the chain that
/// [`SurveyVerdict`] describes for it.
fn choose(state: TierState, candidates: Vec<SegmentCandidate>, unusable: Vec<(String, String)>) -> Survey {
    let (start, end) = (state.log_start.min(state.tiered_end), state.tiered_end);
    let count = candidates.len();
    let missing = find_gaps(start, end, &candidates);
    let candidates = remove_duplicates(candidates, state.epoch);
    let chains = find_chains(end, &candidates);
    let complete: Vec<&Chain> = if start == end {
        chains.get(&end).into_iter().flatten().collect()
    } else {
        let contains_start =
            |chain: &&Chain| chain.first.is_some_and(|first| candidates[first].entry.stamp.end > start);
        chains.range(..=start).flat_map(|(_, chains)| chains).filter(contains_start).collect()
    };
    let exact: Vec<&Chain> = complete.iter().copied().filter(|chain| chain.bytes == state.bytes).collect();
    // If there are too many chains, one with other records may have been left out.
    let is_truncated = chains.values().any(|chains| chains.len() >= MAX_CHAINS);
    let (verdict, chain) = match (exact.as_slice(), complete.as_slice()) {
        ([only], _) if !is_truncated => (SurveyVerdict::Committed, Some(*only)),
        ([first, ..], _) => (SurveyVerdict::Ambiguous, Some(*first)),
        ([], [first, ..]) => (SurveyVerdict::OtherBytes, Some(*first)),
        ([], []) => (SurveyVerdict::Incomplete, chains.values().flatten().next()),
    };
    let chain: Vec<SegmentEntry> = chain.map(|chain| chain.entries(&chains, &candidates)).unwrap_or_default();
    let log_start = chain.first().map_or(end, |entry| entry.stamp.base).max(start);
    let unused = count - chain.len();
    Survey { state, verdict, chain, log_start, missing, unusable, unused }
}

/// A chain of segments up to the tiered end. `first` is the index of its first candidate. `next` is the index of the
/// rest of the chain, among the chains that start at the end of the first candidate.
#[derive(Clone, Copy)]
struct Chain {
    /// `None` for the empty chain at the tiered end.
    first: Option<usize>,
    next: usize,
    /// Bytes of batches in the chain.
    bytes: u64,
}

impl Chain {
    /// Returns the segments of the chain, oldest first.
    fn entries(&self, chains: &BTreeMap<Offset, Vec<Self>>, candidates: &[SegmentCandidate]) -> Vec<SegmentEntry> {
        let (mut entries, mut chain) = (Vec::new(), *self);
        while let Some(first) = chain.first {
            entries.push(candidates[first].entry);
            chain = chains[&candidates[first].entry.stamp.end][chain.next];
        }
        entries
    }
}

/// Returns the chains that end at `end`, by start offset: at most [`MAX_CHAINS`] for each. Among the chains of one
/// start offset, those whose first object has a newer epoch come first.
fn find_chains(end: Offset, candidates: &[SegmentCandidate]) -> BTreeMap<Offset, Vec<Chain>> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let key = |index: &usize| {
        let stamp = candidates[*index].entry.stamp;
        (std::cmp::Reverse(stamp.base), std::cmp::Reverse(stamp.epoch), stamp.attempt)
    };
    order.sort_by_key(key);
    let mut chains = BTreeMap::from([(end, vec![Chain { first: None, next: 0, bytes: 0 }])]);
    // Later base offsets come first, so all chains that start at the end of a candidate have been found before it.
    for index in order {
        let candidate = &candidates[index];
        let Some(following) = chains.get(&candidate.entry.stamp.end) else { continue };
        let fits = |(_, chain): &(usize, &Chain)| {
            chain.first.is_none_or(|first| have_same_epochs(candidate, &candidates[first]))
        };
        let extended = following.iter().enumerate().filter(fits).map(|(next, chain)| Chain {
            first: Some(index),
            next,
            bytes: chain.bytes.saturating_add(candidate.entry.data_bytes),
        });
        let extended: Vec<Chain> = extended.collect();
        let same_start = chains.entry(candidate.entry.stamp.base).or_default();
        same_start.extend(extended);
        same_start.truncate(MAX_CHAINS);
    }
    chains.retain(|_, chains| !chains.is_empty());
    chains
}

/// Returns one object for each set of objects with the same records: the one of the newest epoch. Leaves out objects of
/// an epoch above `committed`.
fn remove_duplicates(candidates: Vec<SegmentCandidate>, committed: LeaderEpoch) -> Vec<SegmentCandidate> {
    let mut distinct: Vec<SegmentCandidate> = Vec::with_capacity(candidates.len());
    let mut sorted = candidates;
    sorted.sort_by_key(|candidate| {
        let stamp = candidate.entry.stamp;
        (stamp.base, std::cmp::Reverse(stamp.epoch), stamp.attempt)
    });
    for candidate in sorted.into_iter().filter(|candidate| candidate.entry.stamp.epoch <= committed) {
        let base = candidate.entry.stamp.base;
        let mut same_base = distinct.iter().rev().take_while(|other| other.entry.stamp.base == base);
        if !same_base.any(|other| has_same_records(other, &candidate)) {
            distinct.push(candidate);
        }
    }
    distinct
}

/// Returns true if two objects with the same base hold the same records.
fn has_same_records(a: &SegmentCandidate, b: &SegmentCandidate) -> bool {
    a.entry.stamp.end == b.entry.stamp.end
        && (a.entry.data_bytes, a.data_crc) == (b.entry.data_bytes, b.data_crc)
        && a.epochs == b.epochs
}

/// Returns true if both footers contain the same leader epochs for those offsets of `before` that the epoch list of
/// `after` covers.
fn have_same_epochs(before: &SegmentCandidate, after: &SegmentCandidate) -> bool {
    let (base, end) = (before.entry.stamp.base, before.entry.stamp.end);
    let known_from = after.epochs.first().map_or(end, |(_, first)| *first).max(base);
    if known_from >= end {
        return true;
    }
    // The epoch is constant between two epoch starts, so a comparison at these offsets is sufficient.
    let starts = before.epochs.iter().chain(&after.epochs).map(|(_, first)| *first);
    let mut offsets = starts.filter(|offset| (known_from..end).contains(offset)).chain([known_from]);
    offsets.all(|offset| epoch_of(&before.epochs, offset) == epoch_of(&after.epochs, offset))
}

/// Returns the parts of `start..end` that no object covers.
fn find_gaps(start: Offset, end: Offset, candidates: &[SegmentCandidate]) -> Vec<(Offset, Offset)> {
    let mut stamps: Vec<&ObjectId> = candidates.iter().map(|candidate| &candidate.entry.stamp).collect();
    stamps.sort_by_key(|stamp| stamp.base);
    let (mut missing, mut covered_end) = (Vec::new(), start);
    for stamp in stamps {
        if stamp.base > covered_end {
            missing.push((covered_end, stamp.base.min(end)));
        }
        covered_end = covered_end.max(stamp.end);
    }
    if covered_end < end {
        missing.push((covered_end, end));
    }
    missing
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::tier::ManifestName;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).expect("small")
    }

    /// Returns an object `base..end` with ten bytes per offset, written in `epoch`. `crc` identifies its records.
    fn object(base: u64, end: u64, epoch: u32, crc: u32) -> SegmentCandidate {
        let attempt =
            Uuid::from_u128(u128::from(base) << 64 | u128::from(end) << 32 | u128::from(epoch) << 16 | u128::from(crc));
        let entry = SegmentEntry {
            stamp: ObjectId { base: at(base), end: at(end), epoch: LeaderEpoch(epoch), attempt },
            data_bytes: (end - base) * 10,
            footer_bytes: 100,
            crc,
            max_timestamp_ms: 1,
            created_ms: 1,
        };
        SegmentCandidate { entry, data_crc: crc, epochs: vec![(LeaderEpoch(0), at(0))] }
    }

    fn with_epochs(mut candidate: SegmentCandidate, epochs: &[(u32, u64)]) -> SegmentCandidate {
        candidate.epochs = epochs.iter().map(|(epoch, first)| (LeaderEpoch(*epoch), at(*first))).collect();
        candidate
    }

    fn state(log_start: u64, end: u64, bytes: u64) -> TierState {
        TierState {
            manifest: Some(ManifestName { version: 7, epoch: LeaderEpoch(5), attempt: Uuid::from_u128(1) }),
            tiered_end: at(end),
            log_start: at(log_start),
            epoch: LeaderEpoch(5),
            bytes,
        }
    }

    fn ranges(survey: &Survey) -> Vec<(u64, u64)> {
        survey.chain.iter().map(|entry| (entry.stamp.base.get(), entry.stamp.end.get())).collect()
    }

    #[test]
    fn single_matching_chain_is_committed() {
        // Object 0..100 lies below the log start and is garbage; 300..400 was never committed. The survey excludes
        // both.
        let objects = [object(300, 400, 5, 9), object(200, 300, 5, 3), object(100, 200, 4, 2), object(0, 100, 4, 1)];
        let survey = choose(state(150, 300, 2000), objects[1..3].to_vec(), Vec::new());
        assert_eq!((survey.verdict, ranges(&survey)), (SurveyVerdict::Committed, vec![(100, 200), (200, 300)]));
        assert_eq!((survey.log_start, survey.bytes(), survey.obstacle()), (at(150), 2000, None));
        let survey = choose(state(300, 300, 0), Vec::new(), Vec::new());
        assert_eq!(
            (survey.verdict, survey.log_start),
            (SurveyVerdict::Committed, at(300)),
            "an empty manifest is a chain too"
        );
    }

    #[test]
    fn missing_segment_is_reported_and_chain_starts_after_it() {
        let objects = vec![object(0, 100, 4, 1), object(200, 300, 5, 3), object(300, 350, 5, 4)];
        let survey = choose(state(0, 350, 3500), objects, Vec::new());
        assert_eq!((survey.verdict, ranges(&survey)), (SurveyVerdict::Incomplete, vec![(200, 300), (300, 350)]));
        assert_eq!((survey.missing.clone(), survey.log_start), (vec![(at(100), at(200))], at(200)));
        assert!(survey.obstacle().expect("a segment is missing").contains("100..200"), "{survey:?}");
        // No object ends at the tiered end.
        let survey = choose(state(0, 350, 3500), vec![object(0, 100, 4, 1)], Vec::new());
        assert_eq!((survey.verdict, survey.log_start, survey.chain.len()), (SurveyVerdict::Incomplete, at(350), 0));
    }

    #[test]
    fn duplicates_merge_and_different_records_are_ambiguous() {
        let (again, other) = (object(100, 200, 4, 2), object(100, 200, 3, 99));
        let mut retried = again.clone();
        retried.entry.stamp.epoch = LeaderEpoch(3);
        let chain = [object(0, 100, 4, 1), again];
        let survey = choose(state(0, 200, 2000), [&chain[..], &[retried]].concat(), Vec::new());
        assert_eq!((survey.verdict, survey.unused), (SurveyVerdict::Committed, 1));
        let survey = choose(state(0, 200, 2000), [&chain[..], &[other]].concat(), Vec::new());
        assert_eq!(survey.verdict, SurveyVerdict::Ambiguous);
        assert_eq!(survey.chain[1].stamp.epoch, LeaderEpoch(4), "the newest epoch is proposed");
    }

    /// The committed object is lost. A deposed leader's object with the same range and number of bytes has other
    /// records. The object is rejected because its leader epochs differ from those in the next object's footer.
    #[test]
    fn deposed_leaders_object_is_rejected_despite_equal_range() {
        let lost = with_epochs(object(100, 200, 3, 99), &[(0, 0), (3, 150)]);
        let next = with_epochs(object(200, 300, 5, 3), &[(0, 0), (4, 120)]);
        let survey = choose(state(100, 300, 2000), vec![lost, next.clone()], Vec::new());
        assert_eq!((survey.verdict, survey.log_start), (SurveyVerdict::Incomplete, at(200)));
        let kept = with_epochs(object(100, 200, 4, 2), &[(0, 0), (4, 120)]);
        let survey = choose(state(100, 300, 2000), vec![kept, next], Vec::new());
        assert_eq!(survey.verdict, SurveyVerdict::Committed);
    }

    #[test]
    fn object_above_committed_epoch_is_left_out() {
        let survey = choose(state(0, 100, 1000), vec![object(0, 100, 6, 1)], Vec::new());
        assert_eq!((survey.verdict, survey.unused), (SurveyVerdict::Incomplete, 1));
    }

    #[test]
    fn different_byte_count_is_not_committed() {
        let survey = choose(state(0, 100, 999), vec![object(0, 100, 4, 1)], Vec::new());
        assert_eq!((survey.verdict, survey.log_start), (SurveyVerdict::OtherBytes, at(0)));
        assert!(survey.obstacle().expect("the number of bytes differs").contains("999"));
    }

    #[test]
    fn too_many_chains_are_ambiguous() {
        // Each two adjacent objects also exist as one object, so the number of chains grows exponentially.
        let mut objects = Vec::new();
        for piece in 0..20 {
            objects.push(object(piece * 10, piece * 10 + 10, 4, 1));
            objects.push(object(piece * 10, piece * 10 + 20, 4, 2));
        }
        let survey = choose(state(0, 200, 2000), objects, Vec::new());
        assert_eq!(survey.verdict, SurveyVerdict::Ambiguous);
    }
}
