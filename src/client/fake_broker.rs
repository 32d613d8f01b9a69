//! Fake broker for the client's tests: one topic in memory behind the real gRPC interface, with Kafka's rules for
//! sequences. The broker fails as a test's script states.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
};

use bytes::Bytes;
use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    model::{LeaderEpoch, Offset, TopicId},
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, admin_server, log_server},
    },
    record::Batch,
    task::{
        Tasks,
        lock::{Mutex, MutexGuard},
    },
};

/// Action of the fake for one produce request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FakeResponse {
    /// Appends nothing and returns this error.
    Refuse(ErrorCode),
    /// Appends, and returns the error for an acknowledgement that timed out.
    AppendAndTimeOut,
    /// Appends, and breaks the stream before the response.
    AppendAndBreak,
    /// Breaks the stream without appending.
    Break,
    /// Appends, and sends the response after that of the next request.
    RespondLate,
    /// Appends and responds.
    Append,
    /// Appends, and never responds.
    Hold,
}

#[derive(Default)]
struct FakePartition {
    batches: Vec<Batch>,
    start: u64,
    /// By producer id: the next sequence, and the base sequence and base offset of the last batches.
    producers: BTreeMap<i64, (i32, VecDeque<(i32, u64)>)>,
}

impl FakePartition {
    fn end(&self) -> u64 {
        self.batches.last().map_or(self.start, |batch| batch.end_offset().get())
    }
}

pub(super) struct FakeState {
    partitions: Vec<FakePartition>,
    next_producer: i64,
    pub(super) script: VecDeque<FakeResponse>,
    /// Number of fetch responses before the one after which the stream breaks; `None` if no stream breaks.
    pub(super) fetches_until_break: Option<u32>,
    /// Number of fetch responses to corrupt.
    pub(super) corrupt_fetches: u32,
    pub(super) requests: u32,
    /// Address in the fake's metadata.
    pub(super) advertised: String,
    /// Error of every read; `None` if partitions can be read.
    pub(super) unreadable: Option<ErrorCode>,
    /// Other brokers, all in sync with the fake.
    pub(super) other_brokers: Vec<v1::Broker>,
    /// True if the fake is a follower: it serves only requests with `any_replica`.
    pub(super) is_follower: bool,
    /// Number of fetch responses sent.
    pub(super) fetches: u32,
    /// Leader epoch of the fake; `advertised_epoch` is the leader epoch in its metadata.
    pub(super) epoch: i32,
    pub(super) advertised_epoch: i32,
    /// True if the fake reports an expired lease.
    pub(super) lease_expired: bool,
    /// Number of metadata requests received.
    pub(super) metadata_requests: u32,
    /// Error of every admin call except `get_metadata`.
    pub(super) refusal: ApiError,
}

#[derive(Clone)]
pub(super) struct FakeBroker {
    state: Arc<Mutex<FakeState>>,
    /// Notified after an append, and when the lease expires.
    changed: watch::Sender<()>,
    tasks: Tasks,
    pub(super) address: SocketAddr,
}

impl FakeBroker {
    /// Starts a fake broker with topic "t" and this number of partitions on a free port.
    pub(super) async fn start(partitions: usize) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("bound");
        let state = FakeState {
            partitions: (0..partitions).map(|_| FakePartition::default()).collect(),
            next_producer: 100,
            script: VecDeque::new(),
            fetches_until_break: None,
            corrupt_fetches: 0,
            requests: 0,
            advertised: address.to_string(),
            unreadable: None,
            other_brokers: Vec::new(),
            is_follower: false,
            fetches: 0,
            epoch: 0,
            advertised_epoch: 0,
            lease_expired: false,
            metadata_requests: 0,
            refusal: ApiError::new(ErrorCode::TopicExists, "the topic exists already"),
        };
        let tasks = Tasks::new();
        let fake = Self { state: Arc::new(Mutex::new(state)), changed: watch::Sender::new(()), tasks, address };
        let server = tonic::transport::Server::builder()
            .add_service(log_server::LogServer::new(fake.clone()))
            .add_service(admin_server::AdminServer::new(fake.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let tasks = fake.tasks.clone();
        fake.tasks.spawn("fake-broker", async move {
            if let Some(result) = tasks.run_until_cancelled(server).await {
                result.expect("served");
            }
        });
        fake
    }

    pub(super) fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock()
    }

    pub(super) fn script(&self, actions: &[FakeResponse]) {
        self.state().script.extend(actions);
    }

    /// Returns all values of a partition, in order.
    pub(super) fn values(&self, partition: usize) -> Vec<String> {
        let state = self.state();
        let records = state.partitions[partition].batches.iter().flat_map(|batch| batch.records().expect("decodable"));
        let text = |value: Bytes| String::from_utf8(value.to_vec()).expect("text");
        records.map(|record| text(record.expect("decodable").1.value.expect("not null"))).collect()
    }

