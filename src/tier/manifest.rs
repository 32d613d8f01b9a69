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
//! Each commit of a manifest writes a new root, often with one new segment or several. When a root lists [`PAGE_SEGMENTS`] × 2 single
//! segments, the oldest half moves to a page object that never changes again. So a root has some tens of KiB for terabytes of data.
//! Retention removes segments from the front. A complete page is removed by its entry in the root. A page that contains the log start keeps
//! its entry until its last segment is below the log start. Its segments below the log start no longer count.
//!
//! # Invariants
//!
//! These are asserted when a manifest is made, and checked when one is read:
//!
//! - Pages and segments cover `base..end` without gap or overlap.
//! - `base ≤ log start ≤ end`, and the first page or segment reaches above the log start.
//! - No segment has a newer epoch than the manifest.
//!
//! The parent of a version is the version before it.
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
    name::Stamp,
    wire::{self, Invalid, Reader, put_count, put_partition, put_stamp},
};
use crate::model::{LeaderEpoch, Offset, PartitionId};

/// Number of segments in a page.
pub const PAGE_SEGMENTS: usize = 512;

/// First version that is rejected when a manifest is read. So every accepted version has a next version, which can be written.
const VERSIONS: u64 = 1 << 63;

const FORMAT: u16 = 1;
const LINE_BYTES: usize = wire::STAMP_BYTES + 8 + 4 + 4 + 8 + 12;
const ROOT: &str = "manifest";
const PAGE: &str = "manifest page";

/// Manifest entry of one segment object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentLine {
    /// Name of the object.
    pub stamp: Stamp,
    /// Bytes of the batches.
    pub data_bytes: u64,
    /// Bytes of the footer, from the end of the batches to the object's end.
    pub footer_bytes: u32,
    /// CRC-32C of the complete object.
    pub crc: u32,
    /// Largest timestamp of the records, in milliseconds.
    pub max_timestamp_ms: i64,
    /// Time when the last batch was written to a disk, in milliseconds since 1970: the segment's age if its records have no timestamps. 0
    /// if the time is not known.
    pub created_ms: i64,
}

impl SegmentLine {
    /// Returns the object's length in bytes.
    pub fn object_bytes(&self) -> u64 {
        self.data_bytes.saturating_add(u64::from(self.footer_bytes))
    }
}

/// Manifest entry of one page object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLine {
    /// Name of the object.
    pub stamp: Stamp,
    /// Bytes of the batches of the page's segments.
    pub data_bytes: u64,
    /// Number of segments in the page.
    pub segments: u32,
    /// CRC-32C of the page object.
    pub crc: u32,
    /// Largest timestamp of the records, in milliseconds.
    pub max_timestamp_ms: i64,
}

/// A page: consecutive segments that never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    partition: PartitionId,
    segments: Vec<SegmentLine>,
}

/// A manifest's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    partition: PartitionId,
    version: u64,
    epoch: LeaderEpoch,
    log_start: Offset,
    end: Offset,
    bytes: u64,
    pages: Vec<PageLine>,
    segments: Vec<SegmentLine>,
}

/// Result of a search for an offset or a timestamp in a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The segment was found in the root.
    Segment(SegmentLine),
    /// The segment is in this page.
    Page(PageLine),
}

/// A page of segments that moved out of a root. The page object is written before the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPage {
    /// Name of the object.
    pub stamp: Stamp,
    /// Content of the object.
    pub bytes: Bytes,
}

impl Page {
    /// Parses a page object and checks it against its entry in the root.
    pub fn parse(bytes: &[u8], partition: PartitionId, line: &PageLine) -> Result<Self, Invalid> {
        let actual = crc32c::crc32c(bytes);
        if actual != line.crc {
            return Err(Invalid::Crc { what: PAGE, stored: line.crc, actual });
        }
        let page = Self::read(bytes)?;
        let refuse = |reason| Err(Invalid::Contradiction { reason });
        if page.partition != partition {
            return refuse("the page belongs to another partition");
        }
        let range = page.segments.first().zip(page.segments.last()).map(|(a, b)| (a.stamp.base, b.stamp.end));
        if range != Some((line.stamp.base, line.stamp.end)) || page.segments.len() != line.segments as usize {
            return refuse("the page does not cover what the manifest says");
        }
        Ok(page)
    }

