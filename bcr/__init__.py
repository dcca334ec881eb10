"""bcr: Batched Contextual Reinforcement, from problems to a trained, measured model."""

__version__ = "0.1.0"
