//! Producer ids that any leader can tell from invented ones. Pure.
//!
//! ```text
//! 63 0 │ 62 .. 25 counter │ 24 .. 0 check value
//! ```
//!
//! The counter makes an id unique; the metadata store counts it. The check value is the start of HMAC-SHA256 of counter and principal under a
//! key of the cluster. The key lies in the metadata store, is made once, and every broker mirrors it. A client that knows no id can
//! only guess: one guess in 2^25 is right, and the connection's quota counts each wrong one.

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::keys::Value;
use crate::task::random;

const CHECK_BITS: u32 = 25;
const KEY_BYTES: usize = 32;

/// First counter that an id cannot hold.
pub(super) const COUNTER_END: i64 = 1 << (63 - CHECK_BITS);

/// The principal of a client that did not log in.
pub const ANONYMOUS: &str = "";

/// The value of `producer-id-key`: what check values of producer ids are made with.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "KeyText", into = "KeyText")]
pub struct ProducerIdKey {
    key: [u8; KEY_BYTES],
    /// Started with the key, which costs as much as a check value does.
    mac: Hmac<Sha256>,
}

#[derive(Serialize, Deserialize)]
struct KeyText {
    /// Hexadecimal.
    key: String,
}

impl ProducerIdKey {
    /// A key that nobody else has.
    pub fn draw() -> Self {
        let mut key = [0; KEY_BYTES];
        random::fill(&mut key);
        Self::new(key)
    }

    fn new(key: [u8; KEY_BYTES]) -> Self {
        Self { key, mac: Hmac::new_from_slice(&key).expect("HMAC takes a key of any length") }
    }

    /// The id of a counter, for a principal.
    ///
    /// # Panics
    /// When the counter is negative or has more than 38 bits.
    pub fn id(&self, counter: i64, principal: &str) -> i64 {
        assert!((0..COUNTER_END).contains(&counter), "a counter has 38 bits");
        counter << CHECK_BITS | self.check_value(counter, principal)
    }

    /// Whether [`Self::id`] made this id for this principal.
    pub fn made(&self, id: i64, principal: &str) -> bool {
        let counter = id >> CHECK_BITS;
        id >= 0 && id & ((1 << CHECK_BITS) - 1) == self.check_value(counter, principal)
    }

    fn check_value(&self, counter: i64, principal: &str) -> i64 {
        let mut mac = self.mac.clone();
        mac.update(&counter.to_be_bytes());
        mac.update(principal.as_bytes());
        let code = mac.finalize().into_bytes();
        let first = u32::from_be_bytes([code[0], code[1], code[2], code[3]]);
        i64::from(first >> (u32::BITS - CHECK_BITS))
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

/// Without the key: logs are no place for it.
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

    /// Ids that were handed out stay valid when the broker is upgraded: these numbers never change.
    #[test]
    fn id_is_counter_and_check_value() {
        for counter in [0, 1, 1000, COUNTER_END - 1] {
            let id = key(1).id(counter, ANONYMOUS);
            assert!(id >= 0 && id >> CHECK_BITS == counter);
            assert!(key(1).made(id, ANONYMOUS));
        }
        let (text, id) = (key(1).encode(), key(1).id(7, ANONYMOUS));
        let read = ProducerIdKey::decode("k", &text).expect("it was written");
        assert_eq!((read.id(7, ANONYMOUS), &read), (id, &key(1)));
        assert!(!format!("{:?}", key(1)).contains("01"), "{:?}", key(1));
    }

    #[test]
    fn invented_id_is_told_from_one_that_was_handed_out() {
        let id = key(1).id(7, ANONYMOUS);
        assert!(!key(2).made(id, ANONYMOUS), "another cluster's");
        assert!(!key(1).made(id, "User:a"), "another principal's");
        for invented in [id ^ 1, id + (1 << CHECK_BITS), -1, i64::MIN, i64::MAX, 0, 7] {
            assert!(!key(1).made(invented, ANONYMOUS), "{invented}");
        }
        let invented = (0..20_000).filter(|id| key(1).made(*id, ANONYMOUS)).count();
        assert_eq!(invented, 0, "of small numbers that anybody would try");
    }

    #[test]
    fn key_that_is_no_key_is_refused() {
        for bad in [r#"{"key":""}"#, r#"{"key":"00"}"#, r#"{}"#] {
            assert!(ProducerIdKey::decode("k", bad.as_bytes()).is_err(), "{bad}");
        }
        let long = format!(r#"{{"key":"{}"}}"#, "+1".repeat(KEY_BYTES));
        assert!(ProducerIdKey::decode("k", long.as_bytes()).is_err());
    }
}
