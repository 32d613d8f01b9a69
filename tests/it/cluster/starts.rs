//! Starts of brokers in a cluster: starts that wait and log the reason, and starts that are refused.

use std::fs;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, Permission, PermissionType, TlsOptions};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::members::{Cluster, etcd};
use crate::{
    broker::{Broker, BrokerInstance, http_get},
    etcd::Etcd,
    test_timeout::eventually,
};

/// Starts a broker, creates topic `t` and appends one record to it.
fn start_with_record(instance: &mut BrokerInstance) -> Broker {
    let broker = instance.start();
    instance.cli().ok(&["topic", "create", "t"]);
    instance.cli().ok_with(&["produce", "t"], b"one\n");
    broker
}

fn check_record(instance: &BrokerInstance) {
    assert_eq!(instance.cli().ok(&["consume", "t", "--from", "earliest", "--until-end"]).stdout, b"one\n");
}

#[test]
fn broker_without_the_partition_names_its_leader() {
    let cluster = Cluster::start(2);
    cluster.cli().ok(&["topic", "create", "t"]);
    let leader = cluster.leader("t", 0);
    // A command with only the other broker as bootstrap broker finds the leader, by metadata and by leader hints.
    let cli = cluster.instance(3 - leader).cli();
    cli.ok_with(&["produce", "t"], b"one\n");
    let state = cli.ok(&["topic", "describe", "t", "--output", "json"]).json();
    assert_eq!(state["partitions"][0]["leader"], leader);
    assert_eq!(cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).stdout, b"one\n");
}

/// Starts a cluster of two brokers with a topic. Returns the cluster, the leader, and the follower, which was killed
/// and has missed a record. `set` changes the settings of both brokers.
fn start_with_late_replica(set: impl Fn(BrokerInstance) -> BrokerInstance) -> (Cluster, u32, u32) {
    // The lease is so long that a frozen leader keeps it during this test.
    let mut cluster = Cluster::with(2, |instance| set(instance.setting("metadata.session_timeout", "\"60s\"")));
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "t", "--replication-factor", "2"]);
    cluster.wait_until_in_sync("t", 2);
    let leader = cluster.leader("t", 0);
    let late = 3 - leader;
    cluster.kill(late);
    cluster.wait_until_in_sync("t", 1);
    cli.ok_with(&["produce", "t"], b"what it misses\n");
    (cluster, leader, late)
}

/// A starting broker is ready only when its replicas are in sync. A rolling restart stops the next broker as soon as
/// `/readyz` of the last one reports ready.
#[test]
fn broker_is_ready_when_its_replicas_are_in_sync() {
    let (mut cluster, leader, late) = start_with_late_replica(|instance| instance);
    cluster.broker(leader).freeze(true);
    let lost = |cluster: &Cluster| cluster.instance(late).log().matches("lost the link to the leader's broker").count();
    let before = lost(&cluster);
    cluster.begin(late);
    let ready = |cluster: &Cluster| http_get(cluster.instance(late).http(), "/readyz").ok();
    let (code, page) =
        eventually("the start waits for replicas", || ready(&cluster).filter(|(_, page)| page.contains("replicas")));
    let reason = "not ready: starting: local replicas that have not been in sync yet: 1; ready in ";
    assert!(code == 503 && page.starts_with(reason), "{code} {page}");
    assert!(page.trim_end().ends_with(" s at the latest (broker.catch_up_timeout)"), "{page}");
    eventually("a subscription has failed", || (lost(&cluster) > before).then_some(()));
    assert_eq!(ready(&cluster).expect("the broker responds").0, 503, "the replica is not in sync");
    cluster.broker(leader).freeze(false);
    cluster.wait_until_ready();
    let isr = cluster.partitions("t")[0]["isr"].as_array().map(Vec::len);
    assert_eq!(isr, Some(2), "the replica is in sync when the broker is ready");
}

