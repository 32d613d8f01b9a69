//! The Rust client: [`Producer`], [`Consumer`] and [`Admin`] over gRPC.
//!
//! # Overview
//!
//! A [`Client`] knows one cluster. It learns from any broker who leads what (`routing`), keeps one connection per
//! broker (`connection`, over `transport`), and makes the three faces. Each producer and each consumer has one task that owns its state;
//! the handles that users hold only queue work for it or take what it has fetched.
//!
//! # Invariants
//!
//! - A leader that metadata named is never replaced by one of an older epoch.
//! - A producer's records reach a partition in the order in which they were sent, once, whatever had to be retried
//!   (see [`producer`]); where that cannot be known the send fails and says so.
//! - A consumer hands out records in offset order, none twice and none left out, whatever broke in between.
//! - Memory is bounded: a producer by `ProducerOptions::memory_bytes`, a consumer by a few responses per leader.
//! - Nothing is retried in secret: [`Client::trouble`] shows what is, since when and until when.
//!
//! # Shutdown
//!
//! [`Producer::close`] delivers what is queued and joins its task; dropping the last handle ends the task at once and
//! fails what was not acknowledged. A [`Consumer`] ends with its value.

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
        fault::{self, Fault, Reason},
        v1,
    },
    task::clock,
};

/// One cluster, as a client sees it. Clones share connections and what is known of the cluster.
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
    /// Which broker the next call that any may answer goes to first: the one that answered last.
    preferred: Mutex<Option<Address>>,
    troubles: Arc<Troubles>,
}

/// How long one broker may take for an answer that another could give as well. A broker that is there but does not work
/// (stopped, or cut off) is noticed by nothing else.
const ANY_ANSWER: Duration = Duration::from_secs(5);

/// How long one broker is asked before the next is asked too.
const HEDGE: Duration = Duration::from_millis(250);

/// The same where a leader is silent or in doubt: whoever asks waits already, and what took that leader may have taken its neighbours.
const HEDGE_IN_DOUBT: Duration = Duration::from_millis(100);

impl Client {
    /// Finds a cluster by the addresses of some of its brokers, `host:port` separated by commas.
    ///
    /// # Errors
    /// When an address is none, or none of them answers.
    pub async fn connect(bootstrap: &str, options: Options) -> Result<Self, CallError> {
        let tcp = Tcp::new(options.connect_timeout);
        Self::connect_through(Arc::new(tcp), bootstrap, options).await
    }

    /// As [`Client::connect`], over connections of another kind than TCP.
    ///
    /// # Errors
    /// As [`Client::connect`].
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

    /// Topics and the cluster.
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// A producer.
    ///
    /// # Errors
    /// When no broker hands out an id for it.
    pub async fn producer(&self, options: ProducerOptions) -> Result<Producer, CallError> {
        Producer::start(self.clone(), options).await
    }

    /// A consumer without partitions: assign some.
    pub fn consumer(&self, options: ConsumerOptions) -> Consumer {
        Consumer::start(self.clone(), options)
    }

    /// What is known of a topic, asked for if nothing is.
    ///
    /// # Errors
    /// When it does not exist, or nobody answers in the request timeout.
    pub async fn topic(&self, name: &str) -> Result<Arc<TopicRoute>, CallError> {
        if let Some(Ok(route)) = self.inner.routing.topic(name) {
            return Ok(route);
        }
        let seen = self.inner.routing.generation();
        self.retried(|| async {
            self.refresh(seen, &[name]).await?;
            match self.inner.routing.topic(name) {
                Some(route) => Ok(route?),
                None => Err(Fault::new(Reason::UnknownTopic, format!("topic {name:?} does not exist")).into()),
            }
        })
        .await
    }

    /// As [`Client::topic`], but asks the cluster even if something is known.
    ///
    /// # Errors
    /// As [`Client::topic`].
    pub async fn topic_now(&self, name: &str) -> Result<Arc<TopicRoute>, CallError> {
        self.refresh(self.inner.routing.generation(), &[name]).await?;
        self.topic(name).await
    }

    /// What keeps this client's producers, consumers and calls from going on while they retry; nothing when all is well.
    /// Of several troubles it shows the oldest.
    pub fn trouble(&self) -> watch::Receiver<Option<Trouble>> {
        self.inner.troubles.watch()
    }

    fn options(&self) -> &Options {
        &self.inner.options
    }

    /// Somebody who may get into trouble.
    fn party(&self) -> Party {
        self.inner.troubles.party()
    }

    fn routing(&self) -> &Routing {
        &self.inner.routing
    }

