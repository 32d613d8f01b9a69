//! The content of the metadata cache, and the effect of lists and watch events on it. Pure: no store, task or clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    cluster::{
        keys::{
            BrokerValue, ControllerValue, DirectoryValue, DrainValue, GenerationValue, Key, Keys, ProducerIdsValue,
            TopicValue, Value,
        },
        partition_value::PartitionValue,
        producer_ids::ProducerIdKey,
        store::{KeyValue, ListResult, Revision, WatchBatch, WatchEvent},
    },
    model::{BrokerId, PartitionId, TopicId, TopicName},
    tier::{StoreBinding, TierState},
};

/// A value with the revisions of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    /// Decoded value.
    pub value: T,
    /// Create revision of the key. Of a broker's key it is the broker epoch.
    pub create_revision: Revision,
    /// Revision of the last write, for compare-and-set.
    pub mod_revision: Revision,
}

/// Metadata of one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionEntry {
    /// Replicas and leader of the partition; `None` if the key does not exist or cannot be read.
    pub partition: Option<Arc<Versioned<PartitionValue>>>,
    /// Committed tier state of the partition; `None` before the first commit, or if the key cannot be read.
    pub tier: Option<Arc<Versioned<TierState>>>,
}

/// The cluster's metadata at one revision.
///
/// All holders of the `Arc` of a snapshot share it. While a caller holds it, the next change copies the maps, and the
/// partition entries of the topic that it modifies. So callers read a value and drop the snapshot.
#[derive(Clone, Debug, Default)]
pub struct MetadataSnapshot {
    revision: Revision,
    brokers: BTreeMap<BrokerId, Arc<Versioned<BrokerValue>>>,
    drains: BTreeMap<BrokerId, Arc<Versioned<DrainValue>>>,
    controller: Option<Arc<Versioned<ControllerValue>>>,
    generation: Option<Arc<Versioned<GenerationValue>>>,
    topics: BTreeMap<TopicName, Arc<Versioned<TopicValue>>>,
    /// Name of each topic in `topics`, by its id.
    names: BTreeMap<TopicId, TopicName>,
    /// Entries of each topic by partition number. Includes stale partitions, and partitions of a topic that is being
    /// created.
    partitions: BTreeMap<TopicId, Arc<Vec<PartitionEntry>>>,
    /// Created once per cluster. A deletion or corruption of the key does not remove this copy, so that issued producer
    /// ids stay valid.
    producer_id_key: Option<Arc<Versioned<ProducerIdKey>>>,
    /// Keys with unusable values, and the errors.
    unreadable: BTreeMap<Key, String>,
}

impl MetadataSnapshot {
    /// Returns the revision of the snapshot; zero before the first list.
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Returns the registered brokers whose registration can be read.
    pub const fn brokers(&self) -> &BTreeMap<BrokerId, Arc<Versioned<BrokerValue>>> {
        &self.brokers
    }

    /// Returns the brokers that an operator requested to drain, live or not.
    pub const fn drains(&self) -> &BTreeMap<BrokerId, Arc<Versioned<DrainValue>>> {
        &self.drains
    }

    /// Returns the broker in the controller key; `None` if the key does not exist or cannot be read.
    pub fn controller(&self) -> Option<BrokerId> {
        self.controller.as_ref().map(|versioned| versioned.value.broker)
    }

    /// Returns the revision of the last write to the controller key.
    pub fn controller_revision(&self) -> Option<Revision> {
        self.controller.as_ref().map(|versioned| versioned.mod_revision)
    }

    /// Returns the key that verifies producer ids; `None` until a broker of the cluster has created it.
    pub fn producer_id_key(&self) -> Option<&ProducerIdKey> {
        self.producer_id_key.as_ref().map(|versioned| &versioned.value)
    }

    /// Returns the cluster generation, if it can be read. Together with a key's create revision, it identifies every
    /// holder of that key uniquely, also across restores of the store.
    pub fn generation(&self) -> Option<u64> {
        self.generation.as_ref().map(|versioned| versioned.value.generation)
    }

    /// Returns the topics whose value can be read, by name.
    pub const fn topics(&self) -> &BTreeMap<TopicName, Arc<Versioned<TopicValue>>> {
        &self.topics
    }

    /// Returns the topic with this name.
    pub fn topic(&self, name: &TopicName) -> Option<&Arc<Versioned<TopicValue>>> {
        self.topics.get(name)
    }

    /// Returns the name of the topic with this id.
    pub fn name(&self, id: TopicId) -> Option<&TopicName> {
        self.names.get(&id)
    }

