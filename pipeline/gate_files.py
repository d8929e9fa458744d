"""What the gate writes: JSON for machines, JUnit XML for test reports, Markdown for people."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .output import format_number

MARKS = {"pass": "✅", "regression": "❌", "cannot tell": "❔", "not compared": "–"}


def write_files(result: dict[str, Any], folder: Path) -> dict[str, str]:
    """gate.json, gate.xml and gate.md in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "gate.json": json.dumps(result, indent=2) + "\n",
        "gate.xml": format_junit(result),
        "gate.md": format_markdown(result),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: str(folder / name) for name in texts}


def format_junit(result: dict[str, Any]) -> str:
    """One test case a check. A regression is a failure, "cannot tell" an error: neither is green."""
    checks = result["checks"]
    counts = {outcome: sum(check["outcome"] == outcome for check in checks) for outcome in MARKS}
    suite = ElementTree.Element(
        "testsuite",
        name="draftsmith gate",
        tests=str(len(checks)),
        failures=str(counts["regression"]),
        errors=str(counts["cannot tell"]),
        skipped=str(counts["not compared"]),
        time=str(result["seconds"]),
        timestamp=result["date"],
    )
    tags = {"regression": "failure", "cannot tell": "error", "not compared": "skipped"}
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname="draftsmith.gate", name=check["name"])
        words = f"{_figures(check)}; allowed {check['limit']}; {check['why']}"
        if tag := tags.get(check["outcome"]):
            ElementTree.SubElement(case, tag, message=words)
        else:
            ElementTree.SubElement(case, "system-out").text = words
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def format_markdown(result: dict[str, Any]) -> str:
    rows = [
        f"| {MARKS[check['outcome']]} {check['outcome']} | {check['name']} | {_number(check['baseline'])} | "
        f"{_number(check['candidate'])} | {check['unit']} | {check['limit']} | {check['why']} |"
        for check in result["checks"]
    ]
    machine = result["machine"]
    lines = [
        f"## {MARKS[result['outcome']]} Draftsmith gate: {result['outcome']}",
        "",
        "| | check | baseline | candidate | unit | allowed | |",
        "|---|---|---:|---:|---|---|---|",
        *rows,
        "",
        f"`{result['bundle']}` against `{result['baseline']}`, {result['date']}, {machine['processor']}, "
        f"{machine['cores']} cores, {result['seconds']} s.",
    ]
    return "\n".join(lines) + "\n"


def _figures(check: dict[str, Any]) -> str:
    then, now = _number(check["baseline"]), _number(check["candidate"])
    return f"{then} -> {now} {check['unit']}".rstrip()


def _number(value: float | None) -> str:
    return "–" if value is None else format_number(value)
