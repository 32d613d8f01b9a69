//! Disks that sync slowly, or not at all.
//!
//! A failed sync is final for whoever asked (design.md §4): what was not on the platter may be gone already, and a second sync would not
//! say so. The broker gives up what it leads there and keeps what it can still serve; the rest is somebody else's: it is restarted, and
//! its disk works again or is another one.

use std::time::Duration;

use futures::future::join_all;
use strandline::{
    client::{NewRecord, NewTopic, ProducerOptions},
    cluster::PartitionValue,
    task::{Tasks, clock, random},
};

use crate::{
    faults::{pause, values},
    load::{Keeps, Ledger, Load, PATIENCE, TOPICS},
    machine::Machine,
    meta::SimMeta,
    run::{self, Shape},
    world::World,
};

/// Whose syncs fail: the journal's, those of every partition 0, the checkpoint's, all.
const PARTS: [&str; 4] = ["journal", "/0/", "checkpoint", ""];

/// Every sync takes long for a while: longer, perhaps, than others wait for who is behind.
pub(crate) async fn are_slow(machine: &Machine) {
    let us = random::in_range(20_000..3_000_000);
    machine.note(format_args!("its syncs take up to {us} us"));
    machine.slow(us);
    pause(100, 6000).await;
    machine.slow(0);
}

/// Syncs fail until somebody notices and ends the broker. Where no `pages` may be lost only the journal's do, which holds nothing that
/// was acknowledged and is not synced: to a `replicated` replica lost pages are lost power.
pub(crate) async fn fail(machine: &mut Machine, pages: bool, noticed_ms: u64) {
    let part = if pages { PARTS[random::in_range(0..PARTS.len())] } else { PARTS[0] };
    machine.note(format_args!("its syncs of {part:?} fail"));
    machine.spoil(part);
    pause(10, noticed_ms).await;
    if random::in_range(0..3) == 0 {
        machine.stop().await
    } else {
        machine.kill(None)
    }
    machine.mend();
}

/// Others take over what it led, also where nobody writes at the moment; no write fails; and when it is back on a disk that works it is in
/// sync again.
#[test]
fn a_broker_whose_journal_fails_gives_up_what_it_leads() {
    for seed in 1..=4 {
        run::simulate(Shape::THREE, seed, async |world| one_fails(world, "journal", Duration::from_secs(5)).await);
    }
}

/// Its journal fills up first, and then it is waited for some seconds whether there will be room.
#[test]
fn a_broker_that_cannot_write_its_checkpoint_gives_up_what_it_leads() {
    for seed in 1..=4 {
        run::simulate(Shape::THREE, seed, async |world| one_fails(world, "checkpoint", Duration::from_secs(40)).await);
    }
}

/// Syncs of a part of one broker's disk fail. Within `given_up` it leads nothing any more, and nobody waits for it.
async fn one_fails(world: &mut World, part: &str, given_up: Duration) {
    join_all(world.machines.iter_mut().map(|machine| Box::pin(machine.start()))).await;
    let client = world.client().await;
    for (name, partitions) in TOPICS.iter().zip([3, 1]) {
        let topic = NewTopic::new(name).partitions(partitions).replication_factor(3);
        while client.admin().create_topic(&topic.clone().config("min.insync.replicas", "2")).await.is_err() {
            pause(100, 200).await;
        }
    }
    // One that has something and gets no more.
    let quiet = client.producer(ProducerOptions::default()).await.unwrap();
    quiet.send(TOPICS[1], NewRecord::value(&[0; 8])).await.unwrap().await.unwrap();
    quiet.close().await.unwrap();
    let (tasks, stop) = (Tasks::new(), Tasks::new());
    let (ledger, trace) = (Ledger::default(), world.shared.trace.clone());
    let admin = client.clone();
    let load = Load { client, ledger, trace, stop: stop.clone(), partitions: vec![3], keeps: Keeps::All };
    let producer = tasks.spawn("producer", load.produce(0));
    let meta = world.machines[0].meta.clone();
    let whole = |value: &PartitionValue| value.leader.is_some() && value.isr.len() == 3;
    become_all(&meta, PATIENCE, whole).await;
    pause(500, 1500).await;

    let failing = admin.admin().describe_topic(TOPICS[1]).await.unwrap().partitions[0].leader.unwrap();
    let machine = world.machines.iter_mut().find(|machine| machine.id == failing).unwrap();
    machine.spoil(part);
    become_all(&meta, given_up, |value| value.leader.is_some() && !value.isr.contains(&failing)).await;
    assert!(machine.ails(), "whoever watches the broker is told to restart it");
    machine.kill(None);
    machine.mend();
    machine.start().await;
    become_all(&meta, PATIENCE, whole).await;
    stop.cancel();
    tokio::time::timeout(PATIENCE, producer).await.expect("every send is answered").unwrap();
    tasks.stop().await;
}

/// Waits until every partition is so.
async fn become_all(meta: &SimMeta, within: Duration, so: impl Fn(&PartitionValue) -> bool) {
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
