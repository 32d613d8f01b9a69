//! The reference of the throughput figures: the same gRPC services with nothing behind them.
//!
//! `Produce` answers every request at once and throws its bytes away. `Fetch` sends prepared batches as fast as the
//! caller takes them. Listener, codec, windows and message limits are those of the broker (`server/grpc.rs`), so what
//! `strandline bench` carries to this server is what the transport, the client and the machine allow, and what a broker
//! loses against it is the broker's own.
//!
//! Any topic exists here and has `--partitions` partitions. Offsets mean nothing but that they are dense when read.
//! It prints the address that it listens on as its first line and runs until it is killed.

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

// The broker's, from server/grpc.rs.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const FRAME: u32 = 256 << 10;

/// Bytes of one fetch response where the request does not say.
const DEFAULT_FETCH_BYTES: usize = 1 << 20;

/// Responses that a fetch stream rotates through: by the time that one comes round again it has been encoded, so its
/// offsets can be rewritten in place. Their sum is larger than a core's cache, as real data is.
const RING: usize = 8;

/// Where the log of every partition claims to end.
const END: i64 = 1 << 50;

/// A gRPC server with Strandline's services that throws away what it is sent and makes up what it is asked for.
#[derive(Parser)]
struct Arguments {
    /// Where to listen; port 0 takes a free one.
    #[arg(default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Partitions of every topic.
    #[arg(long, default_value_t = 1)]
    partitions: i32,
    /// Bytes of one record's value in what is read.
    #[arg(long, default_value_t = 1024)]
    record_size: usize,
    /// Bytes of one batch in what is read.
    #[arg(long, default_value_t = 64 << 10)]
    batch_size: usize,
}

/// What all calls share.
struct Discard {
    address: SocketAddr,
    partitions: i32,
    batch: Prepared,
    next_producer: AtomicI64,
}

/// One batch to send over and over.
struct Prepared {
    bytes: Bytes,
    records: i64,
}

/// The services of a broker without one.
#[derive(Clone)]
struct Service(Arc<Discard>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
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
    /// A batch of incompressible records. At least one record goes in, whatever the sizes.
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
        // The leader epoch, which the checksum does not cover; a builder leaves it at -1.
        bytes[12..16].copy_from_slice(&0_i32.to_be_bytes());
        Ok(Self { bytes: bytes.freeze(), records })
    }
}

/// How many records a batch has, by its header; 0 where there is none.
fn records_of(append: Option<&v1::AppendRequest>) -> i64 {
    let payload = append.and_then(|append| append.payload.as_ref());
    match payload {
        Some(v1::append_request::Payload::Batch(batch)) => {
            batch.get(57..61).and_then(|count| count.try_into().ok()).map_or(0, i32::from_be_bytes).into()
        }
        Some(v1::append_request::Payload::Records(plain)) => i64::try_from(plain.records.len()).unwrap_or(i64::MAX),
        None => 0,
    }
}

fn appended(append: Option<&v1::AppendRequest>) -> v1::AppendResponse {
    v1::AppendResponse {
        base_offset: 0,
        end_offset: records_of(append),
        leader_epoch: 0,
        append_time_ms: -1,
        durability: v1::Durability::Memory.into(),
        replicas: 0,
        duplicate: false,
    }
}

/// One reader: its partitions in turn, one response each.
struct Session {
    discard: Arc<Discard>,
    requests: Streaming<v1::FetchRequest>,
    places: Vec<v1::FetchPartition>,
    turn: usize,
    /// Whole batches one after another, at most as many bytes as the first request asked for.
    ring: Vec<Bytes>,
    slot: usize,
}

impl Session {
    async fn next(&mut self) -> Option<Result<v1::FetchResponse, Status>> {
        loop {
            let request = if self.places.is_empty() {
                Some(self.requests.message().await)
            } else {
                self.requests.message().now_or_never()
            };
            match request {
                Some(Ok(Some(request))) => self.assign(request),
                Some(Err(status)) => return Some(Err(status)),
                Some(Ok(None)) if self.places.is_empty() => return None,
                Some(Ok(None)) | None => return Some(Ok(self.answer())),
            }
        }
    }

    fn assign(&mut self, request: v1::FetchRequest) {
        for mut place in request.partitions {
            let old = self.places.iter().find(|old| old.topic == place.topic && old.partition == place.partition);
            if let Some(old) = old.filter(|_| !request.restart) {
                place.offset = old.offset;
            }
            self.places.retain(|old| old.topic != place.topic || old.partition != place.partition);
            self.places.push(place);
        }
        if self.ring.is_empty() {
            let most = if request.max_bytes == 0 { DEFAULT_FETCH_BYTES } else { request.max_bytes as usize };
            let batches = (most.min(limits::MAX_FETCH_BYTES) / self.discard.batch.bytes.len()).max(1);
            self.ring = (0..RING).map(|_| Bytes::from(self.discard.batch.bytes.repeat(batches))).collect();
        }
    }

