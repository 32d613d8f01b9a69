"""Tools of benches/report: figures and tables, processes that end with this program, a broker, and reference measurements."""
import contextlib, http.client, json, os, pathlib, re, resource, shutil, signal, socket, statistics, subprocess, sys, tempfile, time

REPO = pathlib.Path(__file__).resolve().parents[1]
HZ = os.sysconf("SC_CLK_TCK")
MIB = 1 << 20
BATCH = 64 << 10
RECORD = 1024
SHAPES = (1, 16, 256, 1000)


class Skip(Exception):
    """Reason why a figure cannot be measured on this machine."""


def progress(*text):
    print(time.strftime("%H:%M:%S"), *text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------- numbers


class Figure:
    """Values of one measurement, one per run."""

    def __init__(self, values, unit=""):
        self.values, self.unit = [float(v) for v in values], unit
        self.median = statistics.median(self.values)

    def __str__(self):
        spread = f" ({show(min(self.values))}–{show(max(self.values))})" if len(self.values) > 1 else ""
        return f"{show(self.median)}{' ' + self.unit if self.unit else ''}{spread}"


def show(value):
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Table:
    """Rows of one section. The table is printed at the end of its section, so that an interruption keeps the measured sections.
    The first line of `doc` is the title, and the rest a note above the rows."""

    def __init__(self, doc):
        title, _, note = doc.partition("\n")
        self.title, self.note, self.rows = title, note.strip(), []

    def add(self, label, figure, reference=None, name="", target=None, is_minimum=True):
        """Adds a row. `target` is the minimum of figure / reference, or the maximum with `is_minimum=False`."""
        row = dict(figure=label, value=figure.median, unit=figure.unit, values=figure.values, measured=str(figure), reference="", ratio="", target="", met="")
        if reference is not None:
            ratio = figure.median / reference if reference else float("inf")
            row.update(reference=f"{name} {show(reference)}".strip(), ratio=f"{ratio:.2f}")
            if target is not None:
                row.update(target=f"{'≥' if is_minimum else '≤'} {target:g}", met="yes" if (ratio >= target if is_minimum else ratio <= target) else "no")
        self.rows.append(row)
        progress(f"  {label}: {row['measured']} {row['reference']} {row['ratio']} {row['met']}")

    def bound(self, label, figure, maximum):
        """Adds a row with an absolute maximum as the target."""
        met = "yes" if figure.median < maximum else "no"
        self.rows.append(dict(figure=label, value=figure.median, unit=figure.unit, values=figure.values, measured=str(figure), reference="", ratio="",
                              target=f"< {maximum:g}", met=met))
        progress(f"  {label}: {figure} (target < {maximum:g}) {met}")

    def text(self, label, text):
        text = " ".join(text.split())
        self.rows.append(dict(figure=label, measured=text, reference="", ratio="", target="", met=""))
        progress(f"  {label}: {text}")

    def print(self):
        print(f"\n### {self.title}\n")
        if self.note:
            print(self.note + "\n")
        print("| figure | measured | reference | ratio | target | met |\n| --- | --- | --- | --- | --- | --- |")
        for r in self.rows:
            print("|", " | ".join(str(r[k]).replace("|", "\\|") for k in ("figure", "measured", "reference", "ratio", "target", "met")), "|")
        sys.stdout.flush()


@contextlib.contextmanager
def attempt(table, label):
    """Adds a row for a measurement that fails or is skipped, so that the next measurements continue."""
    try:
        yield
    except Skip as reason:
        table.text(label, f"skipped: {reason}")
    except (subprocess.SubprocessError, OSError, KeyError, ValueError, ArithmeticError) as error:
        table.text(label, f"failed: {error}"[:400])


# -------------------------------------------------------------------------------------------------------- processes


def run(command, timeout, env=None, cwd=None):
    """Runs a command and returns its output. The error of a failed command contains the end of its output."""
    r = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd)
    if r.returncode:
        raise ValueError(f"`{' '.join(str(c) for c in command[:6])} …` exited with {r.returncode}: {(r.stderr or r.stdout).strip()[-300:]}")
    return r.stdout


