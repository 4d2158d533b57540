"""What experts specialise in: statistics of recorded tokens, their experts and probabilities.

All functions are pure NumPy. `results.analyse` makes all tables of a `Recorded` stack of layers.
"""
