"""Is any mutated adapter file or code taken for something it does not say, or does one crash, hang or eat memory?

Files of many settings and sizes are mutated: bytes set, bits flipped, stretches deleted, inserted, doubled, cut off,
swapped with another file's; header fields replaced by extreme numbers. Every second one gets its checksum made right
again, so that the checks of the fields are what is tested. Codes are mutated by the character; every second one has
both checksums made right again. An input is *wrongly accepted* if it is decoded and encoding the result does not give
it back: an adapter has one encoding. A *crash* is any exception but the refusal, one that takes more than a second, or
a refusal that is not one short sentence.

    python -m bench.trust.fuzz_format [--inputs 200000] [--seed 0] [--save]
"""

import argparse
import random
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np

from bench.common import finish
from tinylora.adapter import code as code_module
from tinylora.adapter.code import ALPHABET, PREFIX, from_code, to_code
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.portable import NotAnAdapter, PortableAdapter, parse_adapter

HUGE = b"\x80\xa0\x94\xa5\x8d\x1d"
"""10^12 as a varint."""
EXTREMES = (b"\x00", b"\x7f", b"\xff\x7f", b"\x80\x00", b"\xff" * 8 + b"\x7f", b"\xff" * 10, HUGE)
SLOW_SECONDS = 1.0


def pool(rng: random.Random) -> list[bytes]:
    """Adapters of every kind of setting."""
    made = []
    for _ in range(200):
        groups, u = rng.choice([1, 1, 4, 13, 13, 13, 60]), rng.choice([1, 1, 1, 2, 7])
        tying = rng.choice(["tiled", "even", "structured", "all", "none"])
        groups = 1 if tying == "all" else groups
        more = {"num_groups": groups} if tying == "even" else {"tying": tying, "n_tie": rng.choice([1, 16, 300])}
        targets = rng.choice(
            [("all-linear",), ("q_proj", "v_proj"), ("mlp.*", "q_proj"), ("model.layers.1.*",), ("ü",)]
        )
        config = AdapterConfig(
            rank=rng.choice([1, 2, 2, 200 if u < 7 else 100]), u=u, seed=rng.choice([0, 0, 1, 2**40]), targets=targets,
            basis=rng.choice(["svd", "random", "sketch"]), **more,
        )  # fmt: skip
        values = np.array([rng.gauss(0, 1) for _ in range(groups * u)], np.float32).reshape(groups, u)
        adapter = PortableAdapter(config=config, fingerprint=rng.randbytes(12), check=rng.randbytes(4), values=values)
        made.append(adapter.rounded(rng.choice(["float32", "bfloat16"])).to_bytes())
    return made


def with_crc(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def mutate(rng: random.Random, data: bytearray, other: bytes) -> None:
    """One change in place."""
    at = rng.randrange(len(data)) if data else 0
    kind = rng.randrange(9)
    if kind == 0 and data:
        data[at] = rng.randrange(256)
    elif kind == 1 and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at : at + rng.choice([1, 1, 2, 5, 20])]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.choice([1, 1, 2, 5, 20]))
    elif kind == 4:
        data[at:at] = data[at : at + rng.choice([1, 2, 8])]
    elif kind == 5:
        del data[at:]
    elif kind == 6:
        data[at:] = other[at:]
    elif kind == 7:  # a field of the header becomes an extreme number
        place = rng.randrange(3, 14)
        data[place : place + 1] = rng.choice(EXTREMES)
    elif len(data) > 6:  # the header's plain bytes
        data[rng.choice([3, 4, 5])] = rng.randrange(256)


def mutated_file(rng: random.Random, originals: list[bytes], repaired: bool) -> bytes:
    original = rng.choice(originals)
    body = bytearray(original[:-4])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        mutate(rng, body, rng.choice(originals)[:-4])
    return with_crc(bytes(body)) if repaired else bytes(body) + original[-4:]


def mutated_code(rng: random.Random, originals: list[bytes], repaired: bool) -> str:
    if repaired:
        data = mutated_file(rng, originals, True)
        symbols = code_module._symbols(data)
        for _ in range(rng.choice([0, 1])):  # beyond what the file itself can say: filling, length
            place = rng.choice([0, -1])
            symbols[place] = rng.randrange(32)
        if rng.random() < 0.2:
            symbols.extend([0] * rng.choice([1, 2]))
        return PREFIX + "".join(ALPHABET[s] for s in symbols + code_module._checksum(symbols))
    characters = list(to_code(rng.choice([one for one in originals if len(one) < 500])))
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        at = rng.randrange(len(characters))
        kind = rng.randrange(5)
        if kind == 0:
            characters[at] = rng.choice(ALPHABET + "ILOU- é")
        elif kind == 1:
            del characters[at]
        elif kind == 2:
            characters.insert(at, characters[at])
        elif kind == 3 and at + 1 < len(characters):
            characters[at], characters[at + 1] = characters[at + 1], characters[at]
        else:
            characters[at] = characters[at].lower()
    text = "".join(characters)
    if rng.random() < 0.2:  # letters that become ours, or two of ours, in capitals
        plain, odd = rng.choice([("s", "\u017f"), ("i", "\u0131"), ("ss", "\u00df"), ("st", "\ufb06")])
        text = text.lower().replace(plain, odd, 1)
    return text


CAPITALS = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""ASCII alone: upper() makes S of a long s."""


def code_given_back(text: str) -> bool:
    data = from_code(text)
    return to_code(parse_adapter(data).to_bytes()) == text.replace(" ", "").translate(CAPITALS)


def file_given_back(data: bytes) -> bool:
    return parse_adapter(data).to_bytes() == data


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/trust/fuzz_format.json")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    originals = pool(rng)
    assert all(file_given_back(one) for one in originals)
    counts: Counter[str] = Counter()
    slowest, before = 0.0, peak_mb()
    for number in range(arguments.inputs):
        repaired, is_code = number % 2 == 0, number % 4 >= 2
        given: bytes | str
        check: Callable[..., bool]
        if is_code:
            given, check = mutated_code(rng, originals, repaired), code_given_back
        else:
            given, check = mutated_file(rng, originals, repaired), file_given_back
        started = time.perf_counter()
        try:
            verdict = "accepted" if check(given) else "wrongly_accepted"
        except NotAnAdapter as refusal:
            text = str(refusal)
            verdict = "refused" if "\n" not in text and len(text) < 400 else "crashes"
        except Exception as error:
            verdict = "crashes"
            print(f"{type(error).__name__}: {error} for {given!r}", file=sys.stderr)
        seconds = time.perf_counter() - started
        slowest = max(slowest, seconds)
        counts["crashes" if seconds > SLOW_SECONDS else verdict] += 1
        counts["repaired"] += repaired
        if (number + 1) % 20_000 == 0:
            print(f"{number + 1:,} inputs: {dict(counts)}", file=sys.stderr, flush=True)
    result = {
        "inputs": arguments.inputs,
        "crashes": counts["crashes"],
        "wrongly_accepted": counts["wrongly_accepted"],
        "accepted_as_what_they_say": counts["accepted"],
        "refused": counts["refused"],
        "checksum_made_right": counts["repaired"],
        "slowest_ms": round(1e3 * slowest, 2),
        "memory_grown_mb": round(peak_mb() - before, 1),
        "seed": arguments.seed,
    }
    finish("trust/fuzz_format", result, arguments.save)
    if counts["crashes"] or counts["wrongly_accepted"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
