"""Training: pure steps, optimizers, checkpoints, and the one loop that does I/O.

`step.py` is pure (it can be jitted, `vmap`ped over seeds, and compiled for a machine that is not there); `loop.py` is
the only place that logs, saves and reads the clock.
"""
