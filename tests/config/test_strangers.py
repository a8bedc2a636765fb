"""What a stranger's settings may say is a list, and every setting is on one side of it."""

from dataclasses import replace

import pytest

from tinylora.config.recipe import apply_overrides
from tinylora.config.run import RunConfig
from tinylora.config.schema import hints_of, is_section
from tinylora.config.strangers import MAY_NOT_SAY, MAY_SAY, SAFE_SCORERS, as_a_stranger_says, beyond
from tinylora.tasks.build import SCORERS

HOSTILE = (
    "task.scorer=os:system",
    "task.scorer=python-tests",
    "task.path=/etc/passwd",
    "model.name=org/model",
    "model.name=/srv/model",
    "model.trust_remote_code=true",
    'log.trackers=["wandb"]',
)


def test_every_setting_is_decided_upon() -> None:
    settings = set()
    for section, hint in hints_of(RunConfig).items():
        settings |= {f"{section}.{name}" for name in hints_of(hint)} if is_section(hint) else {section}
    assert MAY_SAY | MAY_NOT_SAY.keys() == settings
    assert not MAY_SAY & MAY_NOT_SAY.keys()


def test_every_scorer_is_decided_upon() -> None:
    assert SAFE_SCORERS | {"python-tests"} == SCORERS.keys() | {"reasoning-gym"}


@pytest.mark.parametrize("said", HOSTILE)
def test_what_chooses_code_files_or_the_network_is_put_back(said: str) -> None:
    config = apply_overrides(RunConfig(), [said, "optim.lr=0.5", "prompt.system=hello"])
    (key,) = beyond(config)
    assert key == said.partition("=")[0]
    data = as_a_stranger_says(config)
    assert beyond(data) == {} and data == apply_overrides(RunConfig(), ["optim.lr=0.5", "prompt.system=hello"])


def test_options_of_code_go_with_it() -> None:
    """With the scorer put back, its options are no options of another one."""
    unsafe = ["task.scorer=python-tests", "task.scorer_options.unsafe_without_namespaces=true"]
    config = apply_overrides(RunConfig(), unsafe)
    assert beyond(config).keys() == {"task.scorer", "task.scorer_options"}
    assert as_a_stranger_says(config).task == RunConfig().task
    harmless = apply_overrides(RunConfig(), ["task.scorer=regex", "task.scorer_options.pattern=(a)"])
    assert beyond(harmless) == {} and as_a_stranger_says(harmless) == harmless


def test_a_setting_that_nobody_has_decided_upon_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylora.config.strangers.MAY_SAY", MAY_SAY - {"optim.lr"})
    config = replace(RunConfig(), optim=replace(RunConfig().optim, lr=9.0))
    assert beyond(config) == {"optim.lr": 9.0} and as_a_stranger_says(config) == RunConfig()
