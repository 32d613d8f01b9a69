//! The manifest of a partition, which lists its segment objects: a small root and immutable pages.
//!
//! # Overview
//!
//! ```text
//! root   pages, oldest first ─────────────┐  then single segments, oldest first
//!        [page 0..512)[page 512..1024) …  │  [segment][segment][segment] …
//!        base                                                            end = tiered end
//! ```
//!
//! Each version of a manifest is a new root, often with one or several new segments. When a root lists
//! [`PAGE_SEGMENTS`] × 2 single segments, the oldest half moves to a page object that never changes again. So a root
//! has some tens of KiB for terabytes of data. Retention removes segments from the front. A page that lies completely
//! below the log start is removed with its entry in the root. A page that contains the log start keeps its entry; its
//! segments below the log start no longer count.
//!
//! # Invariants
//!
//! These invariants are asserted when a manifest is created, and checked when one is read:
//!
//! - Pages and segments cover `base..end` without gap or overlap.
//! - `base ≤ log start ≤ end`, and the first page or segment reaches above the log start.
//! - No segment or page has a newer epoch than the manifest.
//!
//! Each version replaces the version before it, and versions have no gap.
//!
//! # Format
//!
//! ```text
//! root     "STMR" │ version u16 │ topic id 16 │ partition u32 │ manifest version u64 │ epoch u32 │ log start u64
//!          │ end u64 │ bytes u64 │ n u32 │ n × page (72 bytes) │ n u32 │ n × segment (72 bytes) │ CRC u32
//! page     "STMP" │ version u16 │ topic id 16 │ partition u32 │ n u32 │ n × segment (72 bytes) │ CRC u32
//! segment entry  base u64 │ end u64 │ epoch u32 │ attempt 16 │ data bytes u64 │ footer bytes u32
//!                │ CRC of the object u32 │ largest timestamp i64 │ created at i64 │ 4 zero bytes
//! page entry     base u64 │ end u64 │ epoch u32 │ attempt 16 │ data bytes u64 │ segments u32
//!                │ CRC of the page u32 │ largest timestamp i64 │ 12 zero bytes
//! ```
//!
//! Big-endian; CRC-32C. Pure: no I/O, no clock, no randomness.

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    codec::{self, FieldReader, InvalidObject, put_count, put_object_id, put_partition},
    name::ObjectId,
};
use crate::model::{LeaderEpoch, Offset, PartitionId};

/// Number of segments in a page.
pub const PAGE_SEGMENTS: usize = 512;

/// Lowest version that is rejected when a manifest is read. So every accepted version has a next version, which can be
/// written.
const VERSION_END: u64 = 1 << 63;

const FORMAT: u16 = 1;
const ENTRY_BYTES: usize = codec::OBJECT_ID_BYTES + 8 + 4 + 4 + 8 + 12;
const ROOT: &str = "manifest";
const PAGE: &str = "manifest page";

/// Manifest entry of one segment object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentEntry {
    /// Id of the object, from which its name is formed.
    pub stamp: ObjectId,
    /// Bytes of the batches.
    pub data_bytes: u64,
    /// Bytes of the footer, from the end of the batches to the object's end.
    pub footer_bytes: u32,
    /// CRC-32C of the complete object.
    pub crc: u32,
    /// Largest timestamp of the records, in milliseconds.
    pub max_timestamp_ms: i64,
    /// Time when the last batch was written to a disk, in milliseconds since 1970; in a rebuilt manifest, the
    /// modification time of the object. Determines the segment's age if its records have no timestamps. 0 if the time
    /// is not known.
    pub created_ms: i64,
}

impl SegmentEntry {
    /// Returns the object's length in bytes.
    pub fn object_bytes(&self) -> u64 {
        self.data_bytes.saturating_add(u64::from(self.footer_bytes))
    }
}

/// Manifest entry of one page object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// Id of the object, from which its name is formed.
    pub stamp: ObjectId,
    /// Bytes of the batches in all segments of the page.
    pub data_bytes: u64,
    pub segments: u32,
    /// CRC-32C of the page object.
    pub crc: u32,
    /// Largest timestamp of the records, in milliseconds.
    pub max_timestamp_ms: i64,
}

/// A page: consecutive segments that never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestPage {
    partition: PartitionId,
    segments: Vec<SegmentEntry>,
}

