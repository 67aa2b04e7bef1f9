"""A small server that speaks the part of the Hub's HTTP API that a download and an upload need."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """repos: id -> revision -> file name -> bytes. gated: ids that answer 403. cut: file names
    whose next download breaks off in the middle. held: file names whose whole downloads wait in the
    middle until ``release`` is set. expired: a token that answers 401. asked: the names of files that were sent. ranges: the Range headers that were seen. uploads: id -> file name -> bytes."""

    repos: dict[str, dict[str, dict[str, bytes]]]
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    expired: str = ""
    release: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    uploads: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    @contextmanager
    def serving(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.release.set()
            server.shutdown()
            server.server_close()


def commit_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, value, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def fail(self, status: int, code: str) -> None:
        self.say({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision (or its commit), or None after an error was answered."""
        if self.hub.expired and self.headers.get("Authorization") == f"Bearer {self.hub.expired}":
            message = "Invalid credentials in Authorization header"
            self.say({"error": message}, 401, X_Error_Message=message)
            return None
        if repo not in self.hub.repos:
            self.fail(401, "RepoNotFound")
            return None
        for name, files in self.hub.repos[repo].items():
            if revision in (name, commit_of(repo, name)):
                self.commit = commit_of(repo, name)
                return files
        self.fail(404, "RevisionNotFound")
        return None

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/models":
            words = parse_qs(urlsplit(self.path).query).get("search", [""])[0]
            self.say([{"id": repo, "tags": ["mlx"]} for repo in self.hub.repos if words in repo])
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/revision/(.+))?", path):
            repo, revision = match[1], match[2] or "main"
            if (files := self.files(repo, revision)) is not None:
                siblings = [{"rfilename": name} for name in files]
                about = {"siblings": siblings, "tags": [], "private": False}
                self.say({"id": repo, "sha": self.commit, **about})
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/tree/([^/]+)", path):
            if (files := self.files(match[1], match[2])) is not None:
                self.say(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        for name, content in files.items()
                    ]
                )
        elif match := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self.download(match[1], match[2], match[3])
        else:
            self.fail(404, "EntryNotFound")

    do_HEAD = do_GET

    def download(self, repo: str, revision: str, name: str) -> None:
        if repo in self.hub.gated:
            self.fail(403, "GatedRepo")
            return
        if (files := self.files(repo, revision)) is None:
            return
        if name not in files:
            self.fail(404, "EntryNotFound")
            return
        content = files[name]
        if self.command == "GET":
            self.hub.asked.append(name)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": self.commit, "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            self.hub.ranges.append(wanted)
            start = int(re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], **headers)
        elif name in self.hub.cut and self.command == "GET":
            self.hub.cut.discard(name)
            headers["Content_Length"] = str(len(content))
            self.answer(200, content[: len(content) // 2], **headers)
            self.close_connection = True
        elif name in self.hub.held and self.command == "GET":
            headers["Content_Length"] = str(len(content))
            self.answer(200, content[: len(content) // 2], **headers)
            self.hub.release.wait()
            with suppress(OSError):  # who asked may be gone
                self.wfile.write(content[len(content) // 2 :])
        else:
            self.answer(200, content, **headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        self.hub.blobs[oid] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if path == "/api/repos/create":
            value = json.loads(body)
            repo = f"{value.get('organization') or 'someone'}/{value['name']}"
            self.hub.uploads.setdefault(repo, {})
            self.say({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"})
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/preupload/main", path):
            files = json.loads(body)["files"]
            self.say(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["size"] > 10_000 else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.say(
                {
                    "transfer": "basic",
                    "objects": [
                        {
                            "oid": entry["oid"],
                            "size": entry["size"],
                            "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}},
                        }
                        for entry in objects
                    ],
                }
            )
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/main", path):
            import base64

            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    content = base64.b64decode(value["content"])
                    self.hub.uploads[match[1]][value["path"]] = content
                elif entry["key"] == "lfsFile":
                    self.hub.uploads[match[1]][value["path"]] = self.hub.blobs[value["oid"]]
            url = f"{self.hub.url}/{match[1]}/commit/1"
            self.say({"success": True, "commitOid": "1", "commitUrl": url, "hookOutput": ""})
        else:
            self.fail(404, "EntryNotFound")
