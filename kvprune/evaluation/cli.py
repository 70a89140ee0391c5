"""The command line of evaluations: `kvprune eval longbench | synthetic | likelihood`, and `kvprune compare`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from kvprune.errors import EvaluationError

app = typer.Typer(
    help="Evaluate what policies and budgets do to a model's answers; an interrupted run resumes where it stopped.",
    no_args_is_help=True,
)

Model = Annotated[
    str, typer.Option(help='A model folder or hub name; "demo" is the embedded model, "smollm2" a real one.')
]
Policies = Annotated[
    list[str],
    typer.Option(
        "--policy", help='A policy or chain; repeat it for several. "full" is the full cache, to compare with.'
    ),
]
Budgets = Annotated[
    list[str],
    typer.Option(
        "--budget",
        help="Budgets, each for every policy: 0.25 or 0.1,0.25,0.5 (of tokens), or 0.05b (of bytes at 16 bits).",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Results, a JSON line each; a run that finds some there goes on.")]
Dtype = Annotated[str, typer.Option(help='Weights: "auto", "float32", "bfloat16", "float16".')]
DeviceMap = Annotated[str | None, typer.Option(help='Where to load the model: "auto" spreads it over all GPUs.')]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Most tokens of a prompt; longer ones lose their middle. Default: the model's window."),
]
Chat = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Chat template. Default: if the tokenizer has one.")
]
Question = Annotated[
    Literal["known", "unknown"],
    typer.Option(help='"unknown": the text is compressed before the question comes.'),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON summary on standard output.")]


@dataclass(frozen=True)
class Run:
    """The options that all evaluations share."""

    model: str
    policies: Sequence[str]
    budgets: Sequence[str]
    out: Path | None
    dtype: str
    device_map: str | None
    as_json: bool

    def __call__(self, work_for: Callable[[Any], Any]) -> list[dict[str, Any]]:
        """Load the model, do the work that `work_for(model)` returns, and show the results. Returns the rows."""
        from kvprune.evaluation.contenders import contenders
        from kvprune.evaluation.models import load
        from kvprune.evaluation.processes import Processes
        from kvprune.evaluation.results import Results
        from kvprune.evaluation.run import run

        console = Console(stderr=self.as_json)
        check_writable(self.out)
        processes = Processes.from_environment()
        if processes.count > 1 and self.device_map is not None:
            raise EvaluationError(
                "several processes hold a whole model each, on devices of their own: leave --device-map out, or run "
                "one process."
            )
        if processes.count > 1 and self.out is None:
            raise EvaluationError("several processes put their results together in a file: name it with --out.")
        who = contenders(self.policies, [each for budget in self.budgets for each in budget.split(",")])
        results = Results(self.out, processes.index if processes.count > 1 else None)
        with processes:
            model = load(self.model, dtype=self.dtype, device_map=self.device_map, local_index=processes.local_index)
            rows = run(work_for(model), who, results, model=model.name, processes=processes, console=console)
        if processes.is_first:
            show(rows, console, self.as_json)
            if self.out is not None:
                console.print(f"Results: [bold]{self.out}[/]", highlight=False, soft_wrap=True)
        return rows


def show(rows: Sequence[dict[str, Any]], console: Console, as_json: bool) -> None:
    """Tables for people, or one JSON object a comparison for machines."""
    from kvprune.evaluation.doubts import doubts
    from kvprune.evaluation.summary import compare
    from kvprune.evaluation.tables import tables

    comparisons = compare(rows)
    if as_json:
        print(json.dumps([comparison.to_dict() for comparison in comparisons], indent=1, ensure_ascii=False))
        return
    for comparison in comparisons:
        for table in tables(comparison):
            console.print(table)
    for doubt in doubts(rows):
        console.print(f"[yellow]Note:[/] {escape(doubt)}", highlight=False, soft_wrap=True)


def check_writable(*files: Path | None) -> None:
    """Raise EvaluationError unless results can be written there: before the hours that they take."""
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise EvaluationError(f"{file} is a folder: name a file in it.")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"cannot write to {file}: {error}") from error
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise EvaluationError(f"cannot write to {file}: no permission.")


def check_drawable(picture: Path | None) -> None:
    """Raise EvaluationError unless a picture can be written there, and drawn in that format."""
    check_writable(picture)
    if picture is not None:
        from matplotlib.figure import Figure

        formats = Figure().canvas.get_supported_filetypes()
        if picture.suffix.removeprefix(".").lower() not in formats:
            raise EvaluationError(f"cannot draw {picture}: write one of {', '.join(sorted(formats))}.")


@app.command()
def longbench(
    model: Model,
    policy: Policies,
    data: Annotated[str, typer.Option(help='LongBench\'s folder or zip file, "hub", or "hub:OWNER/NAME".')] = "hub",
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; all by default.")] = "",
    extended: Annotated[bool, typer.Option("--e", help="LongBench-E: 13 tasks, scores by length.")] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of LongBench's dataset2prompt.json and dataset2maxlen.json.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most examples of a task.")] = None,
    budget: Budgets = ["0.25"],  # noqa: B006 - typer reads it, nobody writes it
    out: Out = None,
    max_length: MaxLength = None,
    chat: Chat = None,
    question: Question = "known",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """LongBench: 21 tasks with its own prompts, answer lengths, truncation and metrics.

    Predictions are also written in LongBench's own format, into a folder beside the results.
    """
    from kvprune.evaluation.answers import Answers
    from kvprune.evaluation.integrations import integration
    from kvprune.evaluation.prompts import PromptMaker
    from kvprune.evaluation.tables import by_length

    benchmark = integration("longbench")
    suite = benchmark.LongBench(
        data=data,
        tasks=_names(tasks) or None,
        limit=limit,
        extended=extended,
        prompts=prompts,
    )
    examples = list(suite.examples())  # before the model loads: what is wrong with the data should not cost minutes
    rows = Run(model, policy, budget, out, dtype, device_map, as_json)(
        lambda loaded: Answers(
            suite, examples, PromptMaker(loaded, max_length, chat), question == "known", {"extended": extended}
        )
    )
    console = Console(stderr=as_json)
    if rows and extended:
        console.print(by_length(benchmark.summary_by_length(rows)))
    if rows and out is not None:
        folder = out.with_suffix("")
        benchmark.write_predictions([{**row, "label": _folder_name(row["label"])} for row in rows], folder, extended)
        console.print(f"Predictions in LongBench's format: [bold]{folder}[/]", highlight=False, soft_wrap=True)


@app.command()
def synthetic(
    model: Model,
    policy: Policies,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; all that the model's style has.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt; several, separated by commas.")] = "4096",
    count: Annotated[int, typer.Option(min=1, help="Examples of every task and length.")] = 22,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the examples.")] = 0,
    depths: Annotated[
        str, typer.Option(help="Where the answer stands, in percent, separated by commas; 0 to 100 by default.")
    ] = "",
    filler: Annotated[Path | None, typer.Option(help="A text file to fill prompts with; generated by default.")] = None,
    style: Annotated[
        Literal["auto", "prose", "notes"], typer.Option(help='"notes" is the language of the embedded model.')
    ] = "auto",
    values: Annotated[
        Literal["numbers", "words", "uuids"], typer.Option(help="What the values of needles are made of.")
    ] = "numbers",
    distractors: Annotated[
        str, typer.Option(help='Needles of needle_multikey that are not asked; "all" for nothing else.')
    ] = "16",
    heat_map: Annotated[
        Path | None, typer.Option(help="Draw the score by depth and length, a panel for every task and policy.")
    ] = None,
    budget: Budgets = ["0.25"],  # noqa: B006
    out: Out = None,
    chat: Chat = None,
    question: Question = "known",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Needles, variable tracking, word counts and questions in generated texts of any length; nothing is downloaded."""
    from kvprune.evaluation.answers import Answers
    from kvprune.evaluation.prompts import PromptMaker
    from kvprune.evaluation.synthetic import Synthetic, plot_depths

    check_drawable(heat_map)
    settings: dict[str, Any] = {
        "lengths": _numbers(lengths, int, "--lengths"),
        "count": count,
        "seed": seed,
        "depths": _numbers(depths, float, "--depths") or None,
        "filler": None if filler is None else str(filler),
        "style": style,
        "values": values,
        "distractors": _distractors(distractors),
    }

    def work_for(loaded: Any) -> Answers:
        suite = Synthetic(loaded.tokenizer, _names(tasks) or None, **settings)
        return Answers(suite, list(suite.examples()), PromptMaker(loaded, None, chat), question == "known", settings)

    rows = Run(model, policy, budget, out, dtype, device_map, as_json)(work_for)
    if rows and heat_map is not None:
        plot_depths(rows, heat_map)
        Console(stderr=as_json).print(f"Heat map: [bold]{heat_map}[/]", highlight=False, soft_wrap=True)


