import numpy as np
import pytest
import statescan
import support


@pytest.fixture(params=support.DEVICES, ids=lambda device: device.name)
def device(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20240531)


@pytest.fixture
def threads():
    """set_num_threads, put back afterwards."""
    before = statescan.num_threads()
    yield statescan.set_num_threads
    statescan.set_num_threads(before)