    /// Parses a page object without its entry.
    pub fn read(bytes: &[u8]) -> Result<Self, Invalid> {
        let mut fields = wire::unseal(bytes, b"STMP", PAGE, FORMAT)?;
        let partition = fields.partition()?;
        let segments = read_lines(&mut fields, SegmentLine::read)?;
        fields.done()?;
        check_contiguous(segments.iter().map(|line| &line.stamp))?;
        Ok(Self { partition, segments })
    }

    /// Returns the page's partition.
    pub fn partition(&self) -> PartitionId {
        self.partition
    }

    /// Returns the segments, oldest first.
    pub fn segments(&self) -> &[SegmentLine] {
        &self.segments
    }

    /// Returns the segment that contains `offset`.
    pub fn find(&self, offset: Offset) -> Option<SegmentLine> {
        find(&self.segments, offset, |line| &line.stamp)
    }

    fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(40 + self.segments.len() * LINE_BYTES);
        out.put_slice(b"STMP");
        out.put_u16(FORMAT);
        put_partition(&mut out, self.partition);
        put_count(&mut out, self.segments.len());
        for line in &self.segments {
            line.write(&mut out);
        }
        wire::seal(out)
    }
}

impl Root {
    /// Returns the manifest before the first one: it lists no segment, and the first segment starts at `log_start`.
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

    /// Returns an empty manifest that replaces a lost one.
    pub(super) fn rebuilt(partition: PartitionId, version: u64, epoch: LeaderEpoch, log_start: Offset) -> Self {
        Self { version, epoch, ..Self::empty(partition, log_start) }
    }

    /// Returns the manifest's partition.
    pub fn partition(&self) -> PartitionId {
        self.partition
    }

    /// Returns the version, from 1. Version 0 is the manifest that is never written.
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

    /// Returns the first offset that the manifest covers. It lies below the log start if that lies inside a segment.
    pub fn base(&self) -> Offset {
        let page = self.pages.first().map(|line| line.stamp.base);
        page.or(self.segments.first().map(|line| line.stamp.base)).unwrap_or(self.end)
    }

    /// Returns the first offset that is not in the object store.
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
    pub fn pages(&self) -> &[PageLine] {
        &self.pages
    }

    /// Returns the segments after the pages, oldest first.
    pub fn segments(&self) -> &[SegmentLine] {
        &self.segments
    }

    /// Returns the segment or page that contains `offset`. Returns `None` outside of the covered range.
    pub fn find(&self, offset: Offset) -> Option<Found> {
        let page = find(&self.pages, offset, |line| &line.stamp).map(Found::Page);
        page.or_else(|| find(&self.segments, offset, |line| &line.stamp).map(Found::Segment))
    }

    /// Returns the first page or segment that ends above `from` and has a largest timestamp of `timestamp_ms` or later.
    pub fn find_time(&self, timestamp_ms: i64, from: Offset) -> Option<Found> {
        let page = self.pages.iter().find(|line| line.stamp.end > from && line.max_timestamp_ms >= timestamp_ms);
        let page = page.copied().map(Found::Page);
        page.or_else(|| {
            let late = |line: &&SegmentLine| line.stamp.end > from && line.max_timestamp_ms >= timestamp_ms;
            self.segments.iter().find(late).copied().map(Found::Segment)
        })
    }

    /// Returns the next version, with one more segment at the end, and the page that moved out, if any. `page_attempt` is the attempt in
    /// that page's name.
    ///
    /// # Panics
    /// If the segment does not start at the end. An empty manifest also accepts a segment that contains its log start.
    pub fn extend(
        &self,
        segment: SegmentLine,
        epoch: LeaderEpoch,
        page_attempt: uuid::Uuid,
    ) -> (Self, Option<NewPage>) {
        let mut next = self.next_version(epoch);
        let page = next.push(segment, page_attempt);
        (next, page)
    }

    /// Adds a segment at the end of this version, which is not written yet. Returns the page that moved out, if any.
    ///
    /// # Panics
    /// As [`Root::extend`].
    pub(super) fn push(&mut self, segment: SegmentLine, page_attempt: uuid::Uuid) -> Option<NewPage> {
        let stamp = &segment.stamp;
        let inside = self.is_empty() && stamp.base <= self.end && self.end < stamp.end;
        assert!(stamp.base == self.end || inside, "a manifest has no gap and no overlap: {} {stamp}", self.end);
        self.end = stamp.end;
        self.bytes = self.bytes.saturating_add(segment.data_bytes);
        self.segments.push(segment);
        let page = (self.segments.len() >= 2 * PAGE_SEGMENTS).then(|| self.move_page_out(page_attempt));
        self.assert();
        page
    }

