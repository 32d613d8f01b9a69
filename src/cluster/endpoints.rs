//! How a broker is reached: its listeners by name, in its registration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The listeners of a broker by their names, as others reach them. Entries that this version cannot read are dropped: newer versions may
/// add listeners and protocols.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<String, serde_json::Value>")]
pub struct Endpoints(BTreeMap<String, Endpoint>);

impl From<BTreeMap<String, serde_json::Value>> for Endpoints {
    fn from(listeners: BTreeMap<String, serde_json::Value>) -> Self {
        let known = listeners.into_iter().filter_map(|(name, value)| Some((name, serde_json::from_value(value).ok()?)));
        Self(known.collect())
    }
}

/// How one listener is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// What is spoken there.
    pub protocol: Protocol,
    /// `host:port`.
    pub address: String,
}

/// What is spoken at a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// gRPC without TLS.
    Grpc,
    /// HTTP/1 without TLS.
    Http,
}

impl Endpoints {
    /// The names of the listeners.
    const CLIENT: &str = "client";
    const HTTP: &str = "http";
    const PEER: &str = "peer";

    /// A broker that clients reach at `client`.
    pub fn new(client: String) -> Self {
        Self(BTreeMap::new()).with(Self::CLIENT, Protocol::Grpc, client)
    }

    /// The same, with pages at `address`.
    #[must_use]
    pub fn with_http(self, address: String) -> Self {
        self.with(Self::HTTP, Protocol::Http, address)
    }

    /// The same, reached by other brokers at `address`.
    #[must_use]
    pub fn with_peer(self, address: String) -> Self {
        self.with(Self::PEER, Protocol::Grpc, address)
    }

    /// Where clients reach it.
    pub fn client(&self) -> &str {
        self.address(Self::CLIENT, Protocol::Grpc).unwrap_or_default()
    }

    /// Where its pages are; `None` where nobody said.
    pub fn http(&self) -> Option<&str> {
        self.address(Self::HTTP, Protocol::Http)
    }

    /// Where other brokers reach it; `None` for a broker alone.
    pub fn peer(&self) -> Option<&str> {
        self.address(Self::PEER, Protocol::Grpc)
    }

    fn with(mut self, name: &str, protocol: Protocol, address: String) -> Self {
        self.0.insert(name.to_owned(), Endpoint { protocol, address });
        self
    }

    fn address(&self, name: &str, protocol: Protocol) -> Option<&str> {
        self.0.get(name).filter(|endpoint| endpoint.protocol == protocol).map(|endpoint| endpoint.address.as_str())
    }
}
