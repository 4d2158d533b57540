"""Imports published checkpoints as workdirs, and exports workdirs as published checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax import assembly, sharding
from moe_jax.assembly.experts import has_experts
from moe_jax.assembly.sections import default_config
from moe_jax.errors import ConfigError, choose, shown
from moe_jax.interop import families
from moe_jax.interop.settings import Settings
from moe_jax.interop.tensors import Reader, Writer
from moe_jax.interop.weights import Bridge
from moe_jax.options import Config

# The folder of a workdir that holds what came with the weights, besides the weights.
KEPT = "hugging_face"
# The files of a tokenizer, and what generation with the model begins and ends with.
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "spiece.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "generation_config.json",
)
# `torch_dtype` -> `model.dtype`. Activations of float16 would need loss scaling, and bfloat16 holds
# all of its range.
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


class Published(NamedTuple):
  """A published checkpoint, of which config.json has been read.

  Attributes:
    folder: Its folder.
    family: A module of `families`.
    hf: The content of config.json.
    keys: Dotted key of our config -> value, as `keys` of the family says.
  """

  folder: pathlib.Path
  family: Any
  hf: Mapping[str, Any]
  keys: Mapping[str, Any]


def keys(hf: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """Returns the module of the family, and our config keys with the values of a config.json.

  Raises:
    ConfigError: If the family is not known, or a setting cannot be expressed.
  """
  model_type = hf.get("model_type")
  name = choose("model_type", model_type if isinstance(model_type, str) else "", families.FAMILIES)
  family = families.find(name)
  settings = Settings(hf)
  for architecture in hf.get("architectures") or [family.ARCHITECTURE]:
    if architecture not in (family.ARCHITECTURE, *getattr(family, "OTHER_NAMES", ())):
      settings.problem(f"architectures={architecture!r} must be {family.ARCHITECTURE!r}")
  found = {f"model.{key}": value for key, value in families.PLAIN.items()}
  dtype = settings.take("dtype", settings.take("torch_dtype", "float32"))
  if dtype not in DTYPES:
    settings.problem(f"torch_dtype={dtype!r} must be one of {', '.join(DTYPES)}")
  found["model.dtype"] = DTYPES.get(dtype, "float32")
  found |= family.keys(settings)
  settings.done()
  return family, found


def read(folder: pathlib.Path) -> Published:
  """Returns a published checkpoint.

  Raises:
    ConfigError: If there is no config.json of a known family, or it cannot be expressed.
  """
  path = folder / "config.json"
  try:
    hf = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    what = "there is no such folder" if not folder.is_dir() else "holds no config.json"
    raise ConfigError("checkpoint", str(folder), f"{what}; give a published checkpoint") from error
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError("checkpoint", str(folder), "its config.json is damaged") from error
  if not isinstance(hf, dict):
    raise ConfigError("checkpoint", str(folder), "its config.json holds no settings")
  family, found = keys(hf)
  return Published(folder, family, hf, found)


def config_of(published: Published) -> Config:
  """Returns the config of a published checkpoint, in which training has the defaults.

  Raises:
    ConfigError: If the values that config.json gives are no valid config.
  """
  config: Any = default_config()
  preset = published.family.PRESET
  if isinstance(preset, Mapping):
    preset = preset[published.keys["model.moe.router.name"]]
  if preset:
    assembly.use_preset(config, preset)
  with config.ignore_type():
    config.update_from_flattened_dict(dict(published.keys))
  if config.model.family == "encoder_decoder":
    config.data.objective = "span_corruption"
  assembly.validate(config)
  return config


def load(published: Published, config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Returns the variables of a published checkpoint, each in its place on a mesh.

  The dtypes are those of the checkpoint, whatever `model.dtype` is.

  Raises:
    ConfigError: If files are missing or damaged, or tensors missing, unknown or of another shape.
  """
  reader = open_weights(published)
  return Bridge(published.family, config, mesh, is_fused(reader)).load(reader)


def open_weights(published: Published) -> Reader:
  """Returns the tensors of a published checkpoint."""
  block = (published.hf.get("quantization_config") or {}).get("weight_block_size")
  return Reader(published.folder, tuple(block) if block else None)


