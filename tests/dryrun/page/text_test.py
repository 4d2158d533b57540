"""Tests the text that is printed for a dry run."""

import canned
import pytest

from moe_jax.dryrun.page import text

pytestmark = pytest.mark.unit


def test_the_block_of_what_fits():
  # Catches a figure without its unit or label, a paper's figure that is lost, and NaN in the text.
  said = text.text(canned.report())
  for words in (
    "fits: 16.00 of 32.00 GiB a device (50%; fast mode), 4.00 of them state and batch",
    "14.00 GiB by arithmetic: 4.00 weights",
    "2.00 times the ideal",
    "expert 1, data ? s; matmuls binds",
    "349,525 tokens a second, MFU 50%",
    "send 24 GiB a device, the formula says 23.6 GiB",
    "measured there: 7.74 s a step on 1,024 TPU v4 chips",
    "known from before",
    "compiler estimate, not measured",
    "mesh fsdp=4 expert=64 tensor=4",
  ):
    assert words in said, words
  assert "nan" not in said


def test_what_does_not_fit_is_one_sentence():
  # Arithmetic explains 14 of 40 GiB. Catches a text without the shortage, without a remedy, or
  # without a word on the rest, which is a layer's own buffers.
  said = text.shortage(canned.too_large())
  assert said.startswith(
    "does not fit; needs 40.00 GiB a device, v4 has 32.00, short by 8.00; what would help: --"
  )
  assert "arithmetic explains only 14 GiB" in said and "\n" not in said
  assert "does NOT fit: needs at least 40.00 GiB of 32.00" in text.text(canned.too_large())


def test_networks_that_hardly_count_are_left_out():
  # Catches a long line of networks that take microseconds, and a network that is left out although
  # its speed is unknown.
  roofline = canned.report()["roofline"] | {
    "networks": {"expert": 1.0, "tensor": 0.02, "data": float("nan")}
  }
  assert list(text.networks(roofline)) == ["expert", "data"]


def test_many_collectives_are_cut():
  # Catches hundreds of lines, and a count of the rest that is off by one.
  many = canned.report(collectives=canned.report()["collectives"] * 5)
  assert "and 2 more" in text.text(many)


@pytest.mark.parametrize(
  "count, words",
  [(0, "0 B"), (1023, "1023 B"), (2**20, "1 MiB"), (1020 * 2**30, "1020 GiB"), (2**50, "1024 TiB")],
)
def test_sizes(count, words):
  # Catches the logarithm of 0, and units beyond the last.
  assert text.size(count) == words
