//! The Rust client: [`Producer`], [`Consumer`] and [`Admin`] over gRPC.
//!
//! # Overview
//!
//! A [`Client`] serves one cluster. It requests the leader of each partition from any broker (`routing`) and keeps one
//! connection per broker (`connection`, over `transport`). It creates producers, consumers and admin handles. Each
//! producer and each consumer has one task that owns its state. User handles only queue work for that task or take what
//! the task has fetched.
//!
//! # Invariants
//!
//! - A leader that metadata named is never replaced by a leader of an older epoch.
//! - A producer's records reach a partition once and in the order in which they were sent, also across retries (see
//!   [`producer`]). If the outcome of a record is unknown, the send fails with [`SendError::Unknown`] or
//!   [`SendError::Expired`].
//! - A consumer returns records in offset order, without duplicates and without gaps, also across broken streams.
//! - Memory is bounded: of a producer by `ProducerOptions::memory_bytes`, of a consumer by its queue, one response, and
//!   a stream window per broker.
//! - Retries are visible: [`Client::trouble`] shows the problem, its start and its deadline.
//!
//! # Shutdown
//!
//! [`Producer::close`] delivers all queued records and joins its task. Dropping the last handle ends the task at once
//! and fails unacknowledged records. A [`Consumer`] ends when its value is dropped.

mod admin;
mod connection;
pub mod consumer;
#[cfg(all(test, feature = "server"))]
mod double;
mod error;
mod lock;
mod nearest;
mod options;
#[cfg(feature = "server")]
pub mod peers;
pub mod producer;
mod routing;
#[cfg(all(test, feature = "server"))]
mod tests;
mod transport;
mod trouble;

use std::{
    collections::BTreeSet,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::sync::watch;
use tonic::Status;

pub use self::{
    admin::{
        Admin, Broker, BrokerDescription, BrokerFigures, Cluster, ClusterDescription, ConfigSource, Drain, Election,
        HeldReplica, ManifestRebuild, NewTopic, OffsetAt, PartitionDescription, Reassignment, TopicChange,
        TopicDescription, TopicSummary, UnreadableKey,
    },
    connection::Address,
    consumer::{ConsumedBatch, ConsumedRecord, Consumer, ConsumerOptions, OnOutOfRange, OnUndecodable},
    error::{CallError, ConnectError, ConsumeError, SendError},
    options::{DEFAULT_PORT, Options},
    producer::{Ack, Delivery, Held, NewRecord, Producer, ProducerOptions},
    routing::{PartitionRoute, TopicRoute},
    transport::{Answered, Call, Connect, Tcp, TransportError, Unsent, Wire},
    trouble::Trouble,
};
use self::{
    connection::Pool,
    lock::lock,
    routing::Routing,
    trouble::{Party, Troubles},
};
use crate::{
    proto::{
        error::{ApiError, ErrorCode, is_broker_status},
        v1,
    },
    task::clock,
};

/// Client of one cluster. Clones share connections and routing metadata.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use strandline::client::{Client, NewRecord, NewTopic, Options, ProducerOptions};
///
/// let client = Client::connect("127.0.0.1:9460", Options::default()).await?;
/// client.admin().create_topic(&NewTopic::new("greetings")).await?;
/// let producer = client.producer(ProducerOptions::default()).await?;
/// let ack = producer.send("greetings", NewRecord::value(b"hello")).await?.await?;
/// println!("at offset {:?}, {}", ack.offset, ack.meaning());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: Options,
    bootstrap: Vec<Address>,
    pool: Pool,
    routing: Routing,
    /// Broker that receives the next call that any broker can serve: the last one that responded.
    preferred: Mutex<Option<Address>>,
    troubles: Arc<Troubles>,
}

/// Response timeout of one broker for a call that another broker could serve as well. Nothing else detects a broker
/// that is connected but does not work, because its process is stopped or its network is partitioned.
const ANY_ANSWER: Duration = Duration::from_secs(5);

/// Time without a response after which the next broker is called as well.
const HEDGE: Duration = Duration::from_millis(250);

/// Hedge delay while a leader does not respond or reports that its lease expired. It is shorter than `HEDGE`: the
/// caller already waits, and the failure of that leader may also affect the brokers beside it.
const HEDGE_IN_DOUBT: Duration = Duration::from_millis(100);