/// After `broker.catch_up_timeout` a broker is ready although its replica is not in sync. Without this timeout, a
/// rolling restart would wait forever for a leader that does not respond.
#[test]
fn start_ends_after_catch_up_timeout_without_sync() {
    let (mut cluster, leader, late) =
        start_with_late_replica(|instance| instance.setting("broker.catch_up_timeout", "\"15s\""));
    cluster.broker(leader).freeze(true);
    cluster.begin(late);
    let page = |cluster: &Cluster| http_get(cluster.instance(late).http(), "/readyz").ok();
    let waits = |(code, page): &(u16, String)| *code == 503 && page.contains("in sync");
    eventually("the start waits for its replica", || page(&cluster).filter(waits));
    eventually("the catch-up timeout passed", || page(&cluster).filter(|(code, _)| *code == 200));
    // No other leader was elected: the timeout has ended the start.
    assert_eq!(cluster.leader("t", 0), leader);
    cluster.broker(leader).freeze(false);
}

#[test]
fn start_without_etcd_logs_its_wait_and_can_be_stopped() {
    let mut etcd = Etcd::begin(1, "http", &[]);
    etcd.kill(0);
    let instance = BrokerInstance::member(1, &etcd);
    let waits = |times: usize| {
        eventually("the broker logs the reason of its wait", || {
            (instance.log().matches("waiting for the metadata store").count() >= times).then_some(())
        });
    };
    let broker = instance.spawn();
    waits(1);
    assert!(instance.log().contains(&etcd.endpoint(0)), "{}", instance.log());
    assert!(broker.terminate().success(), "{}", instance.log());
    let mut broker = instance.spawn();
    waits(2);
    etcd.run(0);
    broker.wait_ready().expect("etcd is running");
    assert!(broker.terminate().success(), "{}", instance.log());
}

#[test]
fn etcd_without_this_data_directory_is_refused() {
    let first = etcd(1);
    let mut instance = BrokerInstance::member(1, &first);
    let broker = start_with_record(&mut instance);
    assert!(broker.terminate().success());
    let second = etcd(1);
    instance = instance.at_etcd(&second);
    assert!(!instance.spawn().wait_for_exit().success());
    assert!(instance.log().contains("check that metadata.etcd names the right etcd"), "{}", instance.log());
    instance = instance.at_etcd(&first);
    let broker = instance.start();
    check_record(&instance);
    assert!(broker.terminate().success());
}

#[test]
fn data_directory_of_another_cluster_is_refused() {
    let etcd = etcd(1);
    let mut instance = BrokerInstance::member(1, &etcd);
    let broker = start_with_record(&mut instance);
    assert!(broker.terminate().success());
    // The broker uses the same etcd with another cluster name, and so another key prefix.
    let other = instance.of_cluster("other");
    assert!(!other.spawn().wait_for_exit().success());
    let log = other.log();
    assert!(log.contains("\"it\"") && log.contains("\"other\""), "{log}");
    let mut instance = other.of_cluster("it");
    let broker = instance.start();
    check_record(&instance);
    assert!(broker.terminate().success());
}

