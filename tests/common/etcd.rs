//! Real etcd clusters on this machine, one for each test. A drop of [`Etcd`] ends its processes.
//!
//! The library's own tests and the tests of real brokers share this file, which depends on neither.

use std::{
    fs::File,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::ports::free_port;

/// A cluster of etcd members, which are numbered from 0.
pub(crate) struct Etcd {
    folder: TempDir,
    members: Vec<Member>,
    flags: Vec<String>,
    scheme: &'static str,
}

struct Member {
    host: MemberHost,
    /// Ports for clients and for the other members.
    ports: (u16, u16),
    /// `None` while the member is stopped.
    process: Option<Child>,
}

/// Address and network namespace of a member.
pub(crate) struct MemberHost {
    pub(crate) ip: Ipv4Addr,
    /// Name of the network namespace; `None` for the namespace of the test process.
    pub(crate) namespace: Option<String>,
}

/// Returns the path of the etcd program. `tests/fetch-etcd` downloads it if necessary.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let fetched = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fetch-etcd")).output();
        let fetched = fetched.expect("tests/fetch-etcd runs");
        assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
        PathBuf::from(String::from_utf8(fetched.stdout).expect("the path is UTF-8").trim_end())
    })
}

/// Returns a command that runs a program in a network namespace. The process id is that of the program, because `ip`
/// executes it.
pub(crate) fn in_namespace(namespace: Option<&str>, program: &Path) -> Command {
    let Some(namespace) = namespace else { return Command::new(program) };
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program);
    command
}

impl Etcd {
    /// Starts a cluster on the loopback interface. `scheme` is `http` or `https` and applies to clients; `flags` are
    /// further command-line flags of each member. Does not wait until the cluster responds.
    pub(crate) fn begin(members: usize, scheme: &'static str, flags: &[String]) -> Self {
        let host = || MemberHost { ip: Ipv4Addr::LOCALHOST, namespace: None };
        let members = (0..members).map(|_| Member { host: host(), ports: (free_port(), free_port()), process: None });
        Self::start(members.collect(), scheme, flags)
    }

    /// Starts a cluster with one member on each of these hosts. Does not wait until the cluster responds.
    pub(crate) fn on_hosts(hosts: Vec<MemberHost>) -> Self {
        let members = hosts.into_iter().map(|host| Member { host, ports: (2379, 2380), process: None });
        Self::start(members.collect(), "http", &[])
    }

    fn start(members: Vec<Member>, scheme: &'static str, flags: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let mut etcd = Self { folder, members, flags: flags.to_vec(), scheme };
        etcd.run_all();
        etcd
    }

    /// Starts a member with the data on its disk, or with an empty data directory.
    pub(crate) fn run(&mut self, number: usize) {
        let peer = |number: usize| {
            let Member { host, ports, .. } = &self.members[number];
            format!("http://{}:{}", host.ip, ports.1)
        };
        let cluster: Vec<_> = (0..self.members.len()).map(|number| format!("m{number}={}", peer(number))).collect();
        let log = File::create(self.folder.path().join(format!("m{number}.log"))).expect("the log file is created");
        let process = in_namespace(self.members[number].host.namespace.as_deref(), program())
            .args(["--name", &format!("m{number}"), "--logger", "zap", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(self.folder.path().join(format!("m{number}")))
            .args(["--listen-client-urls", &self.endpoint(number), "--advertise-client-urls", &self.endpoint(number)])
            .args(["--listen-peer-urls", &peer(number), "--initial-advertise-peer-urls", &peer(number)])
            .args(["--initial-cluster", &cluster.join(","), "--initial-cluster-token", &cluster[0]])
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("etcd starts");
        self.members[number].process = Some(process);
    }

    /// Returns the client URL of a member.
    pub(crate) fn endpoint(&self, number: usize) -> String {
        let Member { host, ports, .. } = &self.members[number];
        format!("{}://{}:{}", self.scheme, host.ip, ports.0)
    }

    /// Returns the client URLs of all members.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|number| self.endpoint(number)).collect()
    }

    /// Kills a member and waits for its exit, so that its ports are free.
    pub(crate) fn kill(&mut self, number: usize) {
        let mut process = self.members[number].process.take().expect("the member is running");
        process.kill().expect("the process is a child");
        process.wait().expect("the process is a child");
    }

    /// Kills every member.
    pub(crate) fn kill_all(&mut self) {
        (0..self.members.len()).for_each(|number| self.kill(number));
    }

    /// Copies the data of all members to the backup `name`. The members must be stopped.
    pub(crate) fn back_up(&self, name: &str) {
        for number in 0..self.members.len() {
            let member = self.folder.path().join(format!("m{number}"));
            copy_folder(&member, &self.folder.path().join(name).join(format!("m{number}")));
        }
    }

    /// Replaces the data of all members with the backup `name`. The members must be stopped.
    pub(crate) fn restore(&self, name: &str) {
        for number in 0..self.members.len() {
            let member = self.folder.path().join(format!("m{number}"));
            std::fs::remove_dir_all(&member).expect("the member has data");
            copy_folder(&self.folder.path().join(name).join(format!("m{number}")), &member);
        }
    }

    /// Deletes the data of all members and changes the cluster token, so that the next start creates an empty cluster
    /// with another id. The members must be stopped.
    pub(crate) fn replace(&mut self) {
        for number in 0..self.members.len() {
            std::fs::remove_dir_all(self.folder.path().join(format!("m{number}"))).expect("the member has data");
        }
        self.flags.extend(["--initial-cluster-token", "another"].map(str::to_owned));
    }

    /// Starts every member: see [`Self::run`].
    pub(crate) fn run_all(&mut self) {
        (0..self.members.len()).for_each(|number| self.run(number));
    }

    /// Freezes a member, as a frozen machine does: its connections stay open, and it sends nothing.
    pub(crate) fn freeze(&self, number: usize) {
        kill_process(self.pid(number), Signal::STOP).expect("the process is a child");
    }

    /// Resumes a frozen member.
    pub(crate) fn thaw(&self, number: usize) {
        kill_process(self.pid(number), Signal::CONT).expect("the process is a child");
    }

    fn pid(&self, number: usize) -> Pid {
        Pid::from_child(self.members[number].process.as_ref().expect("the member is running"))
    }

    /// Returns the log output of all members, of each since its last start.
    pub(crate) fn logs(&self) -> String {
        let log =
            |number| std::fs::read_to_string(self.folder.path().join(format!("m{number}.log"))).unwrap_or_default();
        (0..self.members.len()).map(log).collect::<Vec<_>>().join("\n")
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("the folder is created");
    for entry in std::fs::read_dir(from).expect("the folder is readable") {
        let entry = entry.expect("the folder is readable");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("the entry has a type").is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("the disk is not full");
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for process in self.members.iter_mut().filter_map(|member| member.process.as_mut()) {
            // SIGKILL also ends a frozen process. Either call may fail if the process has exited already.
            let _exited = process.kill();
            let _exited = process.wait();
        }
    }
}