    async fn wire(&self, address: &Address) -> Result<Wire, ConnectError> {
        let connected = self.inner.pool.wire(address).await;
        connected.map_err(|error| match error {
            // The user named other addresses, and has to be told where this one comes from.
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

    /// Makes what is known newer than generation `seen`.
    async fn refresh(&self, seen: u64, wanted: &[&str]) -> Result<(), CallError> {
        self.refresh_doubting(&BTreeSet::new(), seen, wanted).await
    }

    /// The same, for somebody who doubts what these brokers know: they are asked after all others. One that is cut off from the
    /// cluster answers its clients all the same, with what was.
    async fn refresh_doubting(&self, doubted: &BTreeSet<Address>, seen: u64, wanted: &[&str]) -> Result<(), CallError> {
        let ask = |topics: Vec<String>| {
            let mut order = self.anybody();
            order.sort_by_key(|address| doubted.contains(address));
            let hedge = if doubted.is_empty() { HEDGE } else { HEDGE_IN_DOUBT };
            async move {
                // One that is cut off may be the first to answer: it is believed where nobody knows better.
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
                        Err(Fault::new(Reason::MetadataUnavailable, "the broker doubts what it knows").into())
                    }
                };
                let answer = self.ask_in_turn(order, hedge, call).await;
                answer.or_else(|error| lock(&doubtful).take().ok_or(error))
            }
        };
        self.inner.routing.refresh(seen, wanted, ask).await
    }

    /// Asks whichever broker answers, first the one that did last. For questions: one that may have been heard is asked elsewhere all
    /// the same.
    async fn ask_any<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn(Wire) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        self.ask_in_turn(self.anybody(), HEDGE, call).await
    }

    /// Asks brokers in this order: the next as well where one fails, does not reach the metadata store, or stays silent for as long as `hedge`.
    /// The first answer is taken.
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
                    if fault.reason == Reason::MetadataUnavailable =>
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

    /// One call at one broker.
    async fn at<F, R, T>(&self, address: &Address, wait: Duration, call: F) -> Result<T, Unreached>
    where
        F: Fn(Wire) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let wire = self.wire(address).await.map_err(Unreached::Unconnected)?;
        bounded(wait, call(wire)).await.map_err(Unreached::Unanswered)
    }

    /// Has whichever broker there is do something: the next one where one says that it does not reach the metadata store and has begun
    /// nothing. What a broker may have begun is not repeated elsewhere.
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

    /// Every broker that is known, in the order in which they are called.
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

    /// Repeats a call that may be repeated until it succeeds, fails for good, or the request timeout is over.
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
            // Nobody there at all is said at once: a person waits for this answer.
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

/// Whether a broker could not do it, has changed nothing, and another one may be able to.
fn is_not_begun(fault: &Fault) -> bool {
    fault.reason == Reason::MetadataUnavailable && fault.metadata.contains_key("not_begun")
}

/// What is said when no broker answered. One that took the call may answer the next: that is no reason to give up.
fn nobody(tried: Vec<(String, String)>, heard: bool) -> CallError {
    let nobody = ConnectError::NoAnswer { tried };
    if heard { Fault::new(Reason::NotReady, nobody.to_string()).into() } else { nobody.into() }
}

/// A call that one broker gave no answer to.
enum Unreached {
    /// There is no connection to it.
    Unconnected(ConnectError),
    /// There is.
    Unanswered(Unanswered),
}

/// One unary call, within a time.
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

/// A unary call without an answer.
#[derive(Debug)]
enum Unanswered {
    /// The connection could not be made: the broker never saw the call.
    NotSent(String),
    /// What is there is no broker, or one that does not know the call: nothing was done.
    NoBroker(Fault),
    /// The connection broke, or something in between answered: the broker may have seen the call.
    Broken(Fault),
    /// Nothing came in that time.
    Silent(Duration),
    /// The broker's own answer.
    Refused(Fault),
}

impl Unanswered {
    /// Whether a broker may have seen the call.
    const fn was_heard(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Silent(_))
    }

    /// The same as a fault, without the address.
    fn fault(self) -> Fault {
        match self {
            Self::NotSent(problem) => Fault::new(Reason::NotReady, problem),
            Self::Silent(wait) => Fault::new(Reason::Timeout, format!("no answer in {wait:?}")),
            Self::NoBroker(fault) | Self::Broken(fault) | Self::Refused(fault) => fault,
        }
    }

    /// The same as a fault that says where. A broker's own words need no address.
    fn at(self, address: &Address) -> Fault {
        match self {
            Self::Refused(fault) => fault,
            other => {
                let fault = other.fault();
                Fault { message: format!("{}: {}", address.as_str(), fault.message), ..fault }
            }
        }
    }
}

fn unanswered(status: &Status) -> Unanswered {
    if let Some(problem) = transport::unsent(status) {
        return Unanswered::NotSent(problem);
    }
    let fault = Fault::from(status);
    match (fault::is_own(status), status.code()) {
        (true, _) => Unanswered::Refused(fault),
        (false, tonic::Code::Unimplemented) => Unanswered::NoBroker(fault),
        (false, _) => Unanswered::Broken(fault),
    }
}
