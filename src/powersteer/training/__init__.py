"""Training a steering network: config, loop, held-out loss, checkpoints."""
