//! Several replicas of one partition, over a network and a metadata store that the test controls: leader changes,
//! replication, and results of writes.

mod driven;
mod net;
mod retries;

use net::{Net, append, assert_equal_logs, at, batch, broker, bytes_of, send, tick, wait_until_in_sync};
use std::sync::Arc;

use crate::{
    cluster::PartitionValue,
    model::{Acks, LeaderEpoch},
    partition::{leader::member::DisconnectCause, *},
    record::{Batch, ProducerSequence},
    task::test_timeout::wait_until,
};

const PLAIN: &[(&str, &str)] = &[("remote.storage.enable", "false"), ("retention.ms", "-1")];

/// Starts the replicas of brokers 1 to 3, all in sync. Broker 1 leads.
async fn trio() -> (Arc<Net>, [Arc<Partition>; 3]) {
    let net = Net::new(3, 3, 2, false).await;
    let one = net.start(1, PLAIN, false).await;
    let (two, three) = (net.start(2, PLAIN, false).await, net.start(3, PLAIN, false).await);
    wait_until_in_sync(&two).await;
    wait_until_in_sync(&three).await;
    (net, [one, two, three])
}

/// Returns the values that a consumer reads from this replica.
async fn consumed(partition: &Partition) -> Vec<Vec<u8>> {
    let (mut values, mut from) = (Vec::new(), partition.watermarks().log_start);
    while let Some(fetched) = partition.reader().read(from, (1 << 20).into()).await.unwrap() {
        let mut bytes = bytes::Bytes::from(fetched.chunks.concat());
        while !bytes.is_empty() {
            for entry in Batch::split_from(&mut bytes).unwrap().records().unwrap() {
                values.push(entry.unwrap().1.value.unwrap().to_vec());
            }
        }
        from = fetched.next;
    }
    values
}

