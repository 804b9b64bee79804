"""A small Hub on 127.0.0.1 that huggingface_hub's own client can push to and load from.

It speaks what that client asks for: who am I, create a repository and a branch, its information,
references and tree, preupload, LFS batch with single and multipart uploads and their completion,
commits as ndjson (files, LFS files, deletions of files and folders), squashing of history, listing
and deletion of LFS objects, `resolve` by HEAD and GET with ETag, X-Repo-Commit and a redirect of
LFS files to storage, ranges, and private repositories: 401 without a token, 404 for a stranger's,
403 where a token may not write, as the real one answers. A Space has variables, secrets that can be
named and not read, and hardware; nothing is built or run. Storage answers under another host name
(localhost), as a CDN would, behind URLs that are signed and hold no token. On request it cuts a
connection half-way through an upload or a download.

What it does not imitate: Xet (clients must set HF_HUB_DISABLE_XET=1, and so upload and download by
LFS), git itself (commit ids are hashes of the tree and its parent, not git's), pull requests, tags,
gated repositories, fine-grained tokens, quotas and rate limits, pages of a
long listing, files too large for a commit, `.gitattributes` and `.gitignore` (weights are LFS by
their ending), malware scans, and the Hub's schema of card metadata: it parses the YAML and asks for
no more. Nothing is written to disk; TLS is absent,
and over plain HTTP the client does not read a bare 401 as "no such repository", as it does else.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from loopback_history import History
from loopback_spaces import Spaces
from loopback_state import Account, HubState, Refusal, Repository, Seen

MEDIA_ENDINGS = (".png", ".jpg", ".wav", ".flac")  # LFS in data sets
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".model")
PART = 64 * 1024  # objects of more bytes are uploaded in parts of this size


class LoopbackHub(HubState):
    """The server; a context manager. `url` is the endpoint for clients."""

    def __init__(self) -> None:
        super().__init__()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(History, Spaces, BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, 40 ms apart with it

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if method == self.command and match:
                    if name != "put_object":  # which may stop half-way
                        self.body = self.read_body()
                        self.note(self.body)
                    self.account = self.who()
                    groups = match.groupdict().items()
                    return getattr(self, name)(**{k: unquote(v) for k, v in groups if v})
            self.note(self.read_body())
            raise Refusal(404, f"Not found: {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(json.dumps({"error": refusal.message}), refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def note(self, body: bytes) -> None:
        headers = "".join(
            f"{key}: {value}\n" for key, value in self.headers.items() if key != "authorization"
        )
        sent = "authorization" in self.headers
        host = self.headers["Host"].split(":")[0]
        self.hub.seen.append(Seen(self.command, self.path, host, sent, headers, body))

    def who(self) -> Account | None:
        given = self.headers.get("authorization")
        if given is None:
            return None
        account = self.hub.accounts.get(given.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def send(self, body: str | bytes, status: int = 200, headers: dict | None = None) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value), headers={"Content-Type": "application/json"})

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # Accounts, repositories, branches

    def whoami(self) -> None:
        if self.account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        access = {"accessToken": {"displayName": "a token", "role": self.account.role}}
        me = {"type": "user", "name": self.account.name, "orgs": [], "auth": access}
        self.send_json(me)

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        owner = asked["organization"] or self.account.name
        self.hub.check_writer(owner, self.account)
        kind = asked.get("type") or "model"
        folder = "" if kind == "model" else f"{kind}s/"
        repo = f"{folder}{owner}/{asked['name']}"
        answer = json.dumps({"url": f"{self.hub.url}/{repo}", "name": f"{owner}/{asked['name']}"})
        if repo in self.hub.repositories:
            return self.send(
                answer, 409, {"X-Error-Message": f"You already created this {kind} repo"}
            )
        made = self.hub.repositories[repo] = Repository(asked.get("visibility") == "private")
        attributes = self.hub.keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.hub.commit(made, "main", {".gitattributes": attributes})
        made.hardware = asked.get("hardware")
        self.send(answer)

    def branch(self, id: str, branch: str) -> None:
        repository = self.hub.writable(id, self.account)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self.hub.commit_of(repository, start)
        self.send_json({})

    def refs(self, id: str) -> None:
        branches = self.hub.readable(id, self.account).branches
        named = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in branches.items()
        ]
        self.send_json({"branches": named, "tags": [], "converts": []})

    def info(self, id: str, revision: str = "main") -> None:
        repository = self.hub.readable(id, self.account)
        sha = self.hub.commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        about = {"id": id, "sha": sha, "private": repository.private, "siblings": siblings}
        self.send_json(about | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, id: str, revision: str, folder: str | None = None) -> None:
        repository = self.hub.readable(id, self.account)
        files = repository.commits[self.hub.commit_of(repository, revision)]
        inside = f"{folder}/" if folder else ""
        listed = [self.entry(p, key) for p, key in files.items() if p.startswith(inside)]
        if self.query.get("recursive") != ["true"]:
            deep = {e["path"].removeprefix(inside).split("/")[0] for e in listed}
            listed = [e for e in listed if "/" not in e["path"].removeprefix(inside)]
            names = {e["path"].removeprefix(inside) for e in listed}
            listed += [
                {"type": "directory", "path": inside + name, "oid": "0" * 40, "size": 0}
                for name in sorted(deep - names)
            ]
        if folder and not listed:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        self.send_json(listed)

    def entry(self, path: str, key: str) -> dict:
        kind, oid = key.split(":")
        size = len(self.hub.blobs[key])
        entry = {"type": "file", "path": path, "size": size, "oid": oid[:40]}
        return entry | (
            {"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if kind == "lfs" else {}
        )

    # Uploads

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        if not isinstance(yaml.safe_load(front[1]) if front else {}, dict):
            return self.send(json.dumps({"errors": [{"message": "not a mapping"}]}), 400)
        warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send_json({"errors": [], "warnings": warnings})

    def preupload(self, id: str, revision: str) -> None:
        repository = self.hub.writable(id, self.account)
        tree = repository.commits[self.hub.commit_of(repository, revision)]
        modes, endings = [], LFS_ENDINGS + MEDIA_ENDINGS * id.startswith("datasets/")
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(endings) else "regular"
            known = tree.get(file["path"], ":").split(":")[1]
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            modes[-1] |= {"oid": known} if known else {}
        self.send_json({"files": modes})

    def lfs_batch(self, id: str) -> None:
        self.hub.writable(id, self.account)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size})
            if f"lfs:{oid}" in self.hub.blobs:
                continue  # no actions: it is there
            signature = secrets.token_hex(8)
            self.hub.uploads[signature] = oid
            url = f"{self.hub.storage}/storage/{signature}"
            actions = {"upload": {"href": url}}
            if size > PART:
                count = -(-size // PART)
                parts = {str(n): f"{url}/{n}" for n in range(1, count + 1)}
                done = f"{self.hub.storage}/storage/{signature}/complete"
                actions["upload"] = {"href": done, "header": {"chunk_size": str(PART), **parts}}
            actions["verify"] = {"href": f"{self.hub.url}/{id}/verify"}
            objects[-1]["actions"] = actions
        self.send_json({"objects": objects, "transfer": "basic"})

    def put_object(self, signature: str, part: str | None = None) -> None:
        size = int(self.headers["Content-Length"])
        oid = self.hub.uploads.get(signature)
        cut = self.hub.cut_uploads.get(oid) if oid else None
        if cut is not None and self.hub.received[oid] + size > cut:
            got = self.rfile.read(max(cut - self.hub.received[oid], 0))
            self.hub.received[oid] += len(got)
            del self.hub.cut_uploads[oid], self.hub.uploads[signature]
            return self.cut()
        content = self.read_body()
        self.note(content)
        if oid is None:
            raise Refusal(403, "Request has expired")
        self.hub.received[oid] += len(content)
        with self.hub.lock:
            self.hub.parts.setdefault(signature, {})[int(part or 1)] = content
        if part is None:
            self.assemble(signature)
        self.send("", headers={"ETag": hashlib.md5(content).hexdigest()})

    def complete(self, signature: str) -> None:
        self.assemble(signature)
        self.send_json({})

    def assemble(self, signature: str) -> None:
        oid = self.hub.uploads[signature]
        parts = self.hub.parts.pop(signature)
        content = b"".join(parts[number] for number in sorted(parts))
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the object is not what its sha256 says")
        self.hub.blobs[f"lfs:{oid}"] = content

    def verify(self, id: str) -> None:
        asked = json.loads(self.body)
        content = self.hub.blobs.get(f"lfs:{asked['oid']}")
        if content is None or len(content) != asked["size"]:
            raise Refusal(404, "the object is not there")
        self.send_json({})

    def post_commit(self, id: str, revision: str) -> None:
        repository = self.hub.writable(id, self.account)
        tree = dict(repository.commits[self.hub.commit_of(repository, revision)])
        for line in self.body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "file":
                tree[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if f"lfs:{value['oid']}" not in self.hub.blobs:
                    raise Refusal(400, f"{value['path']}: its LFS object was not uploaded")
                tree[value["path"]] = f"lfs:{value['oid']}"
                repository.lfs.add(value["oid"])
            elif kind == "deletedFile":
                del tree[value["path"]]
            elif kind == "deletedFolder":
                tree = {p: k for p, k in tree.items() if not p.startswith(value["path"])}
        sha = self.hub.commit(repository, revision, tree)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{id}"})

    # Downloads

    def resolve(self, id: str, revision: str, path: str) -> None:
        repository = self.hub.readable(id, self.account)
        sha = self.hub.commit_of(repository, revision)
        key = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if key is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send("Entry not found", 404, headers)
        kind, oid = key.split(":")
        headers["ETag"] = f'"{oid}"'
        if kind == "git":
            return self.send(self.hub.blobs[key], headers=headers)
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(self.hub.blobs[key]))}
        self.send("", 302, headers | {"Location": f"{self.hub.storage}/objects/{oid}?signed=1"})

    def get_object(self, oid: str) -> None:
        content = self.hub.blobs[f"lfs:{oid}"]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        rest = content[start : int(asked[2]) + 1 if asked and asked[2] else None]
        self.send_response(206 if asked else 200)
        if asked:
            end = start + len(rest) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", f'"{oid}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_downloads.pop(oid, None)
        sent = rest if cut is None else rest[:cut]
        self.wfile.write(sent)
        self.hub.sent[oid] += len(sent)
        if cut is not None:
            self.cut()


# Data sets and Spaces are kept under their kind and name: "datasets/someone/something".
ID = r"(?P<id>((datasets|spaces)/)?[^/]+/[^/]+?)"
API = rf"/api/(models/)?{ID}"
SPACE = r"/api/(?P<id>spaces/[^/]+/[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"{API}/branch/(?P<branch>.+)", "branch"),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>.+)", "post_commit"),
    ("POST", rf"{API}/super-squash/(?P<branch>.+)", "squash"),
    ("GET", rf"{API}/lfs-files", "lfs_files"),
    ("POST", rf"{API}/lfs-files/batch", "delete_lfs_files"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("GET", rf"{API}/revision/(?P<revision>.+)", "info"),
    ("GET", API, "info"),
    ("GET", rf"{SPACE}/variables", "variables"),
    ("POST", rf"{SPACE}/variables", "variables"),
    ("GET", rf"{SPACE}/secrets", "space_secrets"),
    ("POST", rf"{SPACE}/secrets", "space_secrets"),
    ("GET", rf"{SPACE}/runtime", "runtime"),
    ("POST", rf"{SPACE}/hardware", "hardware"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/(?P<signature>\w+)(/(?P<part>\d+))?", "put_object"),
    ("POST", r"/storage/(?P<signature>\w+)/complete", "complete"),
    ("POST", rf"/{ID}/verify", "verify"),
    ("HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("HEAD", r"/objects/(?P<oid>\w+)", "get_object"),
    ("GET", r"/objects/(?P<oid>\w+)", "get_object"),
)
