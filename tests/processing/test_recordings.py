"""The door for recordings: any form, format, rate and number of channels gives the same samples."""

import base64
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from processing import open_recording

RATE = 16_000


def tone(seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)


def encoded(samples: np.ndarray, kind: str, rate: int = RATE, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


def opened(source) -> np.ndarray:
    samples = open_recording(source, RATE)
    assert samples.dtype == np.float32 and samples.ndim == 1
    return samples


def test_every_form_of_a_file_is_the_same_recording(tmp_path):
    held = encoded(tone(), "WAV", subtype="FLOAT")
    path = tmp_path / "tone.wav"
    path.write_bytes(held)
    text = base64.b64encode(held).decode()
    forms = [path, str(path), held, bytearray(held), memoryview(held), io.BytesIO(held), text]
    forms += [f"data:audio/wav;base64,{text}", {"bytes": held, "path": None}]
    forms += [{"bytes": None, "path": str(path)}, {"array": tone(), "sampling_rate": RATE}]
    forms += [(tone(), RATE), tone(), torch.from_numpy(tone()), tone().tolist()]
    with path.open("rb") as file:
        for form in [*forms, file]:
            assert np.array_equal(opened(form), tone()), type(form)
    short = base64.b64encode(encoded(tone()[:100], "WAV")).decode()  # longer than a name may be
    assert len(opened(short)) == 100


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG"])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_formats(kind, rate):
    samples = opened(encoded(tone(2, rate), kind, rate))
    assert abs(len(samples) - 2 * RATE) <= (0 if kind in ("WAV", "FLAC") else 2_500)
    assert np.corrcoef(samples[8_000:24_000], tone(2)[8_000:24_000])[0, 1] > 0.99


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 48_000, 96_000])
def test_a_file_and_an_array_are_resampled_alike(rate):
    file = opened(encoded(tone(1, rate), "WAV", rate, subtype="FLOAT"))
    assert np.array_equal(file, opened((tone(1, rate), rate))) and len(file) == RATE
    np.testing.assert_allclose(file[4_000:12_000], tone()[4_000:12_000], atol=1e-3)


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_are_averaged(channels):
    loud = np.zeros((RATE, channels), np.float32)
    loud[:, 0] = tone()
    for source in (encoded(loud, "WAV", subtype="FLOAT"), (loud, RATE), (loud.T, RATE)):
        np.testing.assert_allclose(opened(source), tone() / channels, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale", "middle"),
    [(np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.uint8, 128, 128), (np.float64, 1, 0)],
)
def test_types_are_scaled(dtype, scale, middle):
    samples = (tone() * scale + middle).astype(dtype)
    np.testing.assert_allclose(opened(samples), tone(), atol=1.1 / scale if scale > 1 else 0)


def test_an_offset_is_taken_away_and_nothing_else():
    np.testing.assert_allclose(opened(tone() + np.float32(0.3)), tone(), atol=1e-6)
    assert np.array_equal(opened(tone() + np.float32(0.005)), tone() + np.float32(0.005))
    for kept in (np.zeros(RATE, np.float32), 1e-6 * tone(), np.sign(tone()), 1.5 * tone()):
        assert np.array_equal(opened(kept), kept)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (b"", "of type bytes.*it holds 0 bytes"),
        (b"this is not a recording", "of type bytes.*Format not recognised"),
        (encoded(np.zeros(0), "WAV"), "0 samples"),
        ("nowhere/clip.wav", "'nowhere/clip.wav'.*no such file"),
        ((RATE, tone()), r"not \(array, sampling_rate\)"),
        ((tone(), 16.0), "a rate of 16.0 Hz"),
        ({"array": tone()}, r"the keys \['array'\], expected array and sampling_rate"),
        (np.zeros((80, 3000), np.float32), r"shape \(80, 3000\), expected \(samples,\)"),
        (np.zeros(9, np.int64), "an array of int64, expected float, int16, int32 or uint8"),
        (tone() * 32768, "float samples up to 16384, expected -1 to 1"),
        (np.full(9, np.nan), "NaN or infinite"),
        (encoded(np.full(9, np.inf), "WAV", subtype="FLOAT"), "NaN or infinite"),
        (None, "of type NoneType"),
    ],
)
def test_what_is_no_recording_is_named(source, complaint):
    with pytest.raises(ValueError, match=f"(?s)got the audio .*{complaint}"):
        open_recording(source, RATE)


def test_m4a_is_decoded_where_torchcodec_is(monkeypatch):
    held = b"\0\0\0\x18ftypM4A " + bytes(64)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match="M4A, AAC and WebM need FFmpeg.*torchcodec.*WAV or FLAC"):
        open_recording(held, RATE)

    class AudioDecoder:
        def __init__(self, source):
            assert source == held

        def get_all_samples(self):
            stereo = torch.from_numpy(np.stack([tone(1, 32_000)] * 2))
            return SimpleNamespace(data=stereo, sample_rate=32_000)

    stub = SimpleNamespace(AudioDecoder=AudioDecoder)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", stub)
    assert np.array_equal(opened(held), opened((tone(1, 32_000), 32_000)))
    assert np.array_equal(opened(AudioDecoder(held)), opened(held))
