//! The Rust client: [`Producer`], [`Consumer`] and [`Admin`] over gRPC.
//!
//! # Overview
//!
//! A [`Client`] serves one cluster. It requests the leader of each partition from any broker (`metadata`) and keeps one
//! connection per broker (`connection`, over `transport`). It creates producers, consumers and admin handles. Each
//! producer and each consumer has one task that owns its state. User handles only queue work for that task or take what
//! the task has fetched.
//!
//! # Invariants
//!
//! - A leader in the cached metadata is never replaced by a leader of an older epoch of the same topic.
//! - With default options, a producer's records reach a partition once and in the order in which they were sent, also
//!   across retries (see [`producer`]). If the outcome of a record is unknown, the send fails with
//!   [`SendError::Unknown`] or [`SendError::Expired`].
//! - A consumer returns records in offset order, without duplicates and without gaps, also across broken streams. The
//!   exceptions are a reset position and a skipped batch (see [`consumer`]).
//! - Memory is bounded: of a producer by `ProducerOptions::memory_bytes`, of a consumer by its queue, one response, and
//!   a window per fetch stream.
//! - Retries are visible: [`Client::retries`] shows the problem, its start and its deadline.
//!
//! # Shutdown
//!
//! [`Producer::close`] waits until each queued record is acknowledged or has failed, and joins the task. Dropping the
//! last handle ends the task at once and fails unacknowledged records. A [`Consumer`] ends when its value is dropped.

#![warn(missing_docs)]

mod address;
mod admin;
mod call;
mod connection;
pub mod consumer;
mod error;
#[cfg(test)]
mod fake_broker;
mod metadata;
mod options;
pub mod producer;
mod replica_selector;
mod retry_status;
mod route;
#[cfg(test)]
mod tests;
mod transport;

use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::sync::watch;
use tonic::Status;

pub use self::{
    address::BrokerAddress,
    admin::{
        Admin, BrokerDescription, BrokerInfo, BrokerStats, ClusterDescription, ClusterInfo, ConfigSource, DrainStatus,
        ElectionResult, ManifestRebuild, NewTopic, OffsetSpec, PartitionDescription, Reassignment, ReplicaDescription,
        TopicAlteration, TopicDescription, TopicSummary, UnreadableKey,
    },
    connection::ConnectionPool,
    consumer::{ConsumedBatch, ConsumedRecord, Consumer, ConsumerOptions, OffsetResetPolicy, OnUndecodable},
    error::{CallError, ConnectError, ConsumeError, SendError},
    options::{ClientOptions, DEFAULT_PORT},
    producer::{Ack, Delivery, NewRecord, Producer, ProducerOptions},
    retry_status::RetryStatus,
    route::{PartitionRoute, TopicRoute},
    transport::{BrokerChannel, CallResult, Connector, NotSent, RpcTransport, TcpConnector, TransportError, unsent},
};
use strandline_core::{limits, task};
pub use strandline_core::{model, record};
use strandline_proto as proto;

use self::{
    call::{AttemptError, NoResponse, with_timeout},
    metadata::RoutingTable,
    retry_status::{RetryRegistry, RetryReporter},
};
use crate::{
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::{clock, lock::Mutex},
};

/// Client of one cluster. Clones share connections and routing metadata.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use strandline_client::{Client, ClientOptions, NewRecord, NewTopic, ProducerOptions};
///
/// let client = Client::connect("127.0.0.1:9460", ClientOptions::default()).await?;
/// client.admin().create_topic(&NewTopic::new("greetings")).await?;
/// let producer = client.producer(ProducerOptions::default()).await?;
/// let ack = producer.send("greetings", NewRecord::value(b"hello")).await?.await?;
/// println!("at offset {:?}, {}", ack.offset, ack.meaning());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<ClientInner>,
}

#[derive(Debug)]
struct ClientInner {
    options: ClientOptions,
    bootstrap: Vec<BrokerAddress>,
    pool: ConnectionPool,
    routing: RoutingTable,
    /// Broker that responded last. The next call that any broker can serve begins with it.
    preferred: Mutex<Option<BrokerAddress>>,
    retries: Arc<RetryRegistry>,
}

/// Maximum response timeout of one attempt of a call that is then retried, at another broker or after a metadata
/// refresh. The timeout detects a broker whose connection is open but which does not respond: its process is stopped,
/// or its network is partitioned.
const FIRST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time without a response after which the next broker is called as well.
const HEDGE_DELAY: Duration = Duration::from_millis(250);

