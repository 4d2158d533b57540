"""One config from its first step to its report: the loop, the compiled update, and what is left at
the end."""
