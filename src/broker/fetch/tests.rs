//! What answers are made of.

use super::{super::tests::Bench, *};
use crate::model::TopicName;

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
    let mut session = Session::new(Arc::clone(&bench.broker), terms);
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    session.assign(vec![want(0), want(1)], true, false).unwrap();
    let answered = |gathered: &Gathered| gathered.partitions.iter().map(|of| of.partition).collect::<Vec<_>>();

    let mut gathered = Gathered::default();
    for (index, place) in [0, 1].map(|index| (index, session.places[index].reader.clone().unwrap())) {
        let read = place.read(Offset::ZERO, MESSAGE).await;
        session.absorb((index, read), &mut gathered);
    }
    assert!(answered(&gathered) == [0] && gathered.full && gathered.is_enough(&terms));
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
