"""A stand-in for the Hugging Face hub on this machine: listings, files, and refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token"

Repositories = Mapping[str, Mapping[str, bytes]]


class Hub:
    """Serves repositories of files by name, all at one commit, which is also the branch `main`.

    A repository whose name ends in "private" needs the token; one in "gated" is never given.
    `requests` lists what was asked for, as "METHOD path".
    """

    def __init__(self, repositories: Repositories) -> None:
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repositories, self.requests))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops serving; the port then refuses connections."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _handler(repositories: Repositories, requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            path = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if path[:2] == ["api", "models"]:
                self._listing("/".join(path[2:4]), path[5] if path[4:5] == ["revision"] else "main")
            else:
                self._file("/".join(path[:2]), path[3], "/".join(path[4:]))

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _repository(self, name: str, revision: str) -> Mapping[str, bytes] | None:
            """The files of a repository, or None after the request was refused."""
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if name.endswith("gated"):
                self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif name not in repositories or (name.endswith("private") and not authorized):
                self._answer(401 if not authorized else 404, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                return repositories[name]
            return None

        def _listing(self, name: str, revision: str) -> None:
            files = self._repository(name, revision)
            if files is None:
                return
            siblings = [{"rfilename": file} for file in files]
            body = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _file(self, name: str, revision: str, file: str) -> None:
            files = self._repository(name, revision)
            if files is None:
                return
            if file not in files:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha256(files[file]).hexdigest()
            self._answer(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            # A kept connection would go on being served after `close`.
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
