//! Tests of consumers with a rack, against a fake leader and a fake follower in that rack.

use super::*;

/// Starts a leader with `led` records and a follower in rack "b" with `followed` records. The leader's metadata names
/// both as in-sync replicas.
async fn pair(led: u32, followed: u32) -> (FakeBroker, FakeBroker, Client) {
    let (leader, follower) = (filled(led).await.0, filled(followed).await.0);
    follower.state().is_follower = true;
    let broker = v1::Broker { id: 2, address: follower.address.to_string(), rack: "b".to_owned() };
    leader.state().other_brokers.push(broker);
    let client = client(&leader).await;
    (leader, follower, client)
}

/// Reads the records `from..to` in order with a consumer in rack "b". The consumer starts at the offset `from` without
/// a lookup, so that no request reaches the leader first.
async fn read_in_rack(client: &Client, from: u32, to: u32) {
    let policy = OffsetResetPolicy::Earliest;
    let options = ConsumerOptions { on_out_of_range: policy, ..ConsumerOptions::default().rack("b") };
    let mut consumer = client.consumer(options);
    consumer.assign_at("t", 0, Offset::new(from.into()).expect("small")).await.expect("assigned");
    for number in from..to {
        let record = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await.expect("in time");
        assert_eq!(record.expect("read").record.value.as_deref(), Some(number.to_string().as_bytes()));
    }
}

#[tokio::test]
async fn consumer_is_served_in_its_rack_else_by_the_leader() {
    let (leader, follower, client) = pair(10, 10).await;
    read_in_rack(&client, 0, 10).await;
    assert_eq!((leader.state().fetches, follower.state().fetches), (0, 10));
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetSpec::Earliest).await.expect("assigned");
    consumer.next().await.expect("read");
    assert!(leader.state().fetches > 0, "the consumer has no rack");
    assert_eq!(follower.state().fetches, 10);
}

/// A follower's error, broken stream, corrupt bytes or out-of-range position moves the partition to the leader. No
/// record is read twice or skipped.
#[tokio::test]
async fn follower_error_moves_the_read_to_the_leader() {
    let (leader, follower, client) = pair(10, 10).await;
    follower.state().unreadable = Some(ErrorCode::NotLeader);
    read_in_rack(&client, 0, 10).await;
    follower.state().unreadable = Some(ErrorCode::DataCorrupt);
    read_in_rack(&client, 0, 10).await;
    assert_eq!(follower.state().fetches, 2, "one refusal each");
    follower.state().unreadable = None;
    follower.state().corrupt_fetches = u32::MAX;
    read_in_rack(&client, 0, 10).await;
    follower.state().corrupt_fetches = 0;
    follower.state().fetches_until_break = Some(4);
    let before = leader.state().fetches;
    read_in_rack(&client, 0, 10).await;
    assert!(leader.state().fetches < before + 10, "the follower sent the first records");
    let (_leader, _follower, client) = pair(10, 5).await;
    read_in_rack(&client, 8, 10).await;
}

/// The follower is partitioned from its leader and from the metadata store: it cannot detect that the log grows. It
/// reports an expired lease, so the consumer requests metadata from the leader. The leader has removed the follower
/// from the ISR, and the consumer continues at the leader.
#[tokio::test]
async fn follower_with_expired_lease_is_left_after_isr_removal() {
    let (leader, follower, client) = pair(10, 5).await;
    let out_of_isr = async {
        wait_until("the consumer has read all records of the follower", || follower.state().fetches == 5).await;
        leader.state().other_brokers.clear();
        follower.expire_lease();
    };
    tokio::join!(read_in_rack(&client, 0, 10), out_of_isr);
    assert_eq!((leader.state().fetches, follower.state().fetches), (5, 5));
}

/// The old leader is deposed and does not have the new epoch yet. Its log ends below the position that the consumer
/// reached at a follower of the new leader. The old leader must refuse the read because of the epoch, so that the
/// consumer's reset policy does not apply.
#[tokio::test]
async fn deposed_leader_does_not_reset_a_consumer() {
    let (old, follower, client) = pair(3, 6).await;
    let new = filled(8).await.0;
    (follower.state().epoch, new.state().epoch) = (1, 1);
    follower.state().fetches_until_break = Some(5);
    let mut consumer = client.consumer(ConsumerOptions {
        on_out_of_range: OffsetResetPolicy::Earliest,
        ..ConsumerOptions::default().rack("b")
    });
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("assigned");
    let mut next = async || {
        let next = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
        next.expect("in time").expect("read").offset.get()
    };
    for number in 0..6 {
        assert_eq!(next().await, number);
    }
    let elect = async {
        wait_until("the deposed leader has rejected the read", || old.state().fetches > 0).await;
        (old.state().advertised, old.state().advertised_epoch) = (new.address.to_string(), 1);
    };
    // The follower's stream breaks. The old leader is the leader in the metadata, until a refresh names the new leader.
    let (read, ()) = tokio::join!(next(), elect);
    assert_eq!((read, next().await), (6, 7));
}
