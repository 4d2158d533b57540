"""Compares imported models with transformers: logits, gradients, and the way back."""

import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
import transformers as hf
from safetensors.numpy import load_file
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

import moe_jax
from moe_jax import assembly
from moe_jax.interop.families import find
from moe_jax.interop.hugging_face import to_hugging_face
from moe_jax.interop.weights import Bridge
from moe_jax.sharding import make_mesh
from moe_jax.training.step import apply

pytestmark = pytest.mark.reference

D, V = 32, 300


class DeepseekConfig(hf.LlamaConfig):
  model_type = "deepseek"


class DeepseekForCausalLM(hf.LlamaForCausalLM):
  """DeepSeekMoE-16B, which transformers does not have: LLaMA with the experts of V2-Lite."""

  config_class = DeepseekConfig

  def __init__(self, config):
    super().__init__(config)
    settings = {name: value for name, value in config.to_dict().items() if name in EXPERT_SETTINGS}
    experts = hf.DeepseekV2Config(**settings)
    for layer in self.model.layers[config.first_k_dense_replace :]:
      layer.mlp = DeepseekV2Moe(experts)


class LlamaMoeConfig(hf.LlamaConfig):
  model_type = "llama_moe"


class LlamaMoeFfn(torch.nn.Module):
  """The experts of LLaMA-MoE, written from the paper, with the names of its released code."""

  def __init__(self, config):
    super().__init__()
    width, e, f = config.hidden_size, config.num_experts, config.size_experts[0][0]
    self.k, self.scale = config.num_selects, config.score_scale_factor

    def linear(a, b):
      return torch.nn.Linear(a, b, bias=False)

    def matrices(*shape):
      return torch.nn.ParameterList(torch.nn.Parameter(torch.empty(*shape)) for _ in range(e))

    self.gate = torch.nn.Module()
    self.gate.gate_network = torch.nn.Sequential(linear(width, e), torch.nn.Tanh(), linear(e, e))
    self.gate.weight_noise = linear(width, e)
    self.calculator = torch.nn.Module()
    self.calculator.experts = torch.nn.Module()
    self.calculator.experts.weight_gate = matrices(f, width)
    self.calculator.experts.weight_up = matrices(f, width)
    self.calculator.experts.weight_down = matrices(width, f)

  def forward(self, x):
    logits, chosen = self.gate.gate_network(x).topk(self.k, dim=-1)
    gates = self.scale * logits.softmax(-1)
    w, y = self.calculator.experts, torch.zeros_like(x)
    for e in range(len(w.weight_up)):
      gate = (gates * (chosen == e)).sum(-1, keepdim=True)
      hidden = torch.nn.functional.silu(x @ w.weight_gate[e].T) * (x @ w.weight_up[e].T)
      y = y + gate * (hidden @ w.weight_down[e].T)
    return y


class LlamaMoEForCausalLM(hf.LlamaForCausalLM):
  """LLaMA-MoE, which transformers does not have."""

  config_class = LlamaMoeConfig

  def __init__(self, config):
    super().__init__(config)
    for layer in self.model.layers:
      layer.mlp = LlamaMoeFfn(config)


EXPERT_SETTINGS = """hidden_size moe_intermediate_size n_routed_experts n_shared_experts
  num_experts_per_tok intermediate_size""".split()
WIDTHS = dict(hidden_size=D, num_hidden_layers=3, num_attention_heads=4, vocab_size=V)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2)
LLAMA = WIDTHS | dict(num_key_value_heads=2, intermediate_size=48)
ORIGINAL = dict(original_max_position_embeddings=6)
LATENT = WIDTHS | dict(
  num_key_value_heads=4,
  intermediate_size=48,
  moe_intermediate_size=16,
  n_routed_experts=8,
  num_experts_per_tok=2,
  first_k_dense_replace=1,
  kv_lora_rank=12,
  qk_nope_head_dim=6,
  qk_rope_head_dim=8,
  v_head_dim=10,
)
YARN = ORIGINAL | dict(
  rope_type="yarn",
  rope_theta=10000.0,
  factor=40.0,
  beta_fast=2,
  beta_slow=0.5,
  mscale=1.0,
  mscale_all_dim=1.0,
)


