//! The reference of the throughput figures: a server with a broker's gRPC services and no storage.
//!
//! `Produce` acknowledges and discards every batch at once; `Fetch` sends prepared batches as fast as the client
//! accepts them. Codec and message limits are those of a broker, and the HTTP/2 windows are the largest that a broker
//! grants (`server/grpc.rs`). So `strandline bench` measures the limit of transport, client and machine here. The
//! difference of a broker's figures from these is the broker's own cost. Every topic exists and has `--partitions`
//! partitions. Read offsets are dense and have no other meaning. The first output line is the server's address. The
//! server runs until it is killed.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use clap::Parser;
use futures::{FutureExt as _, Stream, StreamExt as _, stream};
use strandline::{
    limits,
    model::Compression,
    proto::v1::{self, admin_server, log_server},
    record::BatchBuilder,
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

// The windows are the largest that a broker grants (server/grpc.rs). Frames may be larger than a broker allows, which
// is 32 KiB.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const FRAME: u32 = 256 << 10;

/// Size of a fetch response in bytes, if the request sets none.
const DEFAULT_FETCH_BYTES: usize = 1 << 20;

/// Number of prepared responses that a fetch stream sends in rotation. A response is usually encoded before it is sent
/// again, so its offsets can be rewritten in place. All responses together exceed a core's cache, as real data does.
const RING: usize = 8;

/// Log end that every partition reports.
const END: i64 = 1 << 50;

/// A gRPC server with Strandline's services that discards produced batches and generates fetched ones.
#[derive(Parser)]
struct Args {
    /// Address to listen on; port 0 selects a free port.
    #[arg(default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Number of partitions of every topic.
    #[arg(long, default_value_t = 1)]
    partitions: i32,
    /// Bytes of the value of a fetched record.
    #[arg(long, default_value_t = 1024)]
    record_size: usize,
    /// Bytes of a fetched batch.
    #[arg(long, default_value_t = 64 << 10)]
    batch_size: usize,
}

/// State shared by all calls.
struct Discard {
    address: SocketAddr,
    partitions: i32,
    batch: Prepared,
    next_producer: AtomicI64,
}

/// One batch that is sent repeatedly.
struct Prepared {
    bytes: Bytes,
    records: i64,
}

/// The gRPC services of this server.
#[derive(Clone)]
struct Service(Arc<Discard>);

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Args::parse();
    let listener = TcpListener::bind(arguments.listen).await?;
    let address = listener.local_addr()?;
    let service = Service(Arc::new(Discard {
        address,
        partitions: arguments.partitions,
        batch: Prepared::new(arguments.record_size, arguments.batch_size)?,
        next_producer: AtomicI64::new(1),
    }));
    let log = log_server::LogServer::new(service.clone())
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let mut out = io::stdout();
    writeln!(out, "{address}")?;
    out.flush()?;
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .add_service(log)
        .add_service(admin_server::AdminServer::new(service))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await?;
    Ok(())
}

impl Prepared {
    /// Builds a batch of incompressible records. The batch has at least one record, for any sizes.
    fn new(record_size: usize, batch_size: usize) -> anyhow::Result<Self> {
        let mut value = vec![0; record_size];
        let mut builder = BatchBuilder::with_capacity(Compression::None, batch_size);
        while builder.is_empty()
            || builder.encoded_len() + BatchBuilder::record_len(None, Some(&value), &[]) <= batch_size
        {
            strandline::task::random::fill(&mut value);
            builder.push(0, None, Some(&value), &[])?;
        }
        let records = builder.count().into();
        let mut bytes = BytesMut::from(&builder.finish(None)?.to_bytes()[..]);
        // Sets the leader epoch from the builder's -1 to 0. The checksum does not cover this field.
        bytes[12..16].copy_from_slice(&0_i32.to_be_bytes());
        Ok(Self { bytes: bytes.freeze(), records })
    }
}

