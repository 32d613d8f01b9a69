//! The embedded store's two tables in redb, and the effect of one commit on them. `mod.rs` handles leases, the queue
//! and watches.

use std::sync::Arc;

use bytes::Bytes;
use redb::{Database, ReadOnlyTable, ReadableDatabase as _, ReadableTable, TableDefinition, TableError};

use crate::cluster::store::{
    KeyValue, LeaseId, MetaStoreError, Revision, Transaction, TxnOp, TxnOutcome, WatchBatch, WatchEvent,
};

/// Newest table layout that this version reads and writes.
pub(super) const FORMAT: u64 = 1;

/// Create revision, mod revision, lease (0 means none), value.
type EntryRow = (u64, u64, i64, &'static [u8]);

/// Entries in a read transaction.
pub(super) type ReadEntries = ReadOnlyTable<&'static str, EntryRow>;

const ENTRIES: TableDefinition<'_, &str, EntryRow> = TableDefinition::new("entries");
const STORE: TableDefinition<'_, &str, u64> = TableDefinition::new("store");
const FORMAT_KEY: &str = "format";
const REVISION_KEY: &str = "revision";
/// Revision of an empty store, as in etcd. It is greater than [`Revision::ZERO`], which stands for "nothing read yet".
const FIRST_REVISION: Revision = Revision(1);

/// Returns the format of a database; `None` for a new one.
pub(super) fn read_format(database: &Database) -> Result<Option<u64>, redb::Error> {
    match database.begin_read()?.open_table(STORE) {
        Ok(store) => Ok(store.get(FORMAT_KEY)?.map(|format| format.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Prepares a database for use: creates missing tables and deletes every leased key, since no lease survives a restart.
/// Returns the revision after the deletions.
pub(super) fn initialize(database: &Database) -> Result<Revision, redb::Error> {
    let transaction = database.begin_write()?;
    let revision = {
        let mut store = transaction.open_table(STORE)?;
        store.insert(FORMAT_KEY, FORMAT)?;
        let mut batch = WriteBatch {
            entries: transaction.open_table(ENTRIES)?,
            revision: store.get(REVISION_KEY)?.map_or(FIRST_REVISION, |revision| Revision(revision.value())),
            changes: Vec::new(),
        };
        batch.delete_leased(|_| true)?;
        store.insert(REVISION_KEY, batch.revision.0)?;
        batch.revision
    };
    transaction.commit()?;
    Ok(revision)
}

/// Sets the format of a database to that of another version.
#[cfg(test)]
pub(super) fn set_format(database: &Database, format: u64) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(STORE)?.insert(FORMAT_KEY, format)?;
    Ok(transaction.commit()?)
}

/// Calls `function` with the newest revision and the entries at that revision.
pub(super) fn read<T>(
    database: &Database,
    function: impl FnOnce(Revision, &ReadEntries) -> Result<T, redb::Error>,
) -> Result<T, redb::Error> {
    let transaction = database.begin_read()?;
    let revision =
        transaction.open_table(STORE)?.get(REVISION_KEY)?.map_or(FIRST_REVISION, |revision| Revision(revision.value()));
    function(revision, &transaction.open_table(ENTRIES)?)
}

/// Changes entries in one durable commit, or in none if `function` changes nothing. `revision` is the newest revision
/// before the commit. Returns the result of `function` and the changes, one element per new revision.
pub(super) fn write<T>(
    database: &Database,
    revision: Revision,
    function: impl FnOnce(&mut WriteBatch<'_>) -> Result<T, redb::Error>,
) -> Result<(T, Vec<Arc<WatchBatch>>), redb::Error> {
    let transaction = database.begin_write()?;
    let (output, changes) = {
        let mut batch = WriteBatch { entries: transaction.open_table(ENTRIES)?, revision, changes: Vec::new() };
        let output = function(&mut batch)?;
        if !batch.changes.is_empty() {
            transaction.open_table(STORE)?.insert(REVISION_KEY, batch.revision.0)?;
        }
        (output, batch.changes)
    };
    if changes.is_empty() {
        transaction.abort()?;
    } else {
        transaction.commit()?;
    }
    Ok((output, changes))
}

/// An open commit to which transactions are applied one after another.
pub(super) struct WriteBatch<'t> {
    entries: redb::Table<'t, &'static str, EntryRow>,
    revision: Revision,
    changes: Vec<Arc<WatchBatch>>,
}

impl WriteBatch<'_> {
    /// Applies one transaction after the previous ones. `is_live` returns true for a lease that has not ended. The
    /// inner error rejects only this transaction; the outer error fails the whole commit.
    pub(super) fn transact(
        &mut self,
        transaction: &Transaction,
        is_live: impl Fn(LeaseId) -> bool,
    ) -> Result<Result<TxnOutcome, MetaStoreError>, redb::Error> {
        for compare in &transaction.compares {
            if !compare.holds(find(&self.entries, compare.key())?.as_ref()) {
                let read = |key: &String| find(&self.entries, key);
                let found = transaction.else_get.iter().map(read).collect::<Result<_, _>>()?;
                return Ok(Ok(TxnOutcome::CompareFailed { revision: self.revision, found }));
            }
        }
        for op in &transaction.ops {
            if let TxnOp::Put { lease: Some(lease), .. } = op
                && !is_live(*lease)
            {
                return Ok(Err(MetaStoreError::LeaseGone { lease: *lease }));
            }
        }
        let revision = self.revision.next();
        let mut events = Vec::with_capacity(transaction.ops.len());
        for op in &transaction.ops {
            events.extend(self.apply(op, revision)?);
        }
        self.add_changes(revision, events);
        Ok(Ok(TxnOutcome::Committed { revision: self.revision }))
    }

    /// Deletes the keys of all leases for which `is_ended` returns true, as one transaction.
    pub(super) fn delete_leased(&mut self, is_ended: impl Fn(LeaseId) -> bool) -> Result<(), redb::Error> {
        let mut keys = Vec::new();
        for row in self.entries.iter()? {
            let (key, value) = row?;
            if decode_lease(value.value().2).is_some_and(&is_ended) {
                keys.push(key.value().to_owned());
            }
        }
        let revision = self.revision.next();
        let mut events = Vec::with_capacity(keys.len());
        for key in keys {
            events.extend(self.apply(&TxnOp::Delete { key }, revision)?);
        }
        self.add_changes(revision, events);
        Ok(())
    }

    /// Applies one operation at this revision. Returns its event; `None` if the key to delete does not exist.
    fn apply(&mut self, op: &TxnOp, revision: Revision) -> Result<Option<WatchEvent>, redb::Error> {
        match op {
            TxnOp::Put { key, value, lease } => {
                let created = self.entries.get(key.as_str())?.map_or(revision.0, |row| row.value().0);
                let row = (created, revision.0, lease.map_or(0, |lease| lease.0), &value[..]);
                self.entries.insert(key.as_str(), row)?;
                Ok(Some(WatchEvent::Put(decode_row(key, row))))
            }
            TxnOp::Delete { key } => {
                let deleted = self.entries.remove(key.as_str())?.is_some();
                Ok(deleted.then(|| WatchEvent::Delete { key: key.clone(), revision }))
            }
        }
    }

    /// Adds the events of one transaction to the changes. A transaction without events gets no revision.
    fn add_changes(&mut self, revision: Revision, events: Vec<WatchEvent>) {
        if !events.is_empty() {
            self.revision = revision;
            self.changes.push(Arc::new(WatchBatch { revision, events }));
        }
    }
}

/// Reports the written entries to the simulator's checker.
#[cfg(feature = "sim")]
pub(super) fn report_writes(changes: &WatchBatch) {
    let revision = changes.revision.0;
    for event in &changes.events {
        match event {
            WatchEvent::Put(KeyValue { key, value, create_revision, .. }) => {
                sim_event!(Stored { key, value: Some((value, create_revision.0)), revision });
            }
            WatchEvent::Delete { key, .. } => sim_event!(Stored { key, value: None, revision }),
        }
    }
}

/// Returns the entry of a key; `None` if the key does not exist.
pub(super) fn find(
    entries: &impl ReadableTable<&'static str, EntryRow>,
    key: &str,
) -> Result<Option<KeyValue>, redb::Error> {
    Ok(entries.get(key)?.map(|row| decode_row(key, row.value())))
}

/// Returns the entry of a key from its row.
pub(super) fn decode_row(key: &str, (created, modified, lease_id, value): (u64, u64, i64, &[u8])) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(value),
        create_revision: Revision(created),
        mod_revision: Revision(modified),
        lease: decode_lease(lease_id),
    }
}

/// Converts the lease id of a row; 0 means that the key has no lease.
fn decode_lease(id: i64) -> Option<LeaseId> {
    (id != 0).then_some(LeaseId(id))
}
