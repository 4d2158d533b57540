"""What the studies share: running rows, seeds, tables, figures and the command line."""
