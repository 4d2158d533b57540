import gzip

import jax
import jax.numpy as jnp
import pytest

from moe_jax.run.watch import Profile, Watch

pytestmark = pytest.mark.unit


def test_a_profile_covers_its_steps_and_no_others(tmp_path, monkeypatch):
  # Catches a profile of compilation, one that never ends, and one that ends before its last step
  # has run.
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  monkeypatch.setattr(jax, "block_until_ready", lambda result: calls.append(result))
  profile, said = Profile(tmp_path, begun=10, steps=2), []
  for step in range(11, 20):
    profile.before(step)
    calls.append(step)
    said.append(profile.after(step, f"ran {step}"))
  profile.close()
  assert calls == [11, 12, 13, "start", 14, 15, "ran 15", "stop", 16, 17, 18, 19]
  assert [words for words in said if words] == [said[4]] and "steps 14 to 15" in said[4]
  # A run that ends in the middle of its profile keeps what there is of it.
  calls.clear()
  profile = Profile(tmp_path, begun=0, steps=9)
  profile.before(4)
  profile.close()
  assert calls == ["start", "stop"]


def test_a_profile_is_a_file_that_perfetto_reads(tmp_path):
  # Catches a JAX that writes the profile elsewhere than the printed sentence says.
  profile = Profile(tmp_path / "profile", begun=0, steps=1)
  profile.before(4)
  assert "perfetto_trace.json.gz" in profile.after(4, jnp.ones(3) @ jnp.ones(3))
  (file,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
  assert b"traceEvents" in gzip.decompress(file.read_bytes())


def test_no_tracker_and_no_profile_by_default(tmp_path):
  # Catches a run that writes a profile, or asks for an account, without being told to.
  assert Watch().boards(tmp_path, {}) == []
  profile = Profile(tmp_path / "profile", begun=0, steps=Watch().profile)
  for step in range(1, 9):
    profile.before(step)
    assert profile.after(step, None) == ""
  assert not (tmp_path / "profile").exists()