/// Hedge delay of a metadata refresh while a leader does not respond or reports that its lease expired. It is shorter
/// than `HEDGE_DELAY`: the caller already waits, and the failure of that leader may also affect other brokers.
const HEDGE_DELAY_LEASE_EXPIRED: Duration = Duration::from_millis(100);

impl Client {
    /// Connects to a cluster by the addresses of some of its brokers, `host:port` separated by commas.
    ///
    /// # Errors
    /// The list is empty, an address is invalid, or no broker returns metadata.
    pub async fn connect(bootstrap: &str, options: ClientOptions) -> Result<Self, CallError> {
        let tcp = TcpConnector::new(options.connect_timeout);
        Self::connect_through(Arc::new(tcp), bootstrap, options).await
    }

    /// Connects as [`Client::connect`] does, over connections of another kind than TCP.
    ///
    /// # Errors
    /// See [`Client::connect`].
    pub async fn connect_through(
        connect: Arc<dyn Connector>,
        bootstrap: &str,
        options: ClientOptions,
    ) -> Result<Self, CallError> {
        let texts = bootstrap.split(',').map(str::trim).filter(|text| !text.is_empty());
        let bootstrap: Vec<BrokerAddress> = texts.map(BrokerAddress::parse).collect::<Result<_, _>>()?;
        if bootstrap.is_empty() {
            return Err(ConnectError::NoAddress.into());
        }
        let pool = ConnectionPool::new(connect, options.connect_timeout);
        let inner = ClientInner {
            options,
            bootstrap,
            pool,
            routing: RoutingTable::default(),
            preferred: Mutex::default(),
            retries: RetryRegistry::new(),
        };
        let client = Self { inner: Arc::new(inner) };
        client.refresh(0, &[]).await?;
        Ok(client)
    }

    /// Returns a handle that administers topics and the cluster.
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// Creates a producer.
    ///
    /// # Errors
    /// No broker assigns a producer id.
    pub async fn producer(&self, options: ProducerOptions) -> Result<Producer, CallError> {
        Producer::start(self.clone(), options).await
    }

    /// Creates a consumer without partitions; [`Consumer::assign`] adds partitions.
    pub fn consumer(&self, options: ConsumerOptions) -> Consumer {
        Consumer::start(self.clone(), options)
    }

    /// Returns the routing metadata of a topic. Requests the metadata from a broker if the client has none.
    ///
    /// # Errors
    /// The topic does not exist, no broker can be reached, or none responds within the request timeout.
    pub async fn topic(&self, name: &str) -> Result<Arc<TopicRoute>, CallError> {
        if let Some(Ok(route)) = self.inner.routing.topic(name) {
            return Ok(route);
        }
        let used_generation = self.inner.routing.generation();
        self.retried(|| async {
            self.refresh(used_generation, &[name]).await?;
            match self.inner.routing.topic(name) {
                Some(route) => Ok(route?),
                None => Err(ApiError::new(ErrorCode::UnknownTopic, format!("topic {name:?} does not exist")).into()),
            }
        })
        .await
    }

    /// Returns the routing metadata of a topic as [`Client::topic`] does, but refreshes the metadata from a broker
    /// first.
    ///
    /// # Errors
    /// See [`Client::topic`].
    pub async fn topic_now(&self, name: &str) -> Result<Arc<TopicRoute>, CallError> {
        self.refresh(self.inner.routing.generation(), &[name]).await?;
        self.topic(name).await
    }

    /// Returns a watch of the problem that this client's producers, consumers and calls are retrying; `None` while
    /// there is none. Of several problems the watch shows the oldest.
    pub fn retries(&self) -> watch::Receiver<Option<RetryStatus>> {
        self.inner.retries.watch()
    }

    fn options(&self) -> &ClientOptions {
        &self.inner.options
    }

    /// Creates a reporter for the retries of one producer, consumer or call.
    fn retry_reporter(&self) -> RetryReporter {
        self.inner.retries.reporter()
    }

    fn routing(&self) -> &RoutingTable {
        &self.inner.routing
    }

    /// Returns the connection to a broker. The error for an unreachable address that the user did not give names the
    /// broker that advertises the address.
    async fn channel(&self, address: &BrokerAddress) -> Result<BrokerChannel, ConnectError> {
        let connected = self.inner.pool.channel(address).await;
        connected.map_err(|error| match error {
            ConnectError::NoResponse { mut tried } if !self.inner.bootstrap.contains(address) => {
                if let Some(broker) = self.inner.routing.broker_at(address) {
                    for (_, problem) in &mut tried {
                        *problem += &format!(" (advertised by broker {broker}: grpc.advertise)");
                    }
                }
                ConnectError::NoResponse { tried }
            }
            other => other,
        })
    }

