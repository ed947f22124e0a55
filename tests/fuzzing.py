"""Decode thousands of damaged radiographs, with limits of memory and time.

python tests/fuzzing.py COUNT SEED [FILE ...]    # prints the counts of the outcomes as one line of JSON

The files are samples beside those of `odd_files.encodings`, of formats that no installed package writes, such as HEIC.
"""

import faulthandler
import json
import random
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

from odd_files import encodings, formats

from pipeline.data import dicom
from pipeline.data.images import UnusableError, decode_radiograph

MEMORY_LIMIT = 2 * 2**30  # of the address space, bytes
TIMEOUT = 10  # of one file, seconds
HEADER_SIZES = 40, 400, 1200  # bytes at the start, of a file, a DICOM and its image; changes have most effect there


def damage(rng: random.Random, samples: list[bytes]) -> bytes:
    """Truncate, flip, overwrite, repeat or splice a sample."""
    data = bytearray(rng.choice(samples))
    for _ in range(rng.choice([1, 1, 2, 8])):
        offset = rng.randrange(min(len(data), rng.choice([*HEADER_SIZES, len(data)])) or 1)
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


def main(count: int, seed: int, *files: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("ignore")
    samples = [*formats(48).values(), *(data for data, _ in encodings(48).values())]
    samples += [Path(file).read_bytes() for file in files]
    rng = random.Random(seed)
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
            reason = str(error)
            outcomes["reason of several lines" if len(reason.splitlines()) != 1 else "unusable"] += 1
            assert " at 0x" not in reason, reason
        assert all(value.isprintable() for value in dicom.read_metadata(data).values())
        slowest = max(slowest, time.perf_counter() - start)
    faulthandler.cancel_dump_traceback_later()
    # Not ru_maxrss, which after exec is at least the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({**outcomes, "slowest": round(slowest, 3), "peak_mb": round(peak)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
