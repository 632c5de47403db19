"""Flax modules made of jaxlab functions: a model is a pair (init, apply)."""
