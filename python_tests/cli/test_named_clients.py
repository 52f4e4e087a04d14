"""Runs whose clients are named sites, as a user starts them: output, files, refusals and resumption."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image

from fedkern.data import load, normalise
from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.report.figures.pictures import write_pictures
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings

SITES = ("Aachen", "Bonn", "Celle")
TINY = ("--rounds", "1", "--local-epochs", "1", "--threads", "1", "--width", "2", "--grad-cam", "0", "--workers", "1",
        "--data-option", "size=8", "--model", "cnn")  # fmt: skip


@pytest.fixture
def csv_root(tmp_path):
    """Return the folder of a CSV file with a column hospital."""
    folder = tmp_path / "set"
    folder.mkdir()
    lines = ["path,label,hospital"]
    for i in range(90):
        Image.new("RGB", (8, 8), (2 * i, 9, 99)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{'cd'[i // 3 % 2]},{SITES[i % 3]}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folders(tmp_path):
    """Return images in SITE/train|test/CLASS/image."""
    for s, site in enumerate(SITES):
        for split, count in (("train", 12), ("test", 4)):
            for c, name in enumerate(("cat", "dog")):
                folder = tmp_path / "tree" / site / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.new("RGB", (8, 8), (60 * s + i, 90 * c, 9)).save(folder / f"{i}.png")
    return tmp_path / "tree"


def evaluation(out):
    with (out / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("undrawn")
def test_a_column_names_the_clients_everywhere(csv_root, result, tmp_path):
    out = tmp_path / "run"
    words = ("fedavg", "--data", "csv", "--data-root", str(csv_root), *TINY, "--client-test", "0.2", "--out", str(out))
    told, shown = result(*words)
    stored = load_settings(out)
    assert (stored.partition, stored.clients) == ("attribute", 3)
    summary, (record,) = json.loads((out / "summary.json").read_text()), records(out)
    assert summary["client_names"] == list(SITES)
    assert [record["clients"][str(k)]["name"] for k in range(3)] == list(SITES)
    # Header, table and metrics count the same samples.
    trained = [record["clients"][str(k)]["samples"] for k in range(3)]
    tests = [row for row in evaluation(out) if row["metric"] == "accuracy"]
    assert f"fedavg on csv: 3 clients, {sum(trained)} training," in shown
    for k, site in enumerate(SITES):
        assert any(line.split()[:3] == [str(k), site, str(trained[k])] for line in shown.splitlines())
    own = [int(line.split()[3]) for line in shown.splitlines() if line.split()[1:2] and line.split()[1] in SITES]
    assert f", {sum(own)} own test images" in shown
    assert any(line.split()[:3] == ["all", str(sum(trained)), str(sum(own))] for line in shown.splitlines())
    # Own figures of every client, and those of the run's test set.
    assert [(row["client"], row["test_set"]) for row in tests] == [("", "test"), *((site, "own") for site in SITES)]
    assert float(tests[0]["value"]) == summary["metrics"]["accuracy"]
    values = [float(row["value"]) for row in tests[1:]]
    assert summary["metrics"]["mean_client_accuracy"] == pytest.approx(sum(values) / 3)
    assert [summary["client_metrics"][str(k)]["accuracy"] for k in range(3)] == values
    assert [record["client_metrics"][str(k)]["accuracy"] for k in range(3)] == values
    worst = summary["worst_client"]
    assert (worst["metric"], worst["value"]) == ("accuracy", min(values))
    assert values[SITES.index(worst["name"])] == min(values)  # the loss decides between equals
    assert f"worst client: {worst['client']} ({worst['name']}), accuracy {100 * min(values):.1f} %" in told
    assert not any(row["test_set"] == "validation" or "client_" in row["metric"] for row in evaluation(out))


@pytest.mark.usefixtures("undrawn")
def test_a_held_out_site_is_shown_as_held_out(csv_root, result, tmp_path):
    out = tmp_path / "run"
    words = ("fedavg", "--data", "csv", "--data-root", str(csv_root), *TINY)
    words = (*words, "--held-out-client", "Bonn", "--out", str(out))
    _, shown = result(*words)
    (record,) = records(out)
    trained = [record["clients"][str(k)]["samples"] for k in range(2)]
    assert f"2 clients (one of 3 is held out), {sum(trained)} training" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert [row[:3] for row in rows if row[1:2] and row[1] in SITES] == [
        ["0", "Aachen", str(trained[0])], ["1", "Celle", str(trained[1])],
    ]  # fmt: skip
    assert any(row[:3] == ["held", "out", "Bonn"] for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["client_names"], summary["held_out_client_name"]) == (["Aachen", "Celle"], "Bonn")
    assert {row["test_set"] for row in evaluation(out)} == {"test", "held_out"}


@pytest.mark.usefixtures("undrawn")
def test_parts_of_the_test_set_tell_the_sites_apart(csv_root, result, tmp_path):
    """Clients without their own test sets are compared on the test images of their site."""
    out = tmp_path / "run"
    words = ("fedavg", "--data", "csv", "--data-root", str(csv_root), *TINY, "--out", str(out))
    told, _ = result(*words)
    data = load("csv", root=str(csv_root), options={"size": 8})
    model, about = read_model(out)
    test = data.tests[""]
    with torch.no_grad():
        right = model(normalise(test.images, about["mean"], about["std"])).argmax(1) == test.labels
    home = torch.tensor([int(name.removesuffix(".png")) % 3 for name in test.ids])
    assert test.homes.tolist() == home.tolist()
    found = {row["client"]: row for row in evaluation(out) if row["metric"] == "accuracy"}
    assert {row["test_set"] for row in found.values()} == {"test"}
    for k, site in enumerate(SITES):
        assert float(found[site]["value"]) == pytest.approx(float(right[home == k].double().mean()))
    summary = json.loads((out / "summary.json").read_text())
    assert not any("client" in name for name in summary["metrics"])
    assert summary["worst_client"]["value"] == min(float(found[site]["value"]) for site in SITES)
    assert "the clients' parts of the test set" in told
    result(*words[:-2], "--held-out-client", "0", "--out", str(tmp_path / "other"))
    held = [row for row in evaluation(tmp_path / "other") if row["metric"] == "accuracy"]
    assert [(row["client"], row["test_set"]) for row in held] == [
        ("", "test"), ("", "held_out"), ("Bonn", "test"), ("Celle", "test"),
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_pooled_training_is_compared_on_the_sites_too(csv_root, result, tmp_path):
    out = tmp_path / "run"
    result("centralised", "--data", "csv", "--data-root", str(csv_root), *TINY, "--out", str(out), "--quiet")
    assert {row["client"] for row in evaluation(out)} == {"", *SITES}
    assert "name" not in records(out)[0]["clients"]["0"]


@pytest.mark.usefixtures("undrawn")
def test_site_folders_bring_their_own_tests(folders, result, tmp_path):
    out = tmp_path / "run"
    result("fedavg", "--data", "folder", "--data-root", str(folders), *TINY, "--out", str(out), "--quiet")
    found = {(row["client"], row["metric"]): float(row["value"]) for row in evaluation(out)}
    assert {client for client, _ in found} == {"", *SITES}
    # The run's test set joins the sites' own ones, which are equally large.
    assert found["", "accuracy"] == pytest.approx(sum(found[site, "accuracy"] for site in SITES) / 3)


def test_own_test_folders_stay_where_a_share_is_the_default(folders, result, tmp_path):
    for path in folders.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a picture {path.stem}")
    config = RunConfig.make("fedavg", data="pairs", data_root=str(folders), rounds=1, local_steps=1, width=4, threads=1,
                            batch_size=4, data_options={"size": 16})  # fmt: skip
    assert config.client_test == 0.2
    summary = run(config, out=tmp_path / "run")
    assert load_settings(tmp_path / "run").client_test == 0
    assert set(summary["client_metrics"]) == {"0", "1", "2"}
    assert summary["worst_client"]["metric"] == "i2t_r1"
    shares = run(config.replace(client_test=0.2), out=tmp_path / "other")
    assert shares["client_metrics"]["0"]["gallery"] != summary["client_metrics"]["0"]["gallery"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--client-column", "label", "--data-option", "client_column=path"), 'option "client_column" is given twice'),
        (("--held-out-client", "3"), "one of the clients, 0 (Aachen), 1 (Bonn), 2 (Celle), not 3."),
        (("--held-out-client", "Bon"), 'not Bon. Did you mean "Bonn"?'),
        (("--client-test", "0.9", "--train-samples", "12"), "Client 0 (Aachen) has"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(csv_root, fails, tmp_path, words, said):
    out = tmp_path / "run"
    assert said in fails("fedavg", "--data", "csv", "--data-root", str(csv_root), *TINY, *words, "--out", str(out))
    assert not out.exists()


def test_a_column_of_another_data_set(fails):
    assert 'data set "digits" has no option "client_column"' in fails("fedavg", "--data", "digits", *TINY[:6],
                                                                     "--client-column", "site")  # fmt: skip


def plain(out):
    """Return the figures and names of a run, without times."""
    found = json.loads((out / "summary.json").read_text())
    return found["metrics"], found["client_metrics"], found["client_names"], (out / "evaluation.csv").read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_resumed_runs_are_the_same(csv_root, tmp_path):
    config = RunConfig.make("fedavg", data="csv", data_root=str(csv_root), rounds=2, local_epochs=1, width=2, threads=1,
                            grad_cam=0, model="cnn", client_test=0.2, data_options={"size": 8})  # fmt: skip
    uncut, part = tmp_path / "whole", tmp_path / "part"
    run(config, out=uncut)
    shutil.copytree(uncut, part)
    for name in ("summary.json", "evaluation.csv", "model.safetensors", "metrics.jsonl"):
        (part / name).unlink()
    shutil.rmtree(part / "checkpoints")  # as after a power cut before the first round
    assert main(["--resume", str(part), "--quiet"]) == 0
    assert plain(part) == plain(uncut)
    assert (part / "config.toml").read_bytes() == (uncut / "config.toml").read_bytes()
    # The same settings, made anew, leave the sites open again and still are those of the run.
    assert run(config, out=uncut, resume=True)["client_names"] == list(SITES)
    assert config.unset == {"partition", "clients"}
    assert not load_settings(uncut).unset


def test_a_stored_partition_stays_though_the_data_name_sites(csv_root, tmp_path):
    """A run folder from older versions, which did not read sites, names its partition, and keeps it when resumed."""
    config = RunConfig.make("fedavg", data="csv", data_root=str(csv_root), rounds=1, local_epochs=1, width=2, threads=1,
                            grad_cam=0, model="cnn", partition="dirichlet:0.5", clients=5,
                            data_options={"size": 8})  # fmt: skip
    before = run(config, out=tmp_path / "run")
    assert "client_names" not in before
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(["--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"] == before["metrics"]


@pytest.mark.usefixtures("undrawn")
def test_private_records_withhold_the_figures_of_clients(csv_root, result, tmp_path):
    out = tmp_path / "run"
    words = ("fedavg", "--data", "csv", "--data-root", str(csv_root), *TINY, "--client-test", "0.2", "--records",
             "private", "--out", str(out))  # fmt: skip
    told, shown = result(*words)
    assert {row["client"] for row in evaluation(out)} == {""}
    summary = json.loads((out / "summary.json").read_text())
    assert not {"client_metrics", "worst_client"} & {*summary, *records(out)[0]}
    assert "worst client" not in told
    assert "own test" not in shown
    assert not any(site in (out / "metrics.jsonl").read_text() for site in SITES)


def test_pictures_name_the_sites(csv_root, tmp_path, monkeypatch):
    from fedkern.report.figures import plots

    out = tmp_path / "run"
    assert main(["fedavg", "--data", "csv", "--data-root", str(csv_root), *TINY, "--out", str(out), "--quiet"]) == 0
    seen = []
    monkeypatch.setattr(plots, "save_png", lambda figure, path: seen.append((path.name, figure)))
    write_pictures(out)
    figure = dict(seen)["partition.png"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(SITES)


@pytest.mark.usefixtures("undrawn")
def test_the_clients_of_the_digits_have_numbers(result, tmp_path):
    out = tmp_path / "run"
    told, shown = result("fedavg", "--data", "digits", "--train-samples", "60", "--clients", "2", *TINY[:8],
                         "--partition", "iid", "--client-test", "0.2", "--out", str(out))  # fmt: skip
    assert [row["client"] for row in evaluation(out) if row["metric"] == "loss"] == ["", "0", "1"]
    assert "worst client: " in told
    assert "client_names" not in json.loads((out / "summary.json").read_text())
    assert all("name" not in info for info in records(out)[0]["clients"].values())
    assert "held out" not in shown
