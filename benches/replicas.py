"""Cost of replicas, phase by phase, for the sections `replicas` of benches/report, benches/cluster and benches/pairs."""
import pathlib, re, time

from measure import Broker, Figure, cpu_of, get, progress, rss_mb

COUNTS = (1000, 10_000, 30_000, 100_000)
TOPIC = "t"

# Targets for 100,000 partitions: memory of a broker in MB, and seconds until its replicas are open.
MAX_MB, MAX_SECONDS = 2**31 / 1e6, 60

PHASES = {
    "created": "metadata applied, when `topic create` returns",
    "opened": "all replicas open, from the start of the creation",
    "in sync": "all replicas in sync, from the start of the creation",
    "idle": "CPU of a broker, % of a core",
    "written": "one record of 1 KiB to each partition",
    "stopped": "clean stop",
    "restarted": "all replicas open after a clean stop",
    "restarted, in sync": "all replicas in sync after a clean stop",
    "killed": "all replicas open after kill -9",
    "killed, in sync": "all replicas in sync after kill -9",
    "deleted": "all files removed, from the start of `topic delete`",
}


def metric(port, name):
    """Returns the sum of a metric's values; 0 while no server responds."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)", get(port, "/metrics")[1], re.M))


class Peak:
    """Peak memory of a process since the creation of this object, in MB."""

    def __init__(self, pid):
        self.pid = pid
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")

    def mb(self):
        return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{self.pid}/status").read_text())[1]) * 1024 / 1e6


class Phases:
    """One run over all phases. Each of `brokers` has `pid`, `http`, `directory`, `stop`, `kill` and `start`. `cli` runs a command, and
    `produce` runs the benchmark. `watch` is the time in seconds between phases, and of the idle phase."""

    def __init__(self, lab, count, factor, brokers, cli, produce, watch):
        self.lab, self.count, self.factor, self.brokers, self.cli, self.produce = lab, count, factor, brokers, cli, produce
        self.watch = watch
        self.cells, self.figures = {}, {}

    def run(self):
        empty = max(rss_mb(broker.pid) for broker in self.brokers)
        progress(f"  {self.count} partitions; a broker without partitions takes {empty:.0f} MB")
        with self.phase() as done:
            self.cli("topic", "create", TOPIC, "--partitions", self.count, "--replication-factor", self.factor, *self.config(), timeout=600)
            done("created")
            self.wait_until(lambda: all(self.open_replicas(broker) == self.count for broker in self.brokers))
            done("opened")
            if self.factor > 1:
                self.wait_until(self.is_in_sync)
                done("in sync")
        time.sleep(self.watch)  # new files are synced in the background
        with self.phase() as done:
            before = sum(cpu_of(broker.pid) for broker in self.brokers)
            time.sleep(self.watch)
            done("idle", (sum(cpu_of(broker.pid) for broker in self.brokers) - before) / self.watch / len(self.brokers) * 100, "%")
        with self.phase() as done:
            self.produce("--topic", TOPIC, "--records", self.count, "--record-size", 1024, "--batch-size", 1024, "--linger-ms", 0)
            done("written")
        time.sleep(self.watch)
        victim = self.brokers[0]
        began = time.monotonic()
        victim.stop()
        self.figure("stopped", time.monotonic() - began, "s")
        self.restart(victim, "restarted")
        time.sleep(self.watch)
        victim.kill()
        self.restart(victim, "killed")
        with self.phase() as done:
            self.cli("topic", "delete", TOPIC, "--yes", timeout=600)
            self.wait_until(lambda: all(self.open_replicas(broker) == 0 and not replicas(broker.directory) for broker in self.brokers))
            done("deleted")
        return self

    def config(self):
        return ["--config", "min.insync.replicas=2"] if self.factor > 1 else ["--config", "remote.storage.enable=false"]

    def restart(self, victim, phase):
        began = time.monotonic()
        victim.start()
        with Phase(self, [victim], began) as done:
            self.wait_until(lambda: self.open_replicas(victim) == self.count)
            done(phase)
            if self.factor > 1:
                self.wait_until(self.is_in_sync)
                done(f"{phase}, in sync")

    def phase(self):
        return Phase(self, self.brokers, time.monotonic())

    def figure(self, name, value, unit, rss=None, peak=None):
        self.figures[name] = dict(value=value, unit=unit, rss=rss, peak=peak)
        memory = f", {rss:.0f} MB (peak {peak:.0f})" if rss else ""
        self.cells[name] = f"{value:.2g} {unit}{memory}" if value < 10 else f"{value:.0f} {unit}{memory}"
        progress(f"    {name}: {self.cells[name]}")

    def open_replicas(self, broker):
        return metric(broker.http, "strandline_partitions")

    def is_in_sync(self):
        led = sum(metric(broker.http, "strandline_partitions_led") for broker in self.brokers)
        return led == self.count and not any(metric(broker.http, "strandline_partitions_under_replicated") for broker in self.brokers)

    def wait_until(self, condition, seconds=900):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise ValueError(f"timeout after {seconds} s: {[self.open_replicas(broker) for broker in self.brokers]} of {self.count} replicas are open")
            time.sleep(0.1)


class Phase:
    """Time since the start of a phase, and the maximum over the brokers of current and of peak memory."""

    def __init__(self, phases, brokers, began):
        self.phases, self.brokers, self.began = phases, brokers, began

    def __enter__(self):
        self.peaks = [Peak(broker.pid) for broker in self.brokers]
        return self.done

    def done(self, name, value=None, unit="s"):
        value = time.monotonic() - self.began if value is None else value
        self.phases.figure(name, value, unit, max(rss_mb(broker.pid) for broker in self.brokers), max(peak.mb() for peak in self.peaks))

    def __exit__(self, *_):
        pass


class StandaloneBroker:
    """One standalone broker, which may be stopped, killed and started again."""

    def __init__(self, lab, directory):
        self.lab, self.directory, self.process = lab, directory, None
        self.start()

    def start(self):
        self.process = Broker(self.lab, self.directory, env=replica_limit(), seconds=600)

    def stop(self):
        self.process.end(seconds=600)

    def kill(self):
        self.process.end(9)

    pid = property(lambda self: self.process.pid)
    http = property(lambda self: self.process.http)


def replica_limit():
    """Returns the environment variable that raises broker.max_replicas above the largest count, whatever the machine's memory."""
    return dict(STRANDLINE_BROKER_MAX_REPLICAS=str(2 * max(COUNTS)))


