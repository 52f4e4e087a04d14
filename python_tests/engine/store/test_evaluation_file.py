"""evaluation.csv: every figure in the row of its test set."""

import pytest

from fedkern.engine.store.evaluation_file import rows


@pytest.mark.parametrize(
    "names",
    [
        ["validation_north", "validation_"],
        ["mean", "worst"],
        ["", "loss"],
        ["a", "a_b"],
        ["id", "id_north"],
        ["_", "a_"],
    ],
)
def test_every_set_has_rows_of_its_own(names):
    figures = {"accuracy": 0.5, "top2": 0.75}
    metrics = {f"{name}_{figure}" if name else figure: v for name in names for figure, v in figures.items()}
    derived = {"validation_accuracy": 0.1, "mean_client_accuracy": 0.2, "worst_client_loss": 0.3}
    found = list(rows({**derived, **metrics}, [f"{name}_" if name else "" for name in names], {}))
    assert found == [("", name or "test", figure, v) for name in names for figure, v in figures.items()]
