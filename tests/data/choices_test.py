import pytest

from moe_jax.data.choices import choose
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def test_nearest_name_is_proposed():
  # Catches: an error that does not say what would be right.
  with pytest.raises(ConfigError, match="f='emb:x': did you mean 'embedded'. there are embedded, text"):
    choose("f", "embeded", {"text": 1, "embedded": 2}, shown="emb:x")
  with pytest.raises(ConfigError, match="f='zzz': there are embedded, text"):
    choose("f", "zzz", {"text": 1, "embedded": 2})
  assert choose("f", "text", {"text": 1, "embedded": 2}) == 1
