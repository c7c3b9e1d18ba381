import base64
import functools
import http.server
import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_tokenizers import GOLDEN

from mgllava.image_processing_mgllava import MGLlavaImageProcessor, load_picture

RAMP = np.arange(24 * 36 * 3, dtype=np.uint32).reshape(24, 36, 3) % 251
PIXELS = RAMP.astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)
ORIENTATION = 0x0112


def small(**settings):
    return MGLlavaImageProcessor(high_res_size=48, low_res_size=21, **settings)


def pixels_of(image, **settings):
    return small()(image, return_tensors="pt", **settings)["pixel_values_high_res"]


def encoded(image, format="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "preprocess.safetensors")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_golden(golden, index):
    """Pillow's bicubic differs between versions by one step of 1/255 at most, seen on none so far."""
    inputs = MGLlavaImageProcessor()(Image.fromarray(golden[f"image{index}"].numpy()), return_tensors="pt")
    high_res, low_res = inputs["pixel_values_high_res"][0], inputs["pixel_values"][0]
    assert high_res.shape == (3, 768, 768)
    assert low_res.shape == (3, 336, 336)
    torch.testing.assert_close(high_res[:, ::12, ::12], golden[f"high_res{index}_every12"], atol=1e-5, rtol=0)
    torch.testing.assert_close(low_res[:, ::7, ::7], golden[f"low_res{index}_every7"], atol=1e-5, rtol=0)


def test_padding_has_the_truncated_mean_colour():
    processor = MGLlavaImageProcessor(high_res_size=36, low_res_size=36)
    high_res = processor(PICTURE)["pixel_values_high_res"][0]
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    colour = torch.tensor([122, 116, 104]) / 255
    torch.testing.assert_close(high_res[:, 0, 0], (colour - mean) / std)
    middle = (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(high_res[:, 6:30], middle)


def test_settings_are_saved(tmp_path):
    processor = small(image_mean=[0.5, 0.5, 0.5], max_objects=5, iou_threshold=0.3)
    processor.save_pretrained(tmp_path)
    loaded = MGLlavaImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(loaded(PICTURE)["pixel_values"], processor(PICTURE)["pixel_values"])


# Boxes


def test_boxes_are_padded_and_counted():
    found = {"boxes": [[0, 0, 36, 24], [3, 3, 9, 9]]}
    inputs = small()([PICTURE, PICTURE, PICTURE], [found, None, {"boxes": []}], return_tensors="pt")
    assert inputs["boxes"].dtype == torch.float32
    assert inputs["boxes"].shape == (3, 2, 4)
    assert inputs["boxes"][0].tolist() == [[0, 8, 48, 40], [4, 12, 12, 20]]
    assert not inputs["boxes"][1:].any()
    assert inputs["num_boxes"].dtype == torch.int64
    assert inputs["num_boxes"].tolist() == [2, 1, 1]


def test_no_boxes_without_detections():
    assert set(small()(PICTURE)) == {"pixel_values", "pixel_values_high_res"}


def test_box_settings_of_one_call():
    apart = {
        "boxes": [[0, 0, 4, 4], [8, 0, 12, 4], [16, 0, 20, 4]],
        "labels": list("aab"),
        "scores": [0.9, 0.8, 0.7],
    }
    count = lambda **settings: small()(PICTURE, apart, **settings)["num_boxes"].tolist()
    assert count() == [3]
    assert count(best_per_label=True) == [2]
    assert count(max_objects=2, max_per_category=1) == [2]


def test_wrong_detections_name_their_picture():
    with pytest.raises(ValueError, match=r"detections\[1\]: boxes\[0\]"):
        small()([PICTURE, PICTURE], [None, {"boxes": [[5, 5, 1, 1]]}])


# Forms of pictures


def test_every_form_of_the_same_picture(tmp_path):
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    expected = pixels_of(PICTURE)
    for form in (
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.float32) / 255,
        PIXELS.astype(np.float64),
        PIXELS.astype(np.uint16) * 257,
        PIXELS.astype(np.int64),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255,
        path,
        str(path),
        text,
        f"data:image/png;base64,{text}",
    ):
        torch.testing.assert_close(pixels_of(form), expected)
    assert pixels_of([[PICTURE], [PIXELS, str(path)]]).shape[0] == 3
    assert pixels_of(np.stack([PIXELS, PIXELS])).shape[0] == 2
    assert pixels_of(torch.from_numpy(PIXELS).permute(2, 0, 1)[None]).shape[0] == 1


def test_url(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    PICTURE.save(tmp_path / "cat.png")
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(pixels_of(f"{address}/cat.png"), pixels_of(PICTURE))
        with pytest.raises(ValueError, match=r"dog\.png\) cannot be used: the download failed: .*404"):
            pixels_of(f"{address}/dog.png")
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_open_channel_axis():
    thin = PIXELS[:3]
    torch.testing.assert_close(pixels_of(thin), pixels_of(Image.fromarray(thin)))
    swapped = torch.from_numpy(thin).permute(2, 0, 1)
    torch.testing.assert_close(pixels_of(swapped), pixels_of(Image.fromarray(thin)))
    torch.testing.assert_close(
        pixels_of(thin.transpose(2, 0, 1), input_data_format="channels_first"),
        pixels_of(Image.fromarray(thin)),
    )


def rgb(image, **settings):
    return np.asarray(load_picture(image, **settings))


def test_grey_and_palette():
    grey = PICTURE.convert("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    assert np.array_equal(rgb(grey), expected)
    assert np.array_equal(rgb(np.asarray(grey)), expected)
    assert np.array_equal(rgb(np.asarray(grey)[..., None]), expected)
    palette = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    assert np.array_equal(rgb(palette), np.asarray(palette.convert("RGB")))
    two = PICTURE.convert("1")
    assert np.array_equal(rgb(two), np.asarray(two.convert("RGB")))
    assert np.array_equal(rgb(np.array([[True, False]])), [[[255] * 3, [0] * 3]])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composed_on_white(mode):
    source = Image.fromarray(PIXELS[:10, :10]).convert("L" if mode != "RGBA" else "RGB")
    opaque = source.convert("P" if mode == "PA" else source.mode).convert(mode)
    assert np.array_equal(rgb(opaque), np.asarray(source.convert("RGB")))
    clear = opaque.copy()
    clear.putalpha(0)
    assert (rgb(clear) == 255).all()
    half = source.convert("LA" if mode != "RGBA" else "RGBA")
    half.putalpha(128)
    blend = np.asarray(source.convert("RGB")) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(rgb(half) - blend).max() <= 1


def test_alpha_of_arrays():
    array = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert (rgb(array) == 255).all()
    assert (rgb(torch.from_numpy(array).permute(2, 0, 1)) == 255).all()


def test_transparent_colour_of_a_palette_and_of_rgb(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    path = tmp_path / "palette.png"
    palette.save(path, transparency=0)
    assert rgb(path)[0, 0].tolist() == [0, 0, 255]
    assert rgb(path)[3, 3].tolist() == [255, 255, 255]
    plain = tmp_path / "rgb.png"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(plain, transparency=(1, 2, 3))
    assert (rgb(plain) == 255).all()


def test_sixteen_bit_is_scaled(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(values).save(path)
    deep = Image.open(path)
    assert deep.mode.startswith("I")
    for form in (
        path,
        deep,
        values,
        values.astype(">u2"),
        values.astype(np.int32),
        Image.fromarray(values.astype(np.int32)),
    ):
        assert rgb(form)[0, :, 0].tolist() == [0, 1, 128, 255]
    tiff = tmp_path / "deep.tiff"
    Image.fromarray(values).save(tiff)
    assert rgb(tiff)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_float_pictures():
    unit = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert rgb(Image.fromarray(unit))[0, :, 2].tolist() == [0, 128, 255]
    assert rgb(Image.fromarray(unit * 255))[0, :, 2].tolist() == [0, 128, 255]


def test_other_colour_spaces(tmp_path):
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert rgb(cmyk)[0, 0].tolist() == [255, 0, 0]
    path = tmp_path / "print.jpg"
    cmyk.save(path)
    assert np.abs(rgb(path)[0, 0].astype(int) - [255, 0, 0]).max() < 5
    assert np.abs(rgb(PICTURE.convert("YCbCr")).astype(int) - PIXELS).max() < 4


# Orientation: pictures are used upright, wherever they come from


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    stored = Image.fromarray(PIXELS)
    exif = stored.getexif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    upright = undo[orientation](PIXELS)
    for form in (path, Image.open(path), load_picture(path), load_picture(Image.open(path))):
        assert np.array_equal(rgb(form), upright)
    # Boxes are pixels of the upright picture.
    height, width = upright.shape[:2]
    boxes = small()(path, {"boxes": [[0, 0, width, height]]})["boxes"][0, 0].tolist()
    assert boxes == ([0, 8, 48, 40] if width > height else [8, 0, 40, 48])


# Pictures that cannot be used


def test_missing_file():
    with pytest.raises(
        ValueError, match=r"images\[1\] \(nowhere\.png\) cannot be used: there is no such file"
    ):
        small()([PICTURE, "nowhere.png"])
    with pytest.raises(ValueError, match=r"nowhere\.png.*No such file"):
        small()(Path("nowhere.png"))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_truncated_file(tmp_path, format):
    path = tmp_path / "half.bin"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half\.bin\) cannot be used"):
        small()(str(path))
    with pytest.raises(ValueError, match=r"images\[0\] cannot be used"):
        small()(Image.open(path))


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_file_that_is_no_picture(tmp_path, data):
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"notes\.txt\) cannot be used"):
        small()(path)
    with pytest.raises(ValueError, match="cannot be used"):
        small()(tmp_path)


def test_a_strip_whose_square_would_fill_the_memory(tmp_path):
    path = tmp_path / "strip.png"
    Image.new("1", (1, 20000)).save(path)
    with pytest.raises(ValueError, match="1x20000 pixels, and the square"):
        MGLlavaImageProcessor()(path)


@pytest.mark.parametrize("limit", [400, 600])  # above the error, and between warning and error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    PICTURE.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"bomb\.png\) cannot be used: .*(limit|pixels)"):
        small()(path)
    with pytest.raises(ValueError, match="raise that limit"):
        small()(PICTURE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    small()(path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "0x5 pixels, empty"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((5, 6, 7), np.uint8), r"its shape is \(5, 6, 7\)"),
        (np.zeros((4,), np.uint8), r"its shape is \(4,\)"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), -1.0), "range from -1.0"),
        (np.full((4, 4, 3), 300.0), "range from 300.0"),
        (np.full((4, 4, 3), 70000), "range from 70000"),
        (np.full((4, 4, 3), -3), "range from -3"),
        (3, "got int"),
        ("!", "neither a URL nor base64"),
    ],
)
def test_unusable_pictures(image, message):
    with pytest.raises(ValueError, match=message):
        small()([PICTURE, image])


def test_no_pictures():
    with pytest.raises(ValueError, match="images is empty"):
        small()([])


def test_torchvision_is_not_needed_for_pictures():
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import numpy as np\n"
        "from mgllava.image_processing_mgllava import MGLlavaImageProcessor\n"
        "found = {'boxes': [[0, 0, 2, 2]]}\n"
        "MGLlavaImageProcessor(high_res_size=8, low_res_size=4)(np.zeros((5, 4, 3), np.uint8), found)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
