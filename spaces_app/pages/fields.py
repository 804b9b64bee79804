"""Fields for pictures and recordings that take what was uploaded, and nothing else.

Classes and not instances that were changed: Gradio builds a session's fields anew. It also writes a
.pyi file beside them, which nobody needs.
"""

from pathlib import Path
from urllib.parse import unquote

import gradio as gr
from gradio.data_classes import FileData
from gradio.route_utils import API_PREFIX
from gradio.utils import get_upload_folder, is_in_or_equal


def _taken(payload: FileData | None) -> str | None:
    """The file, unopened: whether it can be used is told by the engine, in the conversation."""
    if payload is None:
        return None
    # gradio 6.31 looks at no path of a picture whose `meta` is missing.
    if payload.path is None or not is_in_or_equal(payload.path, get_upload_folder()):
        raise gr.Error(f"got {payload.path}, expected a file: upload it", print_exception=False)
    return payload.path


def _without_address(path: str | Path | None) -> str | Path | None:
    """The path; no address is fetched, and that of an uploaded file becomes its path."""
    if not str(path).startswith(("http://", "https://")):
        return path
    own = unquote(str(path).partition(f"{API_PREFIX}/file=")[2])
    if not own or not is_in_or_equal(own, get_upload_folder()):
        raise gr.Error(f"got the address {path}, expected a file: upload it", print_exception=False)
    return own


class Picture(gr.Image):
    """A picture's file."""

    is_template = True  # has the looks of its parent

    def preprocess(self, payload: FileData | None) -> str | None:
        return _taken(payload)

    async def async_move_resource_to_block_cache(self, path: str | Path | None) -> str | None:
        return await super().async_move_resource_to_block_cache(_without_address(path))


class Recording(gr.Audio):
    """A recording's file."""

    is_template = True

    def preprocess(self, payload: FileData | None) -> str | None:
        return _taken(payload)

    async def async_move_resource_to_block_cache(self, path: str | Path | None) -> str | None:
        return await super().async_move_resource_to_block_cache(_without_address(path))
