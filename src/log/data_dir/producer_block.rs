//! The producer id file of a data directory: the end of the newest block of producer ids that this broker received.
//! With this end, a metadata store that was restored to an older state issues no id twice.
//!
//! The file is durable before a client receives the first id of a block. A crash leaves the file before or after an
//! update.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use super::identity::FORMAT;
use crate::log::disk::Disk;

/// Name of the file in the data directory.
const NAME: &str = "producer-ids.json";

#[derive(Serialize, Deserialize)]
struct ProducerIdsFile {
    format: u32,
    /// End of the block: the first id above it.
    end: i64,
}

/// Returns the end of the newest block; 0 if the file is missing or corrupt.
pub(super) fn read(disk: &dyn Disk, dir: &Path) -> io::Result<i64> {
    let path = dir.join(NAME);
    let text = match disk.read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        read => read?,
    };
    match serde_json::from_slice::<ProducerIdsFile>(&text) {
        Ok(file) if file.end >= 0 => Ok(file.end),
        Ok(_) | Err(_) => {
            tracing::warn!(
                path = %path.display(),
                "the producer id file is corrupt, and the next block of producer ids replaces it: if the metadata store \
                 was restored from a backup, ids may be assigned twice"
            );
            Ok(0)
        }
    }
}

/// Replaces the end of the newest block, durably.
pub(super) fn write_end(disk: &dyn Disk, dir: &Path, end: i64) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(&ProducerIdsFile { format: FORMAT, end }).expect("numbers are valid JSON");
    disk.replace(&dir.join(NAME), &text)
}
