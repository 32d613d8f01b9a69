//! Ends of subscriptions by a newer leader epoch, also by a follower's report, and responses to pings.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn deposed_leader_ends_its_subscriptions() {
    let side = Side::new(LEADER);
    let partition = side.open(0, &[LEADER]).await;
    let mut link = side.start_leading();
    link.subscribe(1, id(0), EPOCH).await;
    assert_eq!(link.next_response().await.outcome, Some(subscribe_response::Outcome::AcceptedAt(0)));
    let next = LeaderEpoch(EPOCH.0 + 1);
    side.assign(0, value(next, FOLLOWER.broker, &[LEADER]), Revision(2)).await;
    let Some(subscribe_response::Outcome::Error(error)) = link.next_response().await.outcome else {
        panic!("the subscription ends")
    };
    assert!(error.message.contains("no longer leads"), "{}", error.message);
    // A subscription in an epoch that this broker has not received yet waits for the metadata, and is then accepted.
    side.assign(0, value(LeaderEpoch(next.0 + 1), LEADER, &[LEADER]), Revision(3)).await;
    link.subscribe(2, id(0), LeaderEpoch(next.0 + 2)).await;
    side.assign(0, value(LeaderEpoch(next.0 + 2), LEADER, &[LEADER]), Revision(4)).await;
    assert_eq!(link.next_response().await.outcome, Some(subscribe_response::Outcome::AcceptedAt(0)));
    // The follower reports a newer epoch. Only the stored epoch ends the leadership.
    for (number, stored) in (2..).zip([None, Some(LeaderEpoch(next.0 + 2)), Some(LeaderEpoch(next.0 + 3))]) {
        *side.stored.lock() = stored;
        link.send(messages::unsubscribe(number, LeaderEpoch(i32::MAX.cast_unsigned()), false)).await;
        if stored == Some(LeaderEpoch(next.0 + 3)) {
            wait_until("the leader is deposed", || !partition.status().role.leads()).await;
        } else {
            link.subscribe(number + 1, id(0), LeaderEpoch(next.0 + 2)).await;
            assert_eq!(
                link.next_response().await.outcome,
                Some(subscribe_response::Outcome::AcceptedAt(0)),
                "the broker still leads: the stored epoch is {stored:?}"
            );
        }
    }
    side.tasks.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn follower_responds_to_pings_and_unsent_ping_ends_link() {
    let (leader, follower) = (Side::new(LEADER), Side::new(FOLLOWER.broker));
    let link = connect(&leader, &follower);
    for _ in 0..3 {
        tokio::time::timeout(Duration::from_secs(20), leader.probe.ping_and_wait())
            .await
            .expect("the follower responds");
    }
    link.stop().await;
    let peer = leader.start_leading();
    peer.send(messages::pong(99)).await;
    let LinkEnd::Bad(error) = peer.ended.await.unwrap() else { panic!("the link ends with an error") };
    assert!(error.message.contains("a ping that was never sent"), "{error}");
    leader.tasks.stop().await;
    follower.tasks.stop().await;
}
