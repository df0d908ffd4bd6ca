"""`make mutation`: how many wrong functions gradcheck catches, and on how many right ones it gives a false alarm."""

import sys
import time

import torch

import torchbp
from tests.verify import reported  # noqa: F401  # registers
from tests.verify.functions import FUNCTIONS, KNOWN
from tests.verify.pairs import PAIRS


def check(function, inputs, **options):
    begun = time.perf_counter()
    report = torchbp.gradcheck(function, inputs, raise_exception=False, **options)
    return report, time.perf_counter() - begun


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    caught, alarms, unexpected = 0, 0, 0
    for name, pair in PAIRS.items():
        reference = pair.reference if pair.needs_reference else None
        report, seconds = check(pair.wrong, pair.make(), reference=reference)
        caught += not report
        first = report.wrong[0].check if report.wrong else "MISSED"
        print(f"{name:28} {first:22} {seconds:.2f} s")
        twin, _ = check(pair.right, pair.make(), reference=reference)
        alarms += not twin
        if not twin:
            print(f"  FALSE ALARM on its right twin\n{twin}")
    right = 0
    for name, (function, make) in FUNCTIONS.items():
        report, seconds = check(
            function, make(), skip=() if "--compile" in sys.argv else ("compile",)
        )
        right += 1
        if not report:
            alarms += 1
            unexpected += name not in KNOWN
            print(f"  ALARM on {name} ({KNOWN.get(name, 'not in the list')})\n{report}")
    print(
        f"caught {caught} of {len(PAIRS)}; alarms {alarms} on {len(PAIRS)} twins and {right} functions of torch"
    )
    return int(caught < len(PAIRS) or unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
