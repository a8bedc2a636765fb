"""The run folder: one process at a time, nothing lost to a kill or a full disk, tensors back bit for bit."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinylora.config.resume import resume_config
from tinylora.config.run import OptimConfig, RunConfig
from tinylora.errors import UserError
from tinylora.store.run_folder import RunFolder
from tinylora.system.cores import available_threads
from tinylora.system.environment import collect_environment, numeric_differences
from tinylora.system.jsonl import JsonlWriter, read_jsonl

needs_posix = pytest.mark.skipif(os.name == "nt", reason="kill -9 and fork are POSIX")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", "demo", RunConfig(), {"python": "3.11"})


def hard_tensors() -> dict[str, torch.Tensor]:
    """Values that a careless writer changes: NaN payloads, denormals, -0.0, the last bit."""
    bits32 = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    bits64 = np.random.default_rng(1).integers(0, 2**64, 1000, dtype=np.uint64)
    shared = torch.arange(6, dtype=torch.float32)
    return {
        "v": torch.from_numpy(bits32.view(np.float32)).reshape(10, 100),
        "m": torch.from_numpy(bits64.view(np.float64)),
        "zero": torch.tensor([0.0, -0.0, 5e-324], dtype=torch.float64),
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 13),
        "transposed": shared.reshape(2, 3).T,
        "same memory": shared,
        "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
        "mask": torch.tensor([True, False]),
        "leaf": torch.nn.Parameter(torch.ones(2)),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(x, y)


# --- folder ---


def test_create_numbers_folders_and_fills_them(tmp_path: Path) -> None:
    config = RunConfig(optim=OptimConfig(lr=0.3))
    first, second = (RunFolder.create(tmp_path / "runs", "demo", config, {"cores": 2}) for _ in range(2))
    assert (first.path.name, second.path.name) == ("demo-001", "demo-002")
    assert RunFolder.open(first.path).read_config() == config
    assert first.read_environment() == {"cores": 2}
    (tmp_path / "runs" / "demo-041").mkdir()
    (tmp_path / "runs" / "demo-099-copy").mkdir()
    (tmp_path / "runs" / "demo-1000").mkdir()
    assert RunFolder.create(tmp_path / "runs", "demo", config, {}).path.name == "demo-1001"
    assert RunFolder.create(tmp_path / "runs", "gsm8k", config, {}).path.name == "gsm8k-001"


@needs_posix
def test_processes_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from tinylora.config.run import RunConfig
        from tinylora.store.run_folder import RunFolder
        sys.stdin.readline()
        for _ in range(25):
            print(RunFolder.create(Path(sys.argv[1]), "demo", RunConfig(), {}).path.name)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    names = [name for process in both for name in process.communicate(timeout=60)[0].split()]
    assert len(names) == len(set(names)) == 50


def test_bad_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        RunFolder.open(tmp_path)
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(UserError, match="a run's name must be"):
            RunFolder.create(tmp_path, name, RunConfig(), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        RunFolder.create(tmp_path / "file", "demo", RunConfig(), {})


# --- checkpoints ---


def test_tensors_and_values_come_back_exactly(folder: RunFolder) -> None:
    tensors = hard_tensors()
    values = {"step": 7, "lr": 0.1 + 0.2, "best": None, "tiny": 5e-324, "worst": float("-inf"), "done": False,
              "big": 2**200, "rng": {"state": [1, 2, [3]]}, "text": "ü\n\0"}  # fmt: skip
    state: dict[str, Any] = {f"t.{k}": v for k, v in tensors.items()} | {f"j.{k}": v for k, v in values.items()}
    with folder.lock():
        folder.save_checkpoint(state)
    loaded = folder.load_checkpoint()
    assert loaded is not None
    assert loaded.warning == ""
    assert list(loaded.state) == list(state)
    for name, tensor in tensors.items():
        assert same_bits(loaded.state[f"t.{name}"], tensor), name
    for name, value in values.items():
        assert repr(loaded.state[f"j.{name}"]) == repr(value)


def test_checkpoint_is_a_plain_safetensors_file(folder: RunFolder) -> None:
    from safetensors.numpy import load_file

    with folder.lock():
        path = folder.save_checkpoint({"v": torch.tensor([1.5, 2.0]), "step": 1})
    np.testing.assert_array_equal(load_file(path)["v"], [1.5, 2.0])


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": (1,)}, np.float64(1.0), b"x", {"t": torch.ones(1)}, {1}])
def test_values_that_would_come_back_changed_are_refused(folder: RunFolder, value: object) -> None:
    with folder.lock(), pytest.raises(TypeError, match="checkpoint state 'x'"):
        folder.save_checkpoint({"x": value})
    assert folder.load_checkpoint() is None


def test_newest_and_previous_are_kept(folder: RunFolder) -> None:
    with folder.lock():
        for step in range(1, 6):
            folder.save_checkpoint({"step": step})
    assert sorted(p.name for p in folder.checkpoint_dir.iterdir()) == [
        "state-00000004.safetensors", "state-00000005.safetensors",
    ]  # fmt: skip
    checkpoint = folder.load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.state["step"] == 5


def test_every_kind_of_damage_falls_back_to_the_previous_checkpoint(folder: RunFolder) -> None:
    """Each byte of the newest file is flipped in turn, and the file is cut at several lengths: never a wrong state."""
    with folder.lock():
        folder.save_checkpoint({"v": torch.tensor([1.0, 2.0]), "step": 1})
        path = folder.save_checkpoint({"v": torch.tensor([3.0, 4.0]), "step": 2})
    good = path.read_bytes()
    damaged = [good[:n] for n in (0, 1, 7, 8, 9, 100, len(good) - 1)] + [good + b"\0", os.urandom(len(good))]
    damaged += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    fell_back = 0
    for data in damaged:
        path.write_bytes(data)
        checkpoint = folder.load_checkpoint()
        assert checkpoint is not None
        step = checkpoint.state["step"]
        assert checkpoint.state["v"].tolist() == {1: [1.0, 2.0], 2: [3.0, 4.0]}[step]
        if step == 1:
            fell_back += 1
            assert "checkpoint state-00000002.safetensors is corrupt" in checkpoint.warning
            assert "going on from the one before it" in checkpoint.warning
    # a flip may leave the meaning alone (padding of the header), nothing else may
    assert fell_back >= len(damaged) - 8


def test_resume_after_damage_keeps_two_good_checkpoints(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    with folder.lock():
        folder.save_checkpoint({"step": 1})
        folder.save_checkpoint({"step": 2}).write_bytes(b"broken")
        checkpoint = folder.resume()
        assert checkpoint is not None
        assert checkpoint.state == {"step": 1}
        assert "is corrupt" in caplog.text
        path = folder.save_checkpoint({"step": 2})
        path.write_bytes(b"broken again")
        checkpoint = folder.load_checkpoint()
        assert checkpoint is not None
        assert checkpoint.state == {"step": 1}  # not thrown away in favour of the broken one


def test_no_whole_checkpoint_left_is_an_error(folder: RunFolder) -> None:
    with folder.lock():
        folder.save_checkpoint({"step": 1}).write_bytes(b"")
    with pytest.raises(UserError, match=r"is corrupt.*start a new run"):
        folder.load_checkpoint()


def test_writing_needs_the_lock(folder: RunFolder) -> None:
    with pytest.raises(RuntimeError, match="lock"):
        folder.save_checkpoint({"step": 1})
    with pytest.raises(RuntimeError, match="lock"):
        folder.resume()


# --- JSONL files ---


def run_steps(folder: RunFolder, start: int, stop: int, checkpoint: bool = True) -> None:
    with JsonlWriter(folder.metrics_path) as metrics, JsonlWriter(folder.samples_path) as samples:
        for step in range(start, stop):
            metrics.append({"step": step, "reward": step / 7})
            for k in range(step % 3):
                samples.append({"step": step, "text": "ü" * k})
            if checkpoint:
                folder.save_checkpoint({"step": step + 1})


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "rew'])
def test_resumed_files_equal_those_of_an_uninterrupted_run(tmp_path: Path, torn: bytes) -> None:
    whole, cut = (RunFolder.create(tmp_path, "demo", RunConfig(), {}) for _ in range(2))
    with whole.lock():
        run_steps(whole, 0, 12)
    with cut.lock():
        run_steps(cut, 0, 5)
        run_steps(cut, 5, 9, checkpoint=False)  # written, then killed before any checkpoint counted them
    with cut.metrics_path.open("ab") as file:
        file.write(torn)
    with cut.lock():
        checkpoint = cut.resume()
        assert checkpoint is not None
        assert len(read_jsonl(cut.metrics_path)) == 5
        run_steps(cut, checkpoint.state["step"], 12)
    assert cut.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    assert cut.samples_path.read_bytes() == whole.samples_path.read_bytes()


def test_resume_before_the_first_checkpoint_starts_over(folder: RunFolder) -> None:
    """Killed after the untrained model's validation, which the first checkpoint follows at once."""
    with folder.lock():
        run_steps(folder, 0, 1, checkpoint=False)
        assert folder.resume() is None
    assert folder.metrics_path.read_bytes() == b""