def watch(lab):
    """Returns the time in seconds between two phases."""
    return 10 if lab.o.short else 30


def counts(lab):
    return lab.o.counts or (COUNTS[:2] if lab.o.short else COUNTS)


def replicas(directory):
    """Returns the replica folders of a data directory."""
    topics = [path for path in (pathlib.Path(directory) / "data").iterdir() if path.is_dir() and len(path.name) == 36]
    return [path for topic in topics for path in topic.iterdir()]


def tabulate(table, runs):
    """Fills the table with one column per run, and with the targets of a run with 100,000 partitions."""
    names = [name for name in PHASES if any(name in run.cells for run in runs)]
    lines = ["| phase | " + " | ".join(f"{run.count:,}" for run in runs) + " |", "| --- " * (len(runs) + 1) + "|"]
    lines += [f"| {name}: {PHASES[name]} | " + " | ".join(run.cells.get(name, "") for run in runs) + " |" for name in names]
    table.note = "\n".join(lines)
    for run in runs:
        if run.count == max(COUNTS):
            for name in ("opened", "restarted", "killed"):
                if name in run.figures:
                    table.bound(f"{run.count:,}: {PHASES[name]}", Figure([run.figures[name]["value"]], "s"), MAX_SECONDS)
            peak = max(figure["peak"] or 0 for figure in run.figures.values())
            table.bound(f"{run.count:,}: highest memory of a broker in any phase", Figure([peak], "MB"), MAX_MB)