    /// Returns the entries of all partitions of a topic, with their numbers `0..topic.partitions`. An entry whose
    /// partition key is missing or unreadable has no `partition`. Copies nothing.
    pub fn partitions_of<'a>(
        &'a self,
        topic: &TopicValue,
    ) -> impl Iterator<Item = (u32, &'a PartitionEntry)> + use<'a> {
        static MISSING: PartitionEntry = PartitionEntry { partition: None, tier: None };
        let entries = self.partitions.get(&topic.id);
        (0..topic.partitions).map(move |number| (number, entry_at(entries, number).unwrap_or(&MISSING)))
    }

    /// Returns the brokers, live or not, that have a replica of an existing partition.
    pub fn holders(&self) -> BTreeSet<BrokerId> {
        let entries = self.topics.values().flat_map(|topic| self.partitions_of(&topic.value));
        let values = entries.filter_map(|(_, entry)| entry.partition.as_ref());
        values.flat_map(|versioned| versioned.value.replicas.iter().copied()).collect()
    }

    /// Returns the entry of an existing partition. A partition exists if its topic exists and its number is below the
    /// topic's partition count.
    pub fn partition(&self, id: PartitionId) -> Option<&PartitionEntry> {
        let topic = self.topics.get(self.names.get(&id.topic)?)?;
        (id.number < topic.value.partitions).then(|| entry_at(self.partitions.get(&id.topic), id.number)).flatten()
    }

    /// Returns the entry of a partition, even if its topic is missing or unreadable.
    pub fn entry(&self, id: PartitionId) -> Option<&PartitionEntry> {
        entry_at(self.partitions.get(&id.topic), id.number)
    }

    /// Returns every existing partition that has a replica on this broker.
    pub fn partitions_on(&self, broker: BrokerId) -> Vec<PartitionId> {
        let mut found = Vec::new();
        for topic in self.topics.values() {
            for (number, entry) in self.partitions_of(&topic.value) {
                if entry.partition.as_ref().is_some_and(|versioned| versioned.value.replicas.contains(&broker)) {
                    found.push(PartitionId::new(topic.value.id, number));
                }
            }
        }
        found
    }

    /// Returns true if the metadata references segment objects.
    pub fn has_tiered_data(&self) -> bool {
        let mut entries = self.partitions.values().flat_map(|entries| entries.iter());
        entries.any(|entry| entry.tier.as_ref().is_some_and(|versioned| versioned.value.manifest.is_some()))
    }

    /// Returns the keys whose values cannot be read, and the errors.
    pub const fn unreadable(&self) -> &BTreeMap<Key, String> {
        &self.unreadable
    }

    /// Returns a description of the difference from a list of the prefix; `None` if there is none. For the simulator's
    /// checker.
    #[cfg(feature = "sim")]
    pub fn differs_from(&self, keys: &Keys, listing: ListResult) -> Option<String> {
        let mut expected = Self::default();
        expected.replace(keys, listing);
        let (revision, listed) = (self.revision, expected.revision);
        // Keys outside the prefix advance the store's revision too, without an event in the watch.
        expected.revision = revision;
        let (cached, stored) = (format!("{self:?}"), format!("{expected:?}"));
        (cached != stored).then(|| format!("the cache at {revision} is {cached}, the list at {listed} is {stored}"))
    }

    /// Returns the partition keys and tier keys without an existing partition, by topic and partition number. Either
    /// the topic does not exist, or the number is not below its partition count.
    pub(crate) fn stale_partitions(&self) -> BTreeMap<TopicId, Vec<(u32, PartitionEntry)>> {
        let mut stale_by_topic = BTreeMap::new();
        for (id, entries) in &self.partitions {
            let topic = self.names.get(id).and_then(|name| self.topics.get(name));
            let partition_count = topic.map_or(0, |topic| topic.value.partitions);
            let stale: Vec<_> = (0..)
                .zip(entries.iter())
                .filter(|(number, entry)| *number >= partition_count && **entry != PartitionEntry::default())
                .map(|(number, entry)| (number, entry.clone()))
                .collect();
            if !stale.is_empty() {
                stale_by_topic.insert(*id, stale);
            }
        }
        stale_by_topic
    }

    /// Applies the changes of a watch; events that are not newer than the snapshot change nothing. Returns the changed
    /// keys that feeds receive (see [`is_published`]).
    pub(crate) fn apply(&mut self, keys: &Keys, changes: WatchBatch) -> Vec<Key> {
        let before = self.revision;
        let mut changed = Vec::new();
        for event in changes.events {
            if event.revision() <= before {
                continue;
            }
            self.revision = self.revision.max(event.revision());
            // `parse` returns `None` for kinds of keys that this version does not support (groups, offsets, kinds of a
            // newer version).
            let Some(key) = keys.parse(event.key()) else { continue };
            match event {
                WatchEvent::Put(entry) => self.put(keys, &key, &entry),
                WatchEvent::Delete { .. } => self.remove(&key),
            }
            changed.push(key);
        }
        self.revision = self.revision.max(changes.revision);
        changed.retain(is_published);
        changed
    }

    /// Replaces the content by a list of the complete prefix; an older list changes nothing. Returns the changed keys
    /// that feeds receive (see [`is_published`]).
    pub(crate) fn replace(&mut self, keys: &Keys, listing: ListResult) -> Vec<Key> {
        if listing.revision < self.revision {
            return Vec::new();
        }
        let mut removed: BTreeSet<Key> = self.keys();
        let mut changed = Vec::new();
        for entry in &listing.entries {
            let Some(key) = keys.parse(&entry.key) else { continue };
            removed.remove(&key);
            if self.mod_revision(&key) != Some(entry.mod_revision) {
                self.put(keys, &key, entry);
                changed.push(key);
            }
        }
        for key in removed {
            self.remove(&key);
            changed.push(key);
        }
        self.revision = listing.revision;
        changed.retain(is_published);
        changed
    }

    /// Stores the value of a key. An invalid value removes the previous value, and is listed in `unreadable`. Directory
    /// records, producer ids and the store binding are decoded only to detect invalid values. Tombstones are not
    /// decoded.
    fn put(&mut self, keys: &Keys, key: &Key, entry: &KeyValue) {
        let result = match key {
            Key::Broker(id) => decode(entry).map(|versioned| {
                self.brokers.insert(*id, versioned);
            }),
            Key::Drain(id) => decode(entry).map(|versioned| {
                self.drains.insert(*id, versioned);
            }),
            Key::Controller => decode(entry).map(|versioned| self.controller = Some(versioned)),
            Key::Topic(name) => decode(entry).map(|versioned| self.put_topic(name, versioned)),
            Key::Partition(id) => decode(entry).map(|versioned| self.entry_mut(*id).partition = Some(versioned)),
            Key::Tier(id) => decode(entry).map(|versioned| self.entry_mut(*id).tier = Some(versioned)),
            Key::ProducerIdKey => decode(entry).map(|versioned| self.producer_id_key = Some(versioned)),
            Key::Directory(_) => decode::<DirectoryValue>(entry).map(drop),
            Key::ProducerIds => decode::<ProducerIdsValue>(entry).map(drop),
            Key::ObjectStore => decode::<StoreBinding>(entry).map(drop),
            Key::Generation => decode(entry).map(|versioned| self.generation = Some(versioned)),
            Key::Tombstone(_) => Ok(()),
        };
        match result {
            Ok(()) => {
                self.unreadable.remove(key);
            }
            Err(reason) => {
                tracing::warn!(key = keys.path(key), %reason, "a value in the metadata store cannot be used: skipped");
                // The previous value is no longer current.
                self.remove(key);
                self.unreadable.insert(key.clone(), reason);
            }
        }
    }

    /// Stores a topic. A topic with another id under the same name was deleted and created again, so the old id is
    /// removed from `names`.
    fn put_topic(&mut self, name: &TopicName, topic: Arc<Versioned<TopicValue>>) {
        let id = topic.value.id;
        if let Some(old) = self.topics.insert(name.clone(), topic)
            && old.value.id != id
        {
            self.names.remove(&old.value.id);
        }
        self.names.insert(id, name.clone());
    }

    /// Removes the value of a key, and its error in `unreadable`. The producer id key stays.
    fn remove(&mut self, key: &Key) {
        self.unreadable.remove(key);
        match key {
            Key::Broker(id) => {
                self.brokers.remove(id);
            }
            Key::Drain(id) => {
                self.drains.remove(id);
            }
            Key::Controller => self.controller = None,
            Key::Generation => self.generation = None,
            Key::Topic(name) => {
                if let Some(old) = self.topics.remove(name) {
                    self.names.remove(&old.value.id);
                }
            }
            Key::Partition(id) => self.clear_value(*id, |entry| entry.partition = None),
            Key::Tier(id) => self.clear_value(*id, |entry| entry.tier = None),
            Key::Directory(_) | Key::Tombstone(_) | Key::ProducerIds | Key::ProducerIdKey | Key::ObjectStore => {}
        }
    }

    /// Returns the entry of a partition for a change. If the entry is missing, adds empty entries up to and including
    /// the partition's number.
    fn entry_mut(&mut self, id: PartitionId) -> &mut PartitionEntry {
        let entries = Arc::make_mut(self.partitions.entry(id.topic).or_default());
        let index = index(id.number);
        if entries.len() <= index {
            // The number is below `limits::MAX_PARTITIONS`, as `Keys::parse` ensures.
            entries.resize_with(index + 1, PartitionEntry::default);
        }
        &mut entries[index]
    }

    /// Calls `clear`, which removes `partition` or `tier` from a partition's entry, and drops empty entries at the end
    /// of the topic's list.
    fn clear_value(&mut self, id: PartitionId, clear: impl FnOnce(&mut PartitionEntry)) {
        let Some(entries) = self.partitions.get_mut(&id.topic) else { return };
        let entries = Arc::make_mut(entries);
        if let Some(entry) = entries.get_mut(index(id.number)) {
            clear(entry);
        }
        while entries.last().is_some_and(|entry| *entry == PartitionEntry::default()) {
            entries.pop();
        }
        if entries.is_empty() {
            self.partitions.remove(&id.topic);
        }
    }

    /// Returns the revision of a key's last write, if the snapshot contains its value. Returns `None` for an invalid,
    /// missing or never cached value, so that each list applies such a key again.
    fn mod_revision(&self, key: &Key) -> Option<Revision> {
        match key {
            Key::Broker(id) => self.brokers.get(id).map(|versioned| versioned.mod_revision),
            Key::Drain(id) => self.drains.get(id).map(|versioned| versioned.mod_revision),
            Key::Controller => self.controller.as_ref().map(|versioned| versioned.mod_revision),
            Key::Generation => self.generation.as_ref().map(|versioned| versioned.mod_revision),
            Key::Topic(name) => self.topics.get(name).map(|versioned| versioned.mod_revision),
            Key::Partition(id) => entry_at(self.partitions.get(&id.topic), id.number)?
                .partition
                .as_ref()
                .map(|versioned| versioned.mod_revision),
            Key::Tier(id) => entry_at(self.partitions.get(&id.topic), id.number)?
                .tier
                .as_ref()
                .map(|versioned| versioned.mod_revision),
            Key::ProducerIdKey => self.producer_id_key.as_ref().map(|versioned| versioned.mod_revision),
            Key::Directory(_) | Key::Tombstone(_) | Key::ProducerIds | Key::ObjectStore => None,
        }
    }

    /// Returns the keys of all cached and all unreadable values, without the cached producer id key, because no list
    /// removes it.
    fn keys(&self) -> BTreeSet<Key> {
        let mut keys: BTreeSet<Key> = self.unreadable.keys().cloned().collect();
        keys.extend(self.brokers.keys().map(|id| Key::Broker(*id)));
        keys.extend(self.drains.keys().map(|id| Key::Drain(*id)));
        keys.extend(self.controller.as_ref().map(|_| Key::Controller));
        keys.extend(self.generation.as_ref().map(|_| Key::Generation));
        keys.extend(self.topics.keys().map(|name| Key::Topic(name.clone())));
        for (topic, entries) in &self.partitions {
            for (number, entry) in (0..).zip(entries.iter()) {
                let id = PartitionId::new(*topic, number);
                keys.extend(entry.partition.as_ref().map(|_| Key::Partition(id)));
                keys.extend(entry.tier.as_ref().map(|_| Key::Tier(id)));
            }
        }
        keys
    }
}

