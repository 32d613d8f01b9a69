//! Three real brokers that agree through a real etcd: what they acknowledged is there whatever happens to one of them, and a start that
//! cannot come true says why.

use std::{
    fs,
    io::Write as _,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{
    broker::{Broker, Cli, Home},
    damage::lines,
    etcd::Etcd,
    patience::eventually,
};

/// Brokers 1, 2, … with one bucket.
struct Cluster {
    etcd: Etcd,
    homes: Vec<Home>,
    brokers: Vec<Option<Broker>>,
}

impl Cluster {
    fn start(brokers: u32) -> Self {
        let etcd = Etcd::start();
        let mut homes: Vec<Home> = (1..=brokers).map(|id| Home::member(id, &etcd)).collect();
        let bucket = homes[0].bucket();
        homes = homes.into_iter().map(|home| home.bucket_of(&bucket)).collect();
        let brokers = homes.iter_mut().map(|home| Some(home.start())).collect();
        Self { etcd, homes, brokers }
    }

    /// A command line that knows all of them.
    fn cli(&self) -> Cli {
        let addresses: Vec<String> = self.homes.iter().map(|home| home.grpc().to_string()).collect();
        self.homes[0].cli().pointed_at(&addresses.join(","))
    }

    fn partition(&self, topic: &str) -> Value {
        self.cli().ok(&["topic", "describe", topic, "--output", "json"]).json()["partitions"][0].clone()
    }

    /// Who leads partition 0, once somebody does.
    fn leader(&self, topic: &str) -> usize {
        eventually("somebody leads", || {
            let leader = self.partition(topic)["leader"].as_u64()?;
            usize::try_from(leader - 1).ok()
        })
    }

    /// Waits until all replicas of partition 0 are in sync.
    fn whole(&self, topic: &str, replicas: usize) {
        eventually("all replicas are in sync", || {
            (self.partition(topic)["isr"].as_array()?.len() == replicas).then_some(())
        });
    }

    fn create(&self, topic: &str, replicas: usize, config: &[&str]) {
        let config: Vec<&str> = config.iter().flat_map(|one| ["--config", *one]).collect();
        let replicas = replicas.to_string();
        self.cli().ok(&[&["topic", "create", topic, "--replication-factor", &replicas][..], &config].concat());
    }

    fn holds(&self, topic: &str, expected: &str) {
        let read = self.cli().ok(&["consume", topic, "--from", "earliest", "--until-end"]);
        assert!(read.stdout == expected.as_bytes(), "{} of {} bytes", read.stdout.len(), expected.len());
    }

    fn kill(&mut self, broker: usize) {
        self.brokers[broker].take().expect("it runs").kill9();
    }

    fn run(&mut self, broker: usize) {
        self.brokers[broker] = Some(self.homes[broker].start());
    }

    /// Feeds lines slowly to a producer, and waits at its end until all are acknowledged.
    fn load(&self, topic: &str, count: usize) -> Load {
        let mut child = self
            .cli()
            .command(&["produce", topic])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut stdin = child.stdin.take().expect("piped");
        let text = lines(count);
        let feed = strandline::task::thread("load", move || {
            for line in text.split_inclusive('\n') {
                stdin.write_all(line.as_bytes()).expect("the producer reads");
                thread::sleep(Duration::from_millis(2));
            }
        });
        Load { child, feed, expected: lines(count) }
    }
}

/// A producer at work.
struct Load {
    child: Child,
    feed: thread::JoinHandle<()>,
    expected: String,
}

impl Load {
    /// Waits until everything was acknowledged. Returns what was sent.
    fn end(self) -> String {
        self.feed.join().expect("everything was fed");
        let output = self.child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.expected
    }
}

#[test]
fn what_was_acknowledged_outlives_any_broker_that_is_killed_under_load() {
    let mut cluster = Cluster::start(3);
    cluster.create("t", 3, &["min.insync.replicas=2"]);
    let load = cluster.load("t", 3000);
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(500));
        let leader = cluster.leader("t");
        let epoch = cluster.partition("t")["leader_epoch"].as_i64().expect("a number");
        cluster.kill(leader);
        eventually("another one leads", || {
            let now = cluster.partition("t");
            (now["leader"].as_u64()? != leader as u64 + 1 && now["leader_epoch"].as_i64()? > epoch).then_some(())
        });
        cluster.run(leader);
        cluster.whole("t", 3);
    }
    let sent = load.end();
    cluster.holds("t", &sent);
    let log = cluster.homes.iter().map(Home::log).collect::<String>();
    assert!(log.contains("a broker's process is gone"), "noticed by evidence, not by the lease's end");
}

#[test]
fn a_rolling_restart_fails_no_write_and_loses_none() {
    let mut cluster = Cluster::start(3);
    cluster.create("t", 3, &["min.insync.replicas=2"]);
    let load = cluster.load("t", 2500);
    for broker in 0..3 {
        thread::sleep(Duration::from_millis(300));
        let status = cluster.brokers[broker].take().expect("it runs").terminate();
        assert!(status.success(), "{}", cluster.homes[broker].log());
        assert!(cluster.homes[broker].log().contains("others lead what this broker led"));
        cluster.run(broker);
        cluster.whole("t", 3);
    }
    cluster.holds("t", &load.end());
}

