"""The command line: `kvprune demo`, `generate`, `chat`, `policies`, `eval`, `compare`, `serve`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import MISSING, asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvprune import __version__
from kvprune.errors import KVPruneError, PolicyError
from kvprune.evaluation import cli as evaluation
from kvprune.serving.command import serve

app = typer.Typer(
    help="KV-cache compression for long-context language models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(evaluation.app, name="eval")
app.command()(evaluation.compare)
app.command()(serve)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and everything else elsewhere.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"kvprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """KV-cache compression for long-context language models."""


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
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with the prompt; - for standard input.")] = None,
    policy: Annotated[
        str,
        typer.Option(
            help='"a2sf", "snapkv:window=64", "a2sf:budget=0.5 | tova", or "package.module:Class" of your own.'
        ),
    ] = "a2sf:kernel_size=27,ahead=23",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Fraction of the prompt, tokens per KV head (1024), bytes (512MiB), or a share of the 16-bit bytes of "
            "the full cache (0.05b).",
            show_default="0.25",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Chat template. Default: if the tokenizer has one.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest so much.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the likeliest so many.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer from the full cache, beside it.")] = False,
    dtype: Annotated[str, typer.Option(help='Weights: "auto", "float32", "bfloat16", "float16".')] = "auto",
    device_map: Annotated[str | None, typer.Option(help='Where to load the model, e.g. "auto" or "cuda".')] = None,
    report: Annotated[bool, typer.Option("--report", help="Also print what each layer holds.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw which tokens were kept, as a picture file.")] = None,
    show_selected: Annotated[
        bool, typer.Option("--show-selected", help="Print the part of the prompt that gemfilter chose.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt with a pruned cache as you watch, and say what it cost."""
    from kvprune.cache.report import check_picture

    # Before the model loads: a mistake should not cost minutes.
    chosen = _chosen(policy, budget)
    if show_selected and not chosen.filters_prompt:
        raise PolicyError(
            f"{chosen} filters no prompt, so --show-selected has nothing to show: --policy gemfilter does."
        )
    if plot is not None:
        check_picture(plot)
    if (prompt is None) == (prompt_file is None):
        raise KVPruneError('give the prompt either as --prompt "text" or as --prompt-file FILE.')
    text = (
        prompt
        if prompt is not None
        else sys.stdin.read()
        if str(prompt_file) == "-"
        else _read(Path(prompt_file or ""))
    )
    if not text.strip():
        raise KVPruneError("the prompt holds no text: give one of at least one token.")

    import torch

    from kvprune import generation
    from kvprune.evaluation.models import load
    from kvprune.saving import PrunedCache

    settings = generation.sampling(temperature, top_p, top_k) | {"max_new_tokens": max_new_tokens}
    loaded = load(model, dtype=dtype, device_map=device_map)
    tokenizer, language_model = loaded.tokenizer, loaded.model
    inputs = generation.prompt_inputs(tokenizer, language_model.device, text, chat)
    cache = PrunedCache(language_model, chosen)
    console = _console(as_json)

    def answer(name: str, held: Any) -> generation.Generated:
        if compare:
            console.print(f"[bold]{escape(name)}[/]", highlight=False)
        torch.manual_seed(seed)
        write = None if as_json else lambda piece: print(piece, end="", flush=True)
        result = generation.generate(language_model, tokenizer, inputs, held, write=write, **settings)
        if not as_json:
            print()
            console.print(str(result), style="dim", highlight=False, soft_wrap=True)
        return result

    result = answer(str(chosen), cache)
    full = answer("full cache", generation.full_cache(language_model)) if compare else None
    held = cache.report()
    if plot is not None:
        held.plot(plot)
    chosen_text = _selected_text(tokenizer, inputs["input_ids"][0].tolist(), held.selected) if show_selected else None
    if as_json:
        summary = {**asdict(result), "cache": held.to_dict()}
        summary |= {"full": asdict(full)} if full is not None else {}
        print(json.dumps(summary | ({"selected_text": chosen_text} if show_selected else {})))
        return
    if report:
        console.print()
        console.print(held)
    if show_selected:
        console.print()
        if chosen_text is not None:
            console.print(chosen_text, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print("Nothing was left out: the prompt fits into the budget.")


@app.command()
def chat(
    model: Annotated[
        str, typer.Option(help='A model folder or hub name; "demo" is the embedded model, "smollm2" a real one.')
    ],
    policy: Annotated[
        str, typer.Option(help='"kvzip", "a2sf:kernel_size=27,ahead=23", or "package.module:Class" of your own.')
    ] = "kvzip",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Fraction of what is read, tokens per KV head (1024), bytes (512MiB), or a share of the 16-bit bytes "
            "of the full cache (0.05b).",
            show_default="0.25",
        ),
    ] = None,
    read: Annotated[Path | None, typer.Option(help="Text file to read first, as /read does.")] = None,
    load: Annotated[
        Path | None, typer.Option(help="Conversation to go on with, as /load does; its policy comes with it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What a message of the system says, before all others.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest so much.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the likeliest so many.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help='Weights: "auto", "float32", "bfloat16", "float16".')] = "auto",
    device_map: Annotated[str | None, typer.Option(help='Where to load the model, e.g. "auto" or "cuda".')] = None,
) -> None:
    """Talk on one compressed cache, and see after each answer what it holds. /help lists what else can be written."""
    chosen = _chosen(policy, budget)
    for path in (read, load):
        if path is not None and not path.is_file():
            raise KVPruneError(f"there is no file {path}.")
    if load is not None and (read is not None or system is not None):
        raise KVPruneError("--load goes on with a conversation: leave --read and --system out, and write /read FILE.")

    import torch

    from kvprune import generation
    from kvprune.chat.conversation import Chat
    from kvprune.chat.terminal import Terminal
    from kvprune.evaluation import models

    settings = generation.sampling(temperature, top_p, top_k) | {"max_new_tokens": max_new_tokens}
    loaded = models.load(model, dtype=dtype, device_map=device_map)
    terminal = Terminal(
        Chat(loaded.model, loaded.tokenizer, chosen, system=system), _console(as_json=False), **settings
    )
    torch.manual_seed(seed)
    terminal.begin(load, read)
    terminal.run()


def _chosen(policy: str, budget: str | None) -> Any:
    """The policy that is named, with the budget that is given, or a quarter."""
    from kvprune.policy.registry import parse, takes_budget

    chosen = parse(policy, budget="0.25" if budget is None else budget)
    if budget is not None and not takes_budget(policy):
        raise PolicyError(f"{chosen} takes no other budget: leave --budget out, or put a policy before it that evicts.")
    return chosen


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
def policies(
    name: Annotated[str | None, typer.Argument(help="A policy, to say what each of its settings means.")] = None,
    as_json: Json = False,
) -> None:
    """List the policies, their settings and defaults; with a name, what each setting means."""
    from kvprune.policy.registry import find, names

    if name is not None:
        find(name)  # says which names there are
    entries = [_entry(each) for each in ([name] if name else names())]
    if as_json:
        print(json.dumps(entries, indent=1, default=str))
    elif name is None:
        _console(False).print(_overview(entries))
    else:
        _console(False).print(_explained(entries[0]))


def _overview(entries: list[dict[str, Any]]) -> Table:
    table = Table(
        title="policies",
        title_justify="left",
        caption='Use them as "name" or "name:setting=value,setting=value".\n'
        "`kvprune policies NAME` says what each setting means.",
        caption_justify="left",
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
    return table


def _explained(entry: dict[str, Any]) -> Table:
    table = Table(title=f"{entry['name']}: {entry['source']}", title_justify="left", show_lines=True)
    table.add_column("setting", style="bold")
    table.add_column("default")
    table.add_column("meaning")
    for name, meaning in entry["meanings"].items():
        table.add_row(name, Text(str(entry["settings"].get(name, "none"))), Text(meaning))
    return table


def _entry(name: str) -> dict[str, Any]:
    """What is listed of a policy; of one that cannot be loaded, what is wrong with it."""
    from kvprune.policy.naming import meanings, settings_of
    from kvprune.policy.registry import find

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
        "meanings": meanings(policy),
    }


def main() -> None:
    """Entry point: mistakes a person can make end in one clear sentence, not in a traceback."""
    sys.path.append(os.getcwd())  # for policies of one's own, as package.module:Class
    try:
        app()
    except KVPruneError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
