"""Compares every router class of the installed transformers with `scored_top_k` in a layer.

The classes are found in the source of transformers, are built from the defaults of their own
configs in a tiny size, and get random weights. A class that is neither in `EXPRESSED` nor in `NOT`
makes a test fail, so that routers of later versions are noticed.
"""

import ast
import functools
import importlib
import inspect
import itertools
import pathlib
import re
import types

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from published import compare

import moe_jax
from moe_jax.experts import activate
from moe_jax.layers import LayerRouting

pytestmark = pytest.mark.reference

S, D, E, K = 48, 24, 16, 4
# Names that say that a class is a router.
NAMED = re.compile(r"Router|Top[Kk]|MoE\w*Gate$|Gating$")
INLINE = re.compile(r"\b(topk|argmax)\(")
# The sizes that replace those of a class's config, as far as the class reads them. Groups of four
# experts and two groups per token make the rule for groups matter.
TINY = {
  "hidden_size": D,
  "num_experts": E,
  "num_local_experts": E,
  "moe_num_experts": E,
  "n_routed_experts": E,
  "zero_expert_num": 8,
  "num_experts_per_tok": K,
  "top_k_experts": K,
  "moe_topk": K,
  "n_group": 4,
  "topk_group": 2,
  "expert_capacity": S,
}
# The settings of which all values are tested, whichever is a config's default.
SETTINGS = {
  "norm_topk_prob": (True, False),
  "expert_selection_fn": ("softmax", "sigmoid"),
  "topk_method": ("greedy", "group_limited_greedy"),
  "use_expert_bias": (True, False),
  "scoring_func": ("sqrtsoftplus", "sigmoid"),
  "normalize_router_prob_before_dropping": (True, False),
  "moe_router_logit_softcapping": (0.0, 0.5),
  "output_multiplier": (0.5,),
  "router_bias": (True, False),
}


def _norm(config):
  return "top_k" if getattr(config, "norm_topk_prob", True) else "none"


# Each function maps what a class reads of its config to (options of scored_top_k, options of the
# layer).


def _softmax(config):
  return {"gate_norm": _norm(config)}, {}


def _softmax_of_all(config):
  return {"gate_norm": "none"}, {}


def _softmax_eps(config):
  return {"norm_eps": 1e-12}, {}


def _sigmoid(config):
  return {"score": "sigmoid", "gate_norm": _norm(config)}, {}


def _deepseek_v2(config):
  limited = config.topk_method == "group_limited_greedy"
  groups = {"groups": config.n_group, "kept_groups": config.topk_group} if limited else {}
  scale = {"routed_scale": config.routed_scaling_factor}
  return {"gate_norm": "none", "group_score": "max"} | groups, scale


def _grouped(score, config):
  return {
    "score": score,
    "groups": config.n_group,
    "kept_groups": config.topk_group,
    "gate_norm": _norm(config),
    "norm_eps": 1e-20,
  }, {"routed_scale": getattr(config, "routed_scaling_factor", 1.0)}


def _scaled_sigmoid(config):
  scale = getattr(config, "route_scale", None) or config.router_scaling_factor
  return {"score": "sigmoid", "norm_eps": 1e-20}, {"routed_scale": scale}


def _deepseek_v4(config):
  score = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}[config.scoring_func]
  return {"score": score, "norm_eps": 1e-20}, {"routed_scale": config.routed_scaling_factor}


def _cohere2(config):
  score = config.expert_selection_fn
  return {"score": score, "gate_norm": "top_k" if score == "softmax" else _norm(config)}, {}


def _lfm2(config):
  options = {"score": "sigmoid", "gate_norm": _norm(config), "norm_eps": 1e-6}
  return options, {"routed_scale": config.routed_scaling_factor}


def _kolibri1(config):
  return {"score": "sigmoid", "bias_on": "logits", "gate_norm": _norm(config)}, {}


def _longcat(config):
  # Its zero-computation experts are experts to the router.
  return {"gate_norm": "none"}, {"routed_scale": config.routed_scaling_factor}


def _llama4(config):
  # The layer of Llama 4 has gate_on="input", too, which does not change the gates.
  return {"score": "sigmoid", "gate_norm": "none"}, {}


def _gpt_oss(config):
  return {}, {"router_bias": True}


def _privacy_filter(config):
  return {}, {"router_bias": True, "routed_scale": 1 / K}


def _gemma4(config):
  return {}, {"router_norm": "rms", "logit_scale": D**-0.5, "expert_scale": True}


