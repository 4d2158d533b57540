"""What an optimised program does: HLO text read as computations, loops, matmuls, traffic and
collectives."""
