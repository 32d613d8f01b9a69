//! A real etcd of one member, for one test. It ends with its value.

use std::{
    fs::File,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    broker::{free_address, http_get},
    patience::eventually,
};

/// One member with its data.
pub(crate) struct Etcd {
    folder: tempfile::TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Child>,
}

/// Where the program is: `tests/fetch-etcd` sees to that there is one.
fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let fetched = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fetch-etcd")).output();
        let fetched = fetched.expect("tests/fetch-etcd runs");
        assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
        PathBuf::from(String::from_utf8(fetched.stdout).expect("a path").trim_end())
    })
}

impl Etcd {
    /// One that answers.
    pub(crate) fn start() -> Self {
        let mut etcd = Self::absent();
        etcd.run();
        etcd
    }

    /// One that does not run yet.
    pub(crate) fn absent() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self { folder, client: free_address(), peer: free_address(), process: None }
    }

    /// Starts it on the data that it has, and waits until it answers.
    pub(crate) fn run(&mut self) {
        let (client, peer) = (self.endpoint(), format!("http://{}", self.peer));
        let log = File::create(self.folder.path().join("etcd.log")).expect("a file");
        let process = Command::new(program())
            .args(["--logger", "zap", "--log-level", "warn", "--data-dir"])
            .arg(self.folder.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.process = Some(process.expect("etcd runs"));
        eventually("etcd answers", || http_get(self.client, "/health").ok().filter(|(code, _)| *code == 200));
    }

    /// Kills it; its data stays.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("it is ours");
            process.wait().expect("it is ours");
        }
    }

    /// Freezes it: connections stay open, and nothing comes from it.
    pub(crate) fn freeze(&self) {
        kill_process(self.pid(), Signal::STOP).expect("it is ours");
    }

    pub(crate) fn thaw(&self) {
        kill_process(self.pid(), Signal::CONT).expect("it is ours");
    }

    fn pid(&self) -> Pid {
        Pid::from_child(self.process.as_ref().expect("it runs"))
    }

    /// Its URL for clients.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.client)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
