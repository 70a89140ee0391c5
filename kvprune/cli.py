"""The command line: `kvprune demo`, `generate`, `policies`, `eval`, `compare`."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvprune.cache.models import cache_argument
from kvprune.errors import KVPruneError, PolicyError
from kvprune.evaluation import cli as evaluation

app = typer.Typer(
    help="KV-cache compression for long-context language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.add_typer(evaluation.app, name="eval")
app.command()(evaluation.compare)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and everything else elsewhere.")]


def _console(as_json: bool) -> Console:
    """The console for tables and messages: standard error if standard output carries JSON."""
    return Console(stderr=as_json)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each document.")] = 4096,
    notes: Annotated[int, typer.Option(min=1, help="Notes hidden in each document.")] = 64,
    questions: Annotated[int, typer.Option(min=1, help="Questions to ask in all.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the documents.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("kvprune-demo"),
    as_json: Json = False,
) -> None:
    """Watch the embedded model answer questions about a long document from ever smaller caches."""
    from kvprune.demo.show import Demo

    summary = Demo(tokens, notes, questions, seed=seed, out=out, console=_console(as_json)).run()
    if as_json:
        print(json.dumps(summary, indent=1))


@app.command()
def generate(
    model: Annotated[
        str, typer.Option(help='A model folder or hub name; "demo" is the embedded model, "smollm2" a real one.')
    ],
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt; - for standard input.")],
    policy: Annotated[
        str, typer.Option(help='A policy, e.g. "a2sf", "snapkv:window=64", "a2sf:budget=0.5 | tova".')
    ] = "a2sf",
    budget: Annotated[
        str, typer.Option(help="Fraction of the prompt (0.25), tokens per KV head (1024), or bytes (512MiB).")
    ] = "0.25",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help='Weights: "auto", "float32", "bfloat16", "float16".')] = "auto",
    device_map: Annotated[str | None, typer.Option(help='Where to load the model, e.g. "auto" or "cuda".')] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw which tokens were kept, as a picture file.")] = None,
    show_selected: Annotated[
        bool, typer.Option("--show-selected", help="Print the part of the prompt that gemfilter chose.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate from a prompt file with a pruned cache, and report what was kept."""
    import torch

    from kvprune.evaluation.models import load
    from kvprune.policy.registry import parse
    from kvprune.saving import PrunedCache

    chosen = parse(policy, budget=budget)  # before the model loads: a typing mistake should not cost minutes
    text = sys.stdin.read() if str(prompt_file) == "-" else _read(prompt_file)
    loaded = load(model, dtype=dtype, device_map=device_map)
    tokenizer, language_model = loaded.tokenizer, loaded.model
    if chat and not getattr(tokenizer, "chat_template", None):
        raise KVPruneError(
            f"the tokenizer of {model} has no chat template: leave --chat out to give it the text as it is."
        )
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise KVPruneError(f"{prompt_file} holds no text: give a prompt of at least one token.")
    inputs = {name: tensor.to(language_model.device) for name, tensor in inputs.items() if name != "token_type_ids"}
    cache = PrunedCache(language_model, chosen)
    with torch.inference_mode():
        output = language_model.generate(
            **inputs, **cache_argument(cache), max_new_tokens=max_new_tokens, do_sample=False
        )
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    report = cache.report()
    if plot is not None:
        report.plot(plot)
    chosen_text = _selected_text(tokenizer, inputs["input_ids"][0].tolist(), report.selected) if show_selected else None
    if as_json:
        summary = {"text": answer, "prompt_tokens": inputs["input_ids"].shape[1], "cache": report.to_dict()}
        print(json.dumps(summary | ({"selected_text": chosen_text} if show_selected else {})))
        return
    console = _console(False)
    console.print(answer, markup=False, highlight=False, soft_wrap=True)
    console.print()
    console.print(report)
    if show_selected:
        console.print()
        if chosen_text is not None:
            console.print(chosen_text, markup=False, highlight=False, soft_wrap=True)
        elif cache.prompt_filter is None:
            console.print(f"Nothing was selected: {chosen} filters no prompt; --policy gemfilter does.")
        else:
            console.print("Nothing was selected: the prompt fits into the budget.")


def _selected_text(tokenizer: Any, ids: list[int], selected: list[Any] | None) -> str | None:
    """The chosen tokens of one prompt as text, with " … " where tokens are left out."""
    if selected is None:
        return None
    positions = selected[0].tolist()
    starts = [place for place, at in enumerate(positions) if place == 0 or positions[place - 1] != at - 1]
    runs = [positions[start:stop] for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True)]
    text = " … ".join(tokenizer.decode([ids[at] for at in run], skip_special_tokens=True) for run in runs)
    return (" … " if positions[0] > 0 else "") + text + (" … " if positions[-1] < len(ids) - 1 else "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KVPruneError(f"cannot read the prompt file {path}: {error}") from error


@app.command()
def policies(as_json: Json = False) -> None:
    """List the policies, their settings and defaults."""
    from kvprune.policy.registry import names

    entries = [_entry(name) for name in names()]
    if as_json:
        print(json.dumps(entries, indent=1, default=str))
        return
    table = Table(
        title="policies", title_justify="left", caption='use them as "name" or "name:setting=value,setting=value"'
    )
    table.add_column("name", style="bold")
    table.add_column("paper")
    table.add_column("settings and defaults")
    for entry in entries:
        if "error" in entry:
            table.add_row(entry["name"], "", Text(entry["error"], style="red"))
            continue
        settings = [f"{name}={value}" for name, value in entry["settings"].items()]
        settings += [f"{name} (no default)" for name in entry["required"]]
        table.add_row(entry["name"], Text(entry["source"].partition(": ")[2]), Text(", ".join(settings) or "none"))
    _console(False).print(table)


def _entry(name: str) -> dict[str, Any]:
    """What is listed of a policy; of one that cannot be loaded, what is wrong with it."""
    from kvprune.policy.registry import find, settings_of

    try:
        policy = find(name)
    except PolicyError as error:
        return {"name": name, "error": str(error)}
    settings = settings_of(policy)
    lines = (sys.modules[policy.__module__].__doc__ or "").strip().splitlines()
    return {
        "name": name,
        "class": policy.__name__,
        "source": lines[0] if lines else "",
        "settings": {setting: default for setting, default in settings.items() if default is not MISSING},
        "required": [setting for setting, default in settings.items() if default is MISSING],
    }


def main() -> None:
    """Entry point: mistakes a person can make end in one clear sentence, not in a traceback."""
    try:
        app()
    except KVPruneError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
