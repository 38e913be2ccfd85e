"""The commands. Whatever imports jax is imported inside a command, so that `lmobj --help` answers at once."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import lmobj
from lmobj._cache import keep_programs
from lmobj.cli._comparing import SeveralValues, found_runs, group_names
from lmobj.cli._printing import print_table, tell_weights
from lmobj.cli._processes import in_several_processes

if TYPE_CHECKING:
    from lmobj.config import Experiment

__all__ = ["app"]

app = typer.Typer(
    name="lmobj",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings over the file's, such as train.steps=500.", show_default=False),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder that `lmobj train` made: a path or a URL.")]
Split = Literal["train", "validation", "test"]
Best = Annotated[bool, typer.Option("--best", help="The best checkpoint (train.best), not the newest.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"lmobj {lmobj.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train language models under any objective, exactly, in JAX.

    Begin with: lmobj train configs/quickstart.yaml
    """


@app.command(rich_help_panel="Runs")
@in_several_processes
def train(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train a model and leave a run folder with checkpoints, metrics and a report.

    Example: lmobj train configs/quickstart.yaml train.steps=500 run=runs/short
    """
    from lmobj.config import load
    from lmobj.train import fit
    from lmobj.train.distributed import agreed

    keep_programs()
    with agreed("config"):
        experiment = load(config, overrides or ())
    fit(experiment, quiet=quiet)


@app.command(rich_help_panel="Runs")
@in_several_processes
def resume(run: Run, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Continue a stopped run from its last checkpoint, bit for bit as if it had never stopped.

    Only settings that do not change the result, such as train.mesh, may be given anew.
    """
    from lmobj.train import fit
    from lmobj.train.distributed import agreed

    keep_programs()
    with agreed("config"):
        experiment = _experiment(run, overrides or ())
    fit(experiment, resume=True, quiet=quiet)


@app.command(rich_help_panel="Runs")
def bench(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Compare several ways to train on one budget, with several seeds; the same command again goes on after a stop.

    Example: lmobj bench configs/bench/quick.yaml seeds=[0]
    """
    from lmobj.bench import load, run

    keep_programs()
    result = run(load(config, overrides or ()), quiet=quiet)
    if not quiet:
        print_table(result.header, result.rows)


@app.command(rich_help_panel="Runs")
def search(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Search for the best settings of an experiment, trial by trial; the same command again goes on after a stop.

    Example: lmobj search configs/search/quick.yaml search.trials=20 run=runs/longer
    """
    from lmobj.search import load, run

    keep_programs()
    result = run(load(config, overrides or ()), quiet=quiet)
    if not quiet:
        print_table(result.header, result.rows)


@app.command(rich_help_panel="Runs")
def speed(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...", help="YAML configs, and settings over those of all.", show_default=False
        ),
    ],
    peer: Annotated[
        Literal["transformers"] | None, typer.Option(help="Measure the same in PyTorch beside it, in turns.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to time; by default what --seconds allow.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds to time steps for, of each contender.")] = 13.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure training steps on synthetic rows: tokens/s, time, FLOPs utilisation, memory, time to compile.

    Example: lmobj speed configs/pretrain/gpt2_124m.yaml train.batch_size=16 model.remat=none
    """
    from lmobj.cli._speed import print_speed

    raise typer.Exit(print_speed(arguments, peer is not None, steps, seconds, as_json, print_table))


@app.command("eval", rich_help_panel="Runs")
@in_several_processes
def evaluate(
    run: Run,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="Which part of the data.")] = "validation",
    task: Annotated[
        Path | None,
        typer.Option(metavar="TASK.yaml", help="Answer a task by likelihood instead, with or without examples."),
    ] = None,
    generation: Annotated[
        bool, typer.Option("--generation", help="Write texts under several decodings instead, and compare them.")
    ] = False,
    similarity: Annotated[
        Path | None,
        typer.Option(metavar="FILE.tsv", help="Compare vectors of pairs of sentences with their scores instead."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Of --similarity: both texts and the score; sentence1,sentence2,score.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Of --similarity: first, mean or last token; the objective's, or mean.")
    ] = None,
    bound: Annotated[
        int | None,
        typer.Option(help="Of masked diffusion: bound the likelihood by this many noised copies of each text instead."),
    ] = None,
    best: Best = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a run's model on held-out text: loss, perplexity, bits per byte and what else its objective measures.

    Of a fine-tuned model also the scores of every class, and RUN/eval/ gets a record of every example and a picture.

    Example: lmobj eval runs/gpt --task sentiment.yaml

    Example: lmobj eval runs/simcse --similarity sts.tsv
    """
    from lmobj.cli import _evaluating as evaluating
    from lmobj.train.distributed import agreed

    keep_programs()
    with agreed("config"):
        experiment = _experiment(run, overrides or ())
    evaluating.check_options(task, generation, split, similarity, columns or pooling, bound)
    if similarity is not None:
        evaluating.print_similarity(experiment, similarity, columns, pooling, best=best, as_json=as_json)
    elif task is not None:
        evaluating.print_task(experiment, task, best=best, as_json=as_json)
    elif generation:
        evaluating.print_generation(experiment, best=best, as_json=as_json)
    elif bound is not None:
        evaluating.print_bound(experiment, split, bound, best=best, as_json=as_json)
    else:
        evaluating.print_split(experiment, split, best=best, as_json=as_json)


@app.command(rich_help_panel="Runs", cls=SeveralValues)
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs that differ in their seed alone; patterns too.")
    ],
    others: Annotated[
        list[str] | None, typer.Option("--with", metavar="RUN...", help="A second group, to be compared with.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Which part of the data.")] = "validation",
    metric: Annotated[
        str | None, typer.Option(help="A figure of `lmobj eval`; the one that the runs are judged by.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="Of a group, in their order; may be given twice.")] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="A column of what always the same answer reaches.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Resamples of the paired bootstrap.")] = 10_000,
    output: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write it as Markdown too.")] = None,
) -> None:
    """Set fine-tuned runs beside one another: mean and deviation over seeds; of two groups whether one is better.

    Example: lmobj compare runs/base_* --with runs/large_* --split test --output comparison.md
    """
    from lmobj.bench import markdown_table
    from lmobj.errors import UserError
    from lmobj.train.comparison import compare

    groups = [found_runs(runs, "RUN"), *([found_runs(others, "--with")] if others else [])]
    names = group_names(groups, name or ())
    if output is not None and (output.suffix != ".md" or not output.parent.is_dir()):
        raise UserError(f"--output is {str(output)!r}; accepted: a file .md in a folder that exists.")
    keep_programs()
    experiments = {name: [_experiment(run) for run in group] for name, group in zip(names, groups, strict=True)}
    found = compare(
        experiments, split=split, metric=metric, samples=samples, say=lambda text: print(text, file=sys.stderr)
    )
    if baseline and not found.baselines:
        raise UserError(
            f"--baseline is asked for, and --metric is {found.metric!r}, by which no baseline is known; accepted: "
            f"{experiments[names[0]][0].objective.judged_by}, or no --baseline."
        )
    header, rows = found.table(baselines=baseline)
    print_table(header, rows)
    if found.lines():
        print("", *found.lines(), sep="\n")
    if output is not None:
        text = "\n".join([markdown_table(header, rows), *(f"{line}\n" for line in found.lines())])
        output.write_text(text, encoding="utf-8")


@app.command(rich_help_panel="Runs")
def predict(
    run: Run,
    inputs: Annotated[
        list[str],
        typer.Option("--input", metavar="FILE", help="Texts as the run's data.source reads them."),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="JSON Lines to write; a new file.")],
    best: Best = False,
    quiet: Quiet = False,
) -> None:
    """Write what a fine-tuned model says of each text, sentence or question: class, score, tags, or answer.

    Example: lmobj predict runs/sentiment --input reviews.tsv --output predicted.jsonl --best
    """
    from lmobj.train.prediction import predict
    from lmobj.train.trained import on_one_device, open_run

    keep_programs()
    count = predict(open_run(on_one_device(_experiment(run)), best=best, quiet=quiet), inputs, output, quiet=quiet)
    if not quiet:
        print(f"{count:,} examples: {output}")