/// A manifest's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestRoot {
    partition: PartitionId,
    version: u64,
    epoch: LeaderEpoch,
    log_start: Offset,
    end: Offset,
    bytes: u64,
    pages: Vec<PageEntry>,
    segments: Vec<SegmentEntry>,
}

/// Result of a search for an offset or a timestamp in a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManifestLookup {
    /// The segment was found in the root.
    Segment(SegmentEntry),
    /// The segment is in this page.
    Page(PageEntry),
}

/// A page of segments that moved out of a root. The caller writes the page object before the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewManifestPage {
    /// Id of the object, from which its name is formed.
    pub stamp: ObjectId,
    /// Content of the object.
    pub bytes: Bytes,
}

impl ManifestPage {
    /// Parses a page object and checks it against its entry in the root.
    pub fn parse(bytes: &[u8], partition: PartitionId, entry: &PageEntry) -> Result<Self, InvalidObject> {
        let actual = crc32c::crc32c(bytes);
        if actual != entry.crc {
            return Err(InvalidObject::Crc { what: PAGE, stored: entry.crc, actual });
        }
        let page = Self::read(bytes)?;
        let refuse = |reason| Err(InvalidObject::Contradiction { reason });
        if page.partition != partition {
            return refuse("the page belongs to another partition");
        }
        let range = page.segments.first().zip(page.segments.last()).map(|(a, b)| (a.stamp.base, b.stamp.end));
        if range != Some((entry.stamp.base, entry.stamp.end)) || page.segments.len() != entry.segments as usize {
            return refuse("the page does not match its entry in the manifest");
        }
        Ok(page)
    }

    /// Parses a page object without a comparison with its entry in the root.
    pub fn read(bytes: &[u8]) -> Result<Self, InvalidObject> {
        let mut fields = codec::check_envelope(bytes, b"STMP", PAGE, FORMAT)?;
        let partition = fields.partition()?;
        let segments = read_entries(&mut fields, SegmentEntry::read)?;
        fields.done()?;
        check_contiguous(segments.iter().map(|entry| &entry.stamp))?;
        Ok(Self { partition, segments })
    }

    /// Returns the page's partition.
    pub fn partition(&self) -> PartitionId {
        self.partition
    }

    /// Returns the segments, oldest first.
    pub fn segments(&self) -> &[SegmentEntry] {
        &self.segments
    }

    /// Returns the segment that contains `offset`.
    pub fn find(&self, offset: Offset) -> Option<SegmentEntry> {
        find(&self.segments, offset, |entry| &entry.stamp)
    }

    fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(40 + self.segments.len() * ENTRY_BYTES);
        out.put_slice(b"STMP");
        out.put_u16(FORMAT);
        put_partition(&mut out, self.partition);
        put_count(&mut out, self.segments.len());
        for entry in &self.segments {
            entry.write(&mut out);
        }
        codec::append_crc(out)
    }
}

impl ManifestRoot {
    /// Returns the manifest that precedes the first version. It is never written, lists no segment and covers
    /// `log_start..log_start`.
    pub fn empty(partition: PartitionId, log_start: Offset) -> Self {
        Self {
            partition,
            version: 0,
            epoch: LeaderEpoch(0),
            log_start,
            end: log_start,
            bytes: 0,
            pages: Vec::new(),
            segments: Vec::new(),
        }
    }

    /// Returns an empty manifest of this version, to which the segments of a lost manifest are added.
    pub(super) fn rebuilt(partition: PartitionId, version: u64, epoch: LeaderEpoch, log_start: Offset) -> Self {
        Self { version, epoch, ..Self::empty(partition, log_start) }
    }

    /// Returns the manifest's partition.
    pub fn partition(&self) -> PartitionId {
        self.partition
    }

    /// Returns the version, from 1. Version 0 is [`ManifestRoot::empty`], which is never written.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Returns the leader epoch of the writer.
    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// Returns the first offset that can be read.
    pub fn log_start(&self) -> Offset {
        self.log_start
    }

    /// Returns the first offset that the manifest covers. It lies below the log start if the log start lies inside the
    /// first page or segment.
    pub fn base(&self) -> Offset {
        let page = self.pages.first().map(|entry| entry.stamp.base);
        page.or(self.segments.first().map(|entry| entry.stamp.base)).unwrap_or(self.end)
    }

