"""How OpenMP threads wait for each other. Imports nothing heavy, because it must run before torch is imported."""

import os

# 43 microseconds where it was measured (bench/busy.py); libgomp's default of 300,000 is 13 milliseconds there.
SPIN_COUNT = 1000


def limit_spinning() -> None:
    """Let OpenMP threads that wait for others spin briefly, then sleep; must be called before torch is imported.

    Between two operators the threads wait for microseconds, and waking one that sleeps takes longer than that, so on an
    idle machine it pays to spin. But a thread whose core is taken by another process, or that used up a container's
    quota, comes back only after milliseconds, and all that time the others would keep spinning on the cores that it
    needs. The results are the same. If the environment sets OMP_WAIT_POLICY or GOMP_SPINCOUNT, nothing is changed;
    OpenMP libraries other than GCC's, as on macOS and Windows, do not read the variable.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
