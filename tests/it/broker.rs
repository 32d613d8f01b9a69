//! Starts real broker processes, and runs the command line as a user does.
//!
//! A [`BrokerInstance`] contains the folder, the ports and the configuration of one broker. [`BrokerInstance::start`]
//! returns a [`Broker`] that is ready. Dropping the [`Broker`] kills its process. The output of the process goes to
//! `broker.log` in the folder. A failed test prints the last lines of this file.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal};
use strandline::task;

use crate::{
    etcd::{Etcd, in_namespace},
    ports::free_port,
    s3::S3,
    test_timeout::{TEST_TIMEOUT, eventually, poll},
};

const BINARY: &str = env!("CARGO_BIN_EXE_strandline");

/// User and group id of `nobody`.
pub(crate) const NOBODY: u32 = 65_534;

/// Folder, ports and configuration of one broker, from which several processes may be started in succession. Dropping
/// the value deletes the folder.
pub(crate) struct BrokerInstance {
    folder: tempfile::TempDir,
    id: u32,
    cluster: &'static str,
    namespace: Option<String>,
    grpc: SocketAddr,
    http: SocketAddr,
    peer: SocketAddr,
    advertise: Option<SocketAddr>,
    peer_advertise: Option<SocketAddr>,
    topic_defaults: Vec<(String, String)>,
    object_store: Option<String>,
    settings: Vec<(&'static str, String)>,
    environment: Vec<(&'static str, &'static str)>,
    /// Maximum number of open files of the process; `None` for the limit of the test process.
    open_files: Option<u32>,
    /// True if the process runs as [`NOBODY`].
    nobody: bool,
}

impl BrokerInstance {
    /// Creates an instance of a standalone broker with id 1, whose object store is a folder beside the data directory.
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("strandline-it-").tempdir().expect("a folder for the test");
        let object_store = Some(format!("file://{}", folder.path().join("object-store").display()));
        fs::create_dir_all(folder.path().join("object-store")).expect("a folder for the object store");
        Self {
            folder,
            id: 1,
            cluster: "it",
            namespace: None,
            grpc: free_address(),
            http: free_address(),
            peer: free_address(),
            advertise: None,
            peer_advertise: None,
            topic_defaults: Vec::new(),
            object_store,
            settings: Vec::new(),
            environment: Vec::new(),
            open_files: None,
            nobody: false,
        }
    }

    /// Makes the process run as [`NOBODY`], from a link or copy of the binary that this user can access.
    pub(crate) fn run_as_nobody(self) -> Self {
        fs::set_permissions(self.path(), fs::Permissions::from_mode(0o755)).expect("the test owns the folder");
        let copy = self.path().join("strandline");
        if fs::hard_link(BINARY, &copy).is_err() {
            fs::copy(BINARY, &copy).expect("the program can be copied");
        }
        Self { nobody: true, ..self }
    }

    /// Creates an instance for [`BrokerInstance::start_dev_cluster`]: this number of brokers in one process, with
    /// consecutive ports from the gRPC port on.
    pub(crate) fn cluster(brokers: usize) -> Self {
        let ports = 2 * brokers;
        let (grpc, http) = (0..100)
            .find_map(|_| {
                let run: Vec<SocketAddr> = (0..ports).map(|_| free_address()).collect();
                let dense = run.windows(2).all(|pair| pair[0].port() + 1 == pair[1].port());
                dense.then_some((run[0], run[1]))
            })
            .expect("ports in a row");
        Self { grpc, http, ..Self::new() }
    }

    /// Creates an instance of a broker in a cluster, with this id and this etcd as the metadata store.
    pub(crate) fn member(id: u32, etcd: &Etcd) -> Self {
        let instance = Self { id, ..Self::new() }.setting("metadata.session_timeout", "\"2s\"");
        // The threshold of 100 percent excludes disk pressure, whatever the disk usage of this machine is.
        instance.setting("log.journal_bytes", 16 << 20).setting("broker.disk_pressure_percent", 100).at_etcd(etcd)
    }

    /// Sets this etcd as the metadata store.
    pub(crate) fn at_etcd(self, etcd: &Etcd) -> Self {
        self.setting("metadata.etcd", format!("{:?}", etcd.endpoints()))
    }

    /// Sets the name of the cluster.
    pub(crate) fn of_cluster(self, cluster: &'static str) -> Self {
        Self { cluster, ..self }
    }

