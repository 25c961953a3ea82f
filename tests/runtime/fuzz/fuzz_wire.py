"""Coverage-guided fuzzing of what decodes messages; needs `atheris`, which the tests do not.

    pip install atheris
    python tests/runtime/fuzz/fuzz_wire.py tests/runtime/fuzz/corpus -max_total_time=60

New inputs are written to the first folder that is named.
"""

from __future__ import annotations

import sys
from random import Random


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["p2pfl", "msgpack"]):
        import fuzz_target
    from fuzz_inputs import CORPUS, decode, encode
    from fuzz_mutations import mutated

    seeds = [decode(path.read_bytes()) for path in sorted(CORPUS.iterdir())]

    def one_input(data: bytes) -> None:
        fuzz_target.Peer().play(decode(data))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        draw = Random(seed)
        if draw.random() < 0.3:
            return bytes(atheris.Mutate(data, most))
        return encode(mutated(decode(data), draw, seeds))[:most]

    with fuzz_target.small():
        atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
