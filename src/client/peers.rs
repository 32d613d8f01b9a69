//! How brokers call each other: the stream that carries replication, and the questions that one broker asks another.
//!
//! Every call says which address it goes to and how long it may take; nothing is retried here. Who calls knows what an answer that did
//! not come means.

use std::{error::Error, sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{
    connection::{Address, Pool},
    error::ConnectError,
    transport::{self, Connect, Wire},
};
use crate::{
    limits,
    proto::{
        fault::{self, Fault},
        v1::{self, peer_client::PeerClient},
    },
};

/// Messages of a replication stream that wait for the connection. What a link has under way is bounded by its windows; a queue here
/// would only make acknowledgements late.
const QUEUE: usize = 1;

/// How a connection, or a call over it, ended: what can be concluded about the process at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum How {
    /// The system there refused the connection: nobody listens at that address.
    Refused,
    /// The connection broke.
    Reset,
    /// The other side ended the stream in good order.
    Ended,
    /// Nothing was heard for too long: it, or the network, may be gone, slow or cut.
    Silent,
}

/// A call to another broker that was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The address in the metadata is none.
    #[error(transparent)]
    Address(ConnectError),
    /// The connection could not be made, or broke, or was silent.
    #[error("{address}: {problem}")]
    Lost {
        /// Where.
        address: String,
        /// How.
        how: How,
        /// What the system said.
        problem: String,
    },
    /// The broker's own refusal.
    #[error("{0}")]
    Refused(Fault),
}

/// The way to other brokers. Clones share connections.
#[derive(Clone, Debug)]
pub struct Peers {
    pool: Arc<Pool>,
    connect_timeout: Duration,
}

/// An open replication stream, seen from the follower's broker.
#[derive(Debug)]
pub struct Replicating {
    /// What goes to the leader's broker.
    pub sender: mpsc::Sender<v1::ToLeader>,
    /// What comes from there.
    pub receiver: Streaming<v1::ToFollower>,
}

impl Peers {
    /// The way over these connections. One that is not up after `connect_timeout` is given up.
    pub fn new(connect: Arc<dyn Connect>, connect_timeout: Duration) -> Self {
        Self { pool: Arc::new(Pool::new(connect, connect_timeout)), connect_timeout }
    }

    /// Opens a replication stream over a connection of its own, and says hello on it. What the other side thinks of that is its first
    /// message.
    ///
    /// # Errors
    /// When the connection cannot be made, or no answer begins in the connect timeout.
    pub async fn replicate(&self, address: &str, hello: v1::Hello) -> Result<Replicating, PeerError> {
        let to = Address::parse(address).map_err(PeerError::Address)?;
        let wire = self.pool.fresh(&to).await.map_err(|error| unmade(&to, &error))?;
        let (sender, messages) = mpsc::channel(QUEUE);
        let hello = v1::ToLeader { is: Some(v1::to_leader::Is::Hello(hello)), ..Default::default() };
        sender.try_send(hello).expect("the queue is new and has room for one");
        let mut client = client(wire);
        let call = client.replicate(ReceiverStream::new(messages));
        let receiver = within(&to, self.connect_timeout, call).await?;
        Ok(Replicating { sender, receiver })
    }

    /// Asks who answers there, over a connection of its own: a probe.
    ///
    /// # Errors
    /// When nobody answers in that time, or what answers is no broker.
    pub async fn who_is(&self, address: &str, wait: Duration) -> Result<v1::WhoIsResponse, PeerError> {
        let to = Address::parse(address).map_err(PeerError::Address)?;
        let wire = within_connecting(&to, wait, self.pool.fresh(&to)).await?;
        within(&to, wait, client(wire).who_is(v1::WhoIsRequest {})).await
    }

    /// Tells the controller that a process is gone.
    ///
    /// # Errors
    /// When no answer comes in that time; the controller may have acted.
    pub async fn report_gone(
        &self,
        address: &str,
        report: v1::ReportGoneRequest,
        wait: Duration,
    ) -> Result<v1::ReportGoneResponse, PeerError> {
        let (to, wire) = self.wire(address, wait).await?;
        within(&to, wait, client(wire).report_gone(report)).await
    }

    /// Asks how replicas stand there.
    ///
    /// # Errors
    /// When no answer comes in that time.
    pub async fn marks(
        &self,
        address: &str,
        request: v1::MarksRequest,
        wait: Duration,
    ) -> Result<v1::MarksResponse, PeerError> {
        let (to, wire) = self.wire(address, wait).await?;
        within(&to, wait, client(wire).marks(request)).await
    }

    /// Asks how the broker there is.
    ///
    /// # Errors
    /// When no answer comes in that time.
    pub async fn status(&self, address: &str, wait: Duration) -> Result<v1::StatusResponse, PeerError> {
        let (to, wire) = self.wire(address, wait).await?;
        within(&to, wait, client(wire).status(v1::StatusRequest {})).await
    }

