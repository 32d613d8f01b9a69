//! Connection options of an etcd cluster: endpoints, TLS and login, validated before a connection is made.

use std::{fmt, time::Duration};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

/// Scheme of an endpoint with TLS.
const HTTPS_SCHEME: &str = "https://";

/// Default timeout of one attempt of a call.
const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// Interval of TCP keepalive probes on an idle connection, so that routers on its path do not drop the connection. The
/// operating systems exchange the probes, without the processes.
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Connection options of an etcd cluster.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// URLs of the members, `http://host:port` or `https://host:port`. Each attempt of a request is sent to one of
    /// them.
    pub endpoints: Vec<String>,
    /// Trusted authority and client certificate, for `https`. `None`: the system's authorities and no client
    /// certificate.
    pub tls: Option<EtcdTls>,
    /// User, if etcd requires one.
    pub login: Option<EtcdLogin>,
    /// Timeout of one attempt of a call: longer than a response takes under load, shorter than the renewal interval of
    /// a lease.
    pub request_timeout: Duration,
}

/// TLS for connections to etcd. All values are PEM, as read from their files.
#[derive(Clone, Default)]
pub struct EtcdTls {
    /// The only trusted authority. `None`: the system's authorities.
    pub ca: Option<Vec<u8>>,
    /// Client certificate, if etcd requires one.
    pub identity: Option<EtcdIdentity>,
}

/// A client certificate.
#[derive(Clone)]
pub struct EtcdIdentity {
    /// Certificate with its intermediate certificates.
    pub certificate: Vec<u8>,
    /// Private key of the certificate.
    pub key: Vec<u8>,
}

/// A user of etcd.
#[derive(Clone)]
pub struct EtcdLogin {
    /// User name.
    pub user: String,
    /// Password.
    pub password: String,
}

impl fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdTls").field("ca", &self.ca.is_some()).field("identity", &self.identity.is_some()).finish()
    }
}

impl fmt::Debug for EtcdIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EtcdIdentity")
    }
}

impl fmt::Debug for EtcdLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdLogin").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Error in the options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EtcdOptionsError {
    /// No endpoint is given.
    #[error("no etcd endpoint is named: name at least one, as http://host:2379")]
    NoEndpoints,
    /// An endpoint is not the URL of a member.
    #[error("{endpoint:?} is no etcd endpoint ({reason}): write it as http://host:2379 or https://host:2379")]
    Endpoint {
        /// The endpoint, without a possible password.
        endpoint: String,
        /// Description of the problem.
        reason: String,
    },
    /// An endpoint is given twice. A retry could then reach the same member again.
    #[error("the etcd endpoint {endpoint} is named twice: name each member once")]
    Twice { endpoint: String },
    /// TLS is set and an endpoint does not use it.
    #[error(
        "TLS is set for etcd and the endpoint {endpoint} does not use it: write https://, or leave the TLS settings out"
    )]
    PlainEndpoint { endpoint: String },
    /// The certificates are unusable.
    #[error("the TLS settings for etcd cannot be used: {reason}")]
    Tls {
        /// Description of the problem.
        reason: String,
    },
    /// The request timeout is too short for any attempt.
    #[error("a request timeout of {} ms for etcd is too short: set at least 1 ms", request_timeout.as_millis())]
    RequestTimeout { request_timeout: Duration },
}

impl EtcdOptions {
    /// Returns options with plain HTTP or the system's authorities, no login, and one second per attempt.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            tls: None,
            login: None,
            request_timeout: DEFAULT_REQUEST_TIMEOUT,
        }
    }

    /// Validates the options, without a connection.
    pub fn check(&self) -> Result<(), EtcdOptionsError> {
        if self.endpoints.is_empty() {
            return Err(EtcdOptionsError::NoEndpoints);
        }
        if self.request_timeout < Duration::from_millis(1) {
            return Err(EtcdOptionsError::RequestTimeout { request_timeout: self.request_timeout });
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let uses_tls = validate_endpoint(endpoint)?;
            if self.endpoints[..index].contains(endpoint) {
                return Err(EtcdOptionsError::Twice { endpoint: endpoint.clone() });
            }
            if !uses_tls && self.tls.is_some() {
                return Err(EtcdOptionsError::PlainEndpoint { endpoint: endpoint.clone() });
            }
        }
        let Some(tls) = &self.tls else { return Ok(()) };
        let contains = |pem: &[u8], marker: &str| String::from_utf8_lossy(pem).contains(marker);
        let tls_error = |reason: &str| Err(EtcdOptionsError::Tls { reason: reason.to_owned() });
        // A file without a certificate would trust no authority, and every connection would fail without a clear error.
        if tls.ca.as_ref().is_some_and(|ca| !contains(ca, "-----BEGIN CERTIFICATE-----")) {
            return tls_error("the authority's file holds no PEM certificate");
        }
        let identity = tls.identity.as_ref();
        if identity.is_some_and(|identity| !contains(&identity.certificate, "-----BEGIN CERTIFICATE-----")) {
            return tls_error("the client certificate's file holds no PEM certificate");
        }
        if identity.is_some_and(|identity| !contains(&identity.key, "PRIVATE KEY-----")) {
            return tls_error("the client key's file holds no PEM private key");
        }
        Ok(())
    }

    /// Converts the options to `etcd_client`'s, for one endpoint. Omits the login: with a login, `etcd_client` connects
    /// as soon as the client is created.
    pub(super) fn connect_options(&self, endpoint: &str) -> ConnectOptions {
        // Shorter than the request timeout, so that a connection that cannot be established fails with its own error,
        // which shows that nothing was sent.
        let connect_timeout = self.request_timeout * 3 / 4;
        let options = ConnectOptions::new()
            .with_connect_timeout(connect_timeout)
            .with_tcp_keepalive(TCP_KEEPALIVE_INTERVAL)
            .with_require_leader(true);
        if !endpoint.starts_with(HTTPS_SCHEME) {
            return options;
        }
        let tls = self.tls.clone().unwrap_or_default();
        let tls_options = match tls.ca {
            Some(ca) => TlsOptions::new().ca_certificate(Certificate::from_pem(ca)),
            None => TlsOptions::new().with_native_roots(),
        };
        options.with_tls(match tls.identity {
            Some(identity) => tls_options.identity(Identity::from_pem(identity.certificate, identity.key)),
            None => tls_options,
        })
    }
}