/// Returns true if feeds receive the changes of the key. They do not receive changes of directory records, producer ids
/// and the store binding: the snapshot contains only the errors of unreadable ones.
fn is_published(key: &Key) -> bool {
    !matches!(key, Key::Directory(_) | Key::ProducerIds | Key::ObjectStore)
}

/// Returns the index of a partition in the entries of its topic.
fn index(number: u32) -> usize {
    usize::try_from(number).expect("a partition number fits into usize")
}

/// Returns the entry with this partition number among the entries of one topic.
fn entry_at(entries: Option<&Arc<Vec<PartitionEntry>>>, number: u32) -> Option<&PartitionEntry> {
    entries?.get(index(number))
}

/// Decodes the value of a key, or returns the reason why it is invalid.
fn decode<T: Value>(entry: &KeyValue) -> Result<Arc<Versioned<T>>, String> {
    let value = T::decode(&entry.key, &entry.value).map_err(|error| error.reason)?;
    let KeyValue { create_revision, mod_revision, .. } = *entry;
    Ok(Arc::new(Versioned { value, create_revision, mod_revision }))
}

#[cfg(test)]
impl MetadataSnapshot {
    /// Returns the number of topics whose partition entries two snapshots share.
    pub(super) fn shared_topics(&self, other: &Self) -> usize {
        let is_shared = |(id, entries): &(&TopicId, &Arc<Vec<PartitionEntry>>)| {
            other.partitions.get(*id).is_some_and(|other| Arc::ptr_eq(entries, other))
        };
        self.partitions.iter().filter(is_shared).count()
    }
}
