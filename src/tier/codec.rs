//! Fixed-width, big-endian fields of segment footers, manifests and pages. Every length is compared with the bytes that
//! are present before it is used.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::name::ObjectId;
use crate::model::{LeaderEpoch, Offset, PartitionId, TopicId};

/// Size of an encoded [`ObjectId`].
pub(super) const OBJECT_ID_BYTES: usize = 8 + 8 + 4 + 16;

/// Error for bytes that are not the expected object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidObject {
    /// The object, or the part of it that was read, has fewer bytes than its fields need.
    #[error("the object ends {missing} bytes too early, in {field}")]
    Truncated {
        /// Field whose bytes are missing.
        field: &'static str,
        missing: usize,
    },
    /// A checksum does not match.
    #[error("{what} is corrupt: its CRC-32C is {actual:#010x}, and {stored:#010x} is stored")]
    Crc {
        /// Part that the checksum covers.
        what: &'static str,
        /// Stored checksum.
        stored: u32,
        /// Computed checksum.
        actual: u32,
    },
    /// The magic bytes, at the start of an object or at the end of a segment object, are not those of its kind.
    #[error("the magic bytes are not those of a {kind}")]
    Mark {
        /// Expected kind.
        kind: &'static str,
    },
    /// The format version is not the one that this release reads.
    #[error("the format version is {found}, and this release reads version {known}: upgrade")]
    Version {
        /// Version of the object.
        found: u16,
        /// Version that this release reads.
        known: u16,
    },
    /// A field is out of range, or contradicts another field or the expected object. Or bytes follow the last field.
    #[error("{reason}")]
    Contradiction {
        /// Description of the contradiction, for people.
        reason: &'static str,
    },
}

/// Reads fields from the front of a slice.
pub(super) struct FieldReader<'a>(pub(super) &'a [u8]);

impl<'a> FieldReader<'a> {
    /// Fails if fewer than `bytes` bytes are left.
    fn need(&self, bytes: usize, field: &'static str) -> Result<(), InvalidObject> {
        match bytes.checked_sub(self.0.len()) {
            None | Some(0) => Ok(()),
            Some(missing) => Err(InvalidObject::Truncated { field, missing }),
        }
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, InvalidObject> {
        self.need(2, field).map(|()| self.0.get_u16())
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, InvalidObject> {
        self.need(4, field).map(|()| self.0.get_u32())
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, InvalidObject> {
        self.need(8, field).map(|()| self.0.get_u64())
    }

    pub(super) fn i64(&mut self, field: &'static str) -> Result<i64, InvalidObject> {
        self.need(8, field).map(|()| self.0.get_i64())
    }

    pub(super) fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], InvalidObject> {
        self.need(len, field)?;
        let (field, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(field)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], InvalidObject> {
        self.bytes(N, field).map(|bytes| bytes.try_into().expect("N bytes were taken"))
    }

    pub(super) fn offset(&mut self, field: &'static str) -> Result<Offset, InvalidObject> {
        Offset::new(self.u64(field)?).ok_or(InvalidObject::Contradiction { reason: "an offset is 2^63 or more" })
    }

    /// Reads an epoch. Rejects an epoch that no batch can store.
    pub(super) fn epoch(&mut self, field: &'static str) -> Result<LeaderEpoch, InvalidObject> {
        let epoch = LeaderEpoch::from_i32(self.u32(field)?.cast_signed());
        epoch.ok_or(InvalidObject::Contradiction { reason: "a leader epoch is 2^31 or more" })
    }

    pub(super) fn partition(&mut self) -> Result<PartitionId, InvalidObject> {
        let topic = TopicId::from_bytes(self.array("topic id")?);
        Ok(PartitionId::new(topic, self.u32("partition")?))
    }

    /// Reads the id of a segment or page object. Rejects an empty or reversed range of offsets.
    pub(super) fn object_id(&mut self) -> Result<ObjectId, InvalidObject> {
        let (base, end) = (self.offset("base")?, self.offset("end")?);
        let (epoch, attempt) = (self.epoch("epoch")?, Uuid::from_bytes(self.array("attempt")?));
        if base >= end {
            return Err(InvalidObject::Contradiction { reason: "a range of offsets is empty or reversed" });
        }
        Ok(ObjectId { base, end, epoch, attempt })
    }

    /// Reads the number of entries that follow, of `size` bytes each. Rejects a number whose entries need more bytes
    /// than remain.
    pub(super) fn count(&mut self, size: usize, field: &'static str) -> Result<usize, InvalidObject> {
        let count = self.u32(field)? as usize;
        self.need(count.saturating_mul(size), field)?;
        Ok(count)
    }

    /// Fails if bytes follow the last field.
    pub(super) fn done(&self) -> Result<(), InvalidObject> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(InvalidObject::Contradiction { reason: "bytes follow the last field" })
        }
    }
}

pub(super) fn put_partition(out: &mut BytesMut, partition: PartitionId) {
    out.put_slice(partition.topic.as_bytes());
    out.put_u32(partition.number);
}

pub(super) fn put_object_id(out: &mut BytesMut, stamp: &ObjectId) {
    out.put_u64(stamp.base.get());
    out.put_u64(stamp.end.get());
    out.put_u32(stamp.epoch.0);
    out.put_slice(stamp.attempt.as_bytes());
}

/// Writes the number of entries that follow.
pub(super) fn put_count(out: &mut BytesMut, count: usize) {
    out.put_u32(u32::try_from(count).expect("every list of the tier is bounded far below 2^32"));
}

/// Appends the CRC-32C of the content, which completes the object.
pub(super) fn append_crc(mut out: BytesMut) -> Bytes {
    let crc = crc32c::crc32c(&out);
    out.put_u32(crc);
    out.freeze()
}

/// Checks the magic bytes, the CRC that [`append_crc`] appended, and the version of an object. Returns a reader of the
/// fields after these. `known` is the version that this release reads.
pub(super) fn check_envelope<'a>(
    bytes: &'a [u8],
    magic: &[u8; 4],
    kind: &'static str,
    known: u16,
) -> Result<FieldReader<'a>, InvalidObject> {
    if !bytes.starts_with(magic) {
        return Err(InvalidObject::Mark { kind });
    }
    let Some((content, crc)) = bytes.split_last_chunk::<4>() else {
        return Err(InvalidObject::Truncated { field: "checksum", missing: 4 });
    };
    let (stored, actual) = (u32::from_be_bytes(*crc), crc32c::crc32c(content));
    if stored != actual {
        return Err(InvalidObject::Crc { what: kind, stored, actual });
    }
    let mut reader = FieldReader(content);
    reader.bytes(4, "magic bytes")?;
    let found = reader.u16("version")?;
    if found != known {
        return Err(InvalidObject::Version { found, known });
    }
    Ok(reader)
}
