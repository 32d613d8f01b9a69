//! Builds a [`Config`] from the layered values, and checks the values against each other.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::{
    BrokerConfig, CacheConfig, Config, ConfigError, ConfigErrors, ControllerConfig, GrpcConfig, HttpConfig,
    LimitsConfig, LoadedConfig, LogConfig, MetadataConfig, ObjectStoreConfig, PeerListenerConfig, ReplicationConfig,
    TelemetryConfig, TierConfig, ValueSource,
    setting::{MEMORY, REPLICAS, TOPIC_DEFAULTS},
    sources::{ProvidedValue, ResolvedValues},
    value::{bytes, duration, host_port, masked, urls, web_url},
};
use crate::{
    model::{BrokerId, ConfigMap, InvalidConfig, TopicConfig},
    telemetry,
};

/// Default port of the peer listener.
pub(super) const PEER_PORT: u16 = 9470;

/// Minimum timeout of a request to etcd. With a shorter one, a busy member would count as failed.
const MIN_REQUEST_TIMEOUT: Duration = Duration::from_millis(100);

/// Prefixes of object store URLs.
const SCHEMES: &[&str] =
    &["s3://", "s3a://", "gs://", "az://", "azure://", "abfs://", "abfss://", "adl://", "file://", "memory://"];

impl LoadedConfig {
    /// Builds and checks a configuration. Returns all errors together.
    pub(super) fn build(mut values: ResolvedValues) -> Result<Self, ConfigErrors> {
        let mut errors = std::mem::take(&mut values.errors);
        values.share_memory(&mut errors);
        values.default_peer_listen();
        // A setting with an invalid value has its default in this configuration. The default is checked too, but never
        // used.
        let config = values.config();
        values.check(&config, &mut errors);
        if errors.is_empty() { Ok(Self { config, values }) } else { Err(ConfigErrors(errors)) }
    }

    /// Returns the source of a setting's value.
    pub fn source(&self, key: &str) -> ValueSource {
        self.values.source(key)
    }

    pub(super) const fn values(&self) -> &ResolvedValues {
        &self.values
    }
}

impl ResolvedValues {
    fn text(&self, key: &str) -> Option<&str> {
        self.set.get(key).map(|given| given.text.as_str())
    }

    fn required(&self, key: &str) -> &str {
        self.text(key).expect("a required setting has a default")
    }

    fn optional(&self, key: &str) -> Option<String> {
        self.text(key).map(str::to_owned)
    }

    fn number<T: TryFrom<u64>>(&self, key: &str) -> T {
        let number = bytes(self.required(key)).and_then(|number| T::try_from(number).ok());
        number.expect("values were checked when they were given")
    }

    fn time(&self, key: &str) -> Duration {
        duration(self.required(key)).expect("values were checked when they were given")
    }

    fn listen(&self, key: &str) -> SocketAddr {
        self.required(key).parse().expect("values were checked when they were given")
    }

    /// Sets the default of `peer.listen`: the IP address of `grpc.listen` with [`PEER_PORT`].
    fn default_peer_listen(&mut self) {
        let mut listen = self.listen("grpc.listen");
        listen.set_port(PEER_PORT);
        let default = || ProvidedValue { text: listen.to_string(), source: ValueSource::Default };
        self.set.entry("peer.listen".to_owned()).or_insert_with(default);
    }

