"""The Triton kernels and what launches them. Nothing here is imported before the first call that needs it."""

import os

# Triton decides this when it is imported, from the same variable.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