fn values(bytes: impl IntoIterator<Item = u8>) -> Vec<Vec<u8>> {
    bytes.into_iter().map(|n| vec![n]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_acknowledged_by_all_are_readable_everywhere() {
    let (net, [one, two, three]) = trio().await;
    for n in 0..20u8 {
        let acked = append(&one, &[n], Acks::All).await.unwrap();
        assert_eq!(
            (acked.base.get(), acked.durability, acked.epoch),
            (u64::from(n), AckDurability::Persisted(3), LeaderEpoch(1))
        );
        // The write was acknowledged only after all three replicas had it on their disks.
        assert!(two.progress().persisted_end >= acked.end && three.progress().persisted_end >= acked.end);
    }
    for follower in [&two, &three] {
        wait_until("the high watermark arrives", || follower.watermarks().high_watermark == at(20)).await;
        assert_eq!(consumed(follower).await, values(0..20));
        assert_equal_logs(&one, follower, 0).await;
        let refused = append(follower, b"x", Acks::Leader).await;
        assert_eq!(refused, Err(AppendError::NotLeader { leader: Some(broker(1)), epoch: LeaderEpoch(1) }));
    }
    assert_eq!(one.status().role, ReplicaRole::Leader { epoch_committed: true });
    // A read above the high watermark waits on a follower, and is rejected by the leader.
    assert!(two.reader().read(at(25), 100.into()).await.unwrap().is_none());
    assert!(matches!(one.reader().read(at(25), 100.into()).await, Err(ReadError::OutOfRange { .. })));
    assert_eq!(net.proposals(), [], "no ISR change was proposed");
}

/// A leader writes records that no replica copies, and another broker is elected. When the old leader is connected
/// again, the leader epochs show where its log diverges, and it truncates these records. No write among them was
/// acknowledged with `acks=all`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deposed_leader_truncates_uncopied_records_and_follows() {
    let (net, [one, two, three]) = trio().await;
    append(&one, &[0], Acks::All).await.unwrap();
    let reader = one.reader().clone();

    net.disconnect(1, 2);
    net.disconnect(1, 3);
    net.pause_metadata(1).await;
    assert_eq!(append(&one, &[100], Acks::Leader).await.unwrap().base.get(), 1);
    let waiting = send(&one, batch(&[101], None), Acks::All).await;
    wait_until("the batches are durable", || one.progress().persisted_end == at(3)).await;

    net.elect(2, &[1]).await;
    assert_eq!(net.value().await.0.isr, [broker(2), broker(3)]);
    wait_until("broker 3 has the metadata of epoch 2", || three.status().epoch == LeaderEpoch(2)).await;
    wait_until_in_sync(&three).await;
    let acked = append(&two, &[1], Acks::All).await.unwrap();
    assert_eq!((acked.base, acked.epoch, acked.durability), (at(1), LeaderEpoch(2), AckDurability::Persisted(2)));
    assert_eq!(one.watermarks().high_watermark, at(1), "the old leader commits nothing");

    // The old leader receives the metadata, and follows.
    net.resume_metadata(1).await;
    assert_eq!(waiting.await.unwrap(), Err(AppendError::Deposed));
    let not_leader = AppendError::NotLeader { leader: Some(broker(2)), epoch: LeaderEpoch(2) };
    assert_eq!(append(&one, &[102], Acks::All).await, Err(not_leader));
    net.reconnect(1, 2);
    wait_until_in_sync(&one).await;
    assert_equal_logs(&two, &one, 0).await;
    append(&two, &[2], Acks::All).await.unwrap();
    for partition in [&one, &two, &three] {
        wait_until("the high watermark arrives", || partition.watermarks().high_watermark == at(3)).await;
        assert_eq!(consumed(partition).await, values(0..3));
    }
    // A reader that was opened before the leader change still works.
    assert!(reader.read(at(1), 100.into()).await.unwrap().is_some());
}

/// A deposed leader may receive its successor's tier state before it receives the new epoch in the partition value. Its
/// own log may have other records below that tiered end, and these must not be committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newer_tier_state_commits_nothing_on_deposed_leader() {
    const TIERED: &[(&str, &str)] = &[("segment.bytes", "16384"), ("retention.ms", "-1")];
    let net = Net::new(2, 2, 1, true).await;
    let (one, two) = (net.start(1, TIERED, false).await, net.start(2, TIERED, false).await);
    wait_until_in_sync(&two).await;
    append(&one, &[0; 4000], Acks::All).await.unwrap();
    net.disconnect(1, 2);
    net.pause_metadata(1).await;
    for _ in 1..20 {
        append(&one, &[100; 4000], Acks::Leader).await.unwrap();
    }
    let waiting = send(&one, batch(&[101], None), Acks::All).await;
    net.elect(2, &[1]).await;
    for n in 1..20u8 {
        append(&two, &[n; 4000], Acks::All).await.unwrap();
    }
    net.run_maintenance(2).await;
    assert!(two.watermarks().tiered_end > at(5));

    one.apply_tier_state(net.committed().await.unwrap()).await;
    assert_eq!(waiting.await.unwrap(), Err(AppendError::Deposed));
    assert_eq!(one.watermarks().high_watermark, at(1), "the deposed leader commits no record");
    assert_eq!(consumed(&one).await, [vec![0; 4000]]);
    net.resume_metadata(1).await;
    net.reconnect(1, 2);
    wait_until_in_sync(&one).await;
    assert_equal_logs(&two, &one, 0).await;
}

