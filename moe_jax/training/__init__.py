"""Training: pure steps, optimizers, the state of a run, and checkpoints.

`step.py` is pure, so that it can be jitted, `vmap`ped over seeds, and compiled for a machine that
is not present. The package `run` assembles these parts for one config.
"""
