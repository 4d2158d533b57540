"""The run of one config: the training loop, its compiled update, and the results at the end."""