@app.command(rich_help_panel="Runs")
def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More prompts: a line each, or .jsonl or .tsv.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Shown before each prompt: input<TAB>output lines, or .jsonl."),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Draw this many examples for each prompt; all, in order.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Text before the examples.")] = None,
    template: Annotated[
        str | None, typer.Option(help=r'How an example is written, \n a line break; "{input} => {output}".')
    ] = None,
    separator: Annotated[str | None, typer.Option(help=r"Stands between examples, and ends an answer; \n.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--tokens", help="Most tokens to write; 128.")] = None,
    num_samples: Annotated[int | None, typer.Option("--samples", help="Texts per prompt; 1.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits; 0: always the likeliest; 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest with this probability together.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw among tokens this likely beside the likeliest.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens seen before are less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; 0.")] = None,
    num_beams: Annotated[int | None, typer.Option("--beam", help="Beam search with this many beams.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="With --beam: larger prefers longer texts; 0.6.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of masked diffusion: rounds; one for each token.")] = None,
    block_length: Annotated[
        int | None, typer.Option("--block", help="Of masked diffusion: write blocks of this length, left to right.")
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="Of masked diffusion, what is unmasked first: confidence or random; confidence.")
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Print each token's log-probability in nats.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Print how repetitive and diverse the texts are.")] = False,
    best: Best = False,
) -> None:
    """Continue a prompt, or answer it after examples of a task, with a model that is causal or of masked diffusion; or
    write what an encoder with a decoder makes of it, a translation or a summary, by default as the run's `writing`
    says.

    Example: lmobj generate runs/quickstart --prompt "The function returns" --temperature 0.8 --top-p 0.95

    Example: lmobj generate runs/gpt --examples french.tsv --shots 8 --prompt "cheese" --temperature 0 --tokens 16
    """
    from lmobj.cli._decoding import print_continuations, print_statistics, settings
    from lmobj.cli._examples import few_shot, read_prompts, tell_left_out
    from lmobj.errors import UserError
    from lmobj.evaluate import UnmaskingConfig
    from lmobj.train.trained import on_one_device, open_run

    experiment = _experiment(run)
    options = {
        "max_new_tokens": max_new_tokens,
        "num_samples": num_samples,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "steps": steps,
        "block_length": block_length,
        "order": order,
    }
    chosen = settings(experiment.objective, options)
    given = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    if not given:
        raise UserError("there is no prompt; accepted: --prompt TEXT, or --prompts FILE.")
    task = few_shot(examples, shots, instruction, template, separator)
    keep_programs()
    trained = open_run(on_one_device(experiment), best=best)
    tell_weights(experiment)
    if trained.writer is not None:
        assert not isinstance(chosen, UnmaskingConfig)  # which no objective with a decoder has
        own = {name for name, value in options.items() if value is not None} <= {"max_new_tokens"}
        chosen = trained.writer.settings(None if own else chosen, max_new_tokens)
    if task is None:
        texts = trained.continue_text(given, chosen)
        shown = [text + "\n" for text in given] if trained.writes_second_texts else given
    else:
        answers = trained.answer(*task, given, chosen, shots=shots)
        tell_left_out(given, answers)
        texts, shown = answers.texts, [task[0].query(text) for text in given]
    print_continuations(shown, texts, trained.tokenizer, logprobs=logprobs)
    if summary:
        print_statistics(texts)


@app.command(rich_help_panel="Runs")
def fill(
    run: Run,
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help='Text with masks, such as "Paris is the [MASK] of France.", or one hole.'),
    ],
    top: Annotated[int, typer.Option(help="Guesses to show for each mask or span.")] = 5,
    max_new_tokens: Annotated[int, typer.Option("--tokens", help="Most tokens to write into a hole.")] = 128,
    best: Best = False,
) -> None:
    """Guess the masked words of a text with a masked language model, its spans with one of span corruption, or its
    middle with one that learned to fill it in.

    Example: lmobj fill runs/bert "Paris is the [MASK] of France."

    Example: lmobj fill runs/t5 "Thank you <extra_id_0> me to your party <extra_id_1> week."

    Example: lmobj fill runs/fill_in_middle "The function <fim_middle> of the list."
    """
    from lmobj.cli._decoding import print_fillings, print_infilling
    from lmobj.evaluate import SamplingConfig
    from lmobj.train.trained import on_one_device, open_run

    keep_programs()
    experiment = _experiment(run)
    trained = open_run(on_one_device(experiment), best=best)
    tell_weights(experiment)
    if trained.fills_middles:
        greedy = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
        print_infilling(*trained.infill_text(text, greedy))
    else:
        print_fillings(*trained.fill_text(text, top))


