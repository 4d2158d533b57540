"""Training: pure steps, optimizers, state, and checkpoints. `run/` puts them together for one
config.

`step.py` is pure: it can be jitted, `vmap`ped over seeds, and compiled for a machine that is not
there.
"""
