"""Independent implementations of the routers, as plain NumPy loops in float64.

Each oracle is written from its paper and shares no code with moe_jax. It is a function
`f(logits [S, E], context, **options) -> [(token, expert, gate), ...]` with the options of the
router and the same RoutingContext, which it reads with np.asarray. The list is in the order of the
router's plan and leaves out assignments to no expert. Random numbers come from `draws`, which draws
from the same streams as the routers.
"""
