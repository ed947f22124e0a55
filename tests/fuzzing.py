"""Decode thousands of damaged radiographs, with limits of memory and time.

python tests/fuzzing.py COUNT SEED    # prints the counts of the outcomes as one line of JSON
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

MEMORY_LIMIT = 2 * 2**30  # of the address space, bytes
TIMEOUT = 10  # of one file, seconds
HEADER_SIZE = 400  # bytes at the start, where changes have the largest effect


def damage(rng: random.Random, samples: list[bytes]) -> bytes:
    """Truncate, flip, overwrite, repeat or splice a sample."""
    data = bytearray(rng.choice(samples))
    for _ in range(rng.choice([1, 1, 2, 8])):
        offset = rng.randrange(min(len(data), rng.choice([40, HEADER_SIZE, len(data)])) or 1)
        match rng.randrange(6):
            case 0:
                del data[offset:]
            case 1:
                data[offset : offset + 1] = [rng.randrange(256)]
            case 2:
                data[offset : offset + 1] = [1 << rng.randrange(8) ^ (data[offset] if offset < len(data) else 0)]
            case 3:
                data[offset : offset + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
            case 4:
                data[offset:offset] = data[offset : offset + rng.randrange(1, 200)] * rng.choice([1, 1, 20])
            case 5:
                other = rng.choice(samples)
                tail = rng.randrange(len(other))
                data[offset : offset + len(other) - tail] = other[tail:]
    return bytes(data)


def main(count: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("ignore")
    rng, samples = random.Random(seed), list(formats(48).values())
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for _ in range(count):
        data = damage(rng, samples)
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        start = time.perf_counter()
        try:
            pixels, _ = decode_radiograph(data, 32, rng.choice(["stretch", "pad"]))
            assert pixels.shape == (32, 32)
            assert pixels.dtype == "uint8"
            outcomes["decoded"] += 1
        except UnusableError as error:
            outcomes["unusable" if len(str(error).splitlines()) == 1 else "reason of several lines"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**outcomes, "slowest": round(slowest, 3), "peak_mb": round(peak)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
