"""Colours for up to 64 experts, and a PNG encoder for the maps of expert load."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from jaxtyping import Float, UInt8

# The first six colours are from Okabe and Ito. Each later one was chosen greedily as the sRGB
# colour farthest from all colours before it. The distance is measured in OKLab, over normal,
# protanope, deuteranope and tritanope vision (Machado 2009). So the first n colours are nearly as
# distinct as n colours can be, for any n.
_EXPERTS = """
0072b2 e69f00 009e73 d55e00 cc79a7 56b4e9 920c18 00f3ce cee700 49496d 9e6dff aa4931 b6b692 796179
6d189e 9eceff f3ce92 313dce 7992db 9255db 793149 92c2c2 61923d c2ce55 86aa6d 9e6d9e 863d92 923d3d
6dc255 c23161 ce929e 869eff aa3db6 9e006d 7979ce aa180c 24aac2 f33d55 6ddbdb dbc29e 92e7f3 6dc2ff
ce9200 7924b6 ff9eb6 00619e ce6d79 791886 aa6118 ff61c2 6d61f3 9ece79 6d86e7 c2dbb6 008692 ce3186
ffb618 db92db c261b6 b61855 556d92 618649 5549db 79e779
""".split()
# All of these are dark enough for thin lines on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#7a5c00", "#3d3d5c", "#c23161", "#008692")


def expert_colour(expert: int) -> str:
  """Returns an expert's colour, which is the same in the whole report and repeats after 64."""
  return "#" + _EXPERTS[expert % len(_EXPERTS)]


def series_colour(index: int) -> str:
  """Returns the colour of the index-th line of a chart whose lines are not experts."""
  return SERIES[index % len(SERIES)]


def ink(colour: str) -> str:
  """Returns black or white, whichever has the higher contrast on `colour` (WCAG 2)."""
  # WCAG's relative luminance, from linear red, green and blue.
  luminance = sum(
    w * _linear(int(colour[i : i + 2], 16) / 255)
    for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5))
  )
  # Contrast is (luminance + 0.05) / 0.05 against black and 1.05 / (luminance + 0.05) against white.
  return "#000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


def tint(colour: str, strength: float = 0.45) -> str:
  """Returns `colour` mixed with white; strength 0 is white and 1 is the colour itself."""
  return "#" + "".join(
    f"{round(255 + strength * (int(colour[i : i + 2], 16) - 255)):02x}" for i in (1, 3, 5)
  )


def _linear(channel: float) -> float:
  """Converts an sRGB channel in [0, 1] to linear light."""
  return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


# The colour scale of expert load, as pairs of log2(load * E) and colour. Blue experts are starved,
# white ones get the uniform share 1/E, and brown ones are crowded.
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
  """Returns the colours of loads that are given as multiples of the uniform share.

  Args:
    relative: [E, T] The load of each expert at each time, multiplied by E.

  Returns:
    [E, T, 3] RGB values. NaN is grey.
  """
  with np.errstate(divide="ignore", invalid="ignore"):
    place = np.clip(np.log2(relative), _STOPS[0][0], _STOPS[-1][0])
  stops = [log_load for log_load, _ in _STOPS]
  channels = [[int(colour[i : i + 2], 16) for _, colour in _STOPS] for i in (1, 3, 5)]
  pixels = np.stack(
    [np.interp(np.nan_to_num(place), stops, channel) for channel in channels], axis=-1
  )
  return np.where(np.isnan(place)[..., None], 190, pixels).round().astype(np.uint8)


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
  """Returns the picture as a PNG file in a `data:` URI."""
  height, width, _ = pixels.shape
  # In a PNG file, each row begins with the type of its filter; 0 means that there is none.
  rows = b"".join(b"\0" + row.tobytes() for row in pixels)

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  # 8 bits per channel, colour type 2 (RGB), and the default compression, filtering and interlacing.
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  data = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows, 9))
    + chunk(b"IEND", b"")
  )
  return "data:image/png;base64," + base64.b64encode(data).decode()