    fn answer(&mut self) -> v1::FetchResponse {
        let Prepared { bytes: batch, records } = &self.discard.batch;
        self.turn = (self.turn + 1) % self.places.len();
        self.slot = (self.slot + 1) % self.ring.len();
        let place = &mut self.places[self.turn];
        // In place, unless the transport has not taken the last use of this slot yet.
        let taken = std::mem::take(&mut self.ring[self.slot]);
        let mut bytes = taken.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
        for batch in bytes.chunks_exact_mut(batch.len()) {
            batch[..8].copy_from_slice(&place.offset.to_be_bytes());
            place.offset += records;
        }
        let chunk = bytes.freeze();
        self.ring[self.slot] = chunk.clone();
        v1::FetchResponse {
            partitions: vec![v1::FetchedPartition {
                topic: place.topic.clone(),
                partition: place.partition,
                error: None,
                log_start: 0,
                high_watermark: END,
                chunks: vec![chunk],
                records: Vec::new(),
                next_offset: place.offset,
                from_follower: false,
                leader_epoch: 0,
            }],
            in_doubt: false,
        }
    }
}

#[tonic::async_trait]
impl log_server::Log for Service {
    async fn append(&self, request: Request<v1::AppendRequest>) -> Result<Response<v1::AppendResponse>, Status> {
        Ok(Response::new(appended(Some(request.get_ref()))))
    }

    type ProduceStream = Answers<v1::ProduceResponse>;

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let answers = request.into_inner().map(|request| {
            let request = request?;
            let result = v1::produce_response::Result::Appended(appended(request.append.as_ref()));
            Ok(v1::ProduceResponse { correlation: request.correlation, result: Some(result) })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn read(&self, _request: Request<v1::ReadRequest>) -> Result<Response<v1::ReadResponse>, Status> {
        Err(Status::unimplemented("this server only streams: use Fetch"))
    }

    type FetchStream = Answers<v1::FetchResponse>;

    async fn fetch(
        &self,
        request: Request<Streaming<v1::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let session = Session {
            discard: Arc::clone(&self.0),
            requests: request.into_inner(),
            places: Vec::new(),
            turn: 0,
            ring: Vec::new(),
            slot: 0,
        };
        let answers = stream::unfold(session, |mut session| async move { Some((session.next().await?, session)) });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let answer = |query: v1::OffsetQuery| {
            let latest = matches!(query.at, Some(v1::offset_query::At::Latest(_)));
            v1::OffsetAnswer { error: None, offset: if latest { END } else { 0 }, timestamp_ms: -1, leader_epoch: 0 }
        };
        let answers = request.into_inner().queries.into_iter().map(answer).collect();
        Ok(Response::new(v1::ListOffsetsResponse { answers, in_doubt: false }))
    }

    async fn init_producer(
        &self,
        _request: Request<v1::InitProducerRequest>,
    ) -> Result<Response<v1::InitProducerResponse>, Status> {
        let producer_id = self.0.next_producer.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(v1::InitProducerResponse { producer_id, producer_epoch: 0 }))
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

fn no_orders() -> Status {
    Status::unimplemented("there is one broker here, and nothing to order")
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
            in_doubt: false,
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
        let partition = |partition| v1::PartitionState {
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
        Err(Status::unimplemented("every topic here has the partitions that --partitions says"))
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
        Err(no_orders())
    }

    async fn drain_broker(
        &self,
        _request: Request<v1::DrainBrokerRequest>,
    ) -> Result<Response<v1::DrainBrokerResponse>, Status> {
        Err(no_orders())
    }

    async fn restore_broker(
        &self,
        _request: Request<v1::RestoreBrokerRequest>,
    ) -> Result<Response<v1::RestoreBrokerResponse>, Status> {
        Err(no_orders())
    }

    async fn reassign(&self, _request: Request<v1::ReassignRequest>) -> Result<Response<v1::ReassignResponse>, Status> {
        Err(no_orders())
    }

    async fn list_reassignments(
        &self,
        _request: Request<v1::ListReassignmentsRequest>,
    ) -> Result<Response<v1::ListReassignmentsResponse>, Status> {
        Err(no_orders())
    }

    async fn cancel_reassignment(
        &self,
        _request: Request<v1::CancelReassignmentRequest>,
    ) -> Result<Response<v1::CancelReassignmentResponse>, Status> {
        Err(no_orders())
    }

    async fn elect_leader(
        &self,
        _request: Request<v1::ElectLeaderRequest>,
    ) -> Result<Response<v1::ElectLeaderResponse>, Status> {
        Err(no_orders())
    }

    async fn rebuild_manifest(
        &self,
        _request: Request<v1::RebuildManifestRequest>,
    ) -> Result<Response<v1::RebuildManifestResponse>, Status> {
        Err(no_orders())
    }
}
