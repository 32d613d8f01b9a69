//! Raw gRPC calls to a broker, and batches that are encoded by hand. The calls are valid and invalid requests as a
//! client in any language may send them.
//!
//! These functions do not use the library's client or batch builder. A mistake that the broker and the library share
//! would otherwise stay hidden.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use strandline::{
    limits,
    proto::{
        error::ApiError,
        v1::{
            Acks, AppendRequest, AppendResponse, CreateTopicRequest, FetchPartition, GetMetadataRequest,
            ListOffsetsRequest, OffsetQuery, ReadRequest, Record, RecordList, admin_client::AdminClient,
            append_request::Payload, log_client::LogClient, offset_query::At,
        },
    },
    task::clock,
};
use tonic::transport::{Channel, Endpoint};

/// Returns a channel that connects at its first call. Must be called within an async runtime.
fn channel(address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{address}"))
        .expect("an address is a URI")
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .connect_lazy()
}

/// Returns a client of the `Log` service at an address. The client connects at its first call.
pub(crate) fn log(address: SocketAddr) -> LogClient<Channel> {
    LogClient::new(channel(address)).max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
}

/// Returns a client of the `Admin` service at an address. The client connects at its first call.
pub(crate) fn admin(address: SocketAddr) -> AdminClient<Channel> {
    AdminClient::new(channel(address))
}

/// Creates a topic. The creation must succeed.
pub(crate) async fn create_topic(address: SocketAddr, name: &str, partitions: u32, config: &[(&str, &str)]) {
    let config = config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let request = CreateTopicRequest { name: name.to_owned(), partitions, config, ..Default::default() };
    admin(address).create_topic(request).await.expect("the topic is created");
}

/// Returns the address of a partition's leader, from the metadata of the broker that reports the newest leader epoch. A
/// broker that was isolated may report an older leader. Returns `None` if there is no leader or no broker responds.
pub(crate) async fn leader(brokers: &[SocketAddr], topic: &str, partition: i32) -> Option<SocketAddr> {
    let mut newest = None;
    for address in brokers {
        let request = GetMetadataRequest { topics: vec![topic.to_owned()], all_topics: false };
        let Ok(response) = admin(*address).get_metadata(request).await else { continue };
        let response = response.into_inner();
        let mut partitions = response.topics.iter().flat_map(|topic| &topic.partitions);
        let Some(known) = partitions.find(|one| one.partition == partition) else { continue };
        let leader = response.brokers.iter().find(|broker| Some(broker.id) == known.leader);
        newest = newest.max(Some((known.leader_epoch, leader.and_then(|broker| broker.address.parse().ok()))));
    }
    newest?.1
}

/// Returns an append request with a list of records that have these values.
pub(crate) fn append_plain(topic: &str, partition: i32, values: Vec<Bytes>) -> AppendRequest {
    let records = values.into_iter().map(|value| Record { value: Some(value), ..Default::default() }).collect();
    request(topic, partition, Payload::Records(RecordList { records }))
}

/// Returns an append request with these bytes as the batch, valid or not.
pub(crate) fn append_batch(topic: &str, partition: i32, batch: impl Into<Bytes>) -> AppendRequest {
    request(topic, partition, Payload::Batch(batch.into()))
}

/// Returns an append request with `acks=all` and a timeout of 10 s.
fn request(topic: &str, partition: i32, payload: Payload) -> AppendRequest {
    AppendRequest {
        topic: topic.to_owned(),
        partition,
        acks: Acks::All.into(),
        timeout_ms: 10_000,
        payload: Some(payload),
        ..Default::default()
    }
}

/// Makes one append call. Returns a failure as the [`ApiError`] in its status.
pub(crate) async fn append(log: &mut LogClient<Channel>, request: AppendRequest) -> Result<AppendResponse, ApiError> {
    log.append(request).await.map(tonic::Response::into_inner).map_err(|status| ApiError::from(&status))
}

/// Returns the latest offset of a partition: the first offset that is not committed.
pub(crate) async fn latest(log: &mut LogClient<Channel>, topic: &str, partition: i32) -> Result<i64, ApiError> {
    let query = OffsetQuery { topic: topic.to_owned(), partition, at: Some(At::Latest(true)) };
    let response = log.list_offsets(ListOffsetsRequest { queries: vec![query] }).await;
    let responses = response.map_err(|status| ApiError::from(&status))?.into_inner().results;
    let response = responses.into_iter().next().expect("one result for one query");
    response.error.map_or(Ok(response.offset), |error| Err(error.into()))
}

