//! The Rust client: [`Producer`], [`Consumer`] and [`Admin`] over gRPC.
//!
//! # Overview
//!
//! A [`Client`] knows one cluster. It learns from any broker who leads what (`routing`), keeps one HTTP/2 connection per
//! broker (`connection`), and makes the three faces. Each producer and each consumer has one task that owns its state;
//! the handles that users hold only queue work for it or take what it has fetched.
//!
//! # Invariants
//!
//! - A leader that metadata named is never replaced by one of an older epoch.
//! - A producer's records reach a partition in the order in which they were sent, once, whatever had to be retried
//!   (see [`producer`]); where that cannot be known the send fails and says so.
//! - A consumer hands out records in offset order, none twice and none left out, whatever broke in between.
//! - Memory is bounded: a producer by `ProducerOptions::memory_bytes`, a consumer by a few responses per leader.
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
mod options;
pub mod producer;
mod routing;
#[cfg(all(test, feature = "server"))]
mod tests;

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tonic::{Status, transport::Channel};

pub use self::{
    admin::{Admin, Broker, Cluster, NewTopic, OffsetAt, PartitionDescription, TopicDescription, TopicSummary},
    consumer::{ConsumedBatch, ConsumedRecord, Consumer, ConsumerOptions, OnOutOfRange},
    error::{CallError, ConnectError, ConsumeError, SendError},
    options::{DEFAULT_PORT, Options},
    producer::{Ack, Delivery, Held, NewRecord, Producer, ProducerOptions},
    routing::{PartitionRoute, TopicRoute},
};
use self::{
    connection::{Address, Pool},
    routing::Routing,
};
use crate::{
    proto::{
        fault::{Fault, Reason},
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
    preferred: AtomicUsize,
}

impl Client {
    /// Finds a cluster by the addresses of some of its brokers, `host:port` separated by commas.
    ///
    /// # Errors
    /// When an address is none, or none of them answers.
    pub async fn connect(bootstrap: &str, options: Options) -> Result<Self, CallError> {
        let texts = bootstrap.split(',').map(str::trim).filter(|text| !text.is_empty());
        let bootstrap: Vec<Address> = texts.map(Address::parse).collect::<Result<_, _>>()?;
        if bootstrap.is_empty() {
            return Err(ConnectError::NoAddress.into());
        }
        let pool = Pool::new(options.connect_timeout);
        let inner = Inner { options, bootstrap, pool, routing: Routing::default(), preferred: AtomicUsize::new(0) };
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

    fn options(&self) -> &Options {
        &self.inner.options
    }

    fn routing(&self) -> &Routing {
        &self.inner.routing
    }

    async fn channel(&self, address: &Address) -> Result<Channel, ConnectError> {
        self.inner.pool.channel(address).await
    }

    /// Makes what is known newer than generation `seen`.
    async fn refresh(&self, seen: u64, wanted: &[&str]) -> Result<(), CallError> {
        let ask = |topics: Vec<String>| {
            self.any_broker(move |channel| {
                let request = v1::GetMetadataRequest { topics: topics.clone(), all_topics: false };
                async move { connection::admin_client(channel).get_metadata(request).await }
            })
        };
        self.inner.routing.refresh(seen, wanted, ask).await
    }

    /// Calls whichever broker answers: first the one that did last, then the others. A call that a broker has taken is
    /// not repeated elsewhere.
    async fn any_broker<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn(Channel) -> R,
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut addresses = self.inner.routing.brokers();
        for address in &self.inner.bootstrap {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        let first = self.inner.preferred.load(Ordering::Relaxed);
        let mut tried = Vec::new();
        for step in 0..addresses.len() {
            let index = (first + step) % addresses.len();
            let address = &addresses[index];
            let channel = match self.channel(address).await {
                Ok(channel) => channel,
                Err(ConnectError::NoAnswer { tried: here }) => {
                    tried.extend(here);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            match self.bounded(address, call(channel)).await {
                // The connection was there once and is not now: nothing was sent, so the next may be asked.
                Err(Unanswered::NotSent(problem)) => tried.push((address.as_str().to_owned(), problem)),
                Err(Unanswered::Failed(fault)) => return Err(fault.into()),
                Ok(answer) => {
                    self.inner.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
            }
        }
        Err(ConnectError::NoAnswer { tried }.into())
    }

    /// One unary call with the request timeout.
    async fn bounded<R, T>(&self, address: &Address, call: R) -> Result<T, Unanswered>
    where
        R: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        match tokio::time::timeout(self.options().request_timeout, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(unanswered(&status)),
            Err(_) => {
                let message = format!("{} did not answer in {:?}", address.as_str(), self.options().request_timeout);
                Err(Unanswered::Failed(Fault::new(Reason::Timeout, message)))
            }
        }
    }

    /// Repeats a call that may be repeated until it succeeds, fails for good, or the request timeout is over.
    async fn retried<F, R, T>(&self, call: F) -> Result<T, CallError>
    where
        F: Fn() -> R,
        R: Future<Output = Result<T, CallError>>,
    {
        let deadline = clock::monotonic() + self.options().request_timeout;
        let mut pauses = self.options().backoff();
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
            tokio::time::sleep(pause).await;
        }
    }
}

/// A unary call without an answer.
enum Unanswered {
    /// The connection could not be made: the broker never saw the call.
    NotSent(String),
    /// Refused, or broken on the way.
    Failed(Fault),
}

fn unanswered(status: &Status) -> Unanswered {
    let source = std::error::Error::source(status);
    match source.and_then(|source| source.downcast_ref::<tonic::transport::Error>()) {
        Some(error) if error.to_string() == "transport error" && is_connect(error) => {
            Unanswered::NotSent(error::root_cause(error))
        }
        _ => Unanswered::Failed(Fault::from(status)),
    }
}

/// Whether an error chain says that the connection could not be made.
fn is_connect(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused) {
            return true;
        }
        next = error.source();
    }
    false
}
