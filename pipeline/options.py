"""Options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder that `draftsmith build` wrote")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document, and nothing else")]
Threads = Annotated[int | None, typer.Option(help="by default OMP_NUM_THREADS, else one a core")]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda (TensorRT or ONNX Runtime), onnx-cuda, onnx-tensorrt or onnx-rtx (ONNX Runtime "
        "with that provider), or portable: a GPU's graphs on the CPU"
    ),
]
Ladder = Annotated[str, typer.Option(help="auto (the plan), none, or drafters such as suffix,int8")]
Limit = Annotated[int | None, typer.Option(min=1, help="prompts to take, evenly over the file")]
NewTokens = Annotated[int, typer.Option(help="tokens to decode, at most")]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="decode on behind an end of text")]
GateOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[gate.FIELD=VALUE]...", help="such as gate.max_regression=0.03"),
]
GatePrompts = Annotated[Path | None, typer.Option(help="as of bench; by default eight that are packaged")]
GateSeconds = Annotated[float, typer.Option(min=1, help="of timing; a third more to time suspects again")]
PromptFile = Annotated[Path, typer.Option(help="JSONL with turns, messages or prompt; or .txt, one a line")]
Source = Annotated[str, typer.Option(help="hub id, folder, .gguf file or pypi:NAME==VERSION")]
Schema = Annotated[bool, typer.Option("--schema", help="print the JSON schema of recipes instead")]
Chat = Annotated[bool, typer.Option("--chat", help="ask the prompt as a user, through the chat template")]
Stop = Annotated[list[str] | None, typer.Option(help="text to stop at; may be given more than once")]
References = Annotated[
    list[Path] | None,
    typer.Option("--reference", help="a text that the output may quote; may be given more than once"),
]
Datastore = Annotated[
    Path | None,
    typer.Option(help="file by `draftsmith datastore`, for ladders with rest; by default the bundle's own"),
]
StageName = Annotated[str, typer.Argument(help="such as smooth, or smooth-int8")]
