"""A proxy of the environment: which way an exchange goes, and what is certain when the proxy fails."""

import socket
import threading

import loopback
import pytest
from exchanges import SOON, client, deliver
from gateways import close_clients  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement import NotSent, Sent


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_of_the_environment_is_used(scheme, monkeypatch):
    """Plain requests are given to it whole; through it goes a tunnel, which it does not see into."""
    with serving(lambda _: Reply(201, "1"), tls=scheme == "https") as server, _proxying() as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", proxy.url.replace("://", "://user:pass%21@"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        one = client(server.url)

        assert [deliver(one), deliver(one)] == [Sent("1"), Sent("1")]
        assert len(proxy.asked) == (2 if scheme == "http" else 1)
        asked = proxy.asked[0]
        method, target = ("POST", f"{server.url}/messages") if scheme == "http" else ("CONNECT", server.url[8:])
        assert asked.startswith(f"{method} {target} HTTP/1.1\r\n")
        assert "Proxy-Authorization: Basic dXNlcjpwYXNzIQ==\r\n" in asked
        assert not [request for request in server.received if "proxy-authorization" in request.headers]

        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert deliver(client(server.url)) == Sent("1")
        assert len(proxy.asked) == (2 if scheme == "http" else 1)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n", "ProxyError"),
        (b"HTTP/1.1 502 No\r\n\r\n", "ProxyError"),
        (b"HTTP/1.1 200 Yes\r\n\r\nsurplus", "ConnectError"),
        (b"nonsense\r\n\r\n", "ConnectError"),
        (b"", "ConnectTimeout"),
    ],
)
def test_a_proxy_that_makes_no_tunnel_is_not_sent(answer, error, monkeypatch):
    """Nothing of the request has been written, whatever the proxy says."""
    with serving(lambda _: loopback.saying(answer, then=loopback.hang)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        for _ in range(3):  # The next one has the number of the last one's descriptor.
            assert deliver(client("https://127.0.0.2:1", connect_within=SOON)) == NotSent(f"test: {error}")


@pytest.mark.parametrize("url", ["socks5://h:1", "https://h:1", "http://"])
def test_a_proxy_that_is_not_supported_is_refused_at_once(url, monkeypatch):
    """Where it is configured, and without what the address may hold."""
    monkeypatch.setenv("https_proxy", url)
    with pytest.raises(ValueError, match=r"^HTTPS_PROXY: must be an http URL with a host$"):
        client("https://gateway.example")


class _Proxy:
    """Hands everything on, byte for byte, after a CONNECT or without one."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        asked = connection.recv(65_536)
        self.asked.append(asked.decode())
        target = asked.split(b" ")[1].removeprefix(b"http://").partition(b"/")[0].decode()
        host, _, port = target.rpartition(":")
        with connection, socket.create_connection((host, int(port))) as onwards:
            if asked.startswith(b"CONNECT"):
                connection.sendall(b"HTTP/1.1 200 Yes\r\n\r\n")
                back = threading.Thread(target=self._copy, args=(onwards, connection), daemon=True)
                back.start()
                self._copy(connection, onwards)
                back.join(5)
                return
            while asked:
                head, _, body = asked.partition(b"\r\n\r\n")
                lines = head.split(b"\r\n")
                lines[0] = lines[0].replace(b"http://" + target.encode(), b"")
                lines = [line for line in lines if not line.lower().startswith(b"proxy-")]
                onwards.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
                connection.sendall(onwards.recv(65_536))
                if asked := connection.recv(65_536):
                    self.asked.append(asked.decode())

    def _copy(self, source, target):
        try:
            while data := source.recv(65_536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def _proxying() -> _Proxy:
    return _Proxy()