/// A leader that receives no metadata is deposed by its followers' reports of a newer epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_with_report_of_newer_epoch_admits_nothing() {
    let (net, [one, _two, _three]) = trio().await;
    let tail = one.tail();
    assert!(tail.read(at(0), 100).await.unwrap().is_none());
    net.pause_metadata(1).await;
    net.elect(2, &[]).await;
    wait_until("the leader is deposed", || one.status().role == ReplicaRole::Idle).await;
    assert_eq!(one.status().leader, None, "the deposed leader has no newer metadata");
    let refused = append(&one, &[7], Acks::Leader).await;
    assert_eq!(refused, Err(AppendError::NotLeader { leader: None, epoch: LeaderEpoch(1) }));
    assert_eq!(tail.read(at(0), 100).await.unwrap_err(), ReadError::Closed, "a tail reader ends with its epoch");
    // The broker receives the metadata of epoch 2, and follows.
    net.resume_metadata(1).await;
    wait_until_in_sync(&one).await;
    assert_eq!(one.epoch(), LeaderEpoch(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_follower_leaves_the_isr_and_returns() {
    let (net, [one, two, three]) = trio().await;
    net.disconnect(1, 3);
    let waiting = send(&one, batch(&[0], None), Acks::All).await;
    wait_until("broker 2 has the record", || two.progress().persisted_end == at(1)).await;
    assert_eq!(one.watermarks().high_watermark, at(0), "commits wait for an ISR member");
    assert!(one.wants_ticks());
    let peer = net.node(3, |node| leader::member::PeerId { broker: broker(3), epoch: node.epoch });
    one.on_follower_disconnected(peer, DisconnectCause::ProcessGone).await;
    assert_eq!(waiting.await.unwrap().unwrap().durability, AckDurability::Persisted(2));
    assert_eq!(net.value().await.0.isr, [broker(1), broker(2)]);
    wait_until("no ISR member is behind", || !one.wants_ticks()).await;

    append(&one, &[1], Acks::All).await.unwrap();
    net.reconnect(1, 3);
    wait_until_in_sync(&three).await;
    assert_equal_logs(&one, &three, 0).await;
    assert_eq!(append(&one, &[2], Acks::All).await.unwrap().durability, AckDurability::Persisted(3));
    let isrs: Vec<usize> = net.proposals().iter().map(|proposal| proposal.value.isr.len()).collect();
    assert_eq!(isrs, [2, 3]);
}

/// An operator cancels a reassignment and starts it again, and neither the leader nor the new replica receives the
/// values in between. The leader drops the earlier acknowledgements of the replica. So the replica must subscribe
/// again, although its link stays connected and nothing is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_added_again_subscribes_again() {
    let net = Net::new(3, 2, 1, false).await;
    let one = net.start(1, PLAIN, false).await;
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    append(&one, &[0], Acks::All).await.unwrap();
    let three = net.start(3, PLAIN, false).await;
    // The new replica must copy without being admitted to the ISR. So the leader receives neither the first
    // reassignment nor its cancellation.
    let target = [broker(1), broker(2), broker(3)];
    net.pause_metadata(1).await;
    net.change(|value| value.start_reassignment(&target).unwrap()).await;
    wait_until("broker 3 follows", || matches!(three.status().role, ReplicaRole::Follower { in_sync: false, .. }))
        .await;
    net.pause_metadata(3).await;
    net.change(|value| value.cancel_reassignment().unwrap()).await;
    net.change(|value| value.start_reassignment(&target).unwrap()).await;
    net.resume_metadata(1).await;
    // The leader rejects a subscription for an addition that it has not received. So the leader receives the second
    // addition before the new replica does.
    assert_eq!(net.value().await.0.isr, target[..2]);
    net.resume_metadata(3).await;
    wait_until_in_sync(&three).await;
    assert_equal_logs(&one, &three, 0).await;
    assert_eq!(net.value().await.0.removal_count, 1);
}

/// A replica that already follows is removed and added again, while its link stays connected. Acknowledgements on its
/// old subscription do not count, so it must subscribe again before it is admitted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_addition_ends_the_old_subscription() {
    let net = Net::new(3, 2, 2, false).await;
    let one = net.start(1, PLAIN, false).await;
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    let three = net.start(3, PLAIN, false).await;
    let target = [broker(1), broker(2), broker(3)];
    net.refuse_admissions(true);
    net.change(|value| value.start_reassignment(&target).unwrap()).await;
    wait_until("the leader proposes the admission", || !net.proposals().is_empty()).await;
    net.pause_metadata(1).await;
    net.pause_metadata(3).await;
    net.change(|value| value.cancel_reassignment().unwrap()).await;
    let second = net.change(|value| value.start_reassignment(&target).unwrap()).await;
    net.refuse_admissions(false);
    net.resume_metadata(1).await;
    net.resume_metadata(3).await;
    wait_until_in_sync(&three).await;
    assert_eq!(second.isr, target[..2]);
    append(&one, &[1], Acks::All).await.unwrap();
    assert_equal_logs(&one, &three, 0).await;
}

/// The follower's process runs, and nothing reports the end of its link to the leader. The leader must detect the
/// lagging follower by its lack of progress.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lagging_follower_is_removed_by_ticks_alone() {
    let net = Net::new(2, 2, 1, false).await;
    let one = net.start(1, PLAIN, false).await;
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    net.disconnect(1, 2);
    let waiting = send(&one, batch(&[0], None), Acks::All).await;
    wait_until("broker 2 is behind", || one.progress().persisted_end == at(1) && one.wants_ticks()).await;
    tick(&one, 1000).await;
    tick(&one, 10_999).await;
    assert_eq!(net.proposals(), []);
    tick(&one, 11_000).await;
    assert_eq!(waiting.await.unwrap().unwrap().durability, AckDurability::Persisted(1));
    assert_eq!(net.value().await.0.isr, [broker(1)]);
}