/// Validates the URL of a member. Returns true if the URL uses TLS.
fn validate_endpoint(endpoint: &str) -> Result<bool, EtcdOptionsError> {
    let invalid = |endpoint: &str, reason: &str| {
        Err(EtcdOptionsError::Endpoint { endpoint: endpoint.to_owned(), reason: reason.to_owned() })
    };
    let (uses_tls, rest) = match (endpoint.strip_prefix(HTTPS_SCHEME), endpoint.strip_prefix("http://")) {
        (Some(rest), _) => (true, rest),
        (None, Some(rest)) => (false, rest),
        (None, None) => return invalid(endpoint, "it begins with neither http:// nor https://"),
    };
    if let Some((_, address)) = rest.rsplit_once('@') {
        // Without the user: the text before the `@` may contain a password.
        return invalid(address, "it must not contain a user");
    }
    if let Some(end) = rest.find(['/', '?', '#']) {
        return invalid(endpoint, &format!("remove {:?}", &rest[end..]));
    }
    let Some((host, port)) = rest.rsplit_once(':') else { return invalid(endpoint, "it has no port") };
    if host.is_empty() || host.contains(char::is_whitespace) || (host.contains(':') && !host.starts_with('[')) {
        return invalid(endpoint, "it has no host");
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(uses_tls),
        _ => invalid(endpoint, &format!("{port:?} is no port")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_error(options: &EtcdOptions) -> String {
        options.check().expect_err("rejected").to_string()
    }

    #[test]
    fn only_member_urls_are_valid_endpoints() {
        for good in ["http://a:1", "https://etcd-1.example:2379", "http://[::1]:2379", "http://127.0.0.1:65535"] {
            assert_eq!(EtcdOptions::new([good]).check(), Ok(()), "{good}");
        }
        for (bad, reason) in [
            ("a:2379", "neither http:// nor https://"),
            ("grpc://a:1", "neither http:// nor https://"),
            ("http://a", "no port"),
            ("http://:2379", "no host"),
            ("http://a:0", "no port"),
            ("http://a:70000", "no port"),
            ("http://a:b", "no port"),
            ("http://::1:2379", "no host"),
            ("http://a:1/v3", "remove \"/v3\""),
            ("http://a:1?x", "remove \"?x\""),
            ("http://a b:1", "no host"),
            ("", "neither http:// nor https://"),
        ] {
            let error = check_error(&EtcdOptions::new([bad]));
            assert!(error.contains(reason) && error.contains(bad), "{bad}: {error}");
        }
        let error = check_error(&EtcdOptions::new(["http://root:secret@a:1"]));
        assert!(error.contains("it must not contain a user") && !error.contains("secret"), "{error}");
        assert!(
            check_error(&EtcdOptions::new(["http://a:1", "http://b:1", "http://a:1"]))
                .contains("http://a:1 is named twice")
        );
        assert!(check_error(&EtcdOptions::new([""; 0])).contains("at least one"));
        let without_timeout = EtcdOptions { request_timeout: Duration::ZERO, ..EtcdOptions::new(["http://a:1"]) };
        assert!(check_error(&without_timeout).contains("0 ms"));
    }

    #[test]
    fn tls_without_certificate_or_https_is_rejected() {
        let with = |endpoint: &str, tls: EtcdTls| EtcdOptions { tls: Some(tls), ..EtcdOptions::new([endpoint]) };
        assert!(check_error(&with("http://a:1", EtcdTls::default())).contains("write https://"));
        let ca = EtcdTls { ca: Some(b"not PEM".to_vec()), identity: None };
        assert!(check_error(&with("https://a:1", ca)).contains("holds no PEM certificate"));
        let certificate = b"-----BEGIN CERTIFICATE-----".to_vec();
        let key = EtcdIdentity { certificate, key: b"-----BEGIN CERTIFICATE-----".to_vec() };
        assert!(
            check_error(&with("https://a:1", EtcdTls { ca: None, identity: Some(key) })).contains("no PEM private key")
        );
    }

    #[test]
    fn secrets_are_not_printed() {
        let mut options = EtcdOptions::new(["https://a:1"]);
        options.login = Some(EtcdLogin { user: "root".to_owned(), password: "secret".to_owned() });
        let identity = EtcdIdentity { certificate: b"secret".to_vec(), key: b"secret".to_vec() };
        options.tls = Some(EtcdTls { ca: None, identity: Some(identity) });
        let printed = format!("{options:?}");
        assert!(printed.contains("root") && !printed.contains("secret"), "{printed}");
    }
}
