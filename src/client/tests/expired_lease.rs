//! Tests of brokers that report an expired lease. Metadata of other brokers is preferred. The metadata of a broker with
//! an expired lease is used only if there is no other.

use super::*;

/// Starts two fake brokers that both have topic "t", with `first` and `second` records. The client connects to the
/// first one, whose metadata names both.
async fn two_replicas(first: u32, second: u32) -> (FakeBroker, FakeBroker, Client) {
    let (first, second) = (filled(first).await.0, filled(second).await.0);
    let broker = v1::Broker { id: 2, address: second.address.to_string(), rack: String::new() };
    first.state().other_brokers.push(broker);
    let client = client(&first).await;
    (first, second, client)
}

/// The leader is partitioned from its cluster, but not from its consumer: it sends no more records and reports an
/// expired lease. The consumer then refreshes metadata until another broker leads in a newer epoch, and reads there.
#[tokio::test]
async fn consumer_leaves_a_leader_with_an_expired_lease() {
    let (old, new, client) = two_replicas(3, 5).await;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetSpec::Earliest).await.expect("assigned");
    let mut next = async || {
        let next = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
        next.expect("in time").expect("read").offset.get()
    };
    for number in 0..3 {
        assert_eq!(next().await, number);
    }
    let metadata_requests = new.state().metadata_requests;
    let elect = async {
        old.expire_lease();
        // The first metadata response does not name the new leader yet.
        wait_until("the metadata is requested", || new.state().metadata_requests > metadata_requests).await;
        (new.state().epoch, new.state().advertised_epoch) = (1, 1);
    };
    let (read, ()) = tokio::join!(next(), elect);
    assert_eq!((read, next().await), (3, 4));
    assert!(
        new.state().metadata_requests >= metadata_requests + 2,
        "the consumer stays until a leader has a newer epoch"
    );
}

/// A lookup of the latest offset is sent to a leader with an expired lease. The lookup is repeated at a leader of a
/// newer epoch, if there is one. The old log end lacks records that the new leader has acknowledged.
#[tokio::test]
async fn latest_offset_comes_from_successor_of_expired_leader() {
    for (epoch, ends) in [(0, 3), (1, 5)] {
        let (old, new, client) = two_replicas(3, 5).await;
        let latest = async || client.admin().offset("t", 0, OffsetSpec::Latest).await.expect("known").get();
        assert_eq!(latest().await, 3);
        let metadata_requests = new.state().metadata_requests;
        (new.state().epoch, new.state().advertised_epoch) = (epoch, epoch);
        assert_eq!(latest().await, 3);
        assert_eq!(
            new.state().metadata_requests,
            metadata_requests,
            "no metadata is requested while no lease has expired"
        );
        old.expire_lease();
        assert_eq!(latest().await, ends, "another leader is used if its epoch is newer");
        assert_eq!(new.state().metadata_requests, metadata_requests + 1);
    }
}

/// Metadata of a broker with an expired lease is used only if every other broker fails or reports an expired lease as
/// well. The brokers then look as if all were partitioned from the metadata store together.
#[tokio::test]
async fn expired_metadata_is_used_if_no_broker_has_better() {
    let (old, new, client) = two_replicas(0, 0).await;
    let leader = async || {
        client.topic_now("t").await.expect("known");
        client.routing().leader("t", 0).expect("known").as_str().to_owned()
    };
    assert_eq!(leader().await, old.address.to_string());
    old.expire_lease();
    new.state().advertised_epoch = 1;
    assert_eq!(leader().await, new.address.to_string());
    new.expire_lease();
    let all_expired = tokio::time::timeout(Duration::from_secs(5), client.topic_now("t")).await;
    all_expired.expect("in time").expect("expired metadata is used");
}

#[tokio::test]
async fn change_that_was_not_started_is_made_by_another_broker() {
    let (first, second, client) = two_replicas(0, 0).await;
    let create = async || client.admin().create_topic(&NewTopic::new("t")).await.unwrap_err();
    let code = |error: CallError| match error {
        CallError::Api(error) => error.code,
        CallError::Connect(error) => panic!("{error}"),
    };
    let unavailable = ApiError::new(ErrorCode::MetadataUnavailable, "no response");
    first.state().refusal = unavailable.clone();
    assert_eq!(code(create().await), ErrorCode::MetadataUnavailable, "the change may have been made");
    first.state().refusal = unavailable.clone().with("not_started", true);
    assert_eq!(code(create().await), ErrorCode::TopicExists, "response of the other broker");
    second.state().refusal = unavailable.with("not_started", true);
    assert_eq!(code(create().await), ErrorCode::MetadataUnavailable, "no broker reaches the metadata store");
    // A read is repeated at another broker, even if the first broker does not report `not_started`.
    first.state().refusal = ApiError::new(ErrorCode::MetadataUnavailable, "no response");
    second.state().refusal = ApiError::new(ErrorCode::TopicExists, "the other broker");
    let error = client.admin().reassignments(None, None).await.unwrap_err();
    assert_eq!(code(error), ErrorCode::TopicExists);
}
