"""Recordings as words, in a processor of the routes that start from a transcript."""

import math
from collections.abc import Callable

import numpy as np
import torch

from .recordings_phi_mm import media_of
from .streaming_phi_mm import AudioStream

WINDOWS_AT_ONCE = 8  # that are written down together
FIRST_TIME, TIME_STEP = "<|0.00|>", 0.02  # of Whisper's timestamps, in seconds; some have none
NOTHING_HEARD = "(nothing was heard)"  # what a recording without words becomes


class TranscriptMixin:
    """For a processor with `transcript_tokenizer`: Whisper's, or None on the route `encoder`."""

    def transcribe(
        self, messages: list[dict] | list[list[dict]], model, **generate_kwargs
    ) -> list[dict] | list[list[dict]]:
        """Writes every recording down, for the routes that start from a transcript.

        Args:
            messages: one conversation, or several, whose recordings are written down together.
            model: a `PhiMMForConditionalGeneration` with such an `audio_route`.
            generate_kwargs: as `model.transcribe` takes them.

        Returns:
            the conversations with every audio part turned into what `transcript_part` gives; those
            passed in are left as they are.
        """
        self._require_transcript_tokenizer()
        if messages and isinstance(messages[0], dict):
            return self.transcribe([messages], model, **generate_kwargs)[0]
        sounding = [part for turns in messages for part in _parts(turns) if _is_unwritten(part)]
        recordings = [
            self.load_audio(media_of(part, ("audio", "url", "path", "base64"))) for part in sounding
        ]
        pairs = self.write_down(recordings, model, **generate_kwargs) if recordings else ()
        written = iter([self.transcript_part(*pair) for pair in pairs])
        return [
            [
                turn
                if isinstance(turn["content"], str)
                else {
                    **turn,
                    "content": [
                        next(written) if _is_unwritten(part) else part for part in turn["content"]
                    ],
                }
                for turn in turns
            ]
            for turns in messages
        ]

    def write_down(
        self, recordings: list[np.ndarray], model, **generate_kwargs
    ) -> list[tuple[str, torch.Tensor | None]]:
        """What Whisper writes of recordings that `load_audio` opened: for each its text, which is
        empty where there is no word, and on the routes that project them the features (T, C) of its
        words.
        """
        split = [self.split_windows(samples) for samples in recordings]
        counts = [len(windows) for windows in split]
        mel = self._mel_windows([w for windows in split for w in windows])["input_features"]
        ids = model.transcribe(mel, **generate_kwargs)
        transcripts = [self.read_transcript(rows) for rows in ids.split(counts)]
        if model.config.audio_route == "transcript":
            return [(text, None) for text, _ in transcripts]
        words = [window for _, windows in transcripts for window in windows]
        said = {k: v for k, v in generate_kwargs.items() if k in ("language", "task")}
        features = iter(model.get_transcript_features(mel, words, **said))
        return [
            (text, torch.cat([next(features) for _ in range(count)]).cpu())
            for (text, _), count in zip(transcripts, counts, strict=True)
        ]

    def stream_audio(self, model, **generate_kwargs) -> AudioStream:
        """A recording that comes in chunks: see `AudioStream`."""
        return AudioStream(self, model, **generate_kwargs)

    def transcribe_segments(
        self,
        recording,
        model,
        progress: Callable[[float, float], None] | None = None,
        **generate_kwargs,
    ) -> list[dict]:
        """Writes one recording of any length down, with the times that Whisper gives.

        Besides the samples (230 MB an hour) no more than a few windows are in memory.

        Args:
            recording: as `load_audio` takes it.
            model: as `transcribe` takes it.
            progress: called with the seconds that are written down, and with those there are.
            generate_kwargs: as `model.transcribe` takes them, but `return_timestamps`.

        Returns:
            `[{"start": seconds, "end": seconds, "text": words}, ...]`. Where Whisper gives no time,
            a segment is a whole window.
        """
        self._require_transcript_tokenizer()
        samples, rate = self.load_audio(recording), self.feature_extractor.sampling_rate
        windows, segments, begin = self.split_windows(samples), [], 0
        timed = FIRST_TIME in self.transcript_tokenizer.get_vocab()
        for first in range(0, len(windows), WINDOWS_AT_ONCE):
            some = windows[first : first + WINDOWS_AT_ONCE]
            mel = self._mel_windows(some)["input_features"]
            ids = model.transcribe(mel, return_timestamps=timed, **generate_kwargs)
            for window, row in zip(some, ids, strict=True):
                end = begin + len(window)
                segments += self.read_segments(row, begin / rate, end / rate)
                begin = end
            if progress is not None:
                progress(begin / rate, len(samples) / rate)
        return segments

    def read_segments(self, ids: torch.LongTensor, start: float, end: float) -> list[dict]:
        """The segments of one window that lasts from `start` to `end` seconds, as
        `transcribe_segments` gives them.

        Args:
            ids: (tokens,) that `model.transcribe` wrote for it, with timestamps.
        """
        first = self.transcript_tokenizer.get_vocab().get(FIRST_TIME, math.inf)
        segments, words, begin = [], [], start
        # At the end stands the window's own end: Whisper's last words may have no time behind them.
        for token in [*ids.tolist(), None]:
            if token is not None and token < first:
                words.append(token)
                continue
            stop = end if token is None else min(start + (token - first) * TIME_STEP, end)
            if text := self.transcript_tokenizer.decode(words, skip_special_tokens=True).strip():
                segments.append({"start": begin, "end": stop, "text": text})
            words, begin = [], stop
        return segments

    def read_transcript(self, ids: torch.LongTensor) -> tuple[str, list[list[int]]]:
        """The text of one recording, and the ids of its words.

        Args:
            ids: (W, tokens) that `model.transcribe` wrote for its windows.

        Returns:
            the text, empty where Whisper wrote no word, and for each window its ids without special
            tokens and timestamps.
        """
        windows = self.transcript_tokenizer.batch_decode(ids, skip_special_tokens=True)
        text = " ".join(window.strip() for window in windows).strip()
        marks = {*self.transcript_tokenizer.all_special_ids}
        marks |= self.transcript_tokenizer.added_tokens_decoder.keys()  # timestamps are added ones
        return text, [[i for i in row if i not in marks] for row in ids.tolist()]

    def _require_transcript_tokenizer(self) -> None:
        if self.transcript_tokenizer is None:
            raise ValueError(
                "got a processor without transcript_tokenizer, expected one of the 'transcript', "
                "'transcript_embeddings' or 'decoder' route"
            )

    def transcript_part(self, text: str, features: torch.Tensor | None = None) -> dict:
        """What stands in a message in the place of a recording.

        Args:
            text: of the recording. Where it is empty the part says that nothing was heard, on every
                route, so that the answer knows of the recording and has no placeholder for it.
            features: (T, C) of its words, for the routes that project them.
        """
        if features is None or not text:
            return {"type": "text", "text": text or NOTHING_HEARD}
        return {"type": "audio", "audio_embeds": features, "transcript": text}


def _parts(messages: list[dict]) -> list[dict]:
    """All parts of a conversation that are no bare string."""
    turns = (turn["content"] for turn in messages if not isinstance(turn["content"], str))
    return [part for content in turns for part in content]


def _is_unwritten(part: dict) -> bool:
    return part["type"] == "audio" and part.get("audio_embeds") is None


__all__ = ["NOTHING_HEARD", "TranscriptMixin"]
