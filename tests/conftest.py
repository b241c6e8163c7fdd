"""Settings of all tests."""

import os

from hypothesis import settings

# The same examples at every run: a run of the tests says something about the code, not about the day's luck.
# HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", derandomize=True, print_blob=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