@pytest.mark.parametrize("removed", ["files", "folder", "and metrics"])
def test_resume_without_the_checkpoint_of_steps_is_refused(folder: RunFolder, removed: str) -> None:
    """Once it started at step 1, and cut the metrics of a finished run to nothing."""
    with folder.lock():
        run_steps(folder, 0, 3)
    (folder.path / "adapter.safetensors").write_bytes(b"of the finished run")
    if removed == "and metrics":
        folder.metrics_path.unlink()
    if removed == "folder":
        shutil.rmtree(folder.checkpoint_dir)
    else:
        for path in folder.checkpoint_dir.iterdir():
            path.unlink()
    before = contents(folder)
    with (
        folder.lock(),
        pytest.raises(UserError, match=r"has (2 steps in metrics\.jsonl|a trained adapter\.safetensors) and no check"),
    ):
        folder.resume()
    assert contents(folder) == before


def contents(folder: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_logs_far_ahead_of_the_checkpoint_are_kept(folder: RunFolder) -> None:
    """Such as of a run whose checkpoint was brought back from a backup."""
    with folder.lock():
        run_steps(folder, 0, 2)
        run_steps(folder, 2, 9, checkpoint=False)
        before = folder.metrics_path.read_bytes()
        folder.resume()
    assert len(read_jsonl(folder.metrics_path)) == 2
    assert (folder.path / "metrics.jsonl.old").read_bytes() == before
    with folder.lock():
        run_steps(folder, 2, 3, checkpoint=False)
        folder.resume()  # a step ahead, as a kill leaves it: nothing to keep
    assert (folder.path / "metrics.jsonl.old").read_bytes() == before


@needs_posix
def test_resume_cuts_nothing_through_a_link(folder: RunFolder) -> None:
    with folder.lock():
        run_steps(folder, 0, 3)
    victim = folder.path.parent / "victim"
    folder.metrics_path.rename(victim)
    victim.write_bytes(victim.read_bytes() + b"mine\n")
    folder.metrics_path.symlink_to(victim)
    with folder.lock(), pytest.raises(UserError, match=r"symbolic link|is a link"):
        folder.resume()
    assert victim.read_bytes().endswith(b"mine\n")


def test_resume_refuses_a_file_that_lost_lines(folder: RunFolder) -> None:
    with folder.lock():
        run_steps(folder, 0, 3)
        os.truncate(folder.metrics_path, 5)
        with pytest.raises(UserError, match=r"metrics\.jsonl holds 5 bytes but had \d+"):
            folder.resume()
        before = folder.samples_path.read_bytes()
        folder.metrics_path.write_bytes(b"x" * 1000)  # longer, and not what it was
        with pytest.raises(UserError, match=r"metrics\.jsonl is not as it was at the last checkpoint"):
            folder.resume()
        folder.metrics_path.unlink()
        with pytest.raises(UserError, match=r"metrics\.jsonl holds 0 bytes but had \d+"):
            folder.resume()
    assert folder.samples_path.read_bytes() == before != b""


# --- lock ---


def test_folder_in_use_is_refused_by_name_of_the_process(folder: RunFolder) -> None:
    with folder.lock():
        in_use = pytest.raises(UserError, match=rf"{folder.path.name} is in use by process {os.getpid()}")
        with in_use, RunFolder.open(folder.path).lock():
            pass
        folder.save_checkpoint({"step": 1})  # the failed attempt took nothing away
    with folder.lock():
        pass


HOLDER = """
    import os, sys, time
    from pathlib import Path
    from tinylora.store.run_folder import RunFolder
    with RunFolder.open(Path(sys.argv[1])).lock():
        if sys.argv[2:]:  # a helper process that outlives its parent must not keep the folder
            read, write = os.pipe()
            if os.fork() == 0:
                os.write(write, b".")  # its copy of the lock is closed by now: that is done inside fork
                time.sleep(30)
                os._exit(0)
            os.read(read, 1)
        print("held", flush=True)
        time.sleep(60)
"""


@needs_posix
@pytest.mark.parametrize("with_child", [False, True])
def test_lock_ends_with_a_killed_process(folder: RunFolder, with_child: bool) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder.path)] + ["fork"] * with_child
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=f"in use by process {holder.pid};"), folder.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=60)
        with folder.lock():
            folder.save_checkpoint({"step": 1})
    finally:
        os.killpg(holder.pid, signal.SIGKILL) if with_child else None
        holder.stdout.close()


