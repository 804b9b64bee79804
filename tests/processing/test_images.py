"""Pictures of every kind become the right square, and a broken one is one clear error."""

import numpy as np
import pytest
import torch
from PIL import Image


def pixels_of(processor, picture) -> torch.Tensor:
    return processor(images=[picture], return_tensors="pt")["pixel_values"][0]


def denormalised(processor, picture) -> torch.Tensor:
    """Pixels (3, H, W) back on the scale 0 to 255."""
    image_processor = processor.image_processor
    mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std).view(3, 1, 1)
    return (pixels_of(processor, picture) * std + mean) * 255


@pytest.fixture(scope="module")
def processor(make_phi_mm):
    return make_phi_mm()[1]


def test_a_square_picture_is_itself(processor):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(picture).permute(2, 0, 1).float()
    for source in (picture, torch.from_numpy(picture), torch.from_numpy(picture).permute(2, 0, 1)):
        torch.testing.assert_close(denormalised(processor, source), expected, rtol=0, atol=0.01)
    torch.testing.assert_close(
        denormalised(processor, Image.fromarray(picture)), expected, rtol=0, atol=0.01
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 3), (640, 480)])
def test_any_shape_is_padded_to_a_square_and_loses_nothing(processor, size):
    pixels = denormalised(processor, Image.new("RGB", size, (255, 0, 0)))
    assert pixels.shape == (3, 8, 8)
    mean = [round(255 * m) for m in processor.image_processor.image_mean]
    is_red = (pixels - torch.tensor([255.0, 0, 0]).view(3, 1, 1)).abs().amax(0) < 1
    is_padding = (pixels - torch.tensor(mean).view(3, 1, 1)).abs().amax(0) < 1
    assert (is_red | is_padding).all()
    shorter = max(1, round(8 * min(size) / max(size)))
    assert int(is_red.sum()) == 8 * shorter
    assert int(is_padding.sum()) == 64 - 8 * shorter


def test_alpha_is_laid_on_white(processor):
    half = np.zeros((8, 8, 4), dtype=np.uint8)
    half[:, :4] = (0, 0, 255, 255)
    for picture in (Image.fromarray(half), Image.fromarray(half).convert("P")):
        pixels = denormalised(processor, picture.convert("RGBA"))
        assert pixels[:, 0, 0].round().tolist() == [0, 0, 255]
        assert pixels[:, 0, 7].round().tolist() == [255, 255, 255]


def test_grey_pictures_of_8_and_16_bit_look_the_same(processor):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    grey = denormalised(processor, Image.fromarray(ramp))
    assert torch.equal(grey[0].round(), grey[1].round())
    deep = denormalised(processor, Image.fromarray(ramp.astype(np.uint16) * 257))
    torch.testing.assert_close(deep, grey, rtol=0, atol=0.01)


def test_an_animation_gives_its_first_frame(processor, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert denormalised(processor, tmp_path / "a.gif")[:, 0, 0].round().tolist() == [255, 0, 0]


def test_exif_orientation_is_applied(processor, tmp_path):
    picture = Image.new("RGB", (8, 8), "blue")
    picture.paste("red", (0, 0, 8, 4))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = denormalised(processor, tmp_path / "turned.png")
    assert pixels[0, :, 7].min() > 250 and pixels[2, :, 0].min() > 250  # red right, blue left


def test_a_mislabelled_picture_is_read_by_its_content(processor, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "really_gif.jpg", format="GIF")
    pixels = denormalised(processor, str(tmp_path / "really_gif.jpg"))
    assert pixels[:, 0, 0].round().tolist() == [255, 0, 0]


def test_a_bad_picture_is_named(processor, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "words.jpg").write_text("this is not a picture")
    for name in ("missing.png", "cut.png", "words.jpg"):
        with pytest.raises(ValueError, match=f"got the image '.*{name}', expected a picture"):
            pixels_of(processor, str(tmp_path / name))


def test_an_array_of_floats_is_refused(processor):
    with pytest.raises(ValueError, match="array of float64, expected uint8"):
        pixels_of(processor, np.zeros((8, 8, 3)))


def test_real_photographs(processor, samples):
    photographs = sorted((samples / "minimind_v_images/eval_images").glob("*.jpg"))
    pixels = processor(images=[str(path) for path in photographs], return_tensors="pt")
    assert pixels["pixel_values"].shape == (6, 3, 8, 8)
    assert pixels["pixel_values"].isfinite().all()
