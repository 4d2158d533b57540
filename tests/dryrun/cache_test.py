"""Tests that a program is compiled for a machine only once."""

import pytest

from moe_jax.dryrun import cache

pytestmark = pytest.mark.unit


def test_known_answers_are_not_made_again(tmp_path, monkeypatch):
  # Catches a key without the program, the machine, the options or the versions, and a cache that is
  # never read.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  asked = []

  def make():
    return asked.append(1) or {"peak": len(asked), "text": "HloModule é"}

  first, known = cache.remembered("program", "v4:4x4x4", [], make)
  assert not known and first == {"peak": 1, "text": "HloModule é"}
  assert cache.remembered("program", "v4:4x4x4", [], make) == (first, True) and len(asked) == 1
  for other in (
    ("other", "v4:4x4x4", []),
    ("program", "v5e:4x4", []),
    ("program", "v4:4x4x4", [("fast", 1)]),
  ):
    assert not cache.remembered(*other, make)[1]
  monkeypatch.setattr(cache, "versions", lambda: {"libtpu": "0"})
  assert not cache.remembered("program", "v4:4x4x4", [], make)[1]


def test_what_fails_is_not_remembered(tmp_path, monkeypatch):
  # Catches an empty file that is left by a compiler that failed.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

  def die():
    raise ValueError("no")

  with pytest.raises(ValueError, match="no"):
    cache.remembered("program", "v4:4x4x4", [], die)
  assert not cache.remembered("program", "v4:4x4x4", [], dict)[1]
