"""Tests of radiographs with reports in a CSV file, and of digits on crops of drawn slides."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from fedkern.data import Split, load, lookup
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.run import main
from fedkern.settings.config import RunConfig
from python_tests.data.conftest import idx_bytes
from python_tests.papers_data import REPORTS, SLIDES, function

clean, impression_and_findings = (function(REPORTS, name) for name in ("clean", "impression_and_findings"))

REPORT = """EXAMINATION:  CHEST (PA AND LAT)

INDICATION:  ___ year old woman with cough.

FINDINGS:
1. The lungs are clear.
2. No effusion of 2.5 cm.

IMPRESSION:  No acute process."""


def picture(path, value, size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def every_split(data):
    return [*data.clients, data.validation, *data.tests.values()]


def open_set(root, clients=2, partition="iid", **options):
    return load(REPORTS, root=root, clients=clients, partition=partition, options={"size": 16, **options})


def write_reports(root, rows=30, header="image,report,label,view,site", line=None):
    root.mkdir(exist_ok=True)
    views = ("PA", "AP erect", "LATERAL", "")
    lines = [header]
    for i in range(rows):
        picture(root / f"{i}.png", 5 * i)
        values = {"i": i, "view": views[i % 4], "site": "AB"[i % 2], "label": ("effusion", "")[i % 2]}
        lines.append((line or '{i}.png,"Report number {i} is here.",{label},{view},{site}').format(**values))
    (root / "reports.csv").write_text("\n".join(lines))
    return root


def test_a_report_is_its_impression_and_findings():
    assert clean(impression_and_findings(REPORT), 100) == ("no acute process the lungs are clear no effusion of 2 5 cm")
    assert clean(impression_and_findings(" ".join(REPORT.split())), 100) == clean(impression_and_findings(REPORT), 100)
    assert impression_and_findings("Heart is large: borderline.") == "Heart is large: borderline."
    assert clean("The (right) LUNG, 3 mm.", 3) == "the right lung"


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("FINDINGS:\nLungs: Clear.\nHeart: Normal.\n\nIMPRESSION: No acute process.",
         "no acute process lungs clear heart normal"),
        ("FINDINGS: LINES AND TUBES: PICC in place. LUNGS: Clear. IMPRESSION: No change.",
         "no change lines and tubes picc in place lungs clear"),
        ("Indication: cough. Findings: Lungs are clear. Impression: Normal.", "normal lungs are clear"),
        ("Indication: cough Findings: Lungs are clear Impression: Normal", "normal lungs are clear"),
        ("indication: cough. findings: lungs are clear. impression: normal.", "normal lungs are clear"),
        ("INDICATION: cough. FINDINGS AND IMPRESSION: Lungs are clear.", "lungs are clear"),
        ("INDICATION: cough. FINDINGS/IMPRESSION: Lungs: clear. RECOMMENDATION(S): CT", "lungs clear"),
        ("Impression & Findings (chest) : Clear.\nNOTIFICATION: by phone", "clear"),
        ("CLINICAL IMPRESSION: pneumonia. FINAL FINDINGS: Clear. IMPRESSION (PRELIMINARY): Normal.", "normal clear"),
        ("FINDINGS: no change in comparison: none. No acute findings: stable. COMPARISON: May.",
         "no change in comparison none no acute findings stable"),
        ("FINDINGS: Clear at 3:30 PM: none. ADDENDUM: later. ADDITIONAL FINDINGS: Rib.", "clear at 3 30 pm none rib"),
        ("FINDING: Clear.\nIMPRESSIONS:\n1. Normal.\n2. Old.", "normal old clear"),
        ("FINDINGS:\n\nIMPRESSION: Normal.", "normal"),
        ("FINDINGS: Clear. ___ IMPRESSION: ___ Normal.", "normal clear"),
        ("Chest: clear. Comparison: none.", "chest clear comparison none"),
    ],
)  # fmt: skip
def test_the_sections_of_a_report(report, expected):
    assert clean(impression_and_findings(report), 100) == expected
    if "\n1." not in report:
        assert clean(impression_and_findings(" ".join(report.split())), 100) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("HISTORY\nCough.\nFINDINGS\nLungs are clear.\n\nIMPRESSION\nNormal.\n", "normal lungs are clear"),
        ("Technique\r\nPortable.\r\nFindings\r\nClear.\r\nImpression: Normal.", "normal clear"),
        ("  FINDINGS AND IMPRESSION (CHEST) \nClear.\nRECOMMENDATION\nCT.", "clear"),
        ("**INDICATION**\nCough.\n**IMPRESSION**\nNormal.", "normal"),
        ("IMPRESSION\nNo acute\nfindings\nin the chest.", "no acute findings in the chest"),  # a wrapped line
        ("Clear. IMPRESSION\nNormal.", "clear impression normal"),  # no line to itself
        ("Lungs\nare clear.\nNo findings", "lungs are clear no findings"),
    ],
)
def test_a_header_without_a_colon_has_a_line_to_itself(report, expected):
    assert clean(impression_and_findings(report), 100) == expected


def test_reports(tmp_path):
    data = open_set(write_reports(tmp_path))
    assert data.task.name == "retrieval"
    assert data.form.shape == (1, 16, 16)
    assert data.classes == ("effusion", "unlabelled")
    found = {}
    for split in every_split(data):
        for image, label, name, text in zip(split.images, split.labels, split.ids, split.texts, strict=True):
            number = int(name.removesuffix(".png"))
            found[number] = None
            assert text == f"report number {number} is here"
            assert int(image.max()) == 5 * number
            assert int(label) == number % 2
    assert sorted(found) == [i for i in range(30) if i % 4 != 2]  # the lateral ones are left out


@pytest.mark.parametrize(("views", "kept"), [("frontal", 16), ("known", 23), ("all", 30)])
def test_views(tmp_path, views, kept):
    data = open_set(write_reports(tmp_path), views=views)
    assert sum(len(split) for split in every_split(data)) == kept


# The vocabulary of MIMIC-CXR's ViewPosition, and how other hospitals write frontal views.
OTHER_VIEWS = (
    "LATERAL", "LL", "AP LLD", "AP RLD", "PA LLD", "PA RLD", "AP AXIAL", "XTABLE LATERAL", "SWIMMERS", "LPO", "RPO",
    "LAO", "RAO", "AP/LATERAL", "AP LATERAL DECUBITUS",
)  # fmt: skip
FRONTAL_VIEWS = "AP", "PA", "ap", "Pa view", "AP/PA", "AP PORTABLE", "AP-erect", "AP (semi-erect)", "PA_upright"


def test_which_views_are_frontal(tmp_path):
    views = (*OTHER_VIEWS, *FRONTAL_VIEWS)
    lines = ["image,report,ViewPosition"]
    for i, view in enumerate(views):
        picture(tmp_path / f"{i}.png", i)
        lines.append(f"{i}.png,The heart is normal.,{view}")
    (tmp_path / "reports.csv").write_text("\n".join(lines))
    names = [name for split in every_split(open_set(tmp_path)) for name in split.ids]
    assert sorted(int(name[:-4]) for name in names) == list(range(len(OTHER_VIEWS), len(views)))


def test_length_of_reports(tmp_path):
    root = write_reports(tmp_path, header="path,text", line='{i}.png,"{label} Seen: a b c"')
    data = open_set(root, shortest=5, longest=5)
    assert {text for split in every_split(data) for text in split.texts} == {"effusion seen a b c"}
    assert sum(len(split) for split in every_split(data)) == 15


def test_tables_of_mimic(tmp_path):
    header = "ViewPosition,Filename,Impression,Findings,Atelectasis,No Finding,Edema"
    line = "PA,{i}.png,Stable.,Line in place; {label}.,-1.0,,1.0"
    data = open_set(write_reports(tmp_path, header=header, line=line))
    assert data.classes == ("edema",)
    assert set(data.clients[0].texts) == {"stable line in place effusion", "stable line in place"}
    missing = line.replace("Stable.", "nan").replace("1.0,,1.0", "NaN,nan,1.0")
    again = open_set(write_reports(tmp_path, header=header, line=missing), shortest=1)
    assert again.classes == ("edema",)
    assert set(again.clients[0].texts) == {"line in place effusion", "line in place"}
    line = line.replace("1.0,,1.0", "0,1.0,1.0")
    assert open_set(write_reports(tmp_path, header=header, line=line)).classes == ("no finding",)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"header": "picture,report", "line": "{i}.png,a b c"}, {}, 'no column "image"; it has picture, report'),
        ({"header": "image,words", "line": "{i}.png,a b c"}, {}, r'no column "report \(or impression and findings\)"'),
        ({}, {"shortest": 9}, r"none of the 30 rows .*0 a report of at least 9 tokens"),
        ({}, {"shortest": 9, "longest": 5}, "shortest is 9, more than longest, 5"),
        ({"header": "image,report", "line": "{i}.png,one two three"}, {"views": "frontal"}, 'no column "view"'),
        ({"line": "{i}.jpg,one two three,x,PA,A"}, {}, r"0\.jpg of .*line 2, is missing"),
        ({"rows": 2}, {}, "too few to hold some out"),
    ],
)
def test_wrong_tables_of_reports(tmp_path, change, options, words):
    with pytest.raises(UserError, match=words):
        open_set(write_reports(tmp_path, **change), **options)


@pytest.mark.parametrize("partition", ["attribute", "stratified"])
def test_feddra_learns_from_reports(tmp_path, partition):
    """Radiographs and reports come from a CSV file, with hospitals or shared-out labels as clients."""
    root = write_reports(tmp_path / "set", rows=60)
    config = RunConfig.make("feddra", data=REPORTS, data_root=str(root), partition=partition, clients=2, rounds=1,
                            local_steps=2, batch_size=4, width=8, client_test=0.2, options={"alignment_steps": 1},
                            data_options={"size": 18, "crop": 16})  # fmt: skip
    metrics = run(config, out=tmp_path / "run")["metrics"]
    assert metrics["gallery"] > 5
    assert main(["evaluate", str(tmp_path / "run"), "--task", "retrieval", "--data", REPORTS]) == 0
    rows = json.loads((tmp_path / "run" / "evaluate-retrieval-reports.json").read_text())["rows"]
    assert [row["set"] for row in rows] == ["seen", "clients, mean", "clients, worst"]
    assert 0 <= metrics["i2t_r1"] <= 1
    assert metrics["mean_client_loss"] <= metrics["worst_client_loss"]


def test_the_window_and_the_colour_are_options(tmp_path):
    data = open_set(write_reports(tmp_path), crop=8, colour="rgb")
    assert data.form.shape == (3, 8, 8)
    assert data.form.augment == "window"
    assert all(split.images.shape[2:] == (16, 16) for split in data.clients)
    with pytest.raises(UserError, match='data set "reports": crop is 32, more than size, 16'):
        open_set(tmp_path, crop=32)


def test_columns_by_other_names_and_whole_patients(tmp_path):
    line = "{i}.png,some words of {label},no,{i}"
    write_reports(tmp_path, header="photo,words,findings,person", line=line)
    rows = (tmp_path / "reports.csv").read_text().splitlines()
    cells = [row.rpartition(",") for row in rows[1:]]
    table = [rows[0], *(f"{row},p{int(number) // 3}" for row, _, number in cells)]
    (tmp_path / "reports.csv").write_text("\n".join(table))
    data = open_set(tmp_path, image="photo", report="words", patient="person", shortest=2)
    people = [{int(name.removesuffix(".png")) // 3 for name in split.ids} for split in every_split(data)]
    assert sum(map(len, people)) == len(set.union(*people)) == 10
    assert all(text.startswith("some words of") for split in every_split(data) for text in split.texts)


def test_prompts_are_the_names_of_classes_alone():
    assert lookup(REPORTS).prompts == "{class}"


def test_uncertain_findings_are_not_no_finding(tmp_path):
    cells = ["1,", "-1,", "-1.0,0.0", "0,0", ",", "-1,1.0", "-1,NA", "0.0,-1.00"]
    names = ["edema", *["unlabelled"] * 2, *["no finding"] * 2, "fracture", *["unlabelled"] * 2]
    lines = ["image,report,Edema,Fracture"]
    for i in range(32):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,a report of {i},{cells[i % 8]}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    said = []
    data = load(REPORTS, root=tmp_path, options={"size": 8}, partition="iid", clients=2, notice=said.append)
    for split in data.clients:
        rows = [int(name.removesuffix(".png")) for name in split.ids]
        assert [data.classes[label] for label in split.labels.tolist()] == [names[row % 8] for row in rows]
    assert said[-1].startswith("Rows of list.csv without a positive finding and with an uncertain one (-1): 16; their")


# -- slides ------------------------------------------------------------------------------------------------------------


BARS = torch.zeros(10, 28, 28, dtype=torch.bool)
for digit in range(10):
    BARS[digit, 6:22, 2 * digit + 3 : 2 * digit + 7] = True


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write eight slides with spots of about twelve pixels, and digits that are bars."""
    write_slides(tmp_path, [(300, 300)] * 8)
    for name, count in (("train", 1200), ("t10k", 400)):
        labels = np.arange(count) % 10
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(255 * BARS[labels].numpy()))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


