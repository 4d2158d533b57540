"""A layer with experts for a Flax module of one's own, without a config."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.assembly import experts
from moe_jax.assembly.sections import check_config, default_config, name_of, register_router
from moe_jax.dispatch import DISPATCHERS, CapacityOptions
from moe_jax.errors import ConfigError, choose
from moe_jax.layers import DenseFfn, GateOptions, GroupOptions, LossOptions, MoeLayer, ZeroOptions
from moe_jax.options import Config, keys
from moe_jax.routing import ROUTERS, Router

# The keys of the section `model.moe` that a single layer reads.
_OPTIONS = (
  *(
    name
    for each in (GateOptions, GroupOptions, CapacityOptions, LossOptions, ZeroOptions)
    for name in keys(each)
  ),
  "num_shared_experts",
  "shared_gate",
  "expert_bias",
  "latent_width",
)


def moe_layer(
  num_experts: int,
  d_ff: int,
  router: str | Router = "top_k",
  router_options: Mapping[str, Any] | None = None,
  *,
  dispatcher: str = "grouped",
  activation: str = "swiglu",
  platform: str | None = None,
  dtype: DTypeLike = jnp.float32,
  name: str | None = None,
  **options: Any,
) -> MoeLayer:
  """Returns a layer with experts, to be called inside a Flax module as `y, aux = layer(x)`.

      layer = moe_jax.moe_layer(8, 256, "top_k", {"k": 2}, capacity_factor=1.25)
      y, aux = layer(x)  # x and y are [B, L, D]
      loss += layer.losses.total(aux.losses)

  Args:
    num_experts: The number of experts E.
    d_ff: The hidden width F of an expert.
    router: The name of a router (see `ROUTERS`), or a `Router`.
    router_options: The options of the router that differ from their defaults.
    dispatcher: The name of a dispatcher (see `DISPATCHERS`).
    activation: A key of `experts.ACTIVATIONS`.
    platform: The platform of the devices that will run the layer: "cpu", "gpu" or "tpu". None means
      that of the mesh that `jax.set_mesh` has set, or else JAX's default.
    dtype: The dtype of the shared experts' activations. That of the routed ones is that of x.
    name: The name of the layer in its parent module.
    **options: Other keys of the section `model.moe`, such as `capacity_factor` or `balance_loss`;
      see docs/options.md.

  Raises:
    ConfigError: If a name or an option is unknown, or a value is not allowed.
  """
  if isinstance(router, Router):
    router = _known(router)
  choose("router", router, ROUTERS)
  choose("dispatcher", dispatcher, DISPATCHERS)
  for key in options:
    choose("option", key, _OPTIONS)
  config: Config = default_config()
  model = config.model
  model.activation = activation
  model.moe.router.name, model.moe.dispatcher.name = router, dispatcher
  _update(model.moe.router[router], router_options or {}, f"model.moe.router.{router}")
  # The rules of the keys are checked below, and allow more types than the default's.
  with model.moe.ignore_type():
    _update(model.moe, {"num_experts": num_experts, "d_ff": d_ff, **options}, "model.moe")
  check_config(config)
  dense = functools.partial(DenseFfn, output_scale=1.0, dtype=dtype)
  return experts.moe_layer(model, dense, platform or _current_platform())(name=name)


def _known(router: Router) -> str:
  """Returns the name of a router, which is registered under that of its function if it is new."""
  for name, known in ROUTERS.items():
    if known is router:
      return name
  name = name_of(router)
  register_router(name, router)
  return name


def _update(section: Any, values: Mapping[str, Any], field: str) -> None:
  """Writes values into a section of a config, whose keys they must be."""
  for key, value in values.items():
    if key not in section:
      raise ConfigError(
        f"{field}.{key}", value, f"there is no such option; known: {', '.join(section)}"
      )
    section[key] = value


def _current_platform() -> str:
  """Returns the platform of the devices of the current mesh, or JAX's default without one."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()