# --- kill -9 ---

# Imports torch once, then forks a child for each line of input ("FOLDER POINT"; at POINT 0 it is killed from outside).
# The child trains the way the loop does: two JSONL lines, then a checkpoint whose tensors follow from its step alone.
# With POINT = n it kills itself with signal 9 at the n-th system call that touches the disk.
TRAINER = """
    import os, signal, sys
    from pathlib import Path
    import safetensors.torch
    import torch
    from tinylora.training.metrics import JsonlWriter
    from tinylora.store.run_folder import RunFolder

    def tensors(step):
        generator = torch.Generator().manual_seed(step)
        return {"v": torch.randn(13, generator=generator), "m": torch.randn(20000, generator=generator).double()}

    def kill_at(point):
        calls = 0
        def wrap(name):
            real = getattr(os, name)
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == point:
                    if name == "write":  # a torn write: half of the bytes, then the kill
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            setattr(os, name, call)
        for name in ("write", "fsync", "replace", "unlink"):
            wrap(name)

    def train(path, point):
        folder = RunFolder.open(Path(path))
        with folder.lock():
            checkpoint = folder.resume()
            step = checkpoint.state["step"] if checkpoint else 0
            metrics, samples = JsonlWriter(folder.metrics_path), JsonlWriter(folder.samples_path)
            if point:
                kill_at(point)
            while True:
                metrics.append({"step": step})
                samples.append({"step": step, "text": "x" * (step % 50)})
                step += 1
                folder.save_checkpoint({"step": step, **tensors(step)})

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        path, point = line.split()
        if (pid := os.fork()) == 0:
            try:
                train(path, int(point))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
"""