    /// Returns the end of the covered offsets: the tiered end, once this manifest is committed.
    pub fn end(&self) -> Offset {
        self.end
    }

    /// Returns the bytes of batches in the listed segments that end above the log start.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns true if the manifest lists no segment.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.segments.is_empty()
    }

    /// Returns the pages, oldest first.
    pub fn pages(&self) -> &[PageEntry] {
        &self.pages
    }

    /// Returns the segments after the pages, oldest first.
    pub fn segments(&self) -> &[SegmentEntry] {
        &self.segments
    }

    /// Returns the segment or page that contains `offset`. Returns `None` outside of the covered range.
    pub fn find(&self, offset: Offset) -> Option<ManifestLookup> {
        let page = find(&self.pages, offset, |entry| &entry.stamp).map(ManifestLookup::Page);
        page.or_else(|| find(&self.segments, offset, |entry| &entry.stamp).map(ManifestLookup::Segment))
    }

    /// Returns the first page or segment that ends above `from` and has a largest timestamp of `timestamp_ms` or later.
    pub fn find_time(&self, timestamp_ms: i64, from: Offset) -> Option<ManifestLookup> {
        let page = self.pages.iter().find(|entry| entry.stamp.end > from && entry.max_timestamp_ms >= timestamp_ms);
        let page = page.copied().map(ManifestLookup::Page);
        page.or_else(|| {
            let matches = |entry: &&SegmentEntry| entry.stamp.end > from && entry.max_timestamp_ms >= timestamp_ms;
            self.segments.iter().find(matches).copied().map(ManifestLookup::Segment)
        })
    }

    /// Returns the next version, with one more segment at the end. Also returns the page that moved out of the root, if
    /// any; `page_attempt` is the attempt in that page's name.
    ///
    /// # Panics
    /// If the segment does not start at the end, or if it has a newer epoch than the new version. Also if `epoch` is
    /// older than the manifest's. An empty manifest also accepts a segment that contains its log start.
    pub fn extend(
        &self,
        segment: SegmentEntry,
        epoch: LeaderEpoch,
        page_attempt: uuid::Uuid,
    ) -> (Self, Option<NewManifestPage>) {
        let mut next = self.next_version(epoch);
        let page = next.push(segment, page_attempt);
        (next, page)
    }

    /// Adds a segment at the end of this version, which is not written yet. Returns the page that moved out of the
    /// root, if any; `page_attempt` is the attempt in that page's name.
    ///
    /// # Panics
    /// As [`ManifestRoot::extend`].
    pub(super) fn push(&mut self, segment: SegmentEntry, page_attempt: uuid::Uuid) -> Option<NewManifestPage> {
        let stamp = &segment.stamp;
        let contains_end = self.is_empty() && stamp.base <= self.end && self.end < stamp.end;
        assert!(stamp.base == self.end || contains_end, "a manifest has no gap and no overlap: {} {stamp}", self.end);
        self.end = stamp.end;
        self.bytes = self.bytes.saturating_add(segment.data_bytes);
        self.segments.push(segment);
        let page = (self.segments.len() >= 2 * PAGE_SEGMENTS).then(|| self.move_page_out(page_attempt));
        self.assert_valid();
        page
    }

    /// Returns the same version of an empty manifest, with its log start and end raised to `base` if they are lower.
    /// Offsets below `base` are never uploaded.
    ///
    /// # Panics
    /// If the manifest lists a segment.
    #[must_use]
    pub fn beginning_at(&self, base: Offset) -> Self {
        assert!(self.is_empty(), "only an empty manifest can start at another offset");
        Self { log_start: self.log_start.max(base), end: self.end.max(base), ..self.clone() }
    }

    /// Returns the next version, which starts at `log_start` and lists nothing that lies completely below it. `page` is
    /// the content of the page that [`ManifestRoot::page_to_trim`] returns, if any. Its segments below the log start no
    /// longer count in the bytes of the manifest.
    ///
    /// # Panics
    /// If the log start or the epoch would decrease, or `page` is another page.
    pub fn trim(&self, log_start: Offset, page: Option<&ManifestPage>, epoch: LeaderEpoch) -> Self {
        assert!(log_start >= self.log_start, "the log start never decreases: {} to {log_start}", self.log_start);
        let mut next = self.next_version(epoch);
        next.log_start = log_start;
        next.pages.retain(|entry| entry.stamp.end > log_start);
        next.segments.retain(|entry| entry.stamp.end > log_start);
        if next.is_empty() {
            next.end = next.end.max(log_start);
        }
        next.bytes = total(next.pages.iter().map(|entry| entry.data_bytes));
        next.bytes = next.bytes.saturating_add(total(next.segments.iter().map(|entry| entry.data_bytes)));
        if let Some(page) = page {
            let first = next.pages.first().map(|entry| (entry.stamp.base, entry.segments as usize));
            let actual = page.segments.first().map(|entry| (entry.stamp.base, page.segments.len()));
            assert_eq!(first, actual, "`page` is the page that contains the log start");
            let below = page.segments.iter().filter(|entry| entry.stamp.end <= log_start);
            next.bytes = next.bytes.saturating_sub(total(below.map(|entry| entry.data_bytes)));
        }
        next.assert_valid();
        next
    }

    /// Returns the page that begins below `log_start` and contains it. [`ManifestRoot::trim`] needs the content of this
    /// page as `page`.
    pub fn page_to_trim(&self, log_start: Offset) -> Option<PageEntry> {
        find(&self.pages, log_start, |entry| &entry.stamp).filter(|entry| entry.stamp.base < log_start)
    }

    /// Returns the next version with the same content, written by the leader of `epoch`.
    pub(super) fn next_version(&self, epoch: LeaderEpoch) -> Self {
        assert!(epoch >= self.epoch, "leader epochs never decrease: {} to {epoch}", self.epoch);
        Self { version: self.version + 1, epoch, ..self.clone() }
    }

    /// Moves the oldest [`PAGE_SEGMENTS`] single segments to a page, and adds the page's entry to the root.
    fn move_page_out(&mut self, attempt: uuid::Uuid) -> NewManifestPage {
        let segments: Vec<_> = self.segments.drain(..PAGE_SEGMENTS).collect();
        let (first, last) = (segments[0].stamp, segments[PAGE_SEGMENTS - 1].stamp);
        let data_bytes = total(segments.iter().map(|entry| entry.data_bytes));
        let max_timestamp_ms = segments.iter().map(|entry| entry.max_timestamp_ms).max().unwrap_or(i64::MIN);
        let bytes = ManifestPage { partition: self.partition, segments }.encode();
        let stamp = ObjectId { base: first.base, end: last.end, epoch: self.epoch, attempt };
        self.pages.push(PageEntry {
            stamp,
            data_bytes,
            segments: u32::try_from(PAGE_SEGMENTS).expect("a small constant"),
            crc: crc32c::crc32c(&bytes),
            max_timestamp_ms,
        });
        NewManifestPage { stamp, bytes }
    }

    /// Returns the content of the root object.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(80 + (self.pages.len() + self.segments.len()) * ENTRY_BYTES);
        out.put_slice(b"STMR");
        out.put_u16(FORMAT);
        put_partition(&mut out, self.partition);
        out.put_u64(self.version);
        out.put_u32(self.epoch.0);
        out.put_u64(self.log_start.get());
        out.put_u64(self.end.get());
        out.put_u64(self.bytes);
        put_count(&mut out, self.pages.len());
        for entry in &self.pages {
            entry.write(&mut out);
        }
        put_count(&mut out, self.segments.len());
        for entry in &self.segments {
            entry.write(&mut out);
        }
        codec::append_crc(out)
    }

    /// Parses a root object.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidObject> {
        let mut fields = codec::check_envelope(bytes, b"STMR", ROOT, FORMAT)?;
        let root = Self {
            partition: fields.partition()?,
            version: fields.u64("manifest version")?,
            epoch: fields.epoch("epoch")?,
            log_start: fields.offset("log start")?,
            end: fields.offset("end")?,
            bytes: fields.u64("bytes")?,
            pages: read_entries(&mut fields, PageEntry::read)?,
            segments: read_entries(&mut fields, SegmentEntry::read)?,
        };
        fields.done()?;
        if root.version >= VERSION_END {
            return Err(InvalidObject::Contradiction { reason: "the version is 2^63 or more" });
        }
        root.check()?;
        Ok(root)
    }

    /// Checks the invariants of a manifest (module documentation).
    fn check(&self) -> Result<(), InvalidObject> {
        let refuse = |reason| Err(InvalidObject::Contradiction { reason });
        let pages = || self.pages.iter().map(|entry| &entry.stamp);
        let stamps = || pages().chain(self.segments.iter().map(|entry| &entry.stamp));
        check_contiguous(stamps())?;
        if stamps().last().is_some_and(|last| last.end != self.end) {
            return refuse("the last segment does not reach the end");
        }
        if stamps().next().is_some_and(|first| first.base > self.log_start || first.end <= self.log_start) {
            return refuse("the first segment does not contain the log start");
        }
        if self.is_empty() && (self.log_start != self.end || self.bytes != 0) {
            return refuse("an empty manifest covers offsets");
        }
        if stamps().any(|stamp| stamp.epoch > self.epoch) {
            return refuse("a segment is newer than its manifest");
        }
        Ok(())
    }

    /// Panics if a manifest that this process made violates an invariant.
    fn assert_valid(&self) {
        assert_eq!(self.check(), Ok(()), "manifest {} of {}", self.version, self.partition);
    }
}

