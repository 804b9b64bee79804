"""A copy of the records in a private data set on the Hub, for a disk that does not last."""

import hashlib
import json
import logging
import re
import sqlite3
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    CommitScheduler,
    HfApi,
    RepoUrl,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from .outbox import Outbox
from .store import Store

log = logging.getLogger("phi-mm")
MOST_ROWS = 500  # in a commit; the others are for the next one
OURS = re.compile(r"[0-9a-f]{32}")
DATASET = "dataset"
AWAY = (HTTPError, OSError)  # HTTPError is the HTTP library's own


class HubCopy(CommitScheduler):
    """Commits to the data set what is new, every few minutes and at the end of a `with` block.

    The store is what counts: a file of the data set is written once, a row that changes is written
    again to a new one, and what could not be sent is sent later.

    Args:
        store: whose records are copied.
        dataset: the data set's id; made, and private, when it is not there.
        minutes: between commits.

    Raises:
        ValueError: the data set is public.
        OSError, sqlite3.Error: the store cannot be written.
    """

    def __init__(self, store: Store, dataset: str, minutes: float):
        self.store, self.dataset = store, dataset
        self.hub, self.outbox = HfApi(), Outbox(store, dataset)
        self._may_write = self._failing = False
        try:
            self._refuse_if_public()
        except AWAY:
            pass  # the Space starts all the same; the first commit tells of it
        self.outbox.open()
        super().__init__(
            repo_id=dataset,
            repo_type=DATASET,
            folder_path=store.folder,
            every=minutes,
            hf_api=_AsIfThere(),
        )

    def push_to_hub(self) -> CommitInfo | None:
        """One commit of what is new, after what was deleted here is deleted there.

        What goes wrong is told once in the log, until it goes well again.
        """
        try:
            self._prepare()
            if deleted := self.outbox.deletions():
                delete_conversations(self.hub, self.dataset, deleted)
                self.outbox.deleted(deleted)
            done = self._commit()
        except (*AWAY, sqlite3.Error, RuntimeError, ValueError) as error:
            if not self._failing:
                log.error(
                    "records are not copied to %s (%s); they stay in %s until they can be",
                    self.dataset,
                    _words(error),
                    self.store.folder,
                )
            self._failing = True
            return None
        if self._failing:
            log.warning("records are copied to %s again", self.dataset)
        self._failing = False
        return done

    def _prepare(self) -> None:
        """Sees that the data set is there and private, and once that it may be written to."""
        if not self._may_write:
            access = self.hub.whoami()["auth"].get("accessToken", {})
            if access.get("role") == "read":
                raise ValueError("the access token may only read: set HF_TOKEN to one that writes")
            self._may_write = True
        try:
            self._refuse_if_public()
        except RepositoryNotFoundError:
            self.hub.create_repo(self.dataset, repo_type=DATASET, private=True)

    def _refuse_if_public(self) -> None:
        if not self.hub.dataset_info(self.dataset).private:
            raise ValueError(
                f"got PHI_MM_DATASET={self.dataset}, which is public, expected a private data set: "
                "what users typed and showed would be copied there; make it private in its "
                "settings, or name another one"
            )

    def _commit(self) -> CommitInfo | None:
        rows = self.outbox.rows(MOST_ROWS)
        if not rows:
            return None
        operations = []
        by_conversation = sorted(rows, key=lambda row: (row["conversation"], row["number"]))
        for conversation, group in groupby(by_conversation, lambda row: row["conversation"]):
            operations += self._files(conversation, list(group))
        done = self.hub.create_commit(
            self.dataset, operations, repo_type=DATASET, commit_message=f"{len(rows)} records"
        )
        # A crash before this line sends the same rows again, which changes nothing.
        self.outbox.sent(rows[-1]["number"])
        return done

    def _files(self, conversation: str, rows: list[dict[str, Any]]) -> list[CommitOperationAdd]:
        folder = folder_of(conversation)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        named = {name for row in rows for name in row["media"]}
        there = [name for name in sorted(named) if (self.store.media / name).is_file()]
        return [
            CommitOperationAdd(f"{folder}/{rows[0]['number']}.jsonl", lines),
            *(CommitOperationAdd(f"{folder}/media/{n}", self.store.media / n) for n in there),
        ]


class _AsIfThere(HfApi):
    """For CommitScheduler, which makes the repository at once and fails when the Hub is away."""

    def create_repo(self, repo_id: str, **_: Any) -> RepoUrl:
        return RepoUrl(f"{self.endpoint}/datasets/{repo_id}", self.endpoint)


def folder_of(conversation: str) -> str:
    """Where a conversation is in the data set, whatever its name holds."""
    ours = OURS.fullmatch(conversation)
    name = conversation if ours else hashlib.sha256(conversation.encode()).hexdigest()[:32]
    return f"conversations/{name[:2]}/{name}"


def delete_conversations(hub: HfApi, dataset: str, conversations: Sequence[str]) -> int:
    """Deletes conversations from a data set and from its history; may be repeated.

    Returns:
        How many there were.

    Raises:
        HTTPError, OSError: the Hub is away, or does not allow it.
    """
    folders = [name for name in map(folder_of, conversations) if _is_there(hub, dataset, name)]
    if folders:
        gone = [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in folders]
        message = f"{len(gone)} conversations are deleted"
        hub.create_commit(dataset, gone, repo_type=DATASET, commit_message=message)
    hub.super_squash_history(dataset, repo_type=DATASET)
    entries = hub.list_repo_tree(dataset, recursive=True, repo_type=DATASET)
    named = {entry.lfs.sha256 for entry in entries if isinstance(entry, RepoFile) and entry.lfs}
    kept = hub.list_lfs_files(dataset, repo_type=DATASET)
    unnamed = [file for file in kept if named.isdisjoint((file.file_oid, file.oid))]
    hub.permanently_delete_lfs_files(dataset, unnamed, repo_type=DATASET)
    return len(folders)


def _is_there(hub: HfApi, dataset: str, folder: str) -> bool:
    try:
        return any(hub.list_repo_tree(dataset, folder, repo_type=DATASET))
    except EntryNotFoundError:
        return False


def _words(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError) and error.server_message:
        return error.server_message
    own = isinstance(error, ValueError)  # a sentence
    return str(error) if own else f"{type(error).__name__}: {error}".splitlines()[0]
