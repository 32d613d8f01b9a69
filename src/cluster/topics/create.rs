//! Making a topic.

use std::fmt;

use super::{CHUNK, TopicInfo, Topics, checked};
use crate::{
    cluster::{
        keys::{TopicValue, Value as _},
        outcome::known_outcome,
        placement::{ReplicaBound, is_leaving, is_unreachable},
        store::{Compare, Op, Outcome, Revision, StoreError, Transaction},
        view::ViewState,
    },
    limits,
    model::{ConfigMap, InvalidConfig, TopicConfig, TopicId, TopicName},
    task::random,
};

/// A topic to be made.
#[derive(Clone, Debug)]
pub struct NewTopic {
    /// Its name.
    pub name: TopicName,
    /// How many partitions: from 1.
    pub partitions: u32,
    /// How many replicas of each: from 1 to the number of brokers that take any.
    pub replication_factor: u32,
    /// What it sets.
    pub config: ConfigMap,
    /// Check everything and make nothing.
    pub validate_only: bool,
}

/// Why a topic was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// The name is taken.
    #[error("topic {:?} exists already", name.as_str())]
    Exists {
        /// The name.
        name: TopicName,
    },
    /// Too few or too many partitions.
    #[error("a topic cannot have {asked} partitions: 1 to {}", limits::MAX_PARTITIONS)]
    Partitions {
        /// How many were asked for.
        asked: u32,
    },
    /// Too few or too many replicas for any cluster.
    #[error("a topic cannot have a replication factor of {asked}: 1 to {}", limits::MAX_REPLICAS)]
    Replicas {
        /// How many were asked for.
        asked: u32,
    },
    /// More replicas than brokers.
    #[error("a replication factor of {asked} needs as many brokers, and {there}: ask for fewer, or start more")]
    Brokers {
        /// Replicas asked for.
        asked: u32,
        /// Brokers that there are.
        there: There,
    },
    /// More replicas on a broker than it takes.
    #[error(transparent)]
    Bound(#[from] ReplicaBound),
    /// The cluster is full.
    #[error("the cluster has {} topics, which is the most that it takes: delete some", limits::MAX_TOPICS)]
    TooManyTopics,
    /// A configuration key or value is not allowed.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// Half of what was written was swept away meanwhile.
    #[error("topic {:?} could not be made because of another change at the same time: try again", name.as_str())]
    Conflict {
        /// The name.
        name: TopicName,
    },
    /// The metadata store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How many brokers there are for new replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct There {
    /// Those that are alive.
    pub live: usize,
    /// Of these, those that are being stopped or drained: they take none.
    pub leaving: usize,
    /// Of the others, those whose disks are full: they take none either.
    pub full: usize,
    /// Of the rest, those that registered no address for other brokers: they take none either.
    pub unreachable: usize,
}

impl There {
    /// Those of a view.
    pub fn of(state: &ViewState) -> Self {
        let mut there = Self { live: 0, leaving: 0, full: 0, unreachable: 0 };
        for (id, known) in state.brokers() {
            let leaving = is_leaving(state, *id, &known.value);
            there.live += 1;
            there.leaving += usize::from(leaving);
            let full = !leaving && known.value.disk_full;
            there.full += usize::from(full);
            there.unreachable += usize::from(!leaving && !full && is_unreachable(state, &known.value));
        }
        there
    }

    /// Those that take replicas.
    pub const fn takers(self) -> usize {
        self.live - self.leaving - self.full - self.unreachable
    }
}

impl fmt::Display for There {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let are = |count: usize| if count == 1 { "1 is".to_owned() } else { format!("{count} are") };
        write!(f, "{} alive", are(self.live))?;
        let mut some = Vec::new();
        if self.leaving > 0 {
            some.push(format!("{} being stopped or drained", are(self.leaving)));
        }
        if self.full > 0 {
            some.push(format!("{} with full disks (broker.disk_full_percent)", self.full));
        }
        if self.unreachable > 0 {
            some.push(format!("{} registered without an address for other brokers", are(self.unreachable)));
        }
        if some.is_empty() { Ok(()) } else { write!(f, ", of which {}", some.join(" and ")) }
    }
}

impl CreateError {
    /// Whether the same request may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Conflict { .. } | Self::Brokers { .. } => true,
            Self::Store(error) => error.retryable(),
            _ => false,
        }
    }
}

