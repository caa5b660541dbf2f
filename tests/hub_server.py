"""A small hub on this machine: the calls with which huggingface_hub makes a repository, sends files, also large ones, and fetches them."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """By SHA-256: files that are sent apart from the commit."""
    sent_large: dict[str, set[str]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    refuse: int = 0
    """An HTTP status to refuse commits with."""

    def sha(self, name: str) -> str:
        files = self.repositories[name]
        content = [(path, hashlib.sha256(files[path]).hexdigest()) for path in sorted(files)]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = self.content()
        self.hub.calls.append(f"{self.command} {path}")
        # What is sent to its storage is authorised by the address.
        if not path.startswith("/storage/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return action(self, content, *found.groups())
        self.answer({"error": f"{self.command} {path} is not known here"}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, content: bytes) -> None:
        asked = json.loads(content)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer({"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, 409)
        self.hub.repositories[name], self.hub.private[name] = {}, "private" in (asked.get("visibility"), asked.get("private") and "private")
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def validate(self, content: bytes) -> None:
        """The real hub refuses a card whose metadata is no YAML, or no dictionary."""
        found = re.match(r"---\n(.*?)\n---\n", json.loads(content)["content"], re.DOTALL)
        try:
            errors = [] if found and isinstance(yaml.safe_load(found[1]), dict) else [{"message": "no metadata"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, content: bytes, name: str) -> None:
        files = []
        for file in json.loads(content)["files"]:
            large = file["size"] > 50_000 or file["path"].endswith((".safetensors", ".png"))
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        self.answer({"files": files})

    def batch(self, content: bytes, name: str) -> None:
        objects = []
        for file in json.loads(content)["objects"]:
            upload = {"href": f"{self.hub.url}/storage/{file['oid']}", "header": {}}
            objects.append(file | ({} if file["oid"] in self.hub.large else {"actions": {"upload": upload}}))
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def store(self, content: bytes, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer({"error": "another content"}, 400)
        self.hub.large[oid] = content
        self.answer()

    def commit(self, content: bytes, name: str) -> None:
        if self.hub.refuse:
            return self.answer({"error": "refused"}, self.hub.refuse)
        files = dict(self.hub.repositories[name])
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
                self.hub.sent_large.setdefault(name, set()).add(value["path"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repositories[name] = files
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{self.hub.sha(name)}", "commitOid": self.hub.sha(name), "success": True})

    def info(self, content: bytes, name: str, *revision: str) -> None:
        if name not in self.hub.repositories:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files = [{"rfilename": path} for path in sorted(self.hub.repositories[name])]
        self.answer({"id": name, "modelId": name, "sha": self.hub.sha(name), "private": self.hub.private[name], "siblings": files,
                     "tags": [], "downloads": 0, "likes": 0})

    def tree(self, content: bytes, name: str, revision: str) -> None:
        entries = []
        for path, data in sorted(self.hub.repositories[name].items()):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entries.append({"type": "file", "path": path, "size": len(data), "oid": blob})
            if path in self.hub.sent_large.get(name, ()):
                entries[-1]["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        self.answer(entries)

    def resolve(self, content: bytes, name: str, revision: str, path: str) -> None:
        data = self.hub.repositories.get(name, {}).get(path)
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        tag = hashlib.sha256(data).hexdigest()
        self.answer(data, ETag=f'"{tag}"', X_Repo_Commit=self.hub.sha(name), X_Linked_Size=str(len(data)), X_Linked_Etag=f'"{tag}"')


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/main", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /storage/(\w+)", _Handler.store),
    (rf"POST /api/models/{_NAME}/commit/main", _Handler.commit),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(\w+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/(\w+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/(\w+)/(.+)", _Handler.resolve),
)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that listens on this machine while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