    fn config(&self) -> Config {
        Config {
            cluster: self.required("cluster").to_owned(),
            broker: BrokerConfig {
                id: BrokerId(self.number("broker.id")),
                rack: self.optional("broker.rack"),
                data_dir: self.required("broker.data_dir").into(),
                disk_pressure_percent: self.number("broker.disk_pressure_percent"),
                max_replicas: self.number(REPLICAS),
                shutdown_timeout: self.time("broker.shutdown_timeout"),
                catch_up_timeout: self.time("broker.catch_up_timeout"),
            },
            grpc: GrpcConfig {
                listen: self.listen("grpc.listen"),
                advertise: self.optional("grpc.advertise"),
                reflection: self.required("grpc.reflection") == "true",
            },
            peer: PeerListenerConfig { listen: self.listen("peer.listen"), advertise: self.optional("peer.advertise") },
            http: HttpConfig { listen: self.listen("http.listen") },
            metadata: self.metadata(),
            replication: ReplicationConfig {
                default_factor: self.number("replication.default_factor"),
                max_lag_time: self.time("replication.max_lag_time"),
                catchup_bytes_per_second: Some(self.number("replication.catchup_bytes_per_second")).filter(|n| *n > 0),
            },
            controller: ControllerConfig {
                replace_after: Some(self.time("controller.replace_after")).filter(|time| !time.is_zero()),
                max_concurrent_reassignments: self.number("controller.max_concurrent_reassignments"),
                balance: self.required("controller.balance") == "true",
            },
            object_store: ObjectStoreConfig {
                url: self.optional("object_store.url"),
                endpoint: self.optional("object_store.endpoint"),
                region: self.optional("object_store.region"),
                path_style: self.optional("object_store.path_style").map(|text| text == "true"),
            },
            topic_defaults: self.topic.iter().map(|(key, given)| (key.clone(), given.text.clone())).collect(),
            log: LogConfig {
                journal_bytes: self.number("log.journal_bytes"),
                journal_dir: self.optional("log.journal_dir").map(Into::into),
                accept_journal_loss: self.required("log.accept_journal_loss") == "true",
                tail_cache_bytes: self.number("log.tail_cache_bytes"),
            },
            cache: CacheConfig {
                memory_bytes: self.number("cache.memory_bytes"),
                disk_bytes: self.number("cache.disk_bytes"),
                dir: self.optional("cache.dir").map(Into::into),
            },
            tier: TierConfig {
                upload_concurrency: self.number("tier.upload_concurrency"),
                garbage_grace: self.time("tier.garbage_grace"),
                upload_grace: self.time("tier.upload_grace"),
                check_interval: self.time("tier.check_interval"),
                fetch_max_wait: self.time("tier.fetch_max_wait"),
            },
            limits: LimitsConfig {
                memory_bytes: self.number(MEMORY),
                produce_memory_bytes: self.number("limits.produce_memory_bytes"),
                request_memory_bytes: self.number("limits.request_memory_bytes"),
                response_memory_bytes: self.number("limits.response_memory_bytes"),
                decompression_memory_bytes: self.number("limits.decompression_memory_bytes"),
                producer_ids_per_minute: self.number("limits.producer_ids_per_minute"),
                connections_per_address: self
                    .text("limits.connections_per_address")
                    .map(|_| self.number("limits.connections_per_address")),
            },
            telemetry: TelemetryConfig {
                level: self.required("telemetry.level").to_owned(),
                format: telemetry::LogFormat::from_name(self.required("telemetry.format")).unwrap_or_default(),
            },
        }
    }

    fn metadata(&self) -> MetadataConfig {
        let path = |key: &str| self.optional(key).map(Into::into);
        MetadataConfig {
            etcd: self.text("metadata.etcd").map(urls).unwrap_or_default(),
            etcd_ca: path("metadata.etcd_ca"),
            etcd_cert: path("metadata.etcd_cert"),
            etcd_key: path("metadata.etcd_key"),
            etcd_user: self.optional("metadata.etcd_user"),
            etcd_password_file: path("metadata.etcd_password_file"),
            request_timeout: self.time("metadata.request_timeout"),
            session_timeout: self.time("metadata.session_timeout"),
        }
    }

    fn source(&self, key: &str) -> ValueSource {
        self.set.get(key).map_or(ValueSource::Default, |given| given.source.clone())
    }

    fn wrong(&self, key: &str, reason: String) -> ConfigError {
        ConfigError::Wrong { place: self.source(key), reason }
    }

    fn value(&self, key: &str, allowed: &str) -> ConfigError {
        let value = masked(self.text(key).unwrap_or_default());
        ConfigError::Value { place: self.source(key), key: key.to_owned(), value, allowed: allowed.to_owned() }
    }