def _laguna(config):
  cap = config.moe_router_logit_softcapping
  return {"score": "sigmoid"}, {"logit_softcap": cap}


def _muse_spark(config):
  scales = {"logit_scale": config.output_multiplier, "routed_scale": config.routed_scaling_factor}
  return {"score": "sigmoid", "norm_eps": 1e-15}, scales


def _switch(config):
  return {"k": 1, "gate_norm": "none"}, {"router_bias": config.router_bias}


def _nllb(config):
  return {"k": 2}, {"router_bias": config.router_bias}


_FORMS = {
  _softmax: (
    "AriaTextTopKRouter DbrxFFN FlexOlmoTopKRouter GraniteMoeHybridTopKRouter "
    "GraniteMoeSWATopKRouter GraniteMoeSharedTopKRouter GraniteMoeTopKRouter HunYuanMoEV1Gate "
    "JetMoeTopKGating LaraMiniTopKRouter MellumTopKRouter MiniMaxTopKRouter MixtralTopKRouter "
    "OlmoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter "
    "Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeTextTopKRouter "
    "Qwen3OmniMoeThinkerTextTopKRouter Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter "
    "Qwen4ExpTextTopKRouter"
  ),
  _softmax_of_all: "JambaTopKRouter",
  _softmax_eps: "Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter",
  _sigmoid: "FlintTopKRouter MiniMaxM2TopKRouter MiniMaxM3VLTopKRouter Step3p7TopKRouter",
  _deepseek_v2: "DeepseekOcr2TextTopkRouter DeepseekV2TopkRouter UnlimitedOcrTextTopkRouter",
  # AXK2 gives experts outside the kept groups the score 0 in place of -inf, which is the same as
  # long as K experts inside have a score plus bias above 0.
  functools.partial(_grouped, "sigmoid"): (
    "AXK1TopkRouter AXK2TopkRouter BailingHybridTopkRouter BeamTopKRouter DeepseekV32TopkRouter "
    "DeepseekV3TopkRouter Dots1TopkRouter Dots3NoteTextTopkRouter ExaoneMoeTopkRouter "
    "Glm4MoeLiteTopkRouter Glm4MoeTopkRouter Glm4vMoeTextTopkRouter Glm5NextTextTopkRouter "
    "GlmMoeDsaTopkRouter HYV4TopkRouter HYV4VLTopkRouter KimiLinearTopkRouter "
    "MiMoV2FlashTopkRouter NemotronHTopkRouter SolarOpenTopkRouter"
  ),
  functools.partial(_grouped, "softmax"): "Mistral4TopkRouter MistralLarge4TextTopkRouter",
  _scaled_sigmoid: "AfmoeTokenChoiceRouter Dots3NoteVisionTopKRouter HYV3TopKRouter",
  _deepseek_v4: "DeepseekV4TopKRouter Inkling2LoopTopKRouter Inkling2TopKRouter",
  _cohere2: "Cohere2MoeTopKRouter",
  _lfm2: "Lfm2MoeTopKRouter",
  _kolibri1: "Kolibri1TopKRouter",
  _longcat: "LongcatFlashTopkRouter",
  _llama4: "Llama4Router",
  _gpt_oss: "GptOssTopKRouter",
  _privacy_filter: "OpenAIPrivacyFilterTopKRouter",
  _gemma4: "DiffusionGemmaTextRouter Gemma4TextRouter",
  _laguna: "LagunaTopKRouter",
  _muse_spark: "MuseSparkTopkRouter",
  _switch: "SwitchTransformersTop1Router",
  _nllb: "NllbMoeTop2Router",
}
EXPRESSED = {name: form for form, names in _FORMS.items() for name in names.split()}

# Classes that are not options of `scored_top_k` in a layer, with the reason.
NOT = {
  "DbrxRouter": "makes logits only, and DbrxFFN chooses",
  "DeepseekV4HashRouter": "is hash_top_k, whose table is computed; it has a test of its own",
  "DogeCDMoE": "is top_k with gate_network='product_keys'; it has a test of its own",
  "GraniteDoclingDensityRouter": "predicts a density of images and routes to no experts",
  "InklingTopkRouter": "normalises the gates of routed and shared experts together",
  "PhimoeTopKRouter": "is sparse_mixer; it has a test of its own",
  "ZayaRouter": "reads the router's state of the layer before, and has a class that skips",
  "ZayaRouterMLP": "makes the logits of ZayaRouter only",
}


