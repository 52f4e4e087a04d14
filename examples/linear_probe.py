"""A linear probe: a trained network stays as it is, and the clients train a new classifier on it.

The same in one command, with any file of weights:
python -m fedkern.run fedavg --data digits --model cnn --init net.pt --init-partial --freeze 'layer*'
"""

import tempfile

import torch

import fedkern

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        how = {"data": "digits", "model": "cnn", "progress": False, "pictures": False}
        trained = fedkern.simulate("centralised", rounds=3, seed=1, out=f"{folder}/trained", **how).model()
        weights = {name: value for name, value in trained.state_dict().items() if not name.startswith("head")}
        torch.save(weights, f"{folder}/net.pt")
        given = {"init": f"{folder}/net.pt", "init_partial": True, "freeze": "layer*"}
        run = fedkern.simulate("fedavg", **given, rounds=3, out=f"{folder}/probe", **how)
        record = run.history.records[-1]
        print(f"accuracy of the probe: {run.metrics['accuracy']:.2f}, {record['bytes_up']:,} bytes up")