impl Topics {
    /// Makes a topic. Done when it exists in the store; views follow.
    pub async fn create(&self, new: NewTopic) -> Result<TopicInfo, CreateError> {
        self.admit(&new)?;
        if self.read(&new.name).await?.is_some() {
            return Err(CreateError::Exists { name: new.name });
        }
        let NewTopic { name, partitions, replication_factor, config, validate_only } = new;
        let id = TopicId::new(random::uuid());
        let value = TopicValue { id, partitions, replication_factor, config: TopicConfig::normalize(config) };
        let placed = self.first_values(id, 0..partitions, replication_factor).await;
        let (mut puts, claim) = placed.map_err(|bound| match bound {
            Some(bound) => bound.into(),
            None => CreateError::Brokers { asked: replication_factor, there: There::of(&self.view.state()) },
        })?;
        if validate_only {
            return Ok(TopicInfo { name, value, revision: Revision::ZERO });
        }
        let rest = puts.split_off(1);
        let begun = self.put_new(&name, rest).await?;
        let key = self.keys.topic(&name);
        // Where it is deleted again before a late try comes, its mark refuses that.
        let mut transaction = Transaction::new()
            .when(Compare::Absent(key.clone()))
            .when(Compare::Absent(self.keys.deleted(id)))
            .put(key.as_str(), value.encode())
            .else_get(key);
        transaction.ops.extend(puts);
        if let Some((first, created)) = begun {
            // A sweep begins with the first: if that is there as it was made, no sweep has begun, and none will.
            transaction = transaction.when(Compare::CreateRevision(first, created));
        }
        let revision = match known_outcome(&*self.store, &transaction).await? {
            Outcome::Done { revision } => revision,
            Outcome::Refused { mut found, .. } => {
                let Some(entry) = found.pop().flatten() else { return Err(CreateError::Conflict { name }) };
                // An earlier try made it, or somebody else did.
                if !TopicValue::decode(&entry.key, &entry.value).is_ok_and(|there| there.id == id) {
                    return Err(CreateError::Exists { name });
                }
                entry.mod_revision
            }
        };
        claim.made(revision);
        Ok(TopicInfo { name, value, revision })
    }

    /// Writes keys that nobody else can have written; nobody acts on them before the topic is there. Gives the first of them, and
    /// when it was made.
    async fn put_new(&self, name: &TopicName, puts: Vec<Op>) -> Result<Option<(String, Revision)>, CreateError> {
        let mut begun = None;
        for chunk in puts.chunks(CHUNK) {
            let absent = chunk.iter().map(|op| Compare::Absent(op.key().to_owned())).collect();
            let first = chunk[0].key().to_owned();
            let transaction = Transaction { compares: absent, ops: chunk.to_vec(), else_get: vec![first.clone()] };
            let made = match known_outcome(&*self.store, &transaction).await? {
                Outcome::Done { revision } => revision,
                Outcome::Refused { mut found, .. } => match found.pop().flatten() {
                    // An earlier try made it.
                    Some(entry) => entry.create_revision,
                    // It did, and a sweep took it.
                    None => return Err(CreateError::Conflict { name: name.clone() }),
                },
            };
            begun.get_or_insert((first, made));
        }
        Ok(begun)
    }

    /// What can be told without the store.
    fn admit(&self, new: &NewTopic) -> Result<(), CreateError> {
        let state = self.view.state();
        if new.partitions == 0 || new.partitions > limits::MAX_PARTITIONS {
            return Err(CreateError::Partitions { asked: new.partitions });
        }
        let asked = new.replication_factor;
        if asked == 0 || asked > limits::MAX_REPLICAS {
            return Err(CreateError::Replicas { asked });
        }
        let there = There::of(&state);
        if usize::try_from(asked).is_ok_and(|asked| asked > there.takers()) {
            return Err(CreateError::Brokers { asked, there });
        }
        checked(&self.defaults, &new.config, asked)?;
        if state.topic(&new.name).is_some() {
            return Err(CreateError::Exists { name: new.name.clone() });
        }
        if state.topics().len() >= limits::MAX_TOPICS { Err(CreateError::TooManyTopics) } else { Ok(()) }
    }
}
