//! Golden files, and the parsing of hostile bytes.

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::tier::{
    footer::{FooterBuilder, SegmentIndexEntry, TRAILER_BYTES, Trailer},
    manifest::{ManifestLookup, ManifestPage, ManifestRoot, PAGE_SEGMENTS},
    name::ObjectId,
};

fn entry(base: u64, end: u64, epoch: u32) -> SegmentEntry {
    SegmentEntry {
        stamp: ObjectId {
            base: at(base),
            end: at(end),
            epoch: LeaderEpoch(epoch),
            attempt: Uuid::from_u128(u128::from(base) << 64 | u128::from(end)),
        },
        data_bytes: (end - base) * 100,
        footer_bytes: 200,
        crc: 0xdead_beef,
        max_timestamp_ms: end as i64,
        created_ms: 0,
    }
}

/// An encoded manifest keeps `created_ms`, which retention uses if the records have no timestamps.
#[test]
fn segment_entry_keeps_creation_time() {
    let without_timestamps = SegmentEntry { created_ms: 1_790_000_000_123, max_timestamp_ms: -1, ..entry(0, 10, 1) };
    let root = ManifestRoot::empty(partition(), at(0)).extend(without_timestamps, LeaderEpoch(1), Uuid::from_u128(1)).0;
    let parsed = ManifestRoot::parse(&root.encode()).unwrap();
    assert_eq!(parsed, root);
    assert_ne!(
        parsed,
        ManifestRoot::empty(partition(), at(0)).extend(entry(0, 10, 1), LeaderEpoch(1), Uuid::from_u128(1)).0
    );
}

/// Returns a manifest of `count` segments of ten offsets each, and the pages that moved out.
fn manifest_of(count: u64) -> (ManifestRoot, Vec<manifest::NewManifestPage>) {
    let (mut root, mut pages) = (ManifestRoot::empty(partition(), at(0)), Vec::new());
    for number in 0..count {
        let segment = entry(number * 10, number * 10 + 10, 1);
        let (next, page) = root.extend(segment, LeaderEpoch(1), Uuid::from_u128(number.into()));
        root = next;
        pages.extend(page);
    }
    (root, pages)
}

fn footer() -> Footer {
    let mut bytes = batches(30, 5, 2000, 4);
    let epochs = vec![(LeaderEpoch(1), at(0)), (LeaderEpoch(4), at(30))];
    let mut builder = FooterBuilder::new(partition(), at(30), bytes.len() as u64, LeaderEpoch(5), epochs);
    while !bytes.is_empty() {
        builder.push(&crate::record::Batch::split_from(&mut bytes).unwrap());
    }
    builder.finish(Bytes::from_static(b"state"))
}

/// Compares bytes with a golden file. With `STRANDLINE_GOLDEN=write` it first writes the file: only for a new one,
/// because old files must stay readable.
fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tier/golden").join(name);
    if std::env::var_os("STRANDLINE_GOLDEN").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    let stored = std::fs::read(&path).unwrap();
    assert_eq!(stored, bytes, "{name}: the format changed; bump its version and keep the old file readable");
    stored
}

#[test]
fn golden_objects_are_read_and_written_identically() {
    let (root, pages) = manifest_of(2 * PAGE_SEGMENTS as u64 + 2);
    let root = root.trim(at(15), Some(&ManifestPage::read(&pages[0].bytes).unwrap()), LeaderEpoch(2));
    assert_eq!(ManifestRoot::parse(&golden("manifest-v1", &root.encode())).unwrap(), root);
    let page = golden("page-v1", &pages[0].bytes);
    assert_eq!(ManifestPage::parse(&page, partition(), &root.pages()[0]).unwrap().segments().len(), PAGE_SEGMENTS);
    let footer = footer();
    assert_eq!(Footer::parse(&golden("footer-v1", &footer.encode())).unwrap(), footer);
}

#[test]
fn flipped_bit_in_footer_manifest_or_page_is_detected() {
    let (root, pages) = manifest_of(2 * PAGE_SEGMENTS as u64);
    let small = manifest_of(3).0.encode();
    let flipped = |bytes: &[u8], bit: usize| {
        let mut bytes = bytes.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes
    };
    for bit in 0..small.len() * 8 {
        assert!(ManifestRoot::parse(&flipped(&small, bit)).is_err(), "manifest bit {bit}");
    }
    let encoded = footer().encode();
    for bit in 0..encoded.len() * 8 {
        assert!(Footer::parse(&flipped(&encoded, bit)).is_err(), "footer bit {bit}");
    }
    for len in 0..encoded.len() {
        assert!(Footer::parse(&encoded[..len]).is_err(), "footer truncated to {len}");
    }
    for byte in 0..pages[0].bytes.len() {
        let page = flipped(&pages[0].bytes, byte * 8 + byte % 8);
        assert!(ManifestPage::parse(&page, partition(), &root.pages()[0]).is_err(), "page byte {byte}");
        assert!(ManifestPage::read(&page).is_err(), "page byte {byte}");
    }
}

