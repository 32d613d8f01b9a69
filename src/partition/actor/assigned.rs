//! Role changes of the task by the metadata: idle, following or leading.
//!
//! # Transitions
//!
//! | input | while idle | while following in e | while leading in e |
//! | --- | --- | --- | --- |
//! | this broker leads in e' > e | leads | unsubscribes, leads | leads again, writers of e get results |
//! | another broker leads in e' > e | follows | follows the other broker | follows, writers get results |
//! | no broker leads in e' > e, or this is no replica | | unsubscribes | writers get results |
//! | other ISR or ELR in e | | | adopts them |
//! | another addition of this replica in e | | unsubscribes, follows again | |
//! | a follower or the tier state names e' > e | | | admits nothing more; a second later it reads the key from the metadata store |
//! | the disk fails | | unsubscribes for good | resigns |
//! | an older revision | | | |
//!
//! # Invariants
//!
//! Readers stay open in every case: committed records stay where they are. A writer whose records are in the log when the epoch ends gets
//! `AppendError::Deposed`: the outcome is unknown. A writer whose records were never appended gets `AppendError::NotLeader`.
//!
//! A new leader must have all committed records. Elections ensure that, except an unclean one: then the log may end before the object
//! store does, or hold other records than the object store. The object store is right in that case, and the log is reset to its end.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{Actor, AppendError, ORDERS, Part, rule, warnings::Condition};
use crate::{
    cluster::{PartitionValue, Revision},
    log::{EpochHistory, ProducerTable},
    model::{BrokerId, LeaderEpoch, Offset},
    partition::{
        Assignment, FromLink, Role, Standing,
        begin::{self, BeginError, Tables},
        follower::Follower,
        leader::{
            Leader,
            insync::{Agreed, Departure, Ends, Peer, Registration, Start},
            join::Claim,
        },
        role::Answered,
    },
    tier::TierState,
};

/// First and longest pause before another read of the tables that a leader needs from the object store.
const BEGIN_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Control message of the metadata, the links or the metadata store. It never waits behind writes.
pub(in crate::partition) enum Order {
    Assign(Box<Assignment>, oneshot::Sender<()>),
    Join(Box<JoinOrder>),
    Left(Peer, Departure),
    Seen(BrokerId, Registration),
    Agreed(Box<Agreed>),
    Deposed(LeaderEpoch),
    Link(FromLink),
    /// Tables that the task requested from the object store, with the number of that request.
    Tables(u64, Result<Box<Tables>, BeginError>),
}

/// Subscription of a follower, with the channel for its response.
pub(in crate::partition) struct JoinOrder {
    pub(in crate::partition) peer: Peer,
    pub(in crate::partition) epoch: LeaderEpoch,
    pub(in crate::partition) claim: Claim,
    pub(in crate::partition) ends: Ends,
    pub(in crate::partition) answer: oneshot::Sender<Answered>,
}

/// Metadata that the task has applied.
#[derive(Default)]
pub(in crate::partition) struct Placed {
    known: Option<(Arc<PartitionValue>, Revision)>,
    registered: BTreeMap<BrokerId, Registration>,
    /// Newest epoch that a follower reported, or in which a tier state was committed.
    pub(super) heard: LeaderEpoch,
    /// Time, by the clock of ticks, since which the metadata is [late](Self::is_given_up).
    pub(super) given_up_ms: Option<u64>,
    /// Newest epoch in which this task led. It never leads twice in one epoch, because its proposals of the first time are forgotten.
    led: Option<LeaderEpoch>,
    /// Number of the last request to the object store; a response to an earlier one is dropped.
    pub(super) question: u64,
    /// `Some` if a new leader made that request, with the pause before the request.
    pub(super) leads_after: Option<Duration>,
}