#[test]
fn a_broker_that_lost_its_disk_gives_up_its_memberships_and_copies_again() {
    let mut cluster = Cluster::start(3);
    cluster.create("t", 3, &["segment.bytes=65536", "local.retention.bytes=0"]);
    let text = lines(20_000);
    cluster.cli().ok_with(&["produce", "t"], text.as_bytes());
    let victim = cluster.leader("t");
    cluster.kill(victim);
    fs::remove_dir_all(cluster.homes[victim].data_dir()).expect("its disk is gone");
    cluster.run(victim);
    assert!(cluster.homes[victim].log().contains("its replicas are copied anew"));
    cluster.whole("t", 3);
    // The others die: what it copied is what there is.
    for other in (0..3).filter(|other| *other != victim) {
        cluster.kill(other);
        eventually("one broker less is in sync", || {
            (cluster.partition("t")["isr"].as_array()?.len() <= 2).then_some(())
        });
    }
    eventually("it leads", || (cluster.partition("t")["leader"].as_u64()? == victim as u64 + 1).then_some(()));
    cluster.holds("t", &text);
}

#[test]
fn brokers_go_on_without_etcd_and_need_no_restart_when_it_is_back() {
    let mut cluster = Cluster::start(3);
    cluster.create("t", 3, &["min.insync.replicas=2"]);
    for round in 0..2 {
        if round == 0 {
            cluster.etcd.freeze()
        } else {
            cluster.etcd.kill()
        }
        // Longer than the leases live.
        for _ in 0..4 {
            cluster.cli().ok_with(&["produce", "t"], lines(500).as_bytes());
            thread::sleep(Duration::from_secs(1));
        }
        if round == 0 {
            cluster.etcd.thaw()
        } else {
            cluster.etcd.run()
        }
        cluster.create(&format!("after-{round}"), 3, &[]);
    }
    cluster.whole("t", 3);
    cluster.holds("t", &lines(500).repeat(8));
    assert!(cluster.brokers.iter_mut().flatten().all(Broker::is_running));
}

#[test]
fn a_broker_without_the_partition_says_who_leads_it() {
    let cluster = Cluster::start(2);
    cluster.create("t", 1, &[]);
    let leader = cluster.leader("t");
    let other = 1 - leader;
    // A command that is pointed at the other one alone finds its way, by metadata and by what it is told.
    let cli = cluster.homes[other].cli();
    cli.ok_with(&["produce", "t"], b"one\n");
    let state = cli.ok(&["topic", "describe", "t", "--output", "json"]).json();
    assert_eq!(state["partitions"][0]["leader"], leader as u64 + 1);
    assert_eq!(cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).stdout, b"one\n");
}

#[test]
fn a_start_waits_for_etcd_in_words_and_can_be_stopped_while_it_waits() {
    let mut etcd = Etcd::absent();
    let home = Home::member(1, &etcd);
    let waits = |times: usize| {
        eventually("it says what it waits for", || {
            (home.log().matches("waiting for the metadata store").count() >= times).then_some(())
        });
    };
    let broker = home.spawn();
    waits(1);
    assert!(home.log().contains(&etcd.endpoint()), "{}", home.log());
    assert!(broker.terminate().success(), "{}", home.log());
    let mut broker = home.spawn();
    waits(2);
    etcd.run();
    broker.wait_ready().expect("etcd is there now");
    assert!(broker.terminate().success(), "{}", home.log());
}

#[test]
fn an_etcd_that_never_heard_of_this_directory_is_refused() {
    let first = Etcd::start();
    let mut home = Home::member(1, &first);
    let broker = home.start();
    home.cli().ok(&["topic", "create", "t"]);
    home.cli().ok_with(&["produce", "t"], b"one\n");
    assert!(broker.terminate().success());
    let second = Etcd::start();
    home = home.at_etcd(&second);
    assert!(!home.spawn().wait().success());
    assert!(home.log().contains("is metadata.etcd another cluster's?"), "{}", home.log());
    home = home.at_etcd(&first);
    let broker = home.start();
    assert_eq!(home.cli().ok(&["consume", "t", "--from", "earliest", "--until-end"]).stdout, b"one\n");
    assert!(broker.terminate().success());
}

#[test]
fn a_number_that_another_broker_has_is_refused_with_its_address() {
    let etcd = Etcd::start();
    let mut first = Home::member(1, &etcd);
    let mut running = first.start();
    let second = Home::member(1, &etcd);
    assert!(!second.spawn().wait().success());
    let told = format!("broker id 1 is taken by a broker at {}", first.grpc());
    assert!(second.log().contains(&told), "{}", second.log());
    assert!(running.is_running(), "the one who has it is not disturbed");
}

#[test]
fn of_two_processes_with_one_directory_one_ends_and_says_why() {
    let etcd = Etcd::start();
    let mut first = Home::member(1, &etcd);
    let mut running = first.start();
    let second = Home::member(1, &etcd);
    copy(&first.data_dir(), &second.data_dir());
    let mut later = second.spawn();
    // Most often the later one wins; not if the first one registers again while the later one proves itself.
    let log = eventually("one of them ends", || match (running.is_running(), later.is_running()) {
        (false, true) => Some(first.log()),
        (true, false) => Some(second.log()),
        _ => None,
    });
    assert!(log.contains("with a copy of this data directory; one of the two must go"), "{log}");
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copied");
        }
    }
}
