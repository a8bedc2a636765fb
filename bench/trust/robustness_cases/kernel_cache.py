"""Libraries in the cache that somebody else may have put there (attack: the kernel cache)."""

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

from bench.trust.robustness_cases.inputs import Skip, Trial, tried


def kernels(t: Trial) -> Path:
    """A cache of this trial's own with the compiled kernels; Skip where there are none."""
    cache = t.folder / "cache"
    shutil.copytree(os.environ["TINYLORA_CACHE"], cache)
    if not list(cache.glob("kernels/*.so")):
        raise Skip("no kernels were compiled here")
    return cache


def poisoned(t: Trial, cache: Path, mark: Path) -> dict[str, str]:
    """Put a library in the place of each that leaves a mark when it is loaded; a compiler that makes no other."""
    source = (
        f'#include <stdio.h>\n__attribute__((constructor)) static void f(void) {{ fclose(fopen("{mark}", "w")); }}\n'
    )
    t.write("p.c", source)
    made = t.folder / "p.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, t.folder / "p.c"], check=True, timeout=60)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()[:16]  # it stands in the name, as the program writes it
    for library in cache.glob("kernels/*.so"):
        shutil.copy(made, library.with_name(f"{library.stem.split('-')[0]}-{digest}.so"))
        library.unlink()
    compiler = t.write("cc", '#!/bin/sh\ncase "$*" in *version*) exec cc "$@" ;; esac\nexit 1\n')
    compiler.chmod(0o755)
    return {"TINYLORA_CACHE": str(cache), "CC": str(compiler)}


@tried("27 kernel cache: my library, in a folder of mine", "it is loaded (or else the next inputs prove nothing)")
def _(t: Trial) -> None:
    if shutil.which("cc") is None:
        raise Skip("needs a C compiler")
    mark = t.folder / "loaded"
    environment = poisoned(t, kernels(t), mark)
    for path in [t.folder / "cache", *(t.folder / "cache").rglob("*")]:
        path.chmod(0o700)
    t.recipe()
    t.run("train", "t.toml", env=environment, may_fail=True)
    t.came.clear()  # the library has no kernels in it: what becomes of the run is not asked
    t.check(mark.exists(), "it is not loaded, so the poison is none")


@tried("27 kernel cache: a library of another user", "it is not loaded")
def _(t: Trial) -> None:
    if os.geteuid() != 0 or shutil.which("cc") is None:
        raise Skip("needs root and a C compiler")
    cache, mark = kernels(t), t.folder / "loaded"
    environment = poisoned(t, cache, mark)
    for path in [cache / "kernels", *cache.glob("kernels/*")]:
        os.chown(path, 65534, 65534)
    (cache / "kernels").chmod(0o777)
    t.recipe()
    came = t.run("train", "t.toml", env=environment)
    t.check(not mark.exists(), "the library of another user was loaded")
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried(
    "27 kernel cache: my library in a folder that everyone may write", "it is not loaded, or the folder is closed first"
)
def _(t: Trial) -> None:
    if shutil.which("cc") is None:
        raise Skip("needs a C compiler")
    cache, mark = kernels(t), t.folder / "loaded"
    environment = poisoned(t, cache, mark)
    for library in cache.glob("kernels/*.so"):
        library.chmod(0o777)
    (cache / "kernels").chmod(0o777)
    t.recipe()
    came = t.run("train", "t.toml", env=environment)
    t.check(not mark.exists(), "a library that everyone may write was loaded")
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried("27 kernel cache: the mode of its folder", "0700 for what tinylora makes")
def _(t: Trial) -> None:
    folder = Path(os.environ["TINYLORA_CACHE"]) / "kernels"
    if not folder.is_dir():
        raise Skip("no kernels were compiled here")
    mode = stat.S_IMODE(folder.stat().st_mode)
    t.check(mode & 0o077 == 0, f"its mode is {mode:o}")
