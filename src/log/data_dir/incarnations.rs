//! The incarnations file: the incarnations of this broker that the metadata may name. With this file a start proves
//! that the directory took part in the last of them.
//!
//! # Overview
//!
//! A broker creates a random id for each incarnation. It adds the id to this file, registers with the id, and then
//! removes all other ids from the file. Between these two writes the metadata may name the new or the previous
//! incarnation, so the file holds both. A disk that was restored to an older state holds only older ids. So the file
//! shows that data acknowledged later is missing.
//!
//! # Crash
//!
//! The file is replaced atomically: a crash leaves the content before or after a write. An id that was written and
//! never registered proves nothing, and the next confirmed id removes it. A missing or corrupt file proves nothing. The
//! directory then counts as a new one, and its replicas must be copied again.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::identity::FORMAT;
use crate::log::{
    disk::Disk,
    error::{DataDirError, io_error},
};

/// Name of the file in the data directory.
const NAME: &str = "incarnations.json";

/// Maximum number of ids in the file: the last registered one, and one for each start since.
const MAX_INCARNATIONS: usize = 1000;

#[derive(Serialize, Deserialize)]
struct IncarnationsFile {
    format: u32,
    /// Last incarnation that is confirmed in the metadata, then the incarnations added since, in order.
    incarnations: Vec<String>,
}

/// Returns the incarnations that the metadata may name, oldest first; none if the file is missing or corrupt. Fails
/// with `Newer` if a newer version wrote the file.
pub(super) fn read(disk: &dyn Disk, dir: &Path) -> Result<Vec<Uuid>, DataDirError> {
    let path = dir.join(NAME);
    let text = match disk.read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error(&path, "read")(error)),
    };
    let ignore_corrupt = |reason: String| {
        tracing::warn!(
            path = %path.display(), reason,
            "this file, which lists the starts of the broker, is corrupt and is ignored: in a cluster, this broker \
             counts as one that lost its disk, see \"A broker's disk fails\" in docs/operations.md"
        );
        Ok(Vec::new())
    };
    let file: IncarnationsFile = match serde_json::from_slice(&text) {
        Ok(file) => file,
        Err(error) => return ignore_corrupt(error.to_string()),
    };
    if file.format > FORMAT {
        return Err(DataDirError::Newer { dir: dir.to_owned(), found: file.format, known: FORMAT });
    }
    let incarnations: Result<_, _> = file.incarnations.iter().map(|id| Uuid::try_parse(id)).collect();
    incarnations.or_else(|error: uuid::Error| ignore_corrupt(error.to_string()))
}

/// Writes an incarnation durably. With `confirmed`, the metadata holds the id, which then replaces all ids in the file.
/// Otherwise the id is added, and a full file loses its second id.
pub(super) fn record(disk: &dyn Disk, dir: &Path, incarnation: Uuid, confirmed: bool) -> Result<(), DataDirError> {
    let mut incarnations = if confirmed { Vec::new() } else { read(disk, dir)? };
    if !incarnations.contains(&incarnation) {
        // The first id stays: it is the confirmed one, if any was confirmed, so the metadata most likely names it.
        while incarnations.len() >= MAX_INCARNATIONS {
            incarnations.remove(1);
        }
        incarnations.push(incarnation);
    }
    let path = dir.join(NAME);
    let incarnations = incarnations.iter().map(Uuid::to_string).collect();
    let text = serde_json::to_vec_pretty(&IncarnationsFile { format: FORMAT, incarnations })
        .expect("numbers and text are valid JSON");
    disk.replace(&path, &text).map_err(io_error(&path, "write"))
}
