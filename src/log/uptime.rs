//! The mark of a data directory's uptimes: which uptimes of this broker the metadata may name, so that a start can prove that
//! this directory took part in the last of them.
//!
//! A broker draws an id for each uptime, notes it here, registers with it, and then notes that the metadata holds it. Between
//! the two the metadata may name the one or the other, so both are in the mark. A disk that was put back to an older state
//! holds older ids only: what the directory acknowledged after that is not in it, and the mark says so.
//!
//! # What a crash leaves
//!
//! The mark of before or of after a note: it is replaced at once. An id that was noted and never registered with proves
//! nothing and is given up at the next confirmed one. A mark that is missing or damaged proves nothing; that is what a new directory
//! is too, and the metadata then asks for a copy.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    disk::Disk,
    error::OpenError,
    identity::{FORMAT, io_error},
};

/// The file's name in the data directory.
const NAME: &str = "uptimes.json";

/// Most ids in the mark: one for each start since the last that registered, and that one.
const MOST: usize = 1000;

#[derive(Serialize, Deserialize)]
struct Mark {
    format: u32,
    /// The last that the metadata is known to have held, then those noted since, in their order.
    uptimes: Vec<String>,
}

/// The uptimes that the metadata may name, oldest first; none where nothing says so.
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

/// Notes an uptime durably, beside those in the mark, or instead of them once the metadata is known to hold it.
pub(super) fn note(disk: &dyn Disk, dir: &Path, now: Uuid, confirmed: bool) -> Result<(), OpenError> {
    let mut uptimes = if confirmed { Vec::new() } else { read(disk, dir)? };
    if !uptimes.contains(&now) {
        // Never the first: it was confirmed, and is the likeliest to be asked for.
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
