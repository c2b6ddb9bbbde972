"""Whatever the bytes are: upright RGB pixels, or a status and a reason."""

from __future__ import annotations

import random
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tests.workers.pictures import ANY_SIZE, LIMITS, decoded, encode, exif, photo, png_chunk
from workers.decode import DecodeError, DecodeLimits, decode_image, resize_keep_aspect, resize_square
from workers.formats import FORMATS
from workers.records import Status

pytestmark = [  # Pillow's remarks on the broken files below
    pytest.mark.filterwarnings("ignore::UserWarning:PIL.*"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def real_bomb(side: int = 20_000) -> bytes:
    """A sound one-bit PNG of side x side pixels in about 50 KB."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def png_with(chunk: bytes) -> bytes:
    data = encode(photo(), "PNG")
    return data[:33] + chunk + data[33:]


def flipped(data: bytes) -> bytes:
    return data[:20] + bytes(byte ^ 0xFF for byte in data[20:60]) + data[60:]


JPEG = encode(photo(), "JPEG")
OK = Status.OK
GENERATED = {
    "alpha.png": (encode(photo().convert("RGBA"), "PNG"), OK),
    "animated.gif": (encode(photo(), "GIF", save_all=True, append_images=[photo().rotate(180)]), OK),
    "bomb_header.png": (png_claiming(60_000, 60_000), Status.TOO_LARGE),
    "bomb_real.png": (real_bomb(), Status.TOO_LARGE),
    "cmyk.jpg": (encode(photo().convert("CMYK"), "JPEG"), OK),
    "constant.png": (encode(Image.new("RGB", (32, 24), "grey"), "PNG"), OK),
    "empty.jpg": (b"", Status.EMPTY),
    "exif_rotated.jpg": (encode(photo(), "JPEG", exif=exif(6)), OK),
    "flipped_bytes.jpg": (flipped(JPEG), Status.UNDECODABLE),
    "garbage_tail.jpg": (JPEG + bytes(range(256)) * 20, OK),
    "gray.jpg": (encode(photo().convert("L"), "JPEG"), OK),
    "gray_alpha.png": (encode(photo().convert("LA"), "PNG"), OK),
    "modern.webp": (encode(photo(), "WEBP"), OK),
    "name with spaces ü例.jpg": (JPEG, OK),
    "one_bit.png": (encode(photo().convert("1"), "PNG"), OK),
    "one_pixel.png": (encode(photo(1, 1), "PNG"), Status.TOO_SMALL),
    "palette.png": (encode(photo().quantize(64), "PNG"), OK),
    "sixteen_bit.png": (encode(np.arange(6400, dtype=np.uint16).reshape(80, 80) * 10, "PNG"), OK),
    "text.jpg": (b"<html>404 not found</html>" * 20, Status.UNDECODABLE),
    "truncated_half.jpg": (JPEG[: len(JPEG) // 2], Status.UNDECODABLE),
    "truncated_header.jpg": (JPEG[:40], Status.UNDECODABLE),
    "upper.JPG": (JPEG, OK),
    "very_tall.png": (encode(photo(3000, 2), "PNG"), Status.TOO_SMALL),
    "very_wide.png": (encode(photo(2, 3000), "PNG"), Status.TOO_SMALL),
    "wrong_extension.png": (JPEG, OK),
    "colour_profile_bomb.png": (
        png_with(png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50 << 20)))),
        Status.UNDECODABLE,
    ),
    "text_bomb.png": (png_with(png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50 << 20)))), Status.UNDECODABLE),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", Status.UNDECODABLE),
    "headless.tif": (b"II*\0" + b"\xff" * 40, Status.UNDECODABLE),
}


def outcome(data: bytes, limits: DecodeLimits = LIMITS) -> Status:
    try:
        pixels = decode_image(data, limits)
    except DecodeError as error:
        assert str(error)
        assert " at 0x" not in str(error)
        return error.status
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3 and pixels.shape[2] == 3
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    return Status.OK


# Every kind of bad input


@pytest.mark.parametrize("name", GENERATED)
def test_every_kind_of_bad_input_has_its_status(name: str) -> None:
    data, status = GENERATED[name]
    assert outcome(data) is status


def test_every_reference_file_has_its_status(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "bad-inputs"
    files = {path.name: outcome(path.read_bytes()) for path in sorted(folder.iterdir())}
    assert len(files) == 25
    assert files == {name: GENERATED[name][1] for name in files}


def test_the_generated_kinds_cover_the_reference_kinds() -> None:
    assert len(GENERATED) >= 25
    assert {status for _, status in GENERATED.values()} == {
        Status.OK,
        Status.EMPTY,
        Status.UNDECODABLE,
        Status.TOO_LARGE,
        Status.TOO_SMALL,
    }


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome(real_bomb())
    outcome(png_claiming(9_000, 9_000))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux, bytes on macOS
    assert grown < 60_000 * (1024 if before > 1 << 30 else 1)  # the pixels would be 240 000 KiB and more


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.jpg", "the file is empty"),
        ("bomb_header.png", r"more than 50000000 pixels \(decode.max_pixels\)"),
        ("very_wide.png", r"3000x2 has a side below 8 pixels \(decode.min_side\)"),
        ("text.jpg", "not a readable image of the formats JPEG, PNG, WEBP, BMP, GIF, TIFF"),
        ("truncated_half.jpg", "image file is truncated"),
    ],
)
def test_reasons_can_be_read(name: str, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_image(GENERATED[name][0], LIMITS)


def test_the_limits_are_inclusive() -> None:
    data = encode(photo(90, 120), "PNG")
    assert outcome(data, DecodeLimits(max_pixels=10_800, min_side=90)) is Status.OK
    assert outcome(data, DecodeLimits(max_pixels=10_799)) is Status.TOO_LARGE
    assert outcome(data, DecodeLimits(min_side=91)) is Status.TOO_SMALL


def test_pillow_is_left_as_it_was() -> None:
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    for data, _ in GENERATED.values():
        outcome(data)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


SMALL = photo(24, 32)
SEEDS = [
    encode(SMALL, "JPEG", exif=exif(6)),
    encode(SMALL, "JPEG", progressive=True),
    encode(SMALL, "PNG", exif=exif(6)),
    encode(SMALL.quantize(16), "PNG", transparency=3),
    encode(SMALL, "WEBP", exif=exif(3)),
    encode(
        SMALL.convert("RGBA"), "WEBP", lossless=True, save_all=True, append_images=[SMALL.rotate(90).convert("RGBA")]
    ),
    encode(SMALL, "BMP"),
    encode(SMALL, "GIF", save_all=True, append_images=[SMALL.rotate(180)]),
    encode(SMALL, "TIFF", exif=exif(6)),
    encode(SMALL, "TIFF", compression="tiff_lzw"),
    encode(SMALL, "TIFF", compression="jpeg"),
    encode(SMALL, "TIFF", big_tiff=True),
]


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_truncated_and_damaged_files_end_in_a_status(seed: int) -> None:
    whole, chance = SEEDS[seed], random.Random(seed)
    assert outcome(whole, ANY_SIZE) is Status.OK
    for cut in range(0, len(whole), max(1, len(whole) // 100)):
        assert outcome(whole[:cut], ANY_SIZE) in {Status.OK, Status.EMPTY, Status.UNDECODABLE}
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 2, 4))):
            damaged[chance.randrange(len(damaged))] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
        assert outcome(bytes(damaged), ANY_SIZE) in Status


@given(st.sampled_from([seed[:12] for seed in SEEDS]), st.binary(max_size=64))
def test_a_good_beginning_is_not_enough(head: bytes, rest: bytes) -> None:
    assert outcome(head + rest) in Status


def test_a_tiff_offset_that_is_a_fraction_is_bad_data() -> None:
    data = bytearray(encode(SMALL, "TIFF"))
    entry = data.index(struct.pack("<HHI", 273, 4, 1))  # StripOffsets, one LONG
    struct.pack_into("<H", data, entry + 2, 11)  # FLOAT
    assert outcome(bytes(data)) is Status.UNDECODABLE


# What the pixels are


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_picture(format: str) -> None:
    options = {"JPEG": {"quality": 95}, "GIF": {}}.get(format, {})
    expected = np.asarray(photo(), dtype=np.int32)
    found = decoded(photo().quantize(256) if format == "GIF" else photo(), format, **options)
    assert found.shape == (90, 120, 3)
    assert np.abs(found - expected).mean() < 6


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16", "RGBX"])
def test_every_mode_gives_the_same_colour(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 9), 30 * 257, np.uint16))
    else:
        image = Image.new("RGB", (9, 9), (30, 30, 30)).convert(mode)
    assert decoded(image, "TIFF")[4, 4].tolist() == [30, 30, 30]


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    pixels = decoded(Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(pixels[8, 8].astype(int) - (200, 100, 50)).max() <= 2


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = np.array([[0, 128, 129, 32767, 32768, 65406, 65407, 65535]] * 8, np.uint16)
    expected = [0, 0, 1, 127, 128, 254, 255, 255]  # round(value / 257)
    for image, format in ((grey, "PNG"), (grey, "TIFF"), (grey.astype(">u2"), "TIFF")):
        assert decoded(image, format)[3, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.float32([0, 0.25, 0.5, 1]), [0, 64, 128, 255]),  # within [0, 1]: as they are
        (np.float32([-3, -0.5, 2, 7]), [0, 64, 128, 255]),  # from the least to the greatest
        (np.float32([np.nan, 0, np.inf, 4]), [0, 0, 255, 255]),
        (np.float32([5, 5, 5, 5]), [0, 0, 0, 0]),
        (np.float32([np.nan] * 4), [0, 0, 0, 0]),
        (np.int32([-100, 0, 100, 300]), [0, 64, 128, 255]),
    ],
)
def test_samples_without_a_range_are_stretched(samples: np.ndarray, expected: list[int]) -> None:
    assert decoded(np.tile(samples, (8, 1)), "TIFF")[3, :, 1].tolist() == expected


def test_transparent_parts_are_white() -> None:
    rgba = np.zeros((8, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 0, 3], rgba[:, 1, 3], rgba[:, 2, 3] = 255, 128, 0
    for format in ("PNG", "TIFF"):
        assert decoded(rgba, format)[3].tolist() == [[200, 0, 0], [227, 127, 127], [255, 255, 255]]
    colour_key = Image.new("RGB", (9, 9), (10, 20, 30))
    assert decoded(colour_key, transparency=(10, 20, 30))[0, 0].tolist() == [255, 255, 255]
    indexed = Image.new("P", (9, 9), 3)
    indexed.putpalette([value for entry in range(4) for value in (entry, 2 * entry, 3 * entry)])
    assert decoded(indexed)[0, 0].tolist() == [3, 6, 9]
    assert decoded(indexed, transparency=3)[0, 0].tolist() == [255, 255, 255]


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (10, 10))
    image.putpixel((2, 1), 1)
    pixels = decoded(image)
    assert pixels[1, 2].tolist() == [255, 255, 255]
    assert pixels.sum() == 3 * 255


@pytest.mark.parametrize(
    ("orientation", "shape", "corner"),
    [
        (1, (10, 20), (0, 0)),
        (2, (10, 20), (0, 19)),
        (3, (10, 20), (9, 19)),
        (4, (10, 20), (9, 0)),
        (5, (20, 10), (0, 0)),
        (6, (20, 10), (0, 9)),
        (7, (20, 10), (19, 9)),
        (8, (20, 10), (19, 0)),
        (99, (10, 20), (0, 0)),
    ],
)
@pytest.mark.parametrize("format", sorted({"JPEG", "PNG", "WEBP", "TIFF", "AVIF"} & set(FORMATS)))
def test_exif_puts_the_picture_upright(
    format: str, orientation: int, shape: tuple[int, int], corner: tuple[int, int]
) -> None:
    stored = np.zeros((10, 20, 3), np.uint8)
    stored[0, 0] = 255
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(format, {})
    pixels = decoded(stored, format, exif=exif(orientation), **options)
    assert pixels.shape == (*shape, 3)
    assert [tuple(spot) for spot in np.argwhere(pixels[..., 1] > 128)] == [corner]


def test_broken_exif_does_not_cost_the_picture() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n  8\nnot hexadecimal")
    assert decoded(photo(), pnginfo=text).shape == (90, 120, 3)
    assert decoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff").shape == (90, 120, 3)


def test_the_first_frame_of_an_animation() -> None:
    red, blue = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        pixels = decoded(red, format, save_all=True, append_images=[blue], **options)
        assert pixels[10, 10].tolist() == [255, 0, 0]


# Resizing


def test_resize_square_ignores_the_aspect() -> None:
    image = np.asarray(photo(90, 120))
    resized = resize_square(image, 48)
    assert resized.shape == (48, 48, 3)
    assert resized[24, 24].tolist() == [128, 128, 80]
    assert resized[0, 0].max() <= 80 and resized[47, 47].min() >= 80


def test_resizing_to_the_same_size_is_a_copy() -> None:
    image = np.array(photo(48, 48))
    resized = resize_square(image, 48)
    assert np.array_equal(resized, image)
    assert not np.shares_memory(resized, image)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 480, (480, 480)),
        (100, 200, (480, 960)),
        (375, 500, (480, 640)),
        (333, 500, (480, 720)),
        (3000, 2, (1920, 8)),  # the long side is at most four times the size
        (10, 1000, (16, 1920)),
    ],
)
def test_resize_keep_aspect(height: int, width: int, expected: tuple[int, int]) -> None:
    assert resize_keep_aspect(np.zeros((height, width, 3), np.uint8), 480, 8).shape == (*expected, 3)


@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from([32, 60, 96]), st.sampled_from([1, 8, 14, 16]))
def test_resize_keep_aspect_keeps_to_its_bounds(height: int, width: int, size: int, multiple: int) -> None:
    resized = resize_keep_aspect(np.zeros((height, width, 3), np.uint8), size, multiple, max_ratio=3)
    h, w, _ = resized.shape
    assert h % multiple == 0 and w % multiple == 0
    assert multiple <= min(h, w) <= size + multiple
    assert max(h, w) <= 3 * size
    if max(height, width) <= 2 * min(height, width):
        assert abs(h / w - height / width) <= 2 * multiple / min(h, w)
