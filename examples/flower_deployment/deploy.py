"""A Flower deployment on one host: TLS, SuperNode authentication, three sites with data folders of their own.

python examples/flower_deployment/deploy.py [FOLDER]

Every process runs a command that you would type on the machine of its own; the script prints these commands.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from fedkern.data.sources.digits import small_digits

HOST, SITES = "127.0.0.1", ("north", "east", "south")
METHOD = "scaffold"
SETTINGS = [
    "--data", "folder", "--data-option", "size=32", "--data-option", "colour=grey", "--clients", str(len(SITES)),
    "--model", "cnn", "--width", "8", "--rounds", "3", "--local-epochs", "2",
]  # fmt: skip


# -- certificates and keys ---------------------------------------------------------------------------------------------


def certificates(folder: Path, host: str = HOST) -> dict[str, Path]:
    """Make an authority, and the SuperLink's certificate signed by it; the authority's private key is not kept.

    Returns:
        The files "authority", "certificate" and "key".
    """
    folder.mkdir(parents=True, exist_ok=True)
    signer, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority of this federation")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host)), x509.DNSName("localhost")])
    authority = (
        _certificate(issuer, issuer, signer.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    certificate = (
        _certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SuperLink")]), issuer, server.public_key())
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    plain = serialization.NoEncryption()
    key = server.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    files = {
        "authority": (folder / "authority.pem", authority.public_bytes(serialization.Encoding.PEM)),
        "certificate": (folder / "superlink.pem", certificate.public_bytes(serialization.Encoding.PEM)),
        "key": (folder / "superlink.key", key),
    }
    for path, content in files.values():
        _write_private(path, content)
    return {name: path for name, (path, _) in files.items()}


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=30))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def node_key(path: Path) -> tuple[Path, Path]:
    """Make a SuperNode's key pair in OpenSSH's form, as ``ssh-keygen -t ecdsa -b 384`` does.

    Returns:
        The files of the private and of the public key; the private one never leaves its site.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    public = path.with_name(f"{path.name}.pub")
    _write_private(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(*openssh) + b"\n")
    return path, public


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


# -- processes ---------------------------------------------------------------------------------------------------------


class Processes:
    """Processes that end with the block, in reverse order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, list[subprocess.Popen[bytes]]()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in reversed(self.running):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    continue

    def start(self, name: str, command: list[str], ready: str) -> str:
        """Start a process in a group of its own and wait until its log has words; give the log so far."""
        log, home = self.folder / f"{name}.log", self.folder / name
        home.mkdir()
        print(f"$ {shlex.join(command)}", flush=True)
        with log.open("wb") as file:
            environment = {**os.environ, "FLWR_HOME": str(home), "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.running.append(process)
        for _ in range(600):
            text = log.read_text(errors="replace")
            if re.search(ready, text):
                return text
            if process.poll() is not None:
                break
            time.sleep(0.1)
        sys.exit(f"{name} has not started:\n{log.read_text(errors='replace')}")


def run(*command: str, home: Path | None = None) -> None:
    """Print a command and run it."""
    print(f"$ {shlex.join(command)}", flush=True)
    environment = os.environ if home is None else {**os.environ, "FLWR_HOME": str(home)}
    subprocess.run(command, env=environment, check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# -- the federation ----------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> dict[str, Path]:
    """Give every machine a folder of images: handwritten digits, of which each site has more of some digits.

    The server's folder has the test images, and one training image of each digit, which is not used.

    Returns:
        The folders of the server and of the sites.
    """
    images, labels = small_digits()
    images = (images * 15.9375).astype(np.uint8)
    rng = np.random.default_rng(0)
    held = np.where(rng.random(len(images)) < 0.6, labels % len(SITES), rng.integers(len(SITES), size=len(images)))
    written: Counter[tuple[str, int]] = Counter()
    for number, (pixels, digit, site) in enumerate(zip(images, labels, held, strict=True)):
        machine = "server" if number % 5 == 0 else SITES[site]
        first = written[machine, digit] == 0
        part = "train" if first == (machine == "server") else "test"  # a site has one test image of each digit
        written[machine, digit] += 1
        path = folder / machine / part / str(digit) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return {machine: folder / machine for machine in ("server", *SITES)}


def main(folder: Path) -> int:
    files, data = certificates(folder / "certificates"), write_data(folder / "data")
    keys = {site: node_key(folder / "keys" / site) for site in SITES}
    project, home, port = folder / "project", folder / "home", free_port()
    superlink = f"{HOST}:{port}"
    run(sys.executable, "-m", "fedkern.run", METHOD, *SETTINGS, "--data-root", str(data["server"]),
        "--out", str(folder / "run"), "--flower", str(project), "--own-data")  # fmt: skip
    with Processes(folder) as processes:
        processes.start(
            "superlink",
            ["flower-superlink", "--host", HOST, "--port", str(port), "--ssl-ca-certfile", str(files["authority"]),
             "--ssl-certfile", str(files["certificate"]), "--ssl-keyfile", str(files["key"]),
             "--enable-supernode-auth", "--disable-runtime-dependency-installation"],
            "Uvicorn running on",
        )  # fmt: skip
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "hospitals"\n\n[superlink.hospitals]\naddress = "{superlink}"\n'
            f'root-certificates = "{files["authority"]}"\n'
        )
        for _, public in keys.values():
            run("flwr", "supernode", "register", str(public), "hospitals", home=home)
        for k, (site, (private, _)) in enumerate(keys.items()):
            config = f'partition-id={k} num-partitions={len(SITES)} data-root="{data[site]}" '
            config += f'state-dir="{folder / "states" / site}"'
            processes.start(
                site,
                ["flower-supernode", "--superlink", superlink, "--root-certificates", str(files["authority"]),
                 "--auth-supernode-private-key", str(private), "--port", str(free_port()), "--node-config", config],
                "SuperNode ID",
            )  # fmt: skip
        run(sys.executable, "-m", "fedkern.run", "flower", str(project), "--superlink", "hospitals", home=home)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    print(f"accuracy of {METHOD} over {len(SITES)} sites: {summary['metrics']['accuracy']:.3f}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).absolute()))
    with tempfile.TemporaryDirectory(prefix="flower-deployment-", ignore_cleanup_errors=True) as temporary:
        sys.exit(main(Path(temporary)))
