"""What the loopback Hub forgets: folders, history, LFS objects that nothing names any more."""

import json
from typing import Any


class History:
    """Routes of `loopback`'s handler."""

    hub: Any
    body: bytes
    account: Any

    def squash(self, id: str, branch: str) -> None:
        """One commit without a parent; what only history held is gone."""
        repository = self.hub.writable(id, self.account)
        tree = repository.commits[self.hub.commit_of(repository, branch)]
        del repository.branches[branch]
        heads = set(repository.branches.values())
        repository.commits = {sha: t for sha, t in repository.commits.items() if sha in heads}
        self.hub.commit(repository, branch, tree)
        repositories = self.hub.repositories.values()
        named = {key for r in repositories for t in r.commits.values() for key in t.values()}
        for key in [key for key in self.hub.blobs if key.startswith("git:") and key not in named]:
            del self.hub.blobs[key]
        self.send("")

    def lfs_files(self, id: str) -> None:
        repository = self.hub.writable(id, self.account)
        files = []
        for oid in sorted(repository.lfs & {key.removeprefix("lfs:") for key in self.hub.blobs}):
            size = len(self.hub.blobs[f"lfs:{oid}"])
            about = {"filename": oid, "pushedAt": "2026-01-01T00:00:00.000Z", "size": size}
            files.append({"fileOid": oid, "oid": oid, "ref": None, **about})
        self.send_json(files)

    def delete_lfs_files(self, id: str) -> None:
        repository = self.hub.writable(id, self.account)
        for oid in json.loads(self.body)["deletions"]["sha"]:
            repository.lfs.remove(oid)
            self.hub.blobs.pop(f"lfs:{oid}")
        self.send("")
