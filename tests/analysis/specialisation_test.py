import math

import numpy as np
import planted
import pytest

from moe_jax.analysis import specialisation

pytestmark = pytest.mark.unit
NAMES = list(specialisation.MEASURES)


def test_shares_of_a_table():
  # Two experts, two tokens, two domains, eight tokens of text. The expert is the token in domain 0
  # and always 0 in domain 1, so that H(expert) is that of (6/8, 2/8).
  # Catches a measure that is divided by another entropy, and labels that are exchanged.
  expert = np.array([0, 0, 1, 1, 0, 0, 0, 0])
  token, domain = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.array([0] * 4 + [1] * 4)
  labels = {"kind": np.zeros(8, int), "token": token, "domain": domain}
  shares = dict(zip(NAMES, specialisation.explained(expert, labels), strict=True))
  whole = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  assert shares["kind"] == 0
  # Given domain 0, which half of the tokens have, the token tells all of ln 2.
  assert shares["lexical"] == pytest.approx(0.5 * math.log(2) / whole)
  # Given token 1, which half have, the domain tells all of ln 2.
  assert shares["topical"] == pytest.approx(0.5 * math.log(2) / whole)
  # Given token 0 the expert is certain, and given token 1 it has ln 2.
  assert shares["token"] == shares["domain"] == pytest.approx(1 - 0.5 * math.log(2) / whole)
  assert specialisation.explained(np.zeros(8, int), labels).tolist() == [0] * 5


@pytest.mark.parametrize(
  "plant, found",
  [(planted.by_nothing, set()), (planted.by_token, {"token"}), (planted.by_domain, {"domain"})],
)
def test_planted_specialisation_is_found(plant, found):
  # Catches a level of chance that an absent specialisation exceeds, a planted one that is missed,
  # and lexical and topical measures that are exchanged.
  recorded = planted.record(plant)
  labels, _ = specialisation.labels_of(recorded)
  layer = specialisation.with_chance(recorded.first[0], labels, recorded.row)
  assert layer.expert_entropy == pytest.approx(math.log(4), abs=0.15)
  excess = dict(zip(NAMES, layer.value - layer.chance, strict=True))
  assert (excess["lexical"] > 0.05) == ("token" in found)
  assert (excess["topical"] > 0.05) == ("domain" in found)
  assert (layer.chance > -1e-9).all() and (layer.value <= layer.most + 1e-9).all()
  if not found:
    np.testing.assert_array_less(np.abs(layer.value - layer.chance), 2 * layer.chance_width + 1e-9)


def test_rare_tokens_of_a_kind_are_one_identity():
  # Catches an id that occurs once and so explains its expert by itself.
  ids = np.array([7] * 50 + [8, 9, 10])
  recorded = planted.record(
    planted.by_nothing,
    domains=1,
    rows=1,
    length=53,
    ids=ids,
    pieces=["x"] * 50 + ["1", "2", "a"],
    kind=np.array([3] * 50 + [5, 5, 3]),
  )
  identity, texts = specialisation.identities(recorded)
  assert texts == ["rare: lower-case", "rare: number", "x"]
  assert identity.tolist() == [2] * 50 + [1, 1, 0]


def test_ids_without_a_text_are_named_by_their_number():
  # Catches bytes of characters that are all called the same.
  recorded = planted.record(planted.by_nothing, domains=1, rows=1, length=160)
  ids, pieces = np.repeat([4, 5], 80), ["é"] * 40 + ["è"] * 40 + [""] * 80
  _, texts = specialisation.identities(recorded._replace(ids=ids, pieces=pieces))
  assert texts == ["id 4", "id 5"]


def test_rows_are_dealt_as_wholes():
  # Catches a shuffle of tokens, and domains of other sizes.
  row, domain = np.repeat(np.arange(8), 3), np.repeat([0, 1], 12)
  dealt = specialisation.deal_rows(row, domain, np.random.default_rng(1))
  by_row = dealt.reshape(8, 3)
  assert (by_row == by_row[:, :1]).all() and dealt.sum() == 12 and (dealt != domain).any()


def test_typical_tokens():
  # Token 0 goes to expert 0, token 1 to expert 1, and token 2 to both alike.
  # Catches the most frequent token, which tells nothing, and tokens of an expert that has none.
  identity = np.array([0] * 10 + [1] * 10 + [2] * 40)
  expert = np.array([0] * 10 + [1] * 10 + [0, 1] * 20)
  assert specialisation.typical(expert, identity, 3, 5) == [[0], [1], []]
