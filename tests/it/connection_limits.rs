//! A broker that gets more connections than its process may have open files.

use std::{future::Future, net::TcpStream};

use bytes::Bytes;
use strandline::proto::v1::{CreateTopicRequest, admin_client::AdminClient, log_client::LogClient};
use tonic::{Code, Status, transport::Channel};

use crate::{
    broker::{BrokerInstance, http_get},
    test_timeout::{eventually, eventually_async},
    wire,
};

/// Makes a call, and repeats it after a transport error: the broker may have closed the idle connection for a new one
/// at that moment. A topic that already exists counts as a success.
async fn call<T, F: Future<Output = Result<T, Status>>>(what: &str, attempt: impl Fn() -> F) {
    eventually_async(what, || async {
        match attempt().await {
            Ok(_) => Some(()),
            Err(status) if status.code() == Code::AlreadyExists => Some(()),
            Err(status) if status.message().contains("transport error") => None,
            Err(status) => panic!("{what}: {status}"),
        }
    })
    .await;
}

/// Creates a topic of two partitions.
async fn create(admin: &AdminClient<Channel>, name: &str) {
    let request = CreateTopicRequest { name: name.to_owned(), partitions: 2, ..Default::default() };
    call(name, || {
        let (mut admin, request) = (admin.clone(), request.clone());
        async move { admin.create_topic(request).await }
    })
    .await;
}

async fn append(log: &LogClient<Channel>, topic: &str, partition: i32) {
    let request = wire::append_plain(topic, partition, vec![Bytes::from_static(b"record")]);
    call("an append", || {
        let (mut log, request) = (log.clone(), request.clone());
        async move { log.append(request).await }
    })
    .await;
}

/// Without a free file descriptor, the switch to the next journal file fails, and with it the whole data directory.
/// Connections therefore never get the last descriptors, and connections that send nothing are closed after a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_take_no_open_files_from_the_log() {
    let mut instance = BrokerInstance::new().open_files(256);
    let mut broker = tokio::task::block_in_place(|| instance.start());
    let (log, admin) = (wire::log(instance.grpc()), wire::admin(instance.grpc()));
    create(&admin, "before").await;
    append(&log, "before", 0).await;

    let crowd: Vec<TcpStream> = (0..300)
        .filter_map(|number| TcpStream::connect(if number % 2 == 0 { instance.grpc() } else { instance.http() }).ok())
        .collect();
    assert!(crowd.len() > 250, "the system accepts the connections");
    // Requests on existing connections are served, also requests that need new files.
    for number in 0..20 {
        let topic = format!("crowded-{number}");
        create(&admin, &topic).await;
        for partition in 0..2 {
            append(&log, &topic, partition).await;
        }
    }
    // The broker closes accepted connections that send nothing. So new connections are served, although the idle
    // clients do not close their sockets.
    tokio::task::block_in_place(|| {
        let ready = || http_get(instance.http(), "/readyz").is_ok_and(|(code, _)| code == 200);
        eventually("a new client is served", || ready().then_some(()));
        eventually("the connections are no longer counted", || {
            (instance.metric("strandline_connections") <= 4.0).then_some(())
        });
    });
    let output = instance.log();
    assert!(output.contains("closing the longest idle connections for new ones"), "{output}");
    assert!(!output.contains("Too many open files"), "{output}");
    assert!(broker.is_running());
    drop(crowd);
}
