"""Tests of the plan of a comparison: variants, cells, seeds, names of folders."""

import numpy as np
import pytest

from fedkern.comparison.cells import Variant, folder_name, own_settings, read_seeds, read_sweep, variants
from fedkern.errors import UserError


def labels(methods, sweep, given=()):
    return [variant.label for labelled in variants(methods, sweep, given).values() for variant in labelled]


def test_a_sweep_goes_to_the_methods_that_have_it():
    assert labels(["fedprox", "fedavg"], {"mu": ["0.1", "1"]}) == ["fedprox mu=0.1", "fedprox mu=1", "fedavg"]
    swept = labels(["fedprox", "fedavg"], {"mu": ["0.1", "1"], "lr": ["0.01", "0.1"]})
    assert swept[:2] == ["fedprox lr=0.01 mu=0.1", "fedprox lr=0.1 mu=0.1"]
    assert swept[-2:] == ["fedavg lr=0.01", "fedavg lr=0.1"]
    assert len(swept) == 6


def test_rounds_are_not_of_one_shot_methods():
    assert labels(["fedavg", "fusefl"], {"rounds": ["2", "3"]}) == ["fedavg rounds=2", "fedavg rounds=3", "fusefl"]
    assert own_settings("fusefl", {"rounds": 2, "lr": 0.1}) == {"lr": 0.1}
    assert own_settings("fedavg", {"rounds": 2, "lr": 0.1}) == {"rounds": 2, "lr": 0.1}


@pytest.mark.parametrize(
    ("sweep", "given", "said"),
    [
        ({"nu": [1]}, (), "Neither the runs nor the methods"),
        ({"mu": [1, 1.0]}, (), "has the value 1 twice"),
        ({"mu": [1]}, ("mu",), "swept and given"),
        ({"mu": []}, (), "has no values"),
        ({"mu": [-1]}, (), "must be at least 0"),
        ({"seed": [1, 2]}, (), "--seeds gives the seeds"),
        ({"data": ["digits", "mnist"]}, (), "on one data set"),
        ({"workers": [1, 2]}, (), "it changes no figure"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweep, given, said):
    with pytest.raises(UserError, match=said):
        variants(["fedprox"], sweep, given)


def test_seeds():
    assert read_seeds("3") == read_seeds(3) == (0, 1, 2)
    assert read_seeds("2", 5) == (5, 6)
    assert read_seeds("0,4,7") == read_seeds([0, 4, 7]) == (0, 4, 7)
    for given in (np.array([0, 4, 7]), [np.int32(0), 4, np.uint8(7)]):
        assert [type(seed) for seed in read_seeds(given)] == [int] * 3
        assert read_seeds(given) == (0, 4, 7)
    assert read_seeds(np.int64(2)) == (0, 1)
    for wrong in ("0", "-1", "x", "1,x", "1,1", "", [], True, np.True_, [0.5], [np.float32(1)]):
        with pytest.raises(UserError, match="--seeds must be"):
            read_seeds(wrong)


def test_words_of_a_sweep():
    assert read_sweep(["lr=0.1, 0.2", "lr-steps=2,4;3"]) == {"lr": ["0.1", "0.2"], "lr_steps": ["2,4", "3"]}
    for wrong in ("lr", "=1", "lr=", "lr=1,,2"):
        with pytest.raises(UserError, match="NAME=VALUE"):
            read_sweep([wrong])
    with pytest.raises(UserError, match="given twice"):
        read_sweep(["lr=1", "lr=2"])


def test_folder_names_keep_values_apart():
    assert folder_name(["fedgid", "alpha=0.3", "seed=0"]) == "fedgid_alpha=0.3_seed=0"
    slashed, spaced = folder_name(["a", "x=b/c"]), folder_name(["a", "x=b c"])
    assert slashed != spaced
    assert "/" not in slashed
    assert len(folder_name(["x" * 1000])) < 200


def test_labels_are_short():
    assert Variant("m", {"lr": 1.0}, {"flag": True, "way": "mean"}).label == "m lr=1 flag=true way=mean"
