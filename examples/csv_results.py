"""Results in a CSV file, of any program, beside runs of fedkern with the same seeds.

python examples/csv_results.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import fedkern

RESULTS = Path(__file__).with_name("results.csv")  # a row for each round: algo, seed, epoch, test_acc, test_loss
COLUMNS = "method=algo,seed,round=epoch,accuracy=test_acc,loss=test_loss"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        words = ["import", str(RESULTS), "--columns", COLUMNS, "--percent", "accuracy", "--framework", "PyTorch"]
        subprocess.run([sys.executable, "-m", "fedkern.run", *words, "--out", f"{folder}/imported"], check=True)
        settings = {"data": "digits", "partition": "iid", "clients": 5, "rounds": 5, "model": "mlp", "width": 32}
        runs = fedkern.compare(["fedprox"], seeds=3, lr=0.1, out=f"{folder}/fedkern", progress=False, **settings)
        print(fedkern.compare([f"{folder}/imported", runs.folder], out=f"{folder}/comparison"))
