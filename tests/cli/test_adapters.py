"""The verbs for adapters, as a user types them: on a tiny model, round trips and mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from typer.testing import CliRunner

from tinylora.adapter import basis_cache
from tinylora.adapter.config import AdapterConfig
from tinylora.cli import app
from tinylora.config.method import MethodConfig
from tinylora.config.run import ModelConfig, RunConfig
from tinylora.config.schema import dump_config
from tinylora.interop import hub
from tinylora.interop.card import model_card
from tinylora.models import fingerprint
from tinylora.models.bases import remember
from tinylora.models.fingerprint import Fingerprint
from tinylora.models.load import load_base_model
from tinylora.store.adapter import open_adapter
from tinylora.store.adapter_file import BEST, load_vector, save_vector
from tinylora.store.own import remember_own
from tinylora.system import digest

pytestmark = pytest.mark.usefixtures("fresh_cache")
RUNNER = CliRunner()


def run(*arguments: Any, code: int = 0) -> Any:
    result = RUNNER.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def load_and_remember(name: str) -> None:
    """The base is loaded once, as by any verb."""
    remember(load_base_model(name, device="cpu"))


def refused(*arguments: Any) -> str:
    said = run(*arguments, code=2).stderr.strip().splitlines()
    lines = [line for line in said if not line.startswith("other processes take")]  # a busy machine says so first
    assert len(lines) == 1 and lines[0].startswith("tinylora: ")
    return lines[0]


@pytest.fixture
def trained(tiny_folder: Path, tmp_path: Path) -> Path:
    """A run folder with an adapter, made before fingerprints were kept."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = RunConfig(
        model=ModelConfig(name=str(tiny_folder), device="cpu", dtype="float32"), adapter=AdapterConfig(num_groups=3)
    )
    save_vector(folder / BEST, torch.tensor([[0.5], [-0.30001], [0.7]]), config)
    remember_own(config, print)
    return folder


def test_encode_and_decode(trained: Path, tmp_path: Path) -> None:
    plain = run("encode", trained)
    code = plain.stdout.strip()
    assert code.startswith("TINY-") and "3 numbers in float32: 42 bytes" in plain.stderr
    rounded = run("encode", trained, "--dtype", "bfloat16", "-o", tmp_path / "a" / "b.tinylora", "--json")
    facts = json.loads(rounded.stdout)
    assert facts["file_bytes"] == 36 == (tmp_path / "a" / "b.tinylora").stat().st_size
    assert 1e-4 < facts["relative_change"] < 4e-3
    said = run("encode", trained, "--dtype", "bfloat16").stderr
    assert f"rounding changed the numbers by {100 * facts['relative_change']:.2g} %" in said
    for reference in (code, code.lower(), tmp_path / "a" / "b.tinylora", facts["code"]):
        decoded = json.loads(run("decode", reference, "--json").stdout)
        assert decoded["numbers"] == pytest.approx([0.5, -0.30001, 0.7], rel=4e-3)
        assert decoded["config"]["num_groups"] == 3
        assert decoded["fingerprint"] == facts["fingerprint"] and decoded["base"].endswith("tiny-llama")
    text = run("inspect", code).stdout
    assert text == run("decode", code).stdout
    assert (
        "3 numbers (3 tie groups x 1) in float32" in text and "+0.5 -0.30001 +0.7" in text and "3 even chunks" in text
    )
    run("decode", code, "-o", tmp_path / "c.tinylora")
    assert json.loads(run("decode", tmp_path / "c.tinylora", "--json").stdout)["dtype"] == "float32"