    /// Runs the process in a network namespace, with listeners at `ip`, the address of that namespace.
    pub(crate) fn in_namespace(self, namespace: &str, ip: Ipv4Addr) -> Self {
        let at = |port| SocketAddr::from((ip, port));
        Self { namespace: Some(namespace.to_owned()), grpc: at(9460), http: at(9461), peer: at(9470), ..self }
    }

    /// Sets a folder as the object store.
    pub(crate) fn object_store_in(mut self, folder: &Path) -> Self {
        self.object_store = Some(format!("file://{}", folder.display()));
        self
    }

    /// Limits the number of open files of the process.
    pub(crate) fn open_files(self, max: u32) -> Self {
        Self { open_files: Some(max), ..self }
    }

    /// Removes the object store from the configuration.
    pub(crate) fn without_object_store(mut self) -> Self {
        self.object_store = None;
        self
    }

    /// Sets a topic default of the broker's configuration.
    pub(crate) fn topic_default(mut self, key: &str, value: impl ToString) -> Self {
        self.topic_defaults.push((key.to_owned(), value.to_string()));
        self
    }

    /// Sets an S3 server as the object store.
    pub(crate) fn object_store(mut self, server: &S3) -> Self {
        self.object_store = Some(format!("s3://{}/it", crate::s3::BUCKET));
        self.environment.extend(server.environment());
        self.setting("object_store.endpoint", format!("{:?}", server.endpoint()))
            .setting("object_store.region", "\"us-east-1\"")
            .setting("object_store.path_style", "true")
    }

    /// Sets `section.key` of the configuration file to a TOML value, instead of any earlier value.
    pub(crate) fn setting(mut self, key: &'static str, value: impl ToString) -> Self {
        self.settings.retain(|(known, _)| *known != key);
        self.settings.push((key, value.to_string()));
        self
    }

    /// Advertises this address to clients instead of the address of the gRPC listener.
    pub(crate) fn advertise(mut self, address: SocketAddr) -> Self {
        self.advertise = Some(address);
        self
    }

    /// Advertises this address to peers instead of the address of the peer listener.
    pub(crate) fn peer_advertise(mut self, address: SocketAddr) -> Self {
        self.peer_advertise = Some(address);
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Returns the folder that is the object store of an instance from [`BrokerInstance::new`].
    pub(crate) fn object_store_dir(&self) -> PathBuf {
        self.folder.path().join("object-store")
    }

    /// Returns the value of one metric on the `/metrics` page. `name` includes the labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let [value] = self.metrics([name]);
        value
    }

    /// Returns the values of several metrics, all from one request for `/metrics`, so that the values belong to the
    /// same moment.
    pub(crate) fn metrics<const N: usize>(&self, names: [&str; N]) -> [f64; N] {
        let (_, page) = http_get(self.http, "/metrics").expect("the metrics page responds");
        names.map(|name| {
            let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let value = line.unwrap_or_else(|| panic!("no {name} in {page}"));
            value.parse().expect("a number")
        })
    }

    /// Returns the address of the gRPC listener.
    pub(crate) fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Returns the address of the peer listener.
    pub(crate) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Returns the address of the HTTP listener.
    pub(crate) fn http(&self) -> SocketAddr {
        self.http
    }

