//! Connections: one per broker address, made once and shared by all callers.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::OnceCell;

use super::{
    error::ConnectError,
    lock::lock,
    options::DEFAULT_PORT,
    transport::{Connect, Wire},
};
use crate::{
    limits,
    proto::v1::{admin_client::AdminClient, log_client::LogClient},
};

/// Validated `host:port` of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(Arc<str>);

impl Address {
    /// Parses an address. The port is optional, and the prefix `http://` is allowed.
    ///
    /// # Errors
    /// The text is no valid address.
    pub fn parse(text: &str) -> Result<Self, ConnectError> {
        let refuse = |problem| Err(ConnectError::Address { address: text.to_owned(), problem });
        let bare = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        if bare.is_empty() {
            return refuse("it is empty");
        }
        if bare.contains(|c: char| c.is_whitespace() || matches!(c, '/' | '@' | '?' | '#')) {
            return refuse("it holds a character that no address has");
        }
        let (host, port) = match bare.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port)),
            _ => (bare, None),
        };
        if host.is_empty() {
            return refuse("the host is missing");
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return refuse("an IPv6 address needs brackets");
        }
        match port.map(str::parse::<u16>) {
            None => Ok(Self(format!("{host}:{DEFAULT_PORT}").into())),
            Some(Ok(port)) if port > 0 => Ok(Self(format!("{host}:{port}").into())),
            Some(_) => refuse("the port is not a number from 1 to 65535"),
        }
    }

    /// Returns `host:port`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the error for an address at which no broker responds.
    pub(super) fn no_answer(&self, problem: String) -> ConnectError {
        ConnectError::NoAnswer { tried: vec![(self.as_str().to_owned(), problem)] }
    }
}

/// Connections of one client.
pub(super) struct Pool {
    connect: Arc<dyn Connect>,
    connect_timeout: Duration,
    wires: Mutex<BTreeMap<Address, Arc<OnceCell<Wire>>>>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("wires", &self.wires).finish_non_exhaustive()
    }
}

impl Pool {
    pub(super) fn new(connect: Arc<dyn Connect>, connect_timeout: Duration) -> Self {
        Self { connect, connect_timeout, wires: Mutex::default() }
    }

    /// Returns the connection to `address`; makes it if there is none. A broken connection reconnects for the next
    /// call; the calls in progress fail.
    pub(super) async fn wire(&self, address: &Address) -> Result<Wire, ConnectError> {
        let cell = lock(&self.wires).entry(address.clone()).or_default().clone();
        let wire = cell.get_or_try_init(|| self.connect(address)).await?;
        Ok(wire.clone())
    }

    /// Makes a separate connection to `address`, so that a refusal by the host is detected now.
    #[cfg(feature = "server")]
    pub(super) async fn fresh(&self, address: &Address) -> Result<Wire, ConnectError> {
        self.connect(address).await
    }

    async fn connect(&self, address: &Address) -> Result<Wire, ConnectError> {
        match tokio::time::timeout(self.connect_timeout, self.connect.connect(address)).await {
            Ok(connected) => connected,
            Err(_) => Err(address.no_answer(format!("no answer in {:?}", self.connect_timeout))),
        }
    }
}

/// Creates a client of the Log service on a connection.
pub(super) fn log_client(wire: Wire) -> LogClient<Wire> {
    LogClient::new(wire)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

/// Creates a client of the Admin service on a connection.
pub(super) fn admin_client(wire: Wire) -> AdminClient<Wire> {
    AdminClient::new(wire)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::{super::transport::Tcp, *};

    #[test]
    fn address_is_validated_when_parsed() {
        for (text, address) in [
            ("127.0.0.1:9460", "127.0.0.1:9460"),
            ("broker-1", "broker-1:9460"),
            ("http://b:1/", "b:1"),
            ("[::1]:7", "[::1]:7"),
            ("[::1]", "[::1]:9460"),
        ] {
            assert_eq!(Address::parse(text).expect(text).as_str(), address);
        }
        for text in ["", ":9460", "a:b", "a:0", "a:70000", "::1", "a b:1", "a/b:1", "https://a:1"] {
            assert!(Address::parse(text).is_err(), "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_refused_connection_names_the_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let text = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let wait = Duration::from_secs(1);
        let pool = Pool::new(Arc::new(Tcp::new(wait)), wait);
        let error = pool.wire(&Address::parse(&text).expect("valid")).await.expect_err("nobody listens");
        assert_eq!(error.to_string(), format!("no broker answers at {text}: connection refused"));
    }
}