impl Client {
    /// Connects to a cluster by the addresses of some of its brokers, `host:port` separated by commas.
    ///
    /// # Errors
    /// An address is invalid, or no broker responds.
    pub async fn connect(bootstrap: &str, options: Options) -> Result<Self, CallError> {
        let tcp = Tcp::new(options.connect_timeout);
        Self::connect_through(Arc::new(tcp), bootstrap, options).await
    }

    /// Connects as [`Client::connect`] does, over connections of another kind than TCP.
    ///
    /// # Errors
    /// See [`Client::connect`].
    pub async fn connect_through(
        connect: Arc<dyn Connect>,
        bootstrap: &str,
        options: Options,
    ) -> Result<Self, CallError> {
        let texts = bootstrap.split(',').map(str::trim).filter(|text| !text.is_empty());
        let bootstrap: Vec<Address> = texts.map(Address::parse).collect::<Result<_, _>>()?;
        if bootstrap.is_empty() {
            return Err(ConnectError::NoAddress.into());
        }
        let pool = Pool::new(connect, options.connect_timeout);
        let inner = Inner {
            options,
            bootstrap,
            pool,
            routing: Routing::default(),
            preferred: Mutex::default(),
            troubles: Troubles::new(),
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
    /// The topic does not exist, or no broker responds within the request timeout.
    pub async fn topic(&self, name: &str) -> Result<Arc<TopicRoute>, CallError> {
        if let Some(Ok(route)) = self.inner.routing.topic(name) {
            return Ok(route);
        }
        let seen = self.inner.routing.generation();
        self.retried(|| async {
            self.refresh(seen, &[name]).await?;
            match self.inner.routing.topic(name) {
                Some(route) => Ok(route?),
                None => Err(ApiError::new(ErrorCode::UnknownTopic, format!("topic {name:?} does not exist")).into()),
            }
        })
        .await
    }

    /// Returns the routing metadata of a topic as [`Client::topic`] does, but always requests it from a broker first.
    ///
    /// # Errors
    /// See [`Client::topic`].
    pub async fn topic_now(&self, name: &str) -> Result<Arc<TopicRoute>, CallError> {
        self.refresh(self.inner.routing.generation(), &[name]).await?;
        self.topic(name).await
    }

    /// Returns a watch of the problem that this client's producers, consumers and calls are retrying; `None` while
    /// there is none. Of several problems the watch shows the oldest.
    pub fn trouble(&self) -> watch::Receiver<Option<Trouble>> {
        self.inner.troubles.watch()
    }

    fn options(&self) -> &Options {
        &self.inner.options
    }

    /// Creates a reporter for the retries of one producer, consumer or call.
    fn party(&self) -> Party {
        self.inner.troubles.party()
    }

    fn routing(&self) -> &Routing {
        &self.inner.routing
    }

    async fn wire(&self, address: &Address) -> Result<Wire, ConnectError> {
        let connected = self.inner.pool.wire(address).await;
        connected.map_err(|error| match error {
            // The user gave other addresses, so the error names the source of this address.
            ConnectError::NoAnswer { mut tried } if !self.inner.bootstrap.contains(address) => {
                if let Some(broker) = self.inner.routing.broker_at(address) {
                    for (_, problem) in &mut tried {
                        *problem += &format!(" (that is what broker {broker} advertises: grpc.advertise)");
                    }
                }
                ConnectError::NoAnswer { tried }
            }
            other => other,
        })
    }

    /// Refreshes the routing metadata unless it is newer than generation `seen` and holds the topics `wanted`.
    async fn refresh(&self, seen: u64, wanted: &[&str]) -> Result<(), CallError> {
        self.refresh_doubting(&BTreeSet::new(), seen, wanted).await
    }

    /// Refreshes as [`Client::refresh`] does, but calls the brokers in `doubted` after all other brokers. A broker that
    /// is partitioned from the cluster still responds to its clients, with old metadata.
    async fn refresh_doubting(&self, doubted: &BTreeSet<Address>, seen: u64, wanted: &[&str]) -> Result<(), CallError> {
        let ask = |topics: Vec<String>| {
            let mut order = self.anybody();
            order.sort_by_key(|address| doubted.contains(address));
            let hedge = if doubted.is_empty() { HEDGE } else { HEDGE_IN_DOUBT };
            async move {
                // A partitioned broker may respond first. Its response is accepted only if no other broker has a better
                // one.
                let doubtful = Mutex::new(None);
                let call = |wire| {
                    let request = v1::GetMetadataRequest { topics: topics.clone(), all_topics: false };
                    let doubtful = &doubtful;
                    async move {
                        let answer = connection::admin_client(wire).get_metadata(request).await?;
                        if !answer.get_ref().in_doubt {
                            return Ok(answer);
                        }
                        *lock(doubtful) = Some(answer.into_inner());
                        Err(ApiError::new(ErrorCode::MetadataUnavailable, "the broker doubts what it knows").into())
                    }
                };
                let answer = self.ask_in_turn(order, hedge, call).await;
                answer.or_else(|error| lock(&doubtful).take().ok_or(error))
            }
        };
        self.inner.routing.refresh(seen, wanted, ask).await
    }

    /// Calls any broker, the last one that responded first. For reads only: a call that a broker may have received is
    /// still repeated at another broker.
    async fn ask_any<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn(Wire) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        self.ask_in_turn(self.anybody(), HEDGE, call).await
    }

    /// Calls brokers in this order. Returns the first response, or the first error that a broker itself returned. Calls
    /// the next broker as well if a call fails in transport, or the broker does not reach the metadata store, or
    /// `hedge` passes.
    async fn ask_in_turn<F, R, T>(&self, order: Vec<Address>, hedge: Duration, call: F) -> Result<T, CallError>
    where
        F: Fn(Wire) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let wait = self.options().request_timeout.min(ANY_ANSWER);
        let mut anybody = order.into_iter();
        let call = &call;
        let ask = |address: Address| async move {
            let answer = self.at(&address, wait, call).await;
            (address, answer)
        };
        let (mut asked, mut tried, mut heard) = (FuturesUnordered::new(), Vec::new(), false);
        let mut cut_off = None;
        loop {
            if asked.is_empty() {
                match anybody.next() {
                    Some(address) => asked.push(ask(address)),
                    None => return Err(cut_off.map_or_else(|| nobody(tried, heard), CallError::from)),
                }
            }
            let answered = match tokio::time::timeout(hedge, asked.next()).await {
                Ok(answered) => answered,
                Err(_) => {
                    asked.extend(anybody.next().map(&ask));
                    continue;
                }
            };
            match answered {
                Some((address, Ok(answer))) => {
                    *lock(&self.inner.preferred) = Some(address);
                    return Ok(answer);
                }
                Some((_, Err(Unreached::Unanswered(Unanswered::Refused(fault)))))
                    if fault.code == ErrorCode::MetadataUnavailable =>
                {
                    cut_off = Some(fault);
                }
                Some((address, Err(Unreached::Unanswered(refused @ Unanswered::Refused(_))))) => {
                    return Err(refused.at(&address).into());
                }
                Some((address, Err(Unreached::Unanswered(unanswered)))) => {
                    heard |= unanswered.was_heard();
                    tried.push((address.as_str().to_owned(), unanswered.fault().message));
                }
                Some((_, Err(Unreached::Unconnected(ConnectError::NoAnswer { tried: here })))) => tried.extend(here),
                Some((_, Err(Unreached::Unconnected(error)))) => return Err(error.into()),
                None => {}
            }
        }
    }