    /// The connection that all questions to one address share.
    async fn wire(&self, address: &str, wait: Duration) -> Result<(Address, Wire), PeerError> {
        let to = Address::parse(address).map_err(PeerError::Address)?;
        let wire = within_connecting(&to, wait, self.pool.wire(&to)).await?;
        Ok((to, wire))
    }
}

fn client(wire: Wire) -> PeerClient<Wire> {
    PeerClient::new(wire)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

async fn within_connecting(
    to: &Address,
    wait: Duration,
    connecting: impl Future<Output = Result<Wire, ConnectError>>,
) -> Result<Wire, PeerError> {
    match tokio::time::timeout(wait, connecting).await {
        Ok(connected) => connected.map_err(|error| unmade(to, &error)),
        Err(_) => Err(silent(to, wait)),
    }
}

async fn within<T>(
    to: &Address,
    wait: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, PeerError> {
    match tokio::time::timeout(wait, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(lost(to.as_str(), &status)),
        Err(_) => Err(silent(to, wait)),
    }
}

fn silent(to: &Address, wait: Duration) -> PeerError {
    PeerError::Lost { address: to.as_str().to_owned(), how: How::Silent, problem: format!("no answer in {wait:?}") }
}

fn unmade(to: &Address, error: &ConnectError) -> PeerError {
    let how = if error.is_refused() { How::Refused } else { How::Silent };
    PeerError::Lost { address: to.as_str().to_owned(), how, problem: error.problem() }
}

/// What a status says that ended a call to `address`, or a stream.
pub fn lost(address: &str, status: &Status) -> PeerError {
    if fault::is_own(status) {
        return PeerError::Refused(Fault::from(status));
    }
    let (how, problem) = match transport::unsent(status) {
        Some(problem) => (How::Refused, problem),
        None => (broken(status), Fault::from(status).message),
    };
    PeerError::Lost { address: address.to_owned(), how, problem }
}

/// How a connection broke. A peer that answers no ping is silent; everything else that breaks a call was said by somebody: the system
/// there, or something in between.
fn broken(status: &Status) -> How {
    let mut next = status.source();
    while let Some(error) = next {
        let timed_out = |io: &std::io::Error| io.kind() == std::io::ErrorKind::TimedOut;
        if error.downcast_ref::<std::io::Error>().is_some_and(timed_out) || error.to_string().contains("timed out") {
            return How::Silent;
        }
        next = error.source();
    }
    if status.code() == Code::DeadlineExceeded { How::Silent } else { How::Reset }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{client::Tcp, proto::fault::Reason};

    const WAIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_port_that_nobody_listens_at_is_told_from_one_that_says_nothing() {
        let peers = Peers::new(Arc::new(Tcp::new(WAIT)), WAIT);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let short = Duration::from_millis(50);
        let silent = peers.who_is(&address, short).await.unwrap_err();
        assert!(matches!(&silent, PeerError::Lost { how: How::Silent, .. }), "{silent:?}");
        drop(listener);
        let refused = peers.who_is(&address, WAIT).await.unwrap_err();
        assert!(matches!(&refused, PeerError::Lost { how: How::Refused, .. }), "{refused:?}");
        assert_eq!(refused.to_string(), format!("{address}: connection refused"));
        let refused = peers.replicate(&address, v1::Hello::default()).await.unwrap_err();
        assert!(matches!(&refused, PeerError::Lost { how: How::Refused, .. }), "{refused:?}");
        assert!(matches!(peers.status("no port:x", WAIT).await, Err(PeerError::Address(_))));
    }

    #[tokio::test]
    async fn a_process_that_goes_while_it_is_asked_is_no_silence() {
        let peers = Peers::new(Arc::new(Tcp::new(WAIT)), WAIT);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (asked, ()) = tokio::join!(peers.who_is(&address, WAIT), async {
            let (stream, _) = listener.accept().await.unwrap();
            stream.readable().await.unwrap();
            drop((listener, stream));
        });
        let error = asked.unwrap_err();
        // The transport may have tried once more what had not been sent.
        assert!(matches!(&error, PeerError::Lost { how: How::Reset | How::Refused, .. }), "{error:?}");
    }

    #[test]
    fn a_brokers_own_word_is_no_sign_that_it_is_gone() {
        let fault = Fault::new(Reason::NotReady, "not yet");
        assert_eq!(lost("a:1", &fault.clone().into()), PeerError::Refused(fault));
        let timeout = Status::deadline_exceeded("late");
        assert!(matches!(lost("a:1", &timeout), PeerError::Lost { how: How::Silent, .. }));
    }
}
