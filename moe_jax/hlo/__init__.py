"""Reads optimised HLO text: computations, loops, matmuls, memory traffic and collectives."""
