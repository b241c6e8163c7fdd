"""Settings of all tests."""

import os

from hypothesis import HealthCheck, settings

# The same examples at every run: a run of the tests says something about the code, not about the day's luck.
# HYPOTHESIS_PROFILE=explore looks for new ones.
# No example is too slow: machines are shared, and time is measured in benchmarks/.
_TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, print_blob=True, **_TIMELESS)
settings.register_profile("explore", print_blob=True, **_TIMELESS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