impl SegmentEntry {
    fn read(fields: &mut FieldReader<'_>) -> Result<Self, InvalidObject> {
        let entry = Self {
            stamp: fields.object_id()?,
            data_bytes: fields.u64("data bytes")?,
            footer_bytes: fields.u32("footer bytes")?,
            crc: fields.u32("object crc")?,
            max_timestamp_ms: fields.i64("largest timestamp")?,
            created_ms: fields.i64("created at")?,
        };
        fields.bytes(4, "reserved")?;
        Ok(entry)
    }

    fn write(&self, out: &mut BytesMut) {
        put_object_id(out, &self.stamp);
        out.put_u64(self.data_bytes);
        out.put_u32(self.footer_bytes);
        out.put_u32(self.crc);
        out.put_i64(self.max_timestamp_ms);
        out.put_i64(self.created_ms);
        out.put_bytes(0, 4);
    }
}

impl PageEntry {
    fn read(fields: &mut FieldReader<'_>) -> Result<Self, InvalidObject> {
        let entry = Self {
            stamp: fields.object_id()?,
            data_bytes: fields.u64("data bytes")?,
            segments: fields.u32("segments")?,
            crc: fields.u32("page crc")?,
            max_timestamp_ms: fields.i64("largest timestamp")?,
        };
        fields.bytes(12, "reserved")?;
        Ok(entry)
    }