/// The store writes a proposal, but the leader receives an unknown outcome. The leader reads the key, and then commits
/// by the new ISR.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_outcome_is_read_back() {
    let net = Net::new(3, 3, 1, false).await;
    let one = net.start(1, PLAIN, false).await;
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    net.lose_outcomes(1);
    let waiting = send(&one, batch(&[0], None), Acks::All).await;
    let peer = net.node(3, |node| leader::member::PeerId { broker: broker(3), epoch: node.epoch });
    one.on_follower_disconnected(peer, DisconnectCause::ProcessGone).await;
    assert_eq!(waiting.await.unwrap().unwrap().durability, AckDurability::Persisted(2));
    assert_eq!(net.value().await.0.isr, [broker(1), broker(2)]);
    let three = net.start(3, PLAIN, false).await;
    wait_until_in_sync(&three).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn below_min_isr_commits_wait_for_the_eligible_replica() {
    let net = Net::new(2, 2, 2, false).await;
    let one = net.start(1, PLAIN, false).await;
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    append(&one, &[0], Acks::All).await.unwrap();
    net.disconnect(1, 2);
    let peer = net.node(2, |node| leader::member::PeerId { broker: broker(2), epoch: node.epoch });
    one.on_follower_disconnected(peer, DisconnectCause::ProcessGone).await;
    while net.value().await.0.elr.is_empty() {
        tokio::task::yield_now().await;
    }
    net.deliver_metadata().await;
    let refused = append(&one, &[1], Acks::All).await.unwrap_err();
    assert_eq!(refused, AppendError::Refused(AdmitError::NotEnoughReplicas { in_sync: 1, needed: 2 }));
    assert_eq!(append(&one, &[1], Acks::Leader).await.unwrap().base, at(1));
    assert_eq!(one.watermarks().high_watermark, at(1));
    net.reconnect(1, 2);
    wait_until_in_sync(&two).await;
    wait_until("all records are committed", || one.watermarks().high_watermark == at(2)).await;
    assert_eq!(net.value().await.0.elr, []);
}

/// The records below the tiered end are in the object store. A bootstrapping replica copies only the records from there
/// on, and gets the producer state from a segment footer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_replica_bootstraps_at_tiered_end_with_producers() {
    const TIERED: &[(&str, &str)] =
        &[("segment.bytes", "16384"), ("retention.ms", "-1"), ("local.retention.bytes", "1")];
    let net = Net::new(2, 1, 1, true).await;
    let one = net.start(1, TIERED, false).await;
    let stamp = |base_sequence| Some(ProducerSequence { id: 77, epoch: 0, base_sequence });
    for n in 0..20 {
        let written = send(&one, batch(&[7; 4000], stamp(n)), Acks::All).await;
        written.await.unwrap().unwrap();
    }
    net.run_maintenance(1).await;
    let tiered_end = one.watermarks().tiered_end;
    assert!(tiered_end > at(10) && tiered_end < at(20), "{tiered_end}");

    net.change(|value| value.start_reassignment(&[broker(1), broker(2)]).unwrap()).await;
    assert!(matches!(net.open(2, TIERED, false).await, Err(PartitionError::Lost { .. })));
    let two = net.start(2, TIERED, true).await;
    wait_until_in_sync(&two).await;
    let watermarks = two.watermarks();
    assert_eq!((watermarks.log_start, watermarks.local_start, watermarks.tiered_end), (at(0), tiered_end, tiered_end));
    assert_equal_logs(&one, &two, tiered_end.get()).await;
    wait_until("the high watermark arrives", || two.watermarks().high_watermark == at(20)).await;
    assert_eq!(consumed(&two).await.len(), 20, "readers of the new replica get the records before its start");

    // The new replica leads, and recognises a retry of a batch that is only in the object store.
    net.elect(2, &[1]).await;
    net.stop(1).await;
    wait_until("broker 2 leads", || two.status().role.leads()).await;
    let retried = send(&two, batch(&[7; 4000], stamp(i32::try_from(tiered_end.get()).unwrap() - 1)), Acks::Leader)
        .await
        .await
        .unwrap()
        .unwrap();
    assert!(retried.duplicate);
    let next = send(&two, batch(&[7; 4000], stamp(20)), Acks::Leader).await.await.unwrap().unwrap();
    assert_eq!((next.base, next.duplicate), (at(20), false));
    // Uploads continue at the tiered end of the other broker.
    for n in 21..40 {
        send(&two, batch(&[7; 4000], stamp(n)), Acks::All).await.await.unwrap().unwrap();
    }
    net.run_maintenance(2).await;
    assert!(two.watermarks().tiered_end > tiered_end);
}

