"""A server in memory that speaks as much of the Hugging Face hub's API as an upload uses.

https://huggingface.co/docs/hub/api, https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"
LARGE = (".safetensors", ".parquet")  # what the hub keeps as LFS files


class Hub(ThreadingHTTPServer):
    """repositories: (type, OWNER/NAME) -> {"private", "url", "files": name -> bytes, "commits": lists of
    operations}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        return self.repositories[kind, name]["files"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, data: Any = None, **headers: str) -> None:
        body = b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = b""
            while size := int(self.rfile.readline(), 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return parts
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_one(self) -> None:
        path, body = self.path.split("?")[0], self.body()
        if found := re.fullmatch("/large/([0-9a-f]{64})", path):  # an address that is signed: it takes no token
            assert self.command == "PUT" and "Authorization" not in self.headers
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.server.large[found[1]] = body
            return self.answer(200)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid user token."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if found := re.fullmatch("/api/(model|dataset)s/([^/]+/[^/]+)", path):  # asked where it may not be made
            assert (found[1], found[2]) not in self.server.repositories
            return self.answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        found = re.fullmatch("/api/(model|dataset)s/([^/]+/[^/]+)/(tree|preupload|commit)/main", path)
        assert found, path
        repository = self.server.repositories[found[1], found[2]]
        return getattr(self, found[3])(repository, body)

    do_GET = do_POST = do_PUT = handle_one

    def create(self, asked: dict[str, Any]) -> None:
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.address}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if asked["organization"] == "others":
            return self.answer(403, {"error": "You don't have the rights to create a model under others"})
        if (kind, name) in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("visibility") == "private"
        self.server.repositories[kind, name] = {"private": private, "files": {}, "commits": [], "url": url}
        self.answer(200, {"url": url, "name": name, "id": "0"})

    def tree(self, repository: dict[str, Any], body: bytes) -> None:
        files = repository["files"].items()
        listed = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files]
        self.answer(200, listed)

    def preupload(self, repository: dict[str, Any], body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, asked: dict[str, Any]) -> None:
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: dict[str, Any], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        files = repository["files"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repository["commits"].append(lines[1:])
        self.answer(200, {"commitUrl": f"{repository['url']}/commit/{'0' * 40}", "commitOid": "0" * 40})


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