@app.command()
def likelihood(
    model: Model,
    policy: Policies,
    text: Annotated[Path, typer.Option(help="A text file, of anything; <|endoftext|> separates documents.")],
    length: Annotated[int, typer.Option(min=3, help="Tokens of a sequence.")] = 512,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="How many of them are prefilled; half of them by default.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most sequences.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that go through the model together.")] = 8,
    budget: Budgets = ["0.25"],  # noqa: B006
    out: Out = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Likelihood of a text from the compressed cache: NLL, KL to the full cache, top-1 agreement. Needs no labels."""
    from kvprune.evaluation.likelihood import Likelihood

    Run(model, policy, budget, out, dtype, device_map, as_json)(
        lambda loaded: Likelihood(loaded, text, length, length // 2 if prompt is None else prompt, limit, batch_size)
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness, with the model "kvprune" registered; takes the options of its own command line."""
    from kvprune.evaluation.integrations import integration

    main = integration("lm-eval")
    sys.argv = ["lm_eval", *context.args]
    main()


def compare(
    files: Annotated[list[Path], typer.Argument(help="Results of `kvprune eval`.")],
    out: Annotated[Path, typer.Option(help="The page to write: pictures and tables in one HTML file.")] = Path(
        "kvprune-compare.html"
    ),
    picture: Annotated[
        Path | None, typer.Option(help="Also the picture of one comparison, in a file: .png, .svg, .pdf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw quality against measured KV bytes, one curve a policy, from any number of results."""
    from kvprune.evaluation.page import page
    from kvprune.evaluation.pictures import curves
    from kvprune.evaluation.results import read
    from kvprune.evaluation.summary import compare as comparisons_of

    check_writable(out)
    rows = [row for file in files for row in read(file)]
    if not rows:
        raise EvaluationError(f"there are no results in {', '.join(map(str, files))}.")
    console = Console(stderr=as_json)
    show(rows, console, as_json)
    comparisons = comparisons_of(rows)
    try:
        out.write_text(page(comparisons), encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"cannot write {out}: {error}") from error
    console.print(f"Page: [bold]{out}[/]", highlight=False, soft_wrap=True)
    if picture is None:
        return
    if len(comparisons) > 1:
        titles = "; ".join(comparison.title for comparison in comparisons)
        raise EvaluationError(
            f"--picture draws one comparison, and these are {len(comparisons)} ({titles}): give fewer files, or take "
            f"the page {out}, which has them all."
        )
    check_drawable(picture)
    curves(comparisons[0]).savefig(picture, dpi=120)
    console.print(f"Picture: [bold]{picture}[/]", highlight=False, soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(number) for number in _names(text)]
    except ValueError:
        raise EvaluationError(f"{option} takes numbers separated by commas, not {text!r}.") from None


def _distractors(text: str) -> int | str:
    try:
        return text if text == "all" else int(text)
    except ValueError:
        raise EvaluationError(f'--distractors takes a number or "all", not {text!r}.') from None


def _folder_name(label: str) -> str:
    """A label that is a folder on every system: "a2sf @ 0.25" -> "a2sf@0.25"."""
    return re.sub(r"[^\w.,=@+-]+", "_", label.replace(" @ ", "@"))
