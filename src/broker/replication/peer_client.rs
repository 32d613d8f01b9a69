//! Client side of calls between brokers: the replication stream, and unary requests.
//!
//! Each call has its address and timeout as arguments. No call is retried here; the caller decides what a missing
//! response means.

use std::{error::Error, sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    client::{BrokerAddress, BrokerChannel, ConnectError, ConnectionPool, Connector, unsent},
    limits,
    proto::{
        error::{ApiError, is_broker_status},
        v1::{self, peer_client},
    },
};

/// Maximum number of messages to the leader's broker that are queued before the connection of a replication stream
/// takes them. A longer queue would only delay acknowledgements.
const QUEUE_LEN: usize = 1;

/// Reason why a connection to a peer failed or ended. The failure detector derives from it whether the peer's process
/// may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DisconnectReason {
    /// The host refused the connection: no process listens at the address. Also used for a call that was never sent on
    /// a connection.
    Refused,
    /// The connection was reset, or broke for a reason other than a timeout.
    Reset,
    /// The peer ended the stream normally.
    Closed,
    /// No response or data arrived in time, or an attempt to connect failed for another reason than a refusal. The
    /// process, host or network may be down, slow or partitioned.
    TimedOut,
}

/// Error of a call to another broker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PeerError {
    /// The address in the metadata is invalid.
    #[error(transparent)]
    Address(ConnectError),
    /// The connection could not be made or broke, or no response arrived in time.
    #[error("{address}: {problem}")]
    Lost {
        /// Address of the broker.
        address: String,
        /// Reason why the connection failed or ended.
        reason: DisconnectReason,
        /// Error text of the connection.
        problem: String,
    },
    /// Error that the broker returned as its response.
    #[error("{0}")]
    Refused(ApiError),
}

/// Client for calls to other brokers. Clones share connections.
#[derive(Clone, Debug)]
pub(in crate::broker) struct PeerClient {
    pool: Arc<ConnectionPool>,
    connect_timeout: Duration,
}

/// Open replication stream, as the follower's broker uses it.
#[derive(Debug)]
pub(super) struct ReplicationStream {
    /// Messages to the leader's broker.
    pub(super) sender: mpsc::Sender<v1::ReplicateRequest>,
    /// Messages from the leader's broker.
    pub(super) receiver: Streaming<v1::ReplicateResponse>,
}

impl PeerClient {
    /// Creates a client that opens connections with `connect`. An attempt to connect fails after `connect_timeout`.
    pub(super) fn new(connect: Arc<dyn Connector>, connect_timeout: Duration) -> Self {
        Self { pool: Arc::new(ConnectionPool::new(connect, connect_timeout)), connect_timeout }
    }

    /// Opens a replication stream on a separate connection and sends `hello`. The first message from the peer is its
    /// response to `hello`.
    ///
    /// # Errors
    /// - The address is invalid.
    /// - The connection cannot be made or breaks.
    /// - The broker rejects the call.
    /// - The response does not start within the connect timeout.
    pub(super) async fn replicate(&self, address: &str, hello: v1::Hello) -> Result<ReplicationStream, PeerError> {
        let address = BrokerAddress::parse(address).map_err(PeerError::Address)?;
        let channel =
            self.pool.connect_separately(&address).await.map_err(|error| connection_error(&address, &error))?;
        let (sender, messages) = mpsc::channel(QUEUE_LEN);
        let hello =
            v1::ReplicateRequest { message: Some(v1::replicate_request::Message::Hello(hello)), ..Default::default() };
        sender.try_send(hello).expect("the queue is new and has space for one message");
        let mut client = client(channel);
        let call = client.replicate(ReceiverStream::new(messages));
        let receiver = call_with_timeout(&address, self.connect_timeout, call).await?;
        Ok(ReplicationStream { sender, receiver })
    }