def scaled_llama(kind, **options):
  """Returns a case of LLaMA whose rotary embedding is scaled."""
  rope = dict(rope_type=kind, rope_theta=100.0, factor=4.0, **options)
  return lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA, head_dim=16, rope_parameters=rope))


# Name of a case -> the class of its model and the config, with settings that a wrong import would
# not notice at their defaults.
CASES = {
  "llama": lambda: (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(**WIDTHS, num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5),
  ),
  "llama, tied, wide heads": lambda: (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(**WIDTHS, intermediate_size=48, head_dim=16, tie_word_embeddings=True),
  ),
  "qwen2": lambda: (
    hf.Qwen2ForCausalLM,
    hf.Qwen2Config(**WIDTHS, num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-6),
  ),
  "mixtral": lambda: (
    hf.MixtralForCausalLM,
    hf.MixtralConfig(**WIDTHS, num_key_value_heads=2, intermediate_size=24, num_local_experts=8),
  ),
  "mixtral, sliding window": lambda: (
    hf.MixtralForCausalLM,
    hf.MixtralConfig(
      **WIDTHS, num_key_value_heads=2, intermediate_size=24, num_local_experts=4, sliding_window=3
    ),
  ),
  "olmoe": lambda: (
    hf.OlmoeForCausalLM,
    hf.OlmoeConfig(**WIDTHS, **EXPERTS, intermediate_size=24, pad_token_id=None, eos_token_id=2),
  ),
  "olmoe, clipped, renormalised": lambda: (
    hf.OlmoeForCausalLM,
    hf.OlmoeConfig(
      **WIDTHS, **EXPERTS, intermediate_size=24, clip_qkv=0.5, norm_topk_prob=True, eos_token_id=2
    ),
  ),
  "qwen2_moe": lambda: (
    hf.Qwen2MoeForCausalLM,
    hf.Qwen2MoeConfig(
      **WIDTHS,
      **EXPERTS,
      num_key_value_heads=2,
      intermediate_size=48,
      moe_intermediate_size=16,
      shared_expert_intermediate_size=32,
    ),
  ),
  "llama, biases": lambda: (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
  ),
  "llama, linear": scaled_llama("linear"),
  "llama, llama3": scaled_llama("llama3", **ORIGINAL, low_freq_factor=0.2, high_freq_factor=0.8),
  "llama, yarn": scaled_llama("yarn", **ORIGINAL, beta_fast=1, beta_slow=0.1),
  "dbrx": lambda: (
    hf.DbrxForCausalLM,
    hf.DbrxConfig(
      d_model=D,
      n_heads=4,
      n_layers=3,
      vocab_size=V,
      attn_config={"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 10000.0},
      ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": D},
    ),
  ),
  "deepseek": lambda: (
    DeepseekForCausalLM,
    DeepseekConfig(
      **LLAMA,
      moe_intermediate_size=16,
      n_routed_experts=8,
      n_shared_experts=2,
      num_experts_per_tok=2,
      first_k_dense_replace=1,
      moe_layer_freq=1,
      norm_topk_prob=False,
      scoring_func="softmax",
    ),
  ),
  "deepseek_v2": lambda: (
    hf.DeepseekV2ForCausalLM,
    hf.DeepseekV2Config(
      **LATENT,
      n_shared_experts=2,
      q_lora_rank=10,
      topk_method="group_limited_greedy",
      n_group=4,
      topk_group=2,
      routed_scaling_factor=4.0,
      rope_parameters=YARN,
    ),
  ),
  "deepseek_v2, lite": lambda: (
    hf.DeepseekV2ForCausalLM,
    hf.DeepseekV2Config(
      **LATENT,
      n_shared_experts=2,
      q_lora_rank=None,
      rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
    ),
  ),
  "deepseek_v3": lambda: (
    hf.DeepseekV3ForCausalLM,
    hf.DeepseekV3Config(
      **LATENT,
      n_shared_experts=1,
      q_lora_rank=10,
      n_group=4,
      topk_group=2,
      rope_parameters=YARN,
      num_nextn_predict_layers=1,
    ),
  ),
  "llama_moe": lambda: (
    LlamaMoEForCausalLM,
    LlamaMoeConfig(
      **LLAMA,
      num_experts=4,
      num_selects=2,
      size_experts=[[12] * 4] * 3,
      gate_type="TopKBalancedNoisyGate",
      gate_network="mlp",
      gate_use_softmax=True,
      gate_add_noise=True,
      gate_noise_epsilon=0.01,
      calculator_type="UniversalCalculator",
      multiply_gate_scores=True,
      score_scale_factor=2.0,
    ),
  ),
  "qwen2_moe, every other layer": lambda: (
    hf.Qwen2MoeForCausalLM,
    hf.Qwen2MoeConfig(
      **WIDTHS,
      **EXPERTS,
      num_key_value_heads=4,
      intermediate_size=48,
      moe_intermediate_size=16,
      shared_expert_intermediate_size=16,
      decoder_sparse_step=2,
    ),
  ),
  "qwen2_moe, a dense layer": lambda: (
    hf.Qwen2MoeForCausalLM,
    hf.Qwen2MoeConfig(
      **WIDTHS,
      **EXPERTS,
      num_key_value_heads=4,
      intermediate_size=48,
      moe_intermediate_size=16,
      shared_expert_intermediate_size=16,
      mlp_only_layers=[1],
    ),
  ),
}
PROMPTS = [np.random.default_rng(i).integers(3, V, size=n) for i, n in enumerate((9, 5, 12, 7))]
LENGTH = 16


def model_of(case):
  """Returns a random model of transformers in float32.

  Its weights have standard deviation 1/sqrt(fan_in), so that routers decide, and its embeddings
  0.02 as in released models, so that a wrong epsilon shows.
  """
  torch.manual_seed(0)
  make, config = CASES[case]()
  model = make(config).eval()
  draw = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      values = torch.randn(weight.shape, generator=draw)
      if "embed_tokens" in name or "wte" in name or "shared.weight" in name:
        weight.copy_(0.02 * values)
      elif "norm" in name and weight.ndim == 1:
        weight.copy_(1 + 0.1 * values)
      else:
        weight.copy_(values * weight.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
      if "e_score_correction_bias" in name:
        buffer.copy_(0.05 * torch.randn(buffer.shape, generator=draw))
  return model


@functools.cache
def imported(case, dtype, root):
  """Returns the model of transformers, its folder, and the run that is made of it."""
  model = model_of(case).to(getattr(torch, dtype))
  folder = root / f"{case}-{dtype}"
  model.save_pretrained(folder)
  moe_jax.from_hugging_face(folder, root / f"{case}-{dtype}-run")
  run = moe_jax.load_run(root / f"{case}-{dtype}-run")
  if dtype == "float32":
    return model, folder, run
  # The weights are rounded, and both sides compute exactly.
  run.config.model.dtype = "float32"
  exact = assembly.model(run.config, V, make_mesh({"data": 1}))
  model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
  return model, folder, run._replace(model=exact)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("interop")


def batches():
  """Yields (name, batch, place of each prompt as a row and a slice)."""
  for name in ("right", "left"):
    batch = {key: np.zeros((4, LENGTH), np.int32) for key in ("inputs", "segment_ids", "positions")}
    places = []
    for row, prompt in enumerate(PROMPTS):
      n = len(prompt)
      place = slice(0, n) if name == "right" else slice(LENGTH - n, LENGTH)
      places.append((row, place))
      fill(batch, row, place, prompt, 1)
    yield name, batch, places
  # Two prompts in a row, one after the other.
  batch = {key: np.zeros((2, 24), np.int32) for key in ("inputs", "segment_ids", "positions")}
  places = []
  for i, prompt in enumerate(PROMPTS):
    row, start = i // 2, (i % 2) * len(PROMPTS[i - i % 2])
    place = slice(start, start + len(prompt))
    places.append((row, place))
    fill(batch, row, place, prompt, i % 2 + 1)
  yield "packed", batch, places


def fill(batch, row, place, prompt, segment):
  batch["inputs"][row, place] = prompt
  batch["segment_ids"][row, place] = segment
  batch["positions"][row, place] = np.arange(len(prompt))


def on_device(batch):
  return {key: jnp.asarray(value) for key, value in batch.items()} | {
    "targets": jnp.asarray(batch["inputs"])
  }


def logits_of(run, batch):
  variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), run.variables)
  return jax.jit(lambda v, b: apply(run.model, v, b, train=False)[0])(variables, on_device(batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_logits(root, case, dtype):
  # Catches whatever an import gets wrong: another epsilon, rotation, order of heads or experts,
  # gates that are normalised or not, and a window that is off by one.
  model, _, run = imported(case, dtype, root)
  with torch.no_grad():
    wanted = [model(torch.tensor(prompt[None])).logits[0].numpy() for prompt in PROMPTS]
  for name, batch, places in batches():
    logits = logits_of(run, batch)
    for (row, place), logits_wanted in zip(places, wanted, strict=True):
      np.testing.assert_allclose(
        logits[row, place], logits_wanted, atol=1e-4, rtol=1e-4, err_msg=name
      )


@pytest.mark.parametrize("case", CASES)
def test_gradients(root, case):
  # Catches a function that agrees only in its values, such as gates without a gradient.
  model, _, run = imported(case, "float32", root)
  loss = 0
  for prompt in PROMPTS:
    ids = torch.tensor(prompt[None])
    loss = loss + torch.nn.functional.cross_entropy(
      model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
    )
  model.zero_grad()
  loss.backward()
  _, batch, places = list(batches())[-1]
  mask = np.zeros(batch["inputs"].shape, np.float32)
  targets = np.zeros(batch["inputs"].shape, np.int32)
  for (row, place), prompt in zip(places, PROMPTS, strict=True):
    mask[row, place.start : place.stop - 1] = 1
    targets[row, place.start : place.stop - 1] = prompt[1:]

  others = {
    name: jax.tree.map(jnp.asarray, value)
    for name, value in run.variables.items()
    if name != "params"
  }

  def ours(params):
    logits, _ = apply(run.model, others | {"params": params}, on_device(batch), train=False)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.sum(mask * chosen)

  value, gradients = jax.jit(jax.value_and_grad(ours))(run.variables["params"])
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  # The gradients by the names of transformers' parameters, which hold experts fused.
  names = dict(model.named_parameters())
  fused = any(name.endswith("gate_up_proj") for name in names)
  family = find(model.config.model_type)
  bridge = Bridge(family, run.config, make_mesh({"data": 1}), fused)
  compared = 0
  for name, gradient in bridge.tensors(others | {"params": gradients}):
    if name not in names or names[name].grad is None:
      continue
    wanted = names[name].grad.numpy()
    scale = max(np.abs(wanted).max(), 1e-3)
    np.testing.assert_allclose(gradient / scale, wanted / scale, atol=1e-4, err_msg=name)
    compared += 1
  assert compared >= 3 and compared >= 0.6 * len(names), (compared, len(names))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_way_back(root, case, dtype):
  # Catches a tensor that is lost or rounded, and a config.json that transformers reads otherwise.
  model, folder, _ = imported(case, dtype, root)
  back = root / f"{case}-{dtype}-back"
  to_hugging_face(root / f"{case}-{dtype}-run", back)
  before, after = (load_file(place / "model.safetensors") for place in (folder, back))
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
  again = type(model).from_pretrained(back, dtype=torch.float32).eval()
  ids = torch.tensor(PROMPTS[2][None])
  with torch.no_grad():
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_fused_experts_are_read_and_written(root):
  # Catches the gate and the other matrix exchanged, and a layout that changes on the way back.
  model = model_of("qwen2_moe")
  folder = root / "fused"
  model.config.architectures = ["Qwen2MoeForCausalLM"]
  model.config.save_pretrained(folder)
  from safetensors.torch import save_file

  save_file(
    {name: weight.contiguous() for name, weight in model.state_dict().items()},
    folder / "model.safetensors",
  )
  assert any("gate_up_proj" in name for name in load_file(folder / "model.safetensors"))
  moe_jax.from_hugging_face(folder, root / "fused-run")
  split = imported("qwen2_moe", "float32", root)[2]
  run = moe_jax.load_run(root / "fused-run")
  jax.tree.map(np.testing.assert_array_equal, run.variables, split.variables)
  to_hugging_face(root / "fused-run", root / "fused-back")
  before, after = (load_file(root / name / "model.safetensors") for name in ("fused", "fused-back"))
  assert before.keys() == after.keys()
  assert all(before[name].tobytes() == after[name].tobytes() for name in before)
