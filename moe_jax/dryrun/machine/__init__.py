"""Describes machines that are not attached: chips, topologies, networks and times of a step."""
