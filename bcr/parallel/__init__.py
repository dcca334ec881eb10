"""Many processes, one run: who is who, what they exchange, how the weights are sharded over them."""
