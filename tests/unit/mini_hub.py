"""A hub of data sets on this machine: it answers what the libraries ask the real one.

The libraries read HF_ENDPOINT when they are imported, so they run in a process of their own.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Name of a repository -> branch or tag -> path -> content.
Repositories = Mapping[str, Mapping[str, Mapping[str, bytes]]]


def commit(repository: str, revision: str) -> str:
    """Commit that a branch or tag of the hub stands for."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    """The part of the hub's interface that reading a data set needs."""

    repositories: Repositories
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "datasets"]:
            what, revision, *folder = path[4:] or ("revision", "main")
            self._describe("/".join(path[2:4]), what, revision, "".join(f"{f}/" for f in folder))
        elif path[0] == "datasets" and path[3:4] == ["resolve"]:
            self._give("/".join(path[1:3]), path[4], "/".join(path[5:]))
        else:
            self._send(404, {})

    do_HEAD = do_GET

    def _find(self, repository: str, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        for name, files in self.repositories.get(repository, {}).items():
            if revision in (name, commit(repository, name)):
                return commit(repository, name), files
        missing = "RevisionNotFound" if repository in self.repositories else "RepoNotFound"
        self._send(404, {"X-Error-Code": missing})
        return None

    def _describe(self, repository: str, what: str, revision: str, folder: str) -> None:
        if found := self._find(repository, revision):
            sha, files = found
            inner = {path: path.removeprefix(folder) for path in files if path.startswith(folder)}
            whole = "recursive=true" in self.path.lower()
            entries = [
                {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
                for path, name in inner.items()
                if whole or "/" not in name
            ]
            folders = {folder + name.split("/")[0] for name in inner.values() if "/" in name}
            entries += [
                {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
                for path in sorted(folders)
            ]
            siblings = [{"rfilename": path} for path in files]
            about = {"id": repository, "sha": sha, "siblings": siblings, "tags": []}
            content = json.dumps(entries if what == "tree" else about).encode()
            self._send(200, {"Content-Type": "application/json"}, content)

    def _give(self, repository: str, revision: str, path: str) -> None:
        if found := self._find(repository, revision):
            sha, files = found
            if path not in files:
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
                return
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self._send(200, {"ETag": etag, "X-Repo-Commit": sha}, files[path])

    def _send(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextlib.contextmanager
def serving(repositories: Repositories) -> Iterator[str]:
    """Serve repositories; gives the address."""
    handler = type("Answers", (_Answers,), {"repositories": repositories})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


LOAD = """
import json, sys
from fedamole.datasets.loading import load_corpus
from fedamole.errors import FedamoleError
from fedamole.settings import DatasetSettings
assert not {"datasets", "torch", "transformers"} & set(sys.modules)
for line in sys.stdin:
    try:
        corpus = load_corpus(DatasetSettings.model_validate_json(line))
        found = {
            "digest": corpus.digest,
            "dropped": corpus.dropped,
            "responses": [example.response for example in corpus.examples],
        }
    except FedamoleError as error:
        found = {"error": str(error)}
    print(json.dumps(found), flush=True)
"""


def load(settings: list[str], home: Path, endpoint: str | None) -> list[dict[str, Any]]:
    """Load data sets, given as JSON, in one new process; without an endpoint offline."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        input="\n".join(settings),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
