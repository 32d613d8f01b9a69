//! How etcd is reached, from the settings and the files that they name.

use std::{fs, path::Path};

use super::{Config, ConfigError, Metadata};
use crate::cluster::{EtcdIdentity, EtcdLogin, EtcdOptions, EtcdTls};

impl Config {
    /// How etcd is reached, with what the files say; `None` for a broker alone.
    ///
    /// # Errors
    /// When a file that a setting names cannot be read, or holds nothing.
    pub fn etcd(&self) -> Result<Option<EtcdOptions>, ConfigError> {
        let metadata = &self.metadata;
        if metadata.etcd.is_empty() {
            return Ok(None);
        }
        let mut options = metadata.endpoints();
        let ca = metadata.etcd_ca.as_deref().map(|path| read("metadata.etcd_ca", path)).transpose()?;
        let identity = match (&metadata.etcd_cert, &metadata.etcd_key) {
            (Some(certificate), Some(key)) => Some(EtcdIdentity {
                certificate: read("metadata.etcd_cert", certificate)?,
                key: read("metadata.etcd_key", key)?,
            }),
            _ => None,
        };
        if ca.is_some() || identity.is_some() {
            options.tls = Some(EtcdTls { ca, identity });
        }
        if let (Some(user), Some(path)) = (&metadata.etcd_user, &metadata.etcd_password_file) {
            let key = "metadata.etcd_password_file";
            let password = String::from_utf8(read(key, path)?).map_err(|_| ConfigError::Unusable {
                key,
                path: path.clone(),
                why: "it is not UTF-8 text".to_owned(),
            })?;
            // Editors end a file with a line's end; no password does.
            let password = password.trim_end_matches(['\r', '\n']).to_owned();
            options.login = Some(EtcdLogin { user: user.clone(), password });
        }
        Ok(Some(options))
    }
}

impl Metadata {
    /// What needs no file.
    pub(super) fn endpoints(&self) -> EtcdOptions {
        EtcdOptions { call_timeout: self.call_timeout, ..EtcdOptions::new(self.etcd.iter().cloned()) }
    }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    let unusable = |why: String| ConfigError::Unusable { key, path: path.to_owned(), why };
    let bytes = fs::read(path).map_err(|error| unusable(error.to_string()))?;
    if bytes.is_empty() { Err(unusable("it is empty".to_owned())) } else { Ok(bytes) }
}
