//! Enums whose values have names in configuration, on the command line and in output. Each name is declared once.

use std::{fmt, str::FromStr};

/// Condition for a replica to acknowledge a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// After the record is synced to stable storage.
    #[default]
    Persisted,
    /// After the record is written to the page cache (as in Kafka).
    Replicated,
}

/// Source of a record's timestamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimestampType {
    /// The producer.
    #[default]
    CreateTime,
    /// The leader, at the append.
    LogAppendTime,
}

/// Codec of a batch's records. The discriminant is stored in the low three bits of the batch's attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Compression {
    /// No compression.
    #[default]
    None = 0,
    /// RFC 1952.
    Gzip = 1,
    /// Snappy in the framing of snappy-java.
    Snappy = 2,
    /// LZ4 frame format.
    Lz4 = 3,
    /// RFC 8878.
    Zstd = 4,
}

impl Compression {
    /// Returns the codec with this discriminant.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::None),
            1 => Some(Self::Gzip),
            2 => Some(Self::Snappy),
            3 => Some(Self::Lz4),
            4 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Condition for the acknowledgement of an append.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Acks {
    /// None: the leader responds once the append is queued, without an offset.
    None,
    /// The append is durable on the leader, by the topic's [`Durability`].
    Leader,
    /// The append is durable on every in-sync replica, and there are at least `min.insync.replicas` of them.
    #[default]
    All,
    /// The condition of `All` holds, and the append is in the object store.
    Tiered,
}

/// Error for a string that names no value of an enum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write one of {}", .names.join(", "))]
pub struct UnknownName {
    /// The names of all values.
    pub names: &'static [&'static str],
}

/// Implements `NAMES`, `as_str`, `FromStr` and `Display` for an enum from the names of its values.
macro_rules! names {
    ($kind:ty { $($variant:ident = $name:literal),* $(,)? }) => {
        impl $kind {
            /// The names of all values.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// Returns the name of the value.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }
        }

        impl FromStr for $kind {
            type Err = UnknownName;

            fn from_str(name: &str) -> Result<Self, UnknownName> {
                match name { $($name => Ok(Self::$variant),)* _ => Err(UnknownName { names: Self::NAMES }) }
            }
        }

        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}
names!(Durability { Persisted = "persisted", Replicated = "replicated" });
names!(TimestampType { CreateTime = "CreateTime", LogAppendTime = "LogAppendTime" });
names!(Compression { None = "none", Gzip = "gzip", Snappy = "snappy", Lz4 = "lz4", Zstd = "zstd" });
names!(Acks { None = "0", Leader = "1", All = "all", Tiered = "tiered" });
