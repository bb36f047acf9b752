"""An S3 server of this machine, and a proxy before it that can be told to misbehave."""

import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

#: In a process of its own: it leaves sockets behind, and warnings are errors here.
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
    """The endpoint of a server in memory; credentials for it are in the environment."""
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert process.stdin and process.stdout
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
            ("LFTPIPE_RETRY_SECONDS", "3"),
        ):
            patch.setenv(name, value)
        try:
            yield endpoint
        finally:
            process.kill()


def make_bucket(endpoint: str, name: str) -> str:
    """An empty bucket's URL."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    return f"s3://{name}"


class Proxy:
    """Passes connections on; `cut` of those to come are cut after some bytes of the answer."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = 0
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Each request is a connection of its own, so that each can be cut."""
        with client:
            try:
                server = socket.create_connection(self._target)
            except OSError:
                return
            with server:
                threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
                sent = 0
                while data := server.recv(2**16):
                    if self.cut > 0:
                        self.cut -= 1
                        self.refused += 1
                        client.sendall(data[: len(data) // 2])
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(data)
                    sent += len(data)

    @staticmethod
    def _pump(client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(2**16):
                server.sendall(data)
        except OSError:
            pass
