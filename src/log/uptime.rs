//! Which uptimes of the broker ran on this data directory last: what a broker shows to prove that the directory is the one that
//! took part, and not a copy of older days.
//!
//! Each process draws an id and notes it here before the metadata store learns it, and forgets the older ones after. So the store's
//! is always among those noted, unless the directory was put back to what it was before: then it may lack what it acknowledged since.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use super::{Log, disk::Disk};

const NAME: &str = "uptimes.json";

/// Most that are noted. Starts that fail one after the other must not fill the disk.
const MOST: usize = 1000;

#[derive(Serialize, Deserialize)]
struct Noted {
    uptimes: Vec<String>,
}

impl Log {
    /// Notes an uptime beside those that are noted, and returns them: those that the metadata store may know. Blocks; durable when it returns.
    pub fn note_uptime(&self, uptime: &str) -> io::Result<Vec<String>> {
        let (disk, dir) = self.place();
        let before = read(disk, dir)?;
        let mut noted: Vec<String> = before.iter().cloned().chain([uptime.to_owned()]).collect();
        if noted.len() > MOST {
            // The first was confirmed once; those after it are of starts that hardly came so far.
            noted.remove(1);
        }
        write(disk, dir, noted)?;
        Ok(before)
    }

    /// Forgets all but this uptime: the metadata store knows it now. Blocks.
    pub fn confirm_uptime(&self, uptime: &str) -> io::Result<()> {
        let (disk, dir) = self.place();
        write(disk, dir, vec![uptime.to_owned()])
    }
}

/// What is noted. A file that cannot be read proves nothing, as one that is not there.
fn read(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<String>> {
    let path = dir.join(NAME);
    let text = match disk.read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    match serde_json::from_slice::<Noted>(&text) {
        Ok(noted) => Ok(noted.uptimes),
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "the file is damaged: this directory cannot prove what it holds");
            Ok(Vec::new())
        }
    }
}

fn write(disk: &dyn Disk, dir: &Path, uptimes: Vec<String>) -> io::Result<()> {
    let text = serde_json::to_vec(&Noted { uptimes }).map_err(io::Error::other)?;
    disk.replace(&dir.join(NAME), &text)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        log::{Identity, Options, RealDisk},
        model::BrokerId,
    };

    #[test]
    fn an_uptime_is_noted_beside_those_before_it_until_it_is_confirmed() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let identity = Identity { cluster: "test".to_owned(), broker: BrokerId(1) };
            let options = Options { journal_bytes: 1 << 20, ..Options::default() };
            Log::open(Arc::new(RealDisk), dir.path(), &identity, options).unwrap()
        };
        let (a, b, c) = ("a", "b", "c");
        let log = open();
        assert!(log.note_uptime(a).unwrap().is_empty());
        drop(log);
        let log = open();
        assert_eq!(log.note_uptime(b).unwrap(), [a], "a start that did not get further");
        log.confirm_uptime(b).unwrap();
        assert_eq!(log.note_uptime(c).unwrap(), [b]);
        log.close().unwrap();
        drop(log);
        for damaged in ["", "{", r#"{"uptimes":[1]}"#] {
            std::fs::write(dir.path().join(NAME), damaged).unwrap();
            assert!(open().note_uptime(c).unwrap().is_empty(), "{damaged:?}");
        }
    }
}
