"""Tests where compiled programs are kept."""

import jax
import pytest

from moe_jax.run import compiled

pytestmark = pytest.mark.unit

OPTIONS = (
  "jax_compilation_cache_dir",
  "jax_enable_compilation_cache",
  "jax_compilation_cache_max_size",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def options():
  """Takes the tests' own cache away for a test."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_in_the_cache_folder_and_bounded(tmp_path, options):
  # Catches a cache that grows without end, or that machines with other processors share.
  assert compiled.use_cache(tmp_path) == ""
  place = jax.config.jax_compilation_cache_dir
  assert place.startswith(str(tmp_path / "compiled") + "/") and "-" in place.rpartition("/")[2]
  assert 0 < jax.config.jax_compilation_cache_max_size < 10**11


def test_the_users_own_choice_stands(tmp_path, options):
  # Catches a folder of the user's that is replaced, and a cache that cannot be switched off.
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
  assert compiled.use_cache(tmp_path) == ""
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", False)
  assert compiled.use_cache(tmp_path) == "" and jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, options):
  # Catches a run that fails because its programs cannot be kept.
  (tmp_path / "compiled").write_text("a file")
  assert "compiled programs are not kept" in compiled.use_cache(tmp_path)
  assert jax.config.jax_compilation_cache_dir is None
