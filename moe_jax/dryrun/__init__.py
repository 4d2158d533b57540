"""Estimates what a config costs on a machine that is not attached, by compiling it only."""
