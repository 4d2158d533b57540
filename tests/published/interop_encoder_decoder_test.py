"""Compares imported T5 and Switch models with transformers: logits, gradients, and the way back."""

import functools
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
import transformers as hf
from safetensors.numpy import load_file
from safetensors.torch import save_file

import moe_jax
from moe_jax import assembly
from moe_jax.interop.families import find
from moe_jax.interop.hugging_face import to_hugging_face
from moe_jax.interop.weights import Bridge
from moe_jax.sharding import make_mesh
from moe_jax.training.step import apply

pytestmark = pytest.mark.reference

D, V = 32, 300
WIDTHS = dict(d_model=D, d_kv=8, d_ff=48, num_heads=4, vocab_size=V)
SPARSE = dict(num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4)
CASES = {
  "t5": lambda: (
    hf.T5ForConditionalGeneration,
    hf.T5Config(**WIDTHS, num_layers=2, num_decoder_layers=3, feed_forward_proj="relu"),
  ),
  # T5 1.1 has a projection of its own, and nothing divides its input.
  "t5, 1.1": lambda: (
    hf.T5ForConditionalGeneration,
    hf.T5Config(**WIDTHS, num_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
  ),
  "switch": lambda: (
    hf.SwitchTransformersForConditionalGeneration,
    hf.SwitchTransformersConfig(**WIDTHS, **SPARSE, num_layers=4, num_decoder_layers=4),
  ),
  "switch, few slots": lambda: (
    hf.SwitchTransformersForConditionalGeneration,
    hf.SwitchTransformersConfig(
      **WIDTHS, **SPARSE, num_layers=4, num_decoder_layers=4, expert_capacity=2
    ),
  ),
}


def draw(seed, n):
  return np.random.default_rng(seed).integers(3, V, size=n)


# Pairs of a source and a target, which begins with the padding id.
PAIRS = [
  (draw(i, n), np.concatenate([[0], draw(9 + i, m)]))
  for i, (n, m) in enumerate([(9, 5), (6, 8), (12, 3), (7, 7)])
]


def model_of(case):
  """Returns a random model in float32, whose embeddings have standard deviation 0.02."""
  torch.manual_seed(0)
  make, config = CASES[case]()
  model = make(config).eval()
  if case == "t5, 1.1":
    model.lm_head.weight = torch.nn.Parameter(torch.empty(V, D))
  normal = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      values = torch.randn(weight.shape, generator=normal)
      if name == "shared.weight":
        weight.copy_(0.02 * values)
      elif "norm" in name:
        weight.copy_(1 + 0.1 * values)
      else:
        weight.copy_(values * weight.shape[-1] ** -0.5)
  return model


@functools.cache
def imported(case, dtype, root):
  """Returns the model of transformers, its folder, and the run that is made of it."""
  model, folder = model_of(case), root / f"{case}-{dtype}"
  if case == "t5, 1.1":
    # Transformers 5 would tie the projection, which the released models do not.
    model.config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"tie_word_embeddings": False, "torch_dtype": dtype}
    settings["architectures"] = [type(model).__name__]
    settings.pop("scale_decoder_outputs"), settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {
      name: weight.to(getattr(torch, dtype)).contiguous()
      for name, weight in model.state_dict().items()
      if "embed_tokens" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
      for weight in model.parameters():
        weight.copy_(weight.to(getattr(torch, dtype)).float())
  else:
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    model = model.float()
  moe_jax.from_hugging_face(folder, root / f"{case}-{dtype}-run")
  run = moe_jax.load_run(root / f"{case}-{dtype}-run")
  # With bfloat16 the weights are rounded, and both sides compute exactly.
  run.config.model.dtype = "float32"
  exact = assembly.model(run.config, V, make_mesh({"data": 1}))
  return model, folder, run._replace(model=exact)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("interop")


def batches(case):
  """Yields (name, batch, place of each target as a row and a slice)."""
  for name in ("padded", "packed"):
    rows, length = (4, 16) if name == "padded" else (2, 24)
    if name == "packed" and "few slots" in case:
      # Two documents in a row share its slots, where transformers gives each its own.
      continue
    keys = ("inputs", "segment_ids", "positions")
    batch = {
      f"{p}{key}": np.zeros((rows, length), np.int32) for p in ("", "encoder_") for key in keys
    }
    batch = {key.replace("encoder_inputs", "encoder_tokens"): v for key, v in batch.items()}
    places, ends = [], np.zeros((rows, 2), int)
    for i, pair in enumerate(PAIRS):
      row, segment = (i, 1) if name == "padded" else (i // 2, i % 2 + 1)
      for which, prefix, ids in ((0, "encoder_", pair[0]), (1, "", pair[1])):
        place = slice(ends[row, which], ends[row, which] + len(ids))
        ends[row, which] = place.stop
        batch[f"{prefix}{'tokens' if prefix else 'inputs'}"][row, place] = ids
        batch[f"{prefix}segment_ids"][row, place] = segment
        batch[f"{prefix}positions"][row, place] = np.arange(len(ids))
      places.append((row, place))
    yield name, {key: jnp.asarray(value) for key, value in batch.items()}, places


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_logits(root, case, dtype):
  # Catches another bucket of distances, scores that are divided by the root of the head's width,
  # logits that are scaled or not, a target that sees another source, and experts that drop a token.
  model, _, run = imported(case, dtype, root)
  variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), run.variables)
  with torch.no_grad():
    wanted = [
      model(input_ids=torch.tensor(a[None]), decoder_input_ids=torch.tensor(b[None])).logits[0]
      for a, b in PAIRS
    ]
  for name, batch, places in batches(case):
    logits = jax.jit(lambda v, b: apply(run.model, v, b, train=False)[0])(variables, batch)
    for (row, place), logits_wanted in zip(places, wanted, strict=True):
      np.testing.assert_allclose(
        logits[row, place], logits_wanted.numpy(), atol=1e-4, rtol=1e-4, err_msg=name
      )


