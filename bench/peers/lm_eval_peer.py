"""The peer process of bench/trust/interop.py that runs lm-evaluation-harness with its own `peft=` argument.

python lm_eval_peer.py JOB.json        (an interpreter with lm-eval; see README.md)
"""

import json
import sys
import tempfile
from pathlib import Path

TASK = """task: tinylora_prompts
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: {count}
metric_list:
  - metric: exact_match
"""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "items.jsonl"
        data.write_text("".join(json.dumps({"question": q, "answer": ""}) + "\n" for q in job["texts"]))
        (Path(scratch) / "task.yaml").write_text(TASK.format(data=data, count=job["count"]))
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={job['folder']},peft={job['lora']},dtype=float32,add_bos_token=False",
            tasks=["tinylora_prompts"],
            task_manager=TaskManager(include_path=scratch),
            device="cpu",
            batch_size=1,
            log_samples=True,
        )
    samples = sorted(found["samples"]["tinylora_prompts"], key=lambda sample: sample["doc_id"])
    print(json.dumps({"texts": [s["resps"][0][0] for s in samples], "version": lm_eval.__version__}))


if __name__ == "__main__":
    main()
