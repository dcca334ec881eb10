"""What every program needs: configuration, console and metrics, checkpoints, processes."""
