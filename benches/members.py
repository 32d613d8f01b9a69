"""The cluster of benches/cluster and benches/pairs: three etcd members and their brokers, as processes that end with this program."""
import json, os, pathlib, re, shutil, signal, time

from measure import REPO, Process, cpu_of, environment, free_port, get, is_ready, rss_mb, run


class Etcd:
    """Three etcd members on the loopback interface."""

    def __init__(self, directory):
        program = run([REPO / "tests/fetch-etcd"], 300).strip()
        self.ports = [(free_port(), free_port()) for _ in range(3)]
        peers = ",".join(f"m{i}=http://127.0.0.1:{p[1]}" for i, p in enumerate(self.ports))
        self.members = []
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        for i, (client, peer) in enumerate(self.ports):
            command = [program, "--name", f"m{i}", "--data-dir", f"{directory}/m{i}", "--logger", "zap", "--log-level", "error"]
            for flag, port in (("client", client), ("peer", peer)):
                command += [f"--listen-{flag}-urls", f"http://127.0.0.1:{port}"]
            command += ["--advertise-client-urls", f"http://127.0.0.1:{client}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"]
            self.members.append(Process(command + ["--initial-cluster", peers], f"{directory}/m{i}.log"))
        for member, (client, _) in zip(self.members, self.ports):
            member.wait_for(lambda: '"true"' in get(client, "/health")[1], 60, "etcd")

    @property
    def endpoints(self):
        return [f"http://127.0.0.1:{client}" for client, _ in self.ports]

    def writes(self):
        """Returns the number of puts and deletes that the first member has applied so far."""
        _, page = get(self.ports[0][0], "/metrics")
        return sum(float(re.search(rf"^{name} (\S+)", page, re.M)[1]) for name in ("etcd_debugging_mvcc_put_total", "etcd_debugging_mvcc_delete_total"))

    def end(self):
        for member in self.members:
            member.end(signal.SIGKILL)


class Member:
    """One broker, which may be killed and started again."""

    def __init__(self, cluster, number):
        self.cluster, self.number = cluster, number
        self.directory = cluster.directory / f"broker{number}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.grpc, self.http = free_port(), free_port()
        # The program may be of an earlier commit, which has no setting for a peer listener.
        has_peer = "[peer]" in run([cluster.lab.bin, "config", "print"], 10, environment())
        peer = ["[peer]", f'listen = "127.0.0.1:{free_port()}"'] if has_peer else []
        store = [f'url = "file://{cluster.object_store}"'] if cluster.object_store else []
        lines = ['cluster = "bench"', "[broker]", f"id = {number}", f'rack = "zone-{number}"', f'data_dir = "{self.directory}/data"', "[grpc]",
                 f'listen = "127.0.0.1:{self.grpc}"', "[http]", f'listen = "127.0.0.1:{self.http}"', *peer, "[metadata]",
                 f"etcd = {json.dumps(cluster.etcd.endpoints)}", "[object_store]" if store else "", *store, *cluster.settings]
        self.config = self.directory / "strandline.toml"
        self.config.write_text("\n".join(lines) + "\n")
        self.process = None

    def start(self):
        self.process = Process([self.cluster.lab.bin, "broker", "--config", self.config], self.directory / "broker.log", environment(**self.cluster.env))

    def wait(self):
        self.process.wait_for(lambda: is_ready(self.http), 120, f"broker {self.number}")

    def kill(self):
        self.process.end(signal.SIGKILL)

    def stop(self):
        """Stops the broker as an operator does: the broker transfers leadership and exits."""
        self.process.end(signal.SIGTERM, 600)
        if self.process.child.returncode:
            raise ValueError(f"broker {self.number} exited with {self.process.child.returncode} at a clean stop")

    @property
    def pid(self):
        return self.process.pid

    def wipe(self):
        shutil.rmtree(self.directory / "data")


class Cluster:
    """Brokers with three etcd members. With `object_store` a folder is their object store."""

    def __init__(self, lab, name, brokers=3, object_store=False, settings=(), env=None):
        self.lab, self.directory, self.settings, self.env = lab, lab.root / name, list(settings), env or {}
        self.directory.mkdir(parents=True)
        self.object_store = self.directory / "object-store" if object_store else None
        if object_store:
            self.object_store.mkdir()
        self.members = []
        self.etcd = Etcd(self.directory / "etcd")
        try:
            self.members = [Member(self, number) for number in range(1, brokers + 1)]
            for member in self.members:
                member.start()
            for member in self.members:
                member.wait()
        except BaseException:
            self.end()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def end(self):
        for member in self.members:
            if member.process:
                member.process.end(signal.SIGKILL)
        self.etcd.end()

    @property
    def address(self):
        return ",".join(f"127.0.0.1:{member.grpc}" for member in self.members)

    def cli(self, *arguments, timeout=300):
        return run([self.lab.bin, *arguments], timeout, environment(STRANDLINE_BOOTSTRAP=self.address))

    def topic(self, name, partitions, factor, **config):
        pairs = [x for k, v in config.items() for x in ("--config", f"{k.replace('_', '.')}={v}")]
        self.cli("topic", "create", name, "--partitions", partitions, "--replication-factor", factor, *pairs)
        self.wait_until_in_sync(name, factor)

    def drop(self, name):
        self.cli("topic", "delete", name, "--yes")

    def produce(self, *arguments):
        self.lab.bench(self.address, "produce", *arguments, timeout=3600)

    def partitions(self, name):
        return json.loads(self.cli("topic", "describe", name, "--output", "json"))["partitions"]

    def wait_until_in_sync(self, name, factor, seconds=300):
        """Waits until every replica of the topic is in sync. Returns the time taken, in seconds."""
        began = time.monotonic()
        while True:
            states = self.partitions(name)
            if all(state.get("leader") and len(state["isr"]) == factor for state in states):
                return time.monotonic() - began
            if time.monotonic() - began > seconds:
                raise ValueError(f"{name} is not in sync after {seconds} s: {states[:3]}")
            time.sleep(0.02)

    def cpu(self):
        return sum(cpu_of(member.process.pid) for member in self.members)

    def rss(self):
        return [rss_mb(member.process.pid) for member in self.members]
