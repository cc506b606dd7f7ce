"""What is kept in a cache: written durably by any number of processes, fetched whole or not at all."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from files.errors import ConfigError
from tests.training.data.parts import fails
from training.data import cache
from training.data.cache import cache_folder, fetch, locked, save, shown

CONTENT = bytes(range(256)) * 5000


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any name, and fails as told: `trouble` has what becomes of the next requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.trouble: list[int | str] = []
        self.asked: list[str] = []
        self.content = CONTENT
        self.tag = '"one"'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append(self.headers.get("Range", "all"))
        trouble = server.trouble.pop(0) if server.trouble else ""
        if isinstance(trouble, int):
            self.send_error(trouble)
            return
        start = 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range") == server.tag and trouble != "no ranges":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.tag)
        self.end_headers()
        self.wfile.write(body[: len(body) // 3] if trouble == "cut" else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: Server, path: Path, name: str = "a.tar") -> None:
    fetch({f"{server.url}/{name}": path}, key="data.train_shards", pause=0)


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "a.tar"
    get(server, path)
    get(server, path)
    assert path.read_bytes() == CONTENT and server.asked == ["all"]
    assert sorted(p.name for p in path.parent.iterdir()) == [".a.tar.lock", "a.tar"]


@pytest.mark.parametrize("trouble", [["cut", "cut"], [503, "cut", 429], ["cut", 416]])
def test_a_broken_connection_is_gone_on_with(server: Server, tmp_path: Path, trouble: list[int | str]) -> None:
    server.trouble = list(trouble)
    get(server, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and not server.trouble
    third = len(CONTENT) // 3
    if trouble == ["cut", "cut"]:
        assert server.asked == ["all", f"bytes={third}-", f"bytes={third + (len(CONTENT) - third) // 3}-"]


def test_a_run_that_was_stopped_is_gone_on_with_by_the_next(server: Server, tmp_path: Path) -> None:
    server.trouble = ["cut", *[500] * (cache.ATTEMPTS - 1)]
    with fails(f"data.train_shards: '{server.url}/a.tar' cannot be fetched: 500", "tried 6 times", "is kept"):
        get(server, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()
    server.asked.clear()
    get(server, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and server.asked == [f"bytes={len(CONTENT) // 3}-"]


@pytest.mark.parametrize("how", ["another file", "no ranges"])
def test_what_cannot_be_gone_on_with_is_fetched_whole(server: Server, tmp_path: Path, how: str) -> None:
    server.trouble = ["cut", *[404] * cache.ATTEMPTS]
    with fails("404"):
        get(server, tmp_path / "a.tar")
    server.trouble = ["no ranges"] if how == "no ranges" else []
    if how == "another file":
        server.content, server.tag = CONTENT[::-1], '"two"'
    get(server, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == server.content


def test_what_is_not_there_is_named_at_once(server: Server, tmp_path: Path) -> None:
    server.trouble = [404, 404]
    with fails(f"data.val_shards: '{server.url}/a.tar' cannot be fetched: 404 Not Found"):
        fetch({f"{server.url}/a.tar?token=secret": tmp_path / "a.tar"}, key="data.val_shards", pause=0)
    assert len(server.asked) == 1 and not (tmp_path / "a.tar").exists()


def test_nobody_answers(tmp_path: Path) -> None:
    with Server() as closed:
        url = closed.url
    with fails(f"'{url}/a.tar' cannot be fetched: ", "refused (tried 6 times)"):
        fetch({f"{url}/a.tar": tmp_path / "a.tar"}, key="data.train_shards", pause=0)


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with fails(f"data.cache: '{tmp_path / 'file'}' cannot be written"):
        get(server, tmp_path / "file" / "a.tar")

    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None: ...

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_writable", lambda part, mode: Full())
    with pytest.raises(ConfigError, match=r"^data.cache: '.*' cannot be written: No space left on device\nchoose"):
        get(server, tmp_path / "a.tar")


def test_several_at_once_ask_once(server: Server, tmp_path: Path) -> None:
    threads = [threading.Thread(target=get, args=(server, tmp_path / "a.tar")) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and server.asked == ["all"]


def test_a_url_is_shown_without_its_secrets() -> None:
    assert shown("https://me:word@host:8/a/b.tar?token=1#x") == "https://host:8/a/b.tar"


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/drop-path-zoo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "drop-path-zoo"


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    inside = []

    def enter() -> None:
        with locked(tmp_path / "a"):
            inside.append(1)
            assert len(inside) == 1
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Killed:
    """For tests/kill_script.py: a file that is saved again, and what a killed save left is removed."""

    scenarios: ClassVar = {"save": 3}

    def prepare(self, scenario: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "a.npz").write_bytes(b"1")

    def act(self, scenario: str, folder: Path) -> None:
        cache._OLD = -1
        save(folder / "a.npz", lambda file: file.write(b"9"))

    def read(self, scenario: str, folder: Path) -> int | None:
        return int((folder / "a.npz").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("lose", ["kill", "lose"])
def test_a_save_that_is_killed_leaves_the_old_or_the_new(kill_anywhere, lose: str) -> None:
    assert kill_anywhere(lose) == ["save"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "a.npz", fail)
    assert not list(tmp_path.iterdir())