    fn write(&self, out: &mut BytesMut) {
        put_object_id(out, &self.stamp);
        out.put_u64(self.data_bytes);
        out.put_u32(self.segments);
        out.put_u32(self.crc);
        out.put_i64(self.max_timestamp_ms);
        out.put_bytes(0, 12);
    }
}

/// Reads the number of entries, and then each entry with `read`.
fn read_entries<T>(
    fields: &mut FieldReader<'_>,
    read: impl Fn(&mut FieldReader<'_>) -> Result<T, InvalidObject>,
) -> Result<Vec<T>, InvalidObject> {
    let count = fields.count(ENTRY_BYTES, "entries")?;
    (0..count).map(|_| read(fields)).collect()
}

/// Returns a saturating sum, which a hostile manifest cannot overflow.
fn total(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

/// Fails unless each object starts at the end of the object before it.
fn check_contiguous<'a>(mut stamps: impl Iterator<Item = &'a ObjectId>) -> Result<(), InvalidObject> {
    let Some(first) = stamps.next() else { return Ok(()) };
    let mut end = first.end;
    for stamp in stamps {
        if stamp.base != end {
            return Err(InvalidObject::Contradiction { reason: "the segments have a gap or overlap" });
        }
        end = stamp.end;
    }
    Ok(())
}

/// Returns the entry whose range contains `offset`. The entries must be ascending and contiguous.
fn find<T: Copy>(entries: &[T], offset: Offset, stamp: impl Fn(&T) -> &ObjectId) -> Option<T> {
    let at = entries.partition_point(|entry| stamp(entry).end <= offset);
    entries.get(at).filter(|entry| stamp(entry).base <= offset).copied()
}