@pytest.mark.parametrize("case", CASES)
def test_gradients(root, case):
  # Catches a function that agrees only in its values, such as gates without a gradient.
  model, _, run = imported(case, "float32", root)
  loss = 0
  for a, b in PAIRS:
    logits = model(input_ids=torch.tensor(a[None]), decoder_input_ids=torch.tensor(b[None])).logits
    loss = loss + torch.nn.functional.cross_entropy(
      logits[0, :-1], torch.tensor(b[1:]), reduction="sum"
    )
  model.zero_grad()
  loss.backward()
  _, batch, places = list(batches(case))[0]
  mask, targets = np.zeros(batch["inputs"].shape, np.float32), np.zeros(batch["inputs"].shape, int)
  for (row, place), (_, b) in zip(places, PAIRS, strict=True):
    mask[row, place.start : place.stop - 1] = 1
    targets[row, place.start : place.stop - 1] = b[1:]

  def ours(params):
    logits, _ = apply(run.model, {"params": params}, batch, train=False)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.sum(mask * chosen)

  value, gradients = jax.jit(jax.value_and_grad(ours))(run.variables["params"])
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  bridge = Bridge(find(model.config.model_type), run.config, make_mesh({"data": 1}))
  names, compared = dict(model.named_parameters()), 0
  for name, gradient in bridge.tensors({"params": gradients}):
    if names[name].grad is None:
      assert not np.any(gradient), name
      continue
    wanted = names[name].grad.numpy()
    scale = max(np.abs(wanted).max(), 1e-3)
    np.testing.assert_allclose(gradient / scale, wanted / scale, atol=1e-4, err_msg=name)
    compared += 1
  assert compared > 0.8 * len(names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_way_back(root, case, dtype):
  # Catches a tensor that is lost or rounded, and a config.json that transformers reads otherwise.
  model, folder, _ = imported(case, dtype, root)
  back = root / f"{case}-{dtype}-back"
  to_hugging_face(root / f"{case}-{dtype}-run", back)
  before, after = (load_file(place / "model.safetensors") for place in (folder, back))
  assert before.keys() - after.keys() <= {
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
  }
  for name, tensor in after.items():
    assert tensor.dtype == before[name].dtype and tensor.tobytes() == before[name].tobytes(), name
  again = type(model).from_pretrained(back, dtype=torch.float32).eval()
  a, b = (torch.tensor(ids[None]) for ids in PAIRS[1])
  with torch.no_grad():
    one, other = (each(input_ids=a, decoder_input_ids=b).logits for each in (model, again))
  torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
