"""Settings of every test: one thread, so that workers share the cores; and how many examples hypothesis tries."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=500, derandomize=True, **common)
settings.register_profile("nightly", max_examples=20_000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
