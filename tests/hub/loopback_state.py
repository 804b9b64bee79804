"""What the loopback Hub holds, and who may see and change it; `loopback` serves it over HTTP."""

import hashlib
import json
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Account:
    """Whose token it is, and whether it may write."""

    name: str
    role: str = "write"


@dataclass
class Repository:
    """Commits are maps from path to the key of a blob: "git:<sha1>" or "lfs:<sha256>".

    What runs is a Space's alone: its variables and secrets by name, and the hardware asked for.
    """

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # objects of all its history
    variables: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None


@dataclass(frozen=True)
class Seen:
    """One request as it came, its Authorization header taken out."""

    method: str
    path: str
    host: str
    token_sent: bool
    headers: str
    body: bytes


class Refusal(Exception):
    """An answer other than 200, with the headers that the client reads its meaning from."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubState:
    """Accounts, repositories (data sets as "datasets/owner/name", Spaces likewise) and blobs, and
    the record of what was asked and transferred.

    `seen` holds every request. `received` and `sent` count the bytes of each LFS object (by its
    sha256) that came in and went out, cut transfers included.
    """

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads: dict[str, str] = {}  # signature to the sha256 it was given for
        self.cut_uploads: dict[str, int] = {}
        self.cut_downloads: dict[str, int] = {}
        self.seen: list[Seen] = []
        self.received: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.lock = threading.Lock()

    def token(self, name: str, role: str = "write") -> str:
        """A new token of a user; one with the role "read" may not push."""
        token = "hf_" + secrets.token_hex(17)
        self.accounts[token] = Account(name, role)
        return token

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content, as the revision has it, `.gitattributes` left out."""
        repository = self.repositories[repo]
        tree = repository.commits[self.commit_of(repository, revision)]
        return {p: self.blobs[key] for p, key in tree.items() if p != ".gitattributes"}

    def cut_upload(self, content: bytes, after: int) -> None:
        """Cut the next upload of this content behind `after` bytes; its signed URL expires too."""
        self.cut_uploads[hashlib.sha256(content).hexdigest()] = after

    def cut_download(self, content: bytes, after: int) -> None:
        """Cut the next download of this content behind `after` bytes."""
        self.cut_downloads[hashlib.sha256(content).hexdigest()] = after

    def commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit(self, repository: Repository, branch: str, tree: dict[str, str]) -> str:
        parent = repository.branches.get(branch, "")
        sha = hashlib.sha1((parent + json.dumps(tree, sort_keys=True)).encode()).hexdigest()
        repository.commits[sha], repository.branches[branch] = tree, sha
        return sha

    def keep(self, content: bytes) -> str:
        """Keeps a regular file; its key holds git's own id, which clients compare."""
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        self.blobs[f"git:{oid}"] = content
        return f"git:{oid}"

    def readable(self, repo: str, account: Account | None) -> Repository:
        found = self.repositories.get(repo)
        owner = repo.split("/")[-2]
        if found is None or (found.private and (account is None or account.name != owner)):
            if account is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def writable(self, repo: str, account: Account | None) -> Repository:
        found = self.readable(repo, account)
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        self.check_writer(repo.split("/")[-2], account)
        return found

    def check_writer(self, owner: str, account: Account) -> None:
        if account.name != owner:
            raise Refusal(403, f"You don't have the rights to create a model under {owner!r}")
        if account.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository")