/// There is no object store, and the older records were deleted. A bootstrapping replica gets the state of their
/// producers from the leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_replica_bootstraps_with_the_leaders_tables() {
    const SHORT: &[(&str, &str)] = &[
        ("segment.bytes", "16384"),
        ("remote.storage.enable", "false"),
        ("retention.ms", "-1"),
        ("retention.bytes", "30000"),
    ];
    let net = Net::new(2, 1, 1, false).await;
    let one = net.start(1, SHORT, false).await;
    let stamp = |id, base_sequence| Some(ProducerSequence { id, epoch: 0, base_sequence });
    send(&one, batch(&[1; 4000], stamp(5, 0)), Acks::All).await.await.unwrap().unwrap();
    for n in 0..30 {
        send(&one, batch(&[1; 4000], stamp(6, n)), Acks::All).await.await.unwrap().unwrap();
    }
    net.run_maintenance(1).await;
    let start = one.watermarks().log_start;
    assert!(start > at(4) && one.watermarks().local_start == start, "{:?}", one.watermarks());
    net.change(|value| value.start_reassignment(&[broker(2), broker(1)]).unwrap()).await;
    let two = net.start(2, SHORT, true).await;
    wait_until_in_sync(&two).await;
    assert_equal_logs(&one, &two, start.get()).await;
    assert_eq!((two.watermarks().log_start, two.watermarks().local_start), (start, start));
    net.elect(2, &[]).await;
    wait_until("broker 2 leads", || two.status().role.leads()).await;
    let retried = send(&two, batch(&[1; 4000], stamp(5, 0)), Acks::Leader).await.await.unwrap().unwrap();
    assert_eq!((retried.base, retried.duplicate), (at(0), true), "the producer state of deleted records is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_with_failed_disk_resigns_and_serves_reads() {
    let (net, [one, two, three]) = trio().await;
    append(&one, &[0], Acks::All).await.unwrap();
    net.node(1, |node| node.disk.fail_writes_after(Some(0)));
    let failed = append(&one, &[1], Acks::All).await;
    assert!(matches!(failed, Err(AppendError::StorageFailed { .. })), "{failed:?}");
    assert_eq!(net.resigned(), [(broker(1), LeaderEpoch(1))]);
    wait_until("the partition has no leader", || two.status().epoch == LeaderEpoch(2)).await;
    assert_eq!(net.value().await.0.isr, [broker(2), broker(3)]);
    net.elect(2, &[]).await;
    wait_until_in_sync(&three).await;
    assert_eq!(one.status().role, ReplicaRole::Idle, "a replica with a failed disk does not follow");
    append(&two, &[1], Acks::All).await.unwrap();
    assert_eq!(consumed(&one).await, values([0]));
    assert!(matches!(append(&one, &[2], Acks::All).await, Err(AppendError::NotLeader { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_do_not_wait_for_follower_with_failed_disk() {
    let (net, [one, _two, three]) = trio().await;
    net.node(3, |node| node.disk.fail_writes_after(Some(0)));
    // The follower reports its failed disk by ending its subscription, so the leader needs no tick.
    assert_eq!(append(&one, &[0], Acks::All).await.unwrap().durability, AckDurability::Persisted(2));
    assert!(three.error().is_some());
    assert_eq!(three.status().role, ReplicaRole::Idle);
    assert_eq!(net.value().await.0.isr, [broker(1), broker(2)]);
}

/// An operator elects a replica whose log ends below the tiered end. The replica resets its log to the tiered end, and
/// its readers get the earlier records from the object store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unclean_leader_is_reset_to_the_tiered_end() {
    const TIERED: &[(&str, &str)] = &[("segment.bytes", "16384"), ("retention.ms", "-1")];
    let net = Net::new(2, 2, 1, true).await;
    let one = net.start(1, TIERED, false).await;
    let two = net.start(2, TIERED, false).await;
    wait_until_in_sync(&two).await;
    append(&one, &[0; 4000], Acks::All).await.unwrap();
    // Broker 2 falls behind; broker 1 continues alone and uploads.
    net.disconnect(1, 2);
    let peer = net.node(2, |node| leader::member::PeerId { broker: broker(2), epoch: node.epoch });
    one.on_follower_disconnected(peer, DisconnectCause::ProcessGone).await;
    for n in 1..20u8 {
        append(&one, &[n; 4000], Acks::All).await.unwrap();
    }
    net.run_maintenance(1).await;
    let tiered_end = one.watermarks().tiered_end;
    assert!(tiered_end > at(5));
    net.stop(1).await;
    net.change(|value| value.elect_unclean(broker(2), false).unwrap()).await;
    wait_until("broker 2 leads", || two.status().role.leads()).await;
    let watermarks = two.watermarks();
    assert_eq!(
        (watermarks.log_end, watermarks.high_watermark, watermarks.local_start),
        (tiered_end, tiered_end, tiered_end)
    );
    assert_eq!(append(&two, b"x", Acks::Leader).await.unwrap().base, tiered_end);
    assert_eq!(consumed(&two).await.len() as u64, tiered_end.get() + 1);

    // The old leader starts again, with records above the tiered end. It truncates them, although they were committed
    // before the unclean election.
    net.reconnect(1, 2);
    let one = net.start(1, TIERED, false).await;
    wait_until_in_sync(&one).await;
    assert_equal_logs(&two, &one, tiered_end.get()).await;
}

/// Regression: the elected replica held the object store's records, and later records that no other replica may have.
/// The replica was reset, because its epochs were compared with the last footer, which has only the epochs of its own
/// segment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unclean_leader_keeps_records_after_the_tiered_end() {
    const TIERED: &[(&str, &str)] = &[("segment.bytes", "16384"), ("retention.ms", "-1")];
    let net = Net::new(2, 2, 1, true).await;
    let one = net.start(1, TIERED, false).await;
    let two = net.start(2, TIERED, false).await;
    wait_until_in_sync(&two).await;
    for n in 0..20u8 {
        append(&one, &[n; 4000], Acks::All).await.unwrap();
    }
    net.run_maintenance(1).await;
    let tiered_end = one.watermarks().tiered_end;
    assert!(tiered_end > at(5) && tiered_end < at(20));
    net.stop(1).await;
    net.change(|value| value.elect_unclean(broker(2), false).unwrap()).await;
    wait_until("broker 2 leads", || two.status().role.leads()).await;
    assert_eq!(two.watermarks().log_end, at(20));
    let firsts: Vec<u8> = consumed(&two).await.iter().map(|value| value[0]).collect();
    assert_eq!(firsts, (0..20u8).collect::<Vec<_>>());
}

/// A replica copied records that were never committed, and was stopped while another leader wrote other records at
/// those offsets. After its restart, the tiered end of that leader must not make the replica's own records count as
/// committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abandoned_tail_does_not_count_as_committed() {
    const TIERED: &[(&str, &str)] = &[("segment.bytes", "16384"), ("retention.ms", "-1")];
    let net = Net::new(3, 3, 1, true).await;
    let one = net.start(1, TIERED, false).await;
    let (two, three) = (net.start(2, TIERED, false).await, net.start(3, TIERED, false).await);
    wait_until_in_sync(&two).await;
    wait_until_in_sync(&three).await;
    append(&one, &[0; 4000], Acks::All).await.unwrap();
    net.disconnect(1, 2);
    net.pause_metadata(2).await;
    for _ in 1..20 {
        append(&one, &[100; 4000], Acks::Leader).await.unwrap();
    }
    wait_until("broker 3 has the records", || three.progress().persisted_end == at(20)).await;
    net.stop(3).await;
    net.stop(1).await;
    net.elect(2, &[1, 3]).await;
    net.resume_metadata(2).await;
    wait_until("broker 2 leads", || two.status().role == (ReplicaRole::Leader { epoch_committed: true })).await;
    for n in 1..20u8 {
        append(&two, &[n; 4000], Acks::All).await.unwrap();
    }
    net.run_maintenance(2).await;
    assert!(two.watermarks().tiered_end > at(5));

    net.disconnect(2, 3);
    let three = net.start(3, TIERED, false).await;
    assert_eq!((three.watermarks().log_end, three.watermarks().high_watermark), (at(20), at(0)));
    assert!(three.reader().read(at(0), 100.into()).await.unwrap().is_none());
    net.reconnect(2, 3);
    wait_until_in_sync(&three).await;
    assert_equal_logs(&two, &three, 0).await;
}

/// A cleanly elected leader has all committed records. Even if a leader lacks some, a follower must not truncate its
/// own committed records.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_does_not_truncate_committed_records() {
    let net = Net::new(2, 2, 1, false).await;
    let one = net.start(1, PLAIN, false).await;
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    for n in 0..5u8 {
        append(&one, &[n], Acks::All).await.unwrap();
    }
    wait_until("the high watermark arrives", || two.watermarks().high_watermark == at(5)).await;
    let before = bytes_of(&two, at(0));
    net.stop(1).await;
    // Broker 1 leads although its replica was deleted. No step of the protocol leads to this state.
    let log = net.node(1, |node| node.log.clone());
    log.delete_replica(net.id).unwrap();
    let one = net.start(1, PLAIN, false).await;
    net.change(|value| PartitionValue { leader: Some(broker(1)), leader_epoch: LeaderEpoch(2), ..value.clone() }).await;
    append(&one, b"other", Acks::Leader).await.unwrap();
    wait_until("the follower receives the metadata", || {
        matches!(
            two.status(),
            ReplicaStatus { epoch: LeaderEpoch(2), role: ReplicaRole::Follower { in_sync: false, .. }, .. }
        )
    })
    .await;
    net.reconnect(1, 2);
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert!(!matches!(two.status().role, ReplicaRole::Follower { in_sync: true, .. }));
    }
    assert_eq!(two.watermarks().log_end, at(5));
    assert!(bytes_of(&two, at(0)) == before, "the log is unchanged");
}

