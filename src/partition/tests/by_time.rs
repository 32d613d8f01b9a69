//! Searches for the first record with a timestamp of at least a given time.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn search_by_time_finds_the_record_in_every_tier() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.ms", "-1")]).await;
    for group in 0..6i64 {
        let mut builder = BatchBuilder::new(Compression::None);
        for n in 0..4 {
            builder.push(1000 + group * 40 + n * 10, None, Some(&[0; 2000]), &[]).unwrap();
        }
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let receiver = partition.append(builder.finish(None).unwrap(), None, Acks::All, permit).await;
        receiver.await.unwrap().unwrap();
    }
    let decompressor = Decompressor::new(64 << 20);
    for tiered in [false, true] {
        if tiered {
            bench.run_maintenance(&partition).await;
            assert!(partition.watermarks().tiered_end > Offset::ZERO);
        }
        for (time, offset) in [(0, 0), (1000, 0), (1001, 1), (1115, 12), (1230, 23)] {
            let found = partition
                .reader()
                .offset_for_time(time, usize::MAX, &decompressor)
                .await
                .unwrap()
                .expect("a record has that timestamp or a later one");
            assert_eq!((found.0.get(), found.1), (offset, 1000 + i64::try_from(offset).unwrap() * 10), "{time}");
        }
        assert_eq!(partition.reader().offset_for_time(1231, usize::MAX, &decompressor).await.unwrap(), None);
    }
}

/// Regression: a producer may set any time in the header of a compressed batch. A search by time returned the header's
/// time of 2^62 for a record with a timestamp of 1970. It must compare the timestamps of the records.
#[tokio::test]
async fn time_without_a_record_in_the_batch_is_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench
        .open(&[("segment.bytes", "16384"), ("retention.ms", "-1"), ("message.timestamp.after.max.ms", "-1")])
        .await;
    let decompressor = Decompressor::new(64 << 20);
    // The second and the third batch have a header time far in the future, and the third batch cannot be decoded.
    for (time, header_time, is_corrupt) in
        [(1000, 1000, false), (2000, 1 << 62, false), (0, 1 << 62, true), (3000, 3000, false)]
    {
        let mut builder = BatchBuilder::new(Compression::Gzip);
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .take(9000)
        .collect();
        builder.push(time, None, Some(&noise), &[]).unwrap();
        let batch = builder.finish(None).unwrap();
        let mut bytes = bytes::BytesMut::from(&batch.to_bytes()[..]);
        bytes[35..43].copy_from_slice(&i64::to_be_bytes(header_time));
        if is_corrupt {
            bytes[70..90].fill(7);
        }
        let crc = crc32c::crc32c(&bytes[21..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let receiver = partition.append(Batch::parse(bytes.freeze()).unwrap(), None, Acks::All, permit).await;
        receiver.await.unwrap().unwrap();
    }
    for tiered in [false, true] {
        if tiered {
            bench.run_maintenance(&partition).await;
            assert!(partition.watermarks().tiered_end > Offset::ZERO);
        }
        for (time, found) in [(0, Some((0, 1000))), (1001, Some((1, 2000))), (2001, Some((3, 3000))), (3001, None)] {
            let result = partition.reader().offset_for_time(time, usize::MAX, &decompressor).await.unwrap();
            assert_eq!(result.map(|(offset, time, _)| (offset.get(), time)), found, "{time}, tiered: {tiered}");
        }
        // Without memory to open the batch, the search returns the offset of the batch without a timestamp, and so
        // skips no record.
        let result = partition.reader().offset_for_time(1001, usize::MAX, &Decompressor::new(4 << 10)).await.unwrap();
        assert_eq!(result.map(|(offset, time, _)| (offset.get(), time)), Some((1, -1)), "tiered: {tiered}");
    }
}
