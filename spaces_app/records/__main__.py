"""python -m records delete STORE CONVERSATION: removes all that is kept of a conversation."""

import argparse
import sqlite3
import sys
from pathlib import Path

from huggingface_hub import HfApi

from .hub_copy import AWAY, delete_conversations
from .store import DATABASE, Store


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m records", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("delete", help="remove all that is kept of a conversation")
    verb.add_argument("store", help="folder of the records, or the id of their data set")
    verb.add_argument("conversation", help="its name")
    given = parser.parse_args()
    try:
        print(delete(given.store, given.conversation))
    except (*AWAY, sqlite3.Error, ValueError) as error:
        sys.exit(f"{given.conversation} could not be deleted: {error}")


def delete(store: str, conversation: str) -> str:
    """Removes a conversation; says what there was.

    Args:
        store: a folder of records, or the id of a data set on the Hub. A Space that copies the
            folder's records to a data set deletes there what is deleted in the folder.

    Raises:
        ValueError: there is no such store.
        OSError, HTTPError, sqlite3.Error: it could not be removed.
    """
    folder = Path(store)
    if (folder / DATABASE).is_file():
        records = Store(folder, sys.maxsize)
        try:
            return f"{records.delete(conversation)} records deleted"
        finally:
            records.close()
    if folder.exists() or store.count("/") != 1:
        raise ValueError(f"got {store}, expected a folder with {DATABASE}, or the id of a data set")
    there = delete_conversations(HfApi(), store, [conversation])
    return "deleted from the data set" if there else "the data set holds nothing of it"


if __name__ == "__main__":
    main()
