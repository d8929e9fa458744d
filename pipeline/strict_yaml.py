"""YAML as a recipe may use it: plain data only, YAML 1.2's numbers, no key twice, and the line of every key.

PyYAML's own constructors are not used: the node tree is turned into data here, so no tag can make an object.
"""

import re
import reprlib
from typing import NoReturn

import yaml

from .errors import RecipeError

Path = tuple[str | int, ...]  # of keys and list indices, from the root
Lines = dict[Path, int]  # 1-based

MAX_NODES = 10_000  # nested aliases of a few bytes can stand for gigabytes


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2 does: `2:4` is not 124, `1e-3` is a number, `no` is a word."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own interface)


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", r"<<", "<"),
]:
    # An empty plain scalar (`key:`) is a null too; PyYAML looks its resolvers up under "".
    _keys = [*_first, ""] if _tag == "null" else list(_first)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _keys)


def parse_yaml(text: str, name: str, *, numbered: bool = True) -> tuple[object, Lines]:
    """The data of one YAML document and the line of each of its keys.

    Raises RecipeError with `name` and, where `numbered`, the line for a syntax error, a tag, a repeated key
    or a key that is no string.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        reader = _Reader(name, numbered)
        return (None if node is None else reader.read(node, ())), reader.lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and numbered else ""
        raise RecipeError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply, or an alias that contains itself") from None


class _Reader:
    def __init__(self, name: str, numbered: bool) -> None:
        self.name = name
        self.numbered = numbered
        self.lines: Lines = {}
        self.count = 0

    def read(self, node: yaml.Node, path: Path) -> object:
        self.count += 1
        if self.count > MAX_NODES:
            self.fail(node, f"more than {MAX_NODES} values; a recipe is a page")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.read_scalar(node)
        self.refuse_tag(node)

    def read_mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        mapping: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self.read(key_node, (*path, "<key>"))
            if not isinstance(key, str):
                self.fail(key_node, f"the key {reprlib.repr(key)} is not a string; put it in quotes")
            if key in mapping:
                self.fail(key_node, f"the key {key} is given twice (first on line {self.lines[*path, key]})")
            self.lines[*path, key] = key_node.start_mark.line + 1
            mapping[key] = self.read(value_node, (*path, key))
        return mapping

    def read_scalar(self, node: yaml.ScalarNode) -> object:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        text: str = node.value
        try:
            match kind:
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text)
                case "float":
                    return float(text)
        except (KeyError, ValueError):
            self.fail(node, f"{reprlib.repr(text)} is not a valid {kind}")
        self.refuse_tag(node)

    def refuse_tag(self, node: yaml.Node) -> NoReturn:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        self.fail(node, f"the tag {tag} is refused: a recipe is plain data")

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        line = f":{node.start_mark.line + 1}" if self.numbered else ""
        raise RecipeError(f"{self.name}{line}: {message}")
