"""What all commands share: the flag parser, the config files, and how mistakes are told."""

from moe_jax.commands.command_line import Command, parse
from moe_jax.commands.config_file import load_config
from moe_jax.commands.flags import Flag, take_flags
from moe_jax.commands.guarded import guarded

__all__ = ["Command", "Flag", "guarded", "load_config", "parse", "take_flags"]