/// etcd requires a client certificate, and a user with a password. The broker reads both from files. The user has only
/// the permission that `docs/operations.md` names. Regression: with each renewal of its lease, the broker read a key
/// outside this permission.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_connects_to_etcd_with_certificate_and_password() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        path.to_str().expect("text").to_owned()
    };
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate");
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    // A certificate without a name, because etcd would use the name as a user name.
    params.distinguished_name = rcgen::DistinguishedName::new();
    let signed = params.signed_by(&key, &authority).expect("a certificate");
    let (ca, certificate, key) =
        (file("ca.pem", &authority.pem()), file("own.pem", &signed.pem()), file("own.key", &key.serialize_pem()));
    let flags = [
        "--client-cert-auth".to_owned(),
        format!("--cert-file={certificate}"),
        format!("--key-file={key}"),
        format!("--trusted-ca-file={ca}"),
    ];
    let etcd = Etcd::begin(3, "https", &flags);
    let read = |path: &str| fs::read(path).expect("the certificate exists");
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(read(&ca)))
        .identity(Identity::from_pem(read(&certificate), read(&key)));
    let mut root = Client::connect(etcd.endpoints(), Some(ConnectOptions::new().with_tls(tls))).await.expect("options");
    crate::test_timeout::eventually_async("etcd responds", || {
        let mut client = root.clone();
        async move { client.get("x", None).await.ok() }
    })
    .await;
    root.user_add("root", "root's", None).await.expect("etcd responds");
    root.user_grant_role("root", "root").await.expect("etcd responds");
    root.role_add("broker").await.expect("etcd responds");
    let permission = Permission::new(PermissionType::Readwrite, "/strandline/it/").with_prefix();
    root.role_grant_permission("broker", permission).await.expect("etcd responds");
    root.user_add("broker", "broker's", None).await.expect("etcd responds");
    root.user_grant_role("broker", "broker").await.expect("etcd responds");
    root.auth_enable().await.expect("etcd responds");
    tokio::task::block_in_place(|| {
        let password = file("password", "broker's\n");
        let instance = BrokerInstance::member(1, &etcd)
            .setting("metadata.etcd_ca", format!("{ca:?}"))
            .setting("metadata.etcd_cert", format!("{certificate:?}"))
            .setting("metadata.etcd_key", format!("{key:?}"))
            .setting("metadata.etcd_user", "\"broker\"");
        let mut instance = instance.setting("metadata.etcd_password_file", format!("{password:?}"));
        let broker = start_with_record(&mut instance);
        check_record(&instance);
        let reads = || instance.metric("strandline_metadata_requests_total{request=\"get\",outcome=\"ok\"}");
        let before = reads();
        eventually("two renewals have read a key", || (reads() >= before + 2.0).then_some(()));
        let (_, metrics) = http_get(instance.http(), "/metrics").expect("the broker responds");
        assert!(!metrics.contains("outcome=\"denied\""), "{metrics}");
        assert!(broker.terminate().success(), "{}", instance.log());
        // A wrong password ends the start and is not printed.
        fs::write(&password, "another user's\n").expect("written");
        assert!(!instance.spawn().wait_for_exit().success());
        let log = instance.log();
        assert!(log.contains("logging in as \"broker\"") && !log.contains("another user's"), "{log}");
    });
}

/// A broker whose object store is not the cluster's exits at its start, because no other broker would find its uploads.
/// Causes are a typing error in its URL, or a bucket of the same name at another service.
#[test]
fn broker_with_another_object_store_is_refused() {
    let mut cluster = Cluster::start(2);
    let elsewhere = tempfile::tempdir().expect("a folder");
    let third = cluster.new_instance(3).object_store_in(elsewhere.path());
    assert!(!third.spawn().wait_for_exit().success());
    let log = third.log();
    let urls = [cluster.object_store_dir(), elsewhere.path()].map(|folder| format!("file://{}", folder.display()));
    assert!(
        log.contains(&format!("{} is not the object store of this cluster, which is {}", urls[1], urls[0])),
        "{log}"
    );
    assert_eq!(fs::read_dir(elsewhere.path()).expect("a folder").count(), 0, "no file is written");
    let third = third.object_store_in(cluster.object_store_dir());
    cluster.add(3, third);
    cluster.wait_until_ready();
}

#[test]
fn broker_id_in_use_is_refused_with_its_address() {
    let etcd = etcd(1);
    let mut first = BrokerInstance::member(1, &etcd);
    let mut running = first.start();
    let second = BrokerInstance::member(1, &etcd).object_store_in(&first.object_store_dir());
    assert!(!second.spawn().wait_for_exit().success());
    let expected = format!("broker id 1 is taken by a broker at {}", first.grpc());
    assert!(second.log().contains(&expected), "{}", second.log());
    assert!(running.is_running(), "the process that uses the directory continues");
}

#[test]
fn copied_data_directory_makes_one_process_exit() {
    let etcd = etcd(1);
    let mut first = BrokerInstance::member(1, &etcd);
    let mut running = first.start();
    let second = BrokerInstance::member(1, &etcd).object_store_in(&first.object_store_dir());
    copy(&first.data_dir(), &second.data_dir());
    let mut later = second.spawn();
    // Usually the first process stays. The second one deletes the registration of the first one, which registers again
    // within milliseconds, while the second one still runs its startup verification.
    let log = eventually("one of the processes exits", || match (running.is_running(), later.is_running()) {
        (false, true) => Some(first.log()),
        (true, false) => Some(second.log()),
        _ => None,
    });
    assert!(log.contains("registered with the same broker id 1 and a copy of this data directory"), "{log}");
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else if let Err(error) = fs::copy(entry.path(), target) {
            // The broker that uses the directory may replace files during the copy.
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
        }
    }
}