def check_whole(folder: RunFolder) -> int:
    """The folder loads, tensors belong to their step, resume leaves the lines of a run that was never stopped."""
    with folder.lock():
        checkpoint = folder.resume()
    step = 0
    if checkpoint is not None:
        assert checkpoint.warning == ""
        step = checkpoint.state["step"]
        generator = torch.Generator().manual_seed(step)
        assert same_bits(checkpoint.state["v"], torch.randn(13, generator=generator))
        assert same_bits(checkpoint.state["m"], torch.randn(20000, generator=generator).double())
    assert read_jsonl(folder.metrics_path) == [{"step": s} for s in range(step)]
    assert read_jsonl(folder.samples_path) == [{"step": s, "text": "x" * (s % 50)} for s in range(step)]
    return step


@needs_posix
def test_kill_9_at_random_delays_and_at_every_disk_call(tmp_path: Path) -> None:
    """20 kills at random delays that go on with one run, then one at each of the first system calls of a step."""
    command = [sys.executable, "-c", textwrap.dedent(TRAINER)]
    trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdin and trainer.stdout

    def start(folder: RunFolder, point: int) -> int:
        assert trainer.stdin and trainer.stdout
        trainer.stdin.write(f"{folder.path} {point}\n")
        trainer.stdin.flush()
        return int(trainer.stdout.readline())

    def exit_code() -> int:
        assert trainer.stdout
        return int(trainer.stdout.readline())

    rng = random.Random(0)
    try:
        assert trainer.stdout.readline() == "ready\n"
        folder, steps, torn = RunFolder.create(tmp_path, "random", RunConfig(), {}), [0], 0
        for _ in range(20):
            pid = start(folder, 0)
            time.sleep(rng.uniform(0.002, 0.15))
            os.kill(pid, signal.SIGKILL)
            assert exit_code() == -signal.SIGKILL
            torn += bool(list(folder.checkpoint_dir.glob("*.tmp")))
            steps.append(check_whole(folder))
            assert steps[-1] >= steps[-2]  # nothing that was saved is lost
        assert steps[-1] > 10, f"the children hardly ran: {steps}"

        folder, last = RunFolder.create(tmp_path, "point", RunConfig(), {}), 0
        for point in range(1, 31):  # a step is 9 calls or 10 (the unlink): three steps, each call in turn
            start(folder, point)
            assert exit_code() == -signal.SIGKILL
            step = check_whole(folder)
            torn += bool(list(folder.checkpoint_dir.glob("*.tmp")))
            assert step >= last
            last = step
        assert torn >= 3, "no kill fell inside a checkpoint write"
    finally:
        trainer.stdin.close()
        trainer.wait(timeout=30)
        trainer.stdout.close()


