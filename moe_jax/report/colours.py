"""Colours for up to 64 experts, and small pictures of numbers."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from jaxtyping import Float, UInt8

# Six colours of Okabe and Ito, then greedily the sRGB colour farthest (in OKLab, over normal,
# protanope, deuteranope and tritanope vision after Machado 2009) from all before it: any prefix is
# nearly as distinct as its length allows.
_EXPERTS = """
0072b2 e69f00 009e73 d55e00 cc79a7 56b4e9 920c18 00f3ce cee700 49496d 9e6dff aa4931 b6b692 796179
6d189e 9eceff f3ce92 313dce 7992db 9255db 793149 92c2c2 61923d c2ce55 86aa6d 9e6d9e 863d92 923d3d
6dc255 c23161 ce929e 869eff aa3db6 9e006d 7979ce aa180c 24aac2 f33d55 6ddbdb dbc29e 92e7f3 6dc2ff
ce9200 7924b6 ff9eb6 00619e ce6d79 791886 aa6118 ff61c2 6d61f3 9ece79 6d86e7 c2dbb6 008692 ce3186
ffb618 db92db c261b6 b61855 556d92 618649 5549db 79e779
""".split()
SERIES = (
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#aa4499",
  "#7a5c00",
  "#3d3d5c",
  "#c23161",
  "#008692",
)  # dark enough


def expert_colour(expert: int) -> str:
  """The colour of an expert everywhere in the report; repeats after 64."""
  return "#" + _EXPERTS[expert % len(_EXPERTS)]


def series_colour(index: int) -> str:
  """The colour of the index-th line of a chart that is not about experts."""
  return SERIES[index % len(SERIES)]


def ink(colour: str) -> str:
  """Black or white, whichever is better read on `colour` (WCAG 2 relative luminance)."""
  luminance = sum(
    w * _linear(int(colour[i : i + 2], 16) / 255)
    for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5))
  )
  return "#000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


def tint(colour: str, strength: float = 0.45) -> str:
  """The colour mixed with white."""
  return "#" + "".join(
    f"{round(255 + strength * (int(colour[i : i + 2], 16) - 255)):02x}" for i in (1, 3, 5)
  )


def _linear(channel: float) -> float:
  return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


# Load relative to 1/E, on a scale of log2: blue = starved, white = its share, brown = crowded.
_STOPS = (
  (-2.0, "#053061"),
  (-1.0, "#4393c3"),
  (0.0, "#f7f7f7"),
  (1.0, "#e08214"),
  (2.0, "#5c2300"),
)
LOAD_SCALE = ", ".join(colour for _, colour in _STOPS)  # for a CSS gradient
LOAD_LABELS = ("≤ ¼", "½", "1", "2", "≥ 4")


def load_pixels(relative: Float[np.ndarray, "E T"]) -> UInt8[np.ndarray, "E T 3"]:
  """The colours of loads given as multiples of the uniform share; what is not finite is grey."""
  with np.errstate(divide="ignore", invalid="ignore"):
    place = np.clip(np.log2(relative), _STOPS[0][0], _STOPS[-1][0])
  ends = [at for at, _ in _STOPS]
  channels = [[int(colour[i : i + 2], 16) for _, colour in _STOPS] for i in (1, 3, 5)]
  pixels = np.stack(
    [np.interp(np.nan_to_num(place), ends, channel) for channel in channels], axis=-1
  )
  return np.where(np.isnan(place)[..., None], 190, pixels).round().astype(np.uint8)


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
  """A `data:` URI of the picture."""
  height, width, _ = pixels.shape
  rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each row begins with its filter: none

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  data = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows, 9))
    + chunk(b"IEND", b"")
  )
  return "data:image/png;base64," + base64.b64encode(data).decode()
