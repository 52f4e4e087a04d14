"""Names of figures and test sets for people."""

import pytest

from fedkern.methods.common.figure_names import (
    figure_title,
    set_noun,
    short_set_title,
    short_title,
    split_metric,
)


def test_a_metric_is_split_into_test_set_and_figure():
    assert split_metric("ood_accuracy") == ("ood", "accuracy")
    assert split_metric("accuracy") == ("", "accuracy")
    assert split_metric("id_gradcam_in_object") == ("id", "gradcam_in_object")
    assert split_metric("north_accuracy") == ("", "north_accuracy")
    assert split_metric("north_accuracy", ["north"]) == ("north", "accuracy")


@pytest.mark.parametrize(
    ("name", "title", "short"),
    [
        ("macro_auroc", "AUROC, mean of the labels", "macro AUROC"),
        ("i2t_r1", "image to text, recall at 1", "recall at 1, image to text"),
        ("lowest_i2t_r1", "lowest: image to text, recall at 1", "lowest: recall at 1, image to text"),
        ("worst_client_dice", "worst client: Dice, mean of the classes", "worst client: Dice"),
        ("worst_client_loss", "worst client loss", "worst client loss"),
        ("north_t2i_r20", "north: text to image, recall at 20", "north: text to image, recall at 20"),
        ("level1_up_bytes", "level1 (sent by a client)", "level1 (sent by a client)"),
        ("proxy_inference_mflops", "proxy inference (operations)", "proxy inference (operations)"),
        ("my_figure", "my figure", "my figure"),
    ],
)
def test_a_figure_has_a_title_for_people(name, title, short):
    assert figure_title(name) == title
    assert short_title(name) == short


@pytest.mark.parametrize(
    ("name", "short", "noun"),
    [
        ("", "", "test set"),
        ("id", "ID", "in-distribution test set"),
        ("held_out", "held-out client", "held-out client"),
        ("minority", "minority", "minority test set"),
        ("validation", "validation", "validation set"),
        ("north", "north", 'test set "north"'),
    ],
)
def test_a_test_set_has_a_name_in_columns_and_in_sentences(name, short, noun):
    assert (short_set_title(name), set_noun(name)) == (short, noun)
