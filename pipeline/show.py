"""Results as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from .output import format_size, format_table

Result = Mapping[str, Any]
MUCH_WAITING = 0.05
MAX_REASONS = 5  # of a kind that are printed; --json has them all


def show_starter(result: Result) -> str:
    return f"wrote {result['recipe']}; next: {result['next']}"


def show_datastore(result: Result) -> str:
    return (
        f"wrote {result['datastore']}: {result['tokens']} tokens of {result['files']} files, "
        f"{result['bytes'] / 1e6:.1f} MB"
    )


def show_build(result: Result) -> str:
    ladder = " → ".join([*result["ladder"], "target"]) if result["ladder"] else "none: plain decoding"
    lengths = ", ".join(f"{name} {count}" for name, count in result["num_speculative_tokens"].items())
    lines = ["", f"ladder    {ladder}" + (f" (tokens proposed a call: {lengths})" if lengths else "")]
    bench = result["measurements"]["bench"]
    if bench.get("speedup"):
        same = f"{bench['identical']} of {bench['prompts']} outputs the same token for token"
        lines.append(f"measured  {_speedup(bench['speedup'])}; {same}")
    lines.append(f"bundle    {result['bundle']} ({result['seconds']:.1f} s)")
    lines.append(f"try       draftsmith generate {result['bundle']} 'Once upon a time'")
    return "\n".join(lines)


def show_joint(result: dict[str, Any]) -> str:
    calls = ", ".join(f"{model['calls']} calls of {name}" for name, model in result["models"].items())
    count, law = len(result["token_ids"]), result["law"]
    return f"{result['text']}\n\n{count} tokens by {law} (not the target's own law): {calls}"


def show_bench(result: Result) -> str:
    modes = ("plain", "speculative")
    rows: list[list[Any]] = [["", *(f"{mode} {q}" for mode in modes for q in ("p50", "p90", "p99"))]]
    for label, key in [
        ("tokens/s, prefill included", "tokens_per_second"),
        ("tokens/s decoding", "decode_tokens_per_second"),
        ("TTFT ms", "ttft_ms"),
        ("TPOT ms", "tpot_ms"),
        ("ITL ms", "itl_ms"),
        ("whole request ms", "e2el_ms"),
    ]:
        spreads = [result[mode][key] or {} for mode in modes]
        rows.append([label, *(spread.get(q) for spread in spreads for q in ("p50", "p90", "p99"))])
    lines = [format_table(rows), "", format_table(_pooled_rows(result)), ""]
    if len(result["categories"]) > 1:
        lines += [format_table(_category_rows(result["categories"])), ""]
    if result["speedup"]:
        lines.append(f"speedup: {_speedup(result['speedup'])}, over {result['prompts']} prompts")
    for mode, row in (result["prediction"] or {}).items():
        lines.append(
            f"{mode}: {row['predicted_tokens_per_second']:.1f} tokens/s by the plan, prompts included; "
            f"{row['tokens_per_second']:.1f} when run ({row['prediction_error']:+.0%})"
        )
    if result["identical"] is not None:
        lines.append(f"the same token for token: {result['identical']} of {result['prompts']} outputs")
    for row in result["divergences"]:
        kind = "a near-tie" if row["near_tie"] else "NOT a near-tie: please report it"
        where = f"line {row['line']}, token {row['position']}"
        lines.append(f"  {where}: differs, top-2 gap {row['top2_gap']:.2e}, {kind}")
    lines.append(f"memory: {format_size(result['memory']['peak_rss'])} at the most")
    if (waited := result["disturbance"]["waited"] or 0) > MUCH_WAITING:
        lines.append(f"others were busy: our threads waited {waited:.0%} of the time that they wanted a core")
    lines += _passed_over(result["passed_over"])
    if result["interrupted"]:
        lines.append("interrupted: figures are of the prompts until then")
    return "\n".join(lines)


def _pooled_rows(result: Result) -> list[list[Any]]:
    rows: list[list[Any]] = [["over all prompts", "plain", "speculative"]]
    plain, speculative = result["plain"], result["speculative"]
    lengths = (plain["mean_acceptance_length"], speculative["mean_acceptance_length"])
    rows.append(["tokens per target call", *lengths])
    for name, level in speculative["levels"].items():
        counts = f"{level['accepted']} of {level['drafted']}"
        rate = level["draft_acceptance_rate"]
        counts = counts if rate is None else f"{counts} ({rate:.0%})"
        rows.append([f"{name}: accepted of drafted", None, counts])
        positions = " ".join(f"{100 * share:.0f}" for share in level["per_position_acceptance"])
        rows.append([f"{name}: accepted by position, %", None, positions or None])
    for part in dict.fromkeys([*plain["ms_per_token"], *speculative["ms_per_token"]]):
        shares = (mode["ms_per_token"].get(part) for mode in (plain, speculative))
        rows.append([f"ms per token: {part}", *shares])
    return rows


def _category_rows(categories: Mapping[str, Result]) -> list[list[Any]]:
    rows: list[list[Any]] = [["category", "prompts", "plain tok/s", "spec. tok/s", "speedup", "a call"]]
    for name, part in categories.items():
        speeds = ((part[mode]["tokens_per_second"] or {}).get("p50") for mode in ("plain", "speculative"))
        speedup = part["speedup"] or {}
        length = part["speculative"]["mean_acceptance_length"]
        rows.append([name, speedup.get("n"), *speeds, speedup.get("p50"), length])
    return rows


def show_tuning(result: Result) -> str:
    rows = [["ladder", "at most", "tokens a call", "tokens/s predicted", "speedup"]]
    for row in result["candidates"]:
        lengths = ", ".join(str(row["num_speculative_tokens"][name]) for name in row["ladder"])
        ladder = " → ".join([*row["ladder"], "target"])
        speed = (row["tokens_per_target_call"], row["tokens_per_second"], row["estimated_speedup"])
        rows.append([ladder, lengths, *speed])
    lines = [format_table(rows), "", result["why"]]
    for mode in ("plain", "chosen"):
        if run := result["measured"].get(mode):
            lines.append(
                f"{mode}: {run['tokens_per_second']:.1f} tokens/s when run, "
                f"{run['predicted_tokens_per_second']:.1f} predicted ({run['prediction_error']:+.0%})"
            )
    lines.append(f"ladder: {' → '.join([*result['ladder'], 'target'])}; written to {result['bundle']}")
    return "\n".join(lines)


def show_gate(result: Result) -> str:
    rows = [["outcome", "check", "baseline", "candidate", "unit", "allowed"]]
    for check in result["checks"]:
        rows.append([check[key] for key in ("outcome", "name", "baseline", "candidate", "unit", "limit")])
    lines = [format_table(rows), ""]
    lines += [f"{check['name']}: {check['why']}" for check in result["checks"] if check["why"]]
    lines += ["", f"gate: {result['outcome']} ({result['seconds']:.0f} s)"]
    return "\n".join(lines)


def show_evaluation(result: Result) -> str:
    figures = list(dict.fromkeys(key for engine in result["engines"].values() for key in engine))
    rows = [[name, *(engine.get(key) for key in figures)] for name, engine in result["engines"].items()]
    lines = [format_table([["engine", *figures], *rows])]
    if prompts := result.get("prompts"):
        lines += ["", f"agreement over {prompts['prompts']} prompts", *_passed_over(prompts["passed_over"])]
    return "\n".join(lines)


def show_bundle(result: Result) -> str:
    engines = [["engine", "weights", "size", "graph"]]
    for name, engine in result["engines"].items():
        shares = not engine["skips"] and engine["shares_cache"]
        has_rounded = engine["kv_cache_dtype"] == "bfloat16" and not (shares or engine["skips"])
        cache = ", in the target's cache" if shares else ", cache in bfloat16" if has_rounded else ""
        weights = engine["weights"] + cache
        engines.append([name, weights, format_size(engine["bytes"]), engine["graph"]])
        engines += [["", *_describe_engine(built)] for built in engine["tensorrt"]]
    plan = result["plan"]
    model = result["model"] or {}
    ladder = " → ".join([*(plan["ladder"] or []), "target"])
    lengths = ", ".join(f"{name} {count}" for name, count in (plan["num_speculative_tokens"] or {}).items())
    source = model.get("source", "a model of unknown source")
    lines = [
        f"{result['bundle']}: {source}, {format_size(result['bytes'])}",
        f"{result['files_checked']} files are as they were packed",
        "",
        format_table(engines),
        "",
        f"ladder: {ladder}; tokens proposed a call: {lengths or 'none'}; verify: {plan['verify']}",
    ]
    return "\n".join(lines)


def _describe_engine(built: dict[str, Any]) -> list[str]:
    """Of one of TensorRT. What its builder did not say is not said here either: sparse weights alone are no
    sparse products."""
    said = f"TensorRT {built['precision']} for {', '.join(built['compute_capability'])}"
    if products := built.get("matrix_products"):
        said += f"; {products['int8']} of {products['total']} products int8"
        said += f", {built.get('sparse_tactics') or 'none'} with sparse tactics"
    return [said, format_size(built["size"]), built["file"]]


def show_diagnosis(result: Result) -> str:
    machine = result["machine"]
    gpus = [f"{gpu['name']} ({gpu['compute_capability']})" for gpu in result["gpus"]]
    rows = [
        ["system", f"{machine['system']}, Python {machine['python']}"],
        ["processor", f"{machine['processor']}, {machine['cores']} cores, {result['threads']} threads used"],
        ["vectors", ", ".join(result["vector_extensions"]) or "unknown"],
        ["memory", f"{machine['memory_gib']} GiB"],
        ["GPUs", ", ".join(gpus) or "none"],
        ["cache", f"{result['cache']['root']}, {result['cache']['free_gib']} GiB free"],
        ["packages", ", ".join(f"{name} {version}" for name, version in result["packages"].items())],
        ["providers", ", ".join(result["onnxruntime_providers"]) or "none"],
        *([what, f"no: {why}" if why else "yes"] for what, why in result["can"].items()),
    ]
    return format_table(rows)


def show_cache(result: Result) -> str:
    rows = [
        [stage["name"], format_size(stage["bytes"]), f"{stage['seconds']:.1f} s", stage["last_used"][:16]]
        for stage in result["stages"]
    ]
    total = f"{result['root']}: {len(rows)} stages, {format_size(result['bytes'])} in all; "
    total += f"downloaded models, {format_size(result['models_bytes'])}"
    return "\n".join(filter(None, [format_table([["stage", "size", "took", "last used"], *rows]), "", total]))


def show_reason(result: Result) -> str:
    if result["compared_with"] is None:
        return f"{result['stage']}: the first of its kind"
    lines = [f"{result['stage']}, against {result['compared_with']}:"]
    return "\n".join(lines + [f"  {line}" for line in result["differences"]])


def show_collected(result: Result) -> str:
    count = len(result["removed"])
    return f"removed {count}, freed {format_size(result['freed_bytes'])}; {format_size(result['bytes'])} left"


def _passed_over(reasons: Sequence[str]) -> list[str]:
    if not reasons:
        return []
    lines = [f"passed over: {len(reasons)}", *(f"  {reason}" for reason in reasons[:MAX_REASONS])]
    return lines if len(reasons) <= MAX_REASONS else [*lines, f"  … {len(reasons) - MAX_REASONS} more"]


def _speedup(spread: Mapping[str, float]) -> str:
    return f"{spread['p50']:.2f} × plain decoding (p10 {spread['p10']:.2f}, p90 {spread['p90']:.2f})"
