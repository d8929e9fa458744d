"""Draftsmith: a bundle, by its own plan or without drafters."""

import draftsmith


def load(model: str, variant: str, speculate: bool, threads: int):
    bundle = draftsmith.load(model, threads=threads)

    def generate(ids, count, emit):
        ladder = "auto" if speculate else "none"
        for piece in bundle.stream(ids, max_new_tokens=count, speculate=ladder, ignore_eos=True):
            emit(piece.token_ids)

    return generate
