"""Loading from folders and by name, and the sentences a user sees when it fails."""

import copy
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from huggingface_hub.utils.tqdm import tqdm as hf_tqdm
from pseudo_terminal import bars_of
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tinylora.models.hub as hub_module
import tinylora.models.load as loading
from tinylora.errors import UserError
from tinylora.models.base import BaseModel
from tinylora.models.hub import hub_folder
from tinylora.models.load import encode_prompt, load_base_model
from tinylora.system.progress import Bar

USER = [{"role": "user", "content": "1 + 2 ="}]


def _load(path: Path, **options: Any) -> BaseModel:
    return load_base_model(str(path), device="cpu", **{"dtype": "float32", **options})


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_folder_gives_the_saved_model_frozen(tiny_folder: Path, tiny_llama: PreTrainedModel) -> None:
    base = _load(tiny_folder)
    assert base.kind == "folder" and base.revision == "" and base.sha256 == ""
    assert base.files == (tiny_folder / "model.safetensors",)
    assert (base.context_length, base.pad_token_id, base.has_chat_template) == (128, 2, True)
    assert base.device == torch.device("cpu") and base.dtype == torch.float32
    assert base.model.config._attn_implementation == "sdpa" and base.model.config.use_cache
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, tiny_llama(ids).logits)


def test_a_bfloat16_load_is_the_float32_one_rounded(tiny_folder: Path) -> None:
    full, half = _load(tiny_folder), _load(tiny_folder, dtype="bfloat16")
    for (name, a), b in zip(full.model.named_parameters(), half.model.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name


def test_loading_is_silent(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        capfd.readouterr()
        _load(tiny_folder)
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == logging.WARNING and logging.is_progress_bar_enabled()  # as they were
    finally:
        logging.set_verbosity(before)


def test_stop_tokens_come_from_tokenizer_generation_config_and_chat_markup(tiny_folder: Path) -> None:
    assert _load(tiny_folder).stop_token_ids == (2, 0)  # <|im_end|>, then <|endoftext|> beside it
    _edit(tiny_folder / "generation_config.json", eos_token_id=[7, 2])
    assert _load(tiny_folder).stop_token_ids == (2, 7, 0)


def test_a_quoted_folder_beats_everything_else(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called like the embedded model, or like a hub id, is the folder."""
    monkeypatch.chdir(tiny_folder.parent)
    for name in ("smollm2-135m-instruct", "org/name"):
        shutil.copytree(tiny_folder, name)
        assert load_base_model(name, device="cpu", dtype="float32").kind == "folder"


def test_the_template_alone_writes_special_tokens(tiny_folder: Path) -> None:
    """A tokenizer that puts a bos before every text must not put a second one before the template's."""
    base = _load(tiny_folder)
    bos = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    base.tokenizer.backend_tokenizer.post_processor = bos
    assert base.tokenizer.decode(encode_prompt(base, USER)).startswith("<|im_start|>user")
    assert base.tokenizer.decode(encode_prompt(base, USER, chat=False)) == "<|im_start|>1 + 2 ="


def test_chat_prompt_is_the_template_up_to_the_answer(tiny_folder: Path) -> None:
    base = _load(tiny_folder)
    ids = encode_prompt(base, USER)
    assert base.tokenizer.decode(ids) == "<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n"
    assert (
        ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1
    )  # the markup is tokens, and no bos is added before it


def test_plain_prompt_joins_the_turns(tiny_folder: Path) -> None:
    base = _load(tiny_folder)
    ids = encode_prompt(base, [{"role": "system", "content": "add"}, *USER], chat=False)
    assert base.tokenizer.decode(ids) == "add\n1 + 2 ="


def test_the_tokenizers_remark_on_long_texts_is_not_passed_on(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = _load(tiny_folder)
    base.tokenizer.model_max_length = 5
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        encode_prompt(base, USER)
        assert not caplog.records
        base.tokenizer("a text that is longer")
        assert "longer than the specified maximum" in caplog.text
    finally:
        logging.set_verbosity(before)


def test_prompts_that_cannot_be_used(tiny_folder: Path) -> None:
    base = _load(tiny_folder)
    fits = [{"role": "user", "content": "x" * 127}]
    assert len(encode_prompt(base, fits, chat=False)) == 127
    with pytest.raises(UserError, match="prompt of 128 tokens leaves no room .* 128 tokens of context"):
        encode_prompt(base, [{"role": "user", "content": "x" * 128}], chat=False)
    with pytest.raises(UserError, match="no tokens"):
        encode_prompt(base, [{"role": "user", "content": ""}], chat=False)
    base.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"refuses these turns \(user\): System role not supported"):
        encode_prompt(base, USER)


def test_no_chat_template(tiny_folder: Path) -> None:
    (tiny_folder / "chat_template.jinja").unlink()
    base = _load(tiny_folder)
    assert not base.has_chat_template
    with pytest.raises(UserError, match=r"has no chat template; set prompt\.chat=false"):
        encode_prompt(base, USER)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model.name is empty"),
        ("smolm2", "no model is named 'smolm2'; give smollm2-135m-instruct"),
        ("./nowhere", "no model file or folder at ./nowhere"),
        ("/no/such/model.gguf", "no model file or folder at /no/such/model.gguf"),
        ("model.gguf", "no model file or folder at model.gguf"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_base_model(name)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json, so it is no model folder"):
        _load(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"to load a GGUF file, give its path, such as .*a\.gguf"):
        _load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        _load(tmp_path)


@pytest.fixture
def with_adapter(tiny_folder: Path, tiny_llama: PreTrainedModel) -> Path:
    """The tiny model's folder with a LoRA of PEFT in it, as a checkpoint folder that somebody exported into."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():  # PEFT's, about transformers
        warnings.simplefilter("ignore")
        peft.get_peft_model(copy.deepcopy(tiny_llama), lora).save_pretrained(tiny_folder)
    assert (tiny_folder / "adapter_config.json").is_file() and (tiny_folder / "adapter_model.safetensors").is_file()
    return tiny_folder


def test_an_adapter_in_the_folder_is_refused(with_adapter: Path) -> None:
    """transformers would apply it where PEFT is installed, and the adapter's A and B would be maps of the base."""
    with pytest.raises(
        UserError, match=r"PEFT adapter \(.*/adapter_config\.json\), which .*; move its adapter_\* files"
    ):
        _load(with_adapter)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_that_transformers_applied_all_the_same_is_noticed(
    with_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "refuse_adapter", lambda *_: None)
    with pytest.raises(UserError, match="transformers has put a PEFT adapter on .*, which was to be the base alone"):
        _load(with_adapter)


def test_weights_of_an_adapter_are_no_files_of_the_base(with_adapter: Path, tiny_llama: PreTrainedModel) -> None:
    """Without its configuration nothing applies them; and an adapter below the folder is another thing."""
    (with_adapter / "peft").mkdir()
    (with_adapter / "adapter_config.json").rename(with_adapter / "peft" / "adapter_config.json")
    base = _load(with_adapter)
    assert base.files == (with_adapter / "model.safetensors",)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, tiny_llama(ids).logits)


def test_revision_needs_the_hub(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="only hub models have revisions"):
        _load(tiny_folder, revision="main")


def test_unknown_architecture(tiny_folder: Path) -> None:
    _edit(tiny_folder / "config.json", model_type="hyperllama", architectures=["HyperLlamaForCausalLM"])
    with pytest.raises(UserError, match=r"has an architecture that transformers 5.* does not know"):
        _load(tiny_folder)


def test_code_in_a_folder_is_not_run_unasked(tiny_folder: Path) -> None:
    (tiny_folder / "evil.py").write_text("raise SystemExit('ran')\n")
    _edit(tiny_folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true if you trust"):
        _load(tiny_folder)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_not_a_causal_model(tiny_folder: Path, kind: str) -> None:
    """Without the check BERT would be loaded with a new, untrained output head."""
    name = {"t5": "T5ForConditionalGeneration", "bert": "BertForMaskedLM"}[kind]
    config = AutoConfig.for_model(kind, architectures=[name])
    config.save_pretrained(tiny_folder)
    with pytest.raises(UserError, match=f"is not a causal language model .*{name}"):
        _load(tiny_folder)


def test_damaged_weights(tiny_folder: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged weight file"):
        _load(tiny_folder)
    weights.unlink()
    with pytest.raises(UserError, match="has no weight file"):
        _load(tiny_folder)


def test_missing_tensors_are_never_made_up(tiny_folder: Path) -> None:
    """transformers itself would fill the fourth layer with random numbers and go on."""
    _edit(tiny_folder / "config.json", num_hidden_layers=4, layer_types=None)
    with pytest.raises(UserError, match=r"lack 9 tensors, such as model\.layers\.3\."):
        _load(tiny_folder)


@pytest.mark.parametrize("road", ["safetensors", "bin", "quantised", "hub"])
def test_every_road_asks_what_was_missing(
    tiny_folder: Path, hub: Path, road: str, recwarn: pytest.WarningsRecorder
) -> None:
    """And names it: three of the missing, in the order of the layers."""
    folder = hub if road == "hub" else tiny_folder
    weights = load_file(folder / "model.safetensors")
    gone = [name for name in weights if ".1.mlp." in name or ".2.self_attn.q" in name]
    kept = {name: tensor.clone() for name, tensor in weights.items() if name not in gone}  # off the file's pages
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if road == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(kept, folder / "pytorch_model.bin")
    names = r"model\.layers\.1\.mlp\.down_proj\.weight, model\.layers\.1\.mlp\.gate_proj\.weight"
    with pytest.raises(UserError, match=rf"lack 4 tensors, such as {names}, .*; fetch it again, whole"):
        load_base_model(
            "org/name" if road == "hub" else str(folder), device="cpu", dtype="float32",
            quantization="torchao-int8" if road == "quantised" else "none",
        )  # fmt: skip


def test_an_expert_that_is_missing_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """transformers 5 puts experts together on the way, and its error refers to a report that is not shown."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", vocab_size=259, num_key_value_heads=2, num_local_experts=4, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    del weights[next(name for name in weights if "experts.2.w1" in name)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"not those of its config\.json \(model\.layers\.0\.mlp\.experts\.gate_up_proj"
    ):
        _load(tmp_path)


def test_weights_of_another_shape(tiny_folder: Path) -> None:
    _edit(tiny_folder / "config.json", intermediate_size=40)
    with pytest.raises(UserError, match=r"not those of its config\.json \(.*mlp.*proj.* of other shapes"):
        _load(tiny_folder)


def test_weights_that_the_model_does_not_take_are_named(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A config.json that says two layers where there are three makes another model of the same weights."""
    _edit(tiny_folder / "config.json", num_hidden_layers=2, layer_types=None)
    capfd.readouterr()
    assert _load(tiny_folder).model.config.num_hidden_layers == 2
    assert "takes no notice of 9 tensors" in (told := capfd.readouterr().err) and "model.layers.2." in told


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache on disk that holds one commit of org/name, and a hub client that believes to be offline."""
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    download = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_a_hub_model_is_recorded_with_its_commit(hub: Path, revision: str) -> None:
    """transformers 5.23 leaves config._commit_hash empty offline, which is why the snapshot is resolved first."""
    base = load_base_model("org/name", device="cpu", dtype="float32", revision=revision)
    assert (base.kind, base.name, base.revision) == ("hub", "org/name", COMMIT)
    assert base.files == (hub / "model.safetensors",)


def test_an_adapter_in_a_hub_repository_is_refused(with_adapter: Path, hub: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json\).*; fetch it without \(hf download org/name --exclude"):
        load_base_model("org/name", device="cpu")
    with pytest.raises(UserError, match=rf"\(hf download org/name --revision {COMMIT} --exclude 'adapter_\*'"):
        load_base_model("org/name", device="cpu", revision=COMMIT)


def test_weights_of_an_adapter_are_not_fetched_nor_taken_for_the_models(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository with pickled weights and an adapter's safetensors that an earlier download left in the cache."""
    (hub / "model.safetensors").rename(hub / "adapter_model.safetensors")
    (hub / "pytorch_model.bin").touch()
    asked = []

    def download(*_: object, **options: Any) -> str:
        asked.append(options)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub_folder("org/name", "", trust_remote_code=False)
    hub_files = ["model.safetensors", "adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin"]
    fetched = [list(filter_repo_objects(hub_files, **_patterns(options))) for options in asked]
    # without the adapter's file in the cache the first answer would have held no safetensors, either
    assert fetched == [["model.safetensors"], ["model.safetensors", "pytorch_model.bin"]]


@pytest.mark.parametrize("counts_bytes", [True, False], ids=["2.4", "1.0"])
def test_a_download_is_shown_once(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], counts_bytes: bool
) -> None:
    """The hub's library tells of it by two bars of bytes for all files; once it had one of its own for each file."""
    seen: list[str] = []
    made = bars_of(hub_module, monkeypatch)
    monkeypatch.setattr(Bar, "is_on", True)

    def by_bytes(tqdm_class: Any) -> None:
        received = tqdm_class(desc="Downloading bytes", total=0, initial=0, unit="B", unit_scale=True)
        written = tqdm_class(desc="Reconstructing", total=0, unit="B", bar_format="{l_bar}")
        seen.append(made[0].count())
        written.total, received.total = 4_000_000, 4_000_000
        written.refresh()
        for bar, count in ((received, 1_000_000), (written, 500_000), (written, 3_500_000)):
            bar.update(count)
            bar.refresh()
            seen.append(made[0].count())
        written.close()

    def by_files(tqdm_class: Any) -> None:
        with hf_tqdm(desc="model.safetensors", total=100, unit="B") as one:
            assert one.disable  # it would be drawn beside ours
        for _ in tqdm_class([1, 2], desc="Fetching 2 files", total=2):
            seen.append(made[0].count())

    def download(name: str, tqdm_class: Any, **_: Any) -> str:
        (by_bytes if counts_bytes else by_files)(tqdm_class)
        with tqdm_class(desc="Fetching 2 files", total=2) as files:
            files.update(2)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub_folder("org/name", "", trust_remote_code=False)
    assert (made[0].label, capfd.readouterr()) == ("fetching org/name", ("", ""))
    if counts_bytes:
        assert seen == ["0 bytes of 0 bytes", "1.0 MB of 4.0 MB", "1.0 MB of 4.0 MB", "4.0 MB of 4.0 MB"]
        assert made[0].count() == "4.0 MB of 4.0 MB"
    else:
        assert seen[0] == "0/2 files" and made[0].count() == "2/2 files"
    assert not are_progress_bars_disabled()


def test_a_download_from_python_shows_nothing(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, tqdm_class: Any, **_: Any) -> str:
        with tqdm_class(total=10, unit="B") as bar:
            bar.update(5)
            assert bar.disable
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub_folder("org/name", "", trust_remote_code=False)
    assert capfd.readouterr() == ("", "")


def _patterns(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("allow_patterns", "ignore_patterns")}


def test_hub_offline(hub: Path) -> None:
    with pytest.raises(UserError, match=r"org/other is no folder here.*hub cannot be reached.*smollm2-135m-instruct"):
        load_base_model("org/other")
    with pytest.raises(UserError, match=r"org/name at revision 'v9' is no folder here"):
        load_base_model("org/name", revision="v9")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, "neither a folder here nor a model on the hub that you may read"),
        (errors.GatedRepoError, "is gated on the hub; accept its terms"),
        (errors.RevisionNotFoundError, "has no revision 'v9' on the hub"),
    ],
)
def test_hub_refusals(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error.__new__(error)  # their constructors want a whole HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        load_base_model("org/name", revision="v9")


def test_hub_repository_without_a_config(hub: Path) -> None:
    (hub / "config.json").unlink()
    with pytest.raises(UserError, match=r"org/name on the hub has no config\.json"):
        load_base_model("org/name")