impl Placed {
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.known.as_ref().map_or(LeaderEpoch(0), |(value, _)| value.leader_epoch)
    }

    pub(super) fn leader(&self) -> Option<BrokerId> {
        self.known.as_ref().and_then(|(value, _)| value.leader)
    }

    /// Returns true if the metadata is late: it names this broker as leader of an epoch that ended here, or lacks an epoch that was
    /// reported here.
    pub(super) fn is_given_up(&self, me: BrokerId) -> bool {
        let (epoch, led) = (self.epoch(), self.led);
        let names_it = self.leader() == Some(me) && led.is_some_and(|led| led >= epoch);
        self.known.is_some() && (self.heard > epoch || names_it)
    }

    /// Returns true if a value newer than this revision is applied.
    pub(super) fn is_newer_than(&self, revision: Revision) -> bool {
        self.known.as_ref().is_some_and(|(_, known)| *known > revision)
    }

    /// Returns the addition of that broker's replica while it is being added.
    pub(super) fn added_after(&self, broker: BrokerId) -> Option<u64> {
        self.known.as_ref().and_then(|(value, _)| value.added_after(broker))
    }

    fn has_in_sync(&self, broker: BrokerId) -> bool {
        self.known.as_ref().is_some_and(|(value, _)| value.isr.contains(&broker))
    }
}

impl Actor {
    /// Handles control messages, then submits their effects to the journal and publishes them.
    pub(super) async fn carry_out(&mut self, first: Order, orders: &mut tokio::sync::mpsc::Receiver<Order>) {
        self.order(first).await;
        for _ in 1..ORDERS {
            let Ok(order) = orders.try_recv() else { break };
            self.order(order).await;
        }
        self.hand_to_journal();
        self.publish();
        self.answer();
    }

    async fn order(&mut self, order: Order) {
        if let Order::Assign(..) | Order::Agreed(_) | Order::Deposed(_) = order {
            // Commits of earlier control messages belong to the role and the value that may end now.
            self.publish();
        }
        match order {
            Order::Assign(assignment, done) => {
                self.assign(*assignment);
                self.publish();
                let _gone = done.send(());
            }
            Order::Join(join) => {
                let JoinOrder { peer, epoch, claim, ends, answer } = *join;
                let answered = self.join(peer, epoch, claim, ends).await;
                self.propose();
                let _gone = answer.send(answered);
            }
            Order::Left(peer, why) => self.in_sync(|in_sync| in_sync.left(peer, why)),
            Order::Seen(broker, registration) => {
                self.placed.registered.insert(broker, registration);
                self.in_sync(|in_sync| in_sync.seen(broker, registration));
            }
            Order::Agreed(outcome) => self.agreed(*outcome),
            Order::Deposed(known) => self.deposed(known),
            Order::Link(said) => self.hear_link(said).await,
            Order::Tables(question, tables) => self.on_tables(question, tables).await,
        }
    }

    /// Returns the current replica status.
    pub(super) fn stands(&self) -> Standing {
        let (epoch, leader) = (self.placed.epoch(), self.placed.leader());
        let role = match &self.part {
            Part::Leading(leader) => Role::Leader { settled: leader.in_sync().is_settled() },
            Part::Following(follower) => Role::Follower {
                leader: follower.leader(),
                in_sync: follower.is_following() && self.placed.has_in_sync(self.broker),
            },
            Part::Waiting => Role::Waiting,
        };
        // Another broker leads by now, but this task has no metadata that names it.
        let deposed = role == Role::Waiting && leader == Some(self.broker);
        Standing { role, epoch, leader: leader.filter(|_| !deposed) }
    }

    fn assign(&mut self, assignment: Assignment) {
        let Assignment { value, revision, committed, registered } = assignment;
        if self.placed.known.as_ref().is_some_and(|(_, known)| revision < *known) && !mutant!(ApplyOlderMetadata) {
            return;
        }
        if let Some(state) = committed {
            self.committed(&state);
        }
        self.placed.registered = registered;
        self.placed(value, revision);
    }

