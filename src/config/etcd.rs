//! Options of the etcd client, from the settings and the files that the settings name.

use std::{fs, path::Path};

use super::{Config, ConfigError, MetadataConfig};
use crate::cluster::{EtcdIdentity, EtcdLogin, EtcdOptions, EtcdTls};

impl Config {
    /// Returns the options of the etcd client, with the content of the named files; `None` for a standalone broker.
    ///
    /// # Errors
    /// A file that a setting names cannot be read or is empty, or the password is not UTF-8.
    pub fn etcd(&self) -> Result<Option<EtcdOptions>, ConfigError> {
        let metadata = &self.metadata;
        if metadata.etcd.is_empty() {
            return Ok(None);
        }
        let mut options = metadata.endpoint_options();
        let ca = metadata.etcd_ca.as_deref().map(|path| read_file("metadata.etcd_ca", path)).transpose()?;
        let identity = match (&metadata.etcd_cert, &metadata.etcd_key) {
            (Some(certificate), Some(key)) => Some(EtcdIdentity {
                certificate: read_file("metadata.etcd_cert", certificate)?,
                key: read_file("metadata.etcd_key", key)?,
            }),
            _ => None,
        };
        if ca.is_some() || identity.is_some() {
            options.tls = Some(EtcdTls { ca, identity });
        }
        if let (Some(user), Some(path)) = (&metadata.etcd_user, &metadata.etcd_password_file) {
            let key = "metadata.etcd_password_file";
            let password = String::from_utf8(read_file(key, path)?).map_err(|_| ConfigError::Unusable {
                key,
                path: path.clone(),
                reason: "the password is not UTF-8".to_owned(),
            })?;
            // Editors append a line end to the file. A password that ends with a line end is not supported.
            let password = password.trim_end_matches(['\r', '\n']).to_owned();
            options.login = Some(EtcdLogin { user: user.clone(), password });
        }
        Ok(Some(options))
    }
}

impl MetadataConfig {
    /// Returns options with the endpoints and the timeout only, which need no file.
    pub(super) fn endpoint_options(&self) -> EtcdOptions {
        EtcdOptions { request_timeout: self.request_timeout, ..EtcdOptions::new(self.etcd.iter().cloned()) }
    }
}

/// Returns the content of the file that a setting names. Fails if the file is empty.
fn read_file(key: &'static str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    let unusable = |reason: String| ConfigError::Unusable { key, path: path.to_owned(), reason };
    let bytes = fs::read(path).map_err(|error| unusable(error.to_string()))?;
    if bytes.is_empty() { Err(unusable("the file is empty".to_owned())) } else { Ok(bytes) }
}
