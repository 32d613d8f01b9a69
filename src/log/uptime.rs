//! The incarnations file: the incarnations of this broker that the metadata may name. With this file a start proves
//! that the directory took part in the last of them.
//!
//! # Overview
//!
//! A broker draws an id for each incarnation, records the id here, registers with it, and then records that the
//! metadata holds it. Between the two records the metadata may name either incarnation, so the file holds both. A disk
//! that was restored to an older state holds only older ids. So the file shows that data acknowledged later is missing.
//!
//! # Crash
//!
//! The file is replaced atomically: a crash leaves the content before or after a record. An id that was recorded and
//! never registered proves nothing, and the next confirmed id removes it. A missing or corrupt file proves nothing. The
//! directory then counts as a new one, and the metadata requires a copy.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    disk::Disk,
    error::OpenError,
    identity::{FORMAT, io_error},
};

/// Name of the file in the data directory.
const NAME: &str = "uptimes.json";

/// Maximum number of ids in the file: the last registered one, and one for each start since.
const MOST: usize = 1000;

#[derive(Serialize, Deserialize)]
struct Mark {
    format: u32,
    /// Last incarnation that the metadata is known to have held, then the incarnations recorded since, in order.
    uptimes: Vec<String>,
}

/// Returns the incarnations that the metadata may name, oldest first; none if the file is missing or corrupt.
pub(super) fn read(disk: &dyn Disk, dir: &Path) -> Result<Vec<Uuid>, OpenError> {
    let path = dir.join(NAME);
    let text = match disk.read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error(&path, "read")(error)),
    };
    let damaged = |why: String| {
        tracing::warn!(path = %path.display(), why, "the mark of this directory's uptimes is damaged; it proves nothing");
        Ok(Vec::new())
    };
    let mark: Mark = match serde_json::from_slice(&text) {
        Ok(mark) => mark,
        Err(error) => return damaged(error.to_string()),
    };
    if mark.format > FORMAT {
        return Err(OpenError::Newer { dir: dir.to_owned(), found: mark.format, known: FORMAT });
    }
    let uptimes: Result<_, _> = mark.uptimes.iter().map(|id| Uuid::try_parse(id)).collect();
    uptimes.or_else(|error: uuid::Error| damaged(error.to_string()))
}

/// Records an incarnation durably. The id is added to the file, or replaces its content if the metadata is known to
/// hold the id.
pub(super) fn note(disk: &dyn Disk, dir: &Path, now: Uuid, confirmed: bool) -> Result<(), OpenError> {
    let mut uptimes = if confirmed { Vec::new() } else { read(disk, dir)? };
    if !uptimes.contains(&now) {
        // The first id always stays: it was confirmed, and the metadata most likely names it.
        while uptimes.len() >= MOST {
            uptimes.remove(1);
        }
        uptimes.push(now);
    }
    let path = dir.join(NAME);
    let uptimes = uptimes.iter().map(Uuid::to_string).collect();
    let text = serde_json::to_vec_pretty(&Mark { format: FORMAT, uptimes }).expect("numbers and text are JSON");
    disk.replace(&path, &text).map_err(io_error(&path, "write"))
}
