//! Fuzz entries of the objects in the object store.

use strandline::{
    model::{LeaderEpoch, Offset},
    tier::{
        Footer, SegmentEntry,
        footer::{TRAILER_BYTES, Trailer},
        manifest::{ManifestLookup, ManifestPage, ManifestRoot},
        name::ObjectId,
    },
};

use super::sealed;

/// Position of the data length in a footer's body.
const BODY_DATA_BYTES: std::ops::Range<usize> = 40..48;

/// Decodes the end of a segment object.
pub(crate) fn footer(input: &[u8]) -> bool {
    let as_is = opened(input);
    // The entire input as one footer, with corrected lengths, body CRC, trailer CRC and magic in the trailer.
    let Some((body, trailer)) = input.split_last_chunk::<TRAILER_BYTES>() else { return as_is };
    let mut trailer = *trailer;
    if let Some(data_bytes) = body.get(BODY_DATA_BYTES) {
        trailer[..8].copy_from_slice(data_bytes);
    }
    let Ok(body_bytes) = u32::try_from(body.len()) else { return as_is };
    trailer[8..12].copy_from_slice(&body_bytes.to_be_bytes());
    trailer[16..20].copy_from_slice(&crc32c::crc32c(body).to_be_bytes());
    let crc = crc32c::crc32c(&trailer[..32]);
    trailer[32..36].copy_from_slice(&crc.to_be_bytes());
    trailer[36..].copy_from_slice(b"STRNDSEG");
    opened(&[body, &trailer].concat()) || as_is
}

fn opened(tail: &[u8]) -> bool {
    let Ok(footer) = Footer::parse(tail) else { return false };
    let trailer = Trailer::parse(tail).expect("the footer has a valid trailer");
    let encoded = footer.encode();
    assert_eq!(encoded.len() as u64, trailer.footer_bytes());
    assert_eq!(Footer::parse(&encoded).as_ref(), Ok(&footer), "a footer differs after encoding and decoding");
    for offset in footer.index.iter().map(|interval| interval.offset).chain([before(footer.end)]) {
        let (interval, end) = footer.interval_of(offset);
        assert!(interval.offset <= offset && interval.position < end && end <= footer.data_bytes);
        assert!(footer.epoch_of(offset).is_some(), "the epochs cover the segment");
    }
    for time in [i64::MIN, footer.max_timestamp_ms, i64::MAX] {
        assert!(footer.interval_at_time(time).is_none_or(|interval| interval.max_timestamp_ms >= time));
    }
    true
}

/// Decodes a manifest root and a manifest page.
pub(crate) fn manifest(input: &[u8]) -> bool {
    let as_is = root(input) || page(input);
    let right = sealed(input);
    root(&right) || page(&right) || as_is
}

fn root(bytes: &[u8]) -> bool {
    let Ok(root) = ManifestRoot::parse(bytes) else { return false };
    let encoded = root.encode();
    assert_eq!(encoded.len(), bytes.len());
    assert_eq!(ManifestRoot::parse(&encoded).as_ref(), Ok(&root), "a root survives being written again");
    assert!(root.base() <= root.log_start() && root.log_start() <= root.end());
    assert_eq!(root.find(root.end()), None);
    assert_eq!(root.find(root.log_start()).is_some(), !root.is_empty());
    if !root.is_empty() {
        assert!(matches!(root.find(before(root.end())), Some(ManifestLookup::Segment(_) | ManifestLookup::Page(_))));
    }
    for time in [i64::MIN, 0, i64::MAX] {
        let late = |max: i64| max >= time;
        match root.find_time(time, root.log_start()) {
            Some(ManifestLookup::Segment(line)) => assert!(late(line.max_timestamp_ms)),
            Some(ManifestLookup::Page(line)) => assert!(late(line.max_timestamp_ms)),
            None => {}
        }
    }
    grow(&root);
    true
}

/// Changes a manifest as a broker does: adds a segment, then removes all segments as expired.
fn grow(root: &ManifestRoot) {
    let end = root.end();
    if let Some(next) = end.get().checked_add(10).and_then(Offset::new) {
        let stamp = ObjectId { base: end, end: next, epoch: root.epoch(), attempt: Default::default() };
        let line =
            SegmentEntry { stamp, data_bytes: 1000, footer_bytes: 200, crc: 0, max_timestamp_ms: 0, created_ms: 1 };
        let (longer, page) = root.extend(line, root.epoch(), Default::default());
        assert_eq!((longer.end(), longer.version()), (next, root.version() + 1));
        assert!(page.is_none_or(|page| ManifestPage::read(&page.bytes).is_ok()));
        assert!(longer.version() == 1 << 63 || ManifestRoot::parse(&longer.encode()) == Ok(longer));
    }
    if root.page_to_trim(end).is_none() {
        let empty = root.trim(end, None, LeaderEpoch(i32::MAX.unsigned_abs()));
        assert!(empty.is_empty() && empty.bytes() == 0);
        assert!(empty.version() == 1 << 63 || ManifestRoot::parse(&empty.encode()) == Ok(empty));
    }
}

fn page(bytes: &[u8]) -> bool {
    let Ok(page) = ManifestPage::read(bytes) else { return false };
    for line in page.segments() {
        let ObjectId { base, end, .. } = line.stamp;
        assert_eq!((page.find(base), page.find(before(end))), (Some(*line), Some(*line)));
        assert!(line.object_bytes() >= line.data_bytes);
    }
    true
}

/// Returns the offset before `offset`, which must not be the first one.
fn before(offset: Offset) -> Offset {
    Offset::new(offset.get() - 1).expect("the offset is below the maximum")
}
