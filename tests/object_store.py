"""An object store in memory that speaks as much of Google Cloud Storage's JSON API as gcsfs and tensorstore use.

Objects are whole values under flat names: there is no folder, no rename, no append, no change in place.
https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import contextlib
import json
import re
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from google_crc32c import value as crc32c

BUCKET = "bucket"


class Store(ThreadingHTTPServer):
    """A server with one bucket. objects: name -> (data, metadata)."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, dict[str, Any]]] = {}
        self.uploads: dict[str, tuple[dict[str, str], bytearray]] = {}
        self.mutex = threading.RLock()
        self.generation = 0
        self.reads: set[str] = set()  # the names of objects whose data was read
        self.room: float = float("inf")  # writes that are still accepted

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, such as one that was killed, is none of ours."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What points gcsfs, tensorstore and Google's client to this server; gcsfs asks no gRPC service about it."""
        hosts = {"STORAGE_EMULATOR_HOST": self.address, "TENSORSTORE_GCS_HTTP_URL": self.address}
        return hosts | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def names(self, prefix: str = "") -> list[str]:
        with self.mutex:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.objects[name][0]

    def write(self, name: str, data: bytes, condition: str | None = None) -> dict[str, Any] | None:
        """The new object's metadata; None where the generation in `condition` is not the one there (0: none is)."""
        with self.mutex:
            if condition is not None and condition != self.generation_of(name):
                return None
            self.generation += 1
            now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
            described = {
                "kind": "storage#object",
                "bucket": BUCKET,
                "name": name,
                "id": f"{BUCKET}/{name}/{self.generation}",
                "size": str(len(data)),
                "generation": str(self.generation),
                "metageneration": "1",
                "etag": str(self.generation),
                "crc32c": base64.b64encode(crc32c(data).to_bytes(4, "big")).decode(),
                "contentType": "application/octet-stream",
                "timeCreated": now,
                "updated": now,
            }
            self.objects[name] = bytes(data), described
            self.room -= 1
            return described

    def remove(self, name: str) -> None:
        with self.mutex:
            del self.objects[name]

    def generation_of(self, name: str) -> str:
        return self.objects[name][1]["generation"] if name in self.objects else "0"


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    store = Store()
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        pass

    def _route(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            self.body = b"".join(self._chunks())
        if self.server.room <= 0 and self.command != "GET":
            return self._fail(403)
        path = url.path
        if path.startswith("/upload/"):
            return self._upload(unquote(path))
        if found := re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)(/o(?:/(.+))?)?(?:/storageLayout)?", path):
            bucket, listing, name = unquote(found[1]), found[2], unquote(found[3] or "")
            if bucket != BUCKET:
                return self._fail(404)
            if not listing:
                return self._json({"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "US"})
            if not name:
                return self._list()
            if "rewriteTo" in name or "copyTo" in name or "compose" in name:
                return self._fail(501)
            return self._object(name)
        return self._fail(501)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _route

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, data: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _json(self, data: Any, **headers: str) -> None:
        self._send(200, json.dumps(data).encode(), **headers)

    def _fail(self, status: int) -> None:
        self._send(status, json.dumps({"error": {"code": status, "message": self.path, "errors": []}}).encode())

    def _list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        start, end = self.query.get("startOffset", ""), self.query.get("endOffset", "\U0010ffff")
        after, most = self.query.get("pageToken", ""), int(self.query.get("maxResults", 1000))
        items: list[dict[str, Any]] = []
        prefixes: dict[str, None] = {}
        answer: dict[str, Any] = {"kind": "storage#objects"}
        with self.server.mutex:
            for name in self.server.names(prefix):
                if name <= after or not start <= name < end:
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if found:
                    prefixes[prefix + head + delimiter] = None
                else:
                    items.append(self.server.objects[name][1])
                if len(items) + len(prefixes) >= most:
                    answer["nextPageToken"] = name if not found else prefix + head + delimiter + "\U0010fffe"
                    break
        if items:
            answer["items"] = items
        if prefixes:
            answer["prefixes"] = list(prefixes)
        self._json(answer)

    def _object(self, name: str) -> None:
        with self.server.mutex:
            generation = self.server.generation_of(name)
            wanted, unwanted = self.query.get("ifGenerationMatch"), self.query.get("ifGenerationNotMatch")
            if wanted is not None and wanted != generation:
                return self._fail(412)
            if name not in self.server.objects or self.query.get("generation", generation) != generation:
                return self._fail(404)
            if unwanted == generation:
                return self._send(304)
            if self.command == "DELETE":
                self.server.remove(name)
                return self._send(204)
            data, described = self.server.objects[name]
        if self.command != "GET":
            return self._fail(501)
        if self.query.get("alt") != "media":
            return self._json(described)
        self.server.reads.add(name)
        headers = {"x_goog_generation": generation, "x_goog_hash": f"crc32c={described['crc32c']}"}
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(found[1]) if found[1] else max(0, len(data) - int(found[2]))
            last = min(int(found[2]), len(data) - 1) if found[1] and found[2] else len(data) - 1
            if first >= len(data):
                return self._fail(416)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], "application/octet-stream", **headers)
        return self._send(200, data, "application/octet-stream", **headers)

    def _upload(self, path: str) -> None:
        if path.split("/")[5:6] != [BUCKET]:
            return self._fail(404)
        kind, key = self.query.get("uploadType"), self.query.get("upload_id")
        if key is not None:
            return self._continue(key)
        if kind == "resumable":
            key = uuid.uuid4().hex
            name = self.query.get("name") or json.loads(self.body)["name"]
            self.server.uploads[key] = {**self.query, "name": name}, bytearray()
            return self._json({}, Location=f"{self.server.address}{self.path}&upload_id={key}")
        name, data = self.query.get("name", ""), self.body
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            first, second = BytesParser(policy=HTTP).parsebytes(head + self.body).iter_parts()
            name, data = json.loads(first.get_payload(decode=True))["name"], second.get_payload(decode=True)
        return self._written(name, data, self.query.get("ifGenerationMatch"))

    def _continue(self, key: str) -> None:
        """A part of a resumable upload."""
        query, data = self.server.uploads[key]
        if self.command == "DELETE":
            del self.server.uploads[key]
            return self._send(499)
        data += self.body
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total == "*" or (total and int(total) > len(data)):
            return self._send(308, Range=f"bytes=0-{len(data) - 1}")
        del self.server.uploads[key]
        return self._written(query["name"], bytes(data), query.get("ifGenerationMatch"))

    def _written(self, name: str, data: bytes, condition: str | None) -> None:
        described = self.server.write(name, data, condition)
        return self._fail(412) if described is None else self._json(described)
