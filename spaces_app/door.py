"""What is let in: bodies of a bounded size, and uploads while the disk has room for them."""

import logging
import shutil
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("phi-mm")
MEGABYTE = 1 << 20
WORDS_BYTES = MEGABYTE  # of a body that brings no file: more than any model reads
ROOM_BYTES = 256 * MEGABYTE  # of the disk, which uploads leave to the records
NO_ROOM, NO_ROOM_STATUS = "files cannot be kept now: ask without one, or try again later", 507
# Of pages: the words of users and of the model are Markdown, and may name pictures anywhere.
OWN_MEDIA = "img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'"
MCP = "/gradio_api/mcp"  # its clients write files into JSON, a third longer than they are


class Door:
    """Middleware before Gradio, which bounds a file's size and nothing else; and pages show no
    pictures but the Space's own.

    Args:
        app: what is behind it.
        upload_bytes: largest file.
        uploads: folder that takes the files.
    """

    def __init__(self, app: ASGIApp, upload_bytes: int, uploads: Path):
        self.app, self.upload_bytes, self.uploads = app, upload_bytes, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        brings_files = headers.get("content-type", "").startswith("multipart/form-data")
        body = _Body(receive, self._limit(scope["path"], brings_files), brings_files)
        try:
            body.check(int(headers.get("content-length", 0)))
            if brings_files:
                self._check_room()
        except HTTPException as error:
            await PlainTextResponse(error.detail, error.status_code)(scope, receive, send)
            return

        async def send_page(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = MutableHeaders(scope=message)
                given.setdefault("x-content-type-options", "nosniff")
                given.setdefault("content-security-policy", OWN_MEDIA)
            await send(message)

        try:
            await self.app(scope, body.receive, send_page)
        except OSError:
            if not brings_files:
                raise
            log.exception("a file could not be written in %s", self.uploads)
            await PlainTextResponse(NO_ROOM, NO_ROOM_STATUS)(scope, receive, send)

    def _limit(self, path: str, brings_files: bool) -> int:
        if path.startswith(MCP):
            return WORDS_BYTES + self.upload_bytes * 4 // 3
        return WORDS_BYTES + (self.upload_bytes if brings_files else 0)

    def _check_room(self) -> None:
        try:
            self.uploads.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.uploads).free
        except OSError:
            free = 0
        if free < ROOM_BYTES:
            log.error("no file is taken: %d MB are free in %s", free / MEGABYTE, self.uploads)
            raise HTTPException(NO_ROOM_STATUS, NO_ROOM)


class _Body:
    """A request's body, up to a limit."""

    def __init__(self, receive: Receive, limit: int, brings_files: bool):
        self.receive_more, self.limit, self.brings_files = receive, limit, brings_files
        self.received = 0

    def check(self, size: int) -> None:
        """Raises HTTPException: the body is larger than it may be."""
        if size > self.limit:
            raise HTTPException(
                413,
                f"got a request of {size / MEGABYTE:.1f} MB or more, expected at most "
                f"{self.limit / MEGABYTE:.1f} MB: send a smaller file, or fewer words",
            )

    async def receive(self) -> Message:
        message = await self.receive_more()
        self.received += len(message.get("body", b""))
        try:
            self.check(self.received)
        except HTTPException as error:
            raise MultiPartException(error.detail) if self.brings_files else error from None
        if self.brings_files and message["type"] == "http.disconnect":
            # Gradio removes what it has of a file after this error, and not after a disconnect.
            raise MultiPartException("the connection ended before the file did")
        return message
