"""One profile for all properties: the same 200 examples each time, and no time limit that a busy machine exceeds.

`UMT_HF_EXAMPLES=5000 python -m pytest tests/properties` searches longer, at other places.
"""

import os

from hypothesis import HealthCheck, settings

examples = os.environ.get("UMT_HF_EXAMPLES")
settings.register_profile(
    "umt_hf",
    derandomize=examples is None,
    max_examples=int(examples or 200),
    database=None,
    deadline=None,
    # Fixtures here are read-only, and building a tiny model or file is slow by hypothesis' measure.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("umt_hf")