    /// Returns all output of the processes that were started from this instance.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("broker.log")
    }

    /// Writes the configuration file and returns its path.
    pub(crate) fn write_config(&self) -> PathBuf {
        let mut text = format!("cluster = {:?}\n", self.cluster);
        let id = self.id;
        let rack = ["zone-a", "zone-b", "zone-c"][(id as usize - 1) % 3];
        write!(text, "[broker]\nid = {id}\nrack = {rack:?}\ndata_dir = {:?}\n", self.data_dir())
            .expect("writing to a string succeeds");
        let (of_broker, others): (Vec<_>, Vec<_>) =
            self.settings.iter().partition(|(key, _)| key.starts_with("broker."));
        let (of_grpc, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|(key, _)| key.starts_with("grpc."));
        for (key, value) in of_broker {
            writeln!(text, "{} = {value}", &key["broker.".len()..]).expect("writing to a string succeeds");
        }
        let advertise = self.advertise.unwrap_or(self.grpc);
        write!(text, "[grpc]\nlisten = \"{}\"\nadvertise = \"{advertise}\"\n", self.grpc)
            .expect("writing to a string succeeds");
        for (key, value) in of_grpc {
            writeln!(text, "{} = {value}", &key["grpc.".len()..]).expect("writing to a string succeeds");
        }
        write!(text, "[http]\nlisten = \"{}\"\n", self.http).expect("writing to a string succeeds");
        write!(text, "[peer]\nlisten = \"{}\"\n", self.peer).expect("writing to a string succeeds");
        if let Some(advertise) = self.peer_advertise {
            writeln!(text, "advertise = \"{advertise}\"").expect("writing to a string succeeds");
        }
        // All other settings are dotted keys, which TOML allows only before the first section.
        let url = self.object_store.iter().map(|url| format!("object_store.url = {url:?}\n"));
        let settings = others.iter().map(|(key, value)| format!("{key} = {value}\n"));
        text.insert_str(0, &url.chain(settings).collect::<String>());
        text.push_str("[topic_defaults]\n");
        for (key, value) in &self.topic_defaults {
            match value.parse::<i64>() {
                Ok(number) => writeln!(text, "{key:?} = {number}").expect("writing to a string succeeds"),
                Err(_) => writeln!(text, "{key:?} = {value:?}").expect("writing to a string succeeds"),
            }
        }
        let path = self.folder.path().join("broker.toml");
        fs::write(&path, text).expect("the configuration is written");
        path
    }

    /// Starts `strandline broker` and waits until it is ready. If one of the ports is in use, chooses new ports and
    /// starts again. Panics after five such attempts, or if the broker does not become ready for another reason.
    pub(crate) fn start(&mut self) -> Broker {
        for _ in 0..5 {
            let mut broker = self.spawn();
            match broker.wait_ready() {
                Ok(()) => return broker,
                Err(_) if self.log().contains("port ") && self.log().contains("in use") => {
                    drop(broker);
                    (self.grpc, self.http, self.peer) = (free_address(), free_address(), free_address());
                }
                Err(reason) => panic!("the broker did not become ready: {reason}\n{}", self.log()),
            }
        }
        panic!("five pairs of ports were all in use\n{}", self.log());
    }

    /// Starts `strandline broker` and does not wait until it is ready.
    pub(crate) fn spawn(&self) -> Broker {
        let config = self.write_config();
        let mut command = in_namespace(self.namespace.as_deref(), Path::new(BINARY));
        command.arg("broker").arg("--config").arg(config);
        self.launch(command)
    }

    /// Starts `strandline dev` and waits until it is ready.
    pub(crate) fn start_dev(&self) -> Broker {
        let mut command = Command::new(BINARY);
        command.arg("dev").arg("--data-dir").arg(self.data_dir());
        command.args(["--listen", &self.grpc.to_string(), "--http", &self.http.to_string()]);
        let mut broker = self.launch(command);
        if let Err(reason) = broker.wait_ready() {
            panic!("strandline dev did not become ready: {reason}\n{}", self.log());
        }
        broker
    }

    /// Starts `strandline dev` with this number of brokers, for an instance of [`BrokerInstance::cluster`]. Waits until
    /// the first broker is ready and the greeting is printed.
    pub(crate) fn start_dev_cluster(&self, brokers: usize) -> Broker {
        self.start_dev_cluster_with(brokers, &[])
    }

    /// Starts `strandline dev` as [`BrokerInstance::start_dev_cluster`] does, with more arguments.
    pub(crate) fn start_dev_cluster_with(&self, brokers: usize, arguments: &[&str]) -> Broker {
        let mut command = Command::new(BINARY);
        command.arg("dev").arg("--data-dir").arg(self.data_dir()).args(["--brokers", &brokers.to_string()]);
        command.args(arguments);
        command.args(["--listen", &self.grpc.to_string(), "--http", &self.http.to_string()]);
        let greetings = || self.log().matches("is ready (").count();
        let before = greetings();
        let mut broker = self.launch(command);
        if let Err(reason) = broker.wait_ready() {
            panic!("strandline dev did not become ready: {reason}\n{}", self.log());
        }
        // `/readyz` is a page of the first broker, which is ready before the other brokers and the greeting.
        eventually("the greeting is printed", || (greetings() > before).then_some(()));
        broker
    }

    /// Starts a command as a process of this instance: with its limits, user, environment and log file.
    fn launch(&self, mut command: Command) -> Broker {
        if let Some(max) = self.open_files {
            let mut limited = Command::new("prlimit");
            limited.arg(format!("--nofile={max}:{max}")).arg(command.get_program()).args(command.get_args());
            command = limited;
        }
        if self.nobody {
            let mut other = Command::new("setpriv");
            other.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".to_owned()]);
            other.arg(self.path().join("strandline")).args(command.get_args());
            command = other;
        }
        let open = || -> File {
            OpenOptions::new().create(true).append(true).open(self.log_path()).expect("the log file opens")
        };
        let child = clean(&mut command)
            .envs(self.environment.iter().copied())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(open())
            .stderr(open())
            .spawn()
            .expect("the broker's binary starts");
        Broker { child, http: self.http, log: self.log_path() }
    }

    /// Returns a command line with this broker as the bootstrap broker.
    pub(crate) fn cli(&self) -> Cli {
        Cli { bootstrap: Some(self.grpc.to_string()), folder: self.folder.path().to_owned() }
    }
}