@app.command(rich_help_panel="Configs")
def prepare(
    config: Config,
    overrides: Overrides = None,
    beam: Annotated[
        bool,
        typer.Option("--beam", help="In a Beam pipeline; its options follow after --, as --runner=FlinkRunner."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Clean and tokenise the data of a config, which training would do first, and print what it holds.

    Example: lmobj prepare configs/quickstart.yaml --beam -- --runner=DirectRunner
    """
    from lmobj.cli._preparation import cleaning_table, split_table
    from lmobj.config import load
    from lmobj.errors import UserError
    from lmobj.tasks import prepare_any

    options = [argument for argument in overrides or () if argument.startswith("--")]
    if options and not beam:
        raise UserError(f"{options[0]} is an option of a Beam pipeline; accepted: such options together with --beam.")
    experiment = load(config, [argument for argument in overrides or () if argument not in options])
    sources = prepare_any(experiment.data, quiet=quiet, beam=options if beam else None).summary()["sources"]
    print_table(*split_table(sources))
    header, rows = cleaning_table(sources)
    if rows:
        print()
        print_table(header, rows)


@app.command(rich_help_panel="Configs")
def config(config: Config, overrides: Overrides = None) -> None:
    """Check a config and print it complete, with its base, overrides and every default."""
    from lmobj.config import dump, load

    print(dump(load(config, overrides or ())), end="")


@app.command(rich_help_panel="Configs")
def plan(
    config: Config,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(help="How many devices to plan for.", show_default=False)] = ...,  # type: ignore[assignment]
    device_kind: Annotated[
        str, typer.Option(help="Of which kind: h100, h200, a100, v5e, v5p, trillium and others.")
    ] = "h100",
    search: Annotated[
        bool, typer.Option("--search", help="Try meshes, recomputation and microbatches, and rank what fits.")
    ] = False,
    compile_most: Annotated[int, typer.Option("--compile", help="With --search: how many settings to compile.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile a training step for devices that are not there: what it takes, whether it fits, how fast it could be.

    Example: lmobj plan configs/pretrain/gpt2_124m.yaml --devices 8 --device-kind h100

    Example: lmobj plan configs/pretrain/decoder_8b.yaml --devices 256 --device-kind v5p --search
    """
    from lmobj.cli._planning import forecast_lines, search_table, search_verdict, showing_progress
    from lmobj.config import load
    from lmobj.train.forecast import forecast
    from lmobj.train.mesh_search import search as search_settings

    experiment = load(config, overrides or ())
    if not search:
        told = forecast(experiment, device_kind, devices)
        if as_json:
            print(json.dumps(told.as_json()))
        else:
            print(*forecast_lines(told), sep="\n")
        return
    with showing_progress() as progress:
        result = search_settings(experiment, device_kind, devices, compile_most=compile_most, progress=progress)
    best = result.found[0][0].overrides(experiment) if result.found else ()
    if as_json:
        found = [{**told.as_json(), "overrides": candidate.overrides(experiment)} for candidate, told in result.found]
        print(json.dumps({**dataclasses.asdict(dataclasses.replace(result, found=())), "found": found}))
        return
    if result.found:
        print_table(*search_table(result))
        print()
    print(*search_verdict(result, best), sep="\n")


@app.command(rich_help_panel="Configs")
def schema(
    bench: Annotated[bool, typer.Option("--bench", help="Of benchmarks' configs.")] = False,
    search: Annotated[bool, typer.Option("--search", help="Of searches' configs.")] = False,
) -> None:
    """Print the JSON schema of configs, which editors use for completion."""
    from lmobj.errors import UserError

    if bench and search:
        raise UserError("--bench and --search are both given; accepted: one of the two.")
    if bench:
        from lmobj.bench import schema
    elif search:
        from lmobj.search import schema
    else:
        from lmobj.config import schema
    print(json.dumps(schema(), indent=2, ensure_ascii=False))


@app.command(rich_help_panel="Configs")
def objectives() -> None:
    """List the training objectives: name, what it does, paper."""
    from lmobj.objectives import REGISTRY

    rows = [(name, kind.summary, kind.paper) for name, kind in sorted(REGISTRY.items())]
    print_table(("name", "what it does", "paper"), rows)


@app.command(rich_help_panel="Configs")
def doctor() -> None:
    """Check versions, devices, memory and folders; exit with 1 if something would stop training."""
    try:
        from lmobj.train.environment import doctor as examine
    except (ImportError, RuntimeError) as error:  # jax refuses a jaxlib that does not fit it with RuntimeError
        print(f"no  the packages do not load: {error}")
        raise typer.Exit(1) from None
    well = True
    for check in examine():
        mark = {True: "ok", None: "!", False: "no"}[check.ok]
        print(f"{mark:<3} {check.subject:<18} {check.finding}", flush=True)
        well &= check.ok is not False
    print("\nReady to train." if well else "\nSomething marked `no` stops training.")
    raise typer.Exit(0 if well else 1)


def _experiment(run: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run folder, which may have moved since it was made."""
    from lmobj.config import load
    from lmobj.train.run_folder import RunFolder

    folder = RunFolder(run)
    folder.check_exists()
    return dataclasses.replace(load(folder.config, overrides), run=run)
