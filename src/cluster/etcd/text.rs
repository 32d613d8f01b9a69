//! The store's words in etcd's, and back.
//!
//! Nothing here panics at an answer. Of `etcd_client` two methods would, and are not used: `Event::event_type` at a kind that
//! it does not know (what was deleted is told by its version), `TxnResponse::op_responses` at an operation without answer.

use bytes::Bytes;
use etcd_client::{Compare as Condition, CompareOp, Error, GetOptions, KeyValue, PutOptions, Txn, TxnOp};

use crate::cluster::store::{Compare, Entry, Event, LeaseId, Op, Revision, Transaction};

/// etcd counts from 1 with signs; nothing below is a revision.
pub(super) fn revision(number: i64) -> Revision {
    Revision(u64::try_from(number).unwrap_or_default())
}

/// The number of a revision, unless etcd can have no such.
pub(super) fn number(revision: Revision) -> Option<i64> {
    i64::try_from(revision.0).ok().filter(|number| *number > 0)
}

/// An answer that cannot be one of etcd.
pub(super) fn not_an_answer(why: &str) -> Error {
    Error::Internal(why.to_owned())
}

/// A key as it stands; `None` for one that is no text and therefore not ours.
pub(super) fn entry(from: KeyValue) -> Option<Entry> {
    let (create, modified) = (revision(from.create_revision()), revision(from.mod_revision()));
    let lease = lease(from.lease());
    let (key, value) = from.into_key_value();
    Some(Entry { key: named(key)?, value: value.into(), create_revision: create, mod_revision: modified, lease })
}

/// One change; `None` for a key that is no text.
pub(super) fn event(from: &KeyValue) -> Option<Event> {
    let modified = revision(from.mod_revision());
    let key = named(from.key().to_vec())?;
    // A deletion sets a key's version to zero, and nothing else does.
    if from.version() == 0 {
        return Some(Event::Delete { key, revision: modified });
    }
    Some(Event::Put(Entry {
        key,
        value: Bytes::copy_from_slice(from.value()),
        create_revision: revision(from.create_revision()),
        mod_revision: modified,
        lease: lease(from.lease()),
    }))
}

fn lease(id: i64) -> Option<LeaseId> {
    (id != 0).then_some(LeaseId(id))
}

fn named(key: Vec<u8>) -> Option<String> {
    let named = String::from_utf8(key);
    named
        .inspect_err(|error| tracing::warn!(key = ?error.as_bytes(), "a key in etcd is no text; it is passed over"))
        .ok()
}

/// Reads one key.
pub(super) fn one(at: Option<Revision>) -> GetOptions {
    match at.and_then(number) {
        Some(number) => GetOptions::new().with_revision(number),
        None => GetOptions::new(),
    }
}

/// Reads up to `limit` keys from a key on, as long as they begin with the prefix.
pub(super) fn page(prefix: &str, limit: i64, at: Option<Revision>) -> GetOptions {
    one(at).with_range(end(prefix)).with_limit(limit)
}

/// The first key that may begin with the prefix. etcd takes no empty key.
pub(super) fn first(prefix: &str) -> Vec<u8> {
    if prefix.is_empty() { vec![0] } else { prefix.as_bytes().to_vec() }
}

/// The first key after this one.
pub(super) fn after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// The first key after all that begin with the prefix; a zero byte is etcd's word for the end of everything.
pub(super) fn end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// The transaction, without the reads of its other branch: see `EtcdStore::found`.
pub(super) fn transaction(from: &Transaction) -> Txn {
    let mut ops: Vec<TxnOp> = from.ops.iter().map(operation).collect();
    let mut otherwise = Vec::new();
    if ops.is_empty() {
        // etcd takes a transaction that neither writes nor reads for one that any member may answer from what it has. A
        // read makes it wait for what is committed; of which key is all the same.
        let key = from.compares.first().map(Compare::key).or(from.else_get.first().map(String::as_str));
        let read = || TxnOp::get(key.unwrap_or("\0"), Some(GetOptions::new().with_keys_only()));
        ops.push(read());
        otherwise.push(read());
    }
    let compares: Vec<Condition> = from.compares.iter().map(condition).collect();
    Txn::new().when(compares).and_then(ops).or_else(otherwise)
}

fn operation(op: &Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let lease = lease.map_or(0, |lease| lease.0);
            TxnOp::put(key.as_str(), value.to_vec(), Some(PutOptions::new().with_lease(lease)))
        }
        Op::Delete { key } => TxnOp::delete(key.as_str(), None),
    }
}

fn condition(compare: &Compare) -> Condition {
    let key = compare.key();
    // To etcd a key that is not there has revision and lease 0. With us such a compare never holds, nor does one with what
    // etcd cannot have.
    let never = || Condition::create_revision(key, CompareOp::Less, 0);
    match compare {
        Compare::ModRevision(_, revision) => {
            number(*revision).map_or_else(never, |number| Condition::mod_revision(key, CompareOp::Equal, number))
        }
        Compare::CreateRevision(_, revision) => {
            number(*revision).map_or_else(never, |number| Condition::create_revision(key, CompareOp::Equal, number))
        }
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
    fn a_prefix_ends_before_the_first_key_that_does_not_begin_with_it() {
        assert_eq!(end("/strandline/a/"), b"/strandline/a0");
        assert_eq!(end("a"), b"b");
        assert_eq!(end(""), [0]);
        assert_eq!((first(""), first("a")), (vec![0], b"a".to_vec()));
        assert_eq!(after(b"a"), b"a\0");
        // Bytes of text end below 0xF5, so nothing is ever carried; a last byte is simply one more.
        assert_eq!(end("\u{10FFFF}"), [0xF4, 0x8F, 0xBF, 0xC0]);
    }

    #[test]
    fn what_etcd_cannot_have_is_no_revision() {
        assert_eq!((revision(-1), revision(0), revision(7)), (Revision::ZERO, Revision::ZERO, Revision(7)));
        assert_eq!((number(Revision::ZERO), number(Revision(7)), number(Revision(u64::MAX))), (None, Some(7), None));
    }

    #[test]
    fn a_transaction_without_operations_reads_so_that_it_is_linearizable() {
        let compared = Transaction::new().when(Compare::Exists("a".to_owned()));
        let written = format!("{:?}", transaction(&compared));
        assert_eq!(written.matches("RequestRange").count(), 2, "one in each branch: {written}");
        let put = Transaction::new().when(Compare::Exists("a".to_owned())).put("b", "");
        assert!(!format!("{:?}", transaction(&put)).contains("RequestRange"));
    }
}
