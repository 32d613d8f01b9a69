//! Conversion between the store's types and etcd's.
//!
//! No response causes a panic here. Two methods of `etcd_client` could panic and are not used:
//! - `Event::event_type` for an unknown kind (a deletion is recognised by the key's version)
//! - `TxnResponse::op_responses` for an operation without a response

use bytes::Bytes;
use etcd_client::{
    Compare as Condition, CompareOp, Error, GetOptions, KeyValue as EtcdKeyValue, PutOptions, Txn, TxnOp as EtcdTxnOp,
};

use crate::cluster::store::{Compare, KeyValue, LeaseId, Revision, Transaction, TxnOp, WatchEvent};

/// Converts a revision of etcd, which is a signed number of at least 1. Converts smaller numbers to zero.
pub(super) fn revision(number: i64) -> Revision {
    Revision(u64::try_from(number).unwrap_or_default())
}

/// Converts a revision to etcd's signed number; `None` if etcd cannot have that revision.
pub(super) fn etcd_revision(revision: Revision) -> Option<i64> {
    i64::try_from(revision.0).ok().filter(|number| *number > 0)
}

/// Returns the error for a response that etcd never sends.
pub(super) fn invalid_response_error(reason: &str) -> Error {
    Error::Internal(reason.to_owned())
}

/// Converts a key's state; `None` if the key is not UTF-8. No broker writes such a key.
pub(super) fn entry(from: EtcdKeyValue) -> Option<KeyValue> {
    let (create, modified) = (revision(from.create_revision()), revision(from.mod_revision()));
    let lease = lease(from.lease());
    let (key, value) = from.into_key_value();
    Some(KeyValue { key: utf8_key(key)?, value: value.into(), create_revision: create, mod_revision: modified, lease })
}

/// Converts a change; `None` if the key is not UTF-8.
pub(super) fn event(from: &EtcdKeyValue) -> Option<WatchEvent> {
    let modified = revision(from.mod_revision());
    let key = utf8_key(from.key().to_vec())?;
    // A deletion sets a key's version to zero; nothing else does.
    if from.version() == 0 {
        return Some(WatchEvent::Delete { key, revision: modified });
    }
    Some(WatchEvent::Put(KeyValue {
        key,
        value: Bytes::copy_from_slice(from.value()),
        create_revision: revision(from.create_revision()),
        mod_revision: modified,
        lease: lease(from.lease()),
    }))
}

/// Converts the id of a key's lease; 0 means that the key has no lease.
fn lease(id: i64) -> Option<LeaseId> {
    (id != 0).then_some(LeaseId(id))
}

/// Converts a key to text. Logs a key that is not UTF-8 and returns `None`.
fn utf8_key(key: Vec<u8>) -> Option<String> {
    let text = String::from_utf8(key);
    text.inspect_err(|error| tracing::warn!(key = ?error.as_bytes(), "a key in etcd is not UTF-8: skipped")).ok()
}

/// Returns the options to read one key, at revision `at` or, if that is `None`, at the newest revision.
pub(super) fn get_options(at: Option<Revision>) -> GetOptions {
    match at.and_then(etcd_revision) {
        Some(number) => GetOptions::new().with_revision(number),
        None => GetOptions::new(),
    }
}

/// Returns the options to read up to `limit` keys with the prefix. For `at` see [`get_options`].
pub(super) fn page_options(prefix: &str, limit: i64, at: Option<Revision>) -> GetOptions {
    get_options(at).with_range(prefix_end(prefix)).with_limit(limit)
}

/// Returns the first key that can have the prefix, as the start of a range. etcd rejects an empty start, so it is a
/// zero byte for the empty prefix.
pub(super) fn first_key(prefix: &str) -> Vec<u8> {
    if prefix.is_empty() { vec![0] } else { prefix.as_bytes().to_vec() }
}

