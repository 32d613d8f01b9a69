//! Segment files of a data directory and segment objects: detects the kind of a file, and reads and checks its batches.
//!
//! No checksum covers a batch's offset and leader epoch. An offset is compared with the file's name and the previous
//! batch. Leader epochs never decrease: an epoch is compared with those before and after, and in a segment object with
//! the footer's list.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek as _, SeekFrom},
    path::Path,
};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;

use crate::{
    model::{LeaderEpoch, Offset},
    record::{Batch, HEADER_BYTES, MalformedBatch},
    tier::{
        Footer,
        footer::{TRAILER_BYTES, Trailer},
        name::Stamp,
    },
};

/// Maximum size of a footer in bytes; many times the size of the largest valid one.
const MOST_FOOTER_BYTES: u64 = 64 << 20;

/// First bytes and names of the other file types in a data directory and an object store.
const OTHERS: &[(&[u8], &str)] = &[
    (b"STRLOIX1", "an index"),
    (b"STRLTIX1", "a time index"),
    (b"STRLSNP2", "a snapshot"),
    (b"STRLCKP3", "a checkpoint"),
    (b"STRLJRN1", "a file of the journal"),
    (b"STMR", "a manifest"),
    (b"STMP", "a page of a manifest"),
];

/// Opens a segment file, or a segment object with its footer.
pub(super) fn open(path: &Path) -> anyhow::Result<(Batches<impl Read + use<>>, Option<Footer>)> {
    let unreadable = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(unreadable)?;
    let metadata = file.metadata().with_context(unreadable)?;
    if metadata.is_dir() {
        bail!("{} is a folder: name a segment file in it (.log, or .segment in a bucket)", path.display());
    }
    let (len, name) = (metadata.len(), path.file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let mut front = [0; HEADER_BYTES];
    let got = read_full(&mut file, &mut front).with_context(unreadable)?;
    let front = &front[..got];
    if let Some((_, what)) = OTHERS.iter().find(|(magic, _)| front.starts_with(magic)) {
        bail!(
            "{} is {what}, no segment file: name a .log of a data directory, or a .segment of a bucket",
            path.display()
        );
    }
    let (log, object) = (base_in(name), Stamp::from_segment(name).ok());
    let footer = footer(&mut file, len, path).with_context(unreadable)??;
    let foreign = log.is_none() && object.is_none() && footer.is_none();
    if foreign && got > 0 && Batch::framed_len(front).is_err() {
        bail!("{} is no segment file: no record batch begins it", path.display());
    }
    if let (Some(object), None) = (&object, &footer) {
        bail!(
            "{} is damaged: by its name it holds offsets {}..{}, and it has no footer",
            path.display(),
            object.base,
            object.end
        );
    }
    let stated = log.or(object.map(|object| object.base));
    let base = match (stated, footer.as_ref().map(|footer| footer.base)) {
        (Some(name), Some(footer)) if name != footer => {
            bail!("{} is damaged: its footer begins at offset {footer}, its name at {name}", path.display());
        }
        (name, footer) => name.or(footer),
    };
    file.seek(SeekFrom::Start(0)).with_context(unreadable)?;
    let data = footer.as_ref().map_or(len, |footer| footer.data_bytes);
    let input = BufReader::with_capacity(1 << 20, file).take(data);
    Ok((Batches { input, position: 0, end: base, crc: 0 }, footer))
}

/// Reads the footer of a segment object; `None` if the file does not end with a footer. The outer error is an I/O
/// error, the inner one a corrupt footer.
fn footer(file: &mut File, len: u64, path: &Path) -> io::Result<anyhow::Result<Option<Footer>>> {
    let Some(at) = len.checked_sub(TRAILER_BYTES as u64) else { return Ok(Ok(None)) };
    let mut end = [0; TRAILER_BYTES];
    file.seek(SeekFrom::Start(at))?;
    read_full(file, &mut end)?;
    if !end.ends_with(b"STRNDSEG") {
        return Ok(Ok(None));
    }
    let damaged = |why: &dyn std::fmt::Display| Ok(Err(anyhow!("{} is damaged: its footer: {why}", path.display())));
    let trailer = match Trailer::parse(&end) {
        Ok(trailer) => trailer,
        Err(error) => return damaged(&error),
    };
    let bytes = trailer.footer_bytes();
    if bytes > MOST_FOOTER_BYTES || trailer.data_bytes.checked_add(bytes) != Some(len) {
        let data = trailer.data_bytes;
        return damaged(&format!("it speaks of {data} bytes of batches and is {bytes} bytes, and the file has {len}"));
    }
    file.seek(SeekFrom::Start(trailer.data_bytes))?;
    let mut tail = Vec::new();
    file.take(bytes).read_to_end(&mut tail)?;
    match Footer::parse(&tail) {
        Ok(footer) => Ok(Ok(Some(footer))),
        Err(error) => damaged(&error),
    }
}

/// Returns the base offset in the name of a segment file, or of a file that was set aside (`.log.aside-`).
fn base_in(name: &str) -> Option<Offset> {
    let digits = name.strip_suffix(".log").or_else(|| name.split_once(".log.aside-").map(|(digits, _)| digits))?;
    let plain = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok().and_then(Offset::new))?
}