@functools.cache
def found():
  """Returns the router classes of transformers: name -> (module, source)."""
  classes = {}
  for path in sorted(pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
    text = path.read_text()
    named = any(map(NAMED.search, re.findall(r"^class (\w+)", text, re.M)))
    if not named and not (INLINE.search(text) and "expert" in text):
      continue
    for node in ast.parse(text).body:
      if not isinstance(node, ast.ClassDef):
        continue
      source = ast.unparse(node)
      is_module = any(re.search("Module|Linear", ast.unparse(base)) for base in node.bases)
      chooses = INLINE.search(source) and "expert" in source
      if is_module and (NAMED.search(node.name) or chooses):
        classes[node.name] = (f"transformers.models.{path.parent.name}.{path.stem}", source)
  return classes


def _read(source):
  """Returns the names that a class reads of its config."""
  return set(re.findall(r"config\.(\w+)", source))


def _config(module, source, settings):
  """Returns the tiny config of a class: the first of its module that has all that it reads."""
  read = _read(source)
  for name, kind in vars(module).items():
    if not (name.endswith("Config") and inspect.isclass(kind)):
      continue
    if not issubclass(kind, transformers.PreTrainedConfig):
      continue
    config = kind()
    # Some models may have other numbers of experts in other layers.
    config.allow_global_per_layer_attribute_access = True
    if all(hasattr(config, each) for each in read):
      for each, value in (TINY | settings).items():
        if each in read:
          setattr(config, each, value)
      return config
  raise LookupError(f"no config of {module.__name__} has {sorted(read)}")


def _variants(source):
  """Returns all combinations of the settings that a class reads."""
  names = sorted(_read(source) & SETTINGS.keys())
  return [
    dict(zip(names, values, strict=True))
    for values in itertools.product(*(SETTINGS[name] for name in names))
  ]


def _build(name, module, source, settings):
  """Returns a router, and what its class reads of its config."""
  kind = getattr(module, name)
  if name == "JetMoeTopKGating":
    return kind(D, E, K), types.SimpleNamespace()
  config = _config(module, source, settings)
  if name == "DbrxFFN":
    sizes = {"hidden_size": D, "ffn_hidden_size": 4, "moe_num_experts": E, "moe_top_k": K}
    for each, value in sizes.items():
      setattr(config.ffn_config, each, value)
  return kind(config), types.SimpleNamespace(**{e: getattr(config, e) for e in _read(source)})


def _pairs(name, router, output, num_experts):
  """Returns (token, expert, gate) of what a router has returned."""
  tokens = np.arange(S)
  if name in ("Llama4Router", "NllbMoeTop2Router"):  # [S, E] gates, 0 where no expert is chosen
    gates = output[0 if name == "Llama4Router" else 1].numpy()
    token, expert = np.nonzero(gates)
    return token, expert, gates[token, expert]
  if name == "SwitchTransformersTop1Router":
    return tokens, output[0].numpy().argmax(axis=-1), output[1].numpy()
  if name == "JetMoeTopKGating":  # sorted by expert
    _, token, gate, counts, _ = output
    return token, np.repeat(np.arange(num_experts), counts), gate
  if name == "DbrxFFN":
    output = router.route_tokens_to_experts(output)
  chosen = [each for each in output if tuple(each.shape) == (S, K)]
  (expert,) = [each for each in chosen if not each.is_floating_point()]
  (gate,) = [each for each in chosen if each.is_floating_point()]
  return np.repeat(tokens, K), expert.numpy(), gate.numpy()


def _weight(tensors):
  """Returns the matrix [E, D] of a router."""
  return next(a for a in tensors.values() if a.ndim == 2 and a.shape[1] == D)


def _theirs(name, router, hidden):
  """Returns (table of gates, parameters by name, balancing bias or None) of a torch router.

  All parameters and buffers are drawn anew.
  """
  draw = np.random.default_rng(3)
  tensors = {}
  with torch.no_grad():
    for each, tensor in itertools.chain(router.named_parameters(), router.named_buffers()):
      # Biases for balancing are small beside the scores, of both signs.
      scale = 0.05 if "correction_bias" in each else 1.0 if tensor.ndim == 1 else D**-0.5
      tensor.copy_(torch.tensor(draw.normal(scale=scale, size=tensor.shape)))
      tensors[each] = tensor.numpy().astype(np.float32).copy()
    num_experts = len(_weight(tensors))
    bias = next((a.reshape(-1) for n, a in tensors.items() if "correction_bias" in n), None)
    arguments = {}
    for each in inspect.signature(router.forward).parameters:
      if re.search("bias", each):
        bias = draw.normal(scale=0.05, size=num_experts).astype(np.float32)
        arguments[each] = torch.tensor(bias)
    inputs = torch.tensor(hidden)
    call = router.router if name == "DbrxFFN" else router
    output = call(inputs[None] if name == "AfmoeTokenChoiceRouter" else inputs, **arguments)
    token, expert, gate = _pairs(name, router, output, num_experts)
  return compare.table(token, expert, gate, S, num_experts), tensors, bias


def _ours(tensors, bias, options, layer_options, hidden):
  """Returns the table of the gates that our layer's dispatcher gets.

  Args:
    tensors: The parameters of the router of transformers, by name.
    bias: The bias for balancing, or None.
    options: The options of `scored_top_k`.
    layer_options: The options of the layer.
    hidden: The tokens.
  """
  seen = []

  def probe(plan, x, experts, capacity, platform):
    seen.append(plan)
    return x

  weight = _weight(tensors)
  num_experts = len(weight)
  layer = moe_jax.moe_layer(
    num_experts, 4, "scored_top_k", {"k": K} | options, **layer_options
  ).clone(dispatcher=probe)
  x = jnp.asarray(hidden)[None]
  params = nn.unbox(layer.init(jax.random.key(0), x))["params"]
  given = {"router": weight.T}
  if layer.gate.router_bias:
    given["router_bias"] = next(a for n, a in tensors.items() if re.search(r"(^|\.)bias$", n))
  if layer.gate.router_norm == "rms":
    given["router_norm"] = {"scale": tensors["scale"]}
  if layer.gate.expert_scale:
    given["router_gate_scale"] = tensors["per_expert_scale"]
  assert jax.tree.map(np.shape, given) == jax.tree.map(np.shape, {n: params[n] for n in given})
  variables = {"params": params | jax.tree.map(jnp.asarray, given)}
  routing = LayerRouting(bias=None if bias is None else jnp.asarray(bias))
  layer.apply(variables, x, routing=routing)
  (plan,) = seen
  return compare.of_plan(jax.tree.map(lambda leaf: leaf[0], plan), S)


@pytest.mark.parametrize("name", sorted(EXPRESSED.keys() & found().keys()))
def test_a_router_of_transformers(name):
  # Catches another score, a bias in the gates or not in the choice, another rule for groups,
  # another norm of the gates and a factor that is left out.
  module_name, source = found()[name]
  module = importlib.import_module(module_name)
  for settings in _variants(source):
    router, config = _build(name, module, source, settings)
    hidden = np.random.default_rng(5).normal(size=(S, D)).astype(np.float32)
    theirs, tensors, bias = _theirs(name, router.eval(), hidden)
    if not settings.get("use_expert_bias", True):
      bias = None
    ours = _ours(tensors, bias, *EXPRESSED[name](config), hidden)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=f"{name} {settings}")
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=f"{name} {settings}")