    /// Requests the identity of the broker at an address, on a separate connection: a probe.
    ///
    /// # Errors
    /// - The address is invalid.
    /// - The connection cannot be made or breaks.
    /// - No response arrives in time.
    /// - The process at the address responds with an error.
    ///
    /// `timeout` limits the connection attempt and the call separately.
    pub(super) async fn get_identity(
        &self,
        address: &str,
        timeout: Duration,
    ) -> Result<v1::GetIdentityResponse, PeerError> {
        let address = BrokerAddress::parse(address).map_err(PeerError::Address)?;
        let channel = connect_with_timeout(&address, timeout, self.pool.connect_separately(&address)).await?;
        call_with_timeout(&address, timeout, client(channel).get_identity(v1::GetIdentityRequest {})).await
    }

    /// Sends a failure report to the controller at an address.
    ///
    /// # Errors
    /// The errors of [`Self::get_identity`]. After a broken connection or a timeout, the controller may still have
    /// deleted the registration of the reported broker.
    pub(super) async fn report_failure(
        &self,
        address: &str,
        report: v1::ReportFailureRequest,
        timeout: Duration,
    ) -> Result<v1::ReportFailureResponse, PeerError> {
        let (address, channel) = self.shared_channel(address, timeout).await?;
        call_with_timeout(&address, timeout, client(channel).report_failure(report)).await
    }

    /// Requests the reports of replicas from the broker at an address.
    ///
    /// # Errors
    /// The errors of [`Self::get_identity`].
    pub(super) async fn describe_replicas(
        &self,
        address: &str,
        request: v1::DescribeReplicasRequest,
        timeout: Duration,
    ) -> Result<v1::DescribeReplicasResponse, PeerError> {
        let (address, channel) = self.shared_channel(address, timeout).await?;
        call_with_timeout(&address, timeout, client(channel).describe_replicas(request)).await
    }

    /// Requests the stats of the broker at an address.
    ///
    /// # Errors
    /// The errors of [`Self::get_identity`].
    pub(super) async fn broker_stats(
        &self,
        address: &str,
        timeout: Duration,
    ) -> Result<v1::GetBrokerStatsResponse, PeerError> {
        let (address, channel) = self.shared_channel(address, timeout).await?;
        call_with_timeout(&address, timeout, client(channel).get_broker_stats(v1::GetBrokerStatsRequest {})).await
    }

    /// Returns the parsed address, and the connection that all unary requests to the address share, except probes.
    /// Connects within `timeout` if there is no connection.
    async fn shared_channel(
        &self,
        address: &str,
        timeout: Duration,
    ) -> Result<(BrokerAddress, BrokerChannel), PeerError> {
        let address = BrokerAddress::parse(address).map_err(PeerError::Address)?;
        let channel = connect_with_timeout(&address, timeout, self.pool.channel(&address)).await?;
        Ok((address, channel))
    }
}

