"""Object stores of a broker, and the reads that are its references: a directory, a MinIO server, and the segment files."""
import datetime, hashlib, hmac, http.client, os, re, shutil, threading, time

from measure import MIB, Process, Skip, free_port

class Directory:
    """Directory as object store. Its reference is a read of the objects as files."""

    def __init__(self, lab):
        self.path = lab.root / "object-store"
        self.path.mkdir()
        self.config, self.env, self.reference = f'url = "file://{self.path}"', {}, "reading the objects"

    def ranged_gets(self, want):
        """Reads the newest segment objects as files, at least `want` bytes if there are that many. Returns MB/s."""
        buffer, total, began = bytearray(4 * MIB), 0, time.monotonic()
        for file in newest(self.path.rglob("*.segment"), want):
            with open(file, "rb", buffering=0) as f:
                while n := f.readinto(buffer):
                    total += n
        return total / 1e6 / (time.monotonic() - began)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)


def newest(files, want):
    """Returns the newest files, until they have at least `want` bytes together."""
    taken = []
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        taken.append(file)
        want -= file.stat().st_size
        if want <= 0:
            break
    return taken


class Minio(Process):
    """MinIO server with one bucket. Its reference is ranged GETs of 4 MiB, 8 of them concurrently."""

    KEY, SECRET, BUCKET = "strandline", "strandline-secret", "report"

    def __init__(self, lab):
        program = os.environ.get("STRANDLINE_MINIO") or shutil.which("minio")
        if not program or not os.path.exists(program):
            raise Skip("no S3 server: `minio` is not in PATH and STRANDLINE_MINIO names no program")
        self.port, self.path = free_port(), lab.root / "minio"
        self.path.mkdir()
        credentials = dict(MINIO_ROOT_USER=self.KEY, MINIO_ROOT_PASSWORD=self.SECRET, MINIO_BROWSER="off", MINIO_UPDATE="off", HOME=str(self.path))
        super().__init__([program, "server", "--quiet", "--address", f"127.0.0.1:{self.port}", self.path / "data"], lab.root / "minio.log", dict(os.environ, **credentials))
        self.wait_for(lambda: self.status("GET", "/minio/health/ready") == 200, 30, "MinIO")
        self.wait_for(lambda: self.status("PUT", f"/{self.BUCKET}") in (200, 409), 30, "MinIO's bucket")
        self.config = f'url = "s3://{self.BUCKET}/bench"\nendpoint = "http://127.0.0.1:{self.port}"\nregion = "us-east-1"\npath_style = true'
        self.env = dict(AWS_ACCESS_KEY_ID=self.KEY, AWS_SECRET_ACCESS_KEY=self.SECRET, AWS_REGION="us-east-1", AWS_ALLOW_HTTP="true")
        self.reference = "8 concurrent ranged GETs"

    def request(self, connection, method, path, query="", headers=None):
        """Signs a request (AWS Signature Version 4, unsigned payload) and sends it."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        signed = {"host": f"127.0.0.1:{self.port}", "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": now}
        names = ";".join(signed)
        canonical = "\n".join([method, path, query, *(f"{k}:{v}" for k, v in signed.items()), "", names, "UNSIGNED-PAYLOAD"])
        scope = f"{now[:8]}/us-east-1/s3/aws4_request"
        key = ("AWS4" + self.SECRET).encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        sign = hmac.new(key, text.encode(), "sha256").hexdigest()
        authorization = f"AWS4-HMAC-SHA256 Credential={self.KEY}/{scope}, SignedHeaders={names}, Signature={sign}"
        connection.request(method, path + ("?" + query if query else ""), headers={**signed, **(headers or {}), "authorization": authorization})
        return connection.getresponse()

    def status(self, method, path):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            return self.request(c, method, path).status
        except OSError:
            return 0
        finally:
            c.close()

    def segments(self, want):
        """Returns key and size of the newest segment objects, until they have at least `want` bytes together."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        found, token = [], ""
        while True:
            text = self.request(c, "GET", f"/{self.BUCKET}", ("continuation-token=" + token + "&" if token else "") + "list-type=2").read().decode()
            found += re.findall(r"<Key>([^<]+\.segment)</Key><LastModified>([^<]+)</LastModified>.*?<Size>(\d+)</Size>", text)
            more = re.search(r"<NextContinuationToken>([^<]+)<", text)
            if not more:
                break
            token = more[1].replace("/", "%2F").replace("=", "%3D").replace("+", "%2B")
        c.close()
        taken = []
        for key, _, size in sorted(found, key=lambda f: f[1], reverse=True):
            taken.append((key, int(size)))
            want -= int(size)
            if want <= 0:
                break
        return taken

    def ranged_gets(self, want):
        """Reads the newest segment objects with concurrent ranged GETs, at least `want` bytes if there are that many. Returns MB/s."""
        ranges = [(key, at, min(at + 4 * MIB, size) - 1) for key, size in self.segments(want) for at in range(0, size, 4 * MIB)]
        if not ranges:
            raise ValueError("the bucket contains no segment")
        lock, total = threading.Lock(), [0]

        def worker():
            c, buffer = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30), bytearray(MIB)
            while True:
                with lock:
                    if not ranges:
                        break
                    key, first, last = ranges.pop()
                response, got = self.request(c, "GET", f"/{self.BUCKET}/{key}", headers={"range": f"bytes={first}-{last}"}), 0
                while n := response.readinto(buffer):
                    got += n
                with lock:
                    total[0] += got
            c.close()

        threads, began = [threading.Thread(target=worker) for _ in range(8)], time.monotonic()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return total[0] / 1e6 / (time.monotonic() - began)


def drop_page_cache(directory):
    """Drops a directory's files from the page cache."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def read_files(directory, want):
    """Reads segment files one after another, 1 MiB at a time. Returns MB/s. Fails if they have less than 90 % of `want` bytes."""
    buffer, total, began = bytearray(MIB), 0, time.monotonic()
    for file in sorted(directory.rglob("*.log")):
        with open(file, "rb", buffering=0) as f:
            while n := f.readinto(buffer):
                total += n
    if total < want * 0.9:
        raise ValueError(f"the segment files in {directory} have {total} bytes, but at least {want} were written")
    return total / 1e6 / (time.monotonic() - began)
