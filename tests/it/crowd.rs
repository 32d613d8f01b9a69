//! More connections than a process may have open files.

use std::net::TcpStream;

use bytes::Bytes;
use strandline::proto::v1::{CreateTopicRequest, admin_client::AdminClient};
use tonic::transport::Channel;

use crate::{
    broker::{Home, http_get},
    patience::eventually,
    wire,
};

/// Makes a topic of two partitions over a connection that is open.
async fn create(admin: &mut AdminClient<Channel>, name: &str) {
    let request = CreateTopicRequest { name: name.to_owned(), partitions: 2, ..Default::default() };
    admin.create_topic(request).await.expect("the topic is created");
}

/// With no open file left a turn of the journal fails, and with it the whole data directory. So strangers never get the last ones; and who
/// says nothing is shown out after a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_says_nothing_takes_no_open_files_from_the_log() {
    let mut home = Home::new().open_files(256);
    let mut broker = tokio::task::block_in_place(|| home.start());
    let (mut log, mut admin) = (wire::log(home.grpc()), wire::admin(home.grpc()));
    create(&mut admin, "before").await;
    wire::append(&mut log, wire::append_plain("before", 0, vec![Bytes::from_static(b"one")])).await.expect("it serves");

    let crowd: Vec<TcpStream> = (0..300)
        .filter_map(|number| TcpStream::connect(if number % 2 == 0 { home.grpc() } else { home.http() }).ok())
        .collect();
    assert!(crowd.len() > 250, "the system takes them, whatever the broker does");
    // Who was there before is served: also what needs new files.
    for number in 0..20 {
        let topic = format!("crowded-{number}");
        create(&mut admin, &topic).await;
        for partition in 0..2 {
            let record = vec![Bytes::from_static(b"two")];
            wire::append(&mut log, wire::append_plain(&topic, partition, record)).await.expect("it serves in a crowd");
        }
    }
    // Those who were let in and say nothing go, and newcomers are served though the crowd stays.
    tokio::task::block_in_place(|| {
        let ready = || http_get(home.http(), "/readyz").is_ok_and(|(code, _)| code == 200);
        eventually("a newcomer is served", || ready().then_some(()));
        eventually("they are counted no more", || (home.metric("strandline_connections") <= 4.0).then_some(()));
    });
    let said = home.log();
    assert!(said.contains("the connections that were idle longest are closed for new ones"), "{said}");
    assert!(!said.contains("Too many open files"), "{said}");
    assert!(broker.is_running());
    drop(crowd);
}