fn client(channel: BrokerChannel) -> peer_client::PeerClient<BrokerChannel> {
    peer_client::PeerClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

/// Waits for a connection to `address`, at most `timeout`.
async fn connect_with_timeout(
    address: &BrokerAddress,
    timeout: Duration,
    connecting: impl Future<Output = Result<BrokerChannel, ConnectError>>,
) -> Result<BrokerChannel, PeerError> {
    match tokio::time::timeout(timeout, connecting).await {
        Ok(connected) => connected.map_err(|error| connection_error(address, &error)),
        Err(_) => Err(timeout_error(address, timeout)),
    }
}

/// Waits for the response to a call to `address`, at most `timeout`.
async fn call_with_timeout<T>(
    address: &BrokerAddress,
    timeout: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, PeerError> {
    match tokio::time::timeout(timeout, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(error_from_status(address.as_str(), &status)),
        Err(_) => Err(timeout_error(address, timeout)),
    }
}

/// Returns the error for a broker that did not respond within `timeout`.
fn timeout_error(address: &BrokerAddress, timeout: Duration) -> PeerError {
    PeerError::Lost {
        address: address.as_str().to_owned(),
        reason: DisconnectReason::TimedOut,
        problem: format!("no response in {timeout:?}"),
    }
}

/// Converts the error of an attempt to connect to `address`. Every failure but a refused connection counts as a
/// timeout, which proves nothing about the process.
fn connection_error(address: &BrokerAddress, error: &ConnectError) -> PeerError {
    let reason = if error.is_refused() { DisconnectReason::Refused } else { DisconnectReason::TimedOut };
    PeerError::Lost { address: address.as_str().to_owned(), reason, problem: error.problem() }
}

/// Converts the status that ended a call to `address`, or a stream, into an error: the error of the broker, or a lost
/// connection.
pub(super) fn error_from_status(address: &str, status: &Status) -> PeerError {
    if is_broker_status(status) {
        return PeerError::Refused(ApiError::from(status));
    }
    let (reason, problem) = match unsent(status) {
        Some(problem) => (DisconnectReason::Refused, problem),
        None => (disconnect_reason(status), ApiError::from(status).message),
    };
    PeerError::Lost { address: address.to_owned(), reason, problem }
}

/// Returns the reason for a broken connection: [`DisconnectReason::TimedOut`] for a timeout, such as a keepalive ping
/// without a response, else [`DisconnectReason::Reset`].
fn disconnect_reason(status: &Status) -> DisconnectReason {
    let mut source = status.source();
    while let Some(error) = source {
        let timed_out = |io: &std::io::Error| io.kind() == std::io::ErrorKind::TimedOut;
        if error.downcast_ref::<std::io::Error>().is_some_and(timed_out) || error.to_string().contains("timed out") {
            return DisconnectReason::TimedOut;
        }
        source = error.source();
    }
    if status.code() == Code::DeadlineExceeded { DisconnectReason::TimedOut } else { DisconnectReason::Reset }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{client::TcpConnector, proto::error::ErrorCode};

    const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn refused_port_differs_from_unresponsive_port() {
        let peers = PeerClient::new(Arc::new(TcpConnector::new(RESPONSE_TIMEOUT)), RESPONSE_TIMEOUT);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let short = Duration::from_millis(50);
        let timed_out = peers.get_identity(&address, short).await.unwrap_err();
        assert!(matches!(&timed_out, PeerError::Lost { reason: DisconnectReason::TimedOut, .. }), "{timed_out:?}");
        drop(listener);
        let refused = peers.get_identity(&address, RESPONSE_TIMEOUT).await.unwrap_err();
        assert!(matches!(&refused, PeerError::Lost { reason: DisconnectReason::Refused, .. }), "{refused:?}");
        assert_eq!(refused.to_string(), format!("{address}: connection refused"));
        let refused = peers.replicate(&address, v1::Hello::default()).await.unwrap_err();
        assert!(matches!(&refused, PeerError::Lost { reason: DisconnectReason::Refused, .. }), "{refused:?}");
        assert!(matches!(peers.broker_stats("no port:x", RESPONSE_TIMEOUT).await, Err(PeerError::Address(_))));
    }

    #[tokio::test]
    async fn process_exit_during_call_is_no_timeout() {
        let peers = PeerClient::new(Arc::new(TcpConnector::new(RESPONSE_TIMEOUT)), RESPONSE_TIMEOUT);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (result, ()) = tokio::join!(peers.get_identity(&address, RESPONSE_TIMEOUT), async {
            let (stream, _) = listener.accept().await.unwrap();
            stream.readable().await.unwrap();
            drop((listener, stream));
        });
        let error = result.unwrap_err();
        // The transport may repeat a request that was not sent on a new connection, which is then refused.
        assert!(
            matches!(&error, PeerError::Lost { reason: DisconnectReason::Reset | DisconnectReason::Refused, .. }),
            "{error:?}"
        );
    }

    #[test]
    fn broker_error_is_no_lost_connection() {
        let error = ApiError::new(ErrorCode::NotReady, "not yet");
        assert_eq!(error_from_status("a:1", &error.clone().into()), PeerError::Refused(error));
        let timeout = Status::deadline_exceeded("late");
        assert!(matches!(
            error_from_status("a:1", &timeout),
            PeerError::Lost { reason: DisconnectReason::TimedOut, .. }
        ));
    }
}
