//! What a partition has in the bucket: a small root and immutable pages.
//!
//! ```text
//! root   pages, oldest first ─────────────┐  then single segments, oldest first
//!        [page 0..512)[page 512..1024) …  │  [segment][segment][segment] …
//!        base                                                            end = tiered end
//! ```
//! Each commit makes a new root, with one new segment or several. When a root holds [`PAGE_SEGMENTS`] × 2 single segments, the oldest half moves to a
//! page object that never changes again, so a root stays at some tens of KiB for terabytes. Retention drops segments
//! from the front: whole pages by their line in the root; a page that is cut keeps its line until its last segment goes,
//! and what of it lies below the log start counts no more.
//!
//! Invariants, asserted when a manifest is made and checked when one is read: pages and segments cover `base..end`
//! without gap or overlap; `base ≤ log start ≤ end`, and the first page or segment reaches above the log start; a
//! version's parent is the version before.
//!
//! ```text
//! root     "STMR" │ version u16 │ topic id 16 │ partition u32 │ manifest version u64 │ epoch u32 │ log start u64
//!          │ end u64 │ bytes u64 │ n u32 │ n × page (72 bytes) │ n u32 │ n × segment (72 bytes) │ CRC u32
//! page     "STMP" │ version u16 │ topic id 16 │ partition u32 │ n u32 │ n × segment (72 bytes) │ CRC u32
//! segment line   base u64 │ end u64 │ epoch u32 │ attempt 16 │ data bytes u64 │ footer bytes u32
//!                │ CRC of the object u32 │ largest timestamp i64 │ created at i64 │ 4 zero bytes
//! page line      base u64 │ end u64 │ epoch u32 │ attempt 16 │ data bytes u64 │ segments u32
//!                │ CRC of the page u32 │ largest timestamp i64 │ 12 zero bytes
//! ```
//! Big-endian; CRC-32C. Pure: no I/O, no clock, no randomness.

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    name::Stamp,
    wire::{self, Invalid, Reader, put_count, put_partition, put_stamp},
};
use crate::model::{LeaderEpoch, Offset, PartitionId};

/// Segments of one page.
pub const PAGE_SEGMENTS: usize = 512;

/// Versions that are believed when they are read. Each of them has a next one, which can be written.
const VERSIONS: u64 = 1 << 63;

const FORMAT: u16 = 1;
const LINE_BYTES: usize = wire::STAMP_BYTES + 8 + 4 + 4 + 8 + 12;
const ROOT: &str = "manifest";
const PAGE: &str = "manifest page";

/// One segment object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentLine {
    /// Its name.
    pub stamp: Stamp,
    /// Bytes of its batches.
    pub data_bytes: u64,
    /// Bytes of its footer, which follows them to the object's end.
    pub footer_bytes: u32,
    /// CRC-32C of the whole object.
    pub crc: u32,
    /// Largest timestamp of its records, in milliseconds.
    pub max_timestamp_ms: i64,
    /// When its last batch was written to a disk, in milliseconds: its age where its records have no timestamps. 0 where nobody has said.
    pub created_ms: i64,
}

impl SegmentLine {
    /// The object's length.
    pub fn object_bytes(&self) -> u64 {
        self.data_bytes.saturating_add(u64::from(self.footer_bytes))
    }
}

/// One page object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLine {
    /// Its name.
    pub stamp: Stamp,
    /// Bytes of its segments' batches.
    pub data_bytes: u64,
    /// How many segments it lists.
    pub segments: u32,
    /// CRC-32C of the page object.
    pub crc: u32,
    /// Largest timestamp of its records, in milliseconds.
    pub max_timestamp_ms: i64,
}

/// A page: a run of segments that changes no more.
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

/// Where an offset or a place in the order of segments is to be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// This segment holds it.
    Segment(SegmentLine),
    /// A segment of this page holds it.
    Page(PageLine),
}

/// Segments that moved out of a root, to be written as a page object before the root is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPage {
    /// Its name.
    pub stamp: Stamp,
    /// Its content.
    pub bytes: Bytes,
}

impl Page {
    /// Reads a page object and checks it against its line in the root.
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