    /// Refreshes the routing metadata, unless the metadata has a generation above `used_generation` and contains all
    /// `topics`.
    async fn refresh(&self, used_generation: u64, topics: &[&str]) -> Result<(), CallError> {
        self.refresh_deferring(&BTreeSet::new(), used_generation, topics).await
    }

    /// Refreshes as [`Client::refresh`] does, but calls the brokers in `deferred` after all other brokers. A broker
    /// that is partitioned from the cluster still responds to its clients, with old metadata. If `deferred` is not
    /// empty, the hedge delay is `HEDGE_DELAY_LEASE_EXPIRED`.
    async fn refresh_deferring(
        &self,
        deferred: &BTreeSet<BrokerAddress>,
        used_generation: u64,
        topics: &[&str],
    ) -> Result<(), CallError> {
        let request = |topics: Vec<String>| {
            let mut order = self.brokers_in_call_order();
            order.sort_by_key(|address| deferred.contains(address));
            let hedge = if deferred.is_empty() { HEDGE_DELAY } else { HEDGE_DELAY_LEASE_EXPIRED };
            async move {
                // A partitioned broker may respond first. Its outdated response is accepted only if no broker returns
                // current metadata.
                let outdated = Mutex::new(None);
                let call = |channel| {
                    let request = v1::GetMetadataRequest { topics: topics.clone(), all_topics: false };
                    let outdated = &outdated;
                    async move {
                        let response = connection::admin_client(channel).get_metadata(request).await?;
                        if !response.get_ref().lease_expired {
                            return Ok(response);
                        }
                        *outdated.lock() = Some(response.into_inner());
                        Err(ApiError::new(ErrorCode::MetadataUnavailable, "the lease of the broker has expired").into())
                    }
                };
                let response = self.call_in_order(order, hedge, call).await;
                response.or_else(|error| outdated.lock().take().ok_or(error))
            }
        };
        self.inner.routing.refresh(used_generation, topics, request).await
    }

