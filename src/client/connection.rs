//! Connections: one HTTP/2 connection per broker address, made once and shared by all that call there.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::OnceCell;
use tonic::transport::{Channel, Endpoint};

use super::{
    error::{ConnectError, root_cause},
    lock::lock,
    options::DEFAULT_PORT,
};
use crate::{
    limits,
    proto::v1::{admin_client::AdminClient, log_client::LogClient},
};

// Measured (docs/performance.md): with the message codec's large buffers these carry twice what the defaults do, and
// the stream window bounds throughput over real round trips.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES: u32 = 256 << 10;

/// A peer that answers no ping for this long is gone.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// A broker's `host:port`, checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Address(Arc<str>);

impl Address {
    /// Checks one address. The port may be left out, and `http://` may stand before it.
    pub(super) fn parse(text: &str) -> Result<Self, ConnectError> {
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

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The connections of one client.
#[derive(Debug)]
pub(super) struct Pool {
    connect_timeout: Duration,
    channels: Mutex<BTreeMap<Address, Arc<OnceCell<Channel>>>>,
}

impl Pool {
    pub(super) fn new(connect_timeout: Duration) -> Self {
        Self { connect_timeout, channels: Mutex::default() }
    }

    /// The connection to `address`, made now if there is none. Once made it mends itself when it breaks; the calls that
    /// it carried fail.
    pub(super) async fn channel(&self, address: &Address) -> Result<Channel, ConnectError> {
        let cell = lock(&self.channels).entry(address.clone()).or_default().clone();
        let channel = cell.get_or_try_init(|| self.connect(address)).await?;
        Ok(channel.clone())
    }

    async fn connect(&self, address: &Address) -> Result<Channel, ConnectError> {
        let no_answer =
            |problem: String| ConnectError::NoAnswer { tried: vec![(address.as_str().to_owned(), problem)] };
        let endpoint = Endpoint::from_shared(format!("http://{}", address.as_str()))
            .map_err(|error| no_answer(root_cause(&error)))?
            .connect_timeout(self.connect_timeout)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true);
        match tokio::time::timeout(self.connect_timeout, endpoint.connect()).await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(no_answer(root_cause(&error))),
            Err(_) => Err(no_answer(format!("no answer in {:?}", self.connect_timeout))),
        }
    }
}

/// The log service over a connection.
pub(super) fn log_client(channel: Channel) -> LogClient<Channel> {
    LogClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

/// The admin service over a connection.
pub(super) fn admin_client(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_before_anything_is_called() {
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
        let pool = Pool::new(Duration::from_secs(1));
        let error = pool.channel(&Address::parse(&text).expect("valid")).await.expect_err("nobody listens");
        assert_eq!(error.to_string(), format!("no broker answers at {text}: connection refused"));
    }
}