/// Regression: a manifest of the largest version aborted the broker that computed the next version.
#[test]
fn manifest_of_excessive_version_or_epoch_is_rejected() {
    let content = manifest_of(3).0.encode();
    let changed = |at: usize, bytes: &[u8]| {
        let mut content = content[..content.len() - 4].to_vec();
        content[at..at + bytes.len()].copy_from_slice(bytes);
        content.extend(crc32c::crc32c(&content).to_be_bytes());
        ManifestRoot::parse(&content)
    };
    let version = 4 + 2 + 20;
    assert!(changed(version, &7_u64.to_be_bytes()).is_ok());
    assert!(changed(version, &u64::MAX.to_be_bytes()).is_err());
    assert!(changed(version + 8, &[0x7f; 4]).is_ok());
    assert!(changed(version + 8, &[0x80, 0, 0, 0]).is_err());
}

#[test]
fn footer_is_parsed_from_the_end_of_an_object() {
    let encoded = footer().encode();
    let object = [&batches(30, 5, 2000, 4)[..], &encoded].concat();
    let trailer = Trailer::parse(&object[object.len() - TRAILER_BYTES..]).unwrap();
    assert_eq!(trailer.footer_bytes(), encoded.len() as u64);
    assert_eq!(Footer::parse(&object).unwrap(), footer());
    let footer = footer();
    assert_eq!(footer.data_crc, crc32c::crc32c(&object[..object.len() - encoded.len()]));
    let last = *footer.index.last().unwrap();
    assert_eq!(footer.interval_of(at(44)), (last, footer.data_bytes));
    assert_eq!(footer.interval_at_time(440), Some(SegmentIndexEntry { ..last }));
    assert_eq!(footer.interval_at_time(441), None);
    assert_eq!((footer.epoch_of(at(29)), footer.epoch_of(at(30))), (Some(LeaderEpoch(1)), Some(LeaderEpoch(4))));
}

#[test]
fn root_stays_small_and_finds_every_offset() {
    let segments = 5 * PAGE_SEGMENTS as u64 + 17;
    let (root, pages) = manifest_of(segments);
    assert_eq!((root.pages().len(), root.segments().len()), (4, PAGE_SEGMENTS + 17));
    assert_eq!(root.version(), segments);
    for number in 0..segments {
        for offset in [number * 10, number * 10 + 9] {
            let found = match root.find(at(offset)).unwrap() {
                ManifestLookup::Segment(entry) => entry,
                ManifestLookup::Page(entry) => {
                    let new = pages.iter().find(|page| page.stamp == entry.stamp).unwrap();
                    ManifestPage::parse(&new.bytes, partition(), &entry).unwrap().find(at(offset)).unwrap()
                }
            };
            assert_eq!(found.stamp.base, at(number * 10));
        }
    }
    assert_eq!(root.find(at(segments * 10)), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn trim_keeps_exactly_the_segments_above_log_start(
        count in 1..1600u64, steps in prop::collection::vec(0..1650u64, 1..5),
    ) {
        let (mut root, pages) = manifest_of(count);
        let mut steps = steps;
        steps.sort_unstable();
        for step in steps {
            let log_start = at(step * 10 + step % 7);
            let page = root.page_to_trim(log_start).map(|entry| {
                let new = pages.iter().find(|page| page.stamp == entry.stamp).unwrap();
                ManifestPage::parse(&new.bytes, partition(), &entry).unwrap()
            });
            root = root.trim(log_start, page.as_ref(), LeaderEpoch(1));
            let kept = count.saturating_sub(log_start.get() / 10);
            prop_assert_eq!(root.bytes(), kept * 1000);
            prop_assert_eq!(root.end(), at(count * 10).max(log_start));
            prop_assert_eq!(root.log_start(), log_start);
            prop_assert_eq!(ManifestRoot::parse(&root.encode()).unwrap(), root.clone());
        }
    }

}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 0..3usize) {
        // The magic bytes and checksums are correct, so that the parsers reach the fields after them.
        let magics: [&[u8]; 3] = [b"STMR\x00\x01", b"STMP\x00\x01", b""];
        let mut content = [magics[kind], &bytes].concat();
        content.extend(crc32c::crc32c(&content).to_be_bytes());
        let _root = ManifestRoot::parse(&content);
        let _page = ManifestPage::read(&content);
        let mut trailer = Vec::new();
        trailer.extend((bytes.len() as u64).to_be_bytes());
        trailer.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
        trailer.extend([0; 4]);
        trailer.extend(crc32c::crc32c(&bytes).to_be_bytes());
        trailer.extend([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        trailer.extend(crc32c::crc32c(&trailer).to_be_bytes());
        trailer.extend(b"STRNDSEG");
        let _footer = Footer::parse(&[&bytes[..], &trailer].concat());
    }
}
