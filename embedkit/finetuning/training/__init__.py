"""The training loop, and what it needs: rates, gradients, checkpoints, several processes."""