    /// Calls brokers as [`Client::call_in_order`] does, beginning with the broker that responded last. For reads only:
    /// a call that a broker may have received is still repeated at another broker.
    async fn call_any<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn(BrokerChannel) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        self.call_in_order(self.brokers_in_call_order(), HEDGE_DELAY, call).await
    }

    /// Calls brokers in this order. Returns the first response, or the first error that a broker itself returned, other
    /// than `METADATA_UNAVAILABLE`. The next broker is called when all calls so far have failed in transport or with
    /// `METADATA_UNAVAILABLE`. The next broker is also called when no call completes within `hedge`. If all brokers
    /// fail, returns `METADATA_UNAVAILABLE` if a broker returned it, else the errors of all addresses.
    async fn call_in_order<F, R, T>(&self, order: Vec<BrokerAddress>, hedge: Duration, call: F) -> Result<T, CallError>
    where
        F: Fn(BrokerChannel) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let timeout = self.options().request_timeout.min(FIRST_RESPONSE_TIMEOUT);
        let mut remaining = order.into_iter();
        let call = &call;
        let attempt = |address: BrokerAddress| async move {
            let result = self.call_broker(&address, timeout, call).await;
            (address, result)
        };
        let (mut attempts, mut tried, mut received) = (FuturesUnordered::new(), Vec::new(), false);
        let mut metadata_error = None;
        loop {
            if attempts.is_empty() {
                match remaining.next() {
                    Some(address) => attempts.push(attempt(address)),
                    None => {
                        return Err(metadata_error.map_or_else(|| no_response_error(tried, received), CallError::from));
                    }
                }
            }
            let completed = match tokio::time::timeout(hedge, attempts.next()).await {
                Ok(completed) => completed,
                Err(_) => {
                    attempts.extend(remaining.next().map(&attempt));
                    continue;
                }
            };
            // `attempts` was not empty, so `None` does not occur.
            match completed {
                Some((address, Ok(response))) => {
                    *self.inner.preferred.lock() = Some(address);
                    return Ok(response);
                }
                Some((_, Err(AttemptError::CallFailed(NoResponse::Refused(error)))))
                    if error.code == ErrorCode::MetadataUnavailable =>
                {
                    metadata_error = Some(error);
                }
                Some((address, Err(AttemptError::CallFailed(rejected @ NoResponse::Refused(_))))) => {
                    return Err(rejected.with_address(&address).into());
                }
                Some((address, Err(AttemptError::CallFailed(no_response)))) => {
                    received |= no_response.may_have_arrived();
                    tried.push((address.as_str().to_owned(), no_response.into_error().message));
                }
                Some((_, Err(AttemptError::NoConnection(ConnectError::NoResponse { tried: more })))) => {
                    tried.extend(more)
                }
                Some((_, Err(AttemptError::NoConnection(error)))) => return Err(error.into()),
                None => {}
            }
        }
    }

    /// Makes one call to one broker. `timeout` limits the wait for the response, not the connecting.
    async fn call_broker<F, R, T>(&self, address: &BrokerAddress, timeout: Duration, call: F) -> Result<T, AttemptError>
    where
        F: Fn(BrokerChannel) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let channel = self.channel(address).await.map_err(AttemptError::NoConnection)?;
        with_timeout(timeout, call(channel)).await.map_err(AttemptError::CallFailed)
    }

    /// Calls brokers one after another for a change. The next address is called only in these cases:
    /// - The previous address did not receive the call.
    /// - It is not a broker that implements the call.
    /// - It reports that the metadata store does not respond and the change was not started.
    ///
    /// A change that a broker may have started is not repeated at another broker.
    async fn change_any<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn(BrokerChannel) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let timeout = self.options().request_timeout;
        let (mut tried, mut metadata_error) = (Vec::new(), None);
        for address in self.brokers_in_call_order() {
            match self.call_broker(&address, timeout, &call).await {
                Ok(response) => {
                    *self.inner.preferred.lock() = Some(address);
                    return Ok(response);
                }
                Err(AttemptError::NoConnection(ConnectError::NoResponse { tried: more })) => tried.extend(more),
                Err(AttemptError::NoConnection(error)) => return Err(error.into()),
                Err(AttemptError::CallFailed(not_executed @ (NoResponse::NotSent(_) | NoResponse::NoBroker(_)))) => {
                    tried.push((address.as_str().to_owned(), not_executed.into_error().message));
                }
                Err(AttemptError::CallFailed(NoResponse::Refused(error))) if is_not_started(&error) => {
                    metadata_error = Some(error)
                }
                Err(AttemptError::CallFailed(no_response)) => return Err(no_response.with_address(&address).into()),
            }
        }
        Err(metadata_error.map_or_else(|| no_response_error(tried, false), CallError::from))
    }

    /// Returns the addresses of the brokers in the metadata, then the bootstrap addresses that are not among them. The
    /// broker that responded last is moved to the front.
    fn brokers_in_call_order(&self) -> Vec<BrokerAddress> {
        let mut addresses = self.inner.routing.brokers();
        for address in &self.inner.bootstrap {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        let preferred = self.inner.preferred.lock().clone();
        if let Some(first) = preferred.and_then(|preferred| addresses.iter().position(|address| *address == preferred))
        {
            addresses[..=first].rotate_right(1);
        }
        addresses
    }

    /// Repeats a call until the call succeeds, fails with a final error, or could not be repeated before the request
    /// timeout. An error is final if it is not retryable, or if no broker could be reached. The call must be safe to
    /// repeat.
    async fn retried<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn() -> R,
        R: Future<Output = Result<T, CallError>>,
    {
        let deadline = clock::monotonic() + self.options().request_timeout;
        let mut backoff = self.options().backoff();
        let mut reporter = None;
        loop {
            let error = match call().await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            // The error for unreachable brokers is returned at once: a person waits for this result.
            let is_final = matches!(error, CallError::Connect(_)) || !error.retryable();
            let pause = backoff.next_pause();
            if is_final || clock::monotonic() + pause >= deadline {
                return Err(error);
            }
            tracing::debug!(%error, ?pause, "call failed, retrying");
            reporter.get_or_insert_with(|| self.retry_reporter()).report(0, error.to_string(), Some(deadline));
            tokio::time::sleep(pause).await;
        }
    }
}

/// Returns true if a broker could not make the change, has changed nothing, and another broker may be able to.
fn is_not_started(error: &ApiError) -> bool {
    error.code == ErrorCode::MetadataUnavailable && error.metadata.contains_key("not_started")
}

/// Returns the error of a call that got no response. The error is retryable if a broker may have `received` the call,
/// because that broker may respond to the next call.
fn no_response_error(tried: Vec<(String, String)>, received: bool) -> CallError {
    let error = ConnectError::NoResponse { tried };
    if received { ApiError::new(ErrorCode::NotReady, error.to_string()).into() } else { error.into() }
}