    fn check(&self, config: &Config, errors: &mut Vec<ConfigError>) {
        if crate::cluster::Keys::new(&config.cluster).is_err() {
            errors.push(self.value("cluster", "1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-'"));
        }
        self.check_addresses(config, errors);
        self.check_metadata(&config.metadata, errors);
        self.check_object_store(&config.object_store, errors);
        if let Err(error) = TopicConfig::resolve(&config.topic_defaults, &ConfigMap::new()) {
            errors.push(self.topic_error(error));
        }
        if let Err(error) = telemetry::check_level(&config.telemetry.level) {
            errors.push(self.wrong("telemetry.level", format!("telemetry.level: {error}")));
        }
    }

    fn check_addresses(&self, config: &Config, errors: &mut Vec<ConfigError>) {
        let (grpc, http, peer) = (config.grpc.listen, config.http.listen, config.peer.listen);
        let mut pairs = vec![(("grpc.listen", grpc), ("http.listen", http))];
        if !config.metadata.etcd.is_empty() {
            pairs.extend([
                (("grpc.listen", grpc), ("peer.listen", peer)),
                (("http.listen", http), ("peer.listen", peer)),
            ]);
        }
        for ((one, at), (other, other_at)) in pairs {
            let meet = at.ip() == other_at.ip() || at.ip().is_unspecified() || other_at.ip().is_unspecified();
            if meet && at.port() == other_at.port() && at.port() != 0 {
                let reason = format!("{one} {at} and {other} {other_at} are the same port: choose two ports");
                let key = if self.source(other) == ValueSource::Default { one } else { other };
                errors.push(self.wrong(key, reason));
            }
        }
        if let Some(advertise) = config.peer.advertise.as_ref().filter(|advertise| is_everywhere(advertise)) {
            let reason =
                format!("peer.advertise {advertise} is not an address that brokers can connect to: name a host");
            errors.push(self.wrong("peer.advertise", reason));
        }
        if config.peer.advertise.is_none() && !config.metadata.etcd.is_empty() {
            self.check_default_peer_address(config, errors);
        }
        match &config.grpc.advertise {
            None if grpc.ip().is_unspecified() => {
                let reason = format!(
                    "grpc.listen {grpc} stands for all addresses of this machine, which is not an address that \
                     clients can connect to: set grpc.advertise to the host:port for clients"
                );
                errors.push(self.wrong("grpc.listen", reason));
            }
            Some(advertise) if is_everywhere(advertise) => {
                let reason =
                    format!("grpc.advertise {advertise} is not an address that clients can connect to: name a host");
                errors.push(self.wrong("grpc.advertise", reason));
            }
            _ => {}
        }
    }

    /// Checks a peer address that no setting names: the peer listener must be reachable at the derived address.
    fn check_default_peer_address(&self, config: &Config, errors: &mut Vec<ConfigError>) {
        let listen = config.peer.listen;
        let advertised = config.peer.advertised(listen, &config.grpc);
        let Some((host, _)) = host_port(&advertised) else { return };
        let ip = advertised.parse::<SocketAddr>().ok().map(|address| address.ip());
        let is_loopback = ip.map_or(host == "localhost", |ip| ip.is_loopback());
        let is_missed = match (listen.ip(), ip) {
            (IpAddr::V4(_), Some(IpAddr::V6(_))) => true,
            // `[::]` accepts IPv4 as well.
            (IpAddr::V6(own), Some(IpAddr::V4(_))) => !own.is_unspecified(),
            _ => false,
        };
        let what = match listen.ip() {
            own if own.is_loopback() && !is_loopback => "loopback",
            IpAddr::V4(_) if is_missed => "IPv4",
            IpAddr::V6(_) if is_missed => "IPv6",
            _ => return,
        };
        let reason =
            format!("peer.listen {listen} is {what}, but brokers would connect to {advertised}: set peer.advertise");
        let is_default = self.source("peer.listen") == ValueSource::Default;
        errors.push(self.wrong(if is_default { "grpc.listen" } else { "peer.listen" }, reason));
    }