def environment(**more):
    """Returns the environment of a Strandline command. A command rejects unknown variables, so this program's own ones are left out."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("STRANDLINE_")}
    return dict(inherited, **more)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def stat_of(pid):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_of(pid):
    fields = stat_of(pid)
    return (int(fields[11]) + int(fields[12])) / HZ


def get(port, path):
    """Returns the status and text of a page of a local server; the status is None without a response."""
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        c.request("GET", path)
        response = c.getresponse()
        return response.status, response.read().decode()
    except (OSError, http.client.HTTPException):
        return None, ""
    finally:
        c.close()


def is_ready(port):
    """Returns True if the broker with this HTTP port is ready."""
    return get(port, "/readyz")[0] == 200


def rss_mb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) * 1024 / 1e6


class Process:
    """Server that this program starts and ends."""

    def __init__(self, command, log, env=None, stdout=None):
        self.log = log
        with open(log, "ab") as out:
            self.child = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=stdout or out, stderr=out, env=env)
        self.pid = self.child.pid

    def wait_for(self, check, seconds, name):
        end = time.monotonic() + seconds
        while True:
            if check():
                return
            if self.child.poll() is not None or time.monotonic() > end:
                state = "exited" if self.child.poll() is not None else f"is not ready after {seconds} s"
                tail = pathlib.Path(self.log).read_text(errors="replace")[-400:]
                raise ValueError(f"{name} {state}: {tail}")
            time.sleep(0.002)

    def end(self, sig=signal.SIGTERM, seconds=30):
        if self.child.poll() is None:
            self.child.send_signal(sig)
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


class Meter:
    """Measures between enter and exit: CPU seconds of the server process `pid` and of this program with its commands, and the
    cores that all other processes used."""

    def __init__(self, pid):
        self.pid = pid

    def now(self):
        c = list(map(int, pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
        mine = sum(sum((u.ru_utime, u.ru_stime)) for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
        return time.monotonic(), cpu_of(self.pid), mine, (sum(c) - c[3] - c[4]) / HZ

    def __enter__(self):
        self.at = self.now()
        return self

    def __exit__(self, *_):
        self.wall, self.server, self.client, machine = (b - a for a, b in zip(self.at, self.now()))
        self.others = max(0.0, (machine - self.server - self.client) / self.wall)


class Lab:
    """Paths of programs and data, and the references measured so far."""

    def __init__(self, options):
        self.o = options
        self.repeat = options.repeat or (1 if options.short else 3)
        self.seconds = options.seconds or (2 if options.short else 8)
        self.references = {}
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="strandline-report-", dir=options.dir))
        self.bin = self.discard_bin = None

    def build(self):
        if self.o.bin:
            self.bin = pathlib.Path(self.o.bin).resolve()
        else:
            progress("building (release)")
            subprocess.run(["cargo", "build", "--release", "--bin", "strandline", "--example", "discard"], cwd=REPO, check=True, stdout=sys.stderr, timeout=3600)
            target = json.loads(run(["cargo", "metadata", "--no-deps", "--format-version", "1"], 120, cwd=REPO))["target_directory"]
            self.bin = pathlib.Path(target) / "release" / "strandline"
        self.discard_bin = self.bin.parent / "examples" / "discard"
        if not self.bin.exists():
            sys.exit(f"report: {self.bin} does not exist: build it with `cargo build --release --bin strandline`")

    def once(self, key, measure):
        """Returns a reference, which is measured at its first use only."""
        if key not in self.references:
            try:
                self.references[key] = measure()
            except Skip as reason:
                self.references[key] = reason
        if isinstance(self.references[key], Skip):
            raise self.references[key]
        return self.references[key]

    def require_disk(self, gigabytes):
        free = shutil.disk_usage(self.root).free / 1e9
        if free < gigabytes:
            raise Skip(f"{self.root} has {free:.0f} GB free, {gigabytes} are required: use another --dir")

    def sync_disk(self):
        """Writes the page cache of earlier runs to the disk now, and not during the next run."""
        os.sync()
        time.sleep(0.2 if self.o.short else 1)

    def bench(self, address, kind, *arguments, timeout=None):
        env = environment(STRANDLINE_BOOTSTRAP=address)
        out = run([self.bin, "bench", kind, *arguments, "--output", "json"], timeout or self.seconds * 10 + 120, env)
        result = json.loads(out[out.index("{"):])
        if result["errors"]:
            raise ValueError(f"{result['errors']} errors, first: {result.get('first_error')}")
        if not result["bytes"]:
            raise ValueError("the run transferred no bytes")
        return result

    @contextlib.contextmanager
    def discard(self, partitions=1):
        if not self.discard_bin.exists():
            raise Skip(f"{self.discard_bin} does not exist: build it with `cargo build --release --example discard`")
        child = Process([self.discard_bin, "--partitions", partitions], self.root / "discard.log", stdout=subprocess.PIPE)
        with child:
            child.address = child.child.stdout.readline().decode().strip()
            yield child


class Broker(Process):
    """Standalone broker on free ports. `store` contains the lines of the object store section."""

    def __init__(self, lab, directory, store=None, env=None, seconds=120):
        self.lab, self.directory = lab, pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.grpc, self.http = free_port(), free_port()
        self.address = f"127.0.0.1:{self.grpc}"
        lines = ['cluster = "report"', "[broker]", "id = 1", f'data_dir = "{self.directory}/data"', "[grpc]", f'listen = "{self.address}"',
                 f'advertise = "{self.address}"', "[http]", f'listen = "127.0.0.1:{self.http}"', "[object_store]" if store else "", store or ""]
        config = self.directory / "strandline.toml"
        config.write_text("\n".join(lines) + "\n")
        began = time.monotonic()
        super().__init__([lab.bin, "broker", "--config", config], self.directory / "broker.log", environment(**(env or {})))
        try:
            self.wait_for(self.is_ready, seconds, "the broker")
        except ValueError:
            self.end(signal.SIGKILL)
            raise
        self.ready_s = time.monotonic() - began

    def is_ready(self):
        return is_ready(self.http)

    def cli(self, *arguments, timeout=120):
        return run([self.lab.bin, *arguments], timeout, environment(STRANDLINE_BOOTSTRAP=self.address))

    def topic(self, name, partitions, **config):
        pairs = [x for k, v in config.items() for x in ("--config", f"{k.replace('_', '.')}={v}")]
        self.cli("topic", "create", name, "--partitions", partitions, *pairs)

    def drop(self, name):
        self.cli("topic", "delete", name, "--yes")

    def describe(self, name):
        return json.loads(self.cli("topic", "describe", name, "--output", "json"))


# ------------------------------------------------------------------------------------------------------- references


def fio(lab, block, **how):
    """Runs a fio job of sequential writes of `block` bytes. Returns MB/s and the percentiles of the time of one write in ms."""
    if not shutil.which("fio"):
        raise Skip("fio is not in PATH")
    lab.require_disk(20)

    def erase():
        for file in lab.root.glob("j.*"):
            file.unlink()

    def measure():
        rates, p50, p99, p999 = [], [], [], []
        job = dict(name="j", bs=block, rw="write", ioengine="psync", runtime=max(2, lab.seconds // 2), time_based="", output_format="json", directory=lab.root)
        job.update(how)
        for _ in range(lab.repeat):
            if "overwrite" not in job:
                erase()
            command = ["fio"] + [f"--{k.replace('_', '-') if k == 'output_format' else k}" + (f"={v}" if v != "" else "") for k, v in job.items()]
            out = run(command, 300)
            jobs = json.loads(out[out.index("{"):])["jobs"]
            rates.append(sum(j["write"]["bw_bytes"] for j in jobs) / 1e6)
            at = jobs[0]["write"]["clat_ns"].get("percentile", {})
            for into, key in ((p50, "50.000000"), (p99, "99.000000"), (p999, "99.900000")):
                into.append(at.get(key, 0) / 1e6)
        erase()
        return dict(rate=Figure(rates, "MB/s"), p50=Figure(p50, "ms"), p99=Figure(p99, "ms"), p999=Figure(p999, "ms"))

    return lab.once(("fio", block, tuple(sorted(how.items()))), measure)


def durable(lab, block):
    """Measures direct overwrites of written blocks, each durable when it returns: the limit of a journal."""
    return fio(lab, block, size="1g", direct=1, overwrite=1, sync="dsync")


def appended(lab, block, **how):
    """Measures writes through the page cache that extend a file."""
    return fio(lab, block, size="16g", direct=0, fallocate="none", **how)


def file_syncs(lab, partitions):
    """Measures a sync of the file at each append: 64 KiB in turn to `partitions` growing files."""
    jobs = min(8, partitions)
    files = max(1, partitions // jobs)
    return fio(lab, BATCH, size="16g" if partitions == 1 else "2g", direct=0, fallocate="none", fdatasync=1, numjobs=jobs, group_reporting=1,
               nrfiles=files, openfiles=files, file_service_type="roundrobin:1")


def produce_arguments(lab, partitions, extra=()):
    """Returns the producer flags of every figure. `extra` holds pairs of a flag and its value, which may replace a default pair."""
    flags = {"--topic": "t", "--seconds": lab.seconds, "--record-size": RECORD, "--batch-size": BATCH, "--partitions-used": partitions}
    flags.update(zip(extra[::2], extra[1::2]))
    return [x for pair in flags.items() for x in pair]


def discarded(lab, partitions, extra=()):
    """Measures the same producer against a server that discards everything."""

    def measure():
        with lab.discard(partitions) as server:
            runs = []
            for _ in range(lab.repeat):
                with Meter(server.pid) as m:
                    r = lab.bench(server.address, "produce", *produce_arguments(lab, partitions, extra))
                runs.append(dict(r, cpu=m.server / (r["bytes"] / 1e9) if r["bytes"] else 0))
            return {k: Figure([r[k] for r in runs]) for k in ("mb_per_s", "p50_ms", "p99_ms", "p999_ms", "cpu")}

    return lab.once(("discard", partitions, tuple(extra)), measure)


def produced(lab, durability, partitions, extra=()):
    """Measures a producer against a new broker, with one new topic per run. The first run is a warm-up and does not count."""

    def measure():
        lab.require_disk(3 + lab.seconds * 2)
        runs = []
        with Broker(lab, lab.root / "produce") as broker:
            for i in range(-1, lab.repeat):
                broker.topic("t", partitions, durability=durability, remote_storage_enable="false")
                lab.sync_disk()
                with Meter(broker.pid) as m:
                    r = lab.bench(broker.address, "produce", *produce_arguments(lab, partitions, extra))
                    rss = rss_mb(broker.pid)
                if i >= 0:
                    gb = r["bytes"] / 1e9
                    runs.append(dict(r, cpu=m.server / gb, client_cpu=m.client / gb, others=m.others, rss=rss))
                    progress(f"    {durability} p{partitions}: {r['mb_per_s']:.0f} MB/s p99 {r['p99_ms']:.2f} ms, {m.server / gb:.2f} s/GB, others {m.others:.2f}")
                broker.drop("t")
        shutil.rmtree(lab.root / "produce", ignore_errors=True)
        return {k: Figure([r[k] for r in runs]) for k in ("mb_per_s", "p50_ms", "p99_ms", "p999_ms", "cpu", "client_cpu", "others", "rss")}

    return lab.once(("produce", durability, partitions, tuple(extra)), measure)
