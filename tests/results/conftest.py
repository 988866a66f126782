"""Trained runs that the tests of a file share."""

import pytest
from helpers.trained_runs import NETWORKS, experiment

import jmp_train as jt


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_runs):
    """Returns the directory of a run and its experiment; each is trained once."""
    runs = {}

    def run(network, **settings):
        key = repr((network, settings))
        if key not in runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            own = experiment(NETWORKS[network], **settings)
            jt.train(own, folder)
            runs[key] = folder, own
        return runs[key]

    return run