    /// Returns the same version of an empty manifest, with its end raised to `base`: offsets below `base` are never uploaded.
    ///
    /// # Panics
    /// If the manifest lists a segment.
    #[must_use]
    pub fn beginning_at(&self, base: Offset) -> Self {
        assert!(self.is_empty(), "only an empty manifest begins elsewhere");
        Self { log_start: self.log_start.max(base), end: self.end.max(base), ..self.clone() }
    }

    /// Returns the next version, which starts at `log_start` and lists nothing that lies completely below it. `cut` is the page that
    /// [`Root::page_to_cut`] returns: its segments below the log start no longer count. `cut` is `None` if there is no such page.
    ///
    /// # Panics
    /// If the log start would decrease, or `cut` is another page.
    pub fn trim(&self, log_start: Offset, cut: Option<&Page>, epoch: LeaderEpoch) -> Self {
        assert!(log_start >= self.log_start, "the log start never falls: {} to {log_start}", self.log_start);
        let mut next = self.next_version(epoch);
        next.log_start = log_start;
        next.pages.retain(|line| line.stamp.end > log_start);
        next.segments.retain(|line| line.stamp.end > log_start);
        if next.is_empty() {
            next.end = next.end.max(log_start);
        }
        next.bytes = total(next.pages.iter().map(|line| line.data_bytes));
        next.bytes = next.bytes.saturating_add(total(next.segments.iter().map(|line| line.data_bytes)));
        if let Some(page) = cut {
            let first = next.pages.first().map(|line| (line.stamp.base, line.segments as usize));
            let given = page.segments.first().map(|line| (line.stamp.base, page.segments.len()));
            assert_eq!(first, given, "the cut page is the one that the log start lies in");
            let below = page.segments.iter().filter(|line| line.stamp.end <= log_start);
            next.bytes = next.bytes.saturating_sub(total(below.map(|line| line.data_bytes)));
        }
        next.assert();
        next
    }

    /// Returns the page that contains `log_start` above its base. [`Root::trim`] needs the content of this page as `cut`.
    pub fn page_to_cut(&self, log_start: Offset) -> Option<PageLine> {
        find(&self.pages, log_start, |line| &line.stamp).filter(|line| line.stamp.base < log_start)
    }

    /// Returns the next version with the same content.
    pub(super) fn next_version(&self, epoch: LeaderEpoch) -> Self {
        assert!(epoch >= self.epoch, "leader epochs never fall: {} to {epoch}", self.epoch);
        Self { version: self.version + 1, epoch, ..self.clone() }
    }

    fn move_page_out(&mut self, attempt: uuid::Uuid) -> NewPage {
        let segments: Vec<_> = self.segments.drain(..PAGE_SEGMENTS).collect();
        let (first, last) = (segments[0].stamp, segments[PAGE_SEGMENTS - 1].stamp);
        let line_bytes = total(segments.iter().map(|line| line.data_bytes));
        let max_timestamp_ms = segments.iter().map(|line| line.max_timestamp_ms).max().unwrap_or(i64::MIN);
        let bytes = Page { partition: self.partition, segments }.encode();
        let stamp = Stamp { base: first.base, end: last.end, epoch: self.epoch, attempt };
        self.pages.push(PageLine {
            stamp,
            data_bytes: line_bytes,
            segments: u32::try_from(PAGE_SEGMENTS).expect("a small constant"),
            crc: crc32c::crc32c(&bytes),
            max_timestamp_ms,
        });
        NewPage { stamp, bytes }
    }

