//! Calls between brokers: the replication stream, and requests from one broker to another.
//!
//! Each call names its address and its time limit. Nothing is retried here; the caller decides what a missing response
//! means.

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
        error::{ApiError, is_broker_status},
        v1::{self, peer_client::PeerClient},
    },
};

/// Messages of a replication stream that wait for the connection. Data in flight on a link is bounded by its windows; a
/// longer queue would only delay acknowledgements.
const QUEUE: usize = 1;

/// Reason for the end of a connection or of a call on it. Conclusions about the peer's process depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum How {
    /// The host refused the connection: no process listens at the address.
    Refused,
    /// The connection broke.
    Reset,
    /// The peer ended the stream normally.
    Ended,
    /// No data arrived for too long: the process, host or network may be down, slow or partitioned.
    Silent,
}

/// Error of a call to another broker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The address in the metadata is invalid.
    #[error(transparent)]
    Address(ConnectError),
    /// The connection could not be made, broke, or timed out.
    #[error("{address}: {problem}")]
    Lost {
        /// Address of the broker.
        address: String,
        /// Reason for the end of the connection.
        how: How,
        /// Error text of the connection.
        problem: String,
    },
    /// Error returned by the broker.
    #[error("{0}")]
    Refused(ApiError),
}

/// Client for calls to other brokers. Clones share connections.
#[derive(Clone, Debug)]
pub struct Peers {
    pool: Arc<Pool>,
    connect_timeout: Duration,
}

/// Open replication stream of the follower's broker.
#[derive(Debug)]
pub struct Replicating {
    /// Messages to the leader's broker.
    pub sender: mpsc::Sender<v1::ToLeader>,
    /// Messages from the leader's broker.
    pub receiver: Streaming<v1::ToFollower>,
}

impl Peers {
    /// Creates a client over these connections. An attempt to connect fails after `connect_timeout`.
    pub fn new(connect: Arc<dyn Connect>, connect_timeout: Duration) -> Self {
        Self { pool: Arc::new(Pool::new(connect, connect_timeout)), connect_timeout }
    }

    /// Opens a replication stream on a separate connection and sends `hello`. The first message from the peer is its
    /// response to `hello`.
    ///
    /// # Errors
    /// The connection cannot be made, or the response does not start within the connect timeout.
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

    /// Requests the identity of the broker at an address, on a separate connection: a probe.
    ///
    /// # Errors
    /// No broker responds within `wait`, or the process there is no broker.
    pub async fn who_is(&self, address: &str, wait: Duration) -> Result<v1::WhoIsResponse, PeerError> {
        let to = Address::parse(address).map_err(PeerError::Address)?;
        let wire = within_connecting(&to, wait, self.pool.fresh(&to)).await?;
        within(&to, wait, client(wire).who_is(v1::WhoIsRequest {})).await
    }

    /// Reports to the controller that a process has exited.
    ///
    /// # Errors
    /// No response arrives within `wait`; the controller may have acted.
    pub async fn report_gone(
        &self,
        address: &str,
        report: v1::ReportGoneRequest,
        wait: Duration,
    ) -> Result<v1::ReportGoneResponse, PeerError> {
        let (to, wire) = self.wire(address, wait).await?;
        within(&to, wait, client(wire).report_gone(report)).await
    }

    /// Requests the progress of replicas from the broker at an address.
    ///
    /// # Errors
    /// No response arrives within `wait`.
    pub async fn marks(
        &self,
        address: &str,
        request: v1::MarksRequest,
        wait: Duration,
    ) -> Result<v1::MarksResponse, PeerError> {
        let (to, wire) = self.wire(address, wait).await?;
        within(&to, wait, client(wire).marks(request)).await
    }

    /// Requests the stats of the broker at an address.
    ///
    /// # Errors
    /// No response arrives within `wait`.
    pub async fn status(&self, address: &str, wait: Duration) -> Result<v1::StatusResponse, PeerError> {
        let (to, wire) = self.wire(address, wait).await?;
        within(&to, wait, client(wire).status(v1::StatusRequest {})).await
    }

    /// Returns the connection that all requests to one address share.
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

/// Converts the status that ended a call to `address`, or a stream, into an error.
pub fn lost(address: &str, status: &Status) -> PeerError {
    if is_broker_status(status) {
        return PeerError::Refused(ApiError::from(status));
    }
    let (how, problem) = match transport::unsent(status) {
        Some(problem) => (How::Refused, problem),
        None => (broken(status), ApiError::from(status).message),
    };
    PeerError::Lost { address: address.to_owned(), how, problem }
}

/// Returns the reason for a broken connection. A peer that does not respond to pings is [`How::Silent`]. Every other
/// break was signalled by the peer's host or by an intermediary.
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
    use crate::{client::Tcp, proto::error::ErrorCode};

    const WAIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn refused_port_differs_from_unresponsive_port() {
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
    async fn process_exit_during_call_is_no_timeout() {
        let peers = Peers::new(Arc::new(Tcp::new(WAIT)), WAIT);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (asked, ()) = tokio::join!(peers.who_is(&address, WAIT), async {
            let (stream, _) = listener.accept().await.unwrap();
            stream.readable().await.unwrap();
            drop((listener, stream));
        });
        let error = asked.unwrap_err();
        // The transport may have repeated a request that was not sent.
        assert!(matches!(&error, PeerError::Lost { how: How::Reset | How::Refused, .. }), "{error:?}");
    }

    #[test]
    fn broker_error_is_no_lost_connection() {
        let fault = ApiError::new(ErrorCode::NotReady, "not yet");
        assert_eq!(lost("a:1", &fault.clone().into()), PeerError::Refused(fault));
        let timeout = Status::deadline_exceeded("late");
        assert!(matches!(lost("a:1", &timeout), PeerError::Lost { how: How::Silent, .. }));
    }
}