    /// Reads a page object by itself.
    pub fn read(bytes: &[u8]) -> Result<Self, Invalid> {
        let mut fields = wire::unseal(bytes, b"STMP", PAGE, FORMAT)?;
        let partition = fields.partition()?;
        let segments = read_lines(&mut fields, SegmentLine::read)?;
        fields.done()?;
        check_contiguous(segments.iter().map(|line| &line.stamp))?;
        Ok(Self { partition, segments })
    }

    /// Whose page it is.
    pub fn partition(&self) -> PartitionId {
        self.partition
    }

    /// Its segments, oldest first.
    pub fn segments(&self) -> &[SegmentLine] {
        &self.segments
    }

    /// The segment that holds `offset`.
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
    /// The manifest before the first one: nothing is in the bucket, and the first segment starts at `log_start`.
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

    /// An empty manifest that takes the place of a lost one.
    pub(super) fn rebuilt(partition: PartitionId, version: u64, epoch: LeaderEpoch, log_start: Offset) -> Self {
        Self { version, epoch, ..Self::empty(partition, log_start) }
    }

    /// Whose manifest it is.
    pub fn partition(&self) -> PartitionId {
        self.partition
    }

    /// Its place in the chain, from 1; 0 is the manifest that was never written.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The leader epoch of its writer.
    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// First offset that can be read at all.
    pub fn log_start(&self) -> Offset {
        self.log_start
    }

    /// First offset that it covers: at most the log start, where that lies inside a segment.
    pub fn base(&self) -> Offset {
        let page = self.pages.first().map(|line| line.stamp.base);
        page.or(self.segments.first().map(|line| line.stamp.base)).unwrap_or(self.end)
    }

    /// First offset that is not in the bucket.
    pub fn end(&self) -> Offset {
        self.end
    }

    /// Bytes of batches in the segments that it lists.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it lists nothing.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.segments.is_empty()
    }

    /// The pages, oldest first.
    pub fn pages(&self) -> &[PageLine] {
        &self.pages
    }

    /// The segments after the pages, oldest first.
    pub fn segments(&self) -> &[SegmentLine] {
        &self.segments
    }

    /// Where `offset` is; `None` outside of what is covered.
    pub fn find(&self, offset: Offset) -> Option<Found> {
        let page = find(&self.pages, offset, |line| &line.stamp).map(Found::Page);
        page.or_else(|| find(&self.segments, offset, |line| &line.stamp).map(Found::Segment))
    }

    /// The first page or segment whose largest timestamp is at or after `timestamp_ms`, from `from` on.
    pub fn find_time(&self, timestamp_ms: i64, from: Offset) -> Option<Found> {
        let page = self.pages.iter().find(|line| line.stamp.end > from && line.max_timestamp_ms >= timestamp_ms);
        let page = page.copied().map(Found::Page);
        page.or_else(|| {
            let late = |line: &&SegmentLine| line.stamp.end > from && line.max_timestamp_ms >= timestamp_ms;
            self.segments.iter().find(late).copied().map(Found::Segment)
        })
    }

    /// The next version, with one more segment at the end, and the page that it moved out, if any. `page_attempt`
    /// names that page.
    ///
    /// # Panics
    /// When the segment does not start at the end. An empty manifest also takes one that its log start lies in.
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

    /// One more segment at the end of this version, which nobody has written yet; the page that it moved out, if any.
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

    /// The same version of an empty manifest, with its end moved up to `base`: nothing below will ever be uploaded.
    ///
    /// # Panics
    /// When it lists anything.
    #[must_use]
    pub fn beginning_at(&self, base: Offset) -> Self {
        assert!(self.is_empty(), "only an empty manifest begins elsewhere");
        Self { log_start: self.log_start.max(base), end: self.end.max(base), ..self.clone() }
    }

    /// The next version, which starts at `log_start`: without what lies wholly below it. `cut` are the segments of
    /// the one page that the log start lies in, so that its bytes below are no more counted; `None` when it lies in no page.
    ///
    /// # Panics
    /// When the log start would fall, or `cut` is not that page.
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

    /// The page that `log_start` lies in behind its first segment: what [`Root::trim`] wants as `cut`.
    pub fn page_to_cut(&self, log_start: Offset) -> Option<PageLine> {
        find(&self.pages, log_start, |line| &line.stamp).filter(|line| line.stamp.base < log_start)
    }

    /// What the next version begins as.
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

    /// The root object's content.
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

    /// Reads a root object.
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

/// A sum that a hostile manifest cannot overflow.
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