/// A restarted follower copies the records that were written while it was stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_replica_copies_missed_records() {
    let net = Net::new(2, 2, 1, false).await;
    let one = net.start(1, PLAIN, false).await;
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    append(&one, &[0; 3000], Acks::All).await.unwrap();
    net.stop(2).await;
    // Broker 2 notified the leader of its stop, so no commit waits for it.
    for n in 1..60u8 {
        append(&one, &[n; 3000], Acks::All).await.unwrap();
    }
    drop(two);
    let two = net.start(2, PLAIN, false).await;
    wait_until_in_sync(&two).await;
    assert_equal_logs(&one, &two, 0).await;
    assert_eq!(append(&one, &[60; 3000], Acks::All).await.unwrap().durability, AckDurability::Persisted(2));
}

/// The three brokers lead in turn, while an idempotent producer retries each batch until it is acknowledged. Each batch
/// must be stored once, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequence_is_stored_once_across_leader_changes() {
    let net = Net::new(3, 3, 2, false).await;
    let mut partitions = Vec::new();
    for number in 1..=3 {
        partitions.push(net.start(number, PLAIN, false).await);
    }
    let produce = async {
        for sequence in 0..120 {
            let stamp = Some(ProducerSequence { id: 9, epoch: 0, base_sequence: sequence });
            loop {
                let Some(leader) = partitions.iter().find(|partition| partition.status().role.leads()) else {
                    tokio::task::yield_now().await;
                    continue;
                };
                let receiver = send(leader, batch(&sequence.to_be_bytes(), stamp), Acks::All).await;
                match receiver.await.unwrap() {
                    Ok(_) => break,
                    Err(AppendError::Deposed | AppendError::NotLeader { .. } | AppendError::Refused(_)) => {
                        tokio::task::yield_now().await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    let elections = async {
        for election in 0..30u32 {
            wait_until("all replicas are in sync", || {
                let followers = partitions
                    .iter()
                    .filter(|p| matches!(p.status().role, ReplicaRole::Follower { in_sync: true, .. }));
                followers.count() == 2
            })
            .await;
            net.elect((election + 1) % 3 + 1, &[]).await;
        }
    };
    tokio::join!(produce, elections);
    let leader = partitions.iter().find(|partition| partition.status().role.leads()).unwrap();
    let expected: Vec<Vec<u8>> = (0..120i32).map(|n| n.to_be_bytes().to_vec()).collect();
    assert_eq!(consumed(leader).await, expected);
    for partition in &partitions {
        assert_equal_logs(leader, partition, 0).await;
    }
}