    /// Takes the role that a value of the partition, no older than the applied one, gives to this broker.
    pub(super) fn placed(&mut self, value: Arc<PartitionValue>, revision: Revision) {
        sim_event!(MetadataApplied { partition: self.id, revision: revision.0 });
        let before = self.placed.added_after(self.broker);
        self.placed.known = Some((Arc::clone(&value), revision));
        let (epoch, addition) = (value.leader_epoch, value.added_after(self.broker));
        // The replica was removed and added again meanwhile: its subscription no longer counts.
        let is_anew = addition.is_some() && addition != before;
        let is_late = epoch < self.placed.heard;
        match value.leader {
            _ if is_late || !value.replicas.contains(&self.broker) => self.wait(),
            None => self.wait(),
            Some(leader) if leader == self.broker => self.lead(&value, revision),
            Some(leader) => {
                let follows = matches!(&self.part, Part::Following(follower) if follower.epoch() == epoch);
                if !follows || is_anew {
                    self.follow(leader, epoch, value.unclean);
                }
            }
        }
    }

    /// Leaves the current role, in the epoch of that role.
    fn end(&mut self) {
        self.committed_end = self.high_watermark();
        self.placed.question += 1;
        self.placed.leads_after = None;
        match std::mem::replace(&mut self.part, Part::Waiting) {
            Part::Waiting => {}
            Part::Following(_) => self.around.links.leave(self.id, self.placed.epoch(), false),
            Part::Leading(mut leader) => {
                self.shared.leads(false);
                // Writers whose rule holds get their acknowledgement first.
                leader.due(|writer, acked| writer.answer(Ok(acked)));
                for writer in leader.abandon() {
                    writer.answer(Err(AppendError::Deposed));
                }
            }
        }
    }

    /// Becomes idle.
    pub(super) fn wait(&mut self) {
        self.end();
    }

    fn follow(&mut self, leader: BrokerId, epoch: LeaderEpoch, unclean: Option<LeaderEpoch>) {
        self.end();
        if self.shared.fault().is_some() {
            // The replica cannot copy: no leader may wait for it.
            return;
        }
        tracing::debug!(partition = %self.id, %leader, %epoch, "follows");
        self.part = Part::Following(Box::new(Follower::new(leader, epoch, self.high_watermark(), unclean)));
        self.around.links.follow(self.id, leader);
    }

    fn lead(&mut self, value: &PartitionValue, revision: Revision) {
        let (epoch, last) = (value.leader_epoch, self.last_epoch());
        match &mut self.part {
            Part::Leading(leader) if leader.epoch() == epoch => {
                let before = leader.in_sync().value().isr.clone();
                leader.in_sync_mut().observed(value, revision);
                self.around.counts.isr_changed(&before, &leader.in_sync().value().isr);
                self.see_registered();
                self.propose();
            }
            // The leadership begins when the object store has responded.
            Part::Waiting if self.placed.leads_after.is_some() && self.standing.epoch == epoch => {}
            _ if self.placed.led.is_some_and(|led| led >= epoch) => self.wait(),
            // Treated like an epoch that it already led: it ends that epoch, and an election in a newer epoch follows.
            _ if let Some(last) = last.filter(|last| *last > epoch) => {
                tracing::error!(
                    topic = %self.topic, partition = %self.id, %epoch, %last,
                    "the metadata is older than this log: it names a leader epoch from before the log's last records. Was etcd restored from a \
                     backup? The epoch is given up until there is a newer one"
                );
                self.placed.led = Some(epoch);
                self.wait();
            }
            _ => {
                self.end();
                if self.needs_bucket(value) {
                    self.ask_bucket(self.tiered_end, Some(Duration::ZERO));
                } else {
                    self.begin_to_lead();
                }
            }
        }
    }

    fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.replica.epochs().last().map(|(epoch, _)| epoch)
    }

    /// Returns true if the object store must be read before this log can lead: only after an election that may have lost records.
    fn needs_bucket(&self, value: &PartitionValue) -> bool {
        let committed = self.tiered_end.max(self.log_start);
        let reaches = self.replica.log_end() >= committed;
        let unclean = value.unclean == Some(value.leader_epoch) && self.has_bucket_tables();
        !reaches || unclean
    }

    /// Returns true if the object store has a segment whose footer holds the tables of the tiered end.
    pub(super) fn has_bucket_tables(&self) -> bool {
        self.tiered_end > self.log_start
    }

    fn begin_to_lead(&mut self) {
        let Some((value, revision)) = self.placed.known.clone() else { return };
        let own = Ends { written: self.replica.log_end(), persisted: self.replica.persisted_end() };
        let committed_end = self.committed_end.max(self.tiered_end).max(self.log_start).min(own.written);
        let (epoch, in_sync) = (value.leader_epoch, value.isr.len());
        let rule = rule(&self.config, self.lag_ms);
        let start = Start { me: self.broker, value: PartitionValue::clone(&value), revision, own, committed_end, rule };
        self.placed.leads_after = None;
        self.placed.led = Some(epoch);
        sim_event!(LeadershipStarted { partition: self.id, epoch, start: own.written });
        self.part = Part::Leading(Box::new(Leader::new(start, self.tiered_end)));
        self.shared.leads(true);
        self.around.counts.leader_epochs.inc();
        tracing::debug!(partition = %self.id, %epoch, log_end = %own.written, %committed_end, in_sync, "leads");
        self.see_registered();
        if self.shared.fault().is_some() {
            self.around.agreement.resign(self.id, epoch);
        }
        self.propose();
        // Segments may be due that could not be uploaded while another broker led.
        self.upkeep.push(self.id);
    }

    /// Applies the status of every replica's broker to the leader.
    fn see_registered(&mut self) {
        let Part::Leading(leader) = &mut self.part else { return };
        let replicas = leader.in_sync().value().replicas.clone();
        for broker in replicas {
            let registration = self.placed.registered.get(&broker).copied().unwrap_or(Registration::None);
            leader.in_sync_mut().seen(broker, registration);
        }
    }

    /// Handles a report of a newer epoch: a leader of an older epoch admits nothing more until the metadata contains the newer one.
    pub(super) fn deposed(&mut self, known: LeaderEpoch) {
        self.placed.heard = self.placed.heard.max(known);
        if let Part::Leading(leader) = &self.part
            && leader.epoch() < known
        {
            tracing::info!(topic = %self.topic, partition = %self.id, epoch = %leader.epoch(), %known, "another broker leads by now");
            self.wait();
        }
    }

    /// Applies the tiered end and the log start of the metadata. All records below both were committed, by a leader of the state's epoch
    /// or an earlier one. If that epoch is newer than the one in which this broker leads, this log may hold other records there.
    pub(super) fn committed(&mut self, state: &TierState) {
        if !mutant!(AdoptNewerTieredEnd) {
            self.deposed(state.epoch);
        }
        self.tiered_end = self.tiered_end.max(state.bucket_end());
        self.log_start = self.log_start.max(state.log_start);
        if let Part::Leading(leader) = &mut self.part {
            leader.in_sync_mut().committed(self.tiered_end.max(self.log_start));
            leader.tiered(self.tiered_end);
        }
        // Readers must see the new log start before the files are removed.
        self.publish();
        self.keep_log_start();
    }

    /// Requests the tables at the end of the object store, which must not be before `at`. `leads_after` is `Some` if this broker leads
    /// after the response, with the pause before the request.
    pub(super) fn ask_bucket(&mut self, at: Offset, leads_after: Option<Duration>) {
        self.placed.question += 1;
        self.placed.leads_after = leads_after;
        let (question, pause) = (self.placed.question, leads_after.unwrap_or_default());
        let (tier, orders, tasks) = (self.tier.clone(), self.orders.clone(), self.tasks.clone());
        self.tasks.spawn("begin", async move {
            let ask = async {
                tokio::time::sleep(pause).await;
                begin::from_bucket(tier.as_ref(), at).await
            };
            let answer = tokio::select! {
                biased;
                () = tasks.cancelled() => return,
                answer = ask => answer,
            };
            if let Some(orders) = orders.upgrade() {
                let order = Order::Tables(question, answer.map(Box::new));
                tokio::select! {
                    biased;
                    () = tasks.cancelled() => {}
                    _stopped = orders.send(order) => {}
                }
            }
        });
    }

    async fn on_tables(&mut self, question: u64, tables: Result<Box<Tables>, BeginError>) {
        if question != self.placed.question {
            return;
        }
        if let Ok(tables) = &tables {
            // A committed manifest has this end, perhaps before the metadata arrived at this task.
            self.tiered_end = self.tiered_end.max(tables.at);
        }
        match self.placed.leads_after {
            None => self.begin_following(tables.map(|tables| *tables)).await,
            Some(waited) => self.begin_leading(tables.map(|tables| *tables), waited).await,
        }
    }

    /// Continues the start of a leader after an election that may have lost records. The tables show which records certainly were
    /// committed.
    async fn begin_leading(&mut self, tables: Result<Tables, BeginError>, waited: Duration) {
        let committed = self.tiered_end.max(self.log_start);
        let tables = match tables {
            // Deletion overtook the object store, or the topic no longer has one: there are no tables of the records before.
            Err(BeginError::NoBucket) => Tables::empty(committed),
            Err(_) if !self.has_bucket_tables() => Tables::empty(committed),
            Ok(tables) if tables.at < committed => Tables::empty(committed),
            Ok(tables) => tables,
            Err(error) => {
                if let Some(count) = self.warnings.occur(Condition::CannotLead) {
                    tracing::warn!(topic = %self.topic, partition = %self.id, %error, count, "cannot lead before the bucket was read; it is tried again");
                }
                return self.lead_later(waited);
            }
        };
        let (start, log_end) = (self.replica.local_start().max(self.replica.log_start()), self.replica.log_end());
        let agrees = tables.agree(&self.replica.epochs(), start, log_end);
        if log_end < committed || !agrees {
            tracing::warn!(
                topic = %self.topic, partition = %self.id, %log_end, at = %tables.at,
                "the log of the leader that was elected unclean is not what the bucket holds; it begins anew behind the bucket"
            );
            if !self.reset(tables).await {
                return match self.shared.fault() {
                    Some(_) => self.around.agreement.resign(self.id, self.placed.epoch()),
                    None => self.lead_later(waited),
                };
            }
        }
        self.begin_to_lead();
    }

    /// Repeats the request to the object store, after a longer pause.
    fn lead_later(&mut self, waited: Duration) {
        let (least, most) = BEGIN_PAUSE;
        self.ask_bucket(self.tiered_end, Some((waited * 2).clamp(least, most)));
    }

    /// Resets the log with these tables. Returns false if the disk failed or is full.
    pub(super) async fn reset(&mut self, tables: Tables) -> bool {
        let Tables { at, epochs, producers } = tables;
        #[cfg(feature = "sim")]
        let known = (epochs.iter().collect::<Vec<_>>(), producers.ids().collect::<Vec<_>>());
        let done = self.cut_by(move |replica| replica.reset_with(at, epochs, producers)).await;
        #[cfg(feature = "sim")]
        if done {
            sim_event!(LogReset { partition: self.id, at, epochs: &known.0, producers: &known.1 });
        }
        done
    }

    /// Resets the log to offset 0, without tables.
    pub(super) async fn empty(&mut self) -> bool {
        self.reset(Tables { at: Offset::ZERO, epochs: EpochHistory::new(), producers: ProducerTable::new() }).await
    }
}
