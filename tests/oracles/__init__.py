"""The routers again, as plain NumPy loops in float64, each written from its paper and sharing no
code with moe_jax.

An oracle is `f(logits [S, E], context, **options) -> [(token, expert, gate), ...]`: the options of
the router, and the same RoutingContext (read with np.asarray). Its list is in the plan's order,
without what names nobody. Random numbers come from `draws`, which says which stream a router draws
from.
"""