/// A broker process. Dropping the value kills the process.
pub(crate) struct Broker {
    child: Child,
    http: SocketAddr,
    log: PathBuf,
}

impl Broker {
    /// Waits until `/readyz` returns 200. Returns an error if the process exits first, or if [`TEST_TIMEOUT`] passes.
    pub(crate) fn wait_ready(&mut self) -> Result<(), String> {
        let mut last = String::new();
        let became = poll(TEST_TIMEOUT, || {
            if let Some(status) = self.child.try_wait().expect("the child process exists") {
                return Some(Err(format!("the process exited with {status}")));
            }
            match http_get(self.http, "/readyz") {
                Ok((200, _)) => return Some(Ok(())),
                Ok((_, page)) => last = page,
                Err(error) => last = error.to_string(),
            }
            None
        });
        became.unwrap_or_else(|| Err(format!("not ready after {TEST_TIMEOUT:?}: {last}")))
    }

    /// Kills the process with SIGKILL, which lets it write nothing more, and waits for its exit.
    pub(crate) fn kill9(mut self) {
        self.child.kill().expect("the process can be killed");
        self.child.wait().expect("the process exits");
    }

    /// Sends SIGTERM.
    pub(crate) fn request_stop(&self) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM).expect("the process can be signalled");
    }

    /// Sends SIGTERM and waits for the exit.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        self.request_stop();
        self.wait_for_exit()
    }

    /// Waits until the process exits, and returns its exit status.
    pub(crate) fn wait_for_exit(&mut self) -> ExitStatus {
        eventually("the broker has exited", || self.child.try_wait().expect("the child process exists"))
    }

    /// Suspends the process (SIGSTOP) or resumes it. A suspended process keeps its connections open and sends nothing.
    pub(crate) fn freeze(&self, frozen: bool) {
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        rustix::process::kill_process(Pid::from_child(&self.child), signal).expect("the process is a child");
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns true if the process is running.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the child process exists").is_none()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Either call may fail if the process has already exited, which does not matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- last lines of the broker's log\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}

/// Runs `strandline` commands with these bootstrap brokers, in a working folder.
pub(crate) struct Cli {
    bootstrap: Option<String>,
    folder: PathBuf,
}

/// Output of a finished command.
#[derive(Debug)]
pub(crate) struct Output {
    /// Exit code.
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Output {
    /// Returns the standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).expect("the output is UTF-8")
    }

    /// Returns the standard output as one JSON value.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Returns the standard output as one JSON value per line.
    pub(crate) fn json_lines(&self) -> Vec<serde_json::Value> {
        self.text().lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect()
    }
}

impl Cli {
    /// Returns a command line with these bootstrap brokers.
    pub(crate) fn of(brokers: &[SocketAddr], folder: &Path) -> Self {
        let addresses: Vec<String> = brokers.iter().map(SocketAddr::to_string).collect();
        Self { bootstrap: Some(addresses.join(",")), folder: folder.to_owned() }
    }

    /// Returns a command line without a bootstrap broker.
    pub(crate) fn without_broker(folder: &Path) -> Self {
        Self { bootstrap: None, folder: folder.to_owned() }
    }

    /// Runs a command with empty input, and returns its output.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, b"")
    }

    /// Runs a command with empty input. The command must succeed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> Output {
        self.ok_with(arguments, b"")
    }

    /// Runs a command with input. The command must succeed.
    pub(crate) fn ok_with(&self, arguments: &[&str], input: &[u8]) -> Output {
        let output = self.run_with(arguments, input);
        assert_eq!(output.code, 0, "strandline {arguments:?}: {output:?}");
        output
    }

    /// Retries the creation of a topic until the topic exists. The topic may exist after a failed attempt too, if only
    /// the response was lost.
    pub(crate) fn create_when_possible(&self, topic: &str) {
        eventually("the topic is created", || {
            let created = self.run(&["topic", "create", topic]);
            (created.code == 0 || created.stderr.contains("exists")).then_some(())
        });
    }

    /// Returns a `strandline` command that the caller starts.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        clean(&mut command);
        if let Some(bootstrap) = &self.bootstrap {
            command.env("STRANDLINE_BOOTSTRAP", bootstrap);
        }
        command.args(arguments).current_dir(&self.folder);
        command
    }

    /// Runs a command with input, and waits until it exits. Panics if the command runs for more than twice
    /// [`TEST_TIMEOUT`].
    pub(crate) fn run_with(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        let feed = task::spawn_thread("stdin", move || match stdin.write_all(&input) {
            // A command that fails early does not read its input.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => panic!("feeding the command: {error}"),
            _ => {}
        });
        let stdout = drain(child.stdout.take().expect("piped"));
        let stderr = drain(child.stderr.take().expect("piped"));
        let ended = poll(TEST_TIMEOUT * 2, || child.try_wait().expect("the child process exists"));
        let status = ended.unwrap_or_else(|| {
            child.kill().expect("the command can be killed");
            child.wait().expect("the command exits");
            panic!("strandline {arguments:?} did not exit in {:?}", TEST_TIMEOUT * 2);
        });
        feed.join().expect("the input was written");
        Output {
            code: status.code().expect("the command exited without a signal"),
            stdout: stdout.join().expect("stdout was read"),
            stderr: String::from_utf8_lossy(&stderr.join().expect("stderr was read")).into_owned(),
        }
    }
}

