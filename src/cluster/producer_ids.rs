//! Producer ids that every leader can verify as issued by the cluster. No I/O.
//!
//! # Overview
//!
//! ```text
//! 63 0 │ 62 .. 25 counter │ 24 .. 0 check value
//! ```
//!
//! The counter comes from the metadata store and makes an id unique. The check value is the first 25 bits of
//! HMAC-SHA256 of counter and principal under a key of the cluster. The key is created once, stored in the metadata
//! store, and cached by every broker. A client without an issued id can only guess. One guess in 2^25 is right, and
//! each wrong guess counts towards a limit of its connection.

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::keys::{PRODUCER_ID_CHECK_BITS, PRODUCER_ID_COUNTER_END, Value};
use crate::task::random;

const KEY_BYTES: usize = 32;

/// Principal of an unauthenticated client.
pub const ANONYMOUS: &str = "";

/// The value of `producer-id-key`: the key of the check values in producer ids.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "KeyText", into = "KeyText")]
pub struct ProducerIdKey {
    key: [u8; KEY_BYTES],
    /// HMAC state with the key, cloned per check value: initialisation costs as much as one check value.
    mac: Hmac<Sha256>,
}

/// JSON form of the key.
#[derive(Serialize, Deserialize)]
struct KeyText {
    /// Hexadecimal digits of the key.
    key: String,
}

impl ProducerIdKey {
    /// Returns a random key.
    pub fn draw() -> Self {
        let mut key = [0; KEY_BYTES];
        random::fill(&mut key);
        Self::new(key)
    }

    fn new(key: [u8; KEY_BYTES]) -> Self {
        Self { key, mac: Hmac::new_from_slice(&key).expect("HMAC accepts a key of any length") }
    }

    /// Returns the producer id for a counter and a principal.
    ///
    /// # Panics
    /// The counter is negative or has more than 38 bits.
    pub fn id(&self, counter: i64, principal: &str) -> i64 {
        assert!((0..PRODUCER_ID_COUNTER_END).contains(&counter), "a counter has 38 bits");
        counter << PRODUCER_ID_CHECK_BITS | self.check_value(counter, principal)
    }

    /// Returns true if the id has the check value that [`Self::id`] computes for its counter and this principal.
    pub fn has_issued(&self, id: i64, principal: &str) -> bool {
        let counter = id >> PRODUCER_ID_CHECK_BITS;
        id >= 0 && id & ((1 << PRODUCER_ID_CHECK_BITS) - 1) == self.check_value(counter, principal)
    }

    /// Returns the check value of a counter and a principal: the first 25 bits of their HMAC.
    fn check_value(&self, counter: i64, principal: &str) -> i64 {
        let mut mac = self.mac.clone();
        mac.update(&counter.to_be_bytes());
        mac.update(principal.as_bytes());
        let code = mac.finalize().into_bytes();
        let first = u32::from_be_bytes([code[0], code[1], code[2], code[3]]);
        i64::from(first >> (u32::BITS - PRODUCER_ID_CHECK_BITS))
    }
}

impl TryFrom<KeyText> for ProducerIdKey {
    type Error = String;

    fn try_from(text: KeyText) -> Result<Self, String> {
        let malformed = || format!("key is not {} hexadecimal digits", 2 * KEY_BYTES);
        if text.key.len() != 2 * KEY_BYTES || !text.key.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        let mut key = [0; KEY_BYTES];
        for (byte, digits) in key.iter_mut().zip(text.key.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| malformed())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| malformed())?;
        }
        Ok(Self::new(key))
    }
}

impl From<ProducerIdKey> for KeyText {
    fn from(key: ProducerIdKey) -> Self {
        Self { key: key.key.iter().map(|byte| format!("{byte:02x}")).collect() }
    }
}

impl PartialEq for ProducerIdKey {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for ProducerIdKey {}

/// Omits the key, which must not appear in logs.
impl fmt::Debug for ProducerIdKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProducerIdKey").finish_non_exhaustive()
    }
}

impl Value for ProducerIdKey {}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> ProducerIdKey {
        ProducerIdKey::new([byte; KEY_BYTES])
    }

    /// A broker that reads the stored key computes the same ids. The debug output does not contain the key.
    #[test]
    fn id_is_counter_and_check_value() {
        for counter in [0, 1, 1000, PRODUCER_ID_COUNTER_END - 1] {
            let id = key(1).id(counter, ANONYMOUS);
            assert!(id >= 0 && id >> PRODUCER_ID_CHECK_BITS == counter);
            assert!(key(1).has_issued(id, ANONYMOUS));
        }
        let (text, id) = (key(1).encode(), key(1).id(7, ANONYMOUS));
        let read = ProducerIdKey::decode("k", &text).expect("valid");
        assert_eq!((read.id(7, ANONYMOUS), &read), (id, &key(1)));
        assert!(!format!("{:?}", key(1)).contains("01"), "{:?}", key(1));
    }

    #[test]
    fn invented_id_is_not_accepted() {
        let id = key(1).id(7, ANONYMOUS);
        assert!(!key(2).has_issued(id, ANONYMOUS), "another cluster's");
        assert!(!key(1).has_issued(id, "User:a"), "another principal's");
        for invented in [id ^ 1, id + (1 << PRODUCER_ID_CHECK_BITS), -1, i64::MIN, i64::MAX, 0, 7] {
            assert!(!key(1).has_issued(invented, ANONYMOUS), "{invented}");
        }
        let invented = (0..20_000).filter(|id| key(1).has_issued(*id, ANONYMOUS)).count();
        assert_eq!(invented, 0, "small numbers are no valid ids");
    }

    #[test]
    fn malformed_key_is_rejected() {
        for bad in [r#"{"key":""}"#, r#"{"key":"00"}"#, r#"{}"#] {
            assert!(ProducerIdKey::decode("k", bad.as_bytes()).is_err(), "{bad}");
        }
        let long = format!(r#"{{"key":"{}"}}"#, "+1".repeat(KEY_BYTES));
        assert!(ProducerIdKey::decode("k", long.as_bytes()).is_err());
    }
}
