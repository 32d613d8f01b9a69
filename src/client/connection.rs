//! Connections: one per broker address, made once and shared by all callers.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::{
    error::ConnectError,
    options::DEFAULT_PORT,
    transport::{BrokerChannel, Connector},
};
use crate::{
    limits,
    proto::v1::{admin_client::AdminClient, log_client::LogClient},
};

/// Validated `host:port` of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BrokerAddress(Arc<str>);

impl BrokerAddress {
    /// Parses an address. The port is optional, and the prefix `http://` is allowed.
    ///
    /// # Errors
    /// The text is no valid address.
    pub fn parse(text: &str) -> Result<Self, ConnectError> {
        let refuse = |problem| Err(ConnectError::Address { address: text.to_owned(), problem });
        let bare = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        if bare.is_empty() {
            return refuse("empty");
        }
        if bare.contains(|c: char| c.is_whitespace() || matches!(c, '/' | '@' | '?' | '#')) {
            return refuse("character that is not allowed in an address");
        }
        let (host, port) = match bare.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port)),
            _ => (bare, None),
        };
        if host.is_empty() {
            return refuse("no host");
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return refuse("IPv6 address without brackets");
        }
        match port.map(str::parse::<u16>) {
            None => Ok(Self(format!("{host}:{DEFAULT_PORT}").into())),
            Some(Ok(port)) if port > 0 => Ok(Self(format!("{host}:{port}").into())),
            Some(_) => refuse("port that is not a number from 1 to 65535"),
        }
    }

    /// Returns `host:port`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the error for an address at which no broker responds.
    pub(super) fn unreachable(&self, problem: String) -> ConnectError {
        ConnectError::NoResponse { tried: vec![(self.as_str().to_owned(), problem)] }
    }
}

/// Connections of one client.
pub(super) struct ConnectionPool {
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
    pub(super) fn new(connect: Arc<dyn Connector>, connect_timeout: Duration) -> Self {
        Self { connect, connect_timeout, channels: Mutex::default() }
    }

    /// Returns the connection to `address`; makes it if there is none. A broken connection reconnects for the next
    /// call; the calls in progress fail.
    pub(super) async fn wire(&self, address: &BrokerAddress) -> Result<BrokerChannel, ConnectError> {
        let cell = self.channels.lock().entry(address.clone()).or_default().clone();
        let channel = cell.get_or_try_init(|| self.connect(address)).await?;
        Ok(channel.clone())
    }

    /// Makes a separate connection to `address`, so that a refusal by the host is detected now.
    #[cfg(feature = "server")]
    pub(super) async fn fresh(&self, address: &BrokerAddress) -> Result<BrokerChannel, ConnectError> {
        self.connect(address).await
    }

    async fn connect(&self, address: &BrokerAddress) -> Result<BrokerChannel, ConnectError> {
        match tokio::time::timeout(self.connect_timeout, self.connect.connect(address)).await {
            Ok(connected) => connected,
            Err(_) => Err(address.unreachable(format!("no response in {:?}", self.connect_timeout))),
        }
    }
}

/// Creates a client of the Log service on a connection.
pub(super) fn log_client(channel: BrokerChannel) -> LogClient<BrokerChannel> {
    LogClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

/// Creates a client of the Admin service on a connection.
pub(super) fn admin_client(channel: BrokerChannel) -> AdminClient<BrokerChannel> {
    AdminClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::{super::transport::TcpConnector, *};

    #[test]
    fn address_is_validated_when_parsed() {
        for (text, address) in [
            ("127.0.0.1:9460", "127.0.0.1:9460"),
            ("broker-1", "broker-1:9460"),
            ("http://b:1/", "b:1"),
            ("[::1]:7", "[::1]:7"),
            ("[::1]", "[::1]:9460"),
        ] {
            assert_eq!(BrokerAddress::parse(text).expect(text).as_str(), address);
        }
        for text in ["", ":9460", "a:b", "a:0", "a:70000", "::1", "a b:1", "a/b:1", "https://a:1"] {
            assert!(BrokerAddress::parse(text).is_err(), "{text:?}");
        }
    }

    #[tokio::test]
    async fn refused_connection_names_the_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let text = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let timeout = Duration::from_secs(1);
        let pool = ConnectionPool::new(Arc::new(TcpConnector::new(timeout)), timeout);
        let error = pool.wire(&BrokerAddress::parse(&text).expect("valid")).await.expect_err("the listener is closed");
        assert_eq!(error.to_string(), format!("no broker responds at {text}: connection refused"));
    }
}
