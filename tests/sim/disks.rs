//! Disks that sync slowly or fail to sync.
//!
//! A failed sync is final for its caller (design.md §4): the unsynced data may be lost already, and a second sync would
//! not report that. The broker resigns as leader of the partitions on that disk and still serves reads. An operator
//! restarts the broker, on the repaired disk or another.

use std::time::Duration;

use futures::future::join_all;
use strandline::{
    client::{NewRecord, NewTopic, ProducerOptions},
    cluster::PartitionValue,
    task::{Tasks, clock, random},
};

use crate::{
    faults::{pause, values},
    load::{Ledger, Load, RESPONSE_TIMEOUT, RetentionProfile, TOPICS},
    machine::Machine,
    meta::SimMeta,
    run::{self, Topology},
    world::Simulation,
};

/// Path parts of the files whose syncs fail: the journal, every partition 0, the checkpoint, all files.
const PARTS: [&str; 4] = ["journal", "/0/", "checkpoint", ""];

/// Slows every sync for a while, possibly beyond `replication.max_lag_time`.
pub(crate) async fn are_slow(machine: &Machine) {
    let us = random::in_range(20_000..3_000_000);
    machine.record(format_args!("has syncs of up to {us} us"));
    machine.slow(us);
    pause(100, 6000).await;
    machine.slow(0);
}

/// Makes syncs fail for up to `noticed_ms`, then ends the broker and repairs the disk. Without `pages` no page may be
/// lost, so only syncs of the journal fail: the journal holds no acknowledged data that is not synced. For a
/// `replicated` replica, lost pages equal a power loss.
pub(crate) async fn fail(machine: &mut Machine, pages: bool, noticed_ms: u64) {
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

/// Other brokers take over the broker's leadership, also of a partition without writes. No write fails. After a restart
/// on a working disk the broker is in sync again.
#[test]
fn broker_with_failing_journal_resigns() {
    for seed in 1..=4 {
        run::simulate(Topology::THREE, seed, async |world| {
            check_resignation(world, "journal", Duration::from_secs(5)).await
        });
    }
}

/// The journal fills up first. The broker then waits some seconds for journal space before it resigns.
#[test]
fn broker_with_failing_checkpoint_resigns() {
    for seed in 1..=4 {
        run::simulate(Topology::THREE, seed, async |world| {
            check_resignation(world, "checkpoint", Duration::from_secs(40)).await
        });
    }
}

/// Makes syncs of a part of one broker's disk fail. Within `resigned_within` every partition must have a leader and an
/// ISR without that broker.
async fn check_resignation(world: &mut Simulation, part: &str, resigned_within: Duration) {
    join_all(world.machines.iter_mut().map(|machine| Box::pin(machine.start()))).await;
    let client = world.client().await;
    for (name, partitions) in TOPICS.iter().zip([3, 1]) {
        let topic = NewTopic::new(name).partitions(partitions).replication_factor(3);
        while client.admin().create_topic(&topic.clone().config("min.insync.replicas", "2")).await.is_err() {
            pause(100, 200).await;
        }
    }
    // A partition with a record that receives no more writes.
    let idle = client.producer(ProducerOptions::default()).await.unwrap();
    idle.send(TOPICS[1], NewRecord::value(&[0; 8])).await.unwrap().await.unwrap();
    idle.close().await.unwrap();
    let (tasks, stop) = (Tasks::new(), Tasks::new());
    let (ledger, trace) = (Ledger::default(), world.shared.trace.clone());
    let admin = client.clone();
    let load = Load { client, ledger, trace, stop: stop.clone(), partitions: vec![3], keeps: RetentionProfile::All };
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

/// Waits until `so` holds for every partition value. Panics after `within`.
async fn wait_for_values(meta: &SimMeta, within: Duration, so: impl Fn(&PartitionValue) -> bool) {
    let end = clock::monotonic() + within;
    loop {
        let values = values(meta).await;
        if !values.is_empty() && values.iter().all(&so) {
            return;
        }
        assert!(clock::monotonic() < end, "after {within:?}: {values:?}");
        pause(20, 50).await;
    }
}