# --- full disk ---


@needs_posix
def test_file_size_limit_of_the_system_loses_nothing(folder: RunFolder) -> None:
    """A real refusal by the kernel (EFBIG), with half of the bytes written before it."""
    script = """
        import resource, sys
        from pathlib import Path
        import torch
        from tinylora.errors import UserError
        from tinylora.training.metrics import JsonlWriter
        from tinylora.store.run_folder import RunFolder
        folder = RunFolder.open(Path(sys.argv[1]))
        with folder.lock():
            folder.save_checkpoint({"step": 1, "v": torch.ones(4)})
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            for attempt in (
                lambda: folder.save_checkpoint({"step": 2, "v": torch.ones(4000)}),
                lambda: [JsonlWriter(folder.metrics_path).append({"step": i, "text": "x" * 100}) for i in range(50)],
            ):
                try:
                    attempt()
                    print("written")
                except UserError as error:
                    print(error)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder.path)],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout.splitlines()  # fmt: skip
    assert len(out) == 2
    assert out[0].startswith(f"no room to write in {folder.checkpoint_dir} (File too large)")
    assert out[1].startswith(f"no room to write in {folder.path} (File too large)")
    checkpoint = folder.load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.state["step"] == 1
    assert [p.name for p in folder.checkpoint_dir.iterdir()] == ["state-00000001.safetensors"]
    assert folder.metrics_path.read_bytes().endswith(b"}\n")  # the torn line was taken back
    assert [line["step"] for line in read_jsonl(folder.metrics_path)] == list(
        range(len(read_jsonl(folder.metrics_path)))
    )


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk_is_one_sentence(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with folder.lock():
        folder.save_checkpoint({"step": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(UserError, match=r"no room to write in .*checkpoint \(No space left on device\)"):
                folder.save_checkpoint({"step": 2})
        checkpoint = folder.load_checkpoint()
        assert checkpoint is not None
        assert checkpoint.state == {"step": 1}
        folder.save_checkpoint({"step": 2})
        assert not list(folder.checkpoint_dir.glob("*.tmp"))


def test_full_disk_leaves_no_half_made_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no room to write"):
        RunFolder.create(tmp_path, "demo", RunConfig(), {})
    assert list(tmp_path.iterdir()) == []


# --- resume and environment ---


def test_steps_logging_and_the_cache_s_budget_may_change_on_resume() -> None:
    config = resume_config(RunConfig(), ["train.steps=300", "log.checkpoint_every=5", 'log.trackers=["wandb"]'])
    assert (config.train.steps, config.log.checkpoint_every, config.log.trackers) == (300, 5, ("wandb",))
    budget = resume_config(RunConfig(), ["generation.kv_budget_gib=9"])  # what the engine says to do where it is full
    assert budget.generation.kv_budget_gib == 9
    assert resume_config(RunConfig(), ["optim.lr=0.004"]) == RunConfig()  # no change is no harm


def test_other_changes_on_resume_are_listed() -> None:
    with pytest.raises(UserError) as caught:
        resume_config(RunConfig(), ["train.steps=300", "optim.lr=0.5", "eval.every=1", "task.options.max_terms=2"])
    message = str(caught.value)
    for part in (
        "optim.lr (0.004 to 0.5)",
        "eval.every (10 to 1)",
        "task.options.max_terms (None to 2)",
        "start a new run",
    ):
        assert part in message
    assert "train.steps (" not in message


def test_environment_is_complete_and_plain() -> None:
    environment = collect_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["torch"] == torch.__version__ or torch.__version__.startswith(environment["torch"])
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cores"] == available_threads()
    assert environment["cpu"]


def test_numeric_differences_name_what_moves_floats() -> None:
    here = collect_environment()
    assert numeric_differences(here, {**here, "command": "other", "threads": 99}) == []
    assert numeric_differences(here, {**here, "torch": "0.1"}) == [f"torch: {here['torch']} then, 0.1 now"]


def test_checksum_is_sha256_of_what_the_file_says(folder: RunFolder) -> None:
    """The digest as a stranger would compute it, from the file alone."""
    with folder.lock():
        path = folder.save_checkpoint({"v": torch.tensor([1.5, -2.0]), "step": 1})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    digest = hashlib.sha256(metadata["values"].encode() + b"\nv torch.float32 (2,)\n" + data[8 + size :])
    assert metadata["sha256"] == digest.hexdigest()