def test_the_layer_of_llama_4():
  # Its gates multiply the experts' inputs, and its shared expert gets the input itself. Catches
  # gates on outputs, and a shared expert with a gate.
  module = importlib.import_module("transformers.models.llama4.modeling_llama4")
  sizes = {"hidden_size": D, "intermediate_size": 8, "num_local_experts": E}
  config = module.Llama4TextConfig(**sizes, num_experts_per_tok=1)
  theirs = module.Llama4TextMoe(config).eval()
  draw = np.random.default_rng(7)
  with torch.no_grad():
    for tensor in theirs.parameters():
      tensor.copy_(torch.tensor(draw.normal(scale=0.5, size=tensor.shape)))
    hidden = draw.normal(size=(1, S, D)).astype(np.float32)
    expected = theirs(torch.tensor(hidden))[0].numpy().reshape(hidden.shape)
    tensors = {name: tensor.numpy().copy() for name, tensor in theirs.named_parameters()}
  gate, up = np.split(tensors["experts.gate_up_proj"], 2, axis=-1)
  shared = {name: tensors[f"shared_expert.{name}_proj.weight"].T for name in ("gate", "up", "down")}
  params = {"router": tensors["router.weight"].T, "gate": gate, "up": up, "shared": shared}
  params["down"] = tensors["experts.down_proj"]
  layer = moe_jax.moe_layer(
    E,
    8,
    "scored_top_k",
    {"k": 1, "score": "sigmoid", "gate_norm": "none"},
    gate_on="input",
    num_shared_experts=1,
  )
  ours, _ = layer.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(hidden))
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_hash_router_of_deepseek_v4():
  # Its table gets the experts that our hash gives each id. Catches gates from other scores, or with
  # another norm.
  from moe_jax.routing import RoutingContext
  from moe_jax.routing.hash_top_k import hash_top_k

  module = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
  sizes = {"hidden_size": D, "num_local_experts": E, "num_experts_per_tok": K, "vocab_size": 32}
  config = module.DeepseekV4Config(**sizes)
  router = module.DeepseekV4HashRouter(config)
  draw = np.random.default_rng(9)
  hidden, weight = draw.normal(size=(S, D)), draw.normal(size=(E, D))
  ids = draw.integers(0, 32, S)
  table = hash_top_k(
    jnp.zeros((32, E)), RoutingContext(token_ids=jnp.arange(32)), k=K
  ).expert.reshape(K, 32)
  with torch.no_grad():
    router.weight.copy_(torch.tensor(weight))
    router.tid2eid.copy_(torch.tensor(np.array(table.T)))
    inputs = torch.tensor(hidden, dtype=torch.float32)
    _, gates, experts = router(inputs[None], torch.tensor(ids)[None])
  theirs = compare.table(
    np.repeat(np.arange(S), K), experts.numpy().ravel(), gates.numpy().ravel(), S, E
  )
  logits = jnp.asarray(hidden @ weight.T, jnp.float32)
  plan = hash_top_k(logits, RoutingContext(token_ids=jnp.asarray(ids)), k=K)
  ours = compare.of_plan(plan, S) * config.routed_scaling_factor
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_layer_of_doge():
  # Its experts have one hidden unit. It is called token by token, because with several tokens it
  # mixes their product keys. Catches keys of the wrong half, and experts in another order.
  module = importlib.import_module("transformers.models.doge.modeling_doge")
  sizes = {"hidden_size": D, "intermediate_size": 8, "num_experts": E, "num_experts_per_tok": K}
  theirs = module.DogeCDMoE(module.DogeConfig(**sizes, hidden_act="relu")).eval()
  draw = np.random.default_rng(7)
  with torch.no_grad():
    for tensor in theirs.parameters():
      tensor.copy_(torch.tensor(draw.normal(scale=0.5, size=tensor.shape)))
    # The shared expert, whose activation is gated, is left out.
    theirs.down_proj.weight.zero_()
    hidden = draw.normal(size=(S, D)).astype(np.float32)
    rows = [theirs(torch.tensor(row)[None, None])[0].numpy() for row in hidden]
    tensors = {name: tensor.numpy().copy() for name, tensor in theirs.named_parameters()}
  params = {
    "router": tensors["router_gate.weight"].T,
    "up": tensors["down_embed.weight"][:, :, None],
    "down": tensors["up_embed.weight"][:, None],
  }
  layer = moe_jax.moe_layer(E, 1, "top_k", {"k": K}, activation="relu", gate_network="product_keys")
  ours, _ = layer.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(hidden)[None])
  np.testing.assert_allclose(ours[0], np.concatenate(rows).reshape(S, D), rtol=1e-4, atol=1e-5)


