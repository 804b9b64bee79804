"""The one door for recordings: whatever holds sound becomes mono float32 samples at one rate."""

import base64
import binascii
import math
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import load_audio

try:
    import soundfile
except ImportError:  # needed only for files
    soundfile = None

try:
    import librosa
except ImportError:  # needed only for audio of another rate
    librosa = None

RATES = (1_000, 384_000)  # Hz; what is outside is no rate, such as one given in kHz
MOST_CHANNELS = 8  # of an array; more of them are a spectrogram or a batch
LOUDEST = 32.0  # of float samples; integers that were only cast are louder
OFFSET = 0.01  # of full scale
PAUSE_SECONDS = 0.1  # over which loudness is measured where a recording is cut
OFFSET_SECONDS = 0.1  # the mean of less is no offset, but sound


def open_recording(source: Any, sampling_rate: int) -> np.ndarray:
    """Opens a recording.

    Channels are averaged, another rate is resampled, integers are scaled to [-1, 1), and an offset
    of more than 1 % of full scale is taken away. Loudness stays as it is: silence and clipped
    sound are recordings like others.

    Args:
        source: a path, a URL, base64; the bytes of a file, or a file object; an array of float,
            int16, int32 or uint8 samples at `sampling_rate`, (samples,) or with up to 8 channels on
            another axis; a pair `(array, sampling_rate)`; a dict with `array` and `sampling_rate`,
            or with `bytes` or `path`, as `datasets` has it; its decoder.
        sampling_rate: of the result, in Hz.

    Returns:
        float32 (samples,), finite and not empty.

    Raises:
        ValueError: it is missing, broken, empty or not finite, or nothing here decodes it; the
            message names it.
    """
    name = name_of(source)
    try:
        samples, rate = _read(source, sampling_rate)
        samples = _resampled(samples, rate, sampling_rate)
    except Exception as error:  # a broken file makes decoders raise errors of any kind
        raise ValueError(
            f"got the audio {name}, expected a recording that can be opened (WAV, FLAC, MP3, "
            f"OGG): {error}"
        ) from error
    if samples.size == 0:
        raise ValueError(
            f"got the audio {name} with 0 samples, expected at least one: record or cut it again"
        )
    if not np.isfinite(samples).all():
        raise ValueError(
            f"got the audio {name} with NaN or infinite samples, expected finite numbers"
        )
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise ValueError(
            f"got the audio {name} with float samples up to {peak:g}, expected -1 to 1: give the "
            "integers themselves, or divide them by the largest of their type"
        )
    return _without_offset(samples, sampling_rate)


def name_of(source: Any) -> str:
    """What a message calls a picture or recording."""
    if isinstance(source, (str, Path)):
        text = str(source)
        return repr(text if len(text) <= 200 else text[:60] + "...")
    return f"of type {type(source).__name__}"


def split_at_pauses(samples: np.ndarray, longest: int, sampling_rate: int) -> list[np.ndarray]:
    """Cuts a recording (n,) into pieces of at most `longest` samples, each where it is quietest in
    the last quarter of what it could hold: Whisper loses or doubles a word that a cut goes through.
    """
    width = round(PAUSE_SECONDS * sampling_rate)
    pieces = []
    while len(samples) > longest:
        cut = _quietest(samples[:longest], 3 * longest // 4, width)
        pieces.append(samples[:cut])
        samples = samples[cut:]
    return [*pieces, samples]


def _quietest(samples: np.ndarray, first: int, width: int) -> int:
    """The middle of the quietest `width` samples from `first` on."""
    power = np.cumsum(np.square(samples[first:], dtype=np.float64))
    return first + int(np.argmin(power[width:] - power[:-width])) + width // 2


def _read(source: Any, sampling_rate: int) -> tuple[np.ndarray, int]:
    """Mono float32 samples with their rate."""
    if isinstance(source, dict):
        return _read(_of_dict(source), sampling_rate)
    if isinstance(source, (str, Path)):
        return _read_named(str(source), sampling_rate)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(BytesIO(source))
    if hasattr(source, "read"):
        return _read(source.read(), sampling_rate)
    if hasattr(source, "get_all_samples"):  # torchcodec's decoder, also as `datasets` wraps it
        return _all_samples(source)
    if isinstance(source, tuple):
        rate = _checked_rate(source)
        return _mono(_scaled(source[0])), rate
    return _mono(_scaled(source)), sampling_rate


def _of_dict(source: dict) -> Any:
    if source.get("array") is not None and source.get("sampling_rate") is not None:
        return source["array"], source["sampling_rate"]
    for key in ("bytes", "path"):
        if source.get(key) is not None:
            return source[key]
    raise ValueError(
        f"a dict with the keys {sorted(source)}, expected array and sampling_rate, or bytes or path"
    )


def _read_named(source: str, sampling_rate: int) -> tuple[np.ndarray, int]:
    if source.startswith(("http://", "https://")):
        return load_audio(source, sampling_rate, backend="soundfile"), sampling_rate
    if os.path.isfile(source):  # pathlib's raises an error for base64 as long as no name may be
        return _decode(source)
    try:
        held = base64.b64decode(source.partition(",")[2] or source, validate=True)
    except binascii.Error:
        held = b""
    if len(held) < 44 and not source.startswith("data:"):  # the header of a WAV file is that long
        raise ValueError("there is no such file")
    return _decode(BytesIO(held))


def _decode(file: str | BytesIO) -> tuple[np.ndarray, int]:
    """By libsndfile, else by FFmpeg where torchcodec brings it."""
    if soundfile is None:
        raise ValueError("`pip install soundfile` decodes it")
    if isinstance(file, BytesIO) and not file.getbuffer().nbytes:
        raise ValueError("it holds 0 bytes")
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        return _decode_by_ffmpeg(file, error)
    return samples.mean(axis=1), rate


def _decode_by_ffmpeg(file: str | BytesIO, refused: Exception) -> tuple[np.ndarray, int]:
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError):  # the latter where FFmpeg's libraries are not
        raise ValueError(
            f"{refused}; M4A, AAC and WebM need FFmpeg and `pip install torchcodec`, or save it as "
            "WAV or FLAC"
        ) from refused
    return _all_samples(AudioDecoder(file if isinstance(file, str) else file.getvalue()))


