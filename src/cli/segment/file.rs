//! Segment files of a data directory and segment objects: detects the kind of a file, and reads and checks its batches.
//!
//! No checksum covers a batch's offset and leader epoch. An offset is compared with the file's name and the previous
//! batch. Leader epochs never decrease, so the epoch of a batch is compared with those of the batches around it. In a
//! segment object, it is also compared with the footer's list.

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
        name::ObjectId,
    },
};

/// Maximum size of a footer in bytes; many times the size of the largest valid one.
const MAX_FOOTER_BYTES: u64 = 64 << 20;

/// First bytes and names of the other file types in a data directory and an object store.
const OTHER_MAGICS: &[(&[u8], &str)] = &[
    (b"STRLOIX1", "an index"),
    (b"STRLTIX1", "a time index"),
    (b"STRLSNP2", "a snapshot"),
    (b"STRLCKP3", "a checkpoint"),
    (b"STRLJRN1", "a file of the journal"),
    (b"STMR", "a manifest"),
    (b"STMP", "a page of a manifest"),
];

/// Last bytes of a segment object: the magic of its trailer (`tier::footer`).
const SEGMENT_OBJECT_MAGIC: &[u8] = b"STRNDSEG";

/// Opens a segment file, or a segment object with its footer. Compares the base offsets in the file's name and in the
/// footer.
///
/// # Errors
/// The file cannot be read, is of another type, or its name and footer contradict each other.
pub(super) fn open(path: &Path) -> anyhow::Result<(FileBatches<impl Read + use<>>, Option<Footer>)> {
    let unreadable = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(unreadable)?;
    let metadata = file.metadata().with_context(unreadable)?;
    if metadata.is_dir() {
        bail!("{} is a directory: name a segment file in it (.log, or .segment in an object store)", path.display());
    }
    let (len, name) = (metadata.len(), path.file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let mut front = [0; HEADER_BYTES];
    let read_bytes = read_full(&mut file, &mut front).with_context(unreadable)?;
    let front = &front[..read_bytes];
    if let Some((_, file_type)) = OTHER_MAGICS.iter().find(|(magic, _)| front.starts_with(magic)) {
        bail!(
            "{} is {file_type}, not a segment file: name a .log file of a data directory, or a .segment object",
            path.display()
        );
    }
    let (log_base, object) = (base_in(name), ObjectId::from_segment(name).ok());
    let footer = footer(&mut file, len, path).with_context(unreadable)??;
    let is_foreign = log_base.is_none() && object.is_none() && footer.is_none();
    if is_foreign && read_bytes > 0 && Batch::framed_len(front).is_err() {
        bail!(
            "{} is not a segment file, because it does not start with a record batch: name a .log file of a data \
             directory, or a .segment object",
            path.display()
        );
    }
    if let (Some(object), None) = (&object, &footer) {
        bail!(
            "{} is corrupt: its name states offsets {}..{}, but it has no footer",
            path.display(),
            object.base,
            object.end
        );
    }
    let base_in_name = log_base.or(object.map(|object| object.base));
    let base = match (base_in_name, footer.as_ref().map(|footer| footer.base)) {
        (Some(name), Some(footer)) if name != footer => {
            bail!("{} is corrupt: its footer states base offset {footer}, its name {name}", path.display());
        }
        (name, footer) => name.or(footer),
    };
    file.seek(SeekFrom::Start(0)).with_context(unreadable)?;
    let data = footer.as_ref().map_or(len, |footer| footer.data_bytes);
    let input = BufReader::with_capacity(1 << 20, file).take(data);
    Ok((FileBatches { input, position: 0, end: base, crc: 0 }, footer))
}

/// Reads the footer of a segment object; `None` if the file does not end with a footer. The outer error is an I/O
/// error, the inner one a corrupt footer.
fn footer(file: &mut File, len: u64, path: &Path) -> io::Result<anyhow::Result<Option<Footer>>> {
    let Some(trailer_start) = len.checked_sub(TRAILER_BYTES as u64) else { return Ok(Ok(None)) };
    let mut trailer = [0; TRAILER_BYTES];
    file.seek(SeekFrom::Start(trailer_start))?;
    read_full(file, &mut trailer)?;
    if !trailer.ends_with(SEGMENT_OBJECT_MAGIC) {
        return Ok(Ok(None));
    }
    let corrupt = |reason: &dyn std::fmt::Display| Ok(Err(anyhow!("{} is corrupt: footer: {reason}", path.display())));
    let trailer = match Trailer::parse(&trailer) {
        Ok(trailer) => trailer,
        Err(error) => return corrupt(&error),
    };
    let bytes = trailer.footer_bytes();
    if bytes > MAX_FOOTER_BYTES || trailer.data_bytes.checked_add(bytes) != Some(len) {
        let data = trailer.data_bytes;
        return corrupt(&format!("{data} bytes of batches and {bytes} bytes of footer, but the file has {len} bytes"));
    }
    file.seek(SeekFrom::Start(trailer.data_bytes))?;
    let mut tail = Vec::new();
    file.take(bytes).read_to_end(&mut tail)?;
    match Footer::parse(&tail) {
        Ok(footer) => Ok(Ok(Some(footer))),
        Err(error) => corrupt(&error),
    }
}

/// Returns the base offset in the name of a segment file, or of a quarantined file (`.log.quarantined-`); `None` for
/// another name.
fn base_in(name: &str) -> Option<Offset> {
    let digits =
        name.strip_suffix(".log").or_else(|| name.split_once(".log.quarantined-").map(|(digits, _)| digits))?;
    let is_number = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok().and_then(Offset::new))?
}

