"""Meshes, logical-axis rules and ahead-of-time plans: everything that knows about devices."""
