"""One profile for all properties: the same 200 examples each time, and no time limit that a busy machine exceeds."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "umt_hf",
    derandomize=True,
    max_examples=200,
    deadline=None,
    # Fixtures here are read-only, and building a tiny model or file is slow by hypothesis' measure.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("umt_hf")
