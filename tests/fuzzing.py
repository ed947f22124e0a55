"""Decode damaged radiographs by the thousand, in a process that may use little memory and time.

python tests/fuzzing.py COUNT SEED    # prints what became of them as one line of JSON
"""

import faulthandler
import json
import random
import resource
import sys
import time
import warnings
from collections import Counter

from odd_files import formats

from pipeline.data.images import UnusableError, decode_radiograph

MEMORY = 2 * 2**30  # bytes of address space
HANG = 10  # seconds for one file
HEADER = 400  # bytes at the beginning, in which a change does most harm


def damaged(chance: random.Random, samples: list[bytes]) -> bytes:
    """Cut, flip, overwrite, repeat or splice a sample."""
    data = bytearray(chance.choice(samples))
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(min(len(data), chance.choice([40, HEADER, len(data)])) or 1)
        match chance.randrange(6):
            case 0:
                del data[place:]
            case 1:
                data[place : place + 1] = [chance.randrange(256)]
            case 2:
                data[place : place + 1] = [1 << chance.randrange(8) ^ (data[place] if place < len(data) else 0)]
            case 3:
                data[place : place + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
            case 4:
                data[place:place] = data[place : place + chance.randrange(1, 200)] * chance.choice([1, 1, 20])
            case 5:
                other = chance.choice(samples)
                cut = chance.randrange(len(other))
                data[place : place + len(other) - cut] = other[cut:]
    return bytes(data)


def main(count: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    chance, samples = random.Random(seed), list(formats(48).values())
    became: Counter[str] = Counter()
    slowest = 0.0
    for _ in range(count):
        data = damaged(chance, samples)
        faulthandler.dump_traceback_later(HANG, exit=True)
        start = time.perf_counter()
        try:
            pixels, _ = decode_radiograph(data, 32, chance.choice(["stretch", "pad"]))
            assert pixels.shape == (32, 32)
            assert pixels.dtype == "uint8"
            became["decoded"] += 1
        except UnusableError as error:
            became["unusable" if len(str(error).splitlines()) == 1 else "without a line"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**became, "slowest": round(slowest, 3), "peak_mb": round(peak)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
