"""Package metadata, dependency ranges and console entry points."""

from setuptools import find_packages, setup

setup(
  name="moe_jax",
  version="0.1.0",
  description="Mixture-of-Experts research in JAX: comparable routers, from a laptop to a pod",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The configs are installed with the package, so that `--config=mixtral:desk` needs no clone.
  packages=[*find_packages(include=["moe_jax", "moe_jax.*"]), "moe_jax.configs"],
  package_dir={"moe_jax.configs": "configs"},
  install_requires=[
    "jax>=0.10,<0.13",
    "flax>=0.12.6,<0.13",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "tensorflow-datasets>=4.9.9,<5",
    "importlib_resources",  # imported by tensorflow-datasets, missing from its metadata
    "ml-collections>=1.1,<2",
    "grain>=0.2.16,<0.3",
    "jaxtyping>=0.3.7,<0.4",
    "tensorboardX>=2.6.4,<3",
    "tqdm>=4.66,<5",
    "sentencepiece>=0.2.1,<0.3",
    "filelock>=3",  # for JAX's cache of compiled programs, which is bounded
    "tokenizers>=0.22,<1",
    "safetensors>=0.5,<1",  # published checkpoints
    "scipy>=1.12",  # filters of text; JAX needs it, too
  ],
  extras_require={
    "test": [
      "pytest>=8",
      "pytest-xdist>=3.6",
      "beartype>=0.20",
      "hypothesis>=6.100",
      "coverage>=7.10",
      "ruff>=0.12",
      "pyright[nodejs]>=1.1.400",
    ],
    "cuda": ["jax[cuda13]>=0.10,<0.13"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "dryrun": ["jax[tpu]>=0.10,<0.13"],  # the TPU's compiler, which needs no TPU
    "eval": ["lm-eval>=0.4.9"],
    # The figures of experiments/, and the data of experiments/vowels.
    "studies": ["matplotlib>=3.8", "praat-parselmouth>=0.4.5"],
    # Material for MkDocs does not work with MkDocs 2.
    "docs": [
      "mkdocs>=1.6,<2",
      "mkdocs-material>=9.8,<10",
      "mkdocstrings[python]>=1.0,<2",
      "ruff>=0.12",
    ],
    "reference": ["torch==2.13.0", "transformers>=5.23", "st-moe-pytorch>=0.1.8"],
  },
  # `pip install -e .` puts the clone itself on Python's path, so that other tools find the package,
  # and `configs` and `experiments` beside it; by default pip would install a hook in its place.
  options={"editable_wheel": {"mode": "compat"}},
  entry_points={"console_scripts": ["moe-jax=moe_jax.__main__:run"]},
)
