"""For all tests: random examples may take as long as a busy machine needs: no test asserts its own speed."""

from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.load_profile("default")