def test_verify_and_use(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    code = run("encode", trained).stdout.strip()
    text = run("verify", code).stdout
    assert "intact; its base is" in text and "its basis came out the same" in text
    assert "model.layers.2.mlp.down_proj" in text and "all 21 modules" in text
    facts = json.loads(run("verify", trained, "--json").stdout)
    assert len(facts["modules"]) == 21 and facts["change"] > 0
    chat = json.loads(
        run("chat", "--adapter", code, "--prompt", "hi", "--max-new-tokens", 4, "--plain", "--json").stdout
    )
    assert len(chat["replies"]) == 1
    assert "name one adapter" in refused("chat")
    assert "name one adapter" in refused("chat", code, "--adapter", code)

    base = load_base_model(str(tiny_folder), device="cpu", dtype="float32")
    with torch.no_grad():
        base.model.get_parameter("model.norm.weight")[0] += 1
    other = tmp_path / "other"
    base.model.save_pretrained(other)
    base.tokenizer.save_pretrained(other)
    message = refused("verify", code, "--model", other)
    assert "made for another base" in message and "the same architecture and shapes, weights differ by" in message
    assert "made for another base" in refused("chat", code, "--model", other, "--prompt", "hi")
    assert "not compared" in run("verify", code, "--model", other, "--other-base").stdout
    assert "name a task or recipe with --task" in refused("eval", code)


def test_verify_reads_every_weight_whatever_is_remembered(
    trained: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base with one weight changed and a file that looks as before, even its inode and all its times: as a file
    system without them, or root, may leave it."""
    code = run("encode", trained).stdout.strip()
    for module in (basis_cache, digest, fingerprint):
        monkeypatch.setattr(module, "file_state", lambda path: [1, 2, 3, 4])
    run("verify", code)
    weights = tiny_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x10
    weights.write_bytes(data)
    assert "made for another base" in refused("verify", code)


def test_exports(trained: Path, tmp_path: Path) -> None:
    for to, out in (("lora", "lora"), ("peft", "peft"), ("merged", "merged"), ("gguf", "a.gguf")):
        said = run("export", trained, "--to", to, "-o", tmp_path / out)
        assert out in said.stdout
        assert "exists" in refused("export", trained, "--to", to, "-o", tmp_path / out)
    facts = json.loads(run("export", trained, "--to", "lora", "--rank", 1, "-o", tmp_path / "r1", "--json").stdout)
    assert facts["rank"] == 1 and 0.5 < facts["kept"] < 1
    small = run("export", trained, "--to", "merged", "--dtype", "bfloat16", "-o", tmp_path / "low")
    assert "of the update arrived" in small.stdout
    for bad in (
        ("--to", "onnx"),
        ("--to", "peft", "--rank", 4),
        ("--to", "gguf", "--dtype", "bfloat16"),
        ("--to", "peft", "--dtype", "float32"),
    ):
        refused("export", trained, *bad, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_import_and_the_larger_file(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run("export", trained, "--to", "peft", "-o", tmp_path / "peft")
    imported = json.loads(
        run("import", tmp_path / "peft", "--model", tiny_folder, "-o", tmp_path / "i.safetensors", "--json").stdout
    )
    assert (imported["numbers"], imported["modules"], imported["note"]) == (3, 21, None)
    assert "its base is" in run("verify", tmp_path / "i.safetensors").stdout
    assert "PEFT TinyLoRA" in run("inspect", tmp_path / "i.safetensors").stdout
    assert "has no short form" in refused("encode", tmp_path / "i.safetensors")
    run("encode", trained, "--with-factors", "-o", tmp_path / "f.safetensors")
    before, after = (
        json.loads(run("verify", a, "--json").stdout)["change"] for a in (trained, tmp_path / "f.safetensors")
    )
    assert after == pytest.approx(before, rel=1e-12)
    assert "makes a file, not a code" in refused("encode", trained, "--with-factors")
    assert "there is no folder" in refused("import", tmp_path / "nothing")
    assert "import it first" in refused("chat", tmp_path / "peft", "--prompt", "x")


def test_diff_and_mix(trained: Path, tmp_path: Path) -> None:
    code = run("encode", trained, "--dtype", "bfloat16").stdout.strip()
    assert "cosine 1.0000" in run("diff", trained, code).stdout
    mixed = json.loads(run("mix", trained, code, "--weights", "0.5,-0.5", "--json").stdout)
    assert mixed["norm"] < 2e-3
    mean = json.loads(run("mix", trained, trained, "--json", "-o", tmp_path / "m.tinylora").stdout)
    assert mean["numbers"] == pytest.approx([0.5, -0.30001, 0.7])
    assert "intact" in run("verify", tmp_path / "m.tinylora").stdout
    assert "exists" in refused("mix", trained, trained, "-o", tmp_path / "m.tinylora")
    assert "numbers separated by commas" in refused("mix", trained, code, "--weights", "a,b")
    assert "one weight for each" in refused("mix", trained)


def test_card_push_and_pull(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / "metrics.jsonl").write_text('{"step": 1, "tokens_sampled": 1200, "seconds": 60.0}\n')
    text = run("card", trained, "--licence", "mit").stdout
    assert text.startswith("---\nlibrary_name: ") and "license: mit" in text and "TINY-" in text
    assert str(trained.parent) not in text  # the base lies in a folder: where is nobody's business
    assert "Not measured" in text and "1,200 tokens sampled in 1 steps, 1.0 minutes" in text

    uploaded: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **more: Any) -> str:
            return f"https://hub.example/{repo}"

        def upload_folder(self, folder_path: str, **more: Any) -> None:
            uploaded.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert "https://hub.example/me/demo" in run("push", trained, "me/demo", "--also", "lora").stdout
    assert set(uploaded) == {"README.md", "adapter.tinylora", "adapter_config.json", "adapter_model.safetensors"}
    base = open_adapter(trained).base_name
    assert json.loads(uploaded["adapter_config.json"])["base_model_name_or_path"] == Path(base).name != base
    assert not any(str(trained.parent).encode() in content for content in uploaded.values())

    def download(repo: str, *, local_dir: Path, allow_patterns: list[str], **more: Any) -> None:
        assert not any(".bin" in p or ".py" in p for p in allow_patterns)
        Path(local_dir).mkdir(parents=True)
        for name, content in uploaded.items():
            (Path(local_dir) / name).write_bytes(content)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pulled = run("pull", "me/demo", "-o", tmp_path / "pulled").stdout
    assert "3 numbers" in pulled
    assert "intact" in run("verify", tmp_path / "pulled").stdout
    assert "is not an empty folder" in refused("pull", "me/demo", "-o", tmp_path / "pulled")
    run("push", trained, "me/demo", "--dry-run", tmp_path / "dry")
    assert {p.name for p in (tmp_path / "dry").iterdir()} == {"README.md", "adapter.tinylora"}
    for name in ("no-owner", "a/b/c", "a/..", "ä/b"):
        refused("push", trained, name)
        refused("pull", name)


def test_a_card_loads_the_base_as_it_was(trained: Path) -> None:
    v, config = load_vector(trained)
    pinned = replace(config, model=replace(config.model, name="org/model", revision="abc123"))
    quantised = replace(pinned, model=replace(pinned.model, quantization="bnb-4bit"))
    opened = open_adapter(trained)
    portable = replace(opened, fingerprint=Fingerprint.of(b"x" * 12), check=b"abcd").to_portable()
    text = model_card(replace(opened, run=pinned), portable, base_name="org/model")
    assert 'from_pretrained("org/model", revision="abc123")' in text
    for run_, name in ((quantised, "org/model"), (None, "org/model@abc123 [bnb-4bit]")):
        text = model_card(replace(opened, run=run_), portable, base_name=name)
        assert "tinylora chat adapter.tinylora" in text and "from_pretrained" not in text
    other = replace(config, method=MethodConfig(name="lora"))
    save_vector(trained / "adapter.safetensors", v, other)
    text = run("card", trained).stdout
    assert f"- Method: {other.method.describe()}, 3 numbers" in text and "rebuilt" not in text
    assert "push is for TinyLoRA's adapters" in refused("push", trained, "me/demo")


def test_an_import_takes_the_revision_that_the_checkpoint_names(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_adapter(trained).base_name
    run("export", trained, "--to", "peft", "-o", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, "revision": "abc123"}))
    asked: list[tuple[str, str, str]] = []

    def load(name: str, *, revision: str = "", quantization: str = "none", **options: Any) -> Any:
        asked.append((name, revision, quantization))
        return load_base_model(base, **options)

    monkeypatch.setattr("tinylora.models.load.load_base_model", load)
    run("import", tmp_path / "peft", "-o", tmp_path / "a.safetensors")
    run("import", tmp_path / "peft", "--model", "org/model@def", "-o", tmp_path / "b.safetensors")
    assert asked == [(base, "abc123", "none"), ("org/model", "def", "none")]


def test_long_codes_and_files_with_factors_are_no_folders(trained: Path, tmp_path: Path) -> None:
    _, config = load_vector(trained)
    many = replace(config, adapter=replace(config.adapter, num_groups=0, n_tie=1, u=3))
    save_vector(
        trained / "adapter.safetensors", torch.full((21, 3), 0.1), replace(many, adapter=replace(many.adapter, u=3))
    )
    code = run("encode", trained).stdout.strip()
    assert len(code) > 300
    assert "# 63 numbers for" in run("card", code).stdout
    assert "is no run folder to write into; name one with --out" in refused(
        "eval", code, "--task", "demo", "--controls"
    )
    run("encode", trained, "--with-factors", "-o", tmp_path / "f.safetensors")
    assert str(tmp_path).encode() not in (tmp_path / "f.safetensors").read_bytes()
    assert "has no short form" in refused("decode", tmp_path / "f.safetensors", "-o", tmp_path / "g.tinylora")


def test_deep_nesting_in_a_file_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    v, config = load_vector(trained)
    facts = {"facts": "[" * 100_000, "config": dump_config(config), "format": "tinylora-vector-1"}
    save_file({"v": v}, tmp_path / "facts.safetensors", facts)
    assert "3 numbers" in run("decode", tmp_path / "facts.safetensors").stdout
    save_file({"v": v}, tmp_path / "deep.safetensors", {**facts, "config": "a = " + "[" * 100_000})
    assert "is not TOML" in refused("decode", tmp_path / "deep.safetensors")


def test_a_hub_that_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert "cannot fetch me/demo: ConnectionError: no route to host" in refused("pull", "me/demo", "-o", tmp_path / "p")
    monkeypatch.setattr("huggingface_hub.HfApi", fail)
    assert "cannot upload to me/demo" in refused("push", trained, "me/demo")
    assert hub.PATTERNS


@pytest.mark.parametrize("verb", ["encode", "decode", "verify", "card", "inspect", "eval", "chat"])
def test_mistakes_are_one_sentence(verb: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tinylora"
    bad.write_bytes(b"\xe7TL\x01" + b"\xff" * 50)
    several = tmp_path / "several"
    several.mkdir()
    for name in "ab":
        (several / f"{name}.tinylora").write_bytes(b"")
    for reference in (bad, "TINY-ABC", "TINY-" + "0" * 98, "TINY-" + "0" * 990, "tıny-" + "0" * 98, "", several):
        if (verb, reference) != ("chat", ""):  # without an adapter it asks for one in another way
            refused(verb, reference)


def test_a_file_chooses_no_code(trained: Path, tmp_path: Path) -> None:
    """Settings that came with a file neither run a repository's code nor import a scorer."""
    from tinylora.store.adapter import open_adapter
    from tinylora.store.adapter_file import load_vector, save_vector

    v, config = load_vector(trained)
    hostile = replace(
        config,
        model=replace(config.model, trust_remote_code=True),
        task=replace(config.task, scorer="os:system"),
    )
    file = tmp_path / "stranger" / "adapter.safetensors"
    file.parent.mkdir()
    save_vector(file, v, hostile)
    load_and_remember(config.model.name)  # so that the base is no question
    for folder_is_a_run in (False, True):
        for reference in (file, file.parent):
            settings = open_adapter(reference).settings()
            assert settings.model.trust_remote_code is False and settings.task.scorer == "number"
            assert "it says what to run, read or load here: task.scorer = 'os:system'" in refused("eval", reference)
        if not folder_is_a_run:
            (file.parent / "config.toml").write_text(dump_config(hostile))
    remember_own(hostile, print)  # as if it had been made here
    assert open_adapter(file.parent).settings().model.trust_remote_code is True


def test_more_numbers_than_a_code_takes(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from tinylora.store.adapter_file import load_vector, save_vector

    _, config = load_vector(trained)
    big = replace(config, adapter=replace(config.adapter, u=100))
    file = tmp_path / "big.safetensors"
    save_vector(file, torch.full((3, 100), 0.01), big)
    said = json.loads(run("encode", file, "-o", tmp_path / "big.tinylora", "--json").stdout)
    assert said["code"] is None and said["file_bytes"] == (tmp_path / "big.tinylora").stat().st_size
    assert "too many for a code" in refused("encode", file)
    assert "TINY-" not in run("card", file).stdout


@pytest.mark.parametrize(
    "v", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.bfloat16), torch.full((3, 1), float("nan")), torch.zeros(0, 1)]
)
def test_a_vector_that_is_none(trained: Path, tmp_path: Path, v: torch.Tensor) -> None:
    with safe_open(trained / "adapter.safetensors", framework="pt") as handle:
        metadata = handle.metadata()
    file = tmp_path / "odd.safetensors"
    file.write_bytes(save({"v": v}, metadata))
    assert "v must be finite float32 numbers" in refused("decode", file)
    file.write_bytes(save({"v": torch.zeros(3, 1)}, {"format": metadata["format"]}))
    assert "holds no settings" in refused("decode", file)
    facts = json.dumps({"fingerprint": "zz"})
    file.write_bytes(save({"v": torch.zeros(3, 1)}, {**metadata, "facts": facts}))
    assert "is no fingerprint" in refused("decode", file)


def test_wrong_values_of_options(trained: Path, tmp_path: Path) -> None:
    assert "--dtype must be float32 or bfloat16" in refused("encode", trained, "--dtype", "int4")
    assert "is a folder; give a file" in refused("encode", trained, "-o", tmp_path)
    assert "cannot write" in refused("encode", trained, "-o", f"{trained / BEST}/x.tinylora")
    assert "--also must be" in refused("push", trained, "a/b", "--also", "onnx")
