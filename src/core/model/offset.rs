//! Offsets, leader epochs and a replica's watermarks. All ranges are half-open: the end is excluded.

use std::fmt;

/// A record's number in its partition, from 0. It is below 2^63, because a batch stores it as an `i64`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct Offset(u64);

impl Offset {
    /// The first offset of every partition.
    pub const ZERO: Self = Self(0);
    /// The largest offset that a batch can hold.
    pub const MAX: Self = Self(i64::MAX as u64);

    /// Returns `None` at 2^63 and above.
    pub const fn new(value: u64) -> Option<Self> {
        if value <= i64::MAX as u64 { Some(Self(value)) } else { None }
    }

    /// Returns `None` for a negative value.
    pub const fn from_i64(value: i64) -> Option<Self> {
        if value >= 0 { Some(Self(value.unsigned_abs())) } else { None }
    }

    /// Returns the offset as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the offset as a batch stores it.
    pub const fn as_i64(self) -> i64 {
        self.0.cast_signed()
    }

    /// Adds a number of records.
    ///
    /// # Panics
    /// If the result is 2^63 or more: at a billion records a second that takes three centuries.
    #[must_use]
    pub const fn plus(self, records: u64) -> Self {
        match Self::new(self.0 + records) {
            Some(offset) => offset,
            None => panic!("an offset passed 2^63"),
        }
    }

    /// Returns the number of offsets in `earlier..self`, or 0 if `earlier` is not below `self`.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number that grows by one with each leader change of a partition, also to no leader. Every stored batch contains the
/// epoch in which a leader appended it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct LeaderEpoch(pub u32);

impl LeaderEpoch {
    /// Returns `None` for a negative value.
    pub const fn from_i32(value: i32) -> Option<Self> {
        if value >= 0 { Some(Self(value.unsigned_abs())) } else { None }
    }

    /// Returns the epoch as a batch stores it.
    pub const fn as_i32(self) -> i32 {
        self.0.cast_signed()
    }
}

impl fmt::Display for LeaderEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The watermarks of a replica. Usually they are in the order of the diagram. The table names the pairs that may be in
/// another order, and when.
///
/// ```text
/// log_start, local_start ≤ tiered_end ≤ high_watermark ≤ persisted_end ≤ log_end
/// ```
/// | pair | order |
/// | --- | --- |
/// | `log_start`, `local_start` | either may be lower: a local segment may begin below the log start |
/// | `local_start`, `tiered_end` | `local_start ≤ max(tiered_end, log_start)`: retention may delete segments that were never uploaded |
/// | `high_watermark`, `persisted_end` | `high_watermark ≤ persisted_end` if the topic's durability is `persisted` |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// First offset that can be read from any tier.
    pub log_start: Offset,
    /// First offset on this broker's disk.
    pub local_start: Offset,
    /// First offset that is not committed to the object store.
    pub tiered_end: Offset,
    /// First uncommitted offset.
    pub high_watermark: Offset,
    /// First offset that is not on this replica's stable storage.
    pub persisted_end: Offset,
    /// First offset that this replica has not written.
    pub log_end: Offset,
}