/// Reason why the rest of a file cannot be read.
#[derive(Debug)]
pub(super) enum Damage {
    Read(io::Error),
    At { position: u64, problem: String },
}

impl Damage {
    pub(super) fn into_error(self, file: &Path) -> anyhow::Error {
        match self {
            Self::Read(error) => anyhow::Error::new(error).context(format!("cannot read {}", file.display())),
            Self::At { position, problem } => damaged(file, position, &problem),
        }
    }
}

pub(super) fn damaged(file: &Path, position: u64, problem: &dyn std::fmt::Display) -> anyhow::Error {
    anyhow!("{} is damaged at byte {position}: {problem}", file.display())
}

/// Reader of the batches of a file, with one batch in memory at a time.
pub(super) struct Batches<R> {
    input: R,
    position: u64,
    /// Offset at which the next batch must start; `None` if the first offset is unknown.
    end: Option<Offset>,
    crc: u32,
}

impl<R: Read> Batches<R> {
    #[cfg(test)]
    pub(super) fn new(input: R, base: Option<Offset>) -> Self {
        Self { input, position: 0, end: base, crc: 0 }
    }

    /// Returns the next batch with its position in bytes, after a check of its checksum and offset.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Batch)>, Damage> {
        let position = self.position;
        let damage = |problem: &MalformedBatch| Damage::At { position, problem: problem.to_string() };
        let mut head = [0; HEADER_BYTES];
        let got = read_full(&mut self.input, &mut head).map_err(Damage::Read)?;
        if got == 0 {
            return Ok(None);
        }
        if got < HEADER_BYTES {
            return Err(damage(&MalformedBatch::Truncated { needed: HEADER_BYTES, available: got }));
        }
        // `framed_len` rejects a length above that of the largest batch.
        let size = Batch::framed_len(&head).map_err(|problem| damage(&problem))?;
        let mut records = Vec::new();
        let wanted = u64::try_from(size - HEADER_BYTES).expect("64 bits");
        self.input.by_ref().take(wanted).read_to_end(&mut records).map_err(Damage::Read)?;
        let batch = Batch::from_parts(head, Bytes::from(records)).map_err(|problem| damage(&problem))?;
        if let Some(end) = self.end.filter(|end| *end != batch.base_offset()) {
            let problem = format!("the batch begins at offset {} where {end} is due", batch.base_offset());
            return Err(Damage::At { position, problem });
        }
        self.crc = crc32c::crc32c_append(crc32c::crc32c_append(self.crc, batch.header()), batch.records_bytes());
        self.end = Some(batch.end_offset());
        self.position += u64::try_from(size).expect("64 bits");
        Ok(Some((position, batch)))
    }

    /// Compares the end offset and the CRC of all batches with the footer. The batches must have been read to the end.
    pub(super) fn check(&self, footer: &Footer) -> Result<(), Damage> {
        let at = |problem| Err(Damage::At { position: self.position, problem });
        if self.end != Some(footer.end) {
            let end = self.end.unwrap_or_default();
            return at(format!("the batches end at offset {end}, and the footer says {}", footer.end));
        }
        if self.crc != footer.data_crc {
            return at(format!(
                "the batches' CRC is {:#010x}, and the footer says {:#010x}",
                self.crc, footer.data_crc
            ));
        }
        Ok(())
    }
}

/// Check of the leader epochs in file order. An epoch above that of the next batch is not accepted.
#[derive(Debug, Default)]
pub(super) struct Epochs {
    before: Option<LeaderEpoch>,
}

impl Epochs {
    /// Compares a batch's leader epoch with the footer, the batches before it, and the batch after it.
    pub(super) fn check(&mut self, batch: &Batch, next: Option<&Batch>, footer: Option<&Footer>) -> Result<(), String> {
        let Some(epoch) = batch.leader_epoch() else { return Err("the batch has no leader epoch".to_owned()) };
        let listed = footer.and_then(|footer| footer.epoch_of(batch.base_offset()));
        if let Some(listed) = listed.filter(|listed| *listed != epoch) {
            return Err(format!("the batch's leader epoch is {epoch}, and the footer says {listed}"));
        }
        if let Some(before) = self.before.filter(|before| epoch < *before) {
            return Err(format!("leader epoch falls from {before} to {epoch} at offset {}", batch.base_offset()));
        }
        // If the next epoch fits to the epochs before this batch, this batch is the outlier.
        if let Some(next) = next
            && let Some(after) = next.leader_epoch()
            && after < epoch
            && self.before.is_none_or(|before| before <= after && before < epoch)
        {
            let at = next.base_offset();
            return Err(format!(
                "leader epoch falls from {epoch} to {after} at offset {at}: one of the two is damaged"
            ));
        }
        self.before = Some(epoch);
        Ok(())
    }
}

/// Reads until the buffer is full or the input ends, and returns the number of bytes.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match input.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(read) => got += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}
