//! Golden values of the key space. Their encoding must not change, because operators and other versions read the stored
//! values.

use super::*;
use crate::model::LeaderEpoch;

fn keys() -> Keys {
    Keys::new("blue").expect("valid")
}

fn topic() -> TopicId {
    "6f1c2a9e-0000-4000-8000-0123456789ab".parse().expect("an id")
}

/// Checks that a value is encoded as this JSON and decoded from it, also with an unknown field.
fn assert_golden<T: Value + PartialEq + fmt::Debug>(value: &T, json: &str) {
    assert_eq!(std::str::from_utf8(&value.encode()).expect("text"), json);
    assert_eq!(T::decode("key", json.as_bytes()).as_ref(), Ok(value));
    let newer = format!("{}, \"of_a_newer_version\": {{\"x\": [1]}}}}", &json[..json.len() - 1]);
    assert_eq!(T::decode("key", newer.as_bytes()).as_ref(), Ok(value), "an unknown field is ignored");
}

#[test]
fn values_are_encoded_as_documented() {
    assert_golden(
        &BrokerValue {
            listeners: Endpoints::new("a:9460".into()).with_http("a:9461".into()).with_peer("b:9470".into()),
            rack: Some("z1".into()),
            directory_id: "d".into(),
            incarnation: "p".into(),
            state: BrokerState::Stopping,
            disk_pressure: false,
            disk_full: false,
            max_replicas: Some(4000),
            version: "0.1.0".into(),
        },
        concat!(
            r#"{"listeners":{"client":{"protocol":"grpc","address":"a:9460"},"http":{"protocol":"http","address":"a:9461"},"#,
            r#""peer":{"protocol":"grpc","address":"b:9470"}},"#,
            r#""rack":"z1","directory_id":"d","incarnation":"p","state":"stopping","max_replicas":4000,"version":"0.1.0"}"#,
        ),
    );
    assert_golden(
        &DirectoryValue { directory_id: "d".into(), incarnation: "p".into() },
        r#"{"directory_id":"d","incarnation":"p"}"#,
    );
    assert_golden(&DrainValue { since_ms: 5 }, r#"{"since_ms":5}"#);
    assert_golden(&ControllerValue { broker: BrokerId(3) }, r#"{"broker":3}"#);
    assert_golden(
        &TopicValue {
            id: topic(),
            partitions: 2,
            replication_factor: 1,
            config: [("retention.ms".to_owned(), "5".to_owned())].into(),
        },
        r#"{"id":"6f1c2a9e-0000-4000-8000-0123456789ab","partitions":2,"replication_factor":1,"config":{"retention.ms":"5"}}"#,
    );
    assert_golden(
        &PartitionValue {
            replicas: vec![BrokerId(2), BrokerId(1)],
            leader: Some(BrokerId(2)),
            leader_epoch: LeaderEpoch(7),
            isr: vec![BrokerId(2)],
            elr: vec![BrokerId(1)],
            adding: vec![],
            removing: vec![],
            removal_count: 0,
            unclean_epoch: None,
            discard_local: false,
            queued_replicas: Vec::new(),
        },
        r#"{"replicas":[2,1],"leader":2,"leader_epoch":7,"isr":[2],"elr":[1]}"#,
    );
    assert_golden(
        &PartitionValue {
            replicas: vec![BrokerId(2), BrokerId(1)],
            leader: None,
            leader_epoch: LeaderEpoch(8),
            isr: vec![BrokerId(2)],
            elr: vec![],
            adding: vec![BrokerId(2)],
            removing: vec![BrokerId(1)],
            removal_count: 3,
            unclean_epoch: Some(LeaderEpoch(5)),
            discard_local: true,
            queued_replicas: [3, 2].map(BrokerId).to_vec(),
        },
        r#"{"replicas":[2,1],"leader":null,"leader_epoch":8,"isr":[2],"elr":[],"adding":[2],"removing":[1],"removal_count":3,"unclean_epoch":5,"discard_local":true,"queued_replicas":[3,2]}"#,
    );
    assert_golden(
        &TierState {
            manifest: None,
            tiered_end: Offset::new(10).expect("small"),
            log_start: Offset::new(10).expect("small"),
            epoch: LeaderEpoch(7),
            bytes: 0,
        },
        r#"{"manifest":null,"tiered_end":10,"log_start":10,"epoch":7,"bytes":0}"#,
    );
    assert_golden(&ProducerIdsValue { next: 2000 }, r#"{"next":2000}"#);
    assert_golden(
        &StoreBinding {
            id: uuid::uuid!("6f1c2a9e-0000-4000-8000-0123456789ab"),
            url: "s3://b/p at http://s3:9000".to_owned(),
            pending: false,
        },
        r#"{"id":"6f1c2a9e-0000-4000-8000-0123456789ab","url":"s3://b/p at http://s3:9000"}"#,
    );
}

#[test]
fn paths_are_as_documented_and_parse_back() {
    let id = PartitionId::new(topic(), 12);
    for (key, path) in [
        (Key::Broker(BrokerId(7)), "/strandline/blue/brokers/7"),
        (Key::Controller, "/strandline/blue/controller"),
        (Key::Topic("orders".parse().expect("valid")), "/strandline/blue/topics/orders"),
        (Key::Partition(id), "/strandline/blue/partitions/6f1c2a9e-0000-4000-8000-0123456789ab/12"),
        (Key::Tier(id), "/strandline/blue/tier/6f1c2a9e-0000-4000-8000-0123456789ab/12"),
        (Key::Tombstone(topic()), "/strandline/blue/deleted/6f1c2a9e-0000-4000-8000-0123456789ab"),
        (Key::ProducerIds, "/strandline/blue/producer-ids"),
        (Key::ProducerIdKey, "/strandline/blue/producer-id-key"),
        (Key::ObjectStore, "/strandline/blue/object-store"),
    ] {
        assert_eq!(keys().path(&key), path);
        assert_eq!(keys().parse(path), Some(key));
    }
}

#[test]
fn foreign_paths_are_not_parsed() {
    for path in [
        "",
        "/strandline/red/controller",
        "/strandline/blue",
        "/strandline/blue/",
        "/strandline/blue/brokers/",
        "/strandline/blue/brokers/01",
        "/strandline/blue/brokers/+1",
        "/strandline/blue/brokers/4294967296",
        "/strandline/blue/topics/..",
        "/strandline/blue/topics/a/b",
        "/strandline/blue/groups/g",
        "/strandline/blue/partitions/6f1c2a9e-0000-4000-8000-0123456789ab",
        "/strandline/blue/partitions/6F1C2A9E-0000-4000-8000-0123456789AB/1",
        "/strandline/blue/partitions/6f1c2a9e-0000-4000-8000-0123456789ab/100000",
        "/strandline/blue/partitions/6f1c2a9e-0000-4000-8000-0123456789ab/4294967295",
    ] {
        assert_eq!(keys().parse(path), None, "{path}");
    }
    for name in ["", "a/b", "a b", "ü", &"x".repeat(101)] {
        assert!(Keys::new(name).is_err(), "{name}");
    }
}

#[test]
fn contradictory_values_are_rejected_with_reason() {
    let partition = |json: &str| PartitionValue::decode("the/key", json.as_bytes()).expect_err(json).to_string();
    for (json, reason) in [
        (r#"{"replicas":[],"leader":null,"leader_epoch":0,"isr":[]}"#, "replicas is empty"),
        (r#"{"replicas":[1,1],"leader":1,"leader_epoch":0,"isr":[1]}"#, "twice"),
        (r#"{"replicas":[1],"leader":2,"leader_epoch":0,"isr":[1]}"#, "leader 2 is not in isr"),
        (r#"{"replicas":[1],"leader":1,"leader_epoch":0,"isr":[1,9]}"#, "broker 9 is in isr"),
        (r#"{"replicas":[1,2],"leader":1,"leader_epoch":0,"isr":[1,2],"elr":[2]}"#, "broker 2 is in isr twice"),
        (r#"{"replicas":[1],"leader":1,"leader_epoch":0,"isr":[1,1]}"#, "broker 1 is in isr twice"),
        (r#"{"replicas":[1],"leader":1,"leader_epoch":4294967295,"isr":[1]}"#, "leader_epoch"),
        (r#"{"replicas":[1],"leader":1,"leader_epoch":0}"#, "isr"),
        ("not json", "expected"),
        ("", "EOF"),
    ] {
        let error = partition(json);
        assert!(error.contains("the/key") && error.contains(reason), "{error}");
    }
    let broker = |json: &str| BrokerValue::decode("k", json.as_bytes());
    let listener = |name: &str, protocol: &str| {
        format!(
            r#"{{"listeners":{{"{name}":{{"protocol":"{protocol}","address":"a:1"}}}},"directory_id":"d","version":"0"}}"#
        )
    };
    assert_eq!(broker(&listener("client", "grpc")).expect("valid").listeners.client(), "a:1");
    for newer in [r#"{"protocol":{"name":"x"}}"#, r#"{"protocol":"grpc"}"#, r#"{"protocol":"x","address":"a:2"}"#, "7"]
    {
        let json = listener("client", "grpc").replace(r#""client":"#, &format!(r#""tls":{newer},"client":"#));
        assert_eq!(broker(&json).expect(newer).listeners.client(), "a:1");
    }
    for json in [listener("peer", "grpc"), listener("client", "of-a-newer-version")] {
        let error = broker(&json).expect_err(&json).to_string();
        assert!(error.contains("no gRPC address for clients"), "{error}");
    }
    let tier = |json: &str| TierState::decode("k", json.as_bytes());
    assert!(tier(r#"{"manifest":null,"tiered_end":9223372036854775808,"log_start":0,"epoch":0}"#).is_err());
    assert!(tier(r#"{"manifest":null,"tiered_end":5,"log_start":0,"epoch":0}"#).is_err());
    assert!(tier(r#"{"manifest":null,"tiered_end":0,"log_start":5,"epoch":0}"#).is_ok());
    let topic = r#"{"id":"6f1c2a9e-0000-4000-8000-0123456789ab","partitions":4294967295,"replication_factor":1}"#;
    assert!(TopicValue::decode("k", topic.as_bytes()).is_err());
    assert!(ProducerIdsValue::decode("k", br#"{"next":-1}"#).is_err());
    assert!(ProducerIdsValue::decode("k", br#"{"next":274877906944}"#).is_ok());
    assert!(ProducerIdsValue::decode("k", br#"{"next":274877906945}"#).is_err());
}
