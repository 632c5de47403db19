"""Test environment: eight simulated CPU devices and a persistent compilation cache."""

import os
from pathlib import Path

from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
cache = Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile much and compute little: a third of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

# The same examples everywhere and every time.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")
