"""An S3 server of this machine, in memory: for benchmarks, and for tests of buckets."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

#: In a process of its own: it leaves sockets behind.
CODE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a server until the block ends; `credentials` are for it."""
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def credentials(endpoint: str) -> dict[str, str]:
    """What a client of a server has in its environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }


def make_bucket(endpoint: str, name: str) -> str:
    """An empty bucket's URL."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    return f"s3://{name}"
