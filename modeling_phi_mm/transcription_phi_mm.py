"""Whisper's own transcript of recordings, and what its decoder makes of the transcript's tokens.

Shapes as in modeling_phi_mm.py: W audio windows, M mel frames, F encoder frames, C tower width; and
    T transcript tokens of a window, P tokens of Whisper's prompt before them.
"""

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

WRITTEN_ROUTES = ("transcript", "transcript_embeddings", "decoder")  # they start from a transcript
WINDOWS_AT_ONCE = 8  # of 30 s each, outside of training: this bounds the memory of an hour


class TranscriptionMixin:
    """For a model whose `audio_tower` is the whole Whisper, frozen."""

    @torch.no_grad()
    def transcribe(self, input_features: torch.Tensor, **generate_kwargs) -> torch.LongTensor:
        """Whisper's own transcript, window by window.

        Args:
            input_features: mel windows (W, mels, M).
            generate_kwargs: of Whisper's `generate`: `language`, `task`, `return_timestamps`,
                `prompt_ids`, `no_speech_threshold`, `logprob_threshold`,
                `compression_ratio_threshold`, `temperature`, and what every model's takes.

        Returns:
            (W, tokens): ids of Whisper's vocabulary, decoded by `processor.transcript_tokenizer`.

        Raises:
            ValueError: when the model was built for a route without a transcript.
        """
        self._require_transcript()
        whisper = self.audio_tower
        written = [
            whisper.generate(
                input_features=windows.to(whisper.device, whisper.dtype),
                generation_config=self._whisper_generation_config(),
                **generate_kwargs,
            )
            for windows in input_features.split(WINDOWS_AT_ONCE)
        ]
        padding = self.config.audio_config.pad_token_id
        rows = [row for ids in written for row in ids]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

    @torch.no_grad()
    def get_transcript_features(
        self,
        input_features: torch.Tensor,
        transcripts: list[list[int]],
        language: str | None = None,
        task: str | None = None,
    ) -> list[torch.Tensor]:
        """What is projected in the place of each window's words.

        On the `transcript_embeddings` route these are the token embeddings of Whisper's decoder; on
        the `decoder` route its last hidden states at those tokens, while it reads the transcript as
        if it were writing it, over the encoder's frames.

        Args:
            input_features: mel windows (W, mels, M).
            transcripts: for each window the T ids of its words, without special tokens.
            language, task: as `transcribe` was given them.

        Returns:
            (T, C) for each window.

        Raises:
            ValueError: when the model was built for another route.
        """
        self._require_transcript()
        if self.config.audio_route == "transcript":
            raise ValueError(
                "got audio_route='transcript', expected 'transcript_embeddings' or 'decoder': "
                "that route puts the words into the prompt, and nothing is projected"
            )
        whisper = self.audio_tower
        rows = [torch.tensor(ids, dtype=torch.long, device=whisper.device) for ids in transcripts]
        if self.config.audio_route == "transcript_embeddings":
            return [whisper.get_input_embeddings()(row) for row in rows]
        features = []
        for start in range(0, len(rows), WINDOWS_AT_ONCE):
            windows = slice(start, start + WINDOWS_AT_ONCE)
            mel = input_features[windows].to(whisper.device, whisper.dtype)
            features += self._read_along(mel, rows[windows], language, task)
        return features

    def _read_along(
        self,
        mel: torch.Tensor,
        transcripts: list[torch.LongTensor],
        language: str | None,
        task: str | None,
    ) -> list[torch.Tensor]:
        """Last hidden states (T, C) at the words of each window; all windows in one pass."""
        whisper = self.audio_tower
        encoded = whisper.get_encoder()(mel)
        prompt = self._whisper_prompt(encoded, language, task)
        longest = max(map(len, transcripts))
        # Padding stands behind the words, where the causal decoder does not look.
        words = torch.stack([nn.functional.pad(t, (0, longest - len(t))) for t in transcripts])
        states = whisper.get_decoder()(
            input_ids=torch.cat([prompt, words], dim=1),
            encoder_hidden_states=encoded.last_hidden_state,
            use_cache=False,
        ).last_hidden_state
        first = prompt.shape[1]
        return [states[i, first : first + len(t)] for i, t in enumerate(transcripts)]

    def _whisper_prompt(self, encoded, language: str | None, task: str | None) -> torch.LongTensor:
        """(W, P): the tokens before a transcript without timestamps, as Whisper's `generate` sets
        them: start, and for a multilingual Whisper the language, which it detects where none is
        named, and the task.
        """
        settings, whisper = self._whisper_generation_config(), self.audio_tower
        frames = encoded.last_hidden_state
        start = settings.decoder_start_token_id
        if start is None:
            start = self.config.audio_config.decoder_start_token_id
        columns = [frames.new_full((len(frames),), start, dtype=torch.long)]
        if getattr(settings, "is_multilingual", False) and getattr(settings, "lang_to_id", None):
            language = language or getattr(settings, "language", None)
            if language is None:
                columns.append(
                    whisper.detect_language(encoder_outputs=encoded, generation_config=settings)
                )
            else:
                columns.append(
                    torch.full_like(columns[0], settings.lang_to_id[language_token(language)])
                )
            task = task or getattr(settings, "task", None) or "transcribe"
            columns.append(torch.full_like(columns[0], settings.task_to_id[task]))
        if getattr(settings, "no_timestamps_token_id", None) is not None:
            columns.append(torch.full_like(columns[0], settings.no_timestamps_token_id))
        return torch.stack(columns, dim=1)

    def _whisper_generation_config(self) -> GenerationConfig:
        return GenerationConfig.from_dict(self.config.transcript_generation_config or {})

    def _require_transcript(self):
        if self.config.audio_config is None or self.config.audio_route not in WRITTEN_ROUTES:
            raise ValueError(
                f"got audio_route={self.config.audio_route!r}, expected 'transcript', "
                "'transcript_embeddings' or 'decoder' and an audio_config: only then does the "
                "model hold Whisper's decoder"
            )


def language_token(language: str) -> str:
    """`<|en|>` for it, for `en` and for `english`."""
    name = language.lower()
    return name if name.startswith("<|") else f"<|{TO_LANGUAGE_CODE.get(name, name)}|>"


__all__ = ["WRITTEN_ROUTES", "TranscriptionMixin", "language_token"]
