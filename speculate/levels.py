"""What the levels of a ladder are called: target, models, drafters that are none, hybrids of them, and trees.

Names only, so that a recipe can be checked without the native library.
"""

from collections.abc import Iterable

from .errors import BundleError

TARGET = "target"  # the level that ends every ladder
SUFFIX = "suffix"

DRAFTERS = {
    SUFFIX: "what followed the last time that prompt, output or references ended this way",
    "llma": "the same where there are references, and an error where there are none (arXiv 2304.04487)",
    "history": "what most often followed here or in earlier outputs (SuffixDecoding, arXiv 2411.04975)",
    "recycling": "what the level above last found likely after each token (arXiv 2408.08696)",
    "lookahead": "n-grams from a window of guesses that the level above reads too (arXiv 2402.02057)",
    "bigram": "what the target finds likeliest after each token alone (N-Grammys, arXiv 2411.03786)",
    "rest": "what most places of a datastore say that go on as the text does (arXiv 2311.08252)",
}

CHAINS_ONLY = ("history", "rest")  # alone; in a hybrid they add chains to its tree

JOINT = "+"  # between drafters that are one level
TREE = "-tree"  # behind a level that is to propose trees
GRAPH, SEQUOIA = "-graph", "-sequoia"  # or behind one that is a model

# What may stand behind the name of a level that is a model, and the tree that it then drafts.
ENGINE_TREES = {
    TREE: "the likeliest prefixes (SpecExec, arXiv 2406.02532)",
    GRAPH: "the same, where what follows two tokens is read once (GSD, arXiv 2407.16207)",
    SEQUOIA: "the shape that is worth most, filled with draws (Sequoia, arXiv 2402.12374)",
}


def split_engine_tree(name: str) -> tuple[str, str]:
    """The engine of a level that is a model and the tree that it drafts: "int8-graph" is int8 and "-graph",
    "int8" alone drafts chains, which is ""."""
    tree = next((tree for tree in ENGINE_TREES if name.endswith(tree)), "")
    return name.removesuffix(tree), tree


def split_level(name: str) -> list[str]:
    """The drafters of a ladder's level: "recycling+history" is a hybrid of two, "suffix-tree" has one."""
    return name.removesuffix(TREE).split(JOINT)


def wants_tree(name: str) -> bool:
    return name.endswith(TREE)


def lacks_trees(name: str) -> str:
    """What is wrong with a level that is to propose trees, if that is: its only drafter knows none."""
    parts = split_level(name)
    if not wants_tree(name) or len(parts) > 1 or parts[0] not in CHAINS_ONLY:
        return ""
    return f"{parts[0]} proposes chains only: call it {parts[0]}, or join it: recycling+{name}"


def is_drafter(name: object) -> bool:
    """Whether a level is made of drafters that are no models. It may only be the first of a ladder."""
    return isinstance(name, str) and all(part in DRAFTERS for part in split_level(name))


def list_models(ladder: Iterable[str]) -> list[str]:
    """The engines of the levels that are models, in their order."""
    return [split_engine_tree(name)[0] for name in ladder if not is_drafter(name)]


def check_parts(name: str) -> None:
    """Refuse a level with a part that is unknown or doubled, and a tree of a drafter that knows none."""
    parts = split_level(name)
    for part in parts:
        if part not in DRAFTERS:
            raise BundleError(
                f"{name}: {part!r} is no drafter that a hybrid can have, only {', '.join(DRAFTERS)}"
            )
    if len(set(parts)) < len(parts):
        raise BundleError(f"{name} names a drafter twice")
    if problem := lacks_trees(name):
        raise BundleError(f"{name}: {problem}")
