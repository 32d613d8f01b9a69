//! Identity of a data directory: its lock, and the small JSON file that names its owner.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    log::{
        disk::Disk,
        error::{DataDirError, io_error},
        format::{CHECKPOINT, Checkpoint, segment::base_of},
        journal::replay,
    },
    model::{BrokerId, TopicId},
    task::random,
};

/// Format of a data directory that this version writes, and the newest format that it reads.
pub const FORMAT: u32 = 1;

/// Name of the identity file.
pub const NAME: &str = "strandline.json";

/// File of the metadata store of a standalone broker, beside the log. The file is not part of the log, but a directory
/// in which it has content is not new.
pub const METADATA: &str = "metadata.redb";

/// The cluster and broker that open a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDirIdentity {
    /// Name of the cluster.
    pub cluster: String,
    /// Id of the broker.
    pub broker: BrokerId,
}

/// Maximum number of parts of a directory's data that an error message lists.
const MAX_LISTED: usize = 5;

#[derive(Serialize, Deserialize)]
struct IdentityFile {
    format: u32,
    #[serde(default)]
    cluster: String,
    #[serde(default)]
    broker: u32,
    #[serde(default)]
    directory_id: String,
    /// Highest cluster generation in which the directory took part; 0 before the first.
    #[serde(default)]
    generation: u64,
}

impl IdentityFile {
    fn new(identity: &DataDirIdentity, id: Uuid) -> Self {
        let DataDirIdentity { cluster, broker } = identity;
        let directory_id = id.to_string();
        Self { format: FORMAT, cluster: cluster.clone(), broker: broker.0, directory_id, generation: 0 }
    }
}

/// Creates the directory if it is absent, and locks it for this process until the returned value is dropped. Fails with
/// `InUse` if the directory is locked already.
pub(super) fn lock(disk: &dyn Disk, dir: &Path) -> Result<Box<dyn Send + Sync>, DataDirError> {
    disk.create_dir_all(dir).map_err(io_error(dir, "create the directory"))?;
    let path = dir.join("lock");
    match disk.lock(&path) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let text = disk.read(&path).unwrap_or_default();
            let pid = String::from_utf8_lossy(&text).trim().parse().ok();
            Err(DataDirError::InUse { dir: dir.to_owned(), pid })
        }
        locked => locked.map_err(io_error(&path, "lock the directory")),
    }
}

/// Compares the identity file of a directory with `identity`, and returns the id of the directory. A new directory gets
/// an identity file with a random id. Fails with one of these errors:
/// - `Unidentified` for a directory that holds data and no identity file
/// - `Corrupt` if the file does not parse
/// - `Newer` for a newer format
/// - `Foreign` for another cluster or broker
pub(super) fn check_or_create(disk: &dyn Disk, dir: &Path, identity: &DataDirIdentity) -> Result<Uuid, DataDirError> {
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        // The name of a new directory must be durable. A process that may not read the parent did not create the
        // directory.
        match disk.sync_dir(parent) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
                return Err(io_error(parent, "sync the directory")(error));
            }
            _ => {}
        }
    }
    let path = dir.join(NAME);
    let corrupt = |reason: String| DataDirError::Corrupt { file: path.clone(), reason };
    let text = match disk.read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let found = existing_data(disk, dir).map_err(io_error(dir, "list the directory"))?;
            if !found.is_empty() {
                let id = Checkpoint::owner(disk, dir);
                let expected = id.and_then(|id| serde_json::to_string(&IdentityFile::new(identity, id)).ok());
                return Err(DataDirError::Unidentified { dir: dir.to_owned(), found: found.join(", "), expected });
            }
            let id = random::uuid();
            let file = IdentityFile::new(identity, id);
            let text = serde_json::to_vec_pretty(&file).map_err(|error| corrupt(error.to_string()))?;
            disk.replace(&path, &text).map_err(io_error(&path, "write"))?;
            return Ok(id);
        }
        Err(error) => return Err(io_error(&path, "read")(error)),
    };
    let file: IdentityFile = serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
    if file.format > FORMAT {
        return Err(DataDirError::Newer { dir: dir.to_owned(), found: file.format, known: FORMAT });
    }
    if file.cluster != identity.cluster || file.broker != identity.broker.0 {
        return Err(DataDirError::Foreign {
            dir: dir.to_owned(),
            found_cluster: file.cluster,
            found_broker: BrokerId(file.broker),
            cluster: identity.cluster.clone(),
            broker: identity.broker,
        });
    }
    Uuid::try_parse(&file.directory_id).map_err(|error| corrupt(format!("directory_id: {error}")))
}

/// Returns the highest cluster generation in which the directory took part, from the identity file; 0 before the first.
pub(super) fn generation(disk: &dyn Disk, dir: &Path) -> Result<u64, DataDirError> {
    Ok(read(disk, dir)?.generation)
}

/// Writes a cluster generation to the identity file, durably, if it is higher than the stored one.
pub(super) fn record_generation(disk: &dyn Disk, dir: &Path, generation: u64) -> Result<(), DataDirError> {
    let file = read(disk, dir)?;
    if file.generation >= generation {
        return Ok(());
    }
    let path = dir.join(NAME);
    let text = serde_json::to_vec_pretty(&IdentityFile { generation, ..file }).expect("a plain struct is valid JSON");
    disk.replace(&path, &text).map_err(io_error(&path, "write"))
}

/// Reads the identity file of an opened directory.
fn read(disk: &dyn Disk, dir: &Path) -> Result<IdentityFile, DataDirError> {
    let path = dir.join(NAME);
    let text = disk.read(&path).map_err(io_error(&path, "read"))?;
    serde_json::from_slice(&text).map_err(|error| DataDirError::Corrupt { file: path, reason: error.to_string() })
}

/// Returns descriptions of the data in a directory without an identity file; none if the directory is new. Above
/// [`MAX_LISTED`], the last entry is the number of the rest. An interrupted first start leaves no data, because the
/// identity file is written first.
fn existing_data(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in disk.list(dir)? {
        let path = dir.join(&entry.name);
        if entry.name == CHECKPOINT || (entry.name == METADATA && entry.len > 0) {
            found.push(entry.name);
        } else if entry.is_dir && entry.name == "journal" {
            if replay::was_written(disk, &path)? {
                found.push("a journal".to_owned());
            }
        } else if entry.is_dir && entry.name.parse::<TopicId>().is_ok() && holds_segments(disk, &path)? {
            found.push(format!("segments of topic {}", entry.name));
        }
    }
    if let Some(omitted) = found.len().checked_sub(MAX_LISTED).filter(|omitted| *omitted > 0) {
        found.truncate(MAX_LISTED);
        found.push(format!("{omitted} more"));
    }
    Ok(found)
}

/// Returns true if a replica in the directory `topic` of a topic has a segment file with content.
fn holds_segments(disk: &dyn Disk, topic: &Path) -> io::Result<bool> {
    for partition in disk.list(topic)?.into_iter().filter(|entry| entry.is_dir) {
        let files = disk.list(&topic.join(&partition.name))?;
        if files.iter().any(|entry| entry.len > 0 && base_of(&entry.name).is_some()) {
            return Ok(true);
        }
    }
    Ok(false)
}
