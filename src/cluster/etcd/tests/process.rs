//! Real etcd clusters on this machine, for one test each. They end with the value that started them.

use std::{
    fs::File,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{
    cluster::etcd::{EtcdOptions, EtcdStore},
    task::clock,
};

/// How long a start may take on a machine that others keep busy.
const START: Duration = Duration::from_secs(60);

/// A cluster. Members are counted from 0.
pub(super) struct Etcd {
    folder: TempDir,
    members: Vec<Member>,
    flags: Vec<String>,
    scheme: &'static str,
}

struct Member {
    ports: (u16, u16),
    process: Option<Child>,
}

/// Where the program is: `tests/fetch-etcd` sees to that there is one.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let fetched = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fetch-etcd")).output();
        let fetched = fetched.expect("tests/fetch-etcd runs");
        assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
        PathBuf::from(String::from_utf8(fetched.stdout).expect("a path").trim_end())
    })
}

/// A port that is free. It lies below those that the kernel hands out by itself, so that no client's connection can take it
/// while a member is down.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Relaxed);
        let port = 12_000 + std::process::id().wrapping_mul(37).wrapping_add(step) % 18_000;
        let port = u16::try_from(port).expect("below 65,536");
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

impl Etcd {
    /// A cluster over plain HTTP that answers.
    pub(super) async fn start(members: usize) -> Self {
        let etcd = Self::begin(members, "http", &[]);
        etcd.answers(&etcd.store().await).await;
        etcd
    }

    /// A cluster whose clients come with `scheme`. It may not answer yet.
    pub(super) fn begin(members: usize, scheme: &'static str, flags: &[String]) -> Self {
        let members = (0..members).map(|_| Member { ports: (free_port(), free_port()), process: None }).collect();
        let folder = tempfile::tempdir().expect("a directory");
        let mut etcd = Self { folder, members, flags: flags.to_vec(), scheme };
        for place in 0..etcd.members.len() {
            etcd.run(place);
        }
        etcd
    }

    /// Starts a member on the data that it has.
    pub(super) fn run(&mut self, place: usize) {
        let peer = |place: usize| format!("http://127.0.0.1:{}", self.members[place].ports.1);
        let cluster: Vec<_> = (0..self.members.len()).map(|place| format!("m{place}={}", peer(place))).collect();
        let log = File::create(self.folder.path().join(format!("m{place}.log"))).expect("a file");
        let process = Command::new(program())
            .args(["--name", &format!("m{place}"), "--logger", "zap", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(self.folder.path().join(format!("m{place}")))
            .args(["--listen-client-urls", &self.endpoint(place), "--advertise-client-urls", &self.endpoint(place)])
            .args(["--listen-peer-urls", &peer(place), "--initial-advertise-peer-urls", &peer(place)])
            .args(["--initial-cluster", &cluster.join(","), "--initial-cluster-token", &cluster[0]])
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("etcd runs");
        self.members[place].process = Some(process);
    }

    pub(super) fn endpoint(&self, place: usize) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.members[place].ports.0)
    }

    pub(super) fn options(&self) -> EtcdOptions {
        EtcdOptions::new((0..self.members.len()).map(|place| self.endpoint(place)))
    }

    /// A store of all members, which are asked in their order at first.
    pub(super) async fn store(&self) -> EtcdStore {
        EtcdStore::open(self.options()).await.expect("good options")
    }

    /// Waits until every member answers, and one of them leads.
    pub(super) async fn answers(&self, store: &EtcdStore) {
        let end = clock::monotonic() + START;
        loop {
            let status = store.status().await;
            let ready = status.iter().all(|(_, answer)| answer.is_ok());
            if ready && status.iter().any(|(_, answer)| answer.as_ref().is_ok_and(|member| member.leader)) {
                return;
            }
            assert!(clock::monotonic() < end, "{status:?}\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The member that leads.
    pub(super) async fn leader(&self, store: &EtcdStore) -> usize {
        let leads = |(_, answer): &(String, Result<super::MemberStatus, String>)| {
            answer.as_ref().is_ok_and(|member| member.leader)
        };
        store.status().await.iter().position(leads).expect("one leads")
    }

    /// Kills a member and waits until it is gone, and its ports with it.
    pub(super) fn kill(&mut self, place: usize) {
        let mut process = self.members[place].process.take().expect("it runs");
        process.kill().expect("it is ours");
        process.wait().expect("it is ours");
    }

    /// Stops a member as a frozen machine would be: its connections stay open, and nothing comes from it.
    pub(super) fn freeze(&self, place: usize) {
        kill_process(self.pid(place), Signal::STOP).expect("it is ours");
    }

    pub(super) fn thaw(&self, place: usize) {
        kill_process(self.pid(place), Signal::CONT).expect("it is ours");
    }

    fn pid(&self, place: usize) -> Pid {
        Pid::from_child(self.members[place].process.as_ref().expect("it runs"))
    }

    fn logs(&self) -> String {
        let log = |place| std::fs::read_to_string(self.folder.path().join(format!("m{place}.log"))).unwrap_or_default();
        (0..self.members.len()).map(log).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for process in self.members.iter_mut().filter_map(|member| member.process.as_mut()) {
            // A frozen one dies too. What fails here fails because it is gone already.
            let _gone = process.kill();
            let _gone = process.wait();
        }
    }
}