    /// Makes one call to one broker.
    async fn at<F, R, T>(&self, address: &Address, wait: Duration, call: F) -> Result<T, Unreached>
    where
        F: Fn(Wire) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let wire = self.wire(address).await.map_err(Unreached::Unconnected)?;
        bounded(wait, call(wire)).await.map_err(Unreached::Unanswered)
    }

    /// Calls any broker for a change. Calls the next broker if no broker received the call, or if the broker does not
    /// reach the metadata store and has not started the change. A change that a broker may have started is not repeated
    /// elsewhere.
    async fn tell_any<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn(Wire) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let wait = self.options().request_timeout;
        let (mut tried, mut cut_off) = (Vec::new(), None);
        for address in self.anybody() {
            match self.at(&address, wait, &call).await {
                Ok(answer) => {
                    *lock(&self.inner.preferred) = Some(address);
                    return Ok(answer);
                }
                Err(Unreached::Unconnected(ConnectError::NoAnswer { tried: here })) => tried.extend(here),
                Err(Unreached::Unconnected(error)) => return Err(error.into()),
                Err(Unreached::Unanswered(not_done @ (Unanswered::NotSent(_) | Unanswered::NoBroker(_)))) => {
                    tried.push((address.as_str().to_owned(), not_done.fault().message));
                }
                Err(Unreached::Unanswered(Unanswered::Refused(fault))) if is_not_begun(&fault) => cut_off = Some(fault),
                Err(Unreached::Unanswered(unanswered)) => return Err(unanswered.at(&address).into()),
            }
        }
        Err(cut_off.map_or_else(|| nobody(tried, false), CallError::from))
    }

    /// Returns all known brokers in the order in which they are called.
    fn anybody(&self) -> Vec<Address> {
        let mut addresses = self.inner.routing.brokers();
        for address in &self.inner.bootstrap {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        let preferred = lock(&self.inner.preferred).clone();
        if let Some(first) = preferred.and_then(|preferred| addresses.iter().position(|address| *address == preferred))
        {
            addresses[..=first].rotate_right(1);
        }
        addresses
    }

    /// Repeats a call until it succeeds, fails with an error that is not retryable, or the request timeout has passed.
    /// The call must be safe to repeat.
    async fn retried<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn() -> R,
        R: Future<Output = Result<T, CallError>>,
    {
        let deadline = clock::monotonic() + self.options().request_timeout;
        let mut pauses = self.options().backoff();
        let mut party = None;
        loop {
            let error = match call().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            // An error that no broker is reachable returns at once: a person waits for this result.
            let hopeless = matches!(error, CallError::Connect(_)) || !error.retryable();
            let pause = pauses.next();
            if hopeless || clock::monotonic() + pause >= deadline {
                return Err(error);
            }
            tracing::debug!(%error, ?pause, "call will be repeated");
            party.get_or_insert_with(|| self.party()).enter(0, error.to_string(), Some(deadline));
            tokio::time::sleep(pause).await;
        }
    }
}

