"""Fine-tuning: clients start from a trained network without its classifier, and leave its first stage as it is.

The same in one command, with any file of weights:
python -m fedkern.run fedavg --data digits --model cnn --init net.pt --init-partial --freeze 'layer1*' --lr 0.02
"""

import tempfile

import torch

import fedkern

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        how = {"data": "digits", "model": "cnn", "progress": False, "pictures": False}
        trained = fedkern.simulate("centralised", rounds=3, seed=1, out=f"{folder}/trained", **how).model()
        torch.save({"state_dict": trained.state_dict()}, f"{folder}/net.pt")
        given = {"init": f"{folder}/net.pt", "init_partial": True, "freeze": ["layer1*"], "lr": 0.02}
        for name, start in (("from scratch", {"lr": 0.02}), ("from the trained network", given)):
            run = fedkern.simulate("fedavg", **start, rounds=3, out=f"{folder}/{name}", **how)
            print(f"accuracy after 3 rounds {name}: {run.metrics['accuracy']:.2f}")