def test_the_router_of_phi_3_5_moe():
  # In evaluation, where nothing is sampled. Catches another width of what is kept.
  from moe_jax.routing import RoutingContext
  from moe_jax.routing.sparse_mixer import sparse_mixer

  module = importlib.import_module("transformers.models.phimoe.modeling_phimoe")
  config = module.PhimoeConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=2)
  config.router_jitter_noise = 0.1
  router = module.PhimoeTopKRouter(config).eval()
  draw = np.random.default_rng(9)
  with torch.no_grad():
    router.weight.copy_(torch.tensor(draw.normal(size=(E, D))))
    hidden = torch.tensor(draw.normal(size=(S, D)), dtype=torch.float32)
    logits, gates, experts = router(hidden)
  theirs = compare.table(
    np.repeat(np.arange(S), 2), experts.numpy().ravel(), gates.numpy().ravel(), S, E
  )
  plan = sparse_mixer(jnp.asarray(logits.numpy()), RoutingContext(), epsilon=0.1)
  np.testing.assert_allclose(compare.of_plan(plan, S), theirs, rtol=1e-5)


def test_the_layer_of_gpt_oss():
  # Catches biases of another product or expert, a bias of outputs that its gate does not multiply,
  # and gates that are normalised over all experts.
  module = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
  config = module.GptOssConfig(hidden_size=D, intermediate_size=8, num_local_experts=E)
  theirs = module.GptOssMLP(config).eval()
  draw = np.random.default_rng(7)
  with torch.no_grad():
    for tensor in theirs.parameters():
      tensor.copy_(torch.tensor(draw.normal(scale=0.5, size=tensor.shape)))
    hidden = draw.normal(size=(1, S, D)).astype(np.float32)
    expected = theirs(torch.tensor(hidden))[0].numpy().reshape(hidden.shape)
    tensors = {name: tensor.numpy().copy() for name, tensor in theirs.named_parameters()}
  pairs, pair_biases = tensors["experts.gate_up_proj"], tensors["experts.gate_up_proj_bias"]
  params = {
    "router": tensors["router.weight"].T,
    "router_bias": tensors["router.bias"],
    "gate": pairs[..., ::2],
    "up": pairs[..., 1::2],
    "gate_bias": pair_biases[..., ::2],
    "up_bias": pair_biases[..., 1::2],
    "down": tensors["experts.down_proj"],
    "down_bias": tensors["experts.down_proj_bias"],
  }
  layer = moe_jax.moe_layer(
    E, 8, "top_k", {"k": 4}, activation="clamped_swiglu", router_bias=True, expert_bias=True
  )
  ours, _ = layer.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(hidden))
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_attention_of_gpt_oss():
  # Catches a sink of another head, and one that is scaled as scores are.
  from moe_jax.layers import Attention, AttentionOptions, LayerContext

  module = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
  sizes = {"hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
  plain = {"rope_type": "default", "rope_theta": 150_000.0}
  config = module.GptOssConfig(**sizes, rope_parameters=plain)
  config._attn_implementation = "eager"
  theirs = module.GptOssAttention(config, layer_idx=1).eval()
  draw = np.random.default_rng(6)
  with torch.no_grad():
    for tensor in theirs.parameters():
      tensor.copy_(torch.tensor(draw.normal(scale=0.5, size=tensor.shape)))
    hidden = draw.normal(size=(1, 8, D)).astype(np.float32)
    inputs, places = torch.tensor(hidden), torch.arange(8)[None]
    rotary = module.GptOssRotaryEmbedding(config)(inputs, places)
    mask = torch.triu(torch.full((8, 8), -torch.inf), diagonal=1)[None, None]
    expected = theirs(inputs, position_embeddings=rotary, attention_mask=mask)[0].numpy()
    tensors = {name: tensor.numpy().copy() for name, tensor in theirs.named_parameters()}
  params = {"sink_bias": tensors["sinks"], "output_bias": tensors["o_proj.bias"]}
  params["output"] = tensors["o_proj.weight"].T.reshape(4, 6, D)
  for name, heads in (("query", 4), ("key", 2), ("value", 2)):
    params[name] = tensors[f"{name[0]}_proj.weight"].T.reshape(D, heads, 6)
    params[f"{name}_bias"] = tensors[f"{name[0]}_proj.bias"].reshape(heads, 6)
  options = AttentionOptions(
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=150_000.0,
    qkv_bias=True,
    output_bias=True,
    sinks=True,
  )
  ours = Attention(options).apply(
    {"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(hidden), LayerContext.of_rows(1, 8)
  )
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_activation_of_gpt_oss():
  # Catches another limit or factor than those of the released model.
  module = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
  config = module.GptOssConfig(hidden_size=D, intermediate_size=8, num_local_experts=E)
  gate, up = np.random.default_rng(8).normal(scale=6.0, size=(2, S, 8)).astype(np.float32)
  pairs = torch.tensor(np.stack([gate, up], axis=-1).reshape(S, 16))
  expected = module.GptOssExperts(config)._apply_gate(pairs).numpy()
  ours = activate("clamped_swiglu", {"gate": jnp.asarray(gate), "up": jnp.asarray(up)})
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_every_router_of_transformers_is_in_a_table(capsys):
  # Catches a router of a new version of transformers, and one that is in both tables.
  classes = found().keys()
  assert not classes - EXPRESSED.keys() - NOT.keys()
  assert not EXPRESSED.keys() & NOT.keys()
  with capsys.disabled():
    expressed, others = classes & EXPRESSED.keys(), sorted(classes & NOT.keys())
    print(f"\n{len(expressed)} of {len(classes)} router classes of transformers ", end="")
    print(f"{transformers.__version__} are combinations of options. The others:")
    for name in others:
      print(f"  {name} {NOT[name]}")