/// Returns true if a broker could not make the change, has changed nothing, and another broker may be able to.
fn is_not_begun(fault: &ApiError) -> bool {
    fault.code == ErrorCode::MetadataUnavailable && fault.metadata.contains_key("not_begun")
}

/// Returns the error of a call that got no response. A broker that received the call may respond to the next one, so
/// the error is retryable then.
fn nobody(tried: Vec<(String, String)>, heard: bool) -> CallError {
    let nobody = ConnectError::NoAnswer { tried };
    if heard { ApiError::new(ErrorCode::NotReady, nobody.to_string()).into() } else { nobody.into() }
}

/// A call to one broker that failed.
enum Unreached {
    /// No connection to the broker.
    Unconnected(ConnectError),
    /// The connection exists, and the call failed.
    Unanswered(Unanswered),
}

/// Makes one unary call with a timeout.
async fn bounded<R, T>(wait: Duration, call: R) -> Result<T, Unanswered>
where
    R: Future<Output = Result<tonic::Response<T>, Status>>,
{
    match tokio::time::timeout(wait, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(unanswered(&status)),
        Err(_) => Err(Unanswered::Silent(wait)),
    }
}

/// A unary call without a successful response.
#[derive(Debug)]
enum Unanswered {
    /// The connection could not be made: the broker never received the call.
    NotSent(String),
    /// The other end is no broker, or a broker that does not implement the call: nothing was done.
    NoBroker(ApiError),
    /// The connection broke, or an intermediary responded: the broker may have received the call.
    Broken(ApiError),
    /// No response arrived within this time.
    Silent(Duration),
    /// The broker's own error.
    Refused(ApiError),
}

impl Unanswered {
    /// Returns true if a broker may have received the call.
    const fn was_heard(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Silent(_))
    }

    /// Converts into an [`ApiError`] without the address.
    fn fault(self) -> ApiError {
        match self {
            Self::NotSent(problem) => ApiError::new(ErrorCode::NotReady, problem),
            Self::Silent(wait) => ApiError::new(ErrorCode::Timeout, format!("no answer in {wait:?}")),
            Self::NoBroker(fault) | Self::Broken(fault) | Self::Refused(fault) => fault,
        }
    }

    /// Converts into an [`ApiError`] whose message starts with the address. The broker's own errors need no address.
    fn at(self, address: &Address) -> ApiError {
        match self {
            Self::Refused(fault) => fault,
            other => {
                let fault = other.fault();
                ApiError { message: format!("{}: {}", address.as_str(), fault.message), ..fault }
            }
        }
    }
}

fn unanswered(status: &Status) -> Unanswered {
    if let Some(problem) = transport::unsent(status) {
        return Unanswered::NotSent(problem);
    }
    let fault = ApiError::from(status);
    match (is_broker_status(status), status.code()) {
        (true, _) => Unanswered::Refused(fault),
        (false, tonic::Code::Unimplemented) => Unanswered::NoBroker(fault),
        (false, _) => Unanswered::Broken(fault),
    }
}
