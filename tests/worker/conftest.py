"""A tiny random Llama on disk, and workers that serve it."""

import pytest

from tests.worker.driver import Driver, make_config, make_hf_model, start_worker


@pytest.fixture(scope="session")
def hf_model():
    return make_hf_model()


@pytest.fixture(scope="session")
def model_dir(hf_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    hf_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_driver(model_dir):
    """``make_driver(**options of make_config)``: a driver over a started worker."""

    def make(**options) -> Driver:
        config = make_config(model_dir, **options)
        return Driver(start_worker(config), config.cache_config.block_size or 16)

    return make


@pytest.fixture(params=[16, 32], scope="session")
def worker_of_block_size(request, model_dir):
    return start_worker(make_config(model_dir, block_size=request.param)), request.param


@pytest.fixture
def driver(worker_of_block_size):
    """A driver that finds the worker as it was, and leaves it so."""
    worker, block_size = worker_of_block_size
    driver = Driver(worker, block_size)
    yield driver
    for req_id in list(driver.requests):
        driver.finish(req_id)
    driver.step({})
    assert worker.model_runner.batch.num_reqs == 0
    assert not worker.model_runner.requests
