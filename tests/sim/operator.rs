//! An operator that works during the faults: reassigns partitions, elects preferred leaders, drains and undrains
//! brokers, and changes, creates and deletes topics.
//!
//! The result of an operation without a response is unknown, and the operator checks no result: the checker and the
//! clients detect lost records. At the end of the run no broker stays drained.

use std::time::Duration;

use strandline::{
    client::{CallError, Client, NewTopic, TopicAlteration},
    model::BrokerId,
    task::{Tasks, random},
};

use crate::{load::TOPICS, trace::Trace};

/// Timeout of one operation.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);

/// Topic that the operator creates and deletes, and that no client uses.
const PASSING: &str = "passing";

/// Client that runs admin operations.
pub(crate) struct Operator {
    pub(crate) client: Client,
    pub(crate) trace: Trace,
    /// Cancelled to end the operations.
    pub(crate) stop: Tasks,
    /// Number of partitions of each topic.
    pub(crate) partitions: Vec<u32>,
    pub(crate) brokers: u32,
}

impl Operator {
    /// Runs operations until `stop` is cancelled, then undrains every broker.
    pub(crate) async fn run(self) {
        while !self.stop.is_cancelled() {
            tokio::time::sleep(Duration::from_millis(random::in_range(100..2500))).await;
            let (what, done) = self.run_operation().await;
            self.trace.record(format_args!("operator: {what}: {done}"));
        }
        for id in 1..=self.brokers {
            while let Err(error) = self.client.admin().undrain_broker(BrokerId(id)).await {
                self.trace.record(format_args!("operator: broker {id} is not undrained: {error}"));
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
        self.trace.record(format_args!("operator: stopped"));
    }

    /// Runs a random operation. Returns its description and its result.
    async fn run_operation(&self) -> (String, String) {
        let admin = self.client.admin();
        let topic = random::in_range(0..self.partitions.len());
        let (name, partition) = (TOPICS[topic], random::in_range(0..self.partitions[topic]));
        let broker = BrokerId(random::in_range(1..=self.brokers));
        match random::in_range(0..10) {
            0 => {
                let what = format!("drain {broker}");
                let drained = self.await_operation(what, admin.drain_broker(broker)).await;
                tokio::time::sleep(Duration::from_millis(random::in_range(0..5000))).await;
                drained
            }
            1 => self.await_operation(format!("undrain {broker}"), admin.undrain_broker(broker)).await,
            2 => {
                let what = format!("cancel the reassignment of {name}/{partition}");
                self.await_operation(what, admin.cancel_reassignment(Some(name), Some(partition))).await
            }
            3 => {
                let what = format!("preferred leader of {name}/{partition}");
                self.await_operation(what, admin.elect_leader(name, partition)).await
            }
            4 => {
                let change =
                    TopicAlteration { replication_factor: Some(random::in_range(2..=3)), ..TopicAlteration::default() };
                self.await_operation(format!("{name}: {change:?}"), admin.alter_topic(name, &change)).await
            }
            5 => {
                let (key, values) = [
                    ("min.insync.replicas", ["1", "2"]),
                    ("local.retention.bytes", ["20000", "80000"]),
                    ("segment.bytes", ["16384", "65536"]),
                ][random::in_range(0..3_usize)];
                let value = values[random::in_range(0..2_usize)];
                let change =
                    TopicAlteration { set: [(key.to_owned(), value.to_owned())].into(), ..TopicAlteration::default() };
                self.await_operation(format!("{name}: {key} {value}"), admin.alter_topic(name, &change)).await
            }
            6 => {
                let topic = NewTopic::new(PASSING).partitions(2).replication_factor(random::in_range(1..=3));
                self.await_operation(format!("create {PASSING}"), admin.create_topic(&topic)).await
            }
            7 => self.await_operation(format!("delete {PASSING}"), admin.delete_topic(PASSING)).await,
            _ => {
                let to = self.choose_replicas(name, partition).await;
                self.await_operation(
                    format!("reassign {name}/{partition} to {to:?}"),
                    admin.reassign(name, Some(partition), &to),
                )
                .await
            }
        }
    }

    /// Returns random brokers for a partition, as many as it has replicas now; two brokers if the topic cannot be
    /// described.
    async fn choose_replicas(&self, name: &str, partition: u32) -> Vec<BrokerId> {
        let mut brokers: Vec<_> = (1..=self.brokers).map(BrokerId).collect();
        let description = tokio::time::timeout(OPERATION_TIMEOUT, self.client.admin().describe_topic(name)).await;
        let replicas = description.ok().and_then(Result::ok).and_then(|topic| {
            let partition = topic.partitions.into_iter().nth(usize::try_from(partition).unwrap())?;
            Some(partition.replicas.len())
        });
        for at in (1..brokers.len()).rev() {
            brokers.swap(at, random::in_range(0..=at));
        }
        brokers.truncate(replicas.unwrap_or(2));
        brokers
    }

    /// Waits for an operation, at most [`OPERATION_TIMEOUT`]. Returns its description and its result as texts.
    async fn await_operation<T>(
        &self,
        what: String,
        operation: impl Future<Output = Result<T, CallError>>,
    ) -> (String, String) {
        let done = match tokio::time::timeout(OPERATION_TIMEOUT, operation).await {
            Ok(Ok(_)) => "done".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(late) => late.to_string(),
        };
        (what, done)
    }
}
