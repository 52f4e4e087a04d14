"""Names of figures and test sets for people."""

from fedkern.methods.common.figure_names import split_metric


def test_a_metric_is_split_into_test_set_and_figure():
    assert split_metric("ood_accuracy") == ("ood", "accuracy")
    assert split_metric("accuracy") == ("", "accuracy")
    assert split_metric("id_gradcam_in_object") == ("id", "gradcam_in_object")
    assert split_metric("north_accuracy") == ("", "north_accuracy")
    assert split_metric("north_accuracy", ["north"]) == ("north", "accuracy")
