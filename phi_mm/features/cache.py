"""The cache of frozen-tower outputs that the collator reads in place of pictures and recordings.

Every distinct picture or recording of a data set passes its tower once. Keys are hashes of the
content (a file's bytes, or an array's values), so two rows with the same picture share one record.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from modeling_phi_mm.media_phi_mm import MediaMixin
from phi_mm.features.keys import BAR_AFTER, FileKeys, content_key
from phi_mm.features.storage import Storage
from phi_mm.features.store import FeatureStore
from phi_mm.features.towers import encoders, fingerprint, writing
from phi_mm.features.transcripts import TranscriptStore
from processing import PhiMMProcessor
from processing.transcripts_phi_mm import NOTHING_HEARD


class FeatureCache:
    """Tower outputs by content, as `PhiMMCollator(features=...)` looks them up.

    Args:
        folder: holds a store for each tower, and what is known of the files.
        stores: under `image` and `audio`, as far as there are towers.
        transcripts: of the recordings, for the routes that start from a transcript.
    """

    def __init__(
        self,
        folder: Path,
        stores: dict[str, FeatureStore],
        transcripts: TranscriptStore | None = None,
    ):
        self.folder, self.stores, self.transcripts = folder, stores, transcripts
        self.files = FileKeys(folder / "files.json")

    def image(self, source: Any) -> torch.Tensor:
        """Patch features (P, C) of a picture. Raises KeyError when it was never computed."""
        return self.stores["image"][self.key(source)]

    def audio(self, source: Any) -> torch.Tensor | str:
        """Sounding encoder frames (F, C) of a recording, or what the route has in their place:
        features (T, C) at the words of its transcript, or the words themselves, which also say
        when there are none. Raises KeyError when never computed.
        """
        key = self.key(source)
        if self.transcripts is not None:
            text = self.transcripts[key].text
            if not text or "audio" not in self.stores:
                return text or NOTHING_HEARD
        return self.stores["audio"][key]

    def featured(self, media: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Of `media` ({modality: {key: source}}) what has features: recordings that were written
        down without a word have none, nor has any recording where its words are all that is read.
        """
        return {
            modality: {
                key: source for key, source in sources.items() if not self._wordless(modality, key)
            }
            for modality, sources in media.items()
            if modality in self.stores
        }

    def _wordless(self, modality: str, key: str) -> bool:
        written = self.transcripts
        return (
            modality == "audio"
            and written is not None
            and key in written
            and (not written[key].text)
        )

    def key(self, source: Any) -> str:
        """`content_key`, remembered for paths."""
        return self.files[source] if isinstance(source, str) else content_key(source)

    def find_media(self, datasets: Iterable[Iterable[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """The distinct pictures and recordings in the rows' `messages`: {modality: {key: source}}.

        Raises:
            ValueError: a file is not there.
        """
        modalities = {*self.stores, *(["audio"] if self.transcripts is not None else [])}
        found = [item for rows in datasets for item in _media(rows) if item[0] in modalities]
        self.files.learn(source for _, source in found if isinstance(source, str))
        distinct: dict[str, dict[str, Any]] = {modality: {} for modality in sorted(modalities)}
        for modality, source in found:
            distinct[modality].setdefault(self.key(source), source)
        return distinct


def open_cache(
    folder: Path, towers: MediaMixin, processor: PhiMMProcessor, storage: str = "tower"
) -> FeatureCache:
    """The cache in `folder`, which runs with the same towers and preprocessing may share.

    Args:
        folder: made when missing; the main process makes it first.
        towers: a `PhiMMModel`, or its `Towers` alone.
        storage: how features are kept. `tower` keeps the dtype that the towers compute in: a cached
            run then equals a live one.

    Raises:
        ValueError: the folder was written with other towers, preprocessing or storage (says which
            part), or a shard is damaged.
    """
    facts = {name: fingerprint(t, processor, name) for name, t in encoders(towers).items()}
    if written := writing(towers):
        whisper = facts.get("audio") or fingerprint(towers.audio_tower, processor, "audio")
        written = whisper | written
    if "audio" in facts and written:
        facts["audio"] = written | {"route": towers.config.audio_route}
    if "audio" in facts and not towers.config.audio_padded:
        facts["audio"]["padded"] = False
    parts = {
        name: (facts[name], Storage(storage, tower.dtype))
        for name, tower in encoders(towers).items()
    }
    with PartialState().main_process_first():
        stores = {name: FeatureStore(folder / name, *made) for name, made in parts.items()}
        transcripts = TranscriptStore(folder / "transcripts", written) if written else None
    return FeatureCache(folder, stores, transcripts)


def _media(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every picture and recording that the rows' messages hold, as ("image" | "audio", source)."""
    hidden = not PartialState().is_main_process
    for row in tqdm(rows, "media of rows", delay=BAR_AFTER, disable=hidden):
        for message in row["messages"]:
            if not isinstance(message["content"], str):
                for part in message["content"]:
                    if part["type"] in ("image", "audio"):
                        yield part["type"], part[part["type"]]
