"""Tests of readable names of figures and test sets."""

import pytest

import fedkern
from fedkern.errors import UserError
from fedkern.tasks.figure_names import (
    FRACTIONS,
    check_set_names,
    figure_title,
    set_noun,
    short_set_title,
    short_title,
    split_metric,
)
from python_tests import own_data


def test_a_metric_is_split_into_test_set_and_figure():
    assert split_metric("ood_accuracy") == ("ood", "accuracy")
    assert split_metric("accuracy") == ("", "accuracy")
    assert split_metric("id_gradcam_in_object") == ("id", "gradcam_in_object")
    assert split_metric("north_accuracy") == ("", "north_accuracy")
    assert split_metric("north_accuracy", ["north"]) == ("north", "accuracy")


@pytest.mark.parametrize(("name", "title", "short"), [
    ("macro_auroc", "AUROC, mean of the labels", "macro AUROC"),
    ("i2t_r1", "image to text, recall at 1", "recall at 1, image to text"),
    ("lowest_i2t_r1", "lowest: image to text, recall at 1", "lowest: recall at 1, image to text"),
    ("worst_client_dice", "worst client: Dice, mean of the classes", "worst client: Dice"),
    ("worst_client_loss", "worst client loss", "worst client loss"),
    ("north_t2i_r20", "north: text to image, recall at 20", "north: text to image, recall at 20"),
    ("level1_up_bytes", "level1 (sent by a client)", "level1 (sent by a client)"),
    ("proxy_inference_mflops", "proxy inference (operations)", "proxy inference (operations)"),
    ("my_figure", "my figure", "my figure"),
])  # fmt: skip
def test_a_figure_has_a_title_for_people(name, title, short):
    assert figure_title(name) == title
    assert short_title(name) == short


@pytest.mark.parametrize(("name", "short", "noun"), [
    ("", "", "test set"),
    ("id", "ID", "in-distribution test set"),
    ("held_out", "held-out client", "held-out client"),
    ("minority", "minority", "minority test set"),
    ("validation", "validation", "validation set"),
    ("north", "north", 'test set "north"'),
])  # fmt: skip
def test_a_test_set_has_a_name_in_columns_and_in_sentences(name, short, noun):
    assert (short_set_title(name), set_noun(name)) == (short, noun)


@pytest.mark.parametrize(("names", "owner"), [
    (["validation"], "the validation set"),
    (["north", "validation", ""], "the validation set"),
    (["", "test"], "the test set without a name"),
    (["test", ""], "the test set without a name"),
    (["mean_client"], "the clients"),
    (["worst_client", "a"], "the clients"),
    (["", "balanced"], "the test set without a name"),
    (["mean", ""], "the test set without a name"),
    (["a", "a_balanced"], 'the test set "a"'),
    (["id_macro", "id"], "the in-distribution test set"),
    (["a", "a_b"], 'the test set "a"'),
    (["b", ""], "the test set without a name"),
    (["validation_b"], "the validation set"),
])  # fmt: skip
def test_a_name_that_means_something_is_refused(names, owner):
    with pytest.raises(UserError, match=f"^The test set .* would have the names of those of {owner}: give it another"):
        check_set_names(names, ["b_accuracy", "top2"])


@pytest.mark.parametrize(
    "names",
    [
        [""], ["test"], ["id", "ood"], ["", "minority", "unseen", "held_out"], ["validation_north", "x"],
        ["a", "a_c", "c"], ["loss", "accuracy", ""], ["balanced", "macro", "mean", "worst"], ["own", "best", "run"],
        ["_", "__", "a_", "a"], ["id_north", "north", "ood"], ["validation_", "Validation", "valid"],
    ],
)  # fmt: skip
def test_the_figures_of_every_set_are_found_again(names):
    check_set_names(names, ["top2"])
    figures = [*FRACTIONS, "loss", "top2", "vote_accuracy"]
    for name in [*names, "validation"]:
        for figure in figures:
            assert split_metric(f"{name}_{figure}" if name else figure, names) == (name, figure)
    for name in ("mean_client_accuracy", "worst_client_loss"):
        assert split_metric(name, names) == ("", name)


@pytest.mark.parametrize(("metric", "tests", "said"), [
    ("bytes_up", [""], 'The metric "bytes_up" has the name of an entry of the records'),
    ("validation_gap", [""], 'The metric "validation_gap" begins with "validation_", as the figures of a test set'),
    ("worst_client_gap", [""], 'The metric "worst_client_gap" begins with "worst_client_"'),
    ("lowest_gap", [""], 'The metric "lowest_gap" has the name of an entry'),
    ("up", ["bytes", "other"], 'The test set "bytes" would have a figure bytes_up, which records have'),
    ("north_gap", ["", "north"], 'The test set "north" cannot have this name'),
    ("south_gap", ["north", "north_south"], 'The test set "north_south" cannot have this name'),
])  # fmt: skip
def test_no_two_figures_have_one_name(metric, tests, said, refuses, tmp_path):
    sites, test = own_data.table()
    metrics = dict.fromkeys((metric, "gap"), lambda outputs, targets: 1.0)
    with refuses(said):
        fedkern.simulate(
            "fedavg", data=sites, test=test if tests == [""] else dict.fromkeys(tests, test), model=own_data.Rows(),
            metrics=metrics, main="gap", better="max", out=tmp_path / "run", progress=False,
        )  # fmt: skip
