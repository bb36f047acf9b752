"""A proxy before an S3 server of this machine that can be told to misbehave."""

import socket
import threading


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