def _all_samples(decoder: Any) -> tuple[np.ndarray, int]:
    decoded = decoder.get_all_samples()
    return decoded.data.numpy().mean(axis=0), decoded.sample_rate


def _checked_rate(pair: tuple) -> int:
    array, rate = pair
    if np.ndim(array) == 0 or np.ndim(rate) != 0:
        raise ValueError("a pair that is not (array, sampling_rate)")
    if not RATES[0] <= rate <= RATES[1] or rate != int(rate):
        raise ValueError(f"a rate of {rate} Hz, expected a whole number such as 16000")
    return int(rate)


def _scaled(source: Any) -> np.ndarray:
    """An array's samples as float32, integers scaled to [-1, 1)."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = source.float().numpy() if source.is_floating_point() else source.numpy()
    samples = np.asarray(source)
    if samples.dtype in (np.int16, np.int32):
        return (samples / (np.iinfo(samples.dtype).max + 1)).astype(np.float32)
    if samples.dtype == np.uint8:  # unsigned, as WAV files of 8 bits are
        return ((samples - 128.0) / 128).astype(np.float32)
    if samples.dtype.kind != "f":
        raise ValueError(
            f"an array of {samples.dtype}, expected float, int16, int32 or uint8 samples"
        )
    return samples.astype(np.float32)


def _mono(samples: np.ndarray) -> np.ndarray:
    """The mean of an array's channels."""
    if samples.ndim == 1:
        return samples
    # (channels, samples) or (samples, channels): there are more samples than channels.
    if samples.ndim != 2 or 0 < samples.size and min(samples.shape) > MOST_CHANNELS:
        raise ValueError(
            f"an array of shape {samples.shape}, expected (samples,) or another axis of at most "
            f"{MOST_CHANNELS} channels"
        )
    return samples.mean(axis=int(np.argmin(samples.shape))) if samples.size else samples.ravel()


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted or samples.size == 0:
        return samples
    if librosa is None:
        raise ValueError(f"it has {rate} Hz, not {wanted}: `pip install librosa` converts it")
    return librosa.resample(samples, orig_sr=rate, target_sr=wanted)


def _without_offset(samples: np.ndarray, rate: int) -> np.ndarray:
    """Nobody hears an offset, but it would leak into the lowest band, and into the largest value,
    from which Whisper counts what is too quiet to show.
    """
    if len(samples) < math.ceil(OFFSET_SECONDS * rate):
        return samples
    mean = samples.mean(dtype=np.float64)
    return samples - np.float32(mean) if abs(mean) > OFFSET else samples


def media_of(part: dict, keys: tuple[str, ...]) -> Any:
    """What a message's part shows or plays, under the first of these keys that it has."""
    for key in keys:
        if part.get(key) is not None:
            return {key: part[key]} if key.endswith("_embeds") else part[key]
    raise ValueError(
        f"got an {part['type']} part with the keys {sorted(part)}, expected one of "
        f"{', '.join(keys)}"
    )


__all__ = ["media_of", "name_of", "open_recording", "split_at_pauses"]
