"""A small Hugging Face hub on this machine: repositories, branches, commits, LFS and downloads, as its client asks for them."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class Hub(BaseHTTPRequestHandler):
    """Keeps everything in the server's `repos`: id -> {"branches": name -> commit, "commits": commit -> path -> bytes}."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.is_refused():
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid credentials in Authorization header"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            known = name in self.server.repos
            empty = hashlib.sha1(name.encode()).hexdigest()
            self.server.repos.setdefault(name, {"branches": {"main": empty}, "commits": {empty: {}}, **asked})
            return self.reply({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        if self.path == "/api/validate-yaml":
            import yaml

            card = json.loads(body)["content"]
            wrong = [] if isinstance(yaml.safe_load(card.split("---")[1])["license"], str) else [{"message": "licence"}]
            return self.reply({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        _, _, _, owner, name, what, revision = self.path.split("?")[0].split("/")
        repo = self.server.repos[f"{owner}/{name}"]
        if what == "branch":
            repo["branches"].setdefault(revision, repo["branches"]["main"])
            return self.reply({})
        if what == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.reply({"files": files})
        assert what == "commit", self.path
        files = dict(repo["commits"][repo["branches"][revision]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo["commits"][sha], repo["branches"][revision] = files, sha
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{owner}/{name}/commit/{sha}"})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.is_refused():
            return
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.lfs[oid] = data
        self.reply({})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            commit = self.commit(found[1], found[3] or "main")
            if commit is None:
                return
            files = self.server.repos[found[1]]["commits"][commit]
            if found[2] == "tree":
                return self.reply(
                    [
                        {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                        for n, d in files.items()
                    ]
                )
            return self.reply({"id": found[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        assert found, path
        commit = self.commit(found[1], found[2])
        if commit is None:
            return
        data = self.server.repos[found[1]]["commits"][commit].get(found[3])
        if data is None:
            return self.reply({"error": "Entry not found"}, 404, headers={"X-Error-Code": "EntryNotFound"})
        tags = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        self.reply(data, headers=tags)

    do_HEAD = do_GET

    def is_refused(self) -> bool:
        """Whether this is the step at which the server is to fail; an error is sent then."""
        self.server.steps.append(self.path.split("?")[0])
        refused = bool(self.server.refused) and self.server.refused in self.path
        if refused:
            self.reply({"error": "not today"}, 403)
        return refused

    def commit(self, repo_id: str, revision: str) -> str | None:
        """The commit that a revision names; an error is sent where there is none."""
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self.reply({"error": "Repository not found"}, 404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        commit = repo["branches"].get(revision, revision)
        if commit not in repo["commits"]:
            self.reply({"error": "Invalid rev id"}, 404, headers={"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def reply(self, body: Any, status: int = 200, kind: str = "application/json", headers: Any = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@contextmanager
def hub() -> Iterator[Any]:
    """The running server; `url`, `repos`, the paths that were `asked` for and the `steps` of pushes are its attributes.

    A step whose path holds `refused` is answered 403.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.lfs, server.asked, server.steps, server.refused = {}, {}, [], [], ""
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