    pub(super) fn batches(&self, partition: usize) -> usize {
        self.state().partitions[partition].batches.len()
    }

    /// Makes the fake report an expired lease from now on.
    pub(super) fn expire_lease(&self) {
        self.state().lease_expired = true;
        self.changed.send_replace(());
    }

    /// Makes the records of a stored batch undecodable, with a valid checksum.
    pub(super) fn make_undecodable(&self, partition: usize, batch: usize) {
        const CRC: std::ops::Range<usize> = 17..21;
        const CODEC: usize = 22;
        let mut state = self.state();
        let batch = &mut state.partitions[partition].batches[batch];
        let mut bytes = batch.to_bytes().to_vec();
        bytes[CODEC] |= 1;
        let crc = crc32c::crc32c(&bytes[CRC.end..]);
        bytes[CRC].copy_from_slice(&crc.to_be_bytes());
        *batch = Batch::parse(bytes.into()).expect("valid header and checksum");
    }

    /// Moves the log start, and deletes the batches below it.
    pub(super) fn set_start(&self, partition: usize, start: u64) {
        let mut state = self.state();
        let partition = &mut state.partitions[partition];
        partition.start = start;
        partition.batches.retain(|batch| batch.end_offset().get() > start);
    }

    /// Appends a batch, and detects duplicates and gaps of idempotent producers.
    fn append(&self, request: &v1::AppendRequest) -> Result<v1::AppendResponse, ApiError> {
        let Some(v1::append_request::Payload::Batch(bytes)) = &request.payload else {
            return Err(ApiError::new(ErrorCode::InvalidRequest, "no batch"));
        };
        let mut batch = Batch::parse(bytes.clone()).expect("the client sends complete batches");
        let mut state = self.state();
        let number = usize::try_from(request.partition).expect("positive");
        let partition = &mut state.partitions[number];
        let mut base = partition.end();
        let mut duplicate = false;
        if let Some(producer) = batch.producer() {
            let (next, last) = partition.producers.entry(producer.id).or_default();
            if let Some((_, at)) = last.iter().find(|(sequence, _)| *sequence == producer.base_sequence) {
                base = *at;
                duplicate = true;
            } else if *next != producer.base_sequence {
                return Err(ApiError::new(
                    ErrorCode::OutOfOrderSequence,
                    format!("{} is not {next}", producer.base_sequence),
                ));
            } else {
                *next += i32::try_from(batch.count()).expect("few");
                last.push_back((producer.base_sequence, base));
                if last.len() > crate::limits::MAX_BATCHES_PER_PRODUCER {
                    last.pop_front();
                }
            }
        }
        let count = u64::from(batch.count());
        if !duplicate {
            batch.set_offset_and_epoch(Offset::new(base).expect("small"), LeaderEpoch(0));
            partition.batches.push(batch);
            self.changed.send_replace(());
        }
        Ok(v1::AppendResponse {
            base_offset: base.cast_signed(),
            end_offset: (base + count).cast_signed(),
            append_time_ms: -1,
            durability: v1::AckDurability::Persisted.into(),
            replicas: 1,
            duplicate,
            ..Default::default()
        })
    }

    /// Executes the next action of the script, or `Append` without one, and returns the action and its result.
    fn perform(&self, request: &v1::AppendRequest) -> (FakeResponse, Result<v1::AppendResponse, ApiError>) {
        let action = {
            let mut state = self.state();
            state.requests += 1;
            state.script.pop_front().unwrap_or(FakeResponse::Append)
        };
        let result = match action {
            FakeResponse::Refuse(reason) => Err(ApiError::new(reason, "refused as scripted")),
            FakeResponse::Break => Err(ApiError::new(ErrorCode::NotReady, "not sent")),
            FakeResponse::AppendAndTimeOut => {
                self.append(request).and_then(|_| Err(ApiError::new(ErrorCode::Timeout, "refused as scripted")))
            }
            FakeResponse::AppendAndBreak | FakeResponse::RespondLate | FakeResponse::Append | FakeResponse::Hold => {
                self.append(request)
            }
        };
        (action, result)
    }

    /// Runs one produce stream under the script.
    async fn serve_produce(
        self,
        mut requests: Streaming<v1::ProduceRequest>,
        responses: mpsc::Sender<Result<v1::ProduceResponse, Status>>,
    ) {
        let mut late = None;
        while let Ok(Some(request)) = requests.message().await {
            let (action, result) = self.perform(&request.append.expect("the client sets the field"));
            if matches!(action, FakeResponse::Break | FakeResponse::AppendAndBreak) {
                let _ = responses.send(Err(Status::unavailable("broken as scripted"))).await;
                return;
            }
            let result = match result {
                Ok(appended) => v1::produce_response::Result::Appended(appended),
                Err(error) => v1::produce_response::Result::Error(error.into()),
            };
            if action == FakeResponse::Hold {
                continue;
            }
            let response = v1::ProduceResponse { correlation_id: request.correlation_id, result: Some(result) };
            if action == FakeResponse::RespondLate {
                late = Some(response);
                continue;
            }
            let _ = responses.send(Ok(response)).await;
            if let Some(late) = late.take() {
                let _ = responses.send(Ok(late)).await;
            }
        }
    }