def write_slides(root: Path, sizes: list[tuple[int, int]]) -> None:
    (root / "image").mkdir()
    for number, size in enumerate(sizes):
        spots = torch.rand(1, 1, size[0] // 12, size[1] // 12, generator=torch.Generator().manual_seed(number))
        grey = (255 * interpolate(spots, size, mode="bilinear")[0, 0]).byte().numpy()
        Image.fromarray(grey).save(root / "image" / f"{number}.png")


def texture(split: Split) -> torch.Tensor:
    """Return how much every ground changes down and across, [n, 2]: a crop's height and width."""
    ground, seen = split.images[:, 0].float(), ~BARS[split.labels]
    ground = ground.masked_fill(~seen, torch.nan)
    return torch.stack([ground.diff(dim=axis).abs().nanmean((1, 2)).log() for axis in (1, 2)], 1)


def explain(splits: list[Split]) -> float:
    """Return the share of the textures' variance that lies between the classes of the clients."""
    groups = [texture(split)[split.labels == label] for split in splits for label in range(10)]
    inside = sum(((group - group.mean(0)) ** 2).sum() for group in groups)
    rows = torch.cat(groups)
    return float(1 - inside / ((rows - rows.mean(0)) ** 2).sum())


def test_textures_are_tied_to_class_and_client_and_not_in_the_test(root: Path) -> None:
    tied, free, half = (
        load(SLIDES, root=root, options={"samples": 1000, "correlation": share}) for share in (1.0, 0.0, 0.5)
    )
    assert tied.client_sizes == (200,) * 5
    assert explain(list(tied.clients)) > 0.8
    assert explain([tied.clients[0].plus(tied.clients[1:])]) < 0.4  # clients have ties of their own
    assert explain(list(free.clients)) < 0.2
    assert 0.2 < explain(list(half.clients)) < explain(list(tied.clients)) - 0.2
    assert explain([tied.tests["ood"]]) < 0.2
    assert len(tied.tests["id"]) == len(tied.tests["ood"]) == 400


def test_masks_are_exact_and_ink_is_black_or_white(root: Path) -> None:
    data = load(SLIDES, root=root, options={"samples": 300})
    for split in data.clients:
        assert torch.equal(split.masks, BARS[split.labels])
        ink = torch.stack([image[0][mask] for image, mask in zip(split.images, split.masks, strict=True)])
        white, black = (ink >= 178).all(1), (ink <= 77).all(1)
        assert bool((white | black).all())
        assert 0.2 < white.double().mean() < 0.8


def test_grounds_have_one_brightness_and_contrast(root: Path) -> None:
    split = load(SLIDES, root=root, options={"samples": 1000}).clients[0]
    ground = split.images[:, 0].float().masked_fill(split.masks, torch.nan)
    means = ground.nanmean((1, 2))
    assert (means - 128).abs().mean() < 10
    assert ((ground - means[:, None, None]) ** 2).nanmean((1, 2)).sqrt().sub(45).abs().mean() < 6


def test_the_seed_decides_and_tests_show_slides_that_no_client_has(root: Path) -> None:
    drawn, again, reseeded = (load(SLIDES, root=root, seed=seed, options={"samples": 100}) for seed in (0, 0, 1))
    for a, b, c in zip(
        [*drawn.clients, *drawn.tests.values()], [*again.clients, *again.tests.values()],
        [*reseeded.clients, *reseeded.tests.values()], strict=True,
    ):  # fmt: skip
        assert torch.equal(a.images, b.images)
        assert not torch.equal(a.images, c.images)
    for number in (6, 7):  # the last quarter
        Image.new("L", (300, 300), 7).save(root / "image" / f"{number}.png")
    changed = load(SLIDES, root=root, seed=0, options={"samples": 100})
    assert all(torch.equal(a.images, b.images) for a, b in zip(drawn.clients, changed.clients, strict=True))
    assert torch.equal(drawn.validation.images, changed.validation.images)
    flat = changed.tests["ood"].images[:, 0][~BARS[changed.tests["ood"].labels]]
    assert flat.unique().tolist() == [128]


@pytest.mark.usefixtures("undrawn")
def test_a_run_replaces_backgrounds(root: Path, tmp_path: Path) -> None:
    words = "--data-option samples=100 --rounds 1 --width 2 --method-option intervene=image --grad-cam 0"
    folders = ["--data", SLIDES, "--data-root", str(root), "--out", str(tmp_path / "run")]
    assert main(["fedgid", *folders, *words.split()]) == 0


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([(300, 300)], r"at least 216 pixels a side, in .*image, found 1 of the sizes \[\(300, 300\)\]"),
        ([(300, 300), (300, 200)], r"found 2 of the sizes \[\(300, 200\), \(300, 300\)\]"),
        ([(200, 300)] * 2, r"found 2 of the sizes \[\(200, 300\)\]"),
        (None, "found 0 of the sizes"),
    ],
)
def test_slides_that_do_not_do(root: Path, sizes: list[tuple[int, int]] | None, said: str) -> None:
    for path in (root / "image").iterdir():
        path.unlink()
    (root / "image").rmdir()
    if sizes is not None:
        write_slides(root, sizes)
    with pytest.raises(UserError, match=said):
        load(SLIDES, root=root)