/// Returns the number of records in a request, for a batch as its header states it; 0 without a payload.
fn records_of(append: Option<&v1::AppendRequest>) -> i64 {
    let payload = append.and_then(|append| append.payload.as_ref());
    match payload {
        Some(v1::append_request::Payload::Batch(batch)) => {
            batch.get(57..61).and_then(|count| count.try_into().ok()).map_or(0, i32::from_be_bytes).into()
        }
        Some(v1::append_request::Payload::Records(list)) => i64::try_from(list.records.len()).unwrap_or(i64::MAX),
        None => 0,
    }
}

fn appended(append: Option<&v1::AppendRequest>) -> v1::AppendResponse {
    v1::AppendResponse {
        base_offset: 0,
        end_offset: records_of(append),
        leader_epoch: 0,
        append_time_ms: -1,
        durability: v1::AckDurability::Memory.into(),
        replicas: 0,
        duplicate: false,
    }
}

/// One fetch stream. Each response is for one partition, and the partitions follow one another in rotation.
struct Session {
    discard: Arc<Discard>,
    requests: Streaming<v1::FetchRequest>,
    partitions: Vec<v1::FetchPartition>,
    /// Index in `partitions` of the last response.
    last_partition: usize,
    /// Prepared responses of consecutive batches. Each has at most the bytes that the first request allows, and at
    /// least one batch.
    ring: Vec<Bytes>,
    /// Index in `ring` of the last response.
    slot: usize,
}

impl Session {
    /// Returns the next response. First applies the requests that have arrived; without partitions, waits for a
    /// request. Returns `None` if the client has ended its requests and named no partition.
    async fn next(&mut self) -> Option<Result<v1::FetchResponse, Status>> {
        loop {
            let request = if self.partitions.is_empty() {
                Some(self.requests.message().await)
            } else {
                self.requests.message().now_or_never()
            };
            match request {
                Some(Ok(Some(request))) => self.assign(request),
                Some(Err(status)) => return Some(Err(status)),
                Some(Ok(None)) if self.partitions.is_empty() => return None,
                Some(Ok(None)) | None => return Some(Ok(self.respond())),
            }
        }
    }

    /// Adds the partitions of a request to the stream. A partition that is already read continues at its offset, unless
    /// the request restarts it. Prepares the responses at the first request.
    fn assign(&mut self, request: v1::FetchRequest) {
        for mut partition in request.partitions {
            let old =
                self.partitions.iter().find(|old| old.topic == partition.topic && old.partition == partition.partition);
            if let Some(old) = old.filter(|_| !request.restart) {
                partition.offset = old.offset;
            }
            self.partitions.retain(|old| old.topic != partition.topic || old.partition != partition.partition);
            self.partitions.push(partition);
        }
        if self.ring.is_empty() {
            let max_bytes = if request.max_bytes == 0 { DEFAULT_FETCH_BYTES } else { request.max_bytes as usize };
            let batches = (max_bytes.min(limits::MAX_FETCH_BYTES) / self.discard.batch.bytes.len()).max(1);
            self.ring = (0..RING).map(|_| Bytes::from(self.discard.batch.bytes.repeat(batches))).collect();
        }
    }

    /// Returns a response with the next batches of the next partition.
    fn respond(&mut self) -> v1::FetchResponse {
        let Prepared { bytes: batch, records } = &self.discard.batch;
        self.last_partition = (self.last_partition + 1) % self.partitions.len();
        self.slot = (self.slot + 1) % self.ring.len();
        let partition = &mut self.partitions[self.last_partition];
        // The offsets are rewritten in place, unless the transport still uses the last response of this slot; then the
        // response is copied.
        let previous = std::mem::take(&mut self.ring[self.slot]);
        let mut bytes = previous.try_into_mut().unwrap_or_else(|bytes| BytesMut::from(&bytes[..]));
        for batch in bytes.chunks_exact_mut(batch.len()) {
            batch[..8].copy_from_slice(&partition.offset.to_be_bytes());
            partition.offset += records;
        }
        let chunk = bytes.freeze();
        self.ring[self.slot] = chunk.clone();
        v1::FetchResponse {
            partitions: vec![v1::FetchedPartition {
                topic: partition.topic.clone(),
                partition: partition.partition,
                error: None,
                log_start: 0,
                high_watermark: END,
                chunks: vec![chunk],
                records: Vec::new(),
                next_offset: partition.offset,
                from_follower: false,
                leader_epoch: 0,
            }],
            lease_expired: false,
        }
    }
}

