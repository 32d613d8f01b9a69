//! Connections: one per broker address, which all callers share, and separate ones for callers that test a host.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use tokio::sync::OnceCell;

pub(super) use super::address::BrokerAddress;
use super::{
    error::ConnectError,
    transport::{BrokerChannel, Connector},
};
use crate::{
    limits,
    proto::v1::{admin_client::AdminClient, log_client::LogClient},
    task::lock::Mutex,
};

/// Connections of one client, or of one broker to the other brokers.
pub struct ConnectionPool {
    connect: Arc<dyn Connector>,
    connect_timeout: Duration,
    channels: Mutex<BTreeMap<BrokerAddress, Arc<OnceCell<BrokerChannel>>>>,
}

impl fmt::Debug for ConnectionPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionPool").field("channels", &self.channels).finish_non_exhaustive()
    }
}

impl ConnectionPool {
    /// Creates an empty pool. `connect_timeout` bounds the time for making one connection.
    pub fn new(connect: Arc<dyn Connector>, connect_timeout: Duration) -> Self {
        Self { connect, connect_timeout, channels: Mutex::default() }
    }

    /// Returns the connection to `address`, which is made if there is none. If the connection breaks, the calls in
    /// progress fail, and the next call reconnects.
    ///
    /// # Errors
    /// No connection could be made in time.
    pub async fn channel(&self, address: &BrokerAddress) -> Result<BrokerChannel, ConnectError> {
        let cell = self.channels.lock().entry(address.clone()).or_default().clone();
        let channel = cell.get_or_try_init(|| self.connect(address)).await?;
        Ok(channel.clone())
    }

    /// Makes a connection to `address` that is not shared. A new connection shows at once whether the host refuses
    /// connections; a call on an existing connection may not.
    ///
    /// # Errors
    /// No connection could be made in time.
    pub async fn connect_separately(&self, address: &BrokerAddress) -> Result<BrokerChannel, ConnectError> {
        self.connect(address).await
    }

    /// Makes one connection within the connect timeout.
    async fn connect(&self, address: &BrokerAddress) -> Result<BrokerChannel, ConnectError> {
        match tokio::time::timeout(self.connect_timeout, self.connect.connect(address)).await {
            Ok(connected) => connected,
            Err(_) => Err(address.unreachable(format!("no response in {:?}", self.connect_timeout))),
        }
    }
}

/// Creates a client of the service `Log` with the message limits of the brokers.
pub(super) fn log_client(channel: BrokerChannel) -> LogClient<BrokerChannel> {
    LogClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

/// Creates a client of the service `Admin` with the message limits of the brokers.
pub(super) fn admin_client(channel: BrokerChannel) -> AdminClient<BrokerChannel> {
    AdminClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::{super::transport::TcpConnector, *};

    #[tokio::test]
    async fn refused_connection_names_the_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let text = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let timeout = Duration::from_secs(1);
        let pool = ConnectionPool::new(Arc::new(TcpConnector::new(timeout)), timeout);
        let error =
            pool.channel(&BrokerAddress::parse(&text).expect("valid")).await.expect_err("the listener is closed");
        assert_eq!(error.to_string(), format!("no broker responds at {text}: connection refused"));
    }
}
