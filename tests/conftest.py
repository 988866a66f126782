"""What every test needs."""

import os

import pytest

# Run by test_mesh.py in a process that has four devices.
collect_ignore = (
    [] if "device_count=4" in os.environ.get("XLA_FLAGS", "") else ["training/four_devices.py"]
)


@pytest.fixture(scope="session", autouse=True)
def cache_folder_of_the_session(tmp_path_factory):
    """Nothing that a test starts leaves compiled programs in the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
