"""Tests that all readers can tell the palette's colours apart and read text on them.

The colours of the load map and the PNG encoder are tested, too.
"""

import base64
import struct
import zlib

import numpy as np
import pytest

from moe_jax.report.colours import SERIES, expert_colour, ink, load_pixels, png, tint

pytestmark = pytest.mark.unit

# The matrices of Machado, Oliveira and Fernandes 2009 for severity 1, which apply to linear RGB.
VISION = {
  "normal": np.eye(3),
  "protan": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  "deutan": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  "tritan": [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}
_TO_LMS = [
  [0.4122214708, 0.5363325363, 0.0514459929],
  [0.2119034982, 0.6806995451, 0.1073969566],
  [0.0883024619, 0.2817188376, 0.6299787005],
]
_TO_LAB = [
  [0.2104542553, 0.7936177850, -0.0040720468],
  [1.9779984951, -2.4285922050, 0.4505937099],
  [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(colour):
  c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
  return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
  return np.cbrt(rgb @ np.array(_TO_LMS).T) @ np.array(_TO_LAB).T


def contrast(a, b):
  low, high = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] for c in (a, b))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("experts, distance", [(16, 0.07), (32, 0.045), (64, 0.025)])
def test_experts_are_told_apart(vision, experts, distance):
  # Catches a colour that looks like another one to some readers. A difference of about 0.02 in
  # OKLab is just visible.
  lab = oklab(
    np.clip(
      np.array([linear(expert_colour(e)) for e in range(experts)]) @ np.array(VISION[vision]).T,
      0,
      1,
    )
  )
  apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 9 * np.eye(experts)
  assert apart.min() > distance


def test_text_is_readable_on_every_colour():
  # Catches white digits on yellow, and a tint too dark for the black text of a token.
  for e in range(64):

    def full(short):
      return "#" + 2 * short[1:]

    assert contrast(expert_colour(e), full(ink(expert_colour(e)))) >= 4.5
    assert contrast(tint(expert_colour(e)), "#000000") >= 7
  assert all(contrast(colour, "#ffffff") >= 3 for colour in SERIES)


def test_palette_repeats():
  # Catches an IndexError at the 65th expert.
  assert expert_colour(64) == expert_colour(0)


def test_load_pixels():
  # Catches a scale that is not centred at the uniform share, and a failure for a load of 0 or NaN.
  starved, fair, crowded, broken = load_pixels(np.array([[0.0, 1.0, 9.0, np.nan]]))[0].astype(int)
  assert starved[2] > starved[0] and crowded[0] > crowded[2]
  assert fair.min() > 240 and broken.tolist() == [190] * 3


def test_png_is_what_went_in():
  # Catches a chunk with a wrong length or checksum, and a wrong row filter.
  pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8)
  data = base64.b64decode(png(pixels).removeprefix("data:image/png;base64,"))
  assert data[:8] == b"\x89PNG\r\n\x1a\n"
  at, chunks = 8, {}
  while at < len(data):
    size, kind = struct.unpack(">I4s", data[at : at + 8])
    chunks[kind] = data[at + 8 : at + 8 + size]
    assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
      kind + chunks[kind]
    )
    at += 12 + size
  assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (5, 3) and b"IEND" in chunks
  rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(3, 16)
  np.testing.assert_array_equal(rows[:, 1:].reshape(3, 5, 3), pixels)