    fn check_metadata(&self, metadata: &MetadataConfig, errors: &mut Vec<ConfigError>) {
        if metadata.request_timeout < MIN_REQUEST_TIMEOUT {
            errors.push(self.value("metadata.request_timeout", "a time from 100ms to 10s"));
        }
        for (one, other) in [("etcd_cert", "etcd_key"), ("etcd_user", "etcd_password_file")] {
            let (one, other) = (format!("metadata.{one}"), format!("metadata.{other}"));
            match (self.text(&one), self.text(&other)) {
                (Some(_), None) => errors.push(self.wrong(&one, format!("{one} requires {other}: set both"))),
                (None, Some(_)) => errors.push(self.wrong(&other, format!("{other} requires {one}: set both"))),
                _ => {}
            }
        }
        if metadata.etcd.is_empty() {
            let dependent = ["etcd_ca", "etcd_cert", "etcd_key", "etcd_user", "etcd_password_file"];
            for key in dependent.map(|name| format!("metadata.{name}")).iter().filter(|key| self.text(key).is_some()) {
                errors.push(self.wrong(
                    key,
                    format!("{key} is set and metadata.etcd is not: set metadata.etcd to the members of etcd"),
                ));
            }
            return;
        }
        // The check of single values has already reported an endpoint that is no URL.
        if metadata.etcd.iter().all(|url| web_url(url) && masked(url) == *url)
            && let Err(error) = metadata.endpoints().check()
        {
            errors.push(self.wrong("metadata.etcd", format!("metadata.etcd: {error}")));
        } else if let Some(url) = metadata.etcd.iter().find(|url| masked(url) != **url) {
            let reason = format!(
                "metadata.etcd: {} contains a user or password: set metadata.etcd_user and \
                 metadata.etcd_password_file instead",
                masked(url)
            );
            errors.push(self.wrong("metadata.etcd", reason));
        }
    }

    fn check_object_store(&self, store: &ObjectStoreConfig, errors: &mut Vec<ConfigError>) {
        let key = "object_store.url";
        if let Some(url) = &store.url {
            let Some(scheme) = SCHEMES.iter().find(|scheme| url.starts_with(**scheme)) else {
                return errors.push(self.value(key, &format!("a URL that begins with {}", SCHEMES.join(", "))));
            };
            let rest = &url[scheme.len()..];
            match *scheme {
                "file://" if rest.len() < 2 || !rest.starts_with('/') || rest.split('/').any(|part| part == "..") => {
                    errors
                        .push(self.value(key, "file:// and an absolute path, like file:///var/lib/strandline/bucket"));
                }
                "memory://" | "file://" => {}
                scheme if rest.is_empty() || rest.starts_with('/') => {
                    errors.push(self.value(key, &format!("{scheme} and a bucket's name, like {scheme}bucket/prefix")));
                }
                _ => {}
            }
            if masked(url) != *url {
                let allowed = "a URL with no user or password: credentials come from the vendor's usual environment";
                errors.push(self.value(key, allowed));
            }
            if store.endpoint.is_some() && !scheme.starts_with("s3") {
                let reason = format!("object_store.endpoint is for s3:// URLs only, and the URL is {}", masked(url));
                errors.push(self.wrong("object_store.endpoint", reason));
            }
        }
        if store.endpoint.as_ref().is_some_and(|endpoint| !web_url(endpoint) || masked(endpoint) != *endpoint) {
            errors.push(self.value("object_store.endpoint", "a URL like http://127.0.0.1:9000"));
        }
    }

    fn topic_error(&self, error: InvalidConfig) -> ConfigError {
        let key = match &error {
            InvalidConfig::UnknownKey { key } | InvalidConfig::Value { key, .. } => key.as_str(),
            InvalidConfig::LocalAboveWhole { local, .. } => local,
        };
        let place = self.topic.get(key).map_or(ValueSource::Default, |given| given.source.clone());
        match error {
            InvalidConfig::Value { key, value, allowed } => {
                ConfigError::Value { place, key: format!("{TOPIC_DEFAULTS}.{key}"), value, allowed }
            }
            other @ (InvalidConfig::UnknownKey { .. } | InvalidConfig::LocalAboveWhole { .. }) => {
                ConfigError::Wrong { place, reason: other.to_string() }
            }
        }
    }
}

/// Returns true if the host stands for all addresses of a machine.
fn is_everywhere(advertise: &str) -> bool {
    host_port(advertise).is_some_and(|(host, _)| matches!(host, "0.0.0.0" | "[::]"))
}
