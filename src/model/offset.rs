//! Places in a partition's log, and the marks that a replica keeps. Every end is exclusive.

use std::fmt;

/// A record's number in its partition, from 0. Below 2^63, because a batch stores it as an `i64`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "server", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct Offset(u64);

impl Offset {
    /// The first offset of every partition.
    pub const ZERO: Self = Self(0);
    /// The largest offset that a batch can hold.
    pub const MAX: Self = Self(i64::MAX as u64);

    /// The offset with this number; `None` at 2^63 and above.
    pub const fn new(value: u64) -> Option<Self> {
        if value <= i64::MAX as u64 { Some(Self(value)) } else { None }
    }

    /// The offset that an `i64` field holds; `None` when negative.
    pub const fn from_i64(value: i64) -> Option<Self> {
        if value >= 0 { Some(Self(value.unsigned_abs())) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as a batch stores it.
    pub const fn as_i64(self) -> i64 {
        self.0.cast_signed()
    }

    /// The offset `records` further on.
    ///
    /// # Panics
    /// When it would pass 2^63: at a billion records a second that takes three centuries.
    #[must_use]
    pub const fn plus(self, records: u64) -> Self {
        match Self::new(self.0 + records) {
            Some(offset) => offset,
            None => panic!("an offset passed 2^63"),
        }
    }

    /// How many offsets lie in `earlier..self`; 0 when `earlier` is not earlier.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Grows by one at each change of a partition's leader; stamped on every batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "server", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct LeaderEpoch(pub u32);

impl LeaderEpoch {
    /// The epoch that an `i32` field holds; `None` when negative.
    pub const fn from_i32(value: i32) -> Option<Self> {
        if value >= 0 { Some(Self(value.unsigned_abs())) } else { None }
    }

    /// The number as a batch stores it.
    pub const fn as_i32(self) -> i32 {
        self.0.cast_signed()
    }
}

impl fmt::Display for LeaderEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The marks of one replica.
///
/// ```text
/// log_start ≤ local_start ≤ tiered_end ≤ high_watermark ≤ persisted_end ≤ log_end
/// ```
/// `local_start ≤ tiered_end` holds wherever something was evicted. Where retention deleted what was not uploaded the
/// log start lies above the tiered end: `local_start ≤ max(tiered_end, log_start)`. `high_watermark ≤ persisted_end` where
/// the topic's durability is `persisted`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// First offset that can be read at all.
    pub log_start: Offset,
    /// First offset that this broker still has on disk.
    pub local_start: Offset,
    /// First offset not yet committed to the bucket.
    pub tiered_end: Offset,
    /// First uncommitted offset.
    pub high_watermark: Offset,
    /// First offset not yet known to be on stable storage here.
    pub persisted_end: Offset,
    /// First unwritten offset here.
    pub log_end: Offset,
}
