"""Sources in csrc/ of each operator: other operators' kernels may change without making its rows outdated."""

import functools
import re
from pathlib import Path

from fedkern.ops._core.loading import source_hash

CSRC = Path(__file__).parent.parent / "csrc"
# The operators that the files of a family serve; others, such as whole steps of training, use several families.
GROUPS = {
    "aggregate": (
        "aggregate",
        "clip_and_noise",
        "clip_by_norm",
        "flower",
        "geometric_median",
        "krum",
        "median",
        "pairwise_distances",
        "server_step",
        "trimmed_mean",
    ),
    "blend": ("blend", "boxes"),
    "contrast": ("contrast",),
    "conv": ("conv", "guest"),
    "distill": ("consensus", "dual_kl", "ensemble_kl", "entropy", "js_div", "kl_div"),
    "optimise": ("optimise",),
    "mlp": (),
    "sparse": ("sparse_kl",),
    "strided": (),
    "fuse": ("fuse_concat", "fuse_mean"),
}
FAMILIES = {group: family for family, groups in GROUPS.items() for group in groups}


def family(group: str) -> str:
    """Return the family of kernels that an operator's rows measure, or "" for all of them."""
    return FAMILIES.get(group, "")


def hash_of(folder: Path, core: str, name: str) -> str:
    """Return a hash over ``folder`` (csrc/) but for the files of other families and those that have a line for each."""
    if not name:
        return source_hash(folder, core)
    names = "|".join(group for group in GROUPS if group != name)
    files = rf"^(?:cpu/|cuda/|bindings/(?:cpu_|cuda_)?|include/fedkern/)(?:{names})(?:_\w+)?\.\w+$"
    # These register functions, ask whether tensors suit them, and choose among kernels.
    shared = r"^bindings/(?:cpu|cuda|cpu_tensors|cpu_source_hash)\.cpp$|^(?:cpu|include/fedkern)/isa\.(?:h|cpp)$"
    without = f"{files}|{shared}"
    return source_hash(folder, core, re.compile("|".join([without, *_list_unused(folder, core, re.compile(without))])))


def _list_unused(folder: Path, core: str, without: re.Pattern[str]) -> list[str]:
    """Return headers that no file of the core includes, as patterns."""
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.[ch]*")}
    texts = {name: text for name, text in texts.items() if not without.search(name)}
    headers = {name for name in texts if name.endswith(("h", "cuh"))}
    used = {name for name in set(texts) - headers if name.startswith((f"{core[1:]}/", f"bindings/{core[1:]}"))}
    while True:
        asked = {part for name in used for part in re.findall(r'#include "(?:.*/)?(.*)"', texts[name])}
        found = {name for name in headers - used if Path(name).name in asked}
        if not found:
            return [f"^{re.escape(name)}$" for name in headers - used]
        used |= found


@functools.cache
def behind(backend: str, core: str, group: str) -> str:
    """Return the hash for rows that a ``core`` of this hash serves, "" where that is none or not built from csrc/."""
    name = module(backend)
    return hash_of(CSRC, name, family(group)) if core and core == hash_of(CSRC, name, "") else ""


def module(backend: str) -> str:
    """Return the compiled core that a row's backend names."""
    return "_cuda" if "cuda" in backend else "_cpu"


def hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of all families, by the names of :func:`key`, "" without a ``folder``."""
    return {key(core, name): hash_of(folder, core, name) for core in ("_cpu", "_cuda") for name in ("", *GROUPS)}


def key(core: str, name: str) -> str:
    """Return ``"_cpu"`` for all of a core, ``"_cpu blend"`` for the sources of a family."""
    return f"{core} {name}".strip()
