//! Addresses of brokers.

use std::sync::Arc;

use super::{error::ConnectError, options::DEFAULT_PORT};

/// Validated `host:port` of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BrokerAddress(Arc<str>);

impl BrokerAddress {
    /// Parses an address. The port is optional, and the prefix `http://` is allowed.
    ///
    /// # Errors
    /// The text is no valid address.
    pub fn parse(text: &str) -> Result<Self, ConnectError> {
        let invalid = |problem| Err(ConnectError::Address { address: text.to_owned(), problem });
        let authority = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        if authority.is_empty() {
            return invalid("empty");
        }
        if authority.contains(|c: char| c.is_whitespace() || matches!(c, '/' | '@' | '?' | '#')) {
            return invalid("character that is not allowed in an address");
        }
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port)),
            _ => (authority, None),
        };
        if host.is_empty() {
            return invalid("no host");
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return invalid("IPv6 address without brackets");
        }
        match port.map(str::parse::<u16>) {
            None => Ok(Self(format!("{host}:{DEFAULT_PORT}").into())),
            Some(Ok(port)) if port > 0 => Ok(Self(format!("{host}:{port}").into())),
            Some(_) => invalid("port that is not a number from 1 to 65535"),
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
