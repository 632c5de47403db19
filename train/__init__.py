"""The one trainer, its sources, evaluators, checkpoints and command line."""
