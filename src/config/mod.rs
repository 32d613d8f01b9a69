//! Configuration: settings from a file, the environment and the command line. Unknown settings are errors.
//!
//! `settings` declares each setting once. `sources` layers the given values over the defaults and checks each value.
//! [`LoadedConfig`] builds a typed [`Config`] from the result and checks the values against each other. These checks
//! run before the broker binds a port or writes data.
//!
//! ```text
//! strandline.toml:  [grpc]
//!                   listen = "0.0.0.0:9460"
//! or environment:   STRANDLINE_GRPC_LISTEN=0.0.0.0:9460
//! or command line:  --set grpc.listen=0.0.0.0:9460
//! ```

use std::{io, path::Path};

use rustix::fs::OFlags;

use self::sources::ResolvedValues;
use crate::log::PrivateDir;

mod addresses;
mod checks;
mod error;
mod etcd;
mod memory;
mod print;
mod settings;
mod sources;
pub mod suggest;
mod value;

pub use error::{ConfigError, ConfigErrors, ValueSource};
pub use memory::default_memory_bytes;
pub use print::docs;
pub use settings::{
    BrokerConfig, CacheConfig, Config, ControllerConfig, GrpcConfig, HttpConfig, LimitsConfig, LogConfig,
    MetadataConfig, ObjectStoreConfig, PeerListenerConfig, ReplicationConfig, TelemetryConfig, TierConfig,
};
pub use sources::ConfigSources;

/// A configuration with the source of each value.
#[derive(Debug)]
pub struct LoadedConfig {
    /// Effective values.
    pub config: Config,
    values: ResolvedValues,
}

impl LoadedConfig {
    /// Applies the defaults that depend on other values, builds the typed configuration and checks it. Returns all
    /// errors together, including those that the layers added.
    fn build(mut values: ResolvedValues) -> Result<Self, ConfigErrors> {
        values.apply_memory_defaults();
        values.apply_peer_default();
        // A setting whose value was rejected has the value of an earlier layer here, such as its default. That value is
        // checked too, but the configuration is not returned.
        let config = Config::from_texts(|key| values.text(key), values.topic_defaults());
        values.check(&config);
        if values.errors.is_empty() { Ok(Self { config, values }) } else { Err(ConfigErrors(values.errors)) }
    }

    /// Returns the source of a setting's value.
    pub fn source(&self, key: &str) -> ValueSource {
        self.values.source(key)
    }
}

impl Config {
    /// Creates the data directory if it does not exist, and verifies that it is writable by creating and removing a
    /// file.
    ///
    /// # Errors
    /// The directory cannot be created or written, or its path or that of a parent is a file.
    pub fn prepare_data_dir(&self) -> Result<(), ConfigError> {
        let path = &self.broker.data_dir;
        let check_writable = || -> io::Result<()> {
            let probe = Path::new(".writable");
            let dir = PrivateDir::make(path)?;
            dir.open_file(probe, OFlags::WRONLY | OFlags::CREATE)?;
            dir.remove(probe)
        };
        if let Some(file) = path.ancestors().find(|ancestor| ancestor.exists() && !ancestor.is_dir()) {
            return Err(ConfigError::DataDirIsFile { path: path.clone(), file: file.to_owned() });
        }
        check_writable().map_err(|source| ConfigError::DataDir { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests;
