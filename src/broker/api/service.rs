//! The gRPC services `Log` and `Admin`. Each method calls its handler and converts the error to a status.

use std::sync::Arc;

use futures::{Stream, StreamExt, stream::BoxStream};
use tonic::{Request, Response, Status, Streaming};

use super::Api;
use crate::{
    broker::{CallMemory, ProducerIdQuota, background::lease_monitor::LeaseMonitor},
    limits,
    proto::{
        error::ApiError,
        v1::{self, admin_server, log_server},
    },
};

/// Messages of a streaming request.
pub type Requests<T> = BoxStream<'static, Result<T, Status>>;

/// The `Log` service of a broker.
#[derive(Clone)]
pub struct LogService(Arc<Api>);

/// The `Admin` service of a broker.
#[derive(Clone)]
pub struct AdminService {
    api: Arc<Api>,
    lease: Arc<LeaseMonitor>,
}

impl AdminService {
    pub(in crate::broker) fn new(api: Arc<Api>, lease: Arc<LeaseMonitor>) -> Self {
        Self { api, lease }
    }

    pub(in crate::broker) fn server(self) -> admin_server::AdminServer<Self> {
        admin_server::AdminServer::new(self)
    }

    /// Returns the handlers for an operation that needs the metadata store. Fails if the lease has expired, or if the
    /// store has returned to an older state.
    fn available_api(&self) -> Result<&Api, Status> {
        self.lease.check_metadata_available()?;
        Ok(&self.api)
    }
}

fn into_response<T>(result: Result<T, ApiError>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(Status::from)
}

/// Returns the quota of the request's connection, which the listener has added to the request. A request without it
/// gets a new quota.
fn quota<T>(request: &Request<T>) -> ProducerIdQuota {
    request.extensions().get().cloned().unwrap_or_default()
}

impl LogService {
    pub(in crate::broker) fn new(api: Arc<Api>) -> Self {
        Self(api)
    }

    /// Returns the `Log` service with its message limits. The broker's listener uses it for the unary calls only.
    pub fn server(self) -> log_server::LogServer<Self> {
        log_server::LogServer::new(self)
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
    }

    /// Serves one `Produce` stream.
    pub fn serve_produce(
        &self,
        request: Request<Requests<v1::ProduceRequest>>,
    ) -> impl Stream<Item = Result<v1::ProduceResponse, Status>> + Send + 'static {
        let (quota, memory) = (quota(&request), self.memory(&request));
        self.0.produce.produce(request.into_inner(), quota, memory)
    }

    /// Serves one `Fetch` stream.
    pub fn serve_fetch(
        &self,
        request: Request<Requests<v1::FetchRequest>>,
    ) -> impl Stream<Item = Result<v1::FetchResponse, Status>> + Send + 'static {
        let memory = self.memory(&request);
        self.0.fetch.fetch(request.into_inner(), memory)
    }

    /// Returns the memory of a call, which the listener has added to the request. A request without it gets memory with
    /// shares of its own.
    fn memory<T>(&self, request: &Request<T>) -> CallMemory {
        request.extensions().get().cloned().unwrap_or_else(|| self.0.call_memory())
    }
}

#[tonic::async_trait]
impl log_server::Log for LogService {
    async fn append(&self, request: Request<v1::AppendRequest>) -> Result<Response<v1::AppendResponse>, Status> {
        let (quota, memory) = (quota(&request), self.memory(&request));
        into_response(self.0.produce.append(request.into_inner(), &quota, &memory).await)
    }

    // The broker's listener serves both streams through `server/streams`, with `serve_produce` and `serve_fetch`, and
    // calls neither `produce` nor `fetch`.
    type ProduceStream = BoxStream<'static, Result<v1::ProduceResponse, Status>>;

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        Ok(Response::new(self.serve_produce(request.map(StreamExt::boxed)).boxed()))
    }

    async fn read(&self, request: Request<v1::ReadRequest>) -> Result<Response<v1::ReadResponse>, Status> {
        let memory = self.memory(&request);
        let request = request.into_inner();
        // A read may wait for a minute, so the memory of its request is freed now. The read keeps only the names of the
        // partitions, and rejects a request with more than `MAX_FETCH_PARTITIONS`.
        if request.partitions.len() <= limits::MAX_FETCH_PARTITIONS {
            drop(memory.take_request());
        }
        into_response(self.0.fetch.read(request, memory).await)
    }

    type FetchStream = BoxStream<'static, Result<v1::FetchResponse, Status>>;

    async fn fetch(
        &self,
        request: Request<Streaming<v1::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        Ok(Response::new(self.serve_fetch(request.map(StreamExt::boxed)).boxed()))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let memory = self.memory(&request);
        into_response(self.0.offsets.list_offsets(request.into_inner(), &memory).await)
    }

    async fn init_producer_id(
        &self,
        request: Request<v1::InitProducerIdRequest>,
    ) -> Result<Response<v1::InitProducerIdResponse>, Status> {
        into_response(self.0.produce.init_producer_id(&quota(&request)).await)
    }
}

