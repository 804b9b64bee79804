"""Recordings that come in chunks, as from a microphone: what is whole is heard while more comes."""

from typing import Any

import numpy as np
import torch


class AudioStream:
    """Hears a recording chunk by chunk, so that little is left to do when it ends.

    Whenever more than a window of Whisper's (30 s) has come, the window goes through the audio
    tower. What comes out at the end is what the whole recording would have given.

    Args:
        processor: a `PhiMMProcessor`.
        model: a `PhiMMForConditionalGeneration`, on any route.
        generate_kwargs: as `model.transcribe` takes them, on the routes with a transcript.

    Example:

    ```python
    >>> stream = processor.stream_audio(model)
    >>> for chunk in microphone:
    ...     stream.add(chunk)
    >>> messages = [{"role": "user", "content": [stream.finish()]}]
    ```
    """

    def __init__(self, processor, model, **generate_kwargs):
        self.processor, self.model, self.generate_kwargs = processor, model, generate_kwargs
        self._waiting = np.zeros(0, np.float32)
        self._texts: list[str] = []
        self._features: list[torch.Tensor] = []

    def add(self, samples: np.ndarray) -> None:
        """Takes mono float samples (n,) at the rate of the processor's feature extractor.

        Raises:
            ValueError: for another shape or type, or samples that are not finite.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all():
            raise ValueError(
                f"got {samples.dtype} of shape {samples.shape}, expected finite float samples "
                "(n,): open a file by processor.load_audio, and scale integers to [-1, 1)"
            )
        self._waiting = np.concatenate([self._waiting, samples.astype(np.float32)])
        while len(self._waiting) > self.processor.feature_extractor.n_samples:
            window = self.processor.split_windows(self._waiting)[0]
            self._hear(window)
            self._waiting = self._waiting[len(window) :]

    def finish(self) -> dict[str, Any]:
        """The part that stands in a message for the recording; the stream begins anew.

        Raises:
            ValueError: when nothing has come.
        """
        if len(self._waiting):
            self._hear(self._waiting)
        elif not self._texts and not self._features:
            raise ValueError("got no samples, expected a recording: call add before finish")
        texts, features = self._texts, self._features
        self._waiting, self._texts, self._features = self._waiting[:0], [], []
        if self.model.config.audio_route == "encoder":
            return {"type": "audio", "audio_embeds": torch.cat(features)}
        text = " ".join(filter(None, texts))
        return self.processor.transcript_part(text, torch.cat(features) if features else None)

    @torch.no_grad()
    def _hear(self, window: np.ndarray) -> None:
        if self.model.config.audio_route == "encoder":
            given = self.processor(audio=[window], return_tensors="pt").to(self.model.device)
            frames = self.model.model.get_audio_tower_features(
                given["input_features"], given["input_features_mask"]
            )
            self._features.append(frames[0, : self.processor.count_frames(len(window))].cpu())
            return
        [(text, features)] = self.processor.write_down([window], self.model, **self.generate_kwargs)
        self._texts.append(text)
        if features is not None:
            self._features.append(features)


__all__ = ["AudioStream"]
