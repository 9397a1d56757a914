"""Hub ids become folders; tested against a hub of one repository on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from v4sdk import hub
from v4sdk.errors import CheckpointError
from v4sdk.progress import Progress

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-v4"
BIG = "model-00001-of-00002.safetensors"
FILES = {
    "config.json": b'{"model_type": "deepseek_v4"}',
    "tokenizer.json": b"{}",
    BIG: bytes(range(256)) * 4000,
    "model-00002-of-00002.safetensors": b"second shard",
    "encoding/encoding_dsv4.py": b"X = 1\n",
    "inference/model.py": b"raise SystemExit\n",
    "inference/copy.safetensors": b"not ours",
    "README.md": b"# tiny\n",
}


@dataclass
class Hub:
    """What the server does wrong, and what it was asked.

    Attributes:
        cut_after: bytes after which the first download of BIG breaks off. down: answer 500 to every download.
        got: (file, Range header or None) of each download.
    """

    cut_after: int | None = None
    down: bool = False
    got: list[tuple[str, str | None]] = field(default_factory=list)


def handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Keep the test's output clean."""

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def missing(self, code: str) -> None:
            self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[0] == "api":
                if "/".join(parts[2:4]) != REPO:
                    self.missing("RepoNotFound")
                elif parts[4] == "revision" and parts[5] not in ("main", "april", COMMIT):
                    self.missing("RevisionNotFound")
                elif parts[4] == "revision":
                    siblings = [{"rfilename": name} for name in FILES]
                    self.json(
                        {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "private": False}
                    )
                else:
                    self.json(
                        [
                            {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                            for n, b in FILES.items()
                        ]
                    )
                return
            name = "/".join(parts[4:])
            self.download(name, FILES[name])

        def download(self, name: str, body: bytes) -> None:
            headers = {
                "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if self.command == "HEAD":
                self.answer(200, body, headers)
                return
            asked = self.headers.get("Range")
            state.got.append((name, asked))
            if state.down and name == BIG:
                self.answer(500, b"")
                return
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            if asked:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            if name == BIG and state.cut_after is not None:
                cut, state.cut_after = state.cut_after, None
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])
                self.close_connection = True
                return
            self.answer(206 if asked else 200, body[start:], headers)

    return Handler


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub at 127.0.0.1 and an empty cache."""
    state = Hub()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{http.server_address[1]}")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_repository_becomes_a_folder_with_what_is_read_and_nothing_else(server: Hub) -> None:
    seen: list[Progress] = []
    folder = hub.resolve(REPO, on_progress=seen.append)
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {n: b for n, b in FILES.items() if not n.startswith(("inference", "README"))}
    assert seen[-1].done == seen[-1].total == sum(map(len, found.values()))
    assert {p.unit for p in seen} == {"bytes"}


def test_info_needs_no_shards(server: Hub) -> None:
    folder = hub.resolve(REPO, weights=False)
    assert not list(folder.rglob("*.safetensors"))
    assert (folder / "config.json").exists()


def test_a_cut_connection_is_taken_up_where_it_broke(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # the client keeps whole chunks, of 10 MB unless told otherwise
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    server.cut_after = 300_000
    folder = hub.resolve(REPO)
    assert (folder / BIG).read_bytes() == FILES[BIG]
    ranges = [asked for name, asked in server.got if name == BIG]
    assert ranges == [None, "bytes=300000-"]


def test_complete_files_are_kept_when_a_download_fails(server: Hub) -> None:
    server.down = True
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        hub.resolve(REPO)
    assert "same command again" in str(caught.value.hint)
    first, server.got[:] = {name for name, _ in server.got}, []
    server.down = False
    folder = hub.resolve(REPO)
    assert {p.name for p in folder.glob("*.safetensors")} == {BIG, "model-00002-of-00002.safetensors"}
    again = {name for name, _ in server.got}
    assert BIG in again
    assert len(again) < len(first | again)


def test_a_named_revision_is_asked_for(server: Hub) -> None:
    assert hub.resolve(REPO, "april").name == COMMIT
    with pytest.raises(CheckpointError, match="has no revision `may`"):
        hub.resolve(REPO, "may")


def test_unknown_repository_and_malformed_id(server: Hub) -> None:
    with pytest.raises(CheckpointError, match="`someone/other` is neither a folder here nor a repository"):
        hub.resolve("someone/other")
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id"):
        hub.resolve("some one/x y")


def test_without_network_the_cache_serves_and_its_absence_is_explained(
    server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = hub.resolve(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.resolve(REPO) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="hub cannot be reached") as caught:
        hub.resolve(REPO)
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hub cannot be reached"):
        hub.resolve(REPO)


def test_local_folders_win_and_missing_paths_never_reach_the_hub(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny-v4").mkdir(parents=True)
    assert hub.resolve(REPO) == Path(REPO)
    for missing in ("./a/b", "/no/such", "~/nothing/here", "word", "a/b/c", Path("owner/name")):
        with pytest.raises(CheckpointError, match="does not exist"):
            hub.resolve(missing)
    assert server.got == []
