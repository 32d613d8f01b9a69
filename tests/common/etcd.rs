//! Real etcd clusters on this machine, for one test each. They end with the value that started them.
//!
//! Shared by the library's own tests and by those of real brokers; nothing here knows of either.

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

/// A cluster. Members are counted from 0.
pub(crate) struct Etcd {
    folder: TempDir,
    members: Vec<Member>,
    flags: Vec<String>,
    scheme: &'static str,
}

struct Member {
    place: Place,
    ports: (u16, u16),
    process: Option<Child>,
}

/// Where a member lives.
pub(crate) struct Place {
    pub(crate) ip: Ipv4Addr,
    /// The network namespace; the tests' own where there is none.
    pub(crate) namespace: Option<String>,
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

/// A program that is run in a network namespace. The process that is started becomes the program: its id is the program's.
pub(crate) fn in_namespace(namespace: Option<&str>, program: &Path) -> Command {
    let Some(namespace) = namespace else { return Command::new(program) };
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program);
    command
}

impl Etcd {
    /// A cluster on the loopback whose clients come with `scheme`. It may not answer yet.
    pub(crate) fn begin(members: usize, scheme: &'static str, flags: &[String]) -> Self {
        let place = || Place { ip: Ipv4Addr::LOCALHOST, namespace: None };
        let members = (0..members).map(|_| Member { place: place(), ports: (free_port(), free_port()), process: None });
        Self::of(members.collect(), scheme, flags)
    }

    /// A cluster whose members live in these places.
    pub(crate) fn placed(places: Vec<Place>) -> Self {
        let members = places.into_iter().map(|place| Member { place, ports: (2379, 2380), process: None });
        Self::of(members.collect(), "http", &[])
    }

    fn of(members: Vec<Member>, scheme: &'static str, flags: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a directory");
        let mut etcd = Self { folder, members, flags: flags.to_vec(), scheme };
        etcd.run_all();
        etcd
    }

    /// Starts a member on the data that it has.
    pub(crate) fn run(&mut self, place: usize) {
        let peer = |place: usize| {
            let Member { place, ports, .. } = &self.members[place];
            format!("http://{}:{}", place.ip, ports.1)
        };
        let cluster: Vec<_> = (0..self.members.len()).map(|place| format!("m{place}={}", peer(place))).collect();
        let log = File::create(self.folder.path().join(format!("m{place}.log"))).expect("a file");
        let process = in_namespace(self.members[place].place.namespace.as_deref(), program())
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

    /// Where a member answers clients.
    pub(crate) fn endpoint(&self, place: usize) -> String {
        let Member { place, ports, .. } = &self.members[place];
        format!("{}://{}:{}", self.scheme, place.ip, ports.0)
    }

    /// What clients are told to ask.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|place| self.endpoint(place)).collect()
    }

    /// Kills a member and waits until it is gone, and its ports with it.
    pub(crate) fn kill(&mut self, place: usize) {
        let mut process = self.members[place].process.take().expect("it runs");
        process.kill().expect("it is ours");
        process.wait().expect("it is ours");
    }

    /// Kills every member.
    pub(crate) fn kill_all(&mut self) {
        (0..self.members.len()).for_each(|place| self.kill(place));
    }

    /// Copies what the members hold, which are down, under a name.
    pub(crate) fn back_up(&self, name: &str) {
        for place in 0..self.members.len() {
            let member = self.folder.path().join(format!("m{place}"));
            copy_folder(&member, &self.folder.path().join(name).join(format!("m{place}")));
        }
    }

    /// Puts such a copy in the place of what the members hold, which are down.
    pub(crate) fn restore(&self, name: &str) {
        for place in 0..self.members.len() {
            let member = self.folder.path().join(format!("m{place}"));
            std::fs::remove_dir_all(&member).expect("it was there");
            copy_folder(&self.folder.path().join(name).join(format!("m{place}")), &member);
        }
    }

    /// Makes another cluster in the place of this one, whose members are down: without data, and with an id of its own.
    pub(crate) fn replace(&mut self) {
        for place in 0..self.members.len() {
            std::fs::remove_dir_all(self.folder.path().join(format!("m{place}"))).expect("it was there");
        }
        self.flags.extend(["--initial-cluster-token", "another"].map(str::to_owned));
    }

    /// Starts every member on the data that it has.
    pub(crate) fn run_all(&mut self) {
        (0..self.members.len()).for_each(|place| self.run(place));
    }

    /// Stops a member as a frozen machine would be: its connections stay open, and nothing comes from it.
    pub(crate) fn freeze(&self, place: usize) {
        kill_process(self.pid(place), Signal::STOP).expect("it is ours");
    }

    /// Lets a frozen member go on.
    pub(crate) fn thaw(&self, place: usize) {
        kill_process(self.pid(place), Signal::CONT).expect("it is ours");
    }

    fn pid(&self, place: usize) -> Pid {
        Pid::from_child(self.members[place].process.as_ref().expect("it runs"))
    }

    /// What the members have complained of.
    pub(crate) fn logs(&self) -> String {
        let log = |place| std::fs::read_to_string(self.folder.path().join(format!("m{place}.log"))).unwrap_or_default();
        (0..self.members.len()).map(log).collect::<Vec<_>>().join("\n")
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("copied");
        }
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