def is_fused(reader: Reader) -> bool:
  """Returns whether all experts of a layer are in one tensor."""
  return any(name.endswith("experts.gate_up_proj") for name in reader.entries)


def from_hugging_face(
  source: str | os.PathLike, workdir: str | os.PathLike, mesh: jax.sharding.Mesh | None = None
) -> Config:
  """Makes a workdir of a published checkpoint; returns its config.

  `load_run` gives its model, and `train --config=WORKDIR/config.py --workdir=WORKDIR` goes on from
  its weights. They are kept in the dtype that they were published in; training makes them float32.
  The optimizer begins anew.

  Args:
    source: The folder with config.json and safetensors.
    workdir: The folder to make. It appears by a rename when it is complete.
    mesh: The mesh on which the weights lie meanwhile; None means all devices, which share them.

  Raises:
    ConfigError: If the checkpoint is incomplete, damaged, or of a model that cannot be expressed,
      or if the workdir exists.
  """
  from moe_jax.training import workdir as workdirs
  from moe_jax.training.checkpoints import Checkpoints

  published = read(pathlib.Path(source))
  config = config_of(published)
  mesh = sharding.make_mesh({"fsdp": -1}) if mesh is None else mesh
  reader = open_weights(published)
  bridge = Bridge(published.family, config, mesh, is_fused(reader))
  bridge.check(reader)
  with new_folder("workdir", pathlib.Path(workdir)) as folder:
    (folder / KEPT).mkdir()
    for name in ("config.json", *TOKENIZER_FILES):
      if (published.folder / name).is_file():
        shutil.copyfile(published.folder / name, folder / KEPT / name)
    _use_tokenizer(config, folder / KEPT, pathlib.Path(workdir) / KEPT)
    workdirs.claim(folder, config)
    (folder / "config.py").write_text(CONFIG_FILE, encoding="utf-8")
    imported = {"source": str(source), "fused": is_fused(reader)}
    meta = {"config": str(pathlib.Path(workdir) / "config.py"), "imported": imported, "starts": []}
    workdirs.write_json(folder / "meta.json", meta)
    variables = bridge.load(reader)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(variables))
    with Checkpoints(folder / "checkpoints", at_once=largest) as checkpoints:
      checkpoints.save_imported(variables["params"], variables.get("router_state", {}), imported)
  return config


# The file config.py of a workdir whose weights were made elsewhere, which `--config` reads.
CONFIG_FILE = '''"""The config of the published weights in this folder, which flags change."""

import pathlib

from moe_jax.run.load import stored_config


def get_config():
  """Returns the config."""
  return stored_config(pathlib.Path(__file__).parent)
'''


def _use_tokenizer(config: Config, folder: pathlib.Path, final: pathlib.Path) -> None:
  """Lets the config read the tokenizer that came with the weights, if there is one.

  Documents begin and end as the model has learnt it: with the tokens that tokenizer_config.json
  names. If it names only an end, that stands between documents.

  Args:
    config: The config to change.
    folder: The folder in which the files are.
    final: The folder in which they will be.
  """
  file = next((n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).is_file()), None)
  if file is None:
    return
  kind = "hf" if file == "tokenizer.json" else "sentencepiece"
  config.data.tokenizer = f"{kind}:{final / file}"
  with contextlib.suppress(OSError, ValueError, AttributeError):
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    begin, end = (_text(named.get(f"{which}_token")) for which in ("bos", "eos"))
    config.data.bos, config.data.eos = (begin, end) if begin else (end, "")


def _text(token: Any) -> str:
  """Returns the text of a token of tokenizer_config.json, which may be an object or null."""
  text = token.get("content") if isinstance(token, dict) else token
  return text if isinstance(text, str) else ""


