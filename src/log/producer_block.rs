//! The mark of a data directory's producer ids: where the newest block that this broker was given ends. A metadata store that was restored to
//! an older state is told so, and hands out no id twice.
//!
//! The mark is durable before the first id of a block is given to a client. A crash leaves the mark of before or of after.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use super::{disk::Disk, identity::FORMAT};

/// The file's name in the data directory.
const NAME: &str = "producer-ids.json";

#[derive(Serialize, Deserialize)]
struct Mark {
    format: u32,
    /// The first counter above the block.
    end: i64,
}

/// The end of the newest block; 0 in a directory without a mark.
pub(super) fn read(disk: &dyn Disk, dir: &Path) -> io::Result<i64> {
    let path = dir.join(NAME);
    let text = match disk.read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        read => read?,
    };
    match serde_json::from_slice::<Mark>(&text) {
        Ok(mark) if mark.end >= 0 => Ok(mark.end),
        Ok(_) | Err(_) => {
            tracing::warn!(path = %path.display(), "the mark of this directory's producer ids is damaged: the metadata store's counter is \
                 taken at its word");
            Ok(0)
        }
    }
}

/// Notes the end of a block, durably.
pub(super) fn note(disk: &dyn Disk, dir: &Path, end: i64) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(&Mark { format: FORMAT, end }).expect("numbers are JSON");
    disk.replace(&dir.join(NAME), &text)
}