#[tonic::async_trait]
impl log_server::Log for Service {
    async fn append(&self, request: Request<v1::AppendRequest>) -> Result<Response<v1::AppendResponse>, Status> {
        Ok(Response::new(appended(Some(request.get_ref()))))
    }

    type ProduceStream = ResponseStream<v1::ProduceResponse>;

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let responses = request.into_inner().map(|request| {
            let request = request?;
            let result = v1::produce_response::Result::Appended(appended(request.append.as_ref()));
            Ok(v1::ProduceResponse { correlation_id: request.correlation_id, result: Some(result) })
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn read(&self, _request: Request<v1::ReadRequest>) -> Result<Response<v1::ReadResponse>, Status> {
        Err(Status::unimplemented("this server has no Read: use Fetch"))
    }

    type FetchStream = ResponseStream<v1::FetchResponse>;

    async fn fetch(
        &self,
        request: Request<Streaming<v1::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let session = Session {
            discard: Arc::clone(&self.0),
            requests: request.into_inner(),
            partitions: Vec::new(),
            last_partition: 0,
            ring: Vec::new(),
            slot: 0,
        };
        let responses = stream::unfold(session, |mut session| async move { Some((session.next().await?, session)) });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let result = |query: v1::OffsetQuery| {
            let latest = matches!(query.at, Some(v1::offset_query::At::Latest(_)));
            v1::OffsetResult { error: None, offset: if latest { END } else { 0 }, timestamp_ms: -1, leader_epoch: 0 }
        };
        let results = request.into_inner().queries.into_iter().map(result).collect();
        Ok(Response::new(v1::ListOffsetsResponse { results, lease_expired: false }))
    }

    async fn init_producer_id(
        &self,
        _request: Request<v1::InitProducerIdRequest>,
    ) -> Result<Response<v1::InitProducerIdResponse>, Status> {
        let producer_id = self.0.next_producer.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(v1::InitProducerIdResponse { producer_id, producer_epoch: 0 }))
    }
}

impl Discard {
    fn summary(&self, name: String) -> v1::TopicSummary {
        v1::TopicSummary {
            name,
            topic_id: "00000000-0000-4000-8000-000000000001".to_owned(),
            partitions: self.partitions.unsigned_abs(),
            replication_factor: 1,
            config: std::collections::HashMap::new(),
        }
    }

    fn topic(&self, name: String) -> v1::TopicMetadata {
        let partition = |partition| v1::PartitionMetadata { partition, leader: Some(1), ..Default::default() };
        v1::TopicMetadata {
            topic_id: self.summary(String::new()).topic_id,
            name,
            error: None,
            partitions: (0..self.partitions).map(partition).collect(),
            max_message_bytes: u32::try_from(limits::MAX_BATCH_BYTES).unwrap_or(u32::MAX),
            compression_type: "producer".to_owned(),
        }
    }
}

fn unimplemented_operation() -> Status {
    Status::unimplemented("this server has one broker and no admin operations")
}

#[tonic::async_trait]
impl admin_server::Admin for Service {
    async fn get_metadata(
        &self,
        request: Request<v1::GetMetadataRequest>,
    ) -> Result<Response<v1::GetMetadataResponse>, Status> {
        let broker = v1::Broker { id: 1, address: self.0.address.to_string(), rack: String::new() };
        let topics = request.into_inner().topics.into_iter().map(|name| self.0.topic(name)).collect();
        let cluster = "discard".to_owned();
        Ok(Response::new(v1::GetMetadataResponse {
            cluster,
            brokers: vec![broker],
            topics,
            controller: None,
            lease_expired: false,
        }))
    }