def to_hugging_face(
  workdir: str | os.PathLike, destination: str | os.PathLike, step: int | None = None
) -> None:
  """Writes the weights of a workdir as a checkpoint that transformers reads.

  The weights keep their dtype, and their layout if they were imported. What came with imported
  weights, such as the tokenizer, is written, too.

  Args:
    workdir: The --workdir of a run, or of an import.
    destination: The folder to make. It appears by a rename when it is complete.
    step: The step of the checkpoint; None means the newest one.

  Raises:
    ConfigError: If the workdir has no such checkpoint, if no published family has its model, or if
      the destination exists.
  """
  from moe_jax.run.load import load_run
  from moe_jax.training import workdir as workdirs

  place = pathlib.Path(workdir)
  run = load_run(place, step)
  config = run.config
  with config.unlocked():
    config.model.vocab_size = assembly.vocab_size(config)
  before = workdirs.read_json(place / KEPT / "config.json", dict) or {}
  family, settings = settings_of(config, before)
  meta = workdirs.read_json(place / "meta.json", dict) or {}
  fused = bool(meta.get("imported", {}).get("fused"))
  bridge = Bridge(family, config, sharding.make_mesh({"data": 1}), fused)
  with new_folder("destination", pathlib.Path(destination)) as folder:
    for name in TOKENIZER_FILES:
      if (place / KEPT / name).is_file():
        shutil.copyfile(place / KEPT / name, folder / name)
    dtype = str(jax.tree.leaves(run.variables["params"])[0].dtype)
    text = json.dumps(settings | {"torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    writer = Writer(folder)
    for name, array in bridge.tensors(run.variables):
      writer.add(name, array)
    writer.close()


def settings_of(config: Config, before: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """Returns the family that has a config's model, and the settings of its config.json.

  Args:
    config: The config of a run.
    before: The config.json with which the weights were imported, or {}.

  Raises:
    ConfigError: If no family has this model; the message says what the nearest one lacks.
  """
  if before:
    family, found = keys(before)
    # What is not written: factors of FP8 weights, and a layer of multi-token prediction.
    kept = {name: value for name, value in before.items() if name != "quantization_config"}
    if "num_nextn_predict_layers" in kept:
      kept["num_nextn_predict_layers"] = 0
    if not different(config, found):
      return family, kept
  names = [before["model_type"]] if before.get("model_type") else families.FAMILIES
  differences: dict[str, list[str]] = {}
  for name in names:
    family = families.find(name)
    try:
      settings = {"model_type": family.MODEL_TYPE, "architectures": [family.ARCHITECTURE]}
      settings |= {"torch_dtype": config.model.dtype} | family.settings(config.model)
      settings = {"max_position_embeddings": config.data.seq_len} | settings
      if before:
        settings.pop("max_position_embeddings")
      differences[name] = different(config, keys(settings)[1])
    except (ConfigError, ZeroDivisionError, TypeError) as error:
      differences[name] = [str(error)]
    else:
      if not differences[name]:
        return family, before | settings
  nearest = min(differences, key=lambda name: len(differences[name]))
  raise ConfigError(
    "model.family",
    config.model.family,
    f"no published family has this model; {nearest} has {'; '.join(differences[nearest][:6])}",
  )


def different(config: Config, found: Mapping[str, Any]) -> list[str]:
  """Returns which keys of a config differ from those of a family, and change what it computes."""
  unread = set()
  # No layer has a dense FFN then.
  if config.model.moe.num_experts and all(has_experts(config.model)):
    unread.add("model.d_ff")
  if config.model.attention == "latent":
    unread |= {"model.head_dim", "model.num_kv_heads"}
  flat = dict(_flat(config.to_dict()))
  wrong = []
  for key, value in found.items():
    # JSON has lists for tuples.
    ours = tuple(flat[key]) if isinstance(flat[key], list) else flat[key]
    if key not in unread and ours != value:
      wrong.append(f"{key}={shown(value)} and not {shown(flat[key])}")
  return wrong


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in node.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


@contextlib.contextmanager
def new_folder(field: str, path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder beside `path`, which takes its place at the end.

  If the body fails, the temporary folder is removed, so that nothing half-made is left.

  Raises:
    ConfigError: If `path` exists already and is no empty folder, or cannot be made.
  """
  path = path.absolute()
  if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
    raise ConfigError(field, str(path), "exists; name a folder that is not there, or is empty")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  except OSError as error:
    raise ConfigError(field, str(path), f"{error.strerror}; name another folder") from error
  try:
    os.chmod(temporary, 0o755)
    yield temporary
    if path.exists():
      path.rmdir()
    os.rename(temporary, path)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