/// Reason why the rest of a file cannot be read.
#[derive(Debug)]
pub(super) enum SegmentError {
    Read(io::Error),
    /// The bytes at this position are corrupt.
    Corrupt {
        position: u64,
        problem: String,
    },
}

impl SegmentError {
    pub(super) fn into_error(self, file: &Path) -> anyhow::Error {
        match self {
            Self::Read(error) => anyhow::Error::new(error).context(format!("cannot read {}", file.display())),
            Self::Corrupt { position, problem } => corrupt_error(file, position, &problem),
        }
    }
}

pub(super) fn corrupt_error(file: &Path, position: u64, problem: &dyn std::fmt::Display) -> anyhow::Error {
    anyhow!("{} is corrupt at byte {position}: {problem}", file.display())
}

/// Reader of the batches of a file, with one batch in memory at a time.
pub(super) struct FileBatches<R> {
    input: R,
    /// Position of the next batch in the file.
    position: u64,
    /// Offset at which the next batch must start; `None` if the first offset is unknown.
    end: Option<Offset>,
    /// CRC-32C of all batches so far.
    crc: u32,
}

impl<R: Read> FileBatches<R> {
    #[cfg(test)]
    pub(super) fn new(input: R, base: Option<Offset>) -> Self {
        Self { input, position: 0, end: base, crc: 0 }
    }

    /// Returns the next batch with its position in bytes, after a check of its checksum and offset.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Batch)>, SegmentError> {
        let position = self.position;
        let corrupt = |problem: &MalformedBatch| SegmentError::Corrupt { position, problem: problem.to_string() };
        let mut header = [0; HEADER_BYTES];
        let read_bytes = read_full(&mut self.input, &mut header).map_err(SegmentError::Read)?;
        if read_bytes == 0 {
            return Ok(None);
        }
        if read_bytes < HEADER_BYTES {
            return Err(corrupt(&MalformedBatch::Truncated { needed: HEADER_BYTES, available: read_bytes }));
        }
        // `framed_len` rejects a length above that of the largest batch.
        let size = Batch::framed_len(&header).map_err(|problem| corrupt(&problem))?;
        let mut records = Vec::new();
        let wanted = u64::try_from(size - HEADER_BYTES).expect("64 bits");
        self.input.by_ref().take(wanted).read_to_end(&mut records).map_err(SegmentError::Read)?;
        let batch = Batch::from_parts(header, Bytes::from(records)).map_err(|problem| corrupt(&problem))?;
        if let Some(end) = self.end.filter(|end| *end != batch.base_offset()) {
            let problem = format!("the batch starts at offset {} instead of {end}", batch.base_offset());
            return Err(SegmentError::Corrupt { position, problem });
        }
        self.crc = crc32c::crc32c_append(crc32c::crc32c_append(self.crc, batch.header()), batch.records_bytes());
        self.end = Some(batch.end_offset());
        self.position += u64::try_from(size).expect("64 bits");
        Ok(Some((position, batch)))
    }

    /// Compares the end offset and the CRC of all batches with the footer. Called after the last batch was read.
    pub(super) fn check(&self, footer: &Footer) -> Result<(), SegmentError> {
        let corrupt = |problem| Err(SegmentError::Corrupt { position: self.position, problem });
        if self.end != Some(footer.end) {
            let end = self.end.unwrap_or_default();
            return corrupt(format!("the batches end at offset {end}, but the footer states {}", footer.end));
        }
        if self.crc != footer.data_crc {
            return corrupt(format!(
                "the batches' CRC is {:#010x}, but the footer states {:#010x}",
                self.crc, footer.data_crc
            ));
        }
        Ok(())
    }
}

/// Check of the leader epochs in file order.
#[derive(Debug, Default)]
pub(super) struct FileEpochs {
    /// Leader epoch of the previous batch, which passed the check; `None` before the first batch.
    before: Option<LeaderEpoch>,
}

impl FileEpochs {
    /// Compares a batch's leader epoch with the footer, the batches before it, and the batch after it.
    pub(super) fn check(&mut self, batch: &Batch, next: Option<&Batch>, footer: Option<&Footer>) -> Result<(), String> {
        let Some(epoch) = batch.leader_epoch() else { return Err("the batch has no leader epoch".to_owned()) };
        let listed = footer.and_then(|footer| footer.epoch_of(batch.base_offset()));
        if let Some(listed) = listed.filter(|listed| *listed != epoch) {
            return Err(format!("the batch's leader epoch is {epoch}, but the footer states {listed}"));
        }
        if let Some(before) = self.before.filter(|before| epoch < *before) {
            return Err(format!("leader epoch decreases from {before} to {epoch} at offset {}", batch.base_offset()));
        }
        // If the next batch's epoch is not below the epochs before this batch, this batch is the outlier.
        if let Some(next) = next
            && let Some(after) = next.leader_epoch()
            && after < epoch
            && self.before.is_none_or(|before| before <= after && before < epoch)
        {
            let at = next.base_offset();
            return Err(format!(
                "leader epoch decreases from {epoch} to {after} at offset {at}: one of the two batches is corrupt"
            ));
        }
        self.before = Some(epoch);
        Ok(())
    }
}

/// Reads until the buffer is full or the input ends, and returns the number of bytes.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