/// Reads the records of `from..end`, and waits for records that do not exist yet. Returns fewer records if none arrives
/// for 30 s.
pub(crate) async fn read_range(
    log: &mut LogClient<Channel>,
    topic: &str,
    partition: i32,
    from: i64,
    end: i64,
) -> Result<Vec<Record>, ApiError> {
    let (mut next, mut records) = (from, Vec::new());
    let mut deadline = clock::monotonic() + Duration::from_secs(30);
    while next < end && clock::monotonic() < deadline {
        let request = ReadRequest {
            partitions: vec![FetchPartition { topic: topic.to_owned(), partition, offset: next, ..Default::default() }],
            max_wait_ms: 200,
            decode: true,
            ..Default::default()
        };
        let response = log.read(request).await.map_err(|status| ApiError::from(&status))?.into_inner();
        for part in response.partitions {
            if let Some(error) = part.error {
                return Err(error.into());
            }
            if part.next_offset > next {
                next = part.next_offset;
                deadline = clock::monotonic() + Duration::from_secs(30);
            }
            records.extend(part.records);
        }
    }
    records.retain(|record| record.offset < end);
    Ok(records)
}

/// Returns an uncompressed Kafka record batch, version 2, with these values, as a producer sends it.
pub(crate) fn batch(values: &[&[u8]]) -> Vec<u8> {
    let mut records = Vec::new();
    for (delta, value) in values.iter().enumerate() {
        let mut body = vec![0];
        varint(&mut body, 0);
        varint(&mut body, i64::try_from(delta).expect("few records"));
        varint(&mut body, -1);
        varint(&mut body, i64::try_from(value.len()).expect("a length"));
        body.extend_from_slice(value);
        varint(&mut body, 0);
        varint(&mut records, i64::try_from(body.len()).expect("a length"));
        records.extend_from_slice(&body);
    }
    raw_batch(&records, i32::try_from(values.len()).expect("few records"), 0)
}

/// Returns a batch with a valid header for `count` records, followed by the bytes `records`, which need not be valid.
pub(crate) fn raw_batch(records: &[u8], count: i32, attributes: i16) -> Vec<u8> {
    let mut out = Vec::with_capacity(61 + records.len());
    out.extend_from_slice(&0_i64.to_be_bytes());
    out.extend_from_slice(&i32::try_from(49 + records.len()).expect("a small batch").to_be_bytes());
    out.extend_from_slice(&(-1_i32).to_be_bytes());
    out.push(2);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&attributes.to_be_bytes());
    out.extend_from_slice(&(count.wrapping_sub(1)).to_be_bytes());
    out.extend_from_slice(&1_700_000_000_000_i64.to_be_bytes());
    out.extend_from_slice(&1_700_000_000_000_i64.to_be_bytes());
    out.extend_from_slice(&(-1_i64).to_be_bytes());
    out.extend_from_slice(&(-1_i16).to_be_bytes());
    out.extend_from_slice(&(-1_i32).to_be_bytes());
    out.extend_from_slice(&count.to_be_bytes());
    out.extend_from_slice(records);
    renew_crc(&mut out);
    out
}

/// Sets the CRC field of a batch to the checksum of its current bytes.
pub(crate) fn renew_crc(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// Appends a number as a zigzag varint, as Kafka encodes it.
pub(crate) fn varint(out: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)).cast_unsigned();
    while rest >= 0x80 {
        out.push(rest.to_le_bytes()[0] | 0x80);
        rest >>= 7;
    }
    out.push(rest.to_le_bytes()[0]);
}

#[test]
fn batch_made_by_hand_is_valid_for_the_library() {
    let bytes = batch(&[b"one", b"", b"three"]);
    let parsed = strandline::record::Batch::parse(bytes.into()).expect("a valid batch");
    assert_eq!((parsed.count(), parsed.max_timestamp()), (3, 1_700_000_000_000));
    assert_eq!(parsed.check_client(), Ok(()));
}

#[test]
fn varints_match_those_of_kafka() {
    let encoded = |value| {
        let mut out = Vec::new();
        varint(&mut out, value);
        out
    };
    assert_eq!(encoded(0), [0]);
    assert_eq!(encoded(-1), [1]);
    assert_eq!(encoded(1), [2]);
    assert_eq!(encoded(64), [0x80, 1]);
    assert_eq!(encoded(i64::MIN), [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
}
