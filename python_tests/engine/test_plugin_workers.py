"""A plugin's method in worker processes: the bits of clients one after another."""

import pytest

from fedkern.engine.run import run
from fedkern.methods import METHODS
from fedkern.settings.config import RunConfig
from fedkern.usercode import plugins
from python_tests.interrupted import outcome
from python_tests.plugin_sources import EXAMPLES, Marked, no_plugins, unload_all  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_plugins")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "file"), [("fedavgm", "fedavgm.py"), ("smoothed", "smoothed_labels.py")])
def test_the_examples_have_the_same_bits(method, file, make_data, tmp_path):
    settings = {"width": 2, "rounds": 3, "local_epochs": 1, "batch_size": 4, "clients": 3, "threads": 1, "grad_cam": 0}
    config = RunConfig.make(method, plugins=[str(EXAMPLES / file)], **settings)
    for workers in ("1", "2", "3"):
        run(config.replace(workers=workers), out=tmp_path / workers, data=make_data())
    serial = outcome(tmp_path / "1")
    assert "no-workers" not in serial[2]["diagnostics"]
    assert outcome(tmp_path / "2") == serial
    assert outcome(tmp_path / "3") == serial


def test_another_process_gets_the_content_that_this_one_has_executed(tmp_path):
    marked = Marked(tmp_path)
    stored = plugins.load_given([str(marked.path)])
    sent = plugins.sent_plugins(stored)
    marked.path.unlink()
    name = METHODS["mine"].__module__
    unload_all()
    plugins.receive(sent)
    assert METHODS["mine"].__module__ == name  # what a pickle of the method refers to
    plugins.receive(sent)
    assert marked.runs == 2
    assert plugins.sent_plugins({}) == []
