//! What answers are made of.

use super::{super::tests::Bench, *};
use crate::{broker::ProducerIdQuota, model::TopicName};

/// Found by review: a batch as large as a message was read again and again, and each time something small had come first.
#[tokio::test]
async fn what_does_not_fit_into_one_answer_begins_the_next() {
    const MESSAGE: usize = 2500;
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 2).await;
    bench.append(0, 100, 0).await.unwrap();
    bench.append(1, 2400, 0).await.unwrap();
    let terms = Terms { message_bytes: MESSAGE, ..Terms::new(1, 0, 0) };
    let mut session = Session::new(Arc::clone(&bench.broker), terms, bench.broker.call_memory());
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    session.assign(vec![want(0), want(1)], true, false).unwrap();
    let answered = |gathered: &Gathered| gathered.partitions.iter().map(|of| of.partition).collect::<Vec<_>>();

    let mut gathered = Gathered::default();
    for (index, place) in [0, 1].map(|index| (index, session.places[index].reader.clone().unwrap())) {
        let read = place.read(Offset::ZERO, MESSAGE).await;
        session.absorb((index, read), &mut gathered);
    }
    assert!(answered(&gathered) == [0] && gathered.full && gathered.is_enough(terms.min_bytes));
    bench.append(0, 100, 0).await.unwrap();
    let mut gathered = Gathered::default();
    session.gather_now(&mut gathered);
    assert_eq!(answered(&gathered)[0], 1, "the small one waits this time");
    assert!(gathered.bytes <= MESSAGE);

    // Whoever begins anew loses nothing by what was held.
    session.assign(vec![want(0), want(1)], true, false).unwrap();
    let read = session.places[1].reader.clone().unwrap().read(Offset::ZERO, MESSAGE).await;
    session.absorb((1, read), &mut Gathered { bytes: 200, ..Gathered::default() });
    session.assign(vec![want(1)], false, false).unwrap();
    assert_eq!(session.places[0].position, Offset::ZERO, "it was not given yet");
    bench.stop().await;
}

/// A set of 6 MB that named one partition 10,000 times held up appends for 15 s.
#[tokio::test]
async fn fetch_set_names_each_partition_once() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 2).await;
    let mut session = Session::new(Arc::clone(&bench.broker), Terms::new(1, 0, 0), bench.broker.call_memory());
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    session.assign(vec![want(0), want(1)], true, false).unwrap();
    let fault = session.assign(vec![want(0), want(1), want(0)], true, false).unwrap_err();
    assert_eq!(fault.reason, Reason::InvalidRequest);
    assert!(fault.message.contains("\"t\", partition 0 is named twice"), "{fault}");
    bench.stop().await;
}

#[tokio::test]
async fn read_answers_every_partition_with_its_marks() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 2).await;
    bench.append(1, 100, 0).await.unwrap();
    let want =
        |partition, offset| v1::FetchPartition { topic: "t".to_owned(), partition, offset, ..Default::default() };
    let request = v1::ReadRequest { partitions: vec![want(0, 0), want(1, 1)], ..Default::default() };
    let mut answer = Arc::clone(&bench.broker).read(request, bench.broker.call_memory()).await.unwrap();
    answer.partitions.sort_by_key(|fetched| fetched.partition);
    let marks = |fetched: &v1::FetchedPartition| (fetched.next_offset, fetched.high_watermark, fetched.error.is_none());
    assert_eq!(answer.partitions.iter().map(marks).collect::<Vec<_>>(), [(0, 0, true), (1, 1, true)]);
    let request = v1::ReadRequest { partitions: vec![want(1, 7)], ..Default::default() };
    let answer = Arc::clone(&bench.broker).read(request, bench.broker.call_memory()).await.unwrap();
    let refused = &answer.partitions[0];
    assert_eq!(refused.error.as_ref().map(|error| error.reason.as_str()), Some("OFFSET_OUT_OF_RANGE"));
    assert_eq!(refused.high_watermark, 1);
    bench.stop().await;
}

/// A consumer that was away while its topic was made again went on at its old offset, and skipped the new topic's first records.
#[tokio::test]
async fn topic_made_again_is_refused_to_whoever_names_the_old_id() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    let old = bench.create(&name, 1).await;
    bench.broker.topics.delete(&name).await.unwrap();
    bench.broker.hosted.until(|hosted| hosted.topic(&name).is_none()).await;
    let new = bench.create(&name, 1).await;
    bench.append(0, 100, 0).await.unwrap();
    let read = async |id: String| {
        let want = v1::FetchPartition { topic: "t".to_owned(), topic_id: id, ..Default::default() };
        let request = v1::ReadRequest { partitions: vec![want], ..Default::default() };
        let mut answer = Arc::clone(&bench.broker).read(request, bench.broker.call_memory()).await.unwrap();
        answer.partitions.remove(0).error.map(Fault::from)
    };
    let fault = read(old.to_string()).await.expect("another topic");
    assert_eq!((fault.reason, fault.retryable), (Reason::TopicIdMismatch, false));
    assert_eq!((&fault.metadata["topic_id"], &fault.metadata["asked"]), (&new.to_string(), &old.to_string()));
    assert_eq!(read(new.to_string()).await, None);
    assert_eq!(read(String::new()).await, None, "whichever has the name");
    assert_eq!(read("x".to_owned()).await.map(|fault| fault.reason), Some(Reason::InvalidRequest));
    let (quota, memory) = (ProducerIdQuota::default(), bench.broker.call_memory());
    let append = |topic_id: String| {
        let records = vec![v1::Record::default()];
        let payload = Some(v1::append_request::Payload::Records(v1::PlainRecords { records }));
        let request = v1::AppendRequest { topic: "t".to_owned(), payload, topic_id, ..Default::default() };
        bench.broker.append(request, &quota, &memory)
    };
    assert_eq!(append(old.to_string()).await.map_err(|fault| fault.reason), Err(Reason::TopicIdMismatch));
    assert_eq!(append(new.to_string()).await.map(|appended| appended.base_offset), Ok(1));
    bench.stop().await;
}
