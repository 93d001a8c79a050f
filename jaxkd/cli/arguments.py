"""The flags of each verb. `--config.KEY=VALUE` is read by `config.recipe`, and allowed wherever `--config` is."""

import argparse
from collections.abc import Mapping
from typing import Any

from jaxkd import __version__

RECIPE_HELP = """\
The recipe is a Python file with get_config(argument); any key of docs/config.md can be set on the command line:

  --config=configs/quickstart.py              the recipe (or --config FILE:ARGUMENT)
  --config.optim.lr.peak=1e-4                 a value; an unknown key names the nearest known ones
  --config.teacher.path=models/Llama-3.2-1B   a local Hugging Face directory or GGUF file

A domain's source (--config.data.domains.NAME=SOURCE) is one of
  builtin:code, builtin:manual, builtin:legal, builtin:scripture, builtin:dialogue, builtin:math
  a file (.jsonl, .json, .csv, .parquet, .txt, also .gz or .zst; any other text), a folder of such data, or a glob
  tfds:NAME or tfds:NAME:SPLIT, a TFDS dataset on this machine, or its directory
  any of these with ::FIELD, the field that holds the text (data.text_key is for those without; docs/data.md)
  empty (--config.data.domains.NAME=), which removes a domain of the recipe
"""
EVALUATE_HELP = "--config.KEY=VALUE sets keys such as data.length, data.valid_rows (a limit) and run.eval_batch.\n"

Flag = tuple[str, dict[str, Any]]
_switch = lambda name, text: (name, {"action": "store_true", "help": text})
_RECIPE: Flag = ("--config", {"metavar": "FILE[:ARGUMENT]", "required": True, "help": "the recipe, see below"})
_WORKDIR: Flag = ("--workdir", {"metavar": "DIR", "required": True, "help": "directory of the run"})
_STEP: Flag = ("--step", {"metavar": "N", "help": "step of the checkpoint, or best (default: the latest)"})
_DATA = "text to evaluate on, all of it, as in data.domains (default: the run's held-out rows)"
_LINE = 'a variant: "NAME: [:ARGUMENT] [--config.KEY=VALUE ...]"'
_OVERWRITE = "write into a directory that is not empty; only files of an earlier export are replaced"

