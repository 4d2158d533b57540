"""Machines that are not there: their chips, shapes and networks, and how long a program would take
on them."""