#[tonic::async_trait]
impl admin_server::Admin for AdminService {
    async fn get_metadata(
        &self,
        request: Request<v1::GetMetadataRequest>,
    ) -> Result<Response<v1::GetMetadataResponse>, Status> {
        into_response(self.api.describe.metadata(&request.into_inner()))
    }

    async fn create_topic(
        &self,
        request: Request<v1::CreateTopicRequest>,
    ) -> Result<Response<v1::CreateTopicResponse>, Status> {
        into_response(self.available_api()?.topics.create_topic(request.into_inner()).await)
    }

    async fn list_topics(
        &self,
        _request: Request<v1::ListTopicsRequest>,
    ) -> Result<Response<v1::ListTopicsResponse>, Status> {
        into_response(Ok(self.api.topics.list_topics()))
    }

    async fn describe_topic(
        &self,
        request: Request<v1::DescribeTopicRequest>,
    ) -> Result<Response<v1::DescribeTopicResponse>, Status> {
        into_response(self.api.describe.describe_topic(&request.into_inner().name).await)
    }

    async fn alter_topic(
        &self,
        request: Request<v1::AlterTopicRequest>,
    ) -> Result<Response<v1::AlterTopicResponse>, Status> {
        into_response(self.available_api()?.topics.alter_topic(request.into_inner()).await)
    }

    async fn add_partitions(
        &self,
        request: Request<v1::AddPartitionsRequest>,
    ) -> Result<Response<v1::AddPartitionsResponse>, Status> {
        into_response(self.available_api()?.topics.add_partitions(request.into_inner()).await)
    }

    async fn delete_topic(
        &self,
        request: Request<v1::DeleteTopicRequest>,
    ) -> Result<Response<v1::DeleteTopicResponse>, Status> {
        into_response(self.available_api()?.topics.delete_topic(&request.into_inner().name).await)
    }

    async fn describe_cluster(
        &self,
        _request: Request<v1::DescribeClusterRequest>,
    ) -> Result<Response<v1::DescribeClusterResponse>, Status> {
        into_response(Ok(self.api.operations.describe_cluster().await))
    }

    async fn drain_broker(
        &self,
        request: Request<v1::DrainBrokerRequest>,
    ) -> Result<Response<v1::DrainBrokerResponse>, Status> {
        into_response(self.available_api()?.operations.drain_broker(request.into_inner().broker).await)
    }

    async fn undrain_broker(
        &self,
        request: Request<v1::UndrainBrokerRequest>,
    ) -> Result<Response<v1::UndrainBrokerResponse>, Status> {
        into_response(self.available_api()?.operations.undrain_broker(request.into_inner().broker).await)
    }

    async fn reassign_partitions(
        &self,
        request: Request<v1::ReassignPartitionsRequest>,
    ) -> Result<Response<v1::ReassignPartitionsResponse>, Status> {
        into_response(self.available_api()?.operations.reassign(request.into_inner()).await)
    }

    async fn list_reassignments(
        &self,
        request: Request<v1::ListReassignmentsRequest>,
    ) -> Result<Response<v1::ListReassignmentsResponse>, Status> {
        into_response(self.api.operations.list_reassignments(&request.into_inner()).await)
    }

    async fn cancel_reassignment(
        &self,
        request: Request<v1::CancelReassignmentRequest>,
    ) -> Result<Response<v1::CancelReassignmentResponse>, Status> {
        into_response(self.available_api()?.operations.cancel_reassignment(&request.into_inner()).await)
    }

    async fn elect_leader(
        &self,
        request: Request<v1::ElectLeaderRequest>,
    ) -> Result<Response<v1::ElectLeaderResponse>, Status> {
        into_response(self.available_api()?.operations.elect_leader(request.into_inner()).await)
    }

    async fn rebuild_manifest(
        &self,
        request: Request<v1::RebuildManifestRequest>,
    ) -> Result<Response<v1::RebuildManifestResponse>, Status> {
        into_response(self.available_api()?.rebuilder.rebuild_manifest(request.into_inner()).await)
    }
}