    /// Returns the next response for a partition: an error or one batch; `None` at the end of its log.
    fn fetched(&self, request: &v1::FetchPartition, any_replica: bool) -> Option<v1::FetchedPartition> {
        let mut state = self.state();
        let number = usize::try_from(request.partition).expect("positive");
        let (start, end) = (state.partitions[number].start, state.partitions[number].end());
        let offset = request.offset.cast_unsigned();
        let mut fetched = v1::FetchedPartition {
            topic: request.topic.clone(),
            partition: request.partition,
            log_start: start.cast_signed(),
            high_watermark: end.cast_signed(),
            from_follower: state.is_follower,
            leader_epoch: state.epoch,
            ..Default::default()
        };
        if state.is_follower && !any_replica || request.leader_epoch > state.epoch {
            fetched.error = Some(ApiError::new(ErrorCode::NotLeader, "a follower, or an older epoch").into());
            return Some(fetched);
        }
        if let Some(reason) = state.unreadable {
            fetched.error = Some(ApiError::new(reason, "unreadable as configured").into());
            return Some(fetched);
        }
        if !(start..=end).contains(&offset) {
            let error =
                ApiError::new(ErrorCode::OffsetOutOfRange, "out of range").with("start", start).with("end", end);
            fetched.error = Some(error.into());
            return Some(fetched);
        }
        // A response has one batch, so that a stream has many responses. The header is a separate chunk.
        let batch = state.partitions[number].batches.iter().find(|batch| batch.end_offset().get() > offset)?.clone();
        let mut records = batch.records_bytes().to_vec();
        if state.corrupt_fetches > 0 {
            state.corrupt_fetches -= 1;
            records[0] ^= 1;
        }
        fetched.next_offset = batch.end_offset().as_i64();
        fetched.chunks = vec![Bytes::copy_from_slice(batch.header()), records.into()];
        Some(fetched)
    }

    /// Runs one fetch stream: sends one batch per response, and waits at the end of the log.
    async fn serve_fetch(
        self,
        mut partitions: Vec<v1::FetchPartition>,
        any_replica: bool,
        responses: mpsc::Sender<Result<v1::FetchResponse, Status>>,
    ) {
        let mut changed = self.changed.subscribe();
        let mut reported_expired = false;
        loop {
            changed.borrow_and_update();
            let mut idle = true;
            for index in (0..partitions.len()).rev() {
                let Some(fetched) = self.fetched(&partitions[index], any_replica) else { continue };
                idle = false;
                if fetched.error.is_some() {
                    partitions.remove(index);
                } else {
                    partitions[index].offset = fetched.next_offset;
                }
                self.state().fetches += 1;
                if responses
                    .send(Ok(v1::FetchResponse { partitions: vec![fetched], lease_expired: false }))
                    .await
                    .is_err()
                {
                    return;
                }
                let breaks = match &mut self.state().fetches_until_break {
                    Some(0) => true,
                    Some(remaining) => {
                        *remaining -= 1;
                        false
                    }
                    None => false,
                };
                if breaks {
                    self.state().fetches_until_break = None;
                    let _ = responses.send(Err(Status::unavailable("broken as scripted"))).await;
                    return;
                }
            }
            let lease_expired = self.state().lease_expired;
            if idle && std::mem::replace(&mut reported_expired, lease_expired) != lease_expired {
                let response = v1::FetchResponse { partitions: Vec::new(), lease_expired };
                if responses.send(Ok(response)).await.is_err() {
                    return;
                }
            }
            if idle {
                tokio::select! {
                    () = self.tasks.cancelled() => return,
                    () = responses.closed() => return,
                    _ = changed.changed() => {}
                }
            }
        }
    }
}

type FakeStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl log_server::Log for FakeBroker {
    type ProduceStream = FakeStream<v1::ProduceResponse>;
    type FetchStream = FakeStream<v1::FetchResponse>;

    async fn append(&self, request: Request<v1::AppendRequest>) -> Result<Response<v1::AppendResponse>, Status> {
        Ok(Response::new(FakeBroker::append(self, request.get_ref())?))
    }

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let (responses, stream) = mpsc::channel(100);
        self.tasks.spawn("fake-produce", self.clone().serve_produce(request.into_inner(), responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn read(&self, _: Request<v1::ReadRequest>) -> Result<Response<v1::ReadResponse>, Status> {
        Err(Status::unimplemented("the client does not use this call"))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<v1::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.expect("a first request");
        if first.partitions.len() > crate::limits::MAX_FETCH_PARTITIONS {
            return Err(ApiError::new(ErrorCode::InvalidRequest, "too many partitions").into());
        }
        let (responses, stream) = mpsc::channel(1);
        self.tasks.spawn("fake-fetch", self.clone().serve_fetch(first.partitions, first.any_replica, responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let state = self.state();
        let results = request.get_ref().queries.iter().map(|query| {
            let partition = &state.partitions[usize::try_from(query.partition).expect("positive")];
            let offset = match query.at {
                Some(v1::offset_query::At::Earliest(_)) => partition.start,
                _ => partition.end(),
            };
            let leader_epoch = state.epoch;
            v1::OffsetResult { offset: offset.cast_signed(), timestamp_ms: -1, leader_epoch, error: None }
        });
        Ok(Response::new(v1::ListOffsetsResponse { results: results.collect(), lease_expired: state.lease_expired }))
    }

    async fn init_producer_id(
        &self,
        _: Request<v1::InitProducerIdRequest>,
    ) -> Result<Response<v1::InitProducerIdResponse>, Status> {
        let mut state = self.state();
        state.next_producer += 1;
        Ok(Response::new(v1::InitProducerIdResponse { producer_id: state.next_producer, producer_epoch: 0 }))
    }
}

macro_rules! refused_calls {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl admin_server::Admin for FakeBroker {
            async fn get_metadata(
                &self,
                request: Request<v1::GetMetadataRequest>,
            ) -> Result<Response<v1::GetMetadataResponse>, Status> {
                Ok(Response::new(self.metadata(request.get_ref())))
            }

            $(async fn $name(&self, _: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                Err(self.state().refusal.clone().into())
            })*
        }
    };
}
refused_calls! {
    create_topic(CreateTopicRequest) -> CreateTopicResponse;
    list_topics(ListTopicsRequest) -> ListTopicsResponse;
    describe_topic(DescribeTopicRequest) -> DescribeTopicResponse;
    alter_topic(AlterTopicRequest) -> AlterTopicResponse;
    add_partitions(AddPartitionsRequest) -> AddPartitionsResponse;
    delete_topic(DeleteTopicRequest) -> DeleteTopicResponse;
    describe_cluster(DescribeClusterRequest) -> DescribeClusterResponse;
    drain_broker(DrainBrokerRequest) -> DrainBrokerResponse;
    undrain_broker(UndrainBrokerRequest) -> UndrainBrokerResponse;
    reassign_partitions(ReassignPartitionsRequest) -> ReassignPartitionsResponse;
    list_reassignments(ListReassignmentsRequest) -> ListReassignmentsResponse;
    cancel_reassignment(CancelReassignmentRequest) -> CancelReassignmentResponse;
    elect_leader(ElectLeaderRequest) -> ElectLeaderResponse;
    rebuild_manifest(RebuildManifestRequest) -> RebuildManifestResponse;
}

impl FakeBroker {
    /// Returns the metadata: the fake as leader of every partition, and all brokers as in-sync replicas.
    fn metadata(&self, request: &v1::GetMetadataRequest) -> v1::GetMetadataResponse {
        let mut state = self.state();
        state.metadata_requests += 1;
        let this_broker = v1::Broker { id: 1, address: state.advertised.clone(), rack: "a".to_owned() };
        let brokers: Vec<_> = std::iter::once(this_broker).chain(state.other_brokers.iter().cloned()).collect();
        let replicas: Vec<u32> = brokers.iter().map(|broker| broker.id).collect();
        let topics = request.topics.iter().map(|name| {
            if name != "t" {
                let error = ApiError::new(ErrorCode::UnknownTopic, format!("topic {name:?} does not exist"));
                return v1::TopicMetadata { name: name.clone(), error: Some(error.into()), ..Default::default() };
            }
            let numbers = 0..i32::try_from(state.partitions.len()).expect("few");
            v1::TopicMetadata {
                name: name.clone(),
                topic_id: TopicId::from_bytes([1; 16]).to_string(),
                partitions: numbers
                    .map(|partition| v1::PartitionMetadata {
                        partition,
                        leader: Some(1),
                        leader_epoch: state.advertised_epoch,
                        replicas: replicas.clone(),
                        isr: replicas.clone(),
                    })
                    .collect(),
                max_message_bytes: 1 << 20,
                ..Default::default()
            }
        });
        v1::GetMetadataResponse {
            cluster: "fake".into(),
            brokers,
            topics: topics.collect(),
            lease_expired: state.lease_expired,
            ..Default::default()
        }
    }
}