/// Returns the first key after this one.
pub(super) fn key_after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// Returns the first key after all keys with the prefix, as the end of a range. As an end, a zero byte means the end of
/// etcd's key space.
pub(super) fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// Converts a transaction, without the `else_get` reads: see `EtcdStore::read_all_at`.
pub(super) fn transaction(from: &Transaction) -> Txn {
    let mut ops: Vec<EtcdTxnOp> = from.ops.iter().map(operation).collect();
    let mut else_ops = Vec::new();
    if ops.is_empty() {
        // etcd lets any member execute a transaction without operations from its local state. A read, of any key, makes
        // the transaction wait for the committed state.
        let key = from.compares.first().map(Compare::key).or(from.else_get.first().map(String::as_str));
        let read = || EtcdTxnOp::get(key.unwrap_or("\0"), Some(GetOptions::new().with_keys_only()));
        ops.push(read());
        else_ops.push(read());
    }
    let compares: Vec<Condition> = from.compares.iter().map(condition).collect();
    Txn::new().when(compares).and_then(ops).or_else(else_ops)
}

fn operation(op: &TxnOp) -> EtcdTxnOp {
    match op {
        TxnOp::Put { key, value, lease } => {
            let lease = lease.map_or(0, |lease| lease.0);
            EtcdTxnOp::put(key.as_str(), value.to_vec(), Some(PutOptions::new().with_lease(lease)))
        }
        TxnOp::Delete { key } => EtcdTxnOp::delete(key.as_str(), None),
    }
}

fn condition(compare: &Compare) -> Condition {
    let key = compare.key();
    // In etcd, a missing key has revision 0 and lease 0, so a compare with 0 would hold for it. In the store, a compare
    // with 0, or with another number that etcd cannot have, never holds.
    let never = || Condition::create_revision(key, CompareOp::Less, 0);
    match compare {
        Compare::ModRevision(_, revision) => {
            etcd_revision(*revision).map_or_else(never, |number| Condition::mod_revision(key, CompareOp::Equal, number))
        }
        Compare::CreateRevision(_, revision) => etcd_revision(*revision)
            .map_or_else(never, |number| Condition::create_revision(key, CompareOp::Equal, number)),
        Compare::Value(_, value) => Condition::value(key, CompareOp::Equal, value.to_vec()),
        Compare::Lease(_, LeaseId(0)) => never(),
        Compare::Lease(_, lease) => Condition::lease(key, CompareOp::Equal, lease.0),
        Compare::Exists(_) => Condition::create_revision(key, CompareOp::Greater, 0),
        Compare::Absent(_) => Condition::create_revision(key, CompareOp::Equal, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_end_is_first_key_without_prefix() {
        assert_eq!(prefix_end("/strandline/a/"), b"/strandline/a0");
        assert_eq!(prefix_end("a"), b"b");
        assert_eq!(prefix_end(""), [0]);
        assert_eq!((first_key(""), first_key("a")), (vec![0], b"a".to_vec()));
        assert_eq!(key_after(b"a"), b"a\0");
        // UTF-8 bytes are below 0xF5, so there is no carry; the last byte is incremented.
        assert_eq!(prefix_end("\u{10FFFF}"), [0xF4, 0x8F, 0xBF, 0xC0]);
    }

    #[test]
    fn impossible_revisions_are_not_converted() {
        assert_eq!((revision(-1), revision(0), revision(7)), (Revision::ZERO, Revision::ZERO, Revision(7)));
        assert_eq!(
            (etcd_revision(Revision::ZERO), etcd_revision(Revision(7)), etcd_revision(Revision(u64::MAX))),
            (None, Some(7), None)
        );
    }

    #[test]
    fn transaction_without_operations_reads_a_key() {
        let compared = Transaction::new().when(Compare::Exists("a".to_owned()));
        let written = format!("{:?}", transaction(&compared));
        assert_eq!(written.matches("RequestRange").count(), 2, "one in each branch: {written}");
        let put = Transaction::new().when(Compare::Exists("a".to_owned())).put("b", "");
        assert!(!format!("{:?}", transaction(&put)).contains("RequestRange"));
    }
}
