//! Checks of values against each other, and against the rules of the modules that use them.

use super::{
    error::{ConfigError, ValueSource},
    settings::{Config, MetadataConfig, ObjectStoreConfig, TOPIC_DEFAULTS},
    sources::ResolvedValues,
    value::{has_password, is_web_url, mask_passwords},
};
use crate::{
    model::{ConfigMap, InvalidConfig, TopicConfig},
    telemetry,
};

/// Accepted prefixes of `object_store.url`.
const SCHEMES: &[&str] = &["s3://", "s3a://", "gs://", "az://", "azure://", "abfs://", "file://", "memory://"];

/// Settings that have an effect only together with `metadata.etcd`.
const ETCD_SETTINGS: [&str; 5] = [
    "metadata.etcd_ca",
    "metadata.etcd_cert",
    "metadata.etcd_key",
    "metadata.etcd_user",
    "metadata.etcd_password_file",
];

impl ResolvedValues {
    /// Checks everything that cannot be checked for each value by its kind alone. This covers conflicts between
    /// settings, the URLs of the stores, the topic defaults and the log level. Adds an error for each violation that is
    /// found.
    pub(super) fn check(&mut self, config: &Config) {
        self.check_addresses(config);
        self.check_metadata(&config.metadata);
        self.check_object_store(&config.object_store);
        if let Err(error) = TopicConfig::resolve(&config.topic_defaults, &ConfigMap::new()) {
            self.reject_topic(error);
        }
        if let Err(error) = telemetry::check_level(&config.telemetry.level) {
            self.reject("telemetry.level", format!("telemetry.level: {error}"));
        }
    }

    /// Checks that the client certificate and the login for etcd have both of their settings or neither. Without
    /// `metadata.etcd`, no other etcd setting may be set; with it, the URLs must be valid and contain no user or
    /// password.
    fn check_metadata(&mut self, metadata: &MetadataConfig) {
        for (first, second) in
            [("metadata.etcd_cert", "metadata.etcd_key"), ("metadata.etcd_user", "metadata.etcd_password_file")]
        {
            match (self.text(first), self.text(second)) {
                (Some(_), None) => self.reject(first, format!("{first} requires {second}: set both")),
                (None, Some(_)) => self.reject(second, format!("{second} requires {first}: set both")),
                _ => {}
            }
        }
        if metadata.etcd.is_empty() {
            for key in ETCD_SETTINGS {
                if self.text(key).is_some() {
                    let reason =
                        format!("{key} is set and metadata.etcd is not: set metadata.etcd to the members of etcd");
                    self.reject(key, reason);
                }
            }
        } else if let Some(url) = metadata.etcd.iter().find(|url| has_password(url)) {
            let reason = format!(
                "metadata.etcd: {} contains a user or password: set metadata.etcd_user and \
                 metadata.etcd_password_file instead",
                mask_passwords(url)
            );
            self.reject("metadata.etcd", reason);
        } else if let Err(error) = metadata.endpoint_options().check() {
            self.reject("metadata.etcd", format!("metadata.etcd: {error}"));
        }
    }

    /// Checks the scheme and the bucket or path of `object_store.url`, and that `object_store.endpoint` is an HTTP URL
    /// and is used only with S3. Neither URL may contain a user or password.
    fn check_object_store(&mut self, store: &ObjectStoreConfig) {
        let key = "object_store.url";
        if let Some(url) = &store.url {
            let Some(scheme) = SCHEMES.iter().find(|scheme| url.starts_with(**scheme)) else {
                return self.reject_value(key, format!("a URL that begins with {}", SCHEMES.join(", ")));
            };
            let rest = &url[scheme.len()..];
            match *scheme {
                "file://" if rest.len() < 2 || !rest.starts_with('/') || rest.split('/').any(|part| part == "..") => {
                    self.reject_value(
                        key,
                        "file:// and an absolute path, like file:///var/lib/strandline/object-store",
                    );
                }
                "memory://" | "file://" => {}
                scheme if rest.is_empty() || rest.starts_with('/') => {
                    self.reject_value(key, format!("{scheme} and a bucket's name, like {scheme}bucket/prefix"));
                }
                _ => {}
            }
            if has_password(url) {
                let allowed = "a URL with no user or password: credentials come from the vendor's usual environment";
                self.reject_value(key, allowed);
            }
            if store.endpoint.is_some() && !scheme.starts_with("s3") {
                let url = mask_passwords(url);
                let reason = format!("object_store.endpoint is for s3:// URLs only, and the URL is {url}");
                self.reject("object_store.endpoint", reason);
            }
        }
        if store.endpoint.as_ref().is_some_and(|endpoint| !is_web_url(endpoint) || has_password(endpoint)) {
            self.reject_value("object_store.endpoint", "a URL like http://127.0.0.1:9000");
        }
    }

    /// Adds the error of a topic default, with the source of that default. If a local limit exceeds the limit of the
    /// whole partition, the source is that of the local limit.
    fn reject_topic(&mut self, error: InvalidConfig) {
        let key = match &error {
            InvalidConfig::UnknownKey { key } | InvalidConfig::Value { key, .. } => key.as_str(),
            InvalidConfig::LocalAboveWhole { local, .. } => local,
        };
        let origin = self.topic.get(key).map_or(ValueSource::Default, |value| value.source.clone());
        self.errors.push(match error {
            InvalidConfig::Value { key, value, allowed } => {
                ConfigError::Value { origin, key: format!("{TOPIC_DEFAULTS}.{key}"), value, allowed }
            }
            error @ (InvalidConfig::UnknownKey { .. } | InvalidConfig::LocalAboveWhole { .. }) => {
                ConfigError::Invalid { origin, reason: error.to_string() }
            }
        });
    }
}