    /// Returns the content of the root object.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(80 + (self.pages.len() + self.segments.len()) * LINE_BYTES);
        out.put_slice(b"STMR");
        out.put_u16(FORMAT);
        put_partition(&mut out, self.partition);
        out.put_u64(self.version);
        out.put_u32(self.epoch.0);
        out.put_u64(self.log_start.get());
        out.put_u64(self.end.get());
        out.put_u64(self.bytes);
        put_count(&mut out, self.pages.len());
        for line in &self.pages {
            line.write(&mut out);
        }
        put_count(&mut out, self.segments.len());
        for line in &self.segments {
            line.write(&mut out);
        }
        wire::seal(out)
    }

    /// Parses a root object.
    pub fn parse(bytes: &[u8]) -> Result<Self, Invalid> {
        let mut fields = wire::unseal(bytes, b"STMR", ROOT, FORMAT)?;
        let root = Self {
            partition: fields.partition()?,
            version: fields.u64("manifest version")?,
            epoch: fields.epoch("epoch")?,
            log_start: fields.offset("log start")?,
            end: fields.offset("end")?,
            bytes: fields.u64("bytes")?,
            pages: read_lines(&mut fields, PageLine::read)?,
            segments: read_lines(&mut fields, SegmentLine::read)?,
        };
        fields.done()?;
        if root.version >= VERSIONS {
            return Err(Invalid::Contradiction { reason: "its version is 2^63 or more: nobody has written that many" });
        }
        root.check()?;
        Ok(root)
    }

    fn check(&self) -> Result<(), Invalid> {
        let refuse = |reason| Err(Invalid::Contradiction { reason });
        let stamps = || self.pages.iter().map(|line| &line.stamp).chain(self.segments.iter().map(|line| &line.stamp));
        check_contiguous(stamps())?;
        if stamps().last().is_some_and(|last| last.end != self.end) {
            return refuse("the last segment does not reach the end");
        }
        if stamps().next().is_some_and(|first| first.base > self.log_start || first.end <= self.log_start) {
            return refuse("the first segment does not hold the log start");
        }
        if self.is_empty() && (self.log_start != self.end || self.bytes != 0) {
            return refuse("an empty manifest covers something");
        }
        if stamps().any(|stamp| stamp.epoch > self.epoch) {
            return refuse("a segment is newer than its manifest");
        }
        Ok(())
    }

    fn assert(&self) {
        assert_eq!(self.check(), Ok(()), "manifest {} of {}", self.version, self.partition);
    }
}

impl SegmentLine {
    fn read(fields: &mut Reader<'_>) -> Result<Self, Invalid> {
        let line = Self {
            stamp: fields.stamp()?,
            data_bytes: fields.u64("data bytes")?,
            footer_bytes: fields.u32("footer bytes")?,
            crc: fields.u32("object crc")?,
            max_timestamp_ms: fields.i64("largest timestamp")?,
            created_ms: fields.i64("created at")?,
        };
        fields.bytes(4, "reserved")?;
        Ok(line)
    }

    fn write(&self, out: &mut BytesMut) {
        put_stamp(out, &self.stamp);
        out.put_u64(self.data_bytes);
        out.put_u32(self.footer_bytes);
        out.put_u32(self.crc);
        out.put_i64(self.max_timestamp_ms);
        out.put_i64(self.created_ms);
        out.put_bytes(0, 4);
    }
}

impl PageLine {
    fn read(fields: &mut Reader<'_>) -> Result<Self, Invalid> {
        let line = Self {
            stamp: fields.stamp()?,
            data_bytes: fields.u64("data bytes")?,
            segments: fields.u32("segments")?,
            crc: fields.u32("page crc")?,
            max_timestamp_ms: fields.i64("largest timestamp")?,
        };
        fields.bytes(12, "reserved")?;
        Ok(line)
    }

    fn write(&self, out: &mut BytesMut) {
        put_stamp(out, &self.stamp);
        out.put_u64(self.data_bytes);
        out.put_u32(self.segments);
        out.put_u32(self.crc);
        out.put_i64(self.max_timestamp_ms);
        out.put_bytes(0, 12);
    }
}

fn read_lines<T>(
    fields: &mut Reader<'_>,
    read: impl Fn(&mut Reader<'_>) -> Result<T, Invalid>,
) -> Result<Vec<T>, Invalid> {
    let count = fields.count(LINE_BYTES, "lines")?;
    (0..count).map(|_| read(fields)).collect()
}

/// Returns a saturating sum, which a hostile manifest cannot overflow.
fn total(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

fn check_contiguous<'a>(mut stamps: impl Iterator<Item = &'a Stamp>) -> Result<(), Invalid> {
    let Some(first) = stamps.next() else { return Ok(()) };
    let mut end = first.end;
    for stamp in stamps {
        if stamp.base != end {
            return Err(Invalid::Contradiction { reason: "the segments have a gap or overlap" });
        }
        end = stamp.end;
    }
    Ok(())
}

fn find<T: Copy>(lines: &[T], offset: Offset, stamp: impl Fn(&T) -> &Stamp) -> Option<T> {
    let at = lines.partition_point(|line| stamp(line).end <= offset);
    lines.get(at).filter(|line| stamp(line).base <= offset).copied()
}
