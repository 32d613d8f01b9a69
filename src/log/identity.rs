//! Whose data directory it is: the lock, and the small file that says so in words.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{disk::Disk, error::OpenError};
use crate::model::BrokerId;

/// The format of a data directory that this version writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

pub(super) const NAME: &str = "strandline.json";

/// Who opens a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's name.
    pub cluster: String,
    /// The broker's number.
    pub broker: BrokerId,
}

#[derive(Serialize, Deserialize)]
struct Card {
    format: u32,
    #[serde(default)]
    cluster: String,
    #[serde(default)]
    broker: u32,
    #[serde(default)]
    directory_id: String,
}

pub(super) fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { path, what, source }
}

/// Takes the directory for this process.
pub(super) fn lock(disk: &dyn Disk, dir: &Path) -> Result<Box<dyn Send + Sync>, OpenError> {
    disk.create_dir_all(dir).map_err(io_error(dir, "make the directory"))?;
    let path = dir.join("lock");
    match disk.lock(&path) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let text = disk.read(&path).unwrap_or_default();
            let pid = String::from_utf8_lossy(&text).trim().parse().ok();
            Err(OpenError::InUse { dir: dir.to_owned(), pid })
        }
        other => other.map_err(io_error(&path, "lock the directory")),
    }
}

/// The directory's id, and whether it is new. A new directory is given to `identity`.
pub(super) fn check(disk: &dyn Disk, dir: &Path, identity: &Identity) -> Result<(Uuid, bool), OpenError> {
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        // The directory may be new. Who may not read its parent did not make it.
        match disk.sync_dir(parent) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
                return Err(io_error(parent, "sync the directory")(error));
            }
            _ => {}
        }
    }
    let path = dir.join(NAME);
    let damaged = |why: String| OpenError::Damaged { file: path.clone(), why };
    let text = match disk.read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = Uuid::new_v4();
            let card = Card {
                format: FORMAT,
                cluster: identity.cluster.clone(),
                broker: identity.broker.0,
                directory_id: id.to_string(),
            };
            let text = serde_json::to_vec_pretty(&card).map_err(|error| damaged(error.to_string()))?;
            disk.replace(&path, &text).map_err(io_error(&path, "write"))?;
            return Ok((id, true));
        }
        Err(error) => return Err(io_error(&path, "read")(error)),
    };
    let card: Card = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    if card.format > FORMAT {
        return Err(OpenError::Newer { dir: dir.to_owned(), found: card.format, known: FORMAT });
    }
    if card.cluster != identity.cluster || card.broker != identity.broker.0 {
        return Err(OpenError::Foreign {
            dir: dir.to_owned(),
            found_cluster: card.cluster,
            found_broker: BrokerId(card.broker),
            cluster: identity.cluster.clone(),
            broker: identity.broker,
        });
    }
    let id = Uuid::try_parse(&card.directory_id).map_err(|error| damaged(format!("directory_id: {error}")))?;
    Ok((id, false))
}
