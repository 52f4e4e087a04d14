"""Words of other programs, other commands and Python: the answer names fedkern's word."""

import pytest

import fedkern
from fedkern.errors import SYNONYMS, suggest_name
from fedkern.listeners import Listener
from fedkern.settings.config import RunConfig

COMMAND_LINES = {
    "fedavg --learning-rate 0.1": 'Did you mean "--lr"?',
    "compare fedavg scaffold --learning-rate 0.1": 'Did you mean "--lr"?',
    "compare fedavg --sweep learning_rate=0.1,0.2": 'Did you mean "lr"?',
    "fedavg --gpu": 'Did you mean "--device=cuda"?',
    "fedavg --device gpu": 'Did you mean "cuda"?',
    "fedavg --epochs 3": 'Did you mean "--local-epochs" or "--rounds"?',
    "fedavg --mu 1": "It is a method option of fedprox",
    "fedavg --teacher clip": "It is a method option of",
    "fedprox --mu 1": "write --method-option mu=VALUE",
    "--resume": "write --resume DIR.",
    "evaluate x --data": "write --data NAME.",
    "resume runs/x": 'Did you mean "--resume"?',
    "fedavg scaffold": "compare fedavg scaffold plays both",
    "fedavg more": "values follow their flag.",
    "fedavg --lr 1e-3,1e-2": "compare METHOD --sweep lr=1e-3,1e-2.",
    "fedavg --rounds 3,5": "--sweep rounds=3,5.",
    "fedprox --method-option mu=0.1,1": "--sweep mu=0.1,1.",
    "fedavg --data images/cats": "--data-root images/cats.",
    "fedavg --loss mse": '"--loss". A loss of your own is given in Python, fedkern.simulate(METHOD, data=..., loss_fn=',
    "fedavg --num-clients 3": 'Did you mean "--clients"?',
    "fedavg --nodes 3": 'Did you mean "--clients"?',
    "fedavg --noniid": 'Did you mean "--partition=dirichlet:ALPHA"?',
    "fedavg --alpha 0.1": 'Did you mean "--partition=dirichlet:ALPHA"? It is a method option of feddyn',
    "fedavg --seeds 3": 'Did you mean "--seed"? For several seeds use compare --seeds N.',
    "fedavg --task multilabel": "--data-option task=NAME decides",
    "fedavg --lora-rank 4": "LoRA is the method fedlora, whose options are rank",
    "fedbn": "FedBN is fedavg and the names of the batch norms, --personal NAMES",
    "fedadam": "are fedavg and --server-rule momentum, adam",
    "fedavg --model lora": "LoRA is the method fedlora",
    "fedavg --data nifti": "--data FILE.py:NAME, as examples/papers/brats.py:brats",
    "fedavg --data scans/a.nii.gz": "Volumes are read by your own code",
    "export x --format ONNX": 'Did you mean "onnx"?',
    "FedAvg": 'Did you mean "fedavg"?',
    "fedavg --model ResNet8": 'Did you mean "resnet8"?',
}


@pytest.mark.parametrize(("line", "way"), COMMAND_LINES.items(), ids=COMMAND_LINES)
def test_the_command_line_names_the_way_out(line, way, fails, tmp_path):
    assert way in fails(*line.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ({"learning_rate": 0.1}, 'Did you mean "lr"?'),
        ({"epochs": 3}, 'Did you mean "local_epochs" or "rounds"?'),
        ({"gpu": True}, 'Did you mean "device=cuda"?'),
        ({"loss": 1}, 'Did you mean "loss_fn"?'),
        ({"nodes": 3}, 'Did you mean "clients"?'),
        ({"seeds": 3}, 'Did you mean "seed"? For several seeds use compare seeds=N.'),
        ({"task": "multilabel"}, 'data_options={"task": NAME} decides'),
        ({"method": "fedbn"}, "the names of the batch norms, personal=NAMES"),
        ({"mu": 1.0}, "It is a method option of fedprox"),
        ({"resume": True}, 'Did you mean "fedkern.load(DIR).resume()"?'),
        ({"output_dir": "runs"}, 'Did you mean "out"?'),
        ({"quiet": True}, 'Did you mean "progress=False"?'),
        ({"tensorboard": True}, 'Did you mean "listener=fedkern.listeners.TensorBoard()"?'),
        ({"lr": [1e-3, 1e-2]}, 'fedkern.compare(METHOD, sweep={"lr": [0.001, 0.01]})'),
        ({"data": "images/cats"}, 'data="folder", or csv for a list of them, with data_root="images/cats".'),
        ({"method": ["fedavg", "scaffold"]}, "fedkern.compare takes several"),
    ],
)
def test_python_names_the_way_out(given, way, tmp_path):
    with pytest.raises(fedkern.UserError) as error:
        fedkern.simulate(**{"method": "fedavg", **given})
    assert way in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_meaning_is_a_setting_an_argument_or_a_call():
    settings = {setting.field for setting in RunConfig.list_options()}
    words = ("out", "resume", "progress", "listener", "cuda", "fedkern.load(DIR).resume()", "loss_fn")
    arguments = {*words, *vars(Listener)}
    assert {name.partition("=")[0] for names in SYNONYMS.values() for name in names} <= settings | arguments
    assert not SYNONYMS.keys() & settings


@pytest.mark.parametrize(
    ("word", "candidates", "said"),
    [
        ("--batchsize", ["--batch-size", "--base"], ' Did you mean "--batch-size"?'),
        ("BATCH_SIZE", ["--batch-size"], ' Did you mean "--batch-size"?'),
        ("gpu", ["rounds"], ""),
        ("overwrite", ["server_rule"], ""),
        ("Cat", ["cat", "dog"], ' Did you mean "cat"?'),
        ("zzz", [], ""),
    ],
)
def test_the_nearest_word(word, candidates, said):
    assert suggest_name(word, candidates) == said