/// Reads a pipe to its end on a thread, so that a full pipe does not block the process. The thread returns the bytes.
fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    task::spawn_thread("drain", move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("the pipe can be read");
        bytes
    })
}

/// Removes all `STRANDLINE_` variables from the environment of a command, disables colours and enables backtraces.
fn clean(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("STRANDLINE_") {
            command.env_remove(name);
        }
    }
    command.env("NO_COLOR", "1").env("RUST_BACKTRACE", "1")
}

/// Returns a loopback address with a free port. No client connection and no other test of this process gets the port,
/// so a broker can use it again after a restart.
pub(crate) fn free_address() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))
}

/// Sends one HTTP GET. Returns the status code and the body.
pub(crate) fn http_get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // The request is sent in one write, because the server may respond and close the connection before a second write.
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let code = text.split(' ').nth(1).and_then(|code| code.parse().ok());
    let code = code.ok_or_else(|| std::io::Error::new(ErrorKind::InvalidData, "no status line"))?;
    Ok((code, text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned()))
}

#[test]
fn free_addresses_are_distinct_and_can_be_bound() {
    let addresses: Vec<SocketAddr> = (0..20).map(|_| free_address()).collect();
    let listeners: Vec<TcpListener> = addresses.iter().map(|at| TcpListener::bind(at).expect("free")).collect();
    assert!(listeners.iter().all(|listener| listener.local_addr().is_ok_and(|at| at.port() < 32_768)));
}

#[test]
fn configuration_file_is_toml_with_fixed_keys() {
    let instance =
        BrokerInstance::new().topic_default("segment.bytes", 65_536).topic_default("durability", "replicated");
    let text = fs::read_to_string(instance.write_config()).expect("written");
    let table: toml::Table = text.parse().expect("the text is TOML");
    assert_eq!(table["topic_defaults"]["segment.bytes"].as_integer(), Some(65_536));
    assert_eq!(table["topic_defaults"]["durability"].as_str(), Some("replicated"));
    assert_eq!(table["broker"]["data_dir"].as_str(), instance.data_dir().to_str());
    assert_eq!(table["grpc"]["listen"].as_str(), Some(instance.grpc().to_string().as_str()));
    assert!(table["object_store"]["url"].as_str().is_some_and(|url| url.starts_with("file:///")));
}

#[test]
fn http_get_returns_status_and_complete_body() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = task::spawn_thread("http", move || {
        let (mut stream, _) = listener.accept().expect("a caller");
        let mut request = [0; 1024];
        let read = stream.read(&mut request).expect("a request");
        assert!(request[..read].starts_with(b"GET /readyz HTTP/1.1\r\n"));
        stream
            .write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 8\r\n\r\nstarting")
            .expect("the response is sent");
    });
    assert_eq!(http_get(address, "/readyz").expect("a response"), (503, "starting".to_owned()));
    server.join().expect("served");
    assert!(http_get(address, "/readyz").is_err(), "the listener is closed");
}
