//! Disks that sync slowly or fail to sync.
//!
//! A broker does not retry a failed sync: the unsynced data may be lost already, and a second sync would not report
//! this. The broker resigns as leader of the partitions on that disk and still serves reads. An operator restarts the
//! broker, on the repaired disk or another.

use std::time::Duration;

use futures::future::join_all;
use strandline::{
    client::{NewRecord, NewTopic, ProducerOptions},
    cluster::PartitionValue,
    task::{Tasks, clock, random},
};

use crate::{
    faults::{partition_values, pause},
    load::{ClientHistory, Load, RESPONSE_TIMEOUT, RetentionProfile, TOPICS},
    machine::Machine,
    meta::SimMeta,
    run::{self, Topology},
    world::Simulation,
};

/// Parts of the paths of files whose syncs fail: the journal, the replicas of every partition 0, the checkpoint, all
/// files.
const PARTS: [&str; 4] = ["journal", "/0/", "checkpoint", ""];

/// Makes every sync of a machine slow for a while. A sync may then take longer than `replication.max_lag_time`.
pub(crate) async fn slow_down(machine: &Machine) {
    let us = random::in_range(20_000..3_000_000);
    machine.record(format_args!("has syncs of up to {us} us"));
    machine.slow(us);
    pause(100, 6000).await;
    machine.slow(0);
}

/// Makes syncs fail for up to `noticed_ms`, then stops or kills the broker and repairs the disk. A failed sync may lose
/// pages of the file. Without `pages`, no page of a segment may be lost, because for a `replicated` replica that equals
/// a power loss. Then only syncs of the journal fail, which holds no acknowledged data that is not synced.
pub(crate) async fn fail_syncs_until_stop(machine: &mut Machine, pages: bool, noticed_ms: u64) {
    let part = if pages { PARTS[random::in_range(0..PARTS.len())] } else { PARTS[0] };
    machine.record(format_args!("has failing syncs of {part:?}"));
    machine.fail_syncs(part);
    pause(10, noticed_ms).await;
    if random::in_range(0..3) == 0 {
        machine.stop().await
    } else {
        machine.kill(None)
    }
    machine.mend();
}

/// If syncs of the journal fail, other brokers take over the leadership of all the broker's partitions, also of one
/// without writes. No write fails. After a restart on a working disk the broker is in sync again.
#[test]
fn broker_with_failing_journal_resigns() {
    for seed in 1..=4 {
        run::simulate(Topology::THREE, seed, async |world| {
            check_resignation(world, "journal", Duration::from_secs(5)).await
        });
    }
}

/// If syncs of the checkpoint fail, the journal fills up first. The broker then waits some seconds for journal space
/// before it resigns.
#[test]
fn broker_with_failing_checkpoint_resigns() {
    for seed in 1..=4 {
        run::simulate(Topology::THREE, seed, async |world| {
            check_resignation(world, "checkpoint", Duration::from_secs(40)).await
        });
    }
}

/// Makes syncs of files with `part` in their path fail on one broker. Within `resigned_within`, every partition must
/// have a leader and an ISR without that broker. After a restart, the broker must be in every ISR again.
async fn check_resignation(world: &mut Simulation, part: &str, resigned_within: Duration) {
    join_all(world.machines.iter_mut().map(|machine| Box::pin(machine.start()))).await;
    let client = world.client().await;
    for (name, partitions) in TOPICS.iter().zip([3, 1]) {
        let topic = NewTopic::new(name).partitions(partitions).replication_factor(3);
        while client.admin().create_topic(&topic.clone().config("min.insync.replicas", "2")).await.is_err() {
            pause(100, 200).await;
        }
    }
    // The partition of the second topic gets one record and no more writes.
    let idle = client.producer(ProducerOptions::default()).await.unwrap();
    idle.send(TOPICS[1], NewRecord::value(&[0; 8])).await.unwrap().await.unwrap();
    idle.close().await.unwrap();
    let (tasks, stop) = (Tasks::new(), Tasks::new());
    let (client_history, trace) = (ClientHistory::default(), world.shared.trace.clone());
    let admin = client.clone();
    let load =
        Load { client, client_history, trace, stop: stop.clone(), partitions: vec![3], keeps: RetentionProfile::All };
    let producer = tasks.spawn("producer", load.produce(0));
    let meta = world.machines[0].meta.clone();
    let whole = |value: &PartitionValue| value.leader.is_some() && value.isr.len() == 3;
    wait_for_values(&meta, RESPONSE_TIMEOUT, whole).await;
    pause(500, 1500).await;

    let failing = admin.admin().describe_topic(TOPICS[1]).await.unwrap().partitions[0].leader.unwrap();
    let machine = world.machines.iter_mut().find(|machine| machine.id == failing).unwrap();
    machine.fail_syncs(part);
    wait_for_values(&meta, resigned_within, |value| value.leader.is_some() && !value.isr.contains(&failing)).await;
    assert!(machine.needs_restart(), "the broker reports that it needs a restart");
    machine.kill(None);
    machine.mend();
    machine.start().await;
    wait_for_values(&meta, RESPONSE_TIMEOUT, whole).await;
    stop.cancel();
    tokio::time::timeout(RESPONSE_TIMEOUT, producer).await.expect("every send has a response").unwrap();
    tasks.stop().await;
}

/// Waits until there are partition values and `so` holds for all of them. Panics after `within`.
async fn wait_for_values(meta: &SimMeta, within: Duration, so: impl Fn(&PartitionValue) -> bool) {
    let end = clock::monotonic() + within;
    loop {
        let values = partition_values(meta).await;
        if !values.is_empty() && values.iter().all(&so) {
            return;
        }
        assert!(clock::monotonic() < end, "after {within:?}: {values:?}");
        pause(20, 50).await;
    }
}