    async fn create_topic(
        &self,
        request: Request<v1::CreateTopicRequest>,
    ) -> Result<Response<v1::CreateTopicResponse>, Status> {
        let topic = Some(self.0.summary(request.into_inner().name));
        Ok(Response::new(v1::CreateTopicResponse { topic }))
    }

    async fn list_topics(
        &self,
        _request: Request<v1::ListTopicsRequest>,
    ) -> Result<Response<v1::ListTopicsResponse>, Status> {
        Ok(Response::new(v1::ListTopicsResponse { topics: Vec::new() }))
    }

    async fn describe_topic(
        &self,
        request: Request<v1::DescribeTopicRequest>,
    ) -> Result<Response<v1::DescribeTopicResponse>, Status> {
        let partition = |partition| v1::PartitionDescription {
            partition,
            leader: Some(1),
            replicas: vec![1],
            isr: vec![1],
            high_watermark: END,
            log_end: END,
            ..Default::default()
        };
        Ok(Response::new(v1::DescribeTopicResponse {
            topic: Some(self.0.summary(request.into_inner().name)),
            effective_config: std::collections::HashMap::new(),
            partitions: (0..self.0.partitions).map(partition).collect(),
            config_source: std::collections::HashMap::new(),
        }))
    }

    async fn alter_topic(
        &self,
        request: Request<v1::AlterTopicRequest>,
    ) -> Result<Response<v1::AlterTopicResponse>, Status> {
        let topic = Some(self.0.summary(request.into_inner().name));
        Ok(Response::new(v1::AlterTopicResponse { topic }))
    }

    async fn add_partitions(
        &self,
        _request: Request<v1::AddPartitionsRequest>,
    ) -> Result<Response<v1::AddPartitionsResponse>, Status> {
        Err(Status::unimplemented("every topic of this server has --partitions partitions"))
    }

    async fn delete_topic(
        &self,
        _request: Request<v1::DeleteTopicRequest>,
    ) -> Result<Response<v1::DeleteTopicResponse>, Status> {
        Ok(Response::new(v1::DeleteTopicResponse::default()))
    }

    async fn describe_cluster(
        &self,
        _request: Request<v1::DescribeClusterRequest>,
    ) -> Result<Response<v1::DescribeClusterResponse>, Status> {
        Err(unimplemented_operation())
    }

    async fn drain_broker(
        &self,
        _request: Request<v1::DrainBrokerRequest>,
    ) -> Result<Response<v1::DrainBrokerResponse>, Status> {
        Err(unimplemented_operation())
    }

    async fn undrain_broker(
        &self,
        _request: Request<v1::UndrainBrokerRequest>,
    ) -> Result<Response<v1::UndrainBrokerResponse>, Status> {
        Err(unimplemented_operation())
    }

    async fn reassign_partitions(
        &self,
        _request: Request<v1::ReassignPartitionsRequest>,
    ) -> Result<Response<v1::ReassignPartitionsResponse>, Status> {
        Err(unimplemented_operation())
    }

    async fn list_reassignments(
        &self,
        _request: Request<v1::ListReassignmentsRequest>,
    ) -> Result<Response<v1::ListReassignmentsResponse>, Status> {
        Err(unimplemented_operation())
    }

    async fn cancel_reassignment(
        &self,
        _request: Request<v1::CancelReassignmentRequest>,
    ) -> Result<Response<v1::CancelReassignmentResponse>, Status> {
        Err(unimplemented_operation())
    }

    async fn elect_leader(
        &self,
        _request: Request<v1::ElectLeaderRequest>,
    ) -> Result<Response<v1::ElectLeaderResponse>, Status> {
        Err(unimplemented_operation())
    }

    async fn rebuild_manifest(
        &self,
        _request: Request<v1::RebuildManifestRequest>,
    ) -> Result<Response<v1::RebuildManifestResponse>, Status> {
        Err(unimplemented_operation())
    }
}
