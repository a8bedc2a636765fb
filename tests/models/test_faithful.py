"""Each text is looked for in the rendered prompt: what a template drops is refused, what it trims is not."""

from pathlib import Path

import pytest
from tiny_run import ByteTask, start
from tiny_tokenizer import CHAT_TEMPLATE

from tinylora.errors import UserError
from tinylora.models.base import BaseModel
from tinylora.models.faithful import REMARK
from tinylora.models.load import encode_prompt, load_base_model
from tinylora.models.prompt import encode_prompts

QUESTION = [{"role": "user", "content": "1 + 2 ="}]
SYSTEM = [{"role": "system", "content": "Add."}]
EXAMPLE = [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}]
ALL = [*SYSTEM, *EXAMPLE, *QUESTION]
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + TURN
CUT = "{% for m in messages %}{{ m.content[:40] }}{% endfor %}"
INSTRUCTION = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ s if loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n"
    "{% endfor %}"
)


@pytest.fixture
def base(tiny_folder: Path) -> BaseModel:
    """The tiny Llama."""
    return load_base_model(str(tiny_folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("template", "turns", "told"),
    [
        (PARTS, QUESTION, "leaves out the question: it expects contents as lists of parts"),
        (PARTS, ALL, "leaves out the system prompt: it expects contents as lists of parts.*chat_template.jinja"),
        (NO_SYSTEM, ALL, r"leaves out the system prompt; .*prompt\.template"),
        ("{% for m in messages[-1:] %}" + TURN, ALL, "leaves out the system prompt"),
        ("{% for m in messages[-1:] %}" + TURN, ALL[1:], r"leaves out the question of example 1; .*few_shot"),
        ("{% for m in messages if m.role != 'assistant' %}" + TURN, ALL, "leaves out the answer of example 1"),
        ("{% for m in messages[:-1] %}" + TURN, QUESTION, "leaves out the question"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}1 + 2 =", QUESTION, "leaves out the question"),
        ("{% for m in messages %}{{ m.content[:8] }}{% endfor %}", QUESTION, "leaves out the question"),
        (CUT, [{"role": "user", "content": "x" * 41}], "as it is"),
        ("{% for m in messages %}{% if '1' not in m.content %}" + TURN.replace("{% endfor", "{% endif %}{% endfor"),
         QUESTION, "does not show the question as it is: '1 \\+ 2 ='"),
    ],
)  # fmt: skip
def test_what_a_template_drops_is_refused(
    base: BaseModel, template: str, turns: list[dict[str, str]], told: str
) -> None:
    base.tokenizer.chat_template = template
    with pytest.raises(UserError, match=told) as caught:
        encode_prompt(base, turns)
    assert "prompt.chat=false" in str(caught.value)
    assert encode_prompt(base, turns, chat=False)


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (CHAT_TEMPLATE, " 1 + 2 =\n"),
        ("{% for m in messages %}{{ m.content.strip() }}{% endfor %}", "\n 1 +\n\n 2 = \n"),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", "1 + 2 =\t"),
        ("{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}", "1  +\n2"),
        ("{{ messages | tojson }}", 'say "hé"\nand \\ this'),
        ("{% for m in messages %}{{ m.content | e }}{% endfor %}", "1 < 2 & 'a'"),
        ("{% for m in messages %}{{ m.content | replace('/no_think', '') }}{% endfor %}", "1 + 2 = /no_think"),
        ("{% for m in messages %}{{ m.content | replace('/think', '') }}{% endfor %}", "hm /think 1"),
        (CHAT_TEMPLATE, "{{ 7 * 7 }} {% raw %}"),
    ],
)
def test_what_a_template_trims_is_no_loss(base: BaseModel, template: str, content: str) -> None:
    base.tokenizer.chat_template = template
    assert encode_prompts(base, [[{"role": "user", "content": content}]])[0].remarks == ()


def test_a_system_prompt_may_stand_in_the_users_turn(base: BaseModel) -> None:
    """As Mistral's templates have it: in the last one, behind the examples."""
    base.tokenizer.chat_template = INSTRUCTION
    text = base.tokenizer.decode(encode_prompt(base, ALL))
    assert text == "[INST] 2 + 2 =[/INST]4[INST] Add.\n\n1 + 2 =[/INST]"


def test_reasoning_that_a_template_leaves_out_is_said(base: BaseModel) -> None:
    base.tokenizer.chat_template = QWEN3
    turns = [EXAMPLE[0], {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"}, *QUESTION]
    (encoded,) = encode_prompts(base, [turns])
    assert encoded.remarks == (REMARK,)
    with pytest.raises(UserError, match="the question as it is"):
        base.tokenizer.chat_template = QWEN3.replace("m.role == 'assistant' and ", "")
        encode_prompt(base, [{"role": "user", "content": "what is </think> here?"}])


def test_a_run_on_identical_prompts_does_not_begin(tiny_folder: Path, tmp_path: Path, fresh_cache: Path) -> None:
    (tiny_folder / "chat_template.jinja").write_text(PARTS)
    with pytest.raises(UserError, match="leaves out the question"):
        start(tiny_folder, tmp_path / "runs", task=ByteTask(), train={"steps": 1})
    assert not (tmp_path / "runs").exists()