FLAGS: Mapping[str, tuple[Flag, ...]] = {
    "prepare": (_RECIPE,),
    "cache": (_RECIPE, _switch("--verify", "write nothing: read every record and compare its checksum")),
    "check": (_RECIPE,),
    "plan": (
        _RECIPE,
        ("--topology", {"metavar": "NAME", "required": True, "help": "such as v5litepod-16, v5p-128, or v5e:4x4"}),
        ("--slices", {"type": int, "default": 1, "help": "number of slices, joined by the network"}),
        _switch("--json", "print one JSON object"),
        _switch("--sampling", "what writing text costs too: a decoded token, and a rollout's share of a step"),
        _switch("--suggest", "search for the fastest mesh, remat and micro-batches"),
        ("--budget", {"type": float, "default": 300.0, "metavar": "SECONDS", "help": "limit of the search"}),
    ),
    "train": (
        _RECIPE,
        _WORKDIR,
        ("--profile", {"metavar": "START:COUNT", "default": "", "help": "steps to trace, into WORKDIR/profile"}),
        _switch("--no-check", "do not run `jaxkd check` first"),
        _switch("--accept-changes", "resume with a changed config"),
    ),
    "sweep": (
        _RECIPE,
        _WORKDIR,
        ("--variants", {"nargs": "+", "default": [], "metavar": "ARGUMENT", "help": "recipe arguments, one each"}),
        ("--run", {"action": "append", "default": [], "metavar": "LINE", "help": _LINE}),
        ("--runs", {"metavar": "FILE", "help": "a file of such lines"}),
        ("--seeds", {"nargs": "+", "type": int, "default": [0], "metavar": "N", "help": "of run.seed (default: 0)"}),
        _switch("--print", "print the remaining commands, for a launcher"),
    ),
    "rollback": (_WORKDIR, ("--step", {**_STEP[1], "required": True, "help": "step of the checkpoint, or best"})),
    "evaluate": (
        ("--workdir", {"metavar": "DIR", "help": "directory of a run: its student against its teacher"}),
        ("--model", {"metavar": "PATH", "help": "a Hugging Face directory, a GGUF file or a known name"}),
        ("--teacher", {"metavar": "PATH", "help": "the same: what --model is evaluated against"}),
        ("--data", {"nargs": "+", "default": [], "metavar": "[NAME=]SOURCE", "help": _DATA}),
        (
            "--tasks",
            {"nargs": "+", "default": [], "metavar": "FILE", "help": "tasks to measure instead, see docs/tasks.md"},
        ),
        _switch("--json", "of tasks: print a JSON object per figure"),
        ("--output", {"metavar": "DIR", "help": "of tasks: for tasks.jsonl and completions (default: the run's)"}),
        _STEP,
    ),
    "generate": (
        ("prompt", {"nargs": "*", "metavar": "PROMPT", "help": "texts to continue (default: lines of standard input)"}),
        ("--workdir", {"metavar": "DIR", "help": "directory of a run: its student writes"}),
        _STEP,
        _switch("--beside-teacher", "the run's teacher writes too"),
        ("--model", {"metavar": "PATH", "help": "a Hugging Face directory, a GGUF file or a known name"}),
        ("--prompts", {"metavar": "FILE", "help": "JSON Lines with messages, prompt or text; or a text a line"}),
        _switch("--chat", "answer by the chat template; without a prompt, a conversation in the terminal"),
        ("--system", {"metavar": "TEXT", "default": "", "help": "system prompt of a chat"}),
        ("--max-new-tokens", {"type": int, "default": 256, "metavar": "N", "help": "of a completion (default: 256)"}),
        ("--temperature", {"type": float, "help": "0 is greedy (default: the model's own settings)"}),
        ("--top-k", {"type": int, "help": "draw from the K most probable tokens"}),
        ("--top-p", {"type": float, "help": "draw from the fewest tokens that hold this probability"}),
        ("--min-p", {"type": float, "help": "draw from tokens with this share of the largest probability"}),
        ("--repetition-penalty", {"type": float, "help": "above 1: fewer repetitions"}),
        ("--presence-penalty", {"type": float, "help": "subtracted from the logits of written tokens"}),
        ("--n", {"type": int, "default": 1, "metavar": "N", "help": "completions of each prompt (default: 1)"}),
        ("--stop", {"action": "append", "default": [], "metavar": "TEXT", "help": "ends a completion; repeatable"}),
        ("--seed", {"type": int, "default": 0, "metavar": "N", "help": "of the draws (default: 0)"}),
        _switch("--json", "print a JSON object per completion"),
        _switch("--logprobs", "with ids and log-probabilities; implies --json"),
    ),
    "export": (
        _WORKDIR,
        _STEP,
        ("--output", {"metavar": "DIR", "required": True, "help": "directory to write"}),
        ("--dtype", {"choices": ("float32", "bfloat16"), "default": "float32", "help": "of the weights"}),
        _switch("--overwrite", _OVERWRITE),
    ),
    "report": (_WORKDIR,),
    "compare": (
        ("directories", {"nargs": "+", "metavar": "DIR", "help": "a run, or a directory of runs such as a sweep's"}),
        ("--baseline", {"metavar": "VARIANT", "help": "the variant to compare with (default: the first)"}),
        _switch("--json", "print JSON instead of tables"),
        ("--output", {"metavar": "FILE", "help": "page to write (default: compare.html in the first directory)"}),
    ),
}


def parser(summaries: Mapping[str, str]) -> argparse.ArgumentParser:
    """The parser of all verbs, each with its one-line summary."""
    root = argparse.ArgumentParser("jaxkd", description="Distil large language models with JAX.")
    root.add_argument("--version", action="version", version=f"jaxkd {__version__}")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in summaries.items():
        epilog = RECIPE_HELP if _RECIPE in FLAGS[name] else EVALUATE_HELP if name == "evaluate" else None
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for flag, options in FLAGS[name]:
            sub.add_argument(flag, **options)
    return root
