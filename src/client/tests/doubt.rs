//! Brokers that doubt what they know: who is asked instead, and what is taken from them all the same.

use super::*;

/// Two brokers that are replicas of "t"; the client was told of both by the first.
async fn two(first: u32, second: u32) -> (Double, Double, Client) {
    let (one, other) = (filled(first).await.0, filled(second).await.0);
    let neighbour = v1::Broker { id: 2, address: other.address.to_string(), rack: String::new() };
    one.state().neighbours.push(neighbour);
    let client = client(&one).await;
    (one, other, client)
}

/// The leader is cut off from its cluster and not from its reader: it has nothing more to say, and would be listened to until the cut ends.
#[tokio::test]
async fn a_consumer_whose_leader_is_in_doubt_asks_others_and_reads_where_they_say() {
    let (old, new, client) = two(3, 5).await;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetAt::Earliest).await.expect("assigned");
    let mut next = async || {
        let next = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
        next.expect("in time").expect("read").offset.get()
    };
    for number in 0..3 {
        assert_eq!(next().await, number);
    }
    let asked = new.state().asked;
    let elect = async {
        old.doubt();
        // The first one who is asked does not know yet either.
        wait_until("it is asked", || new.state().asked > asked).await;
        (new.state().epoch, new.state().advertised_epoch) = (1, 1);
    };
    let (read, ()) = tokio::join!(next(), elect);
    assert_eq!((read, next().await), (3, 4));
    assert!(new.state().asked >= asked + 2, "it did not move before somebody led in a newer epoch");
}

/// The same for who only asks where the log ends: what it then takes for all there is lacked what the successor had acknowledged.
#[tokio::test]
async fn where_a_log_ends_is_asked_at_its_leaders_successor_when_the_leader_is_in_doubt() {
    for (epoch, ends) in [(0, 3), (1, 5)] {
        let (old, new, client) = two(3, 5).await;
        let latest = async || client.admin().offset("t", 0, OffsetAt::Latest).await.expect("known").get();
        assert_eq!(latest().await, 3);
        let asked = new.state().asked;
        (new.state().epoch, new.state().advertised_epoch) = (epoch, epoch);
        assert_eq!(latest().await, 3);
        assert_eq!(new.state().asked, asked, "nobody is asked who leads while nobody doubts");
        old.doubt();
        assert_eq!(latest().await, ends, "another one is believed where it leads in a newer epoch");
        assert_eq!(new.state().asked, asked + 1);
    }
}

/// Two that were cut off together agree with each other, and the one that answered last is asked first.
#[tokio::test]
async fn metadata_of_a_broker_in_doubt_is_believed_where_nobody_knows_better() {
    let (old, new, client) = two(0, 0).await;
    let leader = async || {
        client.topic_now("t").await.expect("known");
        client.routing().leader("t", 0).expect("known").as_str().to_owned()
    };
    assert_eq!(leader().await, old.address.to_string());
    old.doubt();
    new.state().advertised_epoch = 1;
    assert_eq!(leader().await, new.address.to_string());
    new.doubt();
    let all_doubt = tokio::time::timeout(Duration::from_secs(5), client.topic_now("t")).await;
    all_doubt.expect("in time").expect("told all the same");
}

#[tokio::test]
async fn what_a_broker_without_its_metadata_store_has_not_begun_another_one_does() {
    let (one, other, client) = two(0, 0).await;
    let create = async || client.admin().create_topic(&NewTopic::new("t")).await.unwrap_err();
    let reason = |error: CallError| match error {
        CallError::Fault(fault) => fault.reason,
        CallError::Connect(error) => panic!("{error}"),
    };
    let cut_off = Fault::new(Reason::MetadataUnavailable, "no answer");
    one.state().refusal = cut_off.clone();
    assert_eq!(reason(create().await), Reason::MetadataUnavailable, "it may have been done");
    one.state().refusal = cut_off.clone().with("not_begun", true);
    assert_eq!(reason(create().await), Reason::TopicExists, "the other one's answer");
    other.state().refusal = cut_off.with("not_begun", true);
    assert_eq!(reason(create().await), Reason::MetadataUnavailable, "nobody reaches it");
    // A question is asked elsewhere whatever became of it.
    one.state().refusal = Fault::new(Reason::MetadataUnavailable, "no answer");
    other.state().refusal = Fault::new(Reason::TopicExists, "the other one");
    let asked = client.admin().reassignments(None, None).await.unwrap_err();
    assert_eq!(reason(asked), Reason::TopicExists);
}
