//! The named listeners of a broker, as its registration publishes them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Advertised listeners of a broker by name. Entries that this version cannot read are dropped: newer versions may add
/// listeners and protocols.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<String, serde_json::Value>")]
pub struct Endpoints(BTreeMap<String, Endpoint>);

impl From<BTreeMap<String, serde_json::Value>> for Endpoints {
    fn from(listeners: BTreeMap<String, serde_json::Value>) -> Self {
        let readable =
            listeners.into_iter().filter_map(|(name, value)| Some((name, serde_json::from_value(value).ok()?)));
        Self(readable.collect())
    }
}

/// Address and protocol of one listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Protocol of the listener.
    pub protocol: Protocol,
    /// Address as `host:port`.
    pub address: String,
}

/// Protocol of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// gRPC without TLS.
    Grpc,
    /// HTTP/1 without TLS.
    Http,
}

impl Endpoints {
    // Names of the listeners in a registration.
    const CLIENT: &str = "client";
    const HTTP: &str = "http";
    const PEER: &str = "peer";

    /// Returns the endpoints of a broker with this client address.
    pub fn new(client: String) -> Self {
        Self(BTreeMap::new()).with_listener(Self::CLIENT, Protocol::Grpc, client)
    }

    /// Adds the HTTP listener.
    #[must_use]
    pub fn with_http(self, address: String) -> Self {
        self.with_listener(Self::HTTP, Protocol::Http, address)
    }

    /// Adds the listener for other brokers.
    #[must_use]
    pub fn with_peer(self, address: String) -> Self {
        self.with_listener(Self::PEER, Protocol::Grpc, address)
    }

    /// Returns the gRPC address for clients; empty if there is none.
    pub fn client(&self) -> &str {
        self.address(Self::CLIENT, Protocol::Grpc).unwrap_or_default()
    }

    /// Returns the address of the HTTP pages; `None` if none is registered.
    pub fn http(&self) -> Option<&str> {
        self.address(Self::HTTP, Protocol::Http)
    }

    /// Returns the address for other brokers; `None` if none is registered, as by a standalone broker.
    pub fn peer(&self) -> Option<&str> {
        self.address(Self::PEER, Protocol::Grpc)
    }

    fn with_listener(mut self, name: &str, protocol: Protocol, address: String) -> Self {
        self.0.insert(name.to_owned(), Endpoint { protocol, address });
        self
    }

    /// Returns the address of a listener; `None` if there is no listener with this name and protocol.
    fn address(&self, name: &str, protocol: Protocol) -> Option<&str> {
        self.0.get(name).filter(|endpoint| endpoint.protocol == protocol).map(|endpoint| endpoint.address.as_str())
    }
}
